"""What shares and evals have in common: what they need of their node, and words for how a command ended."""

import signal
from dataclasses import dataclass

from s4.config import Conf
from s4.errors import MissingError
from s4.index import JobIndex, KeyIndex
from s4.storage import Storage
from s4.transfers import Transfers
from s4.workers import Pool

_SIGNALS = frozenset(map(int, signal.Signals))


@dataclass(frozen=True)
class Services:
    """What a share or an eval needs of its node, which has the place `position` in the ring."""

    conf: Conf
    position: int
    keys: KeyIndex
    jobs: JobIndex
    storage: Storage
    pool: Pool
    transfers: Transfers
    slots: int

    @property
    def server(self) -> str:
        """This node, as messages name it."""
        return str(self.conf.servers[self.position])

    def locate(self, path: str) -> tuple[str, int]:
        """The file of a key and its bytes. Raises MissingError, which tells whether the key is gone, too."""
        try:
            return self.storage.locate(path)
        except MissingError:
            self.keys.get(path)  # if the key is gone too, that is what there is to say
            raise


def exit_text(exitcode: int) -> str:
    """How a command ended, in words."""
    number = signal_of(exitcode)
    if number is None:
        return f"exit code {exitcode}"
    return f"exit code {exitcode} ({signal.Signals(number).name})"


def signal_of(exitcode: int) -> int | None:
    """The signal that an exit code of bash stands for."""
    number = exitcode - 128
    return number if number in _SIGNALS else None
