"""What shares and evals have in common: what they need of their node, what a command is told, and
words for how it ended."""

import signal
from dataclasses import dataclass

from s4.config import Conf
from s4.errors import MissingError
from s4.index import JobIndex, KeyIndex, NewTask
from s4.keys import name_of, url
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
    job_index: JobIndex
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


def work_name(job: str, task: int, attempt: int) -> str:
    """What the names of the temporary files and folders of an attempt begin with; see Storage.discard."""
    return f"{job}.{task}.{attempt}"


def variables_of(job: str, task: NewTask, attempt: int) -> dict[str, str]:
    """What a command that reads one key finds in its environment."""
    return {
        "filename": name_of(task.input),
        "S4_KEY": url(task.input),
        "S4_JOB": job,
        "S4_TASK": str(task.task),
        "S4_ATTEMPT": str(attempt),
    }


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
