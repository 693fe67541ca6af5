"""Outputs of a shuffle on their way to other nodes: gathered, sent in batches, counted."""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from s4.config import Conf
from s4.errors import ConflictError, S4Error, reason_of, rebuilt
from s4.exchange import MAX_BATCH_BYTES, MAX_BATCH_KEYS
from s4.storage import remove_tree
from s4.workers import Kind, Pool, Ticket
from s4.workers.tasks import Push, Pushed, StoredFile

MAX_UNSENT_BYTES = 512 * 1024 * 1024  # outputs waiting to leave; beyond it no further command starts
MAX_UNSENT_FILES = 20_000
PUSHES_PER_SERVER = 2
SEND_SECONDS = 60.0  # how long a node may be busy or silent that is to take a batch
GATHER_FILES = 100  # outputs for a server wait until there are so many,
GATHER_BYTES = 32 * 1024 * 1024  # or they are so large,
GATHER_SECONDS = 0.2  # or for so long, or until no command runs

T = TypeVar("T")  # what the sender wants back with the fate of an output


class Sending(NamedTuple, Generic[T]):
    """An output for another node: the path of its key, the file, the number of its task, and its sender."""

    path: str
    file: StoredFile
    task: int
    sender: T


class _Gathered(Generic[T]):
    """What waits for one server."""

    def __init__(self) -> None:
        self.waiting: deque[Sending[T]] = deque()
        self.bytes = 0
        self.since = 0.0  # monotonic

    def due(self) -> bool:
        """Whether enough has gathered, or for long enough."""
        return (
            len(self.waiting) >= GATHER_FILES
            or self.bytes >= GATHER_BYTES
            or time.monotonic() > self.since + GATHER_SECONDS
        )

    def take(self) -> list[Sending[T]]:
        """The next batch."""
        batch: list[Sending[T]] = []
        size = 0
        while self.waiting and len(batch) < MAX_BATCH_KEYS and size < MAX_BATCH_BYTES:
            batch.append(self.waiting.popleft())
            size += batch[-1].file.size
        self.bytes -= size
        self.since = time.monotonic()
        return batch


class Outbox(Generic[T]):
    """All outputs of a job that wait or travel. `on_done(ticket)` is called when a batch is over."""

    def __init__(self, conf: Conf, pool: Pool, job: str, on_done: Callable[[Ticket], None]) -> None:
        self._conf = conf
        self._fingerprint = conf.fingerprint
        self._pool = pool
        self._job = job
        self._on_done = on_done
        self._gathered: defaultdict[str, _Gathered[T]] = defaultdict(_Gathered)
        self._pushes: dict[Ticket, tuple[str, list[Sending[T]]]] = {}
        self._files = self._bytes = 0  # waiting or on their way

    def __contains__(self, ticket: object) -> bool:
        return ticket in self._pushes

    @property
    def tickets(self) -> list[Ticket]:
        """The batches under way."""
        return list(self._pushes)

    @property
    def empty(self) -> bool:
        """Whether nothing waits or travels."""
        return not self._files

    @property
    def full(self) -> bool:
        """Whether so much waits that no further command should start."""
        return self._files >= MAX_UNSENT_FILES or self._bytes >= MAX_UNSENT_BYTES

    @property
    def _half_full(self) -> bool:
        """Whether so much gathers that batches should leave as they are, so that commands need not wait."""
        files = sum(len(gathered.waiting) for gathered in self._gathered.values())
        size = sum(gathered.bytes for gathered in self._gathered.values())
        return files >= MAX_UNSENT_FILES // 2 or size >= MAX_UNSENT_BYTES // 2

    @property
    def anything_waits(self) -> bool:
        """Whether something still gathers."""
        return any(gathered.waiting for gathered in self._gathered.values())

    def add(self, position: int, sending: Sending[T]) -> None:
        """Put in an output for the node at `position`."""
        gathered = self._gathered[str(self._conf.servers[position])]
        if not gathered.waiting:
            gathered.since = time.monotonic()
        gathered.waiting.append(sending)
        gathered.bytes += sending.file.size
        self._files += 1
        self._bytes += sending.file.size

    def drop(self, sender: T) -> int:
        """Forget the outputs of a sender that have not left, with their files; how many."""
        count = 0
        for gathered in self._gathered.values():
            dropped = [sending for sending in gathered.waiting if sending.sender == sender]
            if not dropped:
                continue
            gathered.waiting = deque(sending for sending in gathered.waiting if sending.sender != sender)
            for sending in dropped:
                remove_tree(sending.file.file)
                gathered.bytes -= sending.file.size
                self._bytes -= sending.file.size
            count += len(dropped)
        self._files -= count
        return count

    def send(self, *, nothing_more: bool) -> None:
        """Let batches leave that are due, or all; at most two conversations with a server at once."""
        everything = nothing_more or self.full or self._half_full
        for server, gathered in self._gathered.items():
            under_way = sum(1 for to, _batch in self._pushes.values() if to == server)
            while gathered.waiting and under_way < PUSHES_PER_SERVER and (everything or gathered.due()):
                batch = gathered.take()
                entries = [(path, file, task) for path, file, task, _sender in batch]
                push = Push(server, self._fingerprint, self._job, entries, SEND_SECONDS)
                ticket = Ticket(Kind.SEND, push, on_done=self._on_done, group=self._job)
                self._pushes[ticket] = (server, batch)
                self._pool.submit(ticket)
                under_way += 1

    def arrived(self, ticket: Ticket, here: str) -> list[tuple[T, S4Error | None]]:
        """What became of each output of a batch that is over, by sender; `here` names this node in errors."""
        server, batch = self._pushes.pop(ticket)
        outcome: list[S4Error | None]
        try:
            answer = ticket.result()
            assert isinstance(answer, Pushed)
            outcome = [
                None if no is None else rebuilt(no.error, f"{no.message} (an output of {here})")
                for no in answer.refused
            ]
        except S4Error as e:
            kind = ConflictError if isinstance(e, ConflictError) else S4Error
            reason = reason_of(e, server)
            outcome = [kind(f"outputs for {server}: {reason}")] * len(batch)
        for sending in batch:
            self._files -= 1
            self._bytes -= sending.file.size
        return [(sending.sender, error) for sending, error in zip(batch, outcome, strict=True)]
