"""Requests to a node, as the client and other nodes make them: keep-alive, errors, and back-off.

Every request carries the fingerprint of the caller's conf, so that a node of another cluster refuses it.

HTTP/1.1 over a socket, as much of it as nodes speak, because http.client takes 20 ms to import: more than
Python, Fire and the rest of the client together. What is unlike the standard is an error, never a guess.
"""

import _socket  # for the reason in dial.py
import os
import time

from s4.config import parse_server
from s4.dial import dial
from s4.errors import (
    BadRequestError,
    BusyError,
    CancelledError,
    ConflictError,
    MissingError,
    NodeError,
    NonsenseError,
    OverlapError,
    S4Error,
    StoppingError,
)

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

FINGERPRINT_HEADER = "S4-Conf"
EXITCODE_HEADER = "S4-Exit-Code"
STDERR_SIZE_HEADER = "S4-Stderr-Size"
CONNECT_SECONDS = 5.0
_LONGEST_SILENCE = 2_000_000.0  # seconds; a socket takes no more than 24 days
_FIRST_PAUSE = 0.1  # seconds; most often a place is free at once
_LONGEST_PAUSE = 5.0
_NOTICE_SECONDS = 0.05  # how soon a pause sees that the request was given up

_MAX_HEAD = 64 * 1024  # bytes: of a line, and of all headers together
_MAX_DIGITS = 16  # of a length
_BLOCK = 256 * 1024
_DIGITS = frozenset("0123456789")
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-~")

# The way back of STATUSES in api.py.
ERROR_OF_STATUS: dict[int, type[S4Error]] = {
    400: BadRequestError,
    404: MissingError,
    409: ConflictError,
    423: OverlapError,
    429: BusyError,
    503: StoppingError,
}


class _NotHttpError(Exception):
    """What came is not HTTP as a node speaks it."""


class _BrokenOffError(Exception):
    """The connection ended in the middle of an answer."""


class Response:
    """An answer, whose body is read from the connection as it comes. Read it inside `Caller.reading()`."""

    def __init__(self, connection: "_Connection", status: int, headers: dict[str, str]) -> None:
        self.status = status
        self._headers = headers
        self._connection = connection
        self._left = 0  # bytes that are still to come; of a body in chunks, of the present one
        self._first_chunk = True
        coding, length = self.getheader("Transfer-Encoding"), self.getheader("Content-Length")
        self._chunked = coding is not None
        if self._chunked:
            if length is not None or coding != "chunked":
                raise _NotHttpError
        else:
            # A body without a length would look whole when it broke off; nodes do not send any.
            self._left = _number(length or "", _DIGITS, 10)
        self.ended = not self._chunked and self._left == 0  # the body was read whole

    def getheader(self, name: str) -> str | None:
        """The value of a header."""
        return self._headers.get(name.lower())

    def read(self, size: int | None = None) -> bytes:
        """The next bytes of the body, at most `size`, nothing at the end; without `size` all that is left."""
        if size is None:
            return b"".join(iter(lambda: self.read(_BLOCK), b""))
        if self._chunked and self._left == 0 and not self.ended:
            self._next_chunk()
        if self.ended or size == 0:
            return b""
        block = self._connection.take(min(size, self._left))
        self._left -= len(block)
        self.ended = self._left == 0 and not self._chunked
        return block

    def _next_chunk(self) -> None:
        if not self._first_chunk and self._connection.line():
            raise _NotHttpError  # the chunk before is longer than it said
        self._first_chunk = False
        self._left = _number(self._connection.line().partition(";")[0].strip(), _HEX_DIGITS, 16)
        if self._left == 0:
            self._connection.headers()  # there may be some, which nobody asks for
            self.ended = True


def _number(text: str, digits: frozenset[str], base: int) -> int:
    # int() alone takes signs, spaces and underscores too.
    if not text or len(text) > _MAX_DIGITS or not digits.issuperset(text):
        raise _NotHttpError
    return int(text, base)


class _Connection:
    """A connection to a node, on which one answer follows the other: lines, headers and bytes."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        self.sock = dial(host, port, timeout)
        # The host may have several addresses, of which the node has one: that which answered.
        self.address: str = self.sock.getpeername()[0]
        # The end of a long request must not wait until its beginning is acknowledged.
        self.sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        _notice_dead_hosts(self.sock)
        self.kept = True  # for another request
        self._data = b""  # received, and from _start on not yet taken
        self._start = 0

    def head(self) -> tuple[int, dict[str, str]]:
        """(status, headers) of the next answer. Raises ConnectionError if there is none."""
        if self._start == len(self._data) and not self._receive():
            raise ConnectionResetError("it closed the connection without an answer")
        # Whoever speaks something else may be waiting for us: do not wait for the end of a line then.
        while len(self._data) < self._start + 7 and self._begins_like_http() and self._receive():
            pass
        if not self._begins_like_http():
            raise _NotHttpError
        version, _space, rest = self.line().partition(" ")
        status = rest.partition(" ")[0]
        if version not in ("HTTP/1.0", "HTTP/1.1") or len(status) != 3:
            raise _NotHttpError
        headers = self.headers()
        self.kept = version == "HTTP/1.1" and "close" not in headers.get("connection", "").lower()
        return _number(status, _DIGITS, 10), headers

    def _begins_like_http(self) -> bool:
        return b"HTTP/1.".startswith(self._data[self._start : self._start + 7])

    def headers(self) -> dict[str, str]:
        """Header lines up to an empty line, by name in lower case; of a repeated one all values."""
        found: dict[str, str] = {}
        size = 0
        while line := self.line():
            size += len(line)
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip() or size > _MAX_HEAD:
                raise _NotHttpError
            name, value = name.lower(), value.strip()
            found[name] = f"{found[name]}, {value}" if name in found else value
        return found

    def line(self) -> str:
        """The next line, without its end."""
        while (end := self._data.find(b"\r\n", self._start)) < 0:
            if len(self._data) - self._start > _MAX_HEAD:
                raise _NotHttpError
            if not self._receive():
                raise _BrokenOffError
        line = self._data[self._start : end]
        self._start = end + 2
        if b"\n" in line:
            raise _NotHttpError
        return line.decode("latin-1")

    def take(self, size: int) -> bytes:
        """At least one and at most `size` bytes."""
        if self._start == len(self._data) and not self._receive():
            raise _BrokenOffError
        block = self._data[self._start : self._start + size]
        self._start += len(block)
        return block

    def _receive(self) -> bool:
        """Wait for more; False if there is no more."""
        came = self.sock.recv(_BLOCK)
        self._data = self._data[self._start :] + came
        self._start = 0
        return bool(came)


class Caller:
    """A kept connection to one server; used by one thread at a time.

    `timeout` is in seconds: how long a busy server is asked again, and how long it may be silent.
    """

    def __init__(self, server: str, fingerprint: str, timeout: float) -> None:
        self.server = server
        address = parse_server(server)
        self.host, self.port = address.host, address.port
        self._headers = f"Host: {address}\r\n{FINGERPRINT_HEADER}: {fingerprint}\r\n"
        self._timeout = timeout
        self._connection: _Connection | None = None
        self._response: Response | None = None
        self._transfer: _socket.socket | None = None
        self._aborted = False

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection; the next request makes another."""
        if self._connection is not None:
            self._connection.sock.close()
            self._connection = None

    def transfer(self, port: int) -> "_Transfer":
        """A connection for bytes to a port that the server named, for a `with`. Raises TransferError."""
        return _Transfer(self, port)

    def _check_aborted(self) -> None:
        if self._aborted:
            raise CancelledError(f"the request to {self.server} was given up")

    def abort(self) -> None:
        """Make what another thread does on these connections fail at once."""
        self._aborted = True
        connection = self._connection
        for sock in (self._transfer, connection.sock if connection is not None else None):
            if sock is not None:
                try:
                    sock.shutdown(_socket.SHUT_RDWR)
                except OSError:
                    pass

    def call(
        self,
        method: str,
        path: str,
        parameters: "Mapping[str, str] | None" = None,
        body: bytes | None = None,
        silence: float | None = None,
    ) -> bytes:
        """The body of a 200 answer; parameters and errors as for `open`."""
        response = self.open(method, path, parameters, body, silence)
        with self.reading():
            return response.read()

    def open(
        self,
        method: str,
        path: str,
        parameters: "Mapping[str, str] | None" = None,
        body: bytes | None = None,
        silence: float | None = None,
        accept: tuple[int, ...] = (200,),
    ) -> Response:
        """An answer with one of the statuses `accept`, to be read whole before the next request.

        A busy server (429) is asked again until the time limit. `silence` is how many seconds the server may
        take to answer, without it the time limit. Raises NodeError if the server cannot be reached or is not
        s4, otherwise the error that the status stands for.
        """
        query = "&".join(f"{name}={_quote(value)}" for name, value in (parameters or {}).items())
        length = "" if body is None and method == "GET" else f"Content-Length: {len(body or b'')}\r\n"
        head = f"{method} {path}{'?' if query else ''}{query} HTTP/1.1\r\n{self._headers}{length}\r\n"
        request = head.encode("ascii") + (body or b"")
        give_up = time.monotonic() + self._timeout
        pause = _FIRST_PAUSE
        while True:
            response = self._ask(request, self._timeout if silence is None else silence)
            if response.status in accept:
                return response
            with self.reading():
                text = response.read().decode("utf-8", "replace").strip()
            if response.status != 429 or time.monotonic() + pause > give_up:
                message = text or f"{self.server} answered {response.status} without a reason"
                if response.status in (429, 500, 503) and text:  # what is wrong with the node, not with a key
                    message = f"{self.server}: {text}"
                raise ERROR_OF_STATUS.get(response.status, S4Error)(" ".join(message.split()))
            self._pause(pause * (0.5 + os.urandom(1)[0] / 512))  # callers must not come back all at once
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._aborted:
            time.sleep(min(left, _NOTICE_SECONDS))

    def _ask(self, request: bytes, silence: float) -> Response:
        self._check_aborted()
        with self.reading():
            if self._response is not None and not self._response.ended:
                self.close()  # what is left of the last answer would be taken for the next
            if self._connection is not None and self._connection.kept:
                try:
                    return self._exchange(self._connection, request, silence)
                except ConnectionError:
                    # The node may close an idle connection at any time: once more on a new one.
                    self._check_aborted()
            self.close()
            self._connection = _Connection(self.host, self.port, min(CONNECT_SECONDS, silence))
            self._check_aborted()
            return self._exchange(self._connection, request, silence)

    def _exchange(self, connection: _Connection, request: bytes, silence: float) -> Response:
        connection.sock.settimeout(min(silence, _LONGEST_SILENCE))
        connection.sock.sendall(request)
        status, headers = connection.head()
        if FINGERPRINT_HEADER.lower() not in headers:
            self.close()
            raise NodeError(self.server, "something answers there, but it is not an s4 node")
        self._response = Response(connection, status, headers)
        return self._response

    def reading(self) -> "_Reading":
        """For a `with`: turns a broken connection into a NodeError that names the server."""
        return _Reading(self)


class _Transfer:
    """See Caller.transfer. (A class: contextlib takes 0.5 ms to import.)"""

    def __init__(self, caller: Caller, port: int) -> None:
        self._caller = caller
        self._port = port

    def __enter__(self) -> _socket.socket:
        from s4.streams import connect  # it takes 3 ms to import, and few commands move bytes

        connection = self._caller._connection
        host = connection.address if connection is not None else self._caller.host
        sock = connect(host, self._port)
        self._caller._transfer = sock
        try:
            self._caller._check_aborted()
        except CancelledError:
            self.__exit__()
            raise
        return sock

    def __exit__(self, *_: object) -> None:
        sock, self._caller._transfer = self._caller._transfer, None
        if sock is not None:
            sock.close()


class _Reading:
    """See Caller.reading."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, e: BaseException | None, _traceback: object) -> None:
        server = self._caller.server
        if isinstance(e, TimeoutError):
            error = NodeError(server, "no answer in time")
        elif isinstance(e, OSError):
            error = NodeError(server, f"cannot be reached: {e.strerror or e}")
        elif isinstance(e, _BrokenOffError):
            error = NodeError(server, "the answer broke off")
        elif isinstance(e, (_NotHttpError, ValueError)):
            error = NonsenseError(server)
        else:
            return
        self._caller.close()
        raise error from e


def _quote(text: str) -> str:
    """A text as the value of a parameter, percent-encoded. (urllib.parse takes 2 ms to import.)"""
    return "".join(chr(byte) if byte in _UNRESERVED else f"%{byte:02X}" for byte in text.encode())


def _notice_dead_hosts(sock: _socket.socket) -> None:
    """Keep-alive probes: a host that went away without a word is noticed within half a minute."""
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_KEEPALIVE, 1)
    sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_KEEPCNT, 4)
