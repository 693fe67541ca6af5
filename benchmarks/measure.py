"""Time, memory and connections, as the kernel counts them in /proc."""

import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

_SAMPLING_SHARE = 0.02  # of a core, at most, goes into watching memory
_SAMPLING_PAUSE = 0.1  # seconds, at least


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def median_seconds(times: int, call: Callable[[], object]) -> float:
    """The median of several calls."""
    return statistics.median(seconds(call) for _ in range(times))


class Budget:
    """Bounds a series in time: no further point begins when the last one suggests that it will not fit."""

    def __init__(self, allowed_s: float) -> None:
        self._allowed_s = allowed_s
        self.left_out: list[object] = []

    def points(self, points: Sequence[T]) -> Iterator[T]:
        """The points that fit, in order; the others are in `left_out` afterwards."""
        began = time.monotonic()
        for i, point in enumerate(points):
            point_began = time.monotonic()
            yield point
            now = time.monotonic()
            if now - began + (now - point_began) > self._allowed_s:
                self.left_out += points[i + 1 :]
                return

    def note(self) -> list[str]:
        """A line about what was left out, if anything was."""
        return [f"no time for {', '.join(map(str, self.left_out))}"] if self.left_out else []


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for name in os.listdir("/proc"):
        if name.isdigit():
            stat = _read(f"/proc/{name}/stat")
            if stat:
                children[int(stat[stat.rindex(b")") + 2 :].split()[1])].append(int(name))
    found = [pid]
    for parent in found:
        found += children[parent]
    return found


def memory_mb(pid: int) -> float:
    """Megabytes (10^6 bytes) that a process takes, shared pages divided among those that share them."""
    return _kilobytes(f"/proc/{pid}/smaps_rollup", b"Pss:") * 1024 / 1e6


def peak_mb(pid: int) -> float:
    """The most megabytes that one process had in memory since its program began; 0 if it is gone."""
    return _kilobytes(f"/proc/{pid}/status", b"VmHWM:") * 1024 / 1e6


def accepted_connections() -> int:
    """TCP connections that anybody on this machine accepted since it started."""
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line[:4] == "Tcp:"]
    return int(dict(zip(*lines, strict=True))["PassiveOpens"])


class MemoryWatch:
    """Watches, from a thread, how much memory several nodes take, each given as its first process.

    `node_mb` is the most that all processes of one node took together, `process_mb` the most of any one.
    """

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots = roots
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.node_mb = self.process_mb = 0.0

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _look(self) -> None:
        for root in self._roots:
            processes = [memory_mb(pid) for pid in tree(root)]
            self.node_mb = max(self.node_mb, sum(processes))
            self.process_mb = max(self.process_mb, *processes)

    def _watch(self) -> None:
        pause = _SAMPLING_PAUSE
        while not self._over.wait(pause):
            cost = seconds(self._look)
            pause = max(_SAMPLING_PAUSE, cost / _SAMPLING_SHARE)


def _kilobytes(path: str, field: bytes) -> int:
    return next((int(line.split()[1]) for line in _read(path).splitlines() if line.startswith(field)), 0)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError:  # gone meanwhile
        return b""
