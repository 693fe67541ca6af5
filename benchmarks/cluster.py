"""Real nodes on loopback, started by `s4-server local`, and real `s4` commands."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import s4
from benchmarks.measure import MemoryWatch, peak_mb, tree

_BIN = Path(sys.executable).parent
_COMMAND_SECONDS = 600.0
_STOP_SECONDS = 15.0
_REQUEST = re.compile(rb" (?:GET|POST) /")


class BenchmarkError(Exception):
    """A measurement cannot be taken: a node or a command failed."""


class Cluster:
    """A cluster below a folder, which may hold the data of an earlier one; up while the context is."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = nodes
        self.conf = folder / "s4.conf"
        self.start_seconds = 0.0
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("S4_")}
        self._env |= {"S4_CONF_PATH": str(self.conf), "LC_ALL": "C"}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        # In a session of its own: Ctrl-C is ours, and we stop the nodes when what we measure has ended.
        self._process = subprocess.Popen(
            [_BIN / "s4-server", "local", "--nodes", str(self.nodes), "--dir", self.folder],
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            assert self._process.stdout is not None
            for line in self._process.stdout:  # it gives up by itself if the nodes do not start
                if line.startswith("export "):
                    break
            else:
                raise BenchmarkError(f"the nodes did not start: see the logs in {self.folder}")
        except BaseException:
            self._stop()
            raise
        self.start_seconds = time.monotonic() - began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the nodes notice that their parent died
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def client(self) -> s4.Client:
        """A client in this process, for what is shorter than the start of a command."""
        return s4.Client(str(self.conf))

    def run(self, *arguments: str | Path) -> None:
        """Run an `s4` command. Raises BenchmarkError if it fails."""
        with self._start(*arguments) as command:
            self._finish(command)

    def run_and_watch(self, *arguments: str | Path) -> float:
        """Run an `s4` command; the most megabytes that it took."""
        most = 0.0
        with self._start(*arguments) as command:
            # The kernel's own figure at the end would count what a forked child shares with us at first.
            while command.poll() is None:
                most = max(most, peak_mb(command.pid))
                time.sleep(0.005)
            self._finish(command)
        return most

    def _start(self, *arguments: str | Path) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [_BIN / "s4", *arguments],
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def _finish(self, command: "subprocess.Popen[bytes]") -> None:
        try:
            _out, errors = command.communicate(timeout=_COMMAND_SECONDS)
        except BaseException as e:
            command.kill()
            if isinstance(e, subprocess.TimeoutExpired):
                raise BenchmarkError(f"no end within {_COMMAND_SECONDS:g} s: {command.args!r}") from None
            raise
        if command.returncode != 0:
            *_files, fatal = errors.decode(errors="replace").splitlines() or [f"exit {command.returncode}"]
            raise BenchmarkError(f"{command.args!r}: {fatal}")

    def watch_memory(self) -> MemoryWatch:
        """Watches the memory of the nodes while its context lasts."""
        assert self._process is not None
        launcher = self._process.pid
        return MemoryWatch([pid for pid in tree(launcher) if _parent(pid) == launcher])

    def requests(self) -> int:
        """HTTP requests that the nodes have answered, as their logs have them."""
        logs = (self.folder / f"node{i}.log" for i in range(self.nodes))
        return sum(1 for log in logs for line in log.read_bytes().splitlines() if _REQUEST.search(line))

    def data(self, node: int) -> Path:
        """The data folder of a node."""
        return self.folder / f"node{node}" / "s4_data"


def _parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[1])
