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
        with open(f"/proc/{own}/task/{own}/children", "rb", buffering=0) as f:
            return any(int(child) != pid for child in f.read().split())
    except OSError:  # a kernel without this file
        return any(child != pid for child, _session in children())


def memory_below(pid: int) -> int:
    """The most memory, in bytes, that the living processes below a process have had resident, added up.

    Pages that they share count for each of them.
    """
    total = 0
    pending = [pid]
    while pending:
        parent = pending.pop()
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", "rb", buffering=0) as f:
                    pending += map(int, f.read().split())
        except OSError:  # gone meanwhile, or a kernel without these files
            continue
        if parent != pid:
            total += memory_of(parent)
    return total


def memory_of(pid: int) -> int:
    """The most memory, in bytes, that a process has had resident; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as f:
            return 1024 * int(f.read().partition(b"VmHWM:")[2].split(None, 1)[0])
    except (OSError, IndexError):  # a zombie has none
        return 0


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


def reap(pid: int) -> None:
    """Wait a moment for a killed child, unless somebody else has reaped it."""
    deadline = time.monotonic() + 0.5
    try:
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
    except ChildProcessError:
        pass
