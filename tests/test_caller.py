"""The HTTP client by itself, against a server on a real socket that sends exactly what a test says."""

import _socket
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from s4.config import Conf, parse_server
from s4.errors import BadRequestError, BusyError, CancelledError, MissingError, NodeError, S4Error
from s4.http import Caller
from s4.index import Maker
from s4.outputs import Outputs

OK = b"HTTP/1.1 200 OK\r\nS4-Conf: f\r\n"
HANG_UP = None

Script = list[list[bytes | None]]


class Server:
    """Follows a script: for each connection what it answers to each request, HANG_UP closes instead.

    After the last answer of its list a connection is closed. `requests` are those that came, by connection.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.name = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[list[bytes]] = []
        self.closed = threading.Event()  # the first connection was
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for answers in self._script:
            with contextlib.suppress(OSError):  # the caller need not wait for the end of an answer
                connection, _address = self._listener.accept()
                self.requests.append([])
                with connection:
                    connection.settimeout(10)
                    for answer in answers:
                        self.requests[-1].append(_request(connection))
                        if answer is not None:
                            connection.sendall(answer)
                self.closed.set()

    def close(self) -> None:
        self._listener.close()


def _request(connection: socket.socket) -> bytes:
    came = b""
    while b"\r\n\r\n" not in came:
        block = connection.recv(65536)
        if not block:
            return came
        came += block
    head, _end, body = came.partition(b"\r\n\r\n")
    lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while lengths and len(body) < int(lengths[0].split(b":")[1]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*script: list[bytes | None]) -> Server:
        servers.append(Server(list(script)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def _caller(server: Server, timeout: float = 5) -> Caller:
    return Caller(server.name, "f", timeout)


def _chunks(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end


BODIES = {
    "nothing": (b"Content-Length: 0\r\n\r\n", b""),
    "a length": (b"Content-Length: 5\r\n\r\nhello", b"hello"),
    "any case, any space": (b"cOnTeNt-LeNgTh:\t 5  \r\n\r\nhello", b"hello"),
    "more than a block": (b"Content-Length: 3000000\r\n\r\n" + b"x" * 3_000_000, b"x" * 3_000_000),
    "no chunk": (b"Transfer-Encoding: chunked\r\n\r\n" + _chunks(), b""),
    "chunks": (b"Transfer-Encoding: chunked\r\n\r\n" + _chunks(b"he", b"\r\n", b"llo"), b"he\r\nllo"),
    "large chunks": (
        b"Transfer-Encoding: chunked\r\n\r\n" + _chunks(b"a" * 1_000_000, b"b" * 700_001),
        b"a" * 1_000_000 + b"b" * 700_001,
    ),
    "chunks with extensions and trailers": (
        b"Transfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n" + b"00;c\r\nX: y\r\n\r\n",
        b"hello",
    ),
    "chunks with capital digits": (
        b"Transfer-Encoding: chunked\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n",
        b"0123456789",
    ),
}


@pytest.mark.parametrize(("rest", "body"), BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("size", [None, 7, 100_000])
def test_a_body_comes_whole_and_the_connection_is_kept(
    serve: Callable[..., Server], rest: bytes, body: bytes, size: int | None
) -> None:
    server = serve([OK + rest, OK + b"Content-Length: 4\r\n\r\nnext"])
    with _caller(server) as caller:
        response = caller.open("GET", "/x")
        if size is None:
            assert response.read() == body
        elif len(body) < 10_000 or size > 7:
            blocks = list(iter(lambda: response.read(size), b""))
            assert b"".join(blocks) == body and all(len(block) <= size for block in blocks)
        else:
            assert response.read(size) == body[:size] and response.read() == body[size:]
        assert response.read() == b"" and response.read(size) == b""
        assert caller.call("GET", "/y") == b"next"
    assert [len(requests) for requests in server.requests] == [2]


def test_an_answer_may_come_byte_by_byte(serve: Callable[..., Server]) -> None:
    whole = OK + b"Transfer-Encoding: chunked\r\n\r\n" + _chunks(b"he", b"llo")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _address = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _request(connection)
                for i in range(len(whole)):
                    connection.sendall(whole[i : i + 1])
                    time.sleep(0.0005)

        threading.Thread(target=drip, daemon=True).start()
        with Caller(f"127.0.0.1:{listener.getsockname()[1]}", "f", 5) as caller:
            assert caller.call("GET", "/x") == b"hello"


def test_a_request_is_what_the_standard_says(serve: Callable[..., Server]) -> None:
    server = serve([OK + b"Content-Length: 0\r\n\r\n"] * 4)
    with _caller(server) as caller:
        caller.call("GET", "/x", {"a": "é &=?#%+/~", "b": ""})
        caller.call("POST", "/y")
        caller.call("POST", "/z", body=b"")
        caller.call("POST", "/z", {"k": "v"}, b"x" * 1_000_000)
    head = b"Host: %s\r\nS4-Conf: f\r\n" % server.name.encode()
    assert server.requests[0][:3] == [
        b"GET /x?a=%C3%A9%20%26%3D%3F%23%25%2B%2F~&b= HTTP/1.1\r\n" + head + b"\r\n",
        b"POST /y HTTP/1.1\r\n" + head + b"Content-Length: 0\r\n\r\n",
        b"POST /z HTTP/1.1\r\n" + head + b"Content-Length: 0\r\n\r\n",
    ]
    assert server.requests[0][3] == (
        b"POST /z?k=v HTTP/1.1\r\n" + head + b"Content-Length: 1000000\r\n\r\n" + b"x" * 1_000_000
    )


@pytest.mark.parametrize(("host", "family"), [("localhost", socket.AF_INET), ("[::1]", socket.AF_INET6)])
def test_a_server_may_have_a_name_or_a_long_address(host: str, family: socket.AddressFamily) -> None:
    # A name may stand for several addresses, at the first of which nobody may listen.
    address = "127.0.0.1" if family == socket.AF_INET else "::1"
    try:
        listener = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip("this machine has no such address")
    requests: list[bytes] = []

    def serve() -> None:
        connection, _address = listener.accept()
        with connection:
            requests.append(_request(connection))
            connection.sendall(OK + LENGTH)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    name = f"{host}:{listener.getsockname()[1]}"
    with listener, Caller(name, "f", 5) as caller:
        assert caller.call("GET", "/x") == b"hello"
    assert b"\r\nHost: %s\r\n" % name.encode() in requests[0]


LENGTH = b"Content-Length: 5\r\n\r\nhello"
NONSENSE = {
    "no HTTP": b"\x00\xffno HTTP at all\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a beginning of another": b"220",
    "another HTTP": b"HTTP/2.0 200 OK\r\nS4-Conf: f\r\n" + LENGTH,
    "nearly HTTP": b"HTTP/1.1\t200 OK\r\nS4-Conf: f\r\n" + LENGTH,
    "an old answer": b"<html>hi</html>",
    "no status": b"HTTP/1.1 OK\r\nS4-Conf: f\r\n" + LENGTH,
    "a long status": b"HTTP/1.1 2000 OK\r\nS4-Conf: f\r\n" + LENGTH,
    "a signed status": b"HTTP/1.1 +20 OK\r\nS4-Conf: f\r\n" + LENGTH,
    "a short status": b"HTTP/1.1 20\r\nS4-Conf: f\r\n" + LENGTH,
    "a header without a colon": OK + b"Content-Length 5\r\n" + LENGTH,
    "a header without a name": OK + b": 5\r\n" + LENGTH,
    "a folded header": OK + b"X: y\r\n z: a\r\n" + LENGTH,
    "a space before the colon": OK + b"X : y\r\n" + LENGTH,
    "bare ends of lines": OK.replace(b"\r\n", b"\n") + LENGTH.replace(b"\r\n", b"\n") + b"\r\n\r\n",
    "an endless status line": b"HTTP/1.1 200 " + b"x" * 10_000_000,
    "an endless header": OK + b"X: " + b"x" * 10_000_000,
    "endless headers": OK + b"X: y\r\n" * 1_000_000,
    "no length": OK + b"\r\nhello",
    "a word for a length": OK + b"Content-Length: five\r\n\r\nhello",
    "an empty length": OK + b"Content-Length:\r\n\r\nhello",
    "a negative length": OK + b"Content-Length: -5\r\n\r\nhello",
    "a signed length": OK + b"Content-Length: +5\r\n\r\nhello",
    "a length with an underscore": OK + b"Content-Length: 1_0\r\n\r\nhello",
    "digits of another alphabet": OK + "Content-Length: \u00b2\r\n\r\nhello".encode("latin-1"),
    "a huge length": OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nhello",
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "length and chunks": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + _chunks(b"hello"),
    "another coding": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + _chunks(b"hello"),
    "an answer to come": b"HTTP/1.1 100 Continue\r\nS4-Conf: f\r\n\r\n" + OK + LENGTH,
    "a chunk without a size": OK + b"Transfer-Encoding: chunked\r\n\r\n\r\nhello\r\n0\r\n\r\n",
    "a chunk with a bad size": OK + b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "a chunk with a negative size": OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    "a chunk with a huge size": OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 5000 + b"\r\nhello",
    "a chunk with an endless size": OK + b"Transfer-Encoding: chunked\r\n\r\n5;" + b"x" * 10_000_000,
    "a chunk that is longer": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello!\r\n0\r\n\r\n",
    "endless trailers": OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 1_000_000,
}


@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE)
def test_what_is_no_answer_makes_no_sense(serve: Callable[..., Server], answer: bytes) -> None:
    server = serve([answer, HANG_UP])  # it waits for more from us, and does not end its answer
    began = time.monotonic()
    with _caller(server) as caller, pytest.raises(NodeError) as caught:
        caller.call("GET", "/x")
    assert str(caught.value) == f"{server.name}: its answer makes no sense"
    assert time.monotonic() - began < 4


CUT = {
    "after the status": b"HTTP/1.1 200 OK\r\n",
    "in the status": b"HTTP/1.1 20",
    "in the headers": OK + b"Content-Le",
    "before the body": OK + b"Content-Length: 5\r\n\r\n",
    "in the body": OK + b"Content-Length: 5\r\n\r\nhell",
    "before the chunks": OK + b"Transfer-Encoding: chunked\r\n\r\n",
    "in the size of a chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n5",
    "in a chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhell",
    "behind a chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello",
    "before the last chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "in the end": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
}


@pytest.mark.parametrize("answer", CUT.values(), ids=CUT)
@pytest.mark.parametrize("size", [None, 3])
def test_an_answer_that_broke_off_is_no_answer(
    serve: Callable[..., Server], answer: bytes, size: int | None
) -> None:
    server = serve([answer])
    with _caller(server) as caller, pytest.raises(NodeError) as caught:
        response = caller.open("GET", "/x")
        with caller.reading():
            while response.read(size):
                pass
    assert str(caught.value) == f"{server.name}: the answer broke off"


def test_what_is_no_node_is_named(serve: Callable[..., Server]) -> None:
    for answer in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.0 200 OK\r\nServer: x\r\n\r\nhi",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    ):
        server = serve([answer])
        with _caller(server) as caller, pytest.raises(NodeError, match="it is not an s4 node"):
            caller.call("GET", "/x")


@pytest.mark.parametrize("answer", [OK + b"Content-Length: 5\r\n\r\nhell", OK, b"HTTP/1.1 2", b""])
def test_a_server_that_falls_silent_is_given_up(serve: Callable[..., Server], answer: bytes) -> None:
    server = serve([answer, HANG_UP])
    began = time.monotonic()
    with _caller(server, 0.3) as caller, pytest.raises(NodeError, match="no answer in time"):
        caller.call("GET", "/x")
    assert 0.25 < time.monotonic() - began < 3


def test_bytes_go_to_the_address_that_answered(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a server may stand for several, of which one is dead, and there is not much time."""
    server = serve([OK + b"Content-Length: 0\r\n\r\n", HANG_UP])
    _host, _colon, port = server.name.partition(":")
    looked_up: list[object] = []
    really = _socket.getaddrinfo

    def look_up(host: bytes | str, *arguments: Any) -> Any:
        looked_up.append(host)
        return really("127.0.0.1" if host == b"node.test" else host, *arguments)

    monkeypatch.setattr(_socket, "getaddrinfo", look_up)
    with socket.create_server(("127.0.0.1", 0)) as listener, Caller(f"node.test:{port}", "f", 5) as caller:
        caller.call("GET", "/x")
        with caller.transfer(listener.getsockname()[1]):
            listener.accept()[0].close()
    assert looked_up == [b"node.test", b"127.0.0.1"]


@pytest.mark.parametrize(
    "status", ["429 Too Many Requests", "500 Internal Server Error", "503 Service Unavailable"]
)
def test_what_is_wrong_with_a_server_names_it(serve: Callable[..., Server], status: str) -> None:
    server = serve([f"HTTP/1.1 {status}\r\nS4-Conf: f\r\nContent-Length: 4\r\n\r\nbusy".encode()] * 9)
    with _caller(server, 0.05) as caller, pytest.raises(S4Error, match=f"^{server.name}: busy$"):
        caller.call("GET", "/x")


def test_a_late_answer_is_not_taken_for_that_to_the_next_request(serve: Callable[..., Server]) -> None:
    head = OK + b"Content-Length: 5\r\n\r\n"
    server = serve([b"", head + b"first"], [head + b"other"])
    with _caller(server) as caller:
        with pytest.raises(NodeError, match="no answer in time"):
            caller.call("GET", "/first", silence=0.3)
        assert caller.call("GET", "/other") == b"other"


def test_a_server_that_hangs_up_or_is_not_there_cannot_be_reached(serve: Callable[..., Server]) -> None:
    server = serve([HANG_UP])
    with _caller(server) as caller, pytest.raises(NodeError, match="cannot be reached: it closed"):
        caller.call("GET", "/x")
    server.close()
    with _caller(server) as caller, pytest.raises(NodeError, match="cannot be reached: Connection refused"):
        caller.call("GET", "/x")
    with (
        Caller("no.such.host.invalid:1", "f", 5) as caller,
        pytest.raises(NodeError, match="cannot be reached"),
    ):
        caller.call("GET", "/x")


def test_a_connection_that_the_server_left_is_made_anew(serve: Callable[..., Server]) -> None:
    server = serve([OK + LENGTH], [OK + LENGTH])
    with _caller(server) as caller:
        assert caller.call("GET", "/x") == b"hello"
        assert server.closed.wait(5)
        assert caller.call("POST", "/y", body=b"body") == b"hello"
    assert server.requests[1][0].startswith(b"POST /y ") and server.requests[1][0].endswith(b"\r\n\r\nbody")


def test_a_connection_that_breaks_again_is_an_error(serve: Callable[..., Server]) -> None:
    server = serve([OK + LENGTH], [HANG_UP], [OK + LENGTH])
    with _caller(server) as caller:
        assert caller.call("GET", "/x") == b"hello"
        assert server.closed.wait(5)
        with pytest.raises(NodeError, match="cannot be reached"):
            caller.call("GET", "/y")
        assert caller.call("GET", "/z") == b"hello"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nS4-Conf: f\r\nConnection: Close\r\n" + LENGTH,
        b"HTTP/1.0 200 OK\r\nS4-Conf: f\r\n" + LENGTH,
    ],
)
def test_a_connection_that_will_be_closed_is_not_used_again(
    serve: Callable[..., Server], answer: bytes
) -> None:
    server = serve([answer, HANG_UP], [OK + LENGTH])
    with _caller(server) as caller:
        assert caller.call("GET", "/x") == b"hello"
        assert caller.call("GET", "/y") == b"hello"
    assert server.requests[0][1] == b""  # nothing was sent to it


def test_what_is_left_of_an_answer_is_never_taken_for_the_next(serve: Callable[..., Server]) -> None:
    server = serve([OK + LENGTH, HANG_UP], [OK + b"Content-Length: 4\r\n\r\nnext"])
    with _caller(server) as caller:
        assert caller.open("GET", "/x").read(2) == b"he"
        assert caller.call("GET", "/y") == b"next"
    server = serve([OK + LENGTH + b" and more", OK + LENGTH])
    with _caller(server) as caller:
        assert caller.call("GET", "/x") == b"hello"
        with pytest.raises(NodeError, match="its answer makes no sense"):
            caller.call("GET", "/y")


def test_an_error_carries_the_text_of_the_answer_and_keeps_the_connection(
    serve: Callable[..., Server],
) -> None:
    def answer(status: bytes, text: bytes) -> bytes:
        return b"HTTP/1.1 %s X\r\nS4-Conf: f\r\nContent-Length: %d\r\n\r\n%s" % (status, len(text), text)

    server = serve([answer(b"404", b"no\n key\n"), answer(b"400", b"\xff"), answer(b"500", b""), OK + LENGTH])
    with _caller(server) as caller:
        with pytest.raises(MissingError, match=r"^no key$"):
            caller.call("GET", "/x")
        with pytest.raises(BadRequestError, match="\ufffd"):
            caller.call("GET", "/x")
        with pytest.raises(S4Error, match="answered 500 without a reason"):
            caller.call("GET", "/x")
        assert caller.call("GET", "/x") == b"hello"


def test_a_busy_server_is_asked_again_until_the_time_is_over(serve: Callable[..., Server]) -> None:
    busy = b"HTTP/1.1 429 Busy\r\nS4-Conf: f\r\nContent-Length: 4\r\n\r\nbusy"
    server = serve([busy, OK + LENGTH])
    with _caller(server) as caller:
        assert caller.call("GET", "/x") == b"hello"
    server = serve([busy] * 100)
    with _caller(server, 2) as caller, pytest.raises(BusyError, match="busy"):
        caller.call("GET", "/x")
    # The first pause is 0.05 to 0.1 seconds; if they did not grow, it would be asked twenty times.
    assert 3 <= len(server.requests[0]) <= 10


@pytest.mark.parametrize("busy", [False, True])
def test_a_request_is_given_up_at_once_when_it_is_aborted(serve: Callable[..., Server], busy: bool) -> None:
    answer = b"HTTP/1.1 429 Busy\r\nS4-Conf: f\r\nContent-Length: 0\r\n\r\n" if busy else OK
    server = serve([answer] * 100 if busy else [answer, HANG_UP])
    with _caller(server, 60) as caller:
        timer = threading.Timer(0.2, caller.abort)
        timer.start()
        began = time.monotonic()
        with pytest.raises(S4Error):
            caller.call("GET", "/x")
        assert time.monotonic() - began < 1
        with pytest.raises(CancelledError):
            caller.call("GET", "/x")
        timer.join()


def test_no_transfer_begins_on_an_aborted_caller(serve: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with Caller(f"127.0.0.1:{port}", "f", 5) as caller:
            with caller.transfer(port) as sock:
                peer, _address = listener.accept()
                caller.abort()
                assert peer.recv(1) == b""
                peer.close()
            assert sock.fileno() == -1
            with pytest.raises(CancelledError), caller.transfer(port):
                pass


def test_another_node_that_stops_is_named(serve: Callable[..., Server]) -> None:
    stops = b"HTTP/1.1 503 X\r\nS4-Conf: f\r\nContent-Length: 13\r\n\r\nshutting down"
    server = serve([stops], [stops])
    nobody: Any = None
    outputs = Outputs(Conf((parse_server(server.name),), ""), -1, nobody, "b/out/")
    for ask in (outputs.makers, lambda: outputs.remove([Maker("000", "job", 0)])):
        with pytest.raises(NodeError, match=f"^{server.name}: shutting down$"):
            ask()
