"""A node: index, storage and workers together, without HTTP. The only writer of its data folder.

Every key that it is asked for must be its own by placement, so that a caller with another conf is refused.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from s4.config import Conf
from s4.errors import BadRequestError, BusyError, S4Error, WrongNodeError
from s4.evals import Evals
from s4.index import Database, JobIndex, JobRow, KeyIndex, KeyRow, Maker, ShareRow, Underway
from s4.index.keys import ListRow
from s4.index.query import run_query
from s4.jobs import STOP_SECONDS, Jobs, outcome, row_of
from s4.keys import is_key, owner, parse_folder, parse_key, parse_prefix, url
from s4.recovery import recover
from s4.services import Services
from s4.storage import Storage
from s4.transfers import Transfers
from s4.waiting import Gate
from s4.workers import Kind, Pool

WAITING_TRANSFERS = 32  # requests that may wait for a slot at once, or for bytes to arrive
WAITING_JOBS = 16  # that may wait for the end of a job
WAITING_REMOVALS = 4
WAITING_EVALS = 8  # that may wait for a slot, beyond those whose commands run
WAITING_QUERIES = 4  # SQL queries at once
WAITING_LISTINGS = 8  # long listings at once
LONGEST_WAIT = 30.0  # seconds that a request waits for the end of a job

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How much a node does at once: sends, receives (`io_jobs` each) and commands; seconds for a command;
    how many finished jobs it remembers, and for how many days, whichever is more."""

    io_jobs: int
    cpu_jobs: int
    timeout: float
    keep_jobs: int
    keep_days: float

    @property
    def waiting_requests(self) -> int:
        """How many requests may wait at once; a server needs more threads than that."""
        return (
            WAITING_TRANSFERS
            + WAITING_JOBS
            + WAITING_REMOVALS
            + WAITING_EVALS
            + WAITING_QUERIES
            + WAITING_LISTINGS
            + self.cpu_jobs
        )


class Node:
    """One node of the ring, at `position` in `conf`, on `address`, with its data in the folder `data`.

    Raises S4Error if the folder or the index cannot be used.
    """

    def __init__(self, conf: Conf, position: int, address: str, data: str, limits: Limits) -> None:
        self.conf = conf
        self.position = position
        self.limits = limits
        self.storage = Storage(data)
        _check_index(self.storage)
        self.database = Database(self.storage.index_path)
        self.keys = KeyIndex(self.database, self.storage.unlink)
        self.underway = Underway(self.database)
        self.job_index = JobIndex(self.database)
        self._lost_jobs = recover(self.storage, self.database)
        slots = {Kind.SEND: limits.io_jobs, Kind.RECEIVE: limits.io_jobs, Kind.COMPUTE: limits.cpu_jobs}
        self.pool = Pool(slots, self.storage.run_folder)
        self.removals = Gate(WAITING_REMOVALS)
        self.waiting_jobs = Gate(WAITING_JOBS)
        self.queries = Gate(WAITING_QUERIES)
        self.listings = Gate(WAITING_LISTINGS)
        self.transfers = Transfers(
            str(conf.servers[position]),
            address,
            self.keys,
            self.underway,
            self.storage,
            self.pool,
            Gate(WAITING_TRANSFERS),
        )
        self._services = Services(
            conf,
            position,
            self.keys,
            self.job_index,
            self.storage,
            self.pool,
            self.transfers,
            limits.cpu_jobs,
        )
        self.jobs = Jobs(self._services)
        self.evals = Evals(self._services, Gate(limits.cpu_jobs + WAITING_EVALS))

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
            return self._long(self.keys.list_keys(path))
        if "/" in path:
            return self._long(self.keys.list_folder(path))
        return iter([[row for row in self.keys.list_buckets() if not path or row.path == path]])

    def tasks(
        self, job_id: str, states: Sequence[str], *, stderr: bool
    ) -> Iterator[Sequence[dict[str, Any]]]:
        """The tasks of a share, those in one of `states` or all. Raises MissingError, BusyError."""
        return self._long(self.jobs.tasks(job_id, states, stderr=stderr))

    def _long(self, chunks: Iterator[T]) -> Iterator[T]:
        """What may take seconds to produce, as two chunks or more do: a few at once. Raises BusyError."""
        first = list(islice(chunks, 2))
        if len(first) < 2:
            yield from first
            return
        with self.listings.waiting():
            yield from first
            yield from chunks

    def delete(self, prefix: str, *, recursive: bool) -> None:
        """Remove a key, or every key that starts with a prefix. Raises MissingError for a single one."""
        if recursive:
            path = parse_prefix(prefix)
            if not path:
                raise BadRequestError("name at least a bucket: rm -r s4://BUCKET/")
            with self.removals.waiting():
                self.keys.remove_prefix(path)
        else:
            self.keys.remove(self.own_key(prefix))

    def makers(self, folder: str) -> dict[Maker, int]:
        """All that made keys here in folders of `folder`, and when. Raises BadRequestError, BusyError."""
        with self.listings.waiting():
            return self.keys.makers(parse_folder(folder))

    def remove_made(self, folder: str, makers: Sequence[Maker]) -> None:
        """Remove the keys here that tasks made, as `makers` tells them. Raises S4Error."""
        for maker in makers:
            parse_folder(f"{folder}{maker.folder}/")
        with self.removals.waiting():
            self.transfers.drop({(maker.job, maker.task) for maker in makers})
            self.keys.remove_made(parse_folder(folder), makers)

    def submit(self, job: JobRow, *, no_overlap: bool) -> ShareRow:
        """Start this node's share of a job and return at once how far it is. Raises S4Error."""
        return row_of(self.jobs.start(job, no_overlap=no_overlap))

    def run_job(self, job: JobRow, *, no_overlap: bool) -> int:
        """Run this node's share of a job to its end; returns its number of tasks. Raises S4Error."""
        with self.waiting_jobs.waiting():
            return outcome(self.jobs.start(job, no_overlap=no_overlap))

    def plan(self, job: JobRow) -> dict[str, Any]:
        """What this node's share of a job would be. Raises S4Error."""
        with self.waiting_jobs.waiting():
            return self.jobs.plan(job)

    def await_job(self, job_id: str, seconds: float) -> ShareRow:
        """A share once it has ended, or after so many seconds, or now if too many wait.

        Raises MissingError.
        """
        share = self.jobs.running(job_id)
        if seconds > 0 and (share is not None or self.evals.is_running(job_id)):
            seconds = min(seconds, LONGEST_WAIT)
            with contextlib.suppress(BusyError), self.waiting_jobs.waiting():
                if share is not None:
                    share.ended.wait(seconds)
                else:
                    self.evals.wait(job_id, seconds)
        return self.jobs.status(job_id)

    def cancel(self, job_id: str, run: int | None) -> ShareRow:
        """End a job or an eval here and everything it runs; its record afterwards. Raises MissingError."""
        self.evals.cancel(job_id)
        return self.await_job(job_id, STOP_SECONDS if self.jobs.cancel(job_id, run) else 0)

    def stat(self, key: str) -> tuple[KeyRow, str]:
        """A key's row and the path of its file. Raises MissingError."""
        path = self.own_key(key)
        return self.keys.get(path), self._services.locate(path)[0]

    def query(self, sql: str, limit: int) -> Iterator[Sequence[Any]]:
        """The names of the columns, then the rows of a query that only reads. Raises S4Error, also between
        rows."""
        with self.queries.waiting():
            yield from run_query(self.storage.index_path, sql, limit)

    def keep_house(self) -> None:
        """What has to be done now and then; called about once a second."""
        self.database.keep_reserve()
        self.keys.finish_removals()
        self.transfers.expire()
        self.jobs.keep_house()
        self._lost_jobs = [job for job in self._lost_jobs if not self.jobs.interrupt(job)]
        self.evals.keep_house()

    def prune(self) -> None:
        """Forget old jobs; called now and then, and may take its time."""
        self.jobs.prune(self.limits.keep_jobs, self.limits.keep_days * 24 * 3600)

    def stop(self) -> None:
        """End everything that is under way, in the order: jobs (they would start more), then workers."""
        with contextlib.ExitStack() as last:
            last.callback(self.storage.close)
            last.callback(self.database.close)
            self.jobs.stop()
            self.pool.stop()
            self.evals.wait_for_all()
            self.storage.empty_temporary()


def _check_index(storage: Storage) -> None:
    """Raises S4Error if files are there of which the index does not know: they would be written over."""
    if os.path.exists(storage.reindex_mark):
        raise S4Error(f"the last reindex of {storage.root} did not end: run 's4-server reindex' again")
    path = storage.index_path
    if not (os.path.exists(path) and os.path.getsize(path)) and any(map(is_key, storage.walk())):
        raise S4Error(
            f"{path} is missing or empty, but there are files: 's4-server reindex' makes keys of them again"
        )
