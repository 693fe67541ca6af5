"""Jobs over the whole cluster: submit, wait, cancel, retry, plan; a job is named by a beginning of its id."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from s4 import jobcalls
from s4.asking import SILENCE_SECONDS, at_once, check_all_reachable, down, each
from s4.config import MAX_TIMEOUT, TIMEOUT_NEEDED
from s4.errors import (
    EXIT_FAILED,
    EXIT_UNREACHABLE,
    BadRequestError,
    ConflictError,
    MissingError,
    MisuseError,
    OverlapError,
    S4Error,
    UnreachableError,
    reason_of,
)
from s4.following import Follower, Watch, failures_of
from s4.keys import check_job_folders, new_job_id, with_scheme
from s4.record import asdict, record, replace
from s4.report import counts, ending, failure_lines
from s4.states import DONE, EVAL, LOST, RUNNING, UNKNOWN
from s4.summary import (
    JobSummary,
    PlanPart,
    ShareStatus,
    Task,
    lost_part,
    merged,
    missing_part,
    newest,
    part_of,
    state_of,
    summarize,
)

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from s4.client import Client

MAX_RETRIES = 1000
MAX_LIMIT = 1_000_000
CANDIDATES = 10  # so many ids are named if the beginning of one is ambiguous
CANCEL_SILENCE_SECONDS = 2.0  # for a node to tell of the job that is to be cancelled
_ID = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-")


class JobError(S4Error):
    """A job did not end well. `summary` tells how it ended, `failures` are lines that name what failed.

    The exit code is 3 if a node could not be reached.
    """

    def __init__(self, summary: JobSummary, text: str, failures: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.summary = summary
        self.failures = list(failures)
        self.exit_code = EXIT_UNREACHABLE if summary.unreachable else EXIT_FAILED


class JobInterrupt(KeyboardInterrupt):
    """A Ctrl-C that has cancelled a job. `summary` tells how it ended, None if no node had begun it."""

    def __init__(self, text: str, summary: JobSummary | None) -> None:
        super().__init__(text)
        self.summary = summary


@record
class Request:
    """A job to be submitted. `timeout` in seconds, for each command."""

    kind: str
    indir: str
    outdir: str
    cmd: str
    timeout: float
    retries: int = 0
    keep_going: bool = False
    skip_existing: bool = False
    no_overlap: bool = False

    def check(self) -> None:
        """Raises what a node would refuse, before anything is asked: MisuseError, BadRequestError."""
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise MisuseError(f"--timeout {self.timeout:g}: {TIMEOUT_NEEDED}")
        if not 0 <= self.retries <= MAX_RETRIES:
            raise MisuseError(f"--retries {self.retries}: it must be from 0 to {MAX_RETRIES}")
        for folder in (self.indir, self.outdir):
            with_scheme(folder)
        check_job_folders(self.indir, self.outdir)

    def same_work(self, share: ShareStatus) -> bool:
        """Whether a share belongs to a job that does the same work."""
        return (self.kind, self.indir, self.outdir, self.cmd) == (
            share.kind,
            share.indir,
            share.outdir,
            share.command,
        )


@record
class Found:
    """A job by its id: the share of each server, None where there is none, and the servers that are down.

    An eval, and what was submitted without an id, has a share on one server only.
    """

    job: str
    shares: dict[str, ShareStatus | None]
    down: dict[str, UnreachableError]

    @property
    def share(self) -> ShareStatus:
        """Any share of it, of the newest run."""
        return newest(self.shares.values())

    def summary(self) -> JobSummary:
        """The job as it is now; a node that is down, or has no share although it should, is part of it. The
        state is that of the others then, but UNKNOWN if they are done: it may be done there, too."""
        parts = []
        for server, share in self.shares.items():
            if share is not None:
                parts.append(part_of(share))
            elif server in self.down:
                reason = reason_of(self.down[server], server)
                parts.append(lost_part(server, reason, None))
            else:
                parts.append(missing_part(server))
        summary = summarize(self.share, parts)
        if summary.unreachable:
            state = state_of(part.state for part in parts if part.state != LOST)
            summary = replace(summary, state=UNKNOWN if state == DONE else state)
        return summary


def run(client: Client, request: Request, watch: Watch | None) -> JobSummary:
    """Submit a job and follow it to its end. Raises JobError if it does not end well.

    A Ctrl-C cancels it on all nodes (JobInterrupt); a second one leaves at once.
    """
    watch = watch or Watch()
    _prepare(client, request)
    job, began = new_job_id(), time.monotonic()
    with _Cancelling(client, job, watch):
        summary = Follower(client, _submit(client, request, job), watch, began).wait()
    return _ended_well(summary)


def start(client: Client, request: Request) -> str:
    """Submit a job and return its id."""
    _prepare(client, request)
    job = new_job_id()
    with _Cancelling(client, job, Watch()):
        _submit(client, request, job)
    return job


def _prepare(client: Client, request: Request) -> None:
    """Raises what speaks against a job before any node has begun it."""
    request.check()
    check_all_reachable(client)
    twin = _twin(client, request) if request.no_overlap else None
    if twin is not None:
        work = f"{request.kind} of {request.indir}"
        raise OverlapError(f"job {twin} is still running: {work}; nothing was started", twin)


def _submit(client: Client, request: Request, job: str) -> dict[str, ShareStatus]:
    """Start a job on all nodes or on none."""
    body = {**asdict(request), "job": job, "detach": True}
    path = "/" + body.pop("kind").replace("-", "_")

    def post(server: str) -> ShareStatus:
        return jobcalls.submit(client, server, path, body)

    # Of two that submit the same at once, the first server lets one through.
    servers, first = client.servers(), 1 if request.no_overlap else 0
    return _all_or_none(client, job, None, post, [servers[:first], servers[first:]])


def _twin(client: Client, request: Request) -> str | None:
    """The id of a job that runs and does the same work."""
    for shares in at_once(lambda server: jobcalls.shares(client, server, state=RUNNING), client.servers()):
        for share in shares:
            if request.same_work(share):
                return share.id
    return None


def _all_or_none(
    client: Client, job: str, run: int | None, post: Callable[[str], ShareStatus], rounds: Sequence[list[str]]
) -> dict[str, ShareStatus]:
    """Post to all servers, round by round; if one refuses, what started is cancelled and its error raised,
    which then also names those that could not be told."""
    shares: dict[str, ShareStatus] = {}
    untold: list[str] = []

    def stop() -> None:
        untold.extend(_cancel_everywhere(client, job, run).down)

    try:
        for servers in rounds:
            shares |= zip(servers, at_once(post, servers, on_failure=stop), strict=True)
    except S4Error as e:
        if untold:
            names = ", ".join(untold)
            e.args = (f"{e}; job {job} is cancelled, perhaps not on {names}; later: s4 cancel {job}",)
        raise
    return shares


class _Cancelling:
    """For a `with`: has a Ctrl-C cancel a job before it goes on its way. (A class as in asking.py.)"""

    def __init__(self, client: Client, job: str, watch: Watch, run: int | None = None) -> None:
        self._client = client
        self._job = job
        self._watch = watch
        self._run = run

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, e: BaseException | None, _traceback: object) -> None:
        if isinstance(e, KeyboardInterrupt):
            self._watch.cancelling(self._job)
            found = _cancel_everywhere(self._client, self._job, self._run)
            said, summary = f"job {self._job} is cancelled", None
            if any(found.shares.values()):
                summary = found.summary()
                summary = replace(summary, failures=failures_of(self._client, summary))
                said += f": {counts(summary)}"
            if found.down:
                reasons = "; ".join(map(str, found.down.values()))
                said += f"; perhaps not everywhere: {reasons}; later: s4 cancel {self._job}"
            raise JobInterrupt(said, summary) from None


def _cancel_everywhere(client: Client, job: str, run: int | None) -> Found:
    """Cancel a job on all nodes that can be told, and wait for that; the job as it is then."""
    known: dict[str, ShareStatus] = {}
    untold: dict[str, UnreachableError] = {}

    def attempt(server: str) -> None:
        try:
            share = jobcalls.cancel(client, server, job, run)
        except UnreachableError as e:
            untold[server] = e
        except S4Error as e:
            untold[server] = UnreachableError(server, reason_of(e, server))
        else:
            if share is not None:
                known[server] = share

    at_once(attempt, client.servers())
    return _found(client, job, known, untold)


def _ended_well(summary: JobSummary) -> JobSummary:
    if summary.is_empty:
        raise JobError(summary, f"nothing to map: no keys in {summary.indir}")
    if summary.state != DONE:
        raise JobError(summary, ending(summary), failure_lines(summary))
    return summary


def wait(client: Client, prefix: str, watch: Watch | None) -> JobSummary:
    """Follow a job that runs to its end. Raises JobError if it does not end well."""
    found = find(client, prefix)
    try:
        summary = Follower(client, found.shares, watch or Watch()).wait()
        return _ended_well(summary)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"job {found.job} goes on; s4 wait {found.job}") from None


def cancel(client: Client, prefix: str) -> tuple[JobSummary, bool]:
    """End a job everywhere. Returns it as it is then, and whether it had ended before.

    Raises UnreachableError, after the others have ended it, if a node that may run it is down.
    """
    # Others wait to be told while a node is silent.
    found = find(client, prefix, CANCEL_SILENCE_SECONDS)
    ran = found.summary().state == RUNNING
    untold = {server: error for server, error in found.down.items() if server in found.shares}
    if ran or untold:
        answers = each(lambda server: jobcalls.cancel(client, server, found.job), list(found.shares))
        untold = {
            server: answer for server, answer in answers.items() if isinstance(answer, UnreachableError)
        }
        found.shares.update(
            (server, answer) for server, answer in answers.items() if not isinstance(answer, UnreachableError)
        )
    if untold:
        error = down(list(untold.values()))
        reason = reason_of(error, error.server)
        told = "; the others have ended the job" if ran and len(untold) < len(found.shares) else ""
        raise UnreachableError(error.server, f"{reason}{told}; later: s4 cancel {found.job}")
    found.down.clear()
    return found.summary(), not ran


def retry(client: Client, prefix: str, watch: Watch | None, *, detach: bool = False) -> JobSummary | None:
    """Run again what failed, was cancelled or was lost, and follow it; None if there is nothing to do.

    With `detach` it is not followed, and the summary is that of its beginning. Raises JobError like `run`,
    ConflictError while it runs, or another job that does the same.
    """
    watch = watch or Watch()
    check_all_reachable(client)
    found = find(client, prefix)
    if found.down:
        raise down(list(found.down.values()))
    share = found.share
    if share.kind == EVAL:
        raise BadRequestError(f"job {found.job} is an eval: run it again with s4 eval")
    summary = found.summary()
    if summary.is_empty:
        raise JobError(summary, f"job {found.job} found nothing to map: start it again")
    if summary.state == RUNNING:
        raise ConflictError(
            f"job {found.job} is still running: s4 wait {found.job}, or s4 cancel {found.job}"
        )
    if summary.state == DONE:
        return None
    again, began = share.run + 1, time.monotonic()
    request = Request(
        share.kind,
        share.indir,
        share.outdir,
        share.command,
        share.timeout,
        share.retries,
        share.keep_going,
        share.skip_existing,
    )
    twin = _twin(client, request)
    if twin is not None:  # each would find outputs of the other in its way
        raise ConflictError(
            f"job {twin}, which does the same, is still running: s4 wait {twin}, then try again"
        )
    body = {**asdict(request), "job": share.id, "run": again}
    with _Cancelling(client, found.job, watch, again):

        def post(server: str) -> ShareStatus:
            return jobcalls.submit(client, server, "/retry", body)

        shares = _all_or_none(client, found.job, again, post, [list(found.shares)])
        if detach:
            return Found(found.job, {**shares}, {}).summary()
        summary = Follower(client, shares, watch, began).wait()
    return _ended_well(summary)


def find(client: Client, prefix: str, silence: float = SILENCE_SECONDS) -> Found:
    """The one job whose id starts with `prefix`. Raises S4Error if there is none, or more than one. A node
    that is silent for `silence` seconds is down."""
    if not prefix:
        raise MisuseError("the id of a job is empty")
    if len(prefix) > 64 or not _ID.issuperset(prefix):
        raise MissingError(f"no job {prefix!r}; s4 jobs lists them")
    parameters = {"prefix": prefix, "limit": str(CANDIDATES + 1)}
    answers = each(lambda server: jobcalls.shares(client, server, silence, **parameters), client.servers())
    unreachable = {node: answer for node, answer in answers.items() if isinstance(answer, UnreachableError)}
    by_id: dict[str, dict[str, ShareStatus]] = {}
    for server, shares in answers.items():
        for share in shares if isinstance(shares, list) else []:
            by_id.setdefault(share.id, {})[server] = share
    if prefix in by_id:
        by_id = {prefix: by_id[prefix]}
    if not by_id:
        if unreachable:
            raise down(list(unreachable.values()))
        raise MissingError(f"no job {prefix!r}; s4 jobs lists them")
    if len(by_id) > 1:
        ids = sorted(by_id, reverse=True)
        more = ", …" if len(ids) > CANDIDATES else ""
        raise BadRequestError(f"job {prefix!r} is ambiguous: {', '.join(ids[:CANDIDATES])}{more}")
    [(job, known)] = by_id.items()
    return _found(client, job, known, unreachable)


def _found(
    client: Client, job: str, known: dict[str, ShareStatus], unreachable: dict[str, UnreachableError]
) -> Found:
    """A job by what its servers told of it, and why others told nothing."""
    alone = any(share.alone for share in known.values())
    return Found(job, {s: known.get(s) for s in (known if alone else client.servers())}, unreachable)


def jobs(client: Client, limit: int) -> Iterator[JobSummary]:
    """The newest jobs of the cluster; raises UnreachableError after them if a node is down."""
    check_limit(limit)
    answers = each(lambda server: jobcalls.shares(client, server, limit=str(limit)), client.servers())
    listed = {node: answer for node, answer in answers.items() if isinstance(answer, list)}
    chosen = dict.fromkeys(job.job for job in merged(listed, complete=True)[:limit])
    alone = {share.id for shares in listed.values() for share in shares if share.alone}

    def whole(server: str) -> list[ShareStatus]:
        """What a server has of the chosen jobs, also of those that its own newest do not reach back to."""
        found = listed[server]
        known = {share.id for share in found}
        for job in chosen if len(found) == limit else ():
            if job not in known and job not in alone:
                found += [s for s in jobcalls.shares(client, server, prefix=job) if s.id == job]
        return found

    answers |= each(whole, list(listed))
    shares = {node: answer for node, answer in answers.items() if isinstance(answer, list)}
    unreachable = [answer for answer in answers.values() if isinstance(answer, UnreachableError)]
    yield from (job for job in merged(shares, complete=not unreachable) if job.job in chosen)
    if unreachable:
        raise down(unreachable)


def tasks(client: Client, prefix: str, *, state: str = "", stderr: bool = False) -> Iterator[Task]:
    """The tasks of a job in their order, as they come; raises UnreachableError after them for a node down."""
    from heapq import merge
    from itertools import chain, islice

    found = find(client, prefix)

    def begun(server: str) -> Iterator[Task]:
        stream = jobcalls.tasks_of(client, server, found.job, state=state, stderr=stderr)
        return chain(list(islice(stream, 1)), stream)

    # All are asked before the answers are read.
    streams = at_once(begun, [server for server, share in found.shares.items() if share is not None])
    yield from merge(*streams, key=lambda task: task.task)
    if any(server in found.down for server in found.shares):
        raise down(list(found.down.values()))


def plan(client: Client, request: Request) -> list[PlanPart]:
    """What each node would have to do."""
    request.check()
    body = {name: getattr(request, name) for name in ("kind", "cmd", "indir", "outdir", "skip_existing")}
    return at_once(lambda server: jobcalls.plan(client, server, body), client.servers())


def check_limit(limit: int) -> None:
    """Raises MisuseError for a number of rows that makes no sense."""
    if not 1 <= limit <= MAX_LIMIT:
        raise MisuseError(f"--limit {limit}: it must be from 1 to {MAX_LIMIT}")
