"""Asking all nodes at once: in threads, all or nothing, or each for itself."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from s4.errors import NodeError, StoppingError, UnreachableError

if TYPE_CHECKING:
    from s4.client import Client

GRACE_SECONDS = 30.0  # how much longer than a command's time limit its answer may take
SILENCE_SECONDS = 5.0  # a node that is silent for so long when it should answer at once is down

T = TypeVar("T")


def at_once(
    call: Callable[[str], T], servers: Sequence[str], on_failure: Callable[[], None] = lambda: None
) -> list[T]:
    """Call all servers, each in a thread, and return the results in order.

    At the first failure `on_failure()` is called, which should make the others end; then the error is raised.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    changed = threading.Condition()

    def run(i: int, server: str) -> None:
        try:
            result = call(server)
        except BaseException as e:
            with changed:
                errors.append(e)
                changed.notify()
        else:
            with changed:
                results[i] = result
                changed.notify()

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(servers)]
    for thread in threads:
        thread.start()
    with changed:
        changed.wait_for(lambda: errors or len(results) == len(servers))
    if errors:
        first = errors[0]
        on_failure()
        for thread in threads:
            thread.join(GRACE_SECONDS)
        raise first
    return [results[i] for i in range(len(servers))]


def each(call: Callable[[str], T], servers: Sequence[str]) -> dict[str, T | UnreachableError]:
    """Call all servers at once; one that cannot be reached has its error as its result."""

    def attempt(server: str) -> T | UnreachableError:
        try:
            return call(server)
        except UnreachableError as e:
            return e

    return dict(zip(servers, at_once(attempt, servers), strict=True))


@contextlib.contextmanager
def reaching(server: str) -> Iterator[None]:
    """Turn what says that a node is down, or no node, into an UnreachableError that names it."""
    try:
        yield
    except UnreachableError:
        raise
    except NodeError as e:
        raise UnreachableError(server, str(e).removeprefix(f"{server}: ")) from e
    except StoppingError as e:
        raise UnreachableError(server, str(e)) from e


def ask(
    client: "Client",
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


def check_all_reachable(client: "Client") -> None:
    """Raises UnreachableError, which names the first server that is down."""
    silence = min(SILENCE_SECONDS, client.timeout)
    at_once(lambda server: ask(client, server, "GET", "/health", silence=silence), client.servers())


def down(errors: Sequence[UnreachableError]) -> UnreachableError:
    """One error that names all servers that cannot be reached."""
    if len(errors) == 1:
        return errors[0]
    servers = ", ".join(error.server for error in errors)
    return UnreachableError(servers, str(errors[0]).removeprefix(f"{errors[0].server}: "))
