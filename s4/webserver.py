"""waitress as a node needs it: careful with memory, disk and connections, however slow the callers are."""

import contextlib
import errno
import functools
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

from waitress import wasyncore
from waitress.buffers import FileBasedBuffer, OverflowableBuffer, TempfileBasedBuffer
from waitress.channel import ClientDisconnected, HTTPChannel
from waitress.receiver import ChunkedReceiver
from waitress.server import create_server

SPARE_THREADS = 8  # beyond those that may wait
MAX_REQUEST_BYTES = 64 * 1024 * 1024
MAX_CHUNK_LINE = 64 * 1024  # bytes of a line between the chunks of a body, or of its trailer
MAX_CONNECTIONS = 4000  # each costs a microsecond whenever something happens on any of them
IDLE_SECONDS = 20  # after which a connection without a request is closed
STALLED_SECONDS = 3600  # the same, when there is an answer that is not read any further, as by a pager
SEND_BUFFER = 128 * 1024
OUTPUT_BUFFER = 4 * 1024 * 1024  # of an answer; what is sent of it is let go of by so much
NO_DESCRIPTOR_SECONDS = 0.1  # between tries to accept a connection for which there is none
UNREAD_SECONDS = 30.0  # that an answer which cannot be spooled waits for a reader who takes nothing

log = logging.getLogger("s4.server")


class WebServer:
    """Serves a WSGI application on `listener`, a bound socket; up to `waiting` requests at once may wait.

    Raises OSError if it cannot listen.
    """

    def __init__(self, app: Callable[..., Any], listener: socket.socket, waiting: int) -> None:
        self._sockets: dict[int, Any] = {}
        self._server: Any = create_server(
            app,
            map=self._sockets,
            sockets=[listener],
            threads=waiting + SPARE_THREADS,
            connection_limit=_connection_limit(),
            cleanup_interval=5,
            channel_request_lookahead=1,  # lets an eval notice that its caller is gone
            # A listing never waits for a slow reader, while the disk has room: waitress spools what it cannot
            # send to a file.
            outbuf_high_watermark=2**62,
            max_request_body_size=MAX_REQUEST_BYTES + 1,  # the first number that is too large
            ident="s4",
        )
        self._server.channel_class = _Channel
        self._server.accept = functools.partial(_accept, self._server.accept)
        self._server.maintenance = lambda now: _end_idle(self._server.active_channels.values(), now)
        # Connections inherit it. waitress sends blocks of this size, by default megabytes for each reader.
        self._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        logging.getLogger("waitress").addFilter(is_no_lost_client)

    def serve(self, seconds: float) -> None:
        """Serve until something has happened, or `wake` is called, but no longer than so many seconds."""
        wasyncore.loop(timeout=seconds, map=self._sockets, use_poll=True, count=1)

    def wake(self) -> None:
        """End a `serve` that waits; from any thread or signal handler."""
        self._server.pull_trigger()

    def refuse(self) -> None:
        """Take no further connections."""
        self._server.del_channel()
        self._server.socket.close()


def _connection_limit() -> int:
    """How many connections are accepted, so that half of the descriptors are left for all else."""
    return min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def _accept(accept: Callable[[], Any]) -> Any:
    """A connection; None, after a moment, if there is no descriptor for it: waitress would try again at once,
    with a traceback each time."""
    try:
        return accept()
    except OSError as e:
        if e.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        log.warning("a connection has to wait: %s", e.strerror)
        time.sleep(NO_DESCRIPTOR_SECONDS)
        return None


def _end_idle(channels: Iterable[Any], now: float) -> None:
    """Close connections on which nothing moves.

    waitress itself would be as impatient with who reads an answer, such as a pager.
    """
    for channel in channels:
        seconds = STALLED_SECONDS if channel.total_outbufs_len else IDLE_SECONDS
        if not channel.requests and channel.last_activity < now - seconds:
            _close(channel)


def _close(channel: Any) -> None:
    """Have a connection closed, also one on which nothing can be written: it would not be looked at."""
    channel.will_close = True
    with contextlib.suppress(OSError):
        channel.socket.shutdown(socket.SHUT_RDWR)


def is_no_lost_client(record: logging.LogRecord) -> bool:
    """False where waitress 3.0.2 trips over its own note that the sender of a malformed request left."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not isinstance(error.__context__, ClientDisconnected)


class _Spool(TempfileBasedBuffer):  # type: ignore[misc]
    """A file, which is as it was when something does not fit into it (OSError)."""

    def __init__(self, memory: Any) -> None:
        size, position = len(memory.getfile().getbuffer()), memory.getfile().tell()
        file = self.newfile()
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
            FileBasedBuffer.__init__(self, file, memory)
        except OSError:
            file.close()
            memory.getfile().seek(position)
            raise

    def append(self, data: Any) -> None:
        position, end = self.file.tell(), self.file.seek(0, os.SEEK_END)
        try:
            os.posix_fallocate(self.file.fileno(), end, len(data))
            self.file.seek(end)
            self.file.write(data)
            self.remain += len(data)
        finally:
            self.file.seek(position)


class _Buffer(OverflowableBuffer):  # type: ignore[misc]
    """Memory, and a file when it becomes large; `stuck` in memory when the disk is full."""

    buf: Any
    stuck = False

    def _set_large_buffer(self) -> None:
        try:
            self.buf = _Spool(self.buf)
        except OSError:
            self.stuck = True
        else:
            self.overflowed = True


class _Channel(HTTPChannel):  # type: ignore[misc]
    """A connection.

    waitress 3.0.2 keeps all that it ever put into a buffer until the buffer is done with. While a reader
    keeps up, that is memory, so the buffer is changed for a new one every few megabytes. When a reader does
    not, it is a file. On a full disk, where a part of the answer would be lost, it waits for its reader.

    A caller who closes only his own side is answered all the same, but an eval takes him for gone.
    """

    current_outbuf_count: int

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.outbufs = [_Buffer(self.adj.outbuf_overflow)]
        self._half_closed = False

    def check_client_disconnected(self) -> bool:
        return self._half_closed or not self.connected

    def readable(self) -> bool:
        return not self._half_closed and super().readable()

    def writable(self) -> bool:
        return self._answered or super().writable()

    @property
    def _answered(self) -> bool:
        """Whether a caller who will say no more has all his answers."""
        return self._half_closed and not self.requests

    def send_continue(self) -> None:
        """waitress 3.0.2 forgets here that a request is complete: one without a body, or one refused."""
        if self.request.completed:
            self.request.expect_continue = False
        else:
            super().send_continue()

    def received(self, data: bytes) -> bool:
        """waitress 3.0.2 takes the lines between chunks however long they are, and copies them each time."""
        more: bool = super().received(data)
        body = self.request.body_rcv if self.request is not None else None
        if isinstance(body, ChunkedReceiver) and len(body.control_line) + len(body.trailer) > MAX_CHUNK_LINE:
            _close(self)
        return more

    def handle_read(self) -> None:
        answering = self.requests or self.total_outbufs_len
        with contextlib.suppress(OSError):  # which the read itself meets again
            if answering and not self.socket.recv(1, socket.MSG_PEEK):
                self._half_closed = True
                return
        super().handle_read()

    def handle_write(self) -> None:
        if self._answered:
            self.close_when_flushed = True
        super().handle_write()

    def write_soon(self, data: Any) -> Any:
        with self.outbuf_lock:
            last = self.outbufs[-1]
            if last.stuck:
                self._wait_for_reader()
            # A file takes all that follows, up to the next answer, before which waitress sets this count.
            most = self.adj.outbuf_high_watermark if last.overflowed else OUTPUT_BUFFER
            if last.stuck or self.current_outbuf_count >= most:
                self._change_buffer()
            try:
                return super().write_soon(data)
            except OSError:  # the file cannot grow
                self._wait_for_reader()
                self._change_buffer()
                return super().write_soon(data)

    def _wait_for_reader(self) -> None:
        """Wait until what is unread is little enough to be kept in memory."""
        while self.connected and self.total_outbufs_len >= self.adj.outbuf_overflow:
            self.server.pull_trigger()
            if not self.outbuf_lock.wait(UNREAD_SECONDS):  # which ends when some of it could be sent
                _close(self)
                raise ClientDisconnected

    def _change_buffer(self) -> None:
        self.outbufs.append(_Buffer(self.adj.outbuf_overflow))
        self.current_outbuf_count = 0
