"""Asking nodes that may be down: which cannot be reached is part of the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from s4.asking import GRACE_SECONDS, at_once
from s4.errors import NodeError, StoppingError, UnreachableError

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from typing import TypeVar

    from s4.client import Client

    T = TypeVar("T")

SILENCE_SECONDS = 5.0  # a node that is silent for so long when it should answer at once is down


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
            raise UnreachableError(self._server, str(e).removeprefix(f"{self._server}: ")) from e


def ask(
    client: Client,
    server: str,
    method: str,
    path: str,
    parameters: Mapping[str, str] | None = None,
    body: bytes | None = None,
    *,
    silence: float = GRACE_SECONDS,
) -> bytes:
    """The answer of one server, which may be silent for so many seconds. Raises UnreachableError."""
    with reaching(server), client.caller(server) as caller:
        return caller.call(method, path, parameters, body, silence)


def check_all_reachable(client: Client) -> None:
    """Raises UnreachableError, which names the first server that is down."""
    silence = min(SILENCE_SECONDS, client.timeout)
    at_once(lambda server: ask(client, server, "GET", "/health", silence=silence), client.servers())


def down(errors: Sequence[UnreachableError]) -> UnreachableError:
    """One error that names all servers that cannot be reached."""
    if len(errors) == 1:
        return errors[0]
    servers = ", ".join(error.server for error in errors)
    return UnreachableError(servers, str(errors[0]).removeprefix(f"{errors[0].server}: "))
