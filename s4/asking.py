"""Asking all nodes at once, all or nothing."""

import time
from _thread import start_new_thread
from collections.abc import Callable, Sequence

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from _queue import SimpleQueue
    from typing import TypeVar

    T = TypeVar("T")

GRACE_SECONDS = 30.0  # how much longer than a command's time limit its answer may take


def at_once(
    call: "Callable[[str], T]", servers: Sequence[str], on_failure: Callable[[], object] = lambda: None
) -> "list[T]":
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
        error = ended.get()
        if error is not None:
            on_failure()
            _wait(ended, left)
            raise error
    return [results[i] for i in range(len(servers))]


def _wait(ended: "SimpleQueue[BaseException | None]", calls: int) -> None:
    """Wait for the end of so many calls, but not for long."""
    from _queue import Empty

    give_up = time.monotonic() + GRACE_SECONDS
    try:
        for _ in range(calls):
            ended.get(timeout=max(0.0, give_up - time.monotonic()))
    except Empty:
        pass
