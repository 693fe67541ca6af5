"""A node: index, storage and workers together, without HTTP. The only writer of its data folder.

Every key that it is asked for must be its own by placement, so that a caller with another conf is refused.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from s4.config import Conf
from s4.errors import BadRequestError, CancelledError, S4Error, WrongNodeError
from s4.index import Database, JobRow, KeyIndex, Records
from s4.index.keys import ListRow
from s4.jobs import Jobs
from s4.keys import new_job_id, owner, parse_key, parse_prefix, url
from s4.recovery import recover
from s4.storage import Storage
from s4.transfers import Gate, Transfers, wait_for_slot
from s4.workers import Kind, Pool, Ticket
from s4.workers.tasks import Command, Ran

WAITING_TRANSFERS = 16  # requests that may wait for a slot at once, or for bytes to arrive
WAITING_JOBS = 16  # that may wait for the end of a job
WAITING_REMOVALS = 4
WAITING_EVALS = 8  # that may wait for a slot, beyond those whose commands run

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")

log = logging.getLogger("s4.node")


@dataclass(frozen=True)
class Limits:
    """How much a node does at once: sends, receives (`io_jobs` each) and commands; seconds for a command."""

    io_jobs: int
    cpu_jobs: int
    timeout: float

    @property
    def waiting_requests(self) -> int:
        """How many requests may wait at once; a server needs more threads than that."""
        return WAITING_TRANSFERS + WAITING_JOBS + WAITING_REMOVALS + WAITING_EVALS + self.cpu_jobs


@dataclass(frozen=True)
class Evaluation:
    """How an eval ended. `stdout` and `stderr` are descriptors of unnamed files; the receiver closes them."""

    exitcode: int
    stdout: int
    stdout_size: int
    stderr: int
    stderr_size: int


class Node:
    """One node of the ring, at `position` in `conf`, on `address`, with its data in the folder `data`.

    Raises S4Error if the folder or the index cannot be used.
    """

    def __init__(self, conf: Conf, position: int, address: str, data: str, limits: Limits) -> None:
        self.conf = conf
        self.position = position
        self.limits = limits
        self.storage = Storage(data)
        self.database = Database(self.storage.index_path)
        self.keys = KeyIndex(self.database)
        self.records = Records(self.database)
        recover(self.storage, self.keys, self.records)
        slots = {Kind.SEND: limits.io_jobs, Kind.RECEIVE: limits.io_jobs, Kind.COMPUTE: limits.cpu_jobs}
        self.pool = Pool(slots, self.storage.run_folder)
        self.evals = Gate(limits.cpu_jobs + WAITING_EVALS)
        self.removals = Gate(WAITING_REMOVALS)
        self.waiting_jobs = Gate(WAITING_JOBS)
        self.transfers = Transfers(
            str(conf.servers[position]),
            address,
            self.keys,
            self.records,
            self.storage,
            self.pool,
            Gate(WAITING_TRANSFERS),
        )
        self.jobs = Jobs(
            conf,
            position,
            self.keys,
            self.records,
            self.storage,
            self.pool,
            self.transfers.publish,
            limits.cpu_jobs,
        )

    def own_key(self, text: str) -> str:
        """The path of a key that belongs here. Raises BadKeyError or WrongNodeError."""
        path = parse_key(text)
        wanted = owner(path, len(self.conf.servers))
        if wanted != self.position:
            here, there = self.conf.servers[self.position], self.conf.servers[wanted]
            raise WrongNodeError(f"{url(path)} belongs on {there}, not on {here}: compare the conf files")
        return path

    def list(self, prefix: str, *, recursive: bool) -> Iterator[list[ListRow]]:
        """The listing of a prefix, in chunks. A bucket without `/` and `recursive` is its own line."""
        path = parse_prefix(prefix)
        if recursive:
            return self.keys.list_keys(path)
        if "/" in path:
            return self.keys.list_folder(path)
        return iter([[row for row in self.keys.list_buckets() if not path or row.path == path]])

    def delete(self, prefix: str, *, recursive: bool) -> None:
        """Remove a key, or every key that starts with a prefix. Raises MissingError for a single one."""
        if recursive:
            path = parse_prefix(prefix)
            if not path:
                raise BadRequestError("name at least a bucket: rm -r s4://BUCKET/")
            with self.removals.waiting():
                self.keys.remove_prefix(path, self.storage.unlink)
        else:
            self.keys.remove(self.own_key(prefix), self.storage.unlink)

    def evaluate(
        self, key: str, command: str, job_id: str, timeout: float, abandoned: Callable[[], bool]
    ) -> Evaluation:
        """Run a command with a key's data as its input, for at most `timeout` seconds.

        `abandoned()` says whether the caller is gone; the command is ended then. Raises MissingError,
        BusyError, TimeLimitError.
        """
        path = self.own_key(key)
        self.keys.get(path)
        row = JobRow(self._job_id(job_id), "eval", url(path), "", checked_command(command))
        work = f"{row.id}.0"
        task = Command(
            row.command,
            self.storage.temporary_folder(work),
            self.storage.temporary_file(work),
            "eval",
            self.storage.real_path(path),
            [],
            {"filename": os.path.basename(path)},
        )
        with self.evals.waiting():
            ticket = self.pool.submit(Ticket(Kind.COMPUTE, task, time_limit=timeout, urgent=True))
            wait_for_slot(self.pool, ticket)
            try:
                self.records.job_began(row)
                ran = self._wait(ticket, abandoned)
            except BaseException as e:
                self.pool.cancel(ticket, S4Error("the eval failed"))
                with contextlib.suppress(S4Error):
                    ticket.result()
                self.storage.discard(row.id)
                self.records.job_ended(row.id, "failed", 1, 0, str(e))
                raise
        error = None if ran.exitcode == 0 else f"exit code {ran.exitcode}"
        self.records.job_ended(row.id, "failed" if error else "done", 1, 1, error)
        stdout, stderr = ran.outputs[0], ran.stderr
        assert stderr is not None
        with contextlib.ExitStack() as unlinked:
            unlinked.callback(os.unlink, stdout.file)
            unlinked.callback(os.unlink, stderr.file)
            return Evaluation(
                ran.exitcode,
                os.open(stdout.file, os.O_RDONLY | os.O_CLOEXEC),
                stdout.size,
                os.open(stderr.file, os.O_RDONLY | os.O_CLOEXEC),
                stderr.size,
            )

    def _wait(self, ticket: Ticket, abandoned: Callable[[], bool]) -> Ran:
        while True:
            try:
                answer = ticket.result(0.5)
            except TimeoutError:
                if abandoned():
                    self.pool.cancel(ticket, CancelledError("the caller went away"))
                continue
            assert isinstance(answer, Ran)
            return answer

    def run_job(self, kind: str, indir: str, outdir: str, command: str, job_id: str, timeout: float) -> int:
        """Run this node's share of a job to its end; returns its number of tasks. Raises S4Error."""
        row = JobRow(self._job_id(job_id), kind, indir, outdir, checked_command(command))
        with self.waiting_jobs.waiting():
            return self.jobs.start(row, timeout).wait()

    def _job_id(self, job_id: str) -> str:
        if not job_id:
            return new_job_id()
        if not _JOB_ID.fullmatch(job_id):
            raise BadRequestError(f"bad job id {job_id!r}: letters, digits and '-', at most 64")
        return job_id

    def keep_house(self) -> None:
        """What has to be done now and then; called about once a second."""
        self.transfers.expire()
        self.jobs.forget_finished(60)

    def stop(self) -> None:
        """End everything that is under way, in the order: jobs (they would start more), then workers."""
        self.jobs.stop()
        self.pool.stop()
        self.storage.empty_temporary()
        self.database.close()
        self.storage.close()


def checked_command(command: str) -> str:
    """A command as bash can take it. Raises BadRequestError for an empty one or one with NUL."""
    if not command.strip():
        raise BadRequestError("the command is empty")
    if "\0" in command:
        raise BadRequestError("the command holds a NUL character")
    return command
