"""Jobs that a real cron daemon starts, in the bare environment that it gives them."""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from cluster import S4, Cluster
from procs import alive, eventually, everyone

TABLES = Path("/etc/cron.d")
MINUTE = 75  # seconds until the next run, at most


def _daemon_runs() -> bool:
    return any(process.name == "cron" for process in everyone())


def _program() -> str | None:
    """The daemon, which may lie beside the PATH of whoever runs the tests."""
    return shutil.which("cron", path=f"{os.environ['PATH']}:/usr/sbin")


def _install(table: Path, text: str) -> None:
    table.write_text(text)
    table.chmod(0o644)  # cron takes no table that others may write


@pytest.fixture
def cron() -> Iterator[Callable[[str], None]]:
    """A running cron daemon, installed where that may be done; takes a crontab, which goes at the end."""
    if os.geteuid() != 0:
        pytest.skip("only root may install and run Debian's cron")
    if _program() is None:
        if shutil.which("apt-get") is None:
            pytest.skip("there is no cron here, and no apt-get to install it with")
        for command in (["apt-get", "-qq", "update"], ["apt-get", "-qq", "install", "-y", "cron"]):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
            )
            if done.returncode != 0:
                pytest.skip(f"cron cannot be installed: {done.stderr.strip()[-200:]}")
    table = TABLES / f"s4-test-{os.getpid()}"
    # A service that the package has started is left as it is.
    program = _program()
    assert program is not None
    started = None if _daemon_runs() else subprocess.Popen([program, "-f"], start_new_session=True, cwd="/")
    try:
        yield partial(_install, table)
    finally:
        table.unlink(missing_ok=True)
        if started is not None:
            started.terminate()
            started.wait(10)
            eventually(lambda: not alive(started.pid), 5)


def test_a_job_of_every_minute_maps_only_what_is_new(
    start_cluster: Callable[..., Cluster], cron: Callable[[str], None]
) -> None:
    cluster = start_cluster(3)
    cluster.put_all({f"s4://b/in/{i:03}": b"x" for i in range(6)})
    said = cluster.work / "said"
    job = f"{S4} map s4://b/in/ s4://b/out/ 'cat; echo $filename' --skip-existing --no-overlap --quiet"
    cron(
        f"SHELL=/bin/sh\nPATH=/usr/bin:/bin\nHOME={cluster.root}/home\nS4_CONF_PATH={cluster.conf}\n"
        f"* * * * * root {job} >> {said} 2>&1\n"
    )

    def runs(count: int) -> bool:
        ended = "select count(*) from jobs where state = 'done'"
        return all(node.rows(ended)[0][0] >= count for node in cluster.nodes)

    eventually(lambda: runs(1), MINUTE, "the first run")
    assert len(cluster.keys("s4://b/out/")) == 6
    cluster.put("s4://b/in/100", b"new")
    eventually(lambda: cluster.keys("s4://b/out/100"), MINUTE, "a run with the new key")
    eventually(lambda: runs(2), 10)
    assert cluster.get("s4://b/out/100") == b"new100\n"
    counts = Counter(state for node in cluster.nodes for (state,) in node.rows("select state from tasks"))
    assert counts["done"] == 7 and counts["skipped"] >= 6 and set(counts) == {"done", "skipped"}
    assert said.read_text() == ""
