"""Puts and gets as a node sees them: prepare, bytes in a worker, confirm.

A transfer is kept until it is confirmed, and the outcome of a put a little longer, so that a caller who lost
the answer can confirm again. What is never confirmed expires.
"""

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from s4.errors import (
    BadRequestError,
    BusyError,
    ConflictError,
    MissingError,
    S4Error,
    StoppingError,
    TransferError,
)
from s4.exchange import MAX_BATCH_KEYS
from s4.index import KeyIndex, KeyRow, NewKey, Transaction, Underway
from s4.keys import url
from s4.storage import Storage, remove_if_possible
from s4.text import one_line
from s4.waiting import SLOT_SECONDS, Gate, wait_for_slot
from s4.workers import Kind, Pool, Ticket
from s4.workers.tasks import Receive, Received, Send, StoredFile

# How long bytes that arrived wait for their confirmation; as long as they took if that is longer, for the
# caller may have to read them once more for their checksum.
UNCONFIRMED_SECONDS = 10.0
DEATH_SECONDS = 1.0  # for it to be known that a worker is dead
OUTCOME_SECONDS = 60.0  # how long the outcome is kept for a repeated confirm
IDLE_LISTENERS = 64  # kept for further transfers
OPEN_TRIES = 10  # for keys that change meanwhile
# Keys that one transaction makes; bounds how long other writers wait. A put, with its record, is one.
TRANSACTION_KEYS = MAX_BATCH_KEYS

log = logging.getLogger("s4.transfers")


class Finished(NamedTuple):
    """A finished file, the path of the key that it is to become, and which task of which job made it."""

    path: str
    file: StoredFile
    job: str | None = None
    task: int | None = None


# Writes more into the transaction that makes keys of files; the second argument is the outcome for each.
Also = Callable[[Transaction, Sequence[S4Error | None]], None]


@dataclass(frozen=True)
class _Outcome:
    """What a put came to: per key None or why it was refused, or why all of it failed."""

    refused: list[S4Error | None]
    failure: S4Error | None
    ended_s: float  # monotonic

    def answer(self) -> list[S4Error | None]:
        if self.failure is not None:
            raise self.failure
        return self.refused


@dataclass
class _Transfer:
    uuid: str
    paths: list[str]
    ticket: Ticket
    files: list[str]  # of a put: where the bytes are once they have arrived
    makers: list[tuple[str | None, int | None]] = field(default_factory=list)  # and the job and task of each
    checksums: list[str] = field(default_factory=list)  # of a get: what is stored
    confirmed_by_caller: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_put(self) -> bool:
        """Whether it is a put, not a get."""
        return bool(self.files)

    def __str__(self) -> str:
        count = len(self.paths)
        return url(self.paths[0]) if count == 1 else f"a batch of {count} keys"


@dataclass(frozen=True)
class Prepared:
    """What a caller needs to move the bytes. `refused` has an entry per key; the others follow each other on
    a connection to `port`. `files` are (bytes, checksum) of a get."""

    uuid: str
    port: int
    refused: list[S4Error | None]
    files: list[tuple[int, str]]


class Transfers:
    """The transfers of a node, on its address `host`; messages name it `server`."""

    def __init__(
        self,
        server: str,
        host: str,
        keys: KeyIndex,
        underway: Underway,
        storage: Storage,
        pool: Pool,
        gate: Gate,
    ) -> None:
        self._server = server
        self._host = host
        self._keys = keys
        self._underway = underway
        self._storage = storage
        self._pool = pool
        self._gate = gate
        self._transfers: dict[str, _Transfer] = {}
        self._outcomes: dict[str, _Outcome] = {}  # of puts that ended, by uuid
        self._listening: dict[str, socket.socket] = {}  # by transfer
        self._listeners: list[socket.socket] = []  # idle ones
        self._unrecorded: deque[str] = deque()  # ended, but still in the record of what is under way

    def prepare_put(
        self, entries: Sequence[tuple[str, int | None, int | None]], peer: str, job: str | None = None
    ) -> Prepared:
        """Get ready to receive keys, given as (path, size, task), from the address `peer`.

        Only a single key may have None for a size. `job` and the numbers of its tasks say what made them.
        Raises BusyError if no slot becomes free in time.
        """
        refused: list[S4Error | None] = []
        seen: set[str] = set()
        conflicts = self._keys.conflicts([(path, task) for path, _size, task in entries], job)
        for (path, _size, _task), conflict in zip(entries, conflicts, strict=True):
            if path in seen:
                conflict = ConflictError(f"{url(path)} is there twice, as if two inputs had the same NAME")
            refused.append(conflict)
            seen.add(path)
        wanted = [entry for entry, error in zip(entries, refused, strict=True) if error is None]
        if not wanted:
            return Prepared("", 0, refused, [])
        name = str(uuid.uuid4())
        files = [self._storage.temporary_file(f"{name}.{i}") for i in range(len(wanted))]
        sizes = [size for _path, size, _task in wanted]
        with _busy_without_descriptors(), contextlib.ExitStack() as on_error:
            listener = on_error.enter_context(self._listener())
            port: int = listener.getsockname()[1]
            receive = Receive(files, sizes, peer)
            ticket = self._start(Ticket(Kind.RECEIVE, receive, [os.dup(listener.fileno())]))
            on_error.callback(self._pool.cancel, ticket, S4Error("the transfer cannot be recorded"))
            total = None if None in sizes else sum(size or 0 for size in sizes)
            paths = [path for path, _size, _task in wanted]
            self._underway.transfer_began(name, "put", paths, total, peer)
            on_error.pop_all()
        makers = [(job, task) for _path, _size, task in wanted]
        self._listening[name] = listener
        self._transfers[name] = _Transfer(name, paths, ticket, files, makers)
        return Prepared(name, port, refused, [])

    def confirm_put(self, name: str, checksums: Sequence[str]) -> list[S4Error | None]:
        """Make keys of what arrived, those whose checksum is the sender's. May be repeated.

        Returns per key None or why it was refused. Raises MissingError for an unknown or expired transfer,
        TransferError if the bytes did not arrive.
        """
        found = self._transfers.get(name)  # looked for first: it goes only once its outcome is there
        ended = self._outcomes.get(name)
        if ended is not None:
            return ended.answer()
        transfer = _checked(found, name, put=True)
        if len(checksums) != len(transfer.paths):
            raise BadRequestError(f"{len(transfer.paths)} checksums are needed, not {len(checksums)}")
        self._wait_for_bytes(transfer)
        with transfer.lock:
            ended = self._outcomes.get(name)
            if ended is None:
                self._find(name, put=True)  # it may have expired while we waited
                left = transfer.files
                try:
                    received = self._received(transfer)
                    refused = self._publish(transfer, received, checksums)
                    left = [file for file, error in zip(left, refused, strict=True) if error is not None]
                    outcome = _Outcome(refused, None, time.monotonic())
                except BusyError:
                    raise
                except S4Error as e:
                    outcome = _Outcome([], e, time.monotonic())
                ended = self._outcomes[name] = outcome
                self._end(transfer, left)
        return ended.answer()

    def _wait_for_bytes(self, transfer: _Transfer) -> None:
        """Wait until nothing more arrives, without the lock of the transfer: who has to wait for that would
        not be counted. Raises BusyError if it takes long."""
        if not transfer.ticket.done:
            with self._gate.waiting():
                if not transfer.ticket.wait_done(SLOT_SECONDS):
                    raise BusyError(f"{transfer} is still arriving; confirm again later")

    def _received(self, transfer: _Transfer) -> Received:
        try:
            answer = transfer.ticket.result()
        except (StoppingError, BusyError):
            raise
        except S4Error as e:
            raise TransferError(f"{transfer} did not arrive on {self._server}: {e}") from e
        assert isinstance(answer, Received)
        return answer

    def _publish(
        self, transfer: _Transfer, received: Received, checksums: Sequence[str]
    ) -> list[S4Error | None]:
        outcome: list[S4Error | None] = []
        good: list[Finished] = []
        arrived = zip(transfer.paths, received.files, transfer.makers, checksums, strict=True)
        for path, file, maker, checksum in arrived:
            if file.checksum == checksum:
                outcome.append(None)
                good.append(Finished(path, file, *maker))
            else:
                outcome.append(
                    TransferError(
                        f"{url(path)}: checksum {checksum or 'missing'} was sent, but {file.checksum} came"
                    )
                )

        def forget(db: Transaction, outcome: Sequence[S4Error | None]) -> None:
            if all(isinstance(error, BusyError) for error in outcome):
                raise BusyError(str(outcome[0]))  # nothing is decided: it can be confirmed again
            self._underway.transfer_stored(db, transfer.uuid)

        results = iter(self.publish(good, forget))
        return [error if error is not None else next(results) for error in outcome]

    def publish(
        self, files: Sequence[Finished], also: Also = lambda _db, _outcome: None
    ) -> list[S4Error | None]:
        """Make finished files keys of this node, in few transactions.

        `also(db, outcome)` is called in each, with the outcome of its files. Returns per key None, or why it
        was refused; the file is still there then. Raises S4Error if a transaction fails: those before it
        hold.
        """
        outcome: list[S4Error | None] = []
        for start in range(0, len(files), TRANSACTION_KEYS):
            chunk = files[start : start + TRANSACTION_KEYS]
            outcome += self._publish_together(chunk, also)
        return outcome

    def _publish_together(self, files: Sequence[Finished], also: Also) -> list[S4Error | None]:
        keys = [NewKey(path, file.size, file.checksum, job, task) for path, file, job, task in files]
        with self._storage.placing() as place:
            return self._keys.add(keys, lambda i: place(files[i].file.file, files[i].path), also)

    def prepare_get(
        self, paths: Sequence[str], peer: str, port: int | None = None, *, confirmed: bool
    ) -> Prepared:
        """Get ready to send keys to the address `peer`, which connects to us, or whose `port` we connect to.

        `confirmed` says whether the caller will confirm. Raises BusyError if no slot becomes free in time.
        """
        fds: list[int] = []
        with _busy_without_descriptors(), contextlib.ExitStack() as on_error:
            on_error.callback(_close_all, fds)
            refused, found = self._open_all(paths, fds)
            if not found:
                return Prepared("", 0, refused, [])
            name = str(uuid.uuid4())
            own_port = 0
            listener = None
            if port is None:
                listener = on_error.enter_context(self._listener())
                own_port = listener.getsockname()[1]
                fds.insert(0, os.dup(listener.fileno()))
            ticket = Ticket(Kind.SEND, Send([row.size for row in found], peer, port), [*fds])
            fds.clear()  # they are the ticket's now
            self._start(ticket)
            on_error.pop_all()
        total = sum(row.size for row in found)
        held = [row.path for row in found]
        try:
            self._underway.transfer_began(name, "get", held, total, peer)
        except S4Error as e:  # a full disk should not keep keys from being read
            log.warning("transfer %s: %s", name, e)
        checksums = [row.checksum for row in found]
        if listener is not None:
            self._listening[name] = listener
        self._transfers[name] = _Transfer(
            name, held, ticket, [], [], checksums, confirmed_by_caller=confirmed
        )
        return Prepared(name, own_port, refused, [(row.size, row.checksum) for row in found])

    def _open_all(self, paths: Sequence[str], fds: list[int]) -> tuple[list[S4Error | None], list[KeyRow]]:
        """Open the files of keys, at the end of `fds`; why a key was refused, and the rows of the others."""
        for _ in range(OPEN_TRIES):
            refused: list[S4Error | None] = []
            found: list[KeyRow] = []
            rows = self._keys.get_all(paths)
            for path, row in zip(paths, rows, strict=True):
                try:
                    if row is None:
                        raise MissingError(f"no such key: {url(path)}")
                    fds.append(self._storage.open(path))
                except BusyError:
                    raise
                except S4Error as e:
                    refused.append(e)
                else:
                    refused.append(None)
                    found.append(row)
            # A key may have been removed in between, and made again with other bytes.
            if self._keys.get_all(paths) == rows:
                return refused, found
            _close_all(fds)
            fds.clear()
        raise BusyError(f"{url(paths[0])}: it is removed and made again all the time; try again later")

    def confirm_get(self, name: str, checksum: str) -> None:
        """Compare what the caller hashed with what is stored. Raises MissingError, TransferError, and
        StoppingError if the node has stopped sending."""
        transfer = self._find(name, put=False)
        self._end(transfer, [])
        if transfer.checksums != [checksum]:
            # The bytes of a worker that died have ended before the pool hears of it.
            transfer.ticket.wait_done(DEATH_SECONDS)
        if transfer.ticket.done:
            try:
                transfer.ticket.result()
            except StoppingError:
                raise
            except S4Error as e:
                raise TransferError(f"{url(transfer.paths[0])} was not sent whole: {e}") from e
        if transfer.checksums != [checksum]:
            raise TransferError(
                f"{url(transfer.paths[0])}: checksum {transfer.checksums[0]} is stored, but {checksum} came"
            )

    def _find(self, name: str, *, put: bool) -> _Transfer:
        return _checked(self._transfers.get(name), name, put=put)

    def _listener(self) -> socket.socket:
        """A socket that listens on a port of its own, one that an earlier transfer had if there is one.

        Where hundreds of transfers a second end, and each held its port for a minute more (TIME_WAIT), a new
        one would soon take milliseconds to find.
        """
        with contextlib.suppress(IndexError, OSError):
            listener = self._listeners.pop()
            _turn_away(listener)
            return listener
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        return socket.create_server((self._host, 0), family=family, backlog=8)

    def _start(self, ticket: Ticket) -> Ticket:
        """Submit a ticket and wait until it has its slot."""
        self._pool.submit(ticket)
        if not ticket.wait_started(0):
            try:
                with self._gate.waiting():
                    wait_for_slot(ticket)
            except BusyError as e:
                self._pool.cancel(ticket, e)
                raise
        if not ticket.began_s:  # it failed without a slot, as when the node stops
            ticket.result()
        return ticket

    def drop(self, makers: Collection[tuple[str | None, int | None]]) -> None:
        """Give up what tasks, as (job, task), have under way, before they run again: a confirm that is still
        on its way, as over a link that stood still, must not publish it any more."""
        for transfer in list(self._transfers.values()):
            if not set(transfer.makers).isdisjoint(makers):
                self._pool.cancel(transfer.ticket, TransferError("its task runs again"))
                with contextlib.suppress(S4Error):
                    transfer.ticket.result()
                with transfer.lock:
                    self._end(transfer, transfer.files)

    def _end(self, transfer: _Transfer, left: Sequence[str]) -> None:
        """Forget a transfer, and remove the files that are left of it: those that did not become keys."""
        if self._transfers.pop(transfer.uuid, None) is not None:
            self._let_go(transfer)
            for file in left:
                remove_if_possible(file)
            try:
                if len(left) == len(transfer.files):  # what became a key took the record with it
                    self._underway.transfer_ended(transfer.uuid)
            except S4Error as e:  # as on a full disk
                log.warning("transfer %s: its end is not recorded yet: %s", transfer.uuid, e)
                self._unrecorded.append(transfer.uuid)

    def _let_go(self, transfer: _Transfer) -> None:
        """Keep the port of a transfer whose one connection has come and ended well; close that of another."""
        listener = self._listening.pop(transfer.uuid, None)
        if listener is None:
            return
        if transfer.ticket.succeeded and len(self._listeners) < IDLE_LISTENERS:
            self._listeners.append(listener)
        else:
            listener.close()

    def expire(self) -> None:
        """Drop what nobody confirmed, and record what could not be recorded; called about once a second."""
        now = time.monotonic()
        for _ in range(len(self._unrecorded)):  # one by one: requests may add some meanwhile
            name = self._unrecorded.popleft()
            try:
                self._underway.transfer_ended(name)
            except S4Error:
                self._unrecorded.append(name)
        for name, outcome in list(self._outcomes.items()):
            if now > outcome.ended_s + OUTCOME_SECONDS:
                del self._outcomes[name]
        for _ in range(len(self._listeners)):
            with contextlib.suppress(IndexError, OSError):
                listener = self._listeners.pop(0)  # so that no transfer gets it meanwhile
                _turn_away(listener)
                self._listeners.append(listener)
        for transfer in list(self._transfers.values()):
            if transfer.ticket.done:
                self._let_go(transfer)
                moved_s = transfer.ticket.seconds if transfer.ticket.succeeded else 0.0
                expires_s = transfer.ticket.done_s + max(UNCONFIRMED_SECONDS, moved_s)
                if not transfer.confirmed_by_caller or now > expires_s:
                    with transfer.lock:
                        self._end(transfer, transfer.files)


def _checked(transfer: _Transfer | None, name: str, *, put: bool) -> _Transfer:
    if transfer is None or transfer.is_put != put:
        raise MissingError(f"no such transfer: {one_line(name, 100)}; it ended or expired, start again")
    return transfer


@contextlib.contextmanager
def _busy_without_descriptors() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            raise BusyError(f"{e.strerror}; try again later") from e
        raise


def _turn_away(listener: socket.socket) -> None:
    """Hang up on whoever connected although there is no transfer."""
    pending = select.poll()
    pending.register(listener, select.POLLIN)
    while pending.poll(0):
        listener.accept()[0].close()


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
