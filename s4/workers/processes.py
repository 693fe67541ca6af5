"""Process groups and orphans, so that nothing of a command outlives it. Linux only: prctl and /proc.

A command may leave children behind in sessions of their own (`setsid sleep 1000 &`). A *subreaper* becomes
their parent when theirs is gone, and so can find and end them. Each worker is one for its commands, and the
node for its workers.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # prctl(2)
_PR_SET_CHILD_SUBREAPER = 36
_KILL_SECONDS = 3.0

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def become_subreaper() -> None:
    """Make this process the parent of its descendants whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def children() -> list[tuple[int, int]]:
    """(pid, session) of every child of this process, zombies among them."""
    me = str(os.getpid())
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as f:
                line = f.read().decode("utf-8", "replace")
        except OSError:  # gone meanwhile
            continue
        _state, parent, _group, session = line[line.rindex(")") + 2 :].split(maxsplit=4)[:4]
        if parent == me:
            found.append((int(name), int(session)))
    return found


def has_children_besides(pid: int) -> bool:
    """Whether this process has children, zombies among them, other than `pid`; asked by its main thread."""
    own = os.getpid()
    try:
        return any(int(child) != pid for child in _contents(f"/proc/{own}/task/{own}/children").split())
    except OSError:  # a kernel without this file
        return any(child != pid for child, _session in children())


def memory_below(pid: int) -> int:
    """The most memory, in bytes, that the living processes below a process of one thread have had resident,
    added up.

    Pages that they share count for each of them.
    """
    total = 0
    pending = _children_of(pid, 1)
    while pending:
        child = pending.pop()
        memory, threads = _status(child)
        total += memory
        pending += _children_of(child, threads)
    return total


def memory_besides(pid: int) -> int:
    """The same of all children of this process but `pid`, asked by its main thread."""
    own = os.getpid()
    return sum(memory_of(child) + memory_below(child) for child in _children_of(own, 1) if child != pid)


def memory_of(pid: int) -> int:
    """The most memory, in bytes, that a process has had resident; 0 if it is gone."""
    return _status(pid)[0]


def _children_of(pid: int, threads: int) -> list[int]:
    """The children of a process, none if it is gone or the kernel does not tell."""
    found: list[int] = []
    try:
        # Most have one thread, and to list the folder costs as much as all the rest.
        for thread in os.listdir(f"/proc/{pid}/task") if threads > 1 else [pid]:
            found += map(int, _contents(f"/proc/{pid}/task/{thread}/children").split())
    except OSError:
        pass
    return found


def _status(pid: int) -> tuple[int, int]:
    """The most memory that a process has had resident, in bytes, and how many threads it has: proc(5)."""
    try:
        status = _contents(f"/proc/{pid}/status")
    except OSError:  # it is gone
        return 0, 1
    memory = status.partition(b"\nVmHWM:")[2].split(None, 1)  # a zombie has none
    return 1024 * int(memory[0]) if memory else 0, int(status.partition(b"\nThreads:")[2].split(None, 1)[0])


def _contents(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536)
    finally:
        os.close(fd)


def kill_children(chosen: Callable[[int, int], bool]) -> None:
    """End every child for which `chosen(pid, session)` holds, and their children, which become ours."""
    deadline = time.monotonic() + _KILL_SECONDS
    while doomed := [pid for pid, session in children() if chosen(pid, session)]:
        for pid in doomed:
            kill(pid)
        for pid in doomed:
            reap(pid)
        if time.monotonic() > deadline:  # a process the kernel does not let go of, such as one in disk wait
            return


def kill(pid: int) -> None:
    """SIGKILL to a process that may be gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def reap(pid: int) -> int | None:
    """Wait a moment for a killed child. Its exit code (-N for signal N), None if somebody else reaped it."""
    deadline = time.monotonic() + 0.5
    try:
        while time.monotonic() < deadline:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
    except ChildProcessError:
        pass
    return None
