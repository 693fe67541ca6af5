"""Moving the bytes of keys: what a worker does for puts, gets, shuffles and reindex."""

import contextlib
import os
import select
import socket
import time
from functools import lru_cache

from s4.errors import TransferError
from s4.exchange import put_outputs
from s4.http import Caller
from s4.streams import (
    IDLE_SECONDS,
    Incoming,
    checksum_of,
    connect,
    send_stored,
    set_idle_limit,
)
from s4.workers.tasks import Checksum, Checksums, Failure, Push, Pushed, Receive, Received, Send, StoredFile


def receive(task: Receive, fds: list[int], arriving: str) -> Received:
    """See tasks.Receive. A file begins at the path `arriving`. Files of a transfer that fails are removed."""
    made: list[str] = []
    files: list[StoredFile] = []
    try:
        with _accept(fds[0], task.peer, sends=any(size != 0 for size in task.sizes)) as sock:
            incoming = Incoming(sock)
            for file, size in zip(task.files, task.sizes, strict=True):
                fd = os.open(arriving, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                made.append(arriving)
                try:
                    arrived, checksum = incoming.copy(fd, size, reserve=True)
                    if size is not None and arrived != size:
                        raise TransferError(f"the sender closed after {arrived} of {size} bytes")
                    os.fchmod(fd, 0o444)
                finally:
                    os.close(fd)
                os.rename(arriving, file)
                made[-1] = file
                files.append(StoredFile(file, arrived, checksum))
    except BaseException:
        for file in made:
            os.unlink(file)
        raise
    return Received(files)


def send(task: Send, fds: list[int]) -> None:
    """See tasks.Send."""
    sock = connect(task.peer, task.port) if task.port is not None else _accept(fds[0], task.peer, sends=False)
    sources = fds if task.port is not None else fds[1:]
    with contextlib.closing(sock):
        for source, size in zip(sources, task.sizes, strict=True):
            send_stored(sock, source, size)


def push(task: Push) -> Pushed:
    """See tasks.Push."""
    entries = [(path, sent.file, sent.size, number) for path, sent, number in task.entries]
    try:
        refused = put_outputs(_caller(task.server, task.fingerprint, task.timeout), task.job, entries)
    finally:
        for _path, sent, _number in task.entries:
            with contextlib.suppress(FileNotFoundError):  # it was sent
                os.unlink(sent.file)
    return Pushed([None if e is None else Failure(type(e).__name__, str(e)) for e in refused])


@lru_cache(maxsize=16)
def _caller(server: str, fingerprint: str, timeout: float) -> Caller:
    """A connection that is kept for the next batch."""
    return Caller(server, fingerprint, timeout)


def checksum(task: Checksum) -> Checksums:
    """See tasks.Checksum."""
    found: list[tuple[int, str, int] | str] = []
    for file in task.files:
        try:
            fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                with contextlib.suppress(PermissionError):  # it is somebody else's, as after a restore
                    os.fchmod(fd, 0o444)
                found.append((*checksum_of(fd), int(os.fstat(fd).st_mtime)))
            finally:
                os.close(fd)
        except OSError as e:
            found.append(e.strerror or str(e))
    return Checksums(found)


def _accept(fd: int, peer: str, *, sends: bool) -> socket.socket:
    """The first connection from the address that prepared the transfer; others are turned away.

    A caller who `sends` has to begin in the time that there is to connect: no bytes move before.
    """
    give_up = time.monotonic() + IDLE_SECONDS  # whoever else connects does not put it off
    others = ""
    with socket.socket(fileno=os.dup(fd)) as listener, contextlib.suppress(BlockingIOError):
        while (left := give_up - time.monotonic()) > 0:
            set_idle_limit(listener, max(left, 0.001))  # 0 would be no limit
            sock, address = listener.accept()
            if address[0] == peer:
                set_idle_limit(sock)
                if not sends or _readable(sock, give_up):
                    return sock
                sock.close()
                raise TransferError(f"no bytes moved for {IDLE_SECONDS:g} seconds")
            sock.close()
            others = f" from {peer}; connections from other addresses were turned away"
    raise TransferError(f"nobody connected for {IDLE_SECONDS:g} seconds{others}")


def _readable(sock: socket.socket, give_up: float) -> bool:
    """Whether something has come, or the end, by the time `give_up` (monotonic)."""
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    return bool(waiting.poll(max(0, give_up - time.monotonic()) * 1000))
