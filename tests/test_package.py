"""The wheel: built from a copy of the checkout, installed elsewhere, at work in another folder."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster
from procs import eventually

TOP = Path(__file__).parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "dist", "build", "tests")


def _run(*arguments: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, arguments)), cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _build(folder: Path) -> Path:
    checkout = folder / "checkout"
    shutil.copytree(TOP, checkout, ignore=NOT_COPIED)
    # Without its own environment if what it needs is here: that needs no network.
    alone = [] if importlib.util.find_spec("hatchling") is None else ["--no-isolation"]
    _run(sys.executable, "-m", "build", "--wheel", *alone, "-o", folder / "dist", checkout, cwd=folder)
    shutil.rmtree(checkout)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def _install(wheel: Path, environment: Path) -> Path:
    """The folder of its commands."""
    _run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent)
    python = environment / "bin" / "python"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python]
    _run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=wheel.parent)
    # The dependencies are those of this environment; its editable s4 does not come with a plain path.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def test_the_wheel_works_outside_the_checkout(start_cluster: Callable[..., Cluster], folder: Path) -> None:
    wheel = _build(folder)
    with zipfile.ZipFile(wheel) as inside:
        names = set(inside.namelist())
    assert {"s4/py.typed", "s4/migrations/migrations.py", "s4/index/keys.py", "s4/workers/pool.py"} <= names
    assert not [name for name in names if not name.startswith(("s4/", "s4-"))]
    assert any(name.endswith("LICENSE") for name in names)

    bin_ = _install(wheel, folder / "environment")
    script = "import s4, importlib.resources as r; print(s4.__file__, (r.files(s4) / 'py.typed').is_file())"
    shown = _run(bin_ / "python", "-c", script, cwd=folder)
    assert shown.startswith(str(folder / "environment")) and shown.split()[1] == "True"

    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    server = cluster.start_s4("-conf", str(cluster.conf), program=[str(bin_ / "s4-server")], cwd=node.folder)
    node.process = server

    def s4(*arguments: str, data: bytes | None = None) -> bytes:
        done = cluster.run(*arguments, data=data, program=[str(bin_ / "s4")])
        assert done.code == 0, done.err
        return done.out

    node.log_path.touch()
    eventually(lambda: cluster.run("health", program=[str(bin_ / "s4")]).code == 0, 30, "healthy")
    s4("cp", "-", "s4://b/in/000", data=b"hello\n")
    s4("map", "s4://b/in/", "s4://b/out/", "tr a-z A-Z")
    assert s4("cp", "s4://b/out/000", "-") == b"HELLO\n"
    assert [line.split()[2:] for line in s4("ls", "-r", "s4://b/").decode().splitlines()] == [
        ["6", "in/000"],
        ["6", "out/000"],
    ]
    assert (node.data / "_index" / "node.db").exists()
