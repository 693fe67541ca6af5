"""One node's share of a map, map-to-n or map-from-n while it runs: its commands, their outputs, its record.

One thread a share decides; commands and sends run in the pool. Outputs that belong here become keys by a
rename, in the transaction that records their task as done; a shuffle's other outputs leave in batches, one
conversation for many files, while the next commands run. Without keep_going the first failure ends the share.
"""

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from s4.errors import (
    CancelledError,
    CommandError,
    ConflictError,
    MissingError,
    S4Error,
    StoppingError,
    TimeLimitError,
)
from s4.index import Counts, JobRow, Maker, NewTask, ShareRow, TaskChange, Transaction
from s4.index.jobs import STEP, STOPPED
from s4.inputs import Inputs
from s4.keys import REMOVE_FIRST, START_AGAIN, name_of, owner, parse_key, prefix_of, url
from s4.outbox import GATHER_SECONDS, Outbox, Sending
from s4.services import Services, exit_text, signal_of, variables_of, work_name
from s4.states import CANCELLED, DONE, FAILED, INTERRUPTED, MAP_FROM_N, MAP_TO_N, RUNNING, SKIPPED, WAITING
from s4.text import with_said
from s4.transfers import Finished
from s4.workers import Kind, Ticket
from s4.workers.tasks import Command, Destination, Ran, StoredFile

RECORD_SECONDS = 0.25  # how far the record may lag behind tasks that run
PROGRESS_SECONDS = 1.0  # and how far the share is
READ_TASKS = 500  # waiting tasks read from the index at once
_THREADS = "OMP_NUM_THREADS"  # https://www.openmp.org/spec-html/5.0/openmpse50.html

log = logging.getLogger("s4.job")


@dataclass(eq=False)
class _Attempt:
    """One try at a task."""

    task: NewTask
    number: int  # from 1
    tries_left: int
    target: str = ""
    ticket: Ticket | None = None
    ran: Ran | None = None
    noted: bool = False  # the record says that it runs
    unsettled: int = 0  # outputs that are not yet keys, nor refused
    failure: TaskChange | None = None
    outputs: list[StoredFile] = field(default_factory=list)


class _FirstFailure(Exception):
    """A task failed, and the job does not keep going."""


class Share:
    """A share that runs. `again`: it has run before, and goes on with the tasks that wait in its record."""

    def __init__(self, services: Services, job: JobRow, *, again: bool = False) -> None:
        self.job = job
        self.ended = threading.Event()
        self.failure: S4Error | None = None
        self.state = RUNNING
        self.end_recorded = False
        self._services = services
        self._inputs = Inputs(job, services.conf, services.position, services.keys, services.job_index)
        self._listed = False
        self._counts = Counts()
        self._events: queue.SimpleQueue[Ticket | S4Error] = queue.SimpleQueue()
        self._commands: dict[Ticket, _Attempt] = {}
        self._outbox: Outbox[_Attempt] = Outbox(services.conf, services.pool, job.id, self._events.put)
        self._ready: deque[_Attempt] = deque()
        self._to_repeat: list[_Attempt] = []  # failed, but some of their outputs may be on their way
        self._threads: dict[str, str] = {}
        self._again = again
        self._last_read = -1
        self._all_read = False
        self._changes: list[TaskChange] = []
        self._recorded = self._reported = time.monotonic()
        self._started_s = self._finished_s = time.time()
        if again:
            known = services.job_index.share(job.id)
            self._listed, self._counts, self._started_s = known.listed, known.counts, known.started_s

    def start(self, on_end: Callable[["Share"], None]) -> None:
        """Run, in a thread of its own; `on_end(share)` is called there, before `ended` is set."""
        threading.Thread(target=self._main, args=(on_end,), name=f"job-{self.job.id}", daemon=True).start()

    def cancel(self, reason: S4Error) -> None:
        """Have the share end soon, and its commands now; does nothing if it is over."""
        self._events.put(reason)
        self._inputs.outputs.abort(reason)  # the share may be asking a node that does not answer
        for ticket in list(self._commands):
            self._services.pool.cancel(ticket, reason)

    def row(self) -> ShareRow:
        """How far it is now."""
        running = sum(1 for ticket in list(self._commands) if ticket.began_s)
        error = None if self.failure is None else str(self.failure)
        counts = replace(self._counts, running=running)
        finished_s = None if self.state == RUNNING else self._finished_s
        return ShareRow(self.job, self.state, self._listed, counts, self._started_s, finished_s, error)

    def _main(self, on_end: Callable[["Share"], None]) -> None:
        began = time.monotonic()
        state = FAILED
        try:
            self._run()
            state = FAILED if self._counts.failed else DONE
        except _FirstFailure:
            pass
        except CancelledError as e:
            state, self.failure = CANCELLED, self.failure or e
        except StoppingError:
            state, self.failure = INTERRUPTED, self.failure or StoppingError(STOPPED)
        except S4Error as e:
            self.failure = self.failure or e
        except Exception as e:
            log.exception("job %s", self.job.id)
            self.failure = S4Error(f"internal error in job {self.job.id}: {e!r}")
        try:
            self._finished_s = time.time()
            self._abandon(state)
            self.record_end(state)
        except (S4Error, OSError) as e:
            log.error("job %s: its end is not recorded: %s", self.job.id, e)
            self.failure = self.failure or S4Error(f"the end of job {self.job.id} is not recorded: {e}")
        milliseconds = (time.monotonic() - began) * 1000
        counts = f"{self._counts.done}/{self._counts.tasks}"
        log.info("job %s %s %s %s %.0fms", self.job.id, self.job.kind, state, counts, milliseconds)
        self.state = state
        try:
            on_end(self)
        finally:
            self.ended.set()

    def record_end(self, state: str) -> None:
        """Write down how the share ended. Raises S4Error: then it may be tried again."""
        error = None if self.failure is None or state == DONE else str(self.failure)
        self._services.job_index.progress(self.job.id, self._changes, self._counts)
        self._services.job_index.end(self.job.id, state, error, self._finished_s)
        self._counts = self._services.job_index.share(self.job.id).counts
        self.end_recorded = True

    def _run(self) -> None:
        if not self._listed:
            self._check_record_is_there()
            self._list()
        if self.job.kind == MAP_TO_N and self._again:
            self._remove_earlier()
        log.info("job %s %s started, %d tasks", self.job.id, self.job.kind, self._counts.tasks)
        self._threads = self._share_of_cpus()
        while True:
            nothing_more = self._start_commands() and not self._commands
            self._outbox.send(nothing_more=nothing_more)
            if nothing_more and self._outbox.empty:
                return
            self._handle(self._next_events())
            self._stop_at_failure()
            self._record()

    def _share_of_cpus(self) -> dict[str, str]:
        """How many threads a command should start, as sort, nproc and numeric libraries take it. Several run
        at once: if each started one for every CPU, they would only be in each other's way."""
        cpus = len(os.sched_getaffinity(0))
        at_once = min(self._services.slots, self._counts.tasks - self._counts.skipped - self._counts.done)
        threads = max(1, cpus // max(1, at_once))
        return {} if threads == cpus or _THREADS in os.environ else {_THREADS: str(threads)}

    def _check_record_is_there(self) -> None:
        """Raises ConflictError if a retry finds outputs of this share, which then ran before, but no record.

        Outputs on other nodes would be taken for those of an attempt that failed, and be removed.
        """
        if self.job.kind != MAP_TO_N or self.job.run == 1:
            return
        if any(job == self.job.id for job, _task in self._inputs.outputs.own_makers()):
            raise ConflictError(
                f"the record of job {self.job.id} is lost here, but outputs of it are there, and whether they"
                f" are all is not known: remove {self.job.outdir} and {START_AGAIN}"
            )

    def _list(self) -> None:
        """Record a waiting task for each input."""
        servers = len(self._services.conf.servers)
        found: list[NewTask] = []
        half_made: list[Maker] = []
        for number, (path, keys, size) in enumerate(self._inputs.all()):
            skip = self.job.skip_existing and self._inputs.exists(path)
            state = SKIPPED if skip else WAITING
            found.append(NewTask(number * servers + self._services.position, path, keys, size, state))
            self._counts.tasks += 1
            self._counts.skipped += skip
            if self.job.skip_existing and self.job.kind == MAP_TO_N and not skip:
                half_made += self._inputs.half_made(path)
            if len(found) == STEP:
                self._services.job_index.add_tasks(self.job.id, found)
                found = []
                self._check_cancelled()
        self._inputs.outputs.remove(half_made)
        self._services.job_index.add_tasks(self.job.id, found)
        self._services.job_index.listed(self.job.id, self._counts)
        self._listed = True
        self._check_cancelled()

    def _remove_earlier(self) -> None:
        """Remove what earlier runs made in tasks that are to run again: they may make less this time."""
        last = -1
        while waiting := self._services.job_index.waiting(self.job.id, last, READ_TASKS):
            makers = [Maker(name_of(task.input), self.job.id, task.task) for task, _attempt in waiting]
            if self.job.skip_existing:
                makers += self._skip_done(waiting, makers)
            self._inputs.outputs.remove(makers)
            last = waiting[-1][0].task
            self._check_cancelled()

    def _skip_done(self, waiting: Sequence[tuple[NewTask, int]], makers: Sequence[Maker]) -> list[Maker]:
        """Skip waiting tasks whose inputs another job has done since; what others half made of the rest.

        `makers` are the tasks themselves, whose own outputs do not count.
        """
        half_made: list[Maker] = []
        for (task, attempt), own in zip(waiting, makers, strict=True):
            if self._inputs.exists(task.input, besides=own):
                self._counts.skipped += 1
                self._changes.append(TaskChange(task.task, SKIPPED, attempt))
            else:
                half_made += self._inputs.half_made(task.input)
        self._services.job_index.progress(self.job.id, self._changes, self._counts)
        self._changes.clear()
        return half_made

    def _check_cancelled(self) -> None:
        with contextlib.suppress(queue.Empty):
            event = self._events.get_nowait()
            assert isinstance(event, S4Error)  # no ticket was submitted yet
            raise event

    def _start_commands(self) -> bool:
        """Start commands while there is room; whether all tasks have been started."""
        # As many again as can run wait in the pool, so that a free slot never waits for us.
        while len(self._commands) < 2 * self._services.slots and not self._outbox.full:
            self._repeat()
            if not self._ready:
                self._read_tasks()
            if not self._ready:
                return True
            attempt = self._ready.popleft()
            try:
                self._start(attempt)
            except S4Error as e:
                self._fail(attempt, str(e), e)
                self._stop_at_failure()
        return False

    def _stop_at_failure(self) -> None:
        if self._counts.failed and not self.job.keep_going:
            raise _FirstFailure

    def _read_tasks(self) -> None:
        if self._all_read:
            return
        waiting = self._services.job_index.waiting(self.job.id, self._last_read, READ_TASKS)
        for task, last_attempt in waiting:
            self._ready.append(_Attempt(task, last_attempt + 1, self.job.retries))
            self._last_read = task.task
        self._all_read = len(waiting) < READ_TASKS

    def _start(self, attempt: _Attempt) -> None:
        attempt.target = self._inputs.target(attempt.task.input)
        if self.job.kind != MAP_TO_N and self._skip(attempt):
            return
        files = [self._services.locate(path) for path in self._members(attempt.task)]
        # They may have been changed for others since the inputs were listed.
        size = sum(size for _file, size in files)
        attempt.task = attempt.task._replace(inputs=len(files), bytes_in=size)
        ticket = Ticket(
            Kind.COMPUTE,
            self._command(attempt, [file for file, _size in files]),
            time_limit=self.job.timeout,
            on_done=self._events.put,
            group=self.job.id,
            last_try=not self.job.keep_going and not attempt.tries_left,
        )
        attempt.ticket = ticket
        self._commands[ticket] = attempt
        self._services.pool.submit(ticket)

    def _skip(self, attempt: _Attempt) -> bool:
        """Whether a task is to be skipped, for its output has come to exist since the inputs were listed.

        Raises BadKeyError, ConflictError.
        """
        task = attempt.task
        parse_key(attempt.target)
        [conflict] = self._services.keys.conflicts([(attempt.target, task.task)], self.job.id)
        if conflict is None:
            return False
        if not self.job.skip_existing or not self._services.keys.exists(attempt.target):
            raise conflict
        self._counts.skipped += 1
        self._changes.append(TaskChange(task.task, SKIPPED, attempt.number - 1))
        return True

    def _members(self, task: NewTask) -> list[str]:
        """The paths of the keys that are the input of a task. Raises MissingError if a group is gone."""
        if self.job.kind != MAP_FROM_N:
            return [task.input]
        members = self._inputs.group(task.input)
        if not members:
            raise MissingError(f"no such key: {url(task.input)}")
        return members

    def _command(self, attempt: _Attempt, files: list[str]) -> Command:
        task, name = attempt.task, self._work_name(attempt)
        variables = variables_of(self.job.id, task, attempt.number)
        stdin: str | None
        lines: list[str]
        if self.job.kind == MAP_FROM_N:
            stdin, lines = None, files
            del variables["filename"]
            variables["S4_KEY"] = prefix_of(name_of(task.input))
        else:
            [stdin], lines = files, []
        collect: str | Destination = "stdout"
        stdout_bytes = task.bytes_in  # most commands print less; whether more is not known
        if self.job.kind == MAP_TO_N:
            collect = Destination(attempt.target, len(self._services.conf.servers), self._services.position)
            stdout_bytes = 0  # of names
        return Command(
            self.job.command,
            self._services.storage.temporary_folder(name),
            self._services.storage.temporary_file(name),
            collect,
            stdin,
            lines,
            variables | self._threads,
            stdout_bytes,
        )

    def _work_name(self, attempt: _Attempt) -> str:
        return work_name(self.job.id, attempt.task.task, attempt.number)

    def _next_events(self) -> list[Ticket]:
        """Wait for one event, and take all that are there with it; for a moment only if something gathers or
        the record has to be brought up to date."""
        if self._outbox.anything_waits:
            timeout = GATHER_SECONDS
        elif self._changes or any(not attempt.noted for attempt in self._commands.values()):
            timeout = RECORD_SECONDS
        else:
            timeout = None
        found: list[Ticket] = []
        event: Ticket | S4Error | None
        try:
            event = self._events.get(timeout=timeout)
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

    def _handle(self, tickets: list[Ticket]) -> None:
        here: list[Finished] = []
        makers: list[_Attempt] = []
        failed: list[tuple[_Attempt, str, S4Error | None]] = []
        for ticket in tickets:
            if ticket in self._outbox:
                self._recorded = 0.0  # tasks may be done by this, which a crash should not undo
                for attempt, error in self._outbox.arrived(ticket, self._services.server):
                    if error is None:
                        self._stored(attempt)
                    else:
                        failed.append((attempt, str(error), error))
                continue
            attempt = self._commands.pop(ticket)
            problem, error = self._ended(attempt)
            if problem:
                failed.append((attempt, problem, error))
            else:
                for output in attempt.outputs:
                    self._deliver(attempt, output, here, makers)
        failed += self._publish(here, makers)
        for attempt, problem, error in failed:
            self._fail(attempt, problem, error)

    def _ended(self, attempt: _Attempt) -> tuple[str, S4Error | None]:
        """Why the command of an attempt failed, empty if it ended well; and the error if it was not its own
        end."""
        assert attempt.ticket is not None
        try:
            ran = attempt.ticket.result()
        except S4Error as e:
            return str(e).removesuffix("; try again"), e
        assert isinstance(ran, Ran)
        attempt.ran = ran
        if ran.exitcode != 0:
            return exit_text(ran.exitcode), None
        if ran.problem:
            return ran.problem, None
        attempt.outputs = ran.outputs
        attempt.unsettled = len(ran.outputs)
        if not ran.outputs:
            self._finish(attempt)
        return "", None

    def _deliver(
        self, attempt: _Attempt, output: StoredFile, here: list[Finished], makers: list[_Attempt]
    ) -> None:
        path = attempt.target + output.name
        position = owner(path, len(self._services.conf.servers))
        if position == self._services.position:
            here.append(Finished(path, output, self.job.id, attempt.task.task))
            makers.append(attempt)
        else:
            self._outbox.add(position, Sending(path, output, attempt.task.task, attempt))

    def _publish(
        self, here: list[Finished], makers: list[_Attempt]
    ) -> list[tuple[_Attempt, str, S4Error | None]]:
        """Make keys of outputs; those that were refused, with the reason."""
        refused: list[tuple[_Attempt, str, S4Error | None]] = []
        following = iter(zip(here, makers, strict=True))

        def record(db: Transaction, outcome: Sequence[S4Error | None]) -> None:
            for error, (finished, attempt) in zip(outcome, following, strict=False):
                if error is None:
                    self._stored(attempt)
                else:
                    refused.append((attempt, str(error), error))
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(finished.file.file)
            self._services.job_index.change(db, self.job.id, self._changes)

        if not here:
            return refused
        before = list(self._changes), replace(self._counts)
        try:
            self._services.transfers.publish(here, record)
        except S4Error:
            # What was rolled back is not done; what failed before is still to be recorded.
            self._changes, self._counts = before
            raise
        self._changes.clear()
        return refused

    def _stored(self, attempt: _Attempt) -> None:
        attempt.unsettled -= 1
        if attempt.unsettled == 0 and attempt.failure is None:
            self._finish(attempt)

    def _finish(self, attempt: _Attempt) -> None:
        size = sum(output.size for output in attempt.outputs)
        self._counts.done += 1
        self._counts.bytes_in += attempt.task.bytes_in
        self._counts.bytes_out += size
        self._changes.append(self._change(attempt, DONE)._replace(bytes_out=size))

    def _change(self, attempt: _Attempt, state: str) -> TaskChange:
        """What is known of an attempt that was started."""
        ticket, ran = attempt.ticket, attempt.ran
        if ticket is None or ticket.pid is None:
            return TaskChange(attempt.task.task, state, attempt.number)
        change = TaskChange(
            attempt.task.task,
            state,
            attempt.number,
            ticket.pid,
            round(ticket.started_s, 6),
            inputs=attempt.task.inputs,
            bytes_in=attempt.task.bytes_in,
        )
        if ticket.done:
            change = change._replace(seconds=round(ticket.seconds, 6))
        if ran is None:
            return change
        return change._replace(
            cpu_seconds=round(ran.cpu_seconds, 6),
            peak_memory=ran.peak_memory,
            exit_code=ran.exitcode,
            signal=signal_of(ran.exitcode),
            stderr=ran.tail,
        )

    def _fail(self, attempt: _Attempt, problem: str, error: S4Error | None) -> None:
        """A try failed, or one of its outputs: again if tries are left, otherwise the task failed."""
        if isinstance(error, StoppingError):
            raise error
        if attempt.outputs:
            attempt.unsettled -= 1
        if attempt.failure is not None:  # another of its outputs has failed before
            return
        if self.job.kind == MAP_TO_N and self.job.skip_existing:  # what it made itself is removed or skipped
            advice = "remove it first, or, if another input made it, give inputs different NAMEs"
            problem = problem.replace(REMOVE_FIRST, f"it was not made from this input: {advice}")
        change = self._change(attempt, FAILED)._replace(error=problem)
        if attempt.ran is None and attempt.ticket is not None:  # it was killed
            change = change._replace(stderr=attempt.ticket.stderr)
            if isinstance(error, TimeLimitError):
                change = change._replace(signal=int(signal.SIGKILL))
        attempt.failure = change
        if attempt.outputs:
            attempt.unsettled -= self._outbox.drop(attempt)
        else:  # those that were handed on go one by one
            self._services.storage.discard(self._work_name(attempt))
        if attempt.tries_left > 0 and not isinstance(error, ConflictError):
            self._to_repeat.append(attempt)
        else:
            self._give_up(attempt, change, error)

    def _repeat(self) -> None:
        """Have tasks tried again that failed, once nothing of them is on its way any more."""
        settled = [attempt for attempt in self._to_repeat if not attempt.unsettled]
        half_made = [attempt for attempt in settled if self.job.kind == MAP_TO_N and attempt.outputs]
        tasks = [attempt.task for attempt in half_made]
        problem = None
        try:  # all at once, for a node that does not answer takes a minute
            self._inputs.outputs.remove([Maker(name_of(t.input), self.job.id, t.task) for t in tasks])
        except (CancelledError, StoppingError):
            raise
        except S4Error as e:
            problem = e
        for attempt in settled:
            self._to_repeat.remove(attempt)
            if problem is not None and attempt in half_made:
                assert attempt.failure is not None
                text = (
                    f"{attempt.failure.error}; not tried again, for its outputs cannot be removed: {problem}"
                )
                self._give_up(attempt, attempt.failure._replace(error=text), problem)
            else:
                self._ready.appendleft(_Attempt(attempt.task, attempt.number + 1, attempt.tries_left - 1))
        self._stop_at_failure()

    def _give_up(self, attempt: _Attempt, change: TaskChange, error: S4Error | None) -> None:
        """The task failed, because of `error` if it was not by the command's own end."""
        self._counts.failed += 1
        self._counts.bytes_in += attempt.task.bytes_in
        self._changes.append(change)
        if self.failure is None:
            kind = ConflictError if isinstance(error, ConflictError) else CommandError
            where = f"{url(attempt.task.input)} on {self._services.server}"
            said = change.stderr.decode("utf-8", "replace")
            self.failure = kind(with_said(f"{where}: {change.error}", said))

    def _record(self) -> None:
        """Write down, now and then, what is not yet recorded."""
        now = time.monotonic()
        if now < self._recorded + RECORD_SECONDS:
            return
        self._recorded = now
        for ticket, attempt in self._commands.items():
            if ticket.began_s and not attempt.noted:
                attempt.noted = True
                self._changes.append(self._change(attempt, RUNNING))
        if self._changes or now > self._reported + PROGRESS_SECONDS:
            self._reported = now
            self._services.job_index.progress(self.job.id, self._changes, self._counts)
            self._changes.clear()

    def _abandon(self, state: str) -> None:
        """Nothing of a share runs on, and nothing of it stays but the keys that it stored and its record."""
        reason = CancelledError("the job ended")
        running = dict(self._commands)
        tickets = [*running, *self._outbox.tickets]
        for ticket in tickets:
            self._services.pool.cancel(ticket, reason)
        for ticket in tickets:
            with contextlib.suppress(S4Error):
                ticket.result()
        for ticket, attempt in running.items():
            if not ticket.began_s:
                continue
            change = self._change(attempt, CANCELLED)._replace(stderr=ticket.stderr)
            if state == INTERRUPTED:
                change = change._replace(error=STOPPED)
            self._changes.append(change)
        for attempt in self._to_repeat:
            assert attempt.failure is not None
            self._changes.append(attempt.failure._replace(state=CANCELLED))
        self._services.storage.discard(self.job.id)
