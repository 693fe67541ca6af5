"""The jobs of one node: submitted, followed, cancelled, run again. What runs is a Share.

A job is submitted to every node under one id. A node that fails its share tells the others, so that a job
stops everywhere even when nobody follows it.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from s4.errors import (
    BusyError,
    CancelledError,
    CommandError,
    ConflictError,
    MissingError,
    NonsenseError,
    OverlapError,
    S4Error,
    StoppingError,
)
from s4.http import Caller
from s4.index import HalfMade, JobRow, ShareRow
from s4.inputs import Inputs
from s4.keys import parse_folder
from s4.leanjson import read_answer
from s4.outputs import Outputs
from s4.services import Services
from s4.shares import Share
from s4.states import DONE, FAILED, MAP_TO_N, RUNNING

MAX_RUNNING = 200  # shares at once; each has a thread
CANCELLED_SECONDS = 3600.0  # how long a cancelled job that never began here is remembered
STOP_SECONDS = 10.0  # for a cancelled share to end
NODE_STOP_SECONDS = 2.0  # for all of them, when the node stops: what comes after that has to be done, too
ASK_SECONDS = 5.0  # for another node to answer

log = logging.getLogger("s4.job")


class Jobs:
    """The jobs of this node."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._running: dict[str, Share] = {}
        self._cancelled: dict[str, tuple[int, float]] = {}  # before they began: run, and when (monotonic)
        self._lock = threading.Lock()

    def start(self, job: JobRow, *, no_overlap: bool = False) -> Share | ShareRow:
        """Start this node's share of a job, or find it: the same id twice is one job.

        Returns the share that runs, or the record of one that has ended. Raises BadRequestError,
        ConflictError if the id is taken by other work, OverlapError if `no_overlap` and a twin runs,
        BusyError. A share that was cancelled before it came is recorded as such.
        """
        share = Share(self._services, job)
        with self._lock:
            known = self._known(job)
            if known is not None:
                return known
            if no_overlap:
                self._check_overlap(job)
            self._check_room()
            self._services.job_index.begin(job)
            return self._start(share)

    def _known(self, job: JobRow) -> Share | ShareRow | None:
        try:
            known = self._running.get(job.id) or self._services.job_index.share(job.id)
        except MissingError:
            return None
        if not known.job.same_work(job):
            raise ConflictError(f"the id {job.id} belongs to another job: submit with a new id")
        return known

    def _check_overlap(self, job: JobRow) -> None:
        for share in self._running.values():
            if share.job.same_work(job) and not share.ended.is_set():
                where = self._services.server
                raise OverlapError(f"job {share.job.id} is still running on {where}; nothing was started")

    def _check_room(self) -> None:
        if len(self._running) >= MAX_RUNNING:
            raise BusyError(f"{MAX_RUNNING} jobs are running here; try again later")

    def _start(self, share: Share) -> Share:
        self._running[share.job.id] = share
        run, _when = self._cancelled.get(share.job.id, (0, 0.0))
        if run >= share.job.run:
            share.cancel(CancelledError(f"job {share.job.id} was cancelled"))
        try:
            share.start(self._ended)
        except RuntimeError as e:  # the system gives no further thread
            del self._running[share.job.id]
            error = f"job {share.job.id} cannot be started on {self._services.server}: {e}"
            self._services.job_index.end(share.job.id, FAILED, error)
            raise S4Error(error) from e
        return share

    def retry(self, job: JobRow) -> Share | ShareRow:
        """Run again what failed, was cancelled or was lost, as run `job.run`; all if it never began here.

        Raises ConflictError while the share still runs, or if it is other work.
        """
        with self._lock:
            known = self._known(job)
            if isinstance(known, Share):
                if known.job.run == job.run:
                    return known
                how = (
                    "its last run is not yet recorded: try again later"
                    if known.ended.is_set()
                    else "still running: wait or cancel it"
                )
                raise ConflictError(f"job {job.id} on {self._services.server}: {how}")
            if known is not None and known.job.run >= job.run:
                return known
            if known is not None and known.state == DONE:
                self._services.job_index.pass_over(job.id, job.run)
                return self._services.job_index.share(job.id)
            self._check_room()
            if known is None:
                share = Share(self._services, job)
                self._services.job_index.begin(job)
            else:
                self._services.job_index.begin_again(job.id, job.run)
                share = Share(self._services, self._services.job_index.share(job.id).job, again=True)
            return self._start(share)

    def _ended(self, share: Share) -> None:
        if share.end_recorded:  # otherwise memory knows better, until that succeeds or to the next start
            with self._lock:
                del self._running[share.job.id]
        if share.state == FAILED and not share.job.keep_going:
            threading.Thread(target=self._cancel_elsewhere, args=(share.job,), daemon=True).start()

    def _cancel_elsewhere(self, job: JobRow) -> None:
        for server in self._others():
            try:
                with Caller(server, self._services.conf.fingerprint, ASK_SECONDS) as caller:
                    caller.call("POST", "/cancel", {"job": job.id, "run": str(job.run)})
            except MissingError:  # it has not begun there, and never will now
                pass
            except S4Error as e:
                log.warning("job %s: its failure is not told: %s", job.id, e)

    def cancel(self, job_id: str, run: int | None) -> bool:
        """Have a share end, up to the run `run`, and everything it runs; whether it will, for it runs.

        Raises MissingError if there is no such job here; it will not begin later either.
        """
        with self._lock:
            share = self._running.get(job_id)
            if share is None:
                try:
                    ended = self._services.job_index.share(job_id)
                except MissingError as e:
                    self._cancelled[job_id] = (run or 1, time.monotonic())
                    raise MissingError(f"{e}; it will not start here any more") from None
                if run is not None and run > ended.job.run:  # a retry of which we do not know yet
                    self._cancelled[job_id] = (run, time.monotonic())
                return False
        if run is not None and run < share.job.run:
            return False
        share.cancel(CancelledError(f"job {job_id} was cancelled"))
        return True

    def running(self, job_id: str) -> Share | None:
        """The share of a job if it runs."""
        return self._running.get(job_id)

    def status(self, job_id: str) -> ShareRow:
        """How far a share is, or how it ended. Raises MissingError."""
        share = self._running.get(job_id)
        return self._services.job_index.share(job_id) if share is None else share.row()

    def newest(self, prefix: str, limit: int, *, running: bool) -> list[ShareRow]:
        """The newest shares whose id starts with `prefix`; of those that run all, if `running`."""
        if running:
            rows = [share.row() for share in list(self._running.values()) if share.job.id.startswith(prefix)]
            return [row for row in rows if row.state == RUNNING]  # others ended, which cannot be recorded yet
        rows = self._services.job_index.shares(prefix, limit)
        return [self.status(row.job.id) if row.state == RUNNING else row for row in rows]

    def plan(self, job: JobRow) -> dict[str, Any]:
        """What this node's share of a job would be; runs nothing. Sizes in bytes."""
        services = self._services
        inputs = Inputs(job, services.conf, services.position, services.keys, services.job_index)
        tasks = keys = size = largest = existing = 0
        for found in inputs.all():
            tasks += 1
            keys += found.keys
            size += found.size
            largest = max(largest, found.size)
            try:
                existing += inputs.exists(found.path)
            except ConflictError:
                if job.skip_existing:  # only who would skip it needs to know whether it is whole
                    raise
                existing += 1
        disk = os.statvfs(services.storage.root)
        return {
            "tasks": tasks,
            "keys": keys,
            "bytes": size,
            "largest_bytes": largest,
            "existing": existing,
            "disk_free": disk.f_bavail * disk.f_frsize,
            "disk_total": disk.f_blocks * disk.f_frsize,
        }

    def tasks(self, job_id: str, states: Sequence[str], *, stderr: bool) -> Iterator[list[dict[str, Any]]]:
        """The tasks of a share, in chunks. Raises MissingError."""
        self._services.job_index.share(job_id)
        return self._services.job_index.tasks(job_id, states, stderr=stderr)

    def prune(self, keep_jobs: int, keep_seconds: float) -> None:
        """Forget old jobs, of which JobIndex.old tells, but none that may still run on another node."""
        index = self._services.job_index
        old = index.old(keep_jobs, keep_seconds, alone=False)
        try:
            running = self._running_elsewhere() if old else set()
        except S4Error as e:  # as long as a node is down no new jobs come
            log.info("%d old jobs are not forgotten yet: %s", len(old), e)
            old, running = [], set()
        for job_id, run in index.old(keep_jobs, keep_seconds, alone=True) + old:
            if job_id in running:
                continue
            share = index.share(job_id)
            outdir = None
            half_made: list[HalfMade] = []
            if share.job.kind == MAP_TO_N and share.state != DONE:
                try:
                    outdir = parse_folder(share.job.outdir)
                    half_made = self._half_made(job_id, outdir)
                except S4Error as e:
                    log.info("job %s is not forgotten yet: %s", job_id, e)
                    continue
            with self._lock:  # no retry begins meanwhile
                index.forget(job_id, run, outdir, half_made)

    def _half_made(self, job_id: str, outdir: str) -> list[HalfMade]:
        """What tasks of this node, of a shuffle that is to be forgotten or was before, made in `outdir`
        without ending well. Raises NodeError."""
        services = self._services
        index = services.job_index
        made = Outputs(services.conf, services.position, services.keys, outdir).own_makers()
        earlier = [row for row in index.half_made(outdir) if row.job != job_id]
        found = [row for row in earlier if (row.job, row.task) in made]
        for task in sorted(task for job, task in made if job == job_id):
            known = index.made_from(job_id, task)
            if known is not None and known[1] != DONE:
                found.append(HalfMade(job_id, task, known[0], outdir))
        return found

    def _running_elsewhere(self) -> set[str]:
        """The ids of the jobs that run on other nodes. Raises S4Error if one does not tell."""
        found: set[str] = set()
        for server in self._others():
            with Caller(server, self._services.conf.fingerprint, ASK_SECONDS) as caller:
                answer = caller.call("GET", "/jobs", {"state": RUNNING})
            try:
                found |= {share["id"] for share in read_answer(server, answer, list)}
            except (TypeError, KeyError):
                raise NonsenseError(server) from None
        return found

    def _others(self) -> list[str]:
        """The other nodes."""
        services = self._services
        return [str(server) for i, server in enumerate(services.conf.servers) if i != services.position]

    def stop(self) -> None:
        """End all shares; they count as interrupted."""
        shares = list(self._running.values())
        for share in shares:
            share.cancel(StoppingError())
        until = time.monotonic() + NODE_STOP_SECONDS
        for share in shares:
            share.ended.wait(max(0.0, until - time.monotonic()))

    def interrupt(self, job_id: str) -> bool:
        """Record that a share that ran when the node stopped is lost, unless it runs again or has done so;
        False if that is to be tried again, as on a full disk."""
        with self._lock:  # it does not begin again meanwhile
            try:
                if job_id not in self._running and job_id in self._services.job_index.running():
                    self._services.job_index.interrupt(job_id)
            except S4Error:
                return False
        return True

    def keep_house(self) -> None:
        """Record ends that could not be recorded, as on a full disk, and drop what is remembered of cancelled
        jobs that never began."""
        for share in list(self._running.values()):
            if share.ended.is_set() and not share.end_recorded:
                try:
                    share.record_end(share.state)
                except S4Error:
                    continue
                with self._lock:
                    self._running.pop(share.job.id, None)
        limit = time.monotonic() - CANCELLED_SECONDS
        with self._lock:
            self._cancelled = {
                job: (run, when) for job, (run, when) in self._cancelled.items() if when > limit
            }


def outcome(share: Share | ShareRow) -> int:
    """Wait for the end of a share; its number of tasks. Raises the S4Error that ended it."""
    if isinstance(share, Share):
        share.ended.wait()
        if share.failure is not None:
            raise share.failure
        return share.row().counts.tasks
    if share.state != DONE:
        raise CommandError(share.error or f"job {share.job.id} {share.state}")
    return share.counts.tasks


def row_of(share: Share | ShareRow) -> ShareRow:
    """The record of a share, or what it would be now."""
    return share.row() if isinstance(share, Share) else share
