"""What map, map-to-n and map-from-n mean on one node: inputs, commands, outputs.

A job runs this node's share. One thread a job decides; commands and sends run in the pool. Outputs that
belong here become keys by a rename; a shuffle's other outputs leave in batches, one conversation for many
files, while the next commands run. The first failure ends the job.
"""

import contextlib
import logging
import os
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from s4.config import Conf
from s4.errors import (
    CancelledError,
    CommandError,
    ConflictError,
    S4Error,
    StoppingError,
    TimeLimitError,
)
from s4.exchange import MAX_BATCH_BYTES, MAX_BATCH_KEYS
from s4.index import JobRow, KeyIndex, Records
from s4.keys import check_job_folders, group_name, matcher, name_of, owner, parse_key, prefix_of, url
from s4.storage import Storage
from s4.transfers import Publish
from s4.workers import Kind, Pool, Ticket
from s4.workers.tasks import Command, Push, Pushed, Ran, StoredFile

MAX_UNSENT_BYTES = 512 * 1024 * 1024  # outputs waiting to leave; beyond it no further command starts
MAX_UNSENT_FILES = 20_000
PUSHES_PER_SERVER = 2
GATHER_FILES = 100  # outputs for a server wait until there are so many,
GATHER_BYTES = 2 * 1024 * 1024  # or they are so large,
GATHER_SECONDS = 0.2  # or for so long, or until no command runs
PROGRESS_SECONDS = 1.0
CANCELLED_SECONDS = 3600.0  # how long a cancelled job that never began here is remembered
TAIL_CHARACTERS = 2000

MAP, MAP_TO_N, MAP_FROM_N = "map", "map-to-n", "map-from-n"

log = logging.getLogger("s4.job")


@dataclass(frozen=True)
class _Task:
    """One command to run: its input and where its output goes."""

    number: int
    input: str  # path of the key, or of the first of a group
    target: str  # path of the output key; for map-to-n of the folder, with '/'
    group: list[str] = field(default_factory=list)  # map-from-n: paths of the group's keys


class _Outbox:
    """Outputs for another server, which leave in batches."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, StoredFile]] = deque()
        self._bytes = 0
        self._since = 0.0  # monotonic

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, path: str, file: StoredFile) -> None:
        """Put an output in; `path` is the key that it becomes."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append((path, file))
        self._bytes += file.size

    def due(self) -> bool:
        """Whether enough has gathered, or for long enough."""
        return (
            len(self._waiting) >= GATHER_FILES
            or self._bytes >= GATHER_BYTES
            or time.monotonic() > self._since + GATHER_SECONDS
        )

    def take(self) -> list[tuple[str, StoredFile]]:
        """The next batch."""
        batch: list[tuple[str, StoredFile]] = []
        size = 0
        while self._waiting and len(batch) < MAX_BATCH_KEYS and size < MAX_BATCH_BYTES:
            batch.append(self._waiting.popleft())
            size += batch[-1][1].size
        self._bytes -= size
        self._since = time.monotonic()
        return batch


class Jobs:
    """The jobs of this node. `position` is its place in the ring."""

    def __init__(
        self,
        conf: Conf,
        position: int,
        keys: KeyIndex,
        records: Records,
        storage: Storage,
        pool: Pool,
        publish: Publish,
        slots: int,
    ) -> None:
        self.conf = conf
        self.position = position
        self.keys = keys
        self.records = records
        self.storage = storage
        self.pool = pool
        self.publish = publish
        self.slots = slots
        self._jobs: dict[str, _Job] = {}
        self._cancelled: dict[str, float] = {}  # before they began; when, monotonic
        self._lock = threading.Lock()

    def start(self, row: JobRow, timeout: float) -> "_Job":
        """Start this node's share of a job, commands limited to `timeout` seconds each.

        The same id twice is one job: a second call returns the first one's. Raises BadRequestError.
        """
        folders = check_job_folders(row.indir, row.outdir)
        with self._lock:
            job = self._jobs.get(row.id)
            if job is None:
                if row.id in self._cancelled:
                    raise CancelledError(f"job {row.id} was cancelled")
                if not self.records.job_began(row):
                    raise ConflictError(f"job {row.id} ran already")
                job = self._jobs[row.id] = _Job(self, row, folders, timeout)
                job.thread.start()
            return job

    def cancel(self, job_id: str) -> None:
        """End a job and everything it runs, and wait for that. One that has not begun here never will."""
        with self._lock:
            job = self._jobs.get(job_id)
            if job is None:
                self._cancelled[job_id] = time.monotonic()
                return
        job.cancel(CancelledError(f"job {job_id} was cancelled"))
        job.thread.join()

    def stop(self) -> None:
        """End all jobs."""
        for job in list(self._jobs.values()):
            job.cancel(StoppingError("the node is shutting down"))
        for job in list(self._jobs.values()):
            job.thread.join()

    def forget_finished(self, seconds: float) -> None:
        """Drop jobs from memory that ended so long ago; their rows stay."""
        now = time.monotonic()
        with self._lock:
            self._cancelled = {i: s for i, s in self._cancelled.items() if now < s + CANCELLED_SECONDS}
            for job in list(self._jobs.values()):
                if job.ended_s is not None and now > job.ended_s + seconds:
                    del self._jobs[job.row.id]

    @property
    def server(self) -> str:
        """This node, as messages name it."""
        return str(self.conf.servers[self.position])


class _Job:
    def __init__(self, jobs: Jobs, row: JobRow, folders: tuple[str, str, str], timeout: float) -> None:
        self.row = row
        self.ended_s: float | None = None
        self.thread = threading.Thread(target=self._main, name=f"job-{row.id}", daemon=True)
        self.total = self.done = 0
        self._jobs = jobs
        self._folder, self._pattern, self._target = folders
        self._timeout = timeout
        self._events: queue.SimpleQueue[Ticket | S4Error] = queue.SimpleQueue()
        self._commands: dict[Ticket, _Task] = {}
        self._pushes: dict[Ticket, str] = {}
        self._outboxes: defaultdict[str, _Outbox] = defaultdict(_Outbox)
        self._unsent_files = self._unsent_bytes = 0  # waiting or on their way
        self._error: S4Error | None = None

    def wait(self) -> int:
        """Wait for the end; the number of tasks. Raises the S4Error that ended the job."""
        self.thread.join()
        if self._error is not None:
            raise self._error
        return self.total

    def cancel(self, reason: S4Error) -> None:
        """Have the job end soon; does nothing if it is over."""
        self._events.put(reason)

    def _main(self) -> None:
        began = time.monotonic()
        try:
            self._run()
        except S4Error as e:
            self._error = e
        except Exception as e:
            log.exception("job %s", self.row.id)
            self._error = S4Error(f"internal error in job {self.row.id}: {e!r}")
        try:
            if self._error is not None:
                self._abandon()
            self._record_end()
        except (S4Error, OSError) as e:
            log.error("job %s: its end is not recorded: %s", self.row.id, e)
        milliseconds = (time.monotonic() - began) * 1000
        counts = f"{self.done}/{self.total}"
        log.info("job %s %s %s %s %.0fms", self.row.id, self.row.kind, self._state, counts, milliseconds)
        self.ended_s = time.monotonic()

    @property
    def _state(self) -> str:
        if self._error is None:
            return "done"
        return "cancelled" if isinstance(self._error, CancelledError) else "failed"

    def _record_end(self) -> None:
        error = None if self._error is None else str(self._error)
        self._jobs.records.job_ended(self.row.id, self._state, self.total, self.done, error)

    def _run(self) -> None:
        tasks = list(self._tasks())
        self.total = len(tasks)
        self._jobs.records.job_progress(self.row.id, self.total, 0)
        log.info("job %s %s started, %d tasks", self.row.id, self.row.kind, self.total)
        waiting = iter(tasks)
        following = next(waiting, None)
        reported = time.monotonic()
        while True:
            # As many again as can run wait in the pool, so that a free slot never waits for us.
            while following is not None and len(self._commands) < 2 * self._jobs.slots and not self._full():
                self._start(following)
                following = next(waiting, None)
            if not self._commands and not self._pushes and not self._anything_waits():
                return
            self._handle(self._next_events())
            self._send(nothing_more=following is None and not self._commands)
            if time.monotonic() > reported + PROGRESS_SECONDS:
                reported = time.monotonic()
                self._jobs.records.job_progress(self.row.id, self.total, self.done)

    def _full(self) -> bool:
        return self._unsent_files >= MAX_UNSENT_FILES or self._unsent_bytes >= MAX_UNSENT_BYTES

    def _next_events(self) -> list[Ticket]:
        """Wait for one event, and take all that are there with it; for a moment only if outputs wait."""
        found: list[Ticket] = []
        event: Ticket | S4Error | None
        try:
            event = self._events.get(timeout=GATHER_SECONDS if self._anything_waits() else None)
        except queue.Empty:
            return found
        while event is not None:
            if isinstance(event, S4Error):
                raise event
            found.append(event)
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                event = None
        return found

    def _tasks(self) -> Iterator[_Task]:
        matches = matcher(self._pattern)
        start = len(self._folder)
        paths = (path for path in self._jobs.keys.paths(self._folder) if matches(path[start:]))
        if self.row.kind == MAP_FROM_N:
            groups: defaultdict[str, list[str]] = defaultdict(list)
            for path in paths:
                groups[prefix_of(name_of(path))].append(path)
            for number, (prefix, members) in enumerate(sorted(groups.items())):
                target = self._target + group_name(prefix, map(name_of, members))
                yield _Task(number, members[0], parse_key(target), members)
        else:
            for number, path in enumerate(paths):
                if self.row.kind == MAP:
                    yield _Task(number, path, parse_key(self._target + path[start:]))
                else:
                    yield _Task(number, path, self._target + name_of(path) + "/")

    def _start(self, task: _Task) -> None:
        storage = self._jobs.storage
        name = self._work_name(task)
        if self.row.kind != MAP_TO_N and (conflict := self._jobs.keys.conflict(task.target)):
            raise self._failure(task, conflict)
        if self.row.kind == MAP_FROM_N:
            stdin, lines, variables = None, [storage.real_path(path) for path in task.group], {}
        else:
            stdin, lines, variables = storage.real_path(task.input), [], {"filename": name_of(task.input)}
        command = Command(
            self.row.command,
            storage.temporary_folder(name),
            storage.temporary_file(name),
            "paths" if self.row.kind == MAP_TO_N else "stdout",
            stdin,
            lines,
            variables,
        )
        ticket = Ticket(Kind.COMPUTE, command, time_limit=self._timeout, on_done=self._events.put)
        self._commands[ticket] = task
        self._jobs.pool.submit(ticket)

    def _work_name(self, task: _Task) -> str:
        return f"{self.row.id}.{task.number}"

    def _handle(self, tickets: list[Ticket]) -> None:
        here: list[tuple[str, StoredFile]] = []
        makers: list[_Task] = []
        finished = 0
        for ticket in tickets:
            if ticket in self._pushes:
                self._pushed(ticket)
                continue
            task = self._commands[ticket]
            ran = self._ran(ticket, task)
            del self._commands[ticket]
            finished += 1
            for output in ran.outputs:
                path = self._output_path(task, output)
                position = owner(path, len(self._jobs.conf.servers))
                if position == self._jobs.position:
                    here.append((path, output))
                    makers.append(task)
                else:
                    self._outboxes[str(self._jobs.conf.servers[position])].add(path, output)
                    self._unsent_files += 1
                    self._unsent_bytes += output.size
        for maker, error in zip(makers, self._jobs.publish(here), strict=True):
            if error is not None:
                raise self._failure(maker, error)
        self.done += finished

    def _output_path(self, task: _Task, output: StoredFile) -> str:
        if self.row.kind != MAP_TO_N:
            return task.target
        try:
            return parse_key(task.target + output.name)
        except S4Error as e:
            raise self._failure(task, e) from e

    def _failure(self, task: _Task, error: S4Error) -> S4Error:
        """An error of a task, with its key and this node in front."""
        kind = ConflictError if isinstance(error, ConflictError) else CommandError
        return kind(f"{url(task.input)} on {self._jobs.server}: {error}")

    def _ran(self, ticket: Ticket, task: _Task) -> Ran:
        """The answer of a command that ended well; otherwise CommandError."""
        where = f"{url(task.input)} on {self._jobs.server}"
        try:
            ran = ticket.result()
        except TimeLimitError as e:
            stderr = self._jobs.storage.temporary_file(self._work_name(task)) + ".err"
            raise CommandError(f"{where}: {e}{one_line(read_tail(stderr))}") from e
        except S4Error as e:
            raise self._failure(task, e) from e
        assert isinstance(ran, Ran)
        if ran.exitcode != 0:
            raise CommandError(f"{where}: exit code {ran.exitcode}{one_line(ran.tail)}")
        if ran.problem:
            raise CommandError(f"{where}: {ran.problem}{one_line(ran.tail)}")
        return ran

    def _send(self, *, nothing_more: bool) -> None:
        """Let outputs leave in batches, at most two conversations with a server at once."""
        for server, outbox in self._outboxes.items():
            under_way = sum(1 for to in self._pushes.values() if to == server)
            while outbox and under_way < PUSHES_PER_SERVER and (nothing_more or self._full() or outbox.due()):
                push = Push(server, self._jobs.conf.fingerprint, outbox.take(), self._timeout)
                ticket = Ticket(Kind.SEND, push, on_done=self._events.put)
                self._pushes[ticket] = server
                self._jobs.pool.submit(ticket)
                under_way += 1

    def _anything_waits(self) -> bool:
        return any(self._outboxes.values())

    def _pushed(self, ticket: Ticket) -> None:
        assert isinstance(ticket.task, Push)
        try:
            answer = ticket.result()
        except S4Error as e:
            raise CommandError(f"outputs of {self._jobs.server} for {self._pushes[ticket]}: {e}") from e
        assert isinstance(answer, Pushed)
        del self._pushes[ticket]
        for _path, file in ticket.task.entries:
            os.unlink(file.file)
            self._unsent_files -= 1
            self._unsent_bytes -= file.size
        for refusal in answer.refused:
            if refusal is not None:
                error = ConflictError if refusal.error == ConflictError.__name__ else CommandError
                raise error(f"{refusal.message} (an output of {self._jobs.server})")

    def _abandon(self) -> None:
        """Nothing of a failed job runs on, and nothing of it stays but the keys that it stored."""
        reason = CancelledError("the job failed")
        tickets = [*self._commands, *self._pushes]
        for ticket in tickets:
            self._jobs.pool.cancel(ticket, reason)
        for ticket in tickets:
            with contextlib.suppress(S4Error):
                ticket.result()
        self._jobs.storage.discard(self.row.id)


def one_line(stderr: bytes) -> str:
    """The end of a command's stderr, to follow a message: its lines joined, empty if there are none."""
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    text = " | ".join(lines)[-TAIL_CHARACTERS:]
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return f": {printable}" if printable else ""


def read_tail(path: str, size: int = 4096) -> bytes:
    """The last bytes of a file, none if it does not exist."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - size))
            return f.read()
    except FileNotFoundError:
        return b""
