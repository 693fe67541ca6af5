"""Counts, not times: what makes commands slow is counted, so that it shows on any machine.

Start-up is most of a short command, and imports are most of the start.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from cluster import S4, Cluster

# Besides what Python imports for itself and for the script of pip. They are 32, and one more is 0.2 to 3 ms:
# look for another way before you raise the number.
MOST_FOR_SERVERS = 33
# Easily taken along, and 1 to 40 ms each.
NEVER = {
    "argparse",
    "ast",
    "asyncio",
    "dis",
    "email",
    "falcon",
    "fire.console.console_io",
    "fire.docstrings",
    "fire.helptext",
    "gettext",
    "hashlib",
    "http",
    "http.client",
    "linecache",
    "locale",
    "logging",
    "multiprocessing",
    "orjson",
    "pathlib",
    "platform",
    "random",
    "s4.api",
    "s4.node",
    "sh",
    "shutil",
    "socket",
    "sqlite3",
    "sqlite_utils",
    "ssl",
    "subprocess",
    "tempfile",
    "tokenize",
    "tqdm",
    "urllib.parse",
    "waitress",
}
NOT_FOR_SHORT_ONES = {"dataclasses", "typing"}  # which records of jobs are worth
MOVES_NO_BYTES = {"xxhash", "s4.streams", "s4.copying", "s4.exchange"}


def _imported(env: dict[str, str], *command: str) -> set[str]:
    """The modules that a Python program imports, from the first on."""
    argv = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines[1:]}


@pytest.fixture(scope="module")
def bare() -> set[str]:
    """The modules of a Python that does nothing but what the script of pip begins with."""
    return _imported({}, "-c", "import re, sys")


def test_the_servers_are_shown_with_few_modules(cluster: Cluster, bare: set[str]) -> None:
    found = _imported(cluster.env, S4, "servers") - bare
    assert {"fire", "inspect", "s4.cli", "s4.client"} <= found
    assert len(found) <= MOST_FOR_SERVERS, sorted(found)
    assert not found & (NEVER | NOT_FOR_SHORT_ONES | MOVES_NO_BYTES | {"contextlib", "json", "threading"})


@pytest.mark.parametrize(
    ("command", "besides"),
    [
        ("health", NOT_FOR_SHORT_ONES | MOVES_NO_BYTES | {"json"}),
        ("ls BUCKET/", NOT_FOR_SHORT_ONES | MOVES_NO_BYTES),
        ("ls -r BUCKET/", NOT_FOR_SHORT_ONES | MOVES_NO_BYTES),
        ("eval BUCKET/000 cat", NOT_FOR_SHORT_ONES | MOVES_NO_BYTES | {"json", "threading"}),
        ("cp FILE BUCKET/new", NOT_FOR_SHORT_ONES | {"json"}),
        ("cp BUCKET/000 -", NOT_FOR_SHORT_ONES | {"json"}),
        ("rm BUCKET/001", NOT_FOR_SHORT_ONES | MOVES_NO_BYTES | {"json"}),
        ("map BUCKET/ BUCKETout/ cat", MOVES_NO_BYTES),
    ],
)
def test_a_command_imports_nothing_large_that_it_does_not_use(
    cluster: Cluster, bucket: str, bare: set[str], folder: Path, command: str, besides: set[str]
) -> None:
    (folder / "file").write_bytes(b"x" * 10_000)
    cluster.put_all({f"{bucket}/000": b"x", f"{bucket}/001": b"x"})
    words = command.replace("BUCKET", bucket).replace("FILE", str(folder / "file")).split()
    found = _imported(cluster.env, S4, *words) - bare
    assert "s4.client" in found
    assert not found & (NEVER | besides)
