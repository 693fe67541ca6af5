"""A worker process: takes one task after the other from its pipe, and answers each.

It is made to be lost at any time. It runs in a process group of its own; when the node is gone, it ends its
commands and itself.
"""

import contextlib
import logging
import os
import socket
import threading
from multiprocessing.connection import Connection
from multiprocessing.reduction import recvfds
from typing import Any

from s4.errors import S4Error
from s4.workers import processes, transfers
from s4.workers.commands import Commands
from s4.workers.scratch import Scratch
from s4.workers.tasks import Checksum, Command, Failure, Push, Receive, Result, Send, Task

log = logging.getLogger("s4.worker")


def main(connection: "Connection[Any, Any]", lifeline: "Connection[Any, Any]", scratch: str) -> None:
    """Serve `connection` until it closes. `lifeline` closes when the node ends; `scratch` is a folder."""
    os.setpgid(0, 0)
    for name in os.listdir("/proc/self/fd"):
        _keep_from_commands(int(name))
    processes.become_subreaper()
    threading.Thread(target=_end_with_node, args=(lifeline,), daemon=True).start()
    files = Scratch(scratch, os.getpid())
    commands = Commands(files)
    descriptors = socket.socket(fileno=os.dup(connection.fileno()))
    while True:
        try:
            task, count = connection.recv()
            fds = recvfds(descriptors, count) if count else []
            for fd in fds:
                _keep_from_commands(fd)
        except (EOFError, OSError):
            break
        answer: Result
        try:
            answer = _perform(task, fds, files, commands)
        except S4Error as e:
            answer = Failure(type(e).__name__, str(e))
        except OSError as e:
            where = f"{e.filename}: " if e.filename else ""
            answer = Failure("S4Error", f"{where}{e.strerror or e}")
        except Exception as e:
            log.exception("worker %d: %r failed", os.getpid(), type(task).__name__)
            answer = Failure("S4Error", f"internal error in a worker: {e!r}")
        finally:
            for fd in fds:
                os.close(fd)
        try:
            connection.send(answer)
        except OSError:  # the node is gone
            break
    processes.kill_children(lambda _pid, _session: True)


def _perform(task: Task, fds: list[int], files: Scratch, commands: Commands) -> Result:
    match task:
        case Command():
            return commands.run(task)
        case Receive():
            files.renew()
            return transfers.receive(task, fds, files.arriving)
        case Send():
            transfers.send(task, fds)
            return None
        case Push():
            return transfers.push(task)
        case Checksum():
            return transfers.checksum(task)


def _keep_from_commands(fd: int) -> None:
    # Descriptors that came over a socket are inheritable; in a command they would keep our pipe open.
    with contextlib.suppress(OSError):
        os.set_inheritable(fd, fd <= 2)


def _end_with_node(lifeline: "Connection[Any, Any]") -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        pass
    logging.disable()  # the task under way fails now, as by the end of a shell that just starts
    processes.kill_children(lambda _pid, _session: True)
    os._exit(1)
