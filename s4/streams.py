"""Bytes between a socket and a file, hashed on the way. Client and workers use the same functions.

Keys that travel together follow each other on one connection without anything in between: both sides know
the sizes beforehand. A single key of unknown size ends where the sender closes its side.

Checksum: xxh64 (https://xxhash.com), seed 0, lower-case hex without leading zeros.
"""

import _socket  # for the reason in dial.py
import contextlib
import errno
import fcntl
import os
import select
import struct
import sys
import time
from functools import partial

import xxhash

from s4.dial import dial
from s4.errors import StalledError, TransferError

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms
if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 256 * 1024  # measured: larger blocks are no faster and sometimes much slower
IDLE_SECONDS = 5.0  # a connection on which nothing moves for so long is dropped
_EXTENT = 64 * 1024 * 1024  # disk space reserved at once for a file of unknown size
_SENDFILE_AT_ONCE = 4 * 1024 * 1024
_LOOK_SECONDS = 0.25  # how often it is looked at whether a slow receiver still takes something


def set_idle_limit(sock: _socket.socket, seconds: float = IDLE_SECONDS) -> None:
    """Make every blocking call on the socket give up after `seconds` without progress.

    The kernel's own timer: a Python timeout would poll before each call.
    """
    sock.settimeout(None)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, _timeval(seconds))
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, _timeval(min(seconds, _LOOK_SECONDS)))


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))


def connect(host: str, port: int) -> _socket.socket:
    """A connection for bytes. Raises TransferError."""
    try:
        sock = dial(host, port, IDLE_SECONDS)
    except OSError as e:
        raise TransferError(f"cannot connect to {host} port {port} for a transfer: {_reason(e)}") from e
    set_idle_limit(sock)
    return sock


class Incoming:
    """The receiving end of a connection."""

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock
        self._buffer = memoryview(bytearray(BLOCK))
        self._start = self._end = 0
        self.taken = 0  # bytes handed out so far

    def copy(self, target: int, size: int | None, *, reserve: bool = False) -> tuple[int, str]:
        """Write the next `size` bytes, or with None all until the end, to the descriptor `target`.

        `reserve`: the target is a new file, whose disk space is reserved ahead of the bytes.

        Returns (bytes, checksum); fewer bytes than asked for mean that the sender closed early. Raises
        TransferError when nothing moves for IDLE_SECONDS or the connection breaks, OSError of the target.
        """
        digest = xxhash.xxh64()
        total = reserved = 0
        if reserve and size is not None:
            preallocate(target, 0, size)
        while chunk := self._next(None if size is None else size - total):
            total += len(chunk)
            if reserve and size is None and total > max(reserved, BLOCK):
                try:
                    preallocate(target, reserved, _EXTENT)
                    reserved += _EXTENT
                except OSError as e:
                    if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                        raise
                    reserve, reserved = False, 0  # what still comes may be less
                    os.ftruncate(target, total - len(chunk))
            digest.update(chunk)
            write_all(target, chunk)
        if reserved > total:
            os.ftruncate(target, total)
        return total, format(digest.intdigest(), "x")

    def skip(self, size: int) -> None:
        """Read and discard the next `size` bytes. Raises TransferError as `copy` does."""
        while chunk := self._next(size):
            size -= len(chunk)

    def _next(self, most: int | None) -> memoryview:
        """The next bytes, no more than `most`; none at the end."""
        if self._start == self._end and most != 0:
            try:
                self._start, self._end = 0, self._sock.recv_into(self._buffer)
            except OSError as e:
                raise _broken(e) from e
        stop = self._end if most is None else min(self._end, self._start + most)
        chunk = self._buffer[self._start : stop]
        self._start = stop
        self.taken += len(chunk)
        return chunk


def write_all(target: int, data: memoryview) -> None:
    """os.write until everything is written."""
    while data:
        data = data[os.write(target, data) :]


def preallocate(target: int, offset: int, size: int) -> None:
    """Reserve disk space, which makes writing faster and a full disk known at once (OSError)."""
    if size > BLOCK:
        try:
            os.posix_fallocate(target, offset, size)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system or target without it
                raise


def send_stored(sock: _socket.socket, source: int, size: int) -> None:
    """Send `size` bytes of a file whose checksum is known, without looking at them.

    Raises TransferError when the receiver stalls or leaves, or the file is shorter.
    """
    receiver = _Receiver(sock)
    offset = 0
    while offset < size:
        count = min(size - offset, _SENDFILE_AT_ONCE)
        sent = receiver.send(partial(os.sendfile, sock.fileno(), source, offset, count))
        if sent == 0:
            raise TransferError(f"a file is shorter than expected: {offset} instead of {size} bytes")
        offset += sent or 0


class _Receiver:
    """The other end of a connection, which may be slow but must not stand still.

    The kernel lets a sender go on only when a third of its buffer, of megabytes, is free again, for which a
    slow reader may need longer than IDLE_SECONDS. What it takes shows in the length of the queue, see tcp(7).
    """

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock
        self._sent = 0  # bytes
        self._taken: int | None = None  # of these, when it was last looked at
        self._since = 0.0  # monotonic: when that changed

    def send(self, call: "Callable[[], int]") -> int | None:
        """How many bytes `call()` has sent; None if there was no room for any in _LOOK_SECONDS.

        Raises TransferError when the receiver has taken nothing for IDLE_SECONDS, or is gone.
        """
        began = time.monotonic()
        sent = None
        try:
            sent = call()
            self._sent += sent
        except BlockingIOError:
            pass
        except OSError as e:
            raise _broken(e) from e
        if time.monotonic() - began > _LOOK_SECONDS / 2:
            self._look()
        return sent

    def _look(self) -> None:
        from termios import TIOCOUTQ

        taken = self._sent - int.from_bytes(fcntl.ioctl(self._sock, TIOCOUTQ, bytes(4)), sys.byteorder)
        now = time.monotonic()
        if taken != self._taken:
            self._taken, self._since = taken, now
        elif now > self._since + IDLE_SECONDS:
            raise _stalled()


def send_hashed(sock: _socket.socket, source: int, size: int | None) -> tuple[int, str]:
    """Read a descriptor, for `size` bytes or with None to its end, hash and send it.

    Returns (bytes, checksum); fewer bytes than `size` mean that the source is shorter now. Raises
    TransferError when the receiver stalls or leaves, OSError of the source.
    """
    digest = xxhash.xxh64()
    buffer = memoryview(bytearray(BLOCK if size is None else min(BLOCK, max(size, 1))))
    total = 0
    while size is None or total < size:
        wanted = buffer if size is None else buffer[: size - total]
        count = os.readv(source, [wanted])
        if count == 0:
            break
        digest.update(buffer[:count])
        send_all(sock, buffer[:count])
        total += count
    return total, format(digest.intdigest(), "x")


def send_all(sock: _socket.socket, data: memoryview) -> None:
    """Send all of it. Raises TransferError when the receiver stalls or leaves."""
    receiver = _Receiver(sock)
    while data:
        data = data[receiver.send(partial(sock.send, data)) or 0 :]


def wait_for_bytes(source: int) -> None:
    """Wait until a descriptor has something to read, or its end, however long that takes."""
    readable = select.poll()
    readable.register(source, select.POLLIN)
    readable.poll()


def widen_pipe(source: int) -> None:
    """Let a pipe hold a whole block, if it is one: fewer and larger reads."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(source, fcntl.F_SETPIPE_SZ, 4 * BLOCK)


def checksum_of(source: int) -> tuple[int, str]:
    """(bytes, checksum) of a file from its beginning."""
    digest = xxhash.xxh64()
    total = 0
    size = os.fstat(source).st_size
    buffer = memoryview(bytearray(min(BLOCK, max(size, 1))))
    while count := os.preadv(source, [buffer], total):
        digest.update(buffer[:count])
        total += count
    return total, format(digest.intdigest(), "x")


def _broken(e: OSError) -> TransferError:
    if isinstance(e, BlockingIOError):
        return _stalled()
    return TransferError(f"the connection broke: {_reason(e)}")


def _stalled() -> StalledError:
    return StalledError(f"no bytes moved for {IDLE_SECONDS:g} seconds")


def _reason(e: OSError) -> str:
    return e.strerror or str(e) or type(e).__name__
