"""What /proc knows about processes: who is still there, who started whom, and how much memory it takes."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def eventually(check: Callable[[], T], seconds: float = 10, what: str = "") -> T:
    """The first true value of `check()`; fails the test if there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what or check}; last value: {value!r}")
        time.sleep(0.02)
    return value


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    name: str
    state: str
    command: str

    @property
    def is_python(self) -> bool:
        return "python" in self.command.split("\0")[0]


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")


def everyone() -> Iterator[Process]:
    """All processes of the machine, without zombies."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        try:
            stat, command = _read(pid, "stat"), _read(pid, "cmdline")
        except OSError:
            continue
        name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        if rest[0] not in "ZX":
            yield Process(pid, int(rest[1]), name, rest[0], command)


def alive(pid: int) -> bool:
    return any(process.pid == pid for process in everyone())


def holds_open(pid: int, folder: Path) -> bool:
    """Whether a process has a file below the folder open."""
    try:
        return any(_below(f"/proc/{pid}/fd/{fd}", folder) for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False


def _below(link: str, folder: Path) -> bool:
    try:
        return os.readlink(link).startswith(f"{folder}/")
    except OSError:
        return False


def touching(folder: Path) -> list[Process]:
    """Processes that work below the folder, hold a file of it open, or have its path in their environment."""
    return [
        process
        for process in everyone()
        if process.pid != os.getpid()
        and (
            _below(f"/proc/{process.pid}/cwd", folder)
            or holds_open(process.pid, folder)
            or str(folder) in _environment(process.pid)
        )
    ]


def _environment(pid: int) -> str:
    try:
        return _read(pid, "environ")
    except OSError:
        return ""


def running(text: str) -> list[Process]:
    """Processes, other than this one, with the text in their command line."""
    return [process for process in everyone() if text in process.command and process.pid != os.getpid()]


def descendants(pid: int) -> list[Process]:
    """All processes below one, parents before their children."""
    all_of_them = list(everyone())
    found: list[Process] = []
    parents = [pid]
    while parents:
        below = [process for process in all_of_them if process.parent in parents]
        found += below
        parents = [process.pid for process in below]
    return found


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def peak_megabytes(pid: int) -> float:
    """The most memory that a process ever had, or since `forget_peak`; 0 if it is gone."""
    return _kilobytes(pid, "status", "VmHWM:") / 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def proportional_megabytes(pid: int) -> float:
    """The memory of a process now, shared pages divided among those that share them."""
    return _kilobytes(pid, "smaps_rollup", "Pss:") / 1024


def read_bytes(pid: int) -> int:
    """What a process has read so far, from files or otherwise, but for what came by `recv`."""
    return int(_read(pid, "io").split()[1])


def _kilobytes(pid: int, name: str, field: str) -> int:
    try:
        lines = _read(pid, name).splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)
