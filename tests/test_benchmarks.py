"""The benchmarks still run: the tiniest form of every series, and a stop in the middle."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import procs
from procs import eventually

TOP = Path(__file__).parent.parent
SERIES = ["keys", "tasks", "shuffle", "sizes", "clients", "nodes"]


def _start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    (folder / "data").mkdir()
    command = [sys.executable, "-m", "benchmarks.run", "--tiny", "--out", str(folder / "out"), *arguments]
    return subprocess.Popen(
        [*command, "--dir", str(folder / "data")],
        cwd=TOP,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_series_gives_numbers_claims_and_a_panel(folder: Path) -> None:
    with _start(folder) as run:
        out, err = run.communicate(timeout=240)
    assert run.returncode == 0, out + err
    results = json.loads((folder / "out" / "results.json").read_text())
    assert list(results) == SERIES
    for result in results.values():
        assert len(result["rows"]) == 2 and result["claims"], result
        assert result["title"] in out
        assert all(claim["text"] in out for claim in result["claims"])
    if importlib.util.find_spec("matplotlib") is not None:
        assert "</svg>" in (folder / "out" / "growth.svg").read_text()
    assert list((folder / "data").iterdir()) == []


def test_ctrl_c_ends_the_nodes_and_removes_their_data(folder: Path) -> None:
    with _start(folder, "nodes") as run:
        data = folder / "data"
        eventually(lambda: list(data.glob("*/*/node0/s4_data/b")), 60, "a node that holds keys")
        os.kill(run.pid, signal.SIGINT)
        _out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (130, "stopped\n")
    assert list(data.iterdir()) == []
    assert procs.touching(folder) == []
