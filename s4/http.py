"""Requests to a node, as the client and other nodes make them: keep-alive, errors, and back-off.

Every request carries the fingerprint of the caller's conf, so that a node of another cluster refuses it.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse, IncompleteRead, RemoteDisconnected
from typing import Self
from urllib.parse import quote

from s4.config import parse_server
from s4.errors import (
    BadRequestError,
    BusyError,
    CancelledError,
    ConflictError,
    MissingError,
    NodeError,
    OverlapError,
    S4Error,
    StoppingError,
)
from s4.streams import connect

FINGERPRINT_HEADER = "S4-Conf"
EXITCODE_HEADER = "S4-Exit-Code"
STDERR_SIZE_HEADER = "S4-Stderr-Size"
CONNECT_SECONDS = 5.0
FOREVER = 1e9  # seconds: for a job, whose end nobody knows
_LONGEST_PAUSE = 5.0

_ERRORS: dict[int, type[S4Error]] = {
    400: BadRequestError,
    404: MissingError,
    409: ConflictError,
    423: OverlapError,
    429: BusyError,
    503: StoppingError,
}


class Caller:
    """A kept connection to one server; used by one thread at a time.

    `timeout` is in seconds: how long a busy server is asked again, and how long it may be silent.
    """

    def __init__(self, server: str, fingerprint: str, timeout: float) -> None:
        self.server = server
        address = parse_server(server)
        self.host, self.port = address.host, address.port
        self._fingerprint = fingerprint
        self._timeout = timeout
        self._connection: HTTPConnection | None = None
        self._transfer: socket.socket | None = None
        self._aborted = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection; the next request makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def transfer(self, port: int) -> Iterator[socket.socket]:
        """A connection for bytes to a port that the server named. Raises TransferError."""
        with connect(self.host, port) as sock:
            self._transfer = sock
            self._check_aborted()
            try:
                yield sock
            finally:
                self._transfer = None

    def _check_aborted(self) -> None:
        if self._aborted.is_set():
            raise CancelledError(f"the request to {self.server} was given up")

    def abort(self) -> None:
        """Make what another thread does on these connections fail at once."""
        self._aborted.set()
        connection = self._connection
        for sock in (self._transfer, connection.sock if connection is not None else None):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def call(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, str] | None = None,
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
        parameters: Mapping[str, str] | None = None,
        body: bytes | None = None,
        silence: float | None = None,
        accept: tuple[int, ...] = (200,),
    ) -> HTTPResponse:
        """An answer with one of the statuses `accept`, to be read whole before the next request.

        A busy server (429) is asked again until the time limit. `silence` is how many seconds the server may
        take to answer, without it the time limit. Raises NodeError if the server cannot be reached or is not
        s4, otherwise the error that the status stands for.
        """
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in (parameters or {}).items())
        target = f"{path}?{query}" if query else path
        give_up = time.monotonic() + self._timeout
        pause = 1.0
        while True:
            response = self._ask(method, target, body, self._timeout if silence is None else silence)
            if response.status in accept:
                return response
            with self.reading():
                text = response.read().decode("utf-8", "replace").strip()
            if response.status != 429 or time.monotonic() + pause > give_up:
                message = text or f"{self.server} answered {response.status} without a reason"
                raise _ERRORS.get(response.status, S4Error)(" ".join(message.split()))
            self._aborted.wait(
                pause * (0.5 + os.urandom(1)[0] / 512)
            )  # callers must not come back all at once
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _ask(self, method: str, target: str, body: bytes | None, silence: float) -> HTTPResponse:
        headers = {FINGERPRINT_HEADER: self._fingerprint}
        self._check_aborted()
        with self.reading():
            if self._connection is not None:
                try:
                    return self._exchange(self._connection, method, target, body, headers, silence)
                except (RemoteDisconnected, ConnectionError):
                    self.close()  # the node may close an idle connection at any time: once more on a new one
                    self._check_aborted()
            connection = HTTPConnection(self.host, self.port, timeout=min(CONNECT_SECONDS, silence))
            connection.connect()
            _notice_dead_hosts(connection.sock)
            self._connection = connection
            self._check_aborted()
            return self._exchange(connection, method, target, body, headers, silence)

    def _exchange(
        self,
        connection: HTTPConnection,
        method: str,
        target: str,
        body: bytes | None,
        headers: dict[str, str],
        silence: float,
    ) -> HTTPResponse:
        connection.sock.settimeout(silence if silence < FOREVER else None)
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        if response.getheader(FINGERPRINT_HEADER) is None:
            self.close()
            raise NodeError(self.server, "something answers there, but it is not an s4 node")
        return response

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Turn a broken connection into a NodeError that names the server."""
        try:
            yield
        except TimeoutError as e:
            self.close()
            raise NodeError(self.server, "no answer in time") from e
        except OSError as e:
            self.close()
            raise NodeError(self.server, f"cannot be reached: {e.strerror or e}") from e
        except (HTTPException, ValueError) as e:
            self.close()
            what = "the answer broke off" if isinstance(e, IncompleteRead) else "its answer makes no sense"
            raise NodeError(self.server, what) from e


def _notice_dead_hosts(sock: socket.socket) -> None:
    """Keep-alive probes: a host that went away without a word is noticed within half a minute."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
