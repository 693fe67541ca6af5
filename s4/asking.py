"""Asking all nodes at once: all or nothing, or so that which cannot be reached is part of the answer."""

from __future__ import annotations

import time
from _thread import start_new_thread
from collections.abc import Callable, Mapping, Sequence

from s4.errors import NodeError, StoppingError, UnreachableError, reason_of

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from _queue import SimpleQueue
    from typing import TypeVar

    from s4.client import Client

    T = TypeVar("T")

ANSWER_SECONDS = 30.0  # how long a node that has nothing to wait for may take to answer
NOTICE_SECONDS = 0.1  # how soon a Ctrl-C is noticed that another thread takes, as after a pause (SIGSTOP)
SILENCE_SECONDS = 5.0  # a node that is silent for so long when it should answer at once is down


def at_once(
    call: Callable[[str], T], servers: Sequence[str], on_failure: Callable[[], object] = lambda: None
) -> list[T]:
    """Call all servers, each in a thread, and return the results in order.

    At the first failure `on_failure()` is called, which should make the others end; then the error is raised.
    `call` imports nothing that imports threading, which would take the thread for the main one.
    """
    from _queue import SimpleQueue  # what queue has too, without threading, which takes 1 ms to import

    results: dict[int, T] = {}
    ended: SimpleQueue[BaseException | None] = SimpleQueue()  # of each call: what it failed with

    def run(i: int, server: str) -> None:
        try:
            results[i] = call(server)
        except BaseException as e:
            ended.put(e)
        else:
            ended.put(None)

    for pair in enumerate(servers):
        start_new_thread(run, pair)
    for left in range(len(servers) - 1, -1, -1):
        [error] = _next(ended, 1, float("inf"))
        if error is not None:
            on_failure()
            _next(ended, left, time.monotonic() + ANSWER_SECONDS)
            raise error
    return [results[i] for i in range(len(servers))]


def _next(ended: SimpleQueue[BaseException | None], calls: int, until: float) -> list[BaseException | None]:
    """What so many calls failed with, as they end, but for no longer than `until` (monotonic)."""
    from _queue import Empty

    found: list[BaseException | None] = []
    while len(found) < calls and time.monotonic() < until:
        try:
            found.append(ended.get(timeout=NOTICE_SECONDS))
        except Empty:
            pass
    return found


def each(call: Callable[[str], T], servers: Sequence[str]) -> dict[str, T | UnreachableError]:
    """Call all servers at once; one that cannot be reached has its error as its result."""

    def attempt(server: str) -> T | UnreachableError:
        try:
            return call(server)
        except UnreachableError as e:
            return e

    return dict(zip(servers, at_once(attempt, servers), strict=True))


def reaching(server: str) -> _Reaching:
    """For a `with`: turns what says that a node is down, or none, into an UnreachableError that names it."""
    return _Reaching(server)


class _Reaching:
    """See reaching. (A class: contextlib takes 0.5 ms to import.)"""

    def __init__(self, server: str) -> None:
        self._server = server

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, e: BaseException | None, _traceback: object) -> None:
        if isinstance(e, (NodeError, StoppingError)) and not isinstance(e, UnreachableError):
            raise UnreachableError(self._server, reason_of(e, self._server)) from e


def ask(
    client: Client,
    server: str,
    method: str,
    path: str,
    parameters: Mapping[str, str] | None = None,
    body: bytes | None = None,
    *,
    silence: float = ANSWER_SECONDS,
) -> bytes:
    """The answer of one server, which may be silent for so many seconds, but no longer than the client's time
    limit. Raises UnreachableError."""
    with reaching(server), client.caller(server) as caller:
        return caller.call(method, path, parameters, body, min(silence, client.timeout))


def check_all_reachable(client: Client) -> None:
    """Raises UnreachableError, which names the first server that is down."""
    at_once(lambda server: ask(client, server, "GET", "/health", silence=SILENCE_SECONDS), client.servers())


def down(errors: Sequence[UnreachableError]) -> UnreachableError:
    """One error that names all servers that cannot be reached."""
    if len(errors) == 1:
        return errors[0]
    servers = ", ".join(error.server for error in errors)
    return UnreachableError(servers, reason_of(errors[0], errors[0].server))
