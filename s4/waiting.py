"""Requests that wait: how many at once, so that a thread is left for others, and how long for a slot."""

import contextlib
import threading
from collections.abc import Iterator

from s4.errors import BusyError
from s4.workers import Ticket

SLOT_SECONDS = 7.0  # how long a request waits for a slot: longer than a dead transfer holds one


class Gate:
    """Bounds how many requests wait at once, so that some threads are always free to answer."""

    def __init__(self, places: int) -> None:
        self._places = threading.Semaphore(places)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A place to wait in. Raises BusyError at once if there is none."""
        if not self._places.acquire(blocking=False):
            raise BusyError("too many requests are waiting here; try again later")
        try:
            yield
        finally:
            self._places.release()


def wait_for_slot(ticket: Ticket) -> None:
    """Wait until a submitted ticket runs. Raises BusyError if it takes long: then it has to be cancelled."""
    if not ticket.wait_started(SLOT_SECONDS):
        raise BusyError("all slots are taken; try again later")
