"""eval: one command over one key, for a caller who waits. Recorded like a job with a single task."""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from s4.errors import (
    CancelledError,
    ConflictError,
    MissingError,
    S4Error,
    StoppingError,
    TimeLimitError,
    WorkerDiedError,
)
from s4.index import Counts, JobRow, NewTask, ShareRow, TaskChange
from s4.index.jobs import STOPPED
from s4.keys import url
from s4.services import Services, exit_text, signal_of, variables_of, work_name
from s4.states import CANCELLED, DONE, EVAL, FAILED, INTERRUPTED
from s4.text import with_said
from s4.waiting import Gate, wait_for_slot
from s4.workers import Kind, Ticket
from s4.workers.tasks import Command, Ran

LOOK_SECONDS = 0.5  # how often to see whether the caller is still there
STOP_SECONDS = 3.0  # for the records of evals that were ended with the node

log = logging.getLogger("s4.job")


@dataclass(frozen=True)
class EvalOutput:
    """How an eval ended. `stdout` and `stderr` are descriptors of unnamed files; the receiver closes them."""

    exitcode: int
    stdout: int
    stdout_size: int
    stderr: int
    stderr_size: int


class Evals:
    """The evals of a node; `gate` bounds how many run or wait."""

    def __init__(self, services: Services, gate: Gate) -> None:
        self._services = services
        self._gate = gate
        self._running: dict[str, Ticket] = {}
        self._unrecorded: deque[tuple[JobRow, TaskChange, str, str | None]] = deque()

    def run(
        self, path: str, job_id: str, command: str, timeout: float, abandoned: Callable[[], bool]
    ) -> EvalOutput:
        """Run a command with the data of the key `path` as its input, for at most `timeout` seconds.

        `abandoned()` says whether the caller is gone; the command is ended then. Raises MissingError,
        ConflictError for an id that was used before, BusyError, TimeLimitError, CancelledError.
        """
        key = self._services.keys.get(path)
        job = JobRow(job_id, EVAL, url(path), "", command, timeout, alone=True)
        task = NewTask(self._services.position, path, 1, key.size)
        ticket = self._ticket(job, task)
        with self._gate.waiting():
            if self._running.setdefault(job_id, ticket) is not ticket:
                raise ConflictError(f"job {job_id} is running already")
            try:
                self._check_new(job_id)
                return self._run(job, task, ticket, abandoned)
            finally:
                del self._running[job_id]

    def _ticket(self, job: JobRow, task: NewTask) -> Ticket:
        storage = self._services.storage
        work = work_name(job.id, task.task, 1)
        command = Command(
            job.command,
            storage.temporary_folder(work),
            storage.temporary_file(work),
            "eval",
            self._services.locate(task.input)[0],
            environment=variables_of(job.id, task, 1),
        )
        return Ticket(Kind.COMPUTE, command, time_limit=job.timeout)

    def _run(self, job: JobRow, task: NewTask, ticket: Ticket, abandoned: Callable[[], bool]) -> EvalOutput:
        recorded = False
        try:
            self._services.pool.submit(ticket)
            wait_for_slot(ticket)  # who is turned away here comes again with the same id
            self._services.job_index.begin(job)
            recorded = True
            self._services.job_index.add_tasks(job.id, [task])
            self._services.job_index.listed(job.id, Counts(tasks=1))
            ran = self._wait(ticket, abandoned)
        except BaseException as e:
            self._services.pool.cancel(ticket, S4Error("the eval failed"))
            with contextlib.suppress(S4Error):
                ticket.result()
            if recorded:
                self._record_failure(job, task, ticket, e)
            self._services.storage.discard(job.id)
            if isinstance(e, (MissingError, TimeLimitError, WorkerDiedError)) or type(e) is S4Error:
                # Who raised it knows the command, but not its key.
                e.args = (with_said(f"{url(task.input)}: {e}", ticket.stderr.decode("utf-8", "replace")),)
            raise
        return self._finished(job, task, ticket, ran)

    def _check_new(self, job_id: str) -> None:
        with contextlib.suppress(MissingError):
            self._services.job_index.share(job_id)
            raise ConflictError(f"job {job_id} ran already")

    def _record_failure(self, job: JobRow, task: NewTask, ticket: Ticket, error: BaseException) -> None:
        state, shown = FAILED, str(error)
        if isinstance(error, CancelledError):
            state = CANCELLED
        elif isinstance(error, StoppingError):
            state, shown = INTERRUPTED, STOPPED
        change = TaskChange(task.task, FAILED if state == FAILED else CANCELLED, 1, error=shown)
        if ticket.began_s:
            change = change._replace(
                pid=ticket.pid, started_s=ticket.started_s, seconds=ticket.seconds, stderr=ticket.stderr
            )
        self._end(job, change, state, shown)

    def _end(self, job: JobRow, change: TaskChange, state: str, error: str | None) -> None:
        try:
            self._record_end(job, change, state, error)
        except S4Error as e:
            log.error("eval %s: its end is not recorded: %s", job.id, e)
            self._unrecorded.append((job, change, state, error))

    def _record_end(self, job: JobRow, change: TaskChange, state: str, error: str | None) -> None:
        self._services.job_index.progress(job.id, [change], Counts(tasks=1))
        self._services.job_index.end(job.id, state, error)

    def keep_house(self) -> None:
        """Record ends that could not be recorded, as on a full disk."""
        for _ in range(len(self._unrecorded)):  # one by one: requests may add some meanwhile
            self._end(*self._unrecorded.popleft())

    def _finished(self, job: JobRow, task: NewTask, ticket: Ticket, ran: Ran) -> EvalOutput:
        stdout, stderr = ran.outputs[0], ran.stderr
        assert stderr is not None
        with contextlib.ExitStack() as unlinked, contextlib.ExitStack() as on_error:
            unlinked.callback(os.unlink, stdout.file)
            unlinked.callback(os.unlink, stderr.file)
            state, error = (DONE, None) if ran.exitcode == 0 else (FAILED, exit_text(ran.exitcode))
            opened = []
            try:
                for file in (stdout.file, stderr.file):
                    opened.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
                    on_error.callback(os.close, opened[-1])
            except OSError as e:
                state, error = FAILED, f"what it printed cannot be read: {e.strerror}"
            change = TaskChange(
                task.task,
                state,
                attempt=1,
                pid=ticket.pid,
                started_s=ticket.started_s,
                seconds=ticket.seconds,
                cpu_seconds=ran.cpu_seconds,
                peak_memory=ran.peak_memory,
                bytes_out=stdout.size,
                exit_code=ran.exitcode,
                signal=signal_of(ran.exitcode),
                error=error,
                stderr=ran.tail,
            )
            self._end(job, change, state, error)
            if len(opened) < 2:
                raise S4Error(f"{job.indir}: {error}")
            on_error.pop_all()
            return EvalOutput(ran.exitcode, opened[0], stdout.size, opened[1], stderr.size)

    def _wait(self, ticket: Ticket, abandoned: Callable[[], bool]) -> Ran:
        while True:
            try:
                answer = ticket.result(LOOK_SECONDS)
            except TimeoutError:
                if abandoned():
                    self._services.pool.cancel(ticket, CancelledError("the caller went away"))
                continue
            assert isinstance(answer, Ran)
            return answer

    def cancel(self, job_id: str) -> None:
        """End an eval and what it runs; does nothing if there is none of this id."""
        ticket = self._running.get(job_id)
        if ticket is not None:
            self._services.pool.cancel(ticket, CancelledError(f"job {job_id} was cancelled"))
            self._wait_until(lambda: job_id not in self._running)

    def running(self, prefix: str) -> list[ShareRow]:
        """The records of those that run and whose id starts with `prefix`."""
        found = []
        for job_id in list(self._running):
            with contextlib.suppress(MissingError):  # it still waits for its slot
                if job_id.startswith(prefix):
                    found.append(self._services.job_index.share(job_id))
        return found

    def is_running(self, job_id: str) -> bool:
        """Whether an eval of this id runs, or waits for its slot."""
        return job_id in self._running

    def wait(self, job_id: str, seconds: float) -> None:
        """Wait for the end of an eval, but no longer than so many seconds."""
        ticket = self._running.get(job_id)
        if ticket is not None and ticket.wait_done(seconds):
            self._wait_until(lambda: self._running.get(job_id) is not ticket)  # its record follows

    def wait_for_all(self) -> None:
        """Give evals that were ended a moment to write their records."""
        self._wait_until(lambda: not self._running)

    def _wait_until(self, over: Callable[[], bool]) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        while not over() and time.monotonic() < deadline:
            time.sleep(0.01)
