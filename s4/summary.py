"""What nodes tell of a job, parsed: shares and tasks; and the summary of a job over all nodes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from s4.errors import NonsenseError
from s4.record import record, replace
from s4.states import CANCELLED, DONE, FAILED, INTERRUPTED, LOST, MISSING, RUNNING, UNKNOWN

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from typing import Any, Self


class _Answer:
    """What a node answers as a JSON object. `read` takes the fields that are known here."""

    @classmethod
    def read(cls, node: str, value: Any) -> Self:
        """Raises NodeError if the answer is no such object."""
        try:
            given = {name: value[name] for name in cls.__annotations__ if name != "node"}
        except (TypeError, KeyError, IndexError):
            raise NonsenseError(node) from None
        return cls(**{"node": node, **given})


@record
class ShareStatus(_Answer):
    """A node's part of a job, as the node tells it.

    `tasks` is None until the inputs are listed. Times are seconds since 1970, bytes those of ended tasks.
    """

    node: str
    id: str
    run: int
    kind: str
    indir: str
    outdir: str
    command: str
    state: str
    tasks: int | None
    done: int
    failed: int
    cancelled: int
    skipped: int
    running: int
    bytes_in: int
    bytes_out: int
    started_s: float
    finished_s: float | None
    error: str | None
    timeout: float
    retries: int
    keep_going: bool
    skip_existing: bool
    alone: bool

    @classmethod
    def read(cls, node: str, value: Any) -> Self:
        """Raises NodeError if the answer is no share, or in a state that there is not."""
        share = super().read(node, value)
        if share.state not in (RUNNING, DONE, FAILED, CANCELLED, INTERRUPTED):
            raise NonsenseError(node)
        return share


def newest(shares: Iterable[ShareStatus | None]) -> ShareStatus:
    """One of the shares of a job, of which there is at least one, in its newest run."""
    return max((share for share in shares if share is not None), key=lambda share: share.run)


@record
class Task(_Answer):
    """One input of a job, and what became of it.

    `input` is a key, of a group its first; `inputs` says how many there are. `stderr` is None if it was not
    asked for.
    """

    node: str
    task: int
    input: str
    inputs: int
    state: str
    attempt: int
    pid: int | None
    started_s: float | None
    seconds: float | None
    cpu_seconds: float | None
    peak_memory: int | None
    bytes_in: int | None
    bytes_out: int | None
    exit_code: int | None
    signal: int | None
    error: str | None
    stderr: str | None

    @classmethod
    def read(cls, node: str, value: Any) -> Self:
        """Raises NodeError if the answer is no task."""
        return super().read(node, {"stderr": None, **value} if isinstance(value, dict) else value)


@record
class PlanPart(_Answer):
    """What a job would have to do on one node. `existing` tasks have an output already; sizes are bytes."""

    node: str
    tasks: int
    keys: int
    bytes: int
    largest_bytes: int
    existing: int
    disk_free: int
    disk_total: int


@record
class Part:
    """A node's part of a job, as a summary shows it: also of a node that is down.

    `lost` tasks are those that did not end because the node went down, None if their number is not known.
    """

    node: str
    state: str
    tasks: int | None
    done: int = 0
    failed: int = 0
    skipped: int = 0
    cancelled: int = 0
    running: int = 0
    lost: int | None = 0
    bytes_in: int = 0
    bytes_out: int = 0
    started_s: float | None = None
    finished_s: float | None = None
    error: str | None = None
    run: int = 1


@record
class JobSummary:
    """A job over all nodes: how far it is, or how it ended.

    `tasks` is None until all nodes have listed their inputs. `failures` are tasks that failed, with the end
    of what they wrote to stderr; they are known when a job is over.
    """

    job: str
    run: int
    kind: str
    indir: str
    outdir: str
    command: str
    state: str
    tasks: int | None
    done: int
    failed: int
    skipped: int
    cancelled: int
    lost: int
    bytes_in: int
    bytes_out: int
    started_s: float
    seconds: float
    nodes: Sequence[Part]
    failures: Sequence[Task] = ()

    @property
    def ended(self) -> int:
        """How many tasks are over."""
        return self.done + self.failed + self.skipped + self.cancelled

    @property
    def is_empty(self) -> bool:
        """Whether it found nothing to map, and was not to pass over that: it has failed then."""
        return self.state == FAILED and self.tasks == 0

    @property
    def unreachable(self) -> list[Part]:
        """The parts of nodes that are down."""
        return [part for part in self.nodes if part.state == LOST]


def state_of(states: Iterable[str]) -> str:
    """The state of a job from those of its parts."""
    found = {INTERRUPTED if state == LOST else state for state in states}
    for state in (RUNNING, INTERRUPTED, FAILED, CANCELLED):
        if state in found:
            return state
    return INTERRUPTED if MISSING in found else DONE


def part_of(share: ShareStatus) -> Part:
    """A share as a summary shows it. What a node lost when it stopped counts as lost, not as cancelled."""
    lost: int | None = 0
    if share.state == INTERRUPTED:
        lost = _unfinished(share)
    return Part(
        share.node,
        share.state,
        share.tasks,
        done=share.done,
        failed=share.failed,
        skipped=share.skipped,
        cancelled=share.cancelled if share.state != INTERRUPTED else 0,
        running=share.running,
        lost=lost,
        bytes_in=share.bytes_in,
        bytes_out=share.bytes_out,
        started_s=share.started_s,
        finished_s=share.finished_s,
        error=share.error,
        run=share.run,
    )


def lost_part(node: str, reason: str, last: ShareStatus | None, state: str = LOST) -> Part:
    """The part of a node that is down, with what it told last, or that does not know the job."""
    if last is None:
        return Part(node, state, None, lost=None, error=reason)
    return Part(
        node,
        state,
        last.tasks,
        done=last.done,
        failed=last.failed,
        skipped=last.skipped,
        lost=_unfinished(last),
        bytes_in=last.bytes_in,
        bytes_out=last.bytes_out,
        started_s=last.started_s,
        error=reason,
        run=last.run,
    )


def missing_part(node: str) -> Part:
    """The part of a node that is up and has no share of a job."""
    return lost_part(node, "it has no record of the job", None, MISSING)


def _unfinished(share: ShareStatus) -> int | None:
    return None if share.tasks is None else share.tasks - share.done - share.skipped - share.failed


def summarize(share: ShareStatus, parts: Sequence[Part], seconds: float | None = None) -> JobSummary:
    """The summary of a job; `share` is any share of it. Without `seconds`, they are those of its newest run
    by the clocks of the nodes, until now if it runs."""
    started = [part.started_s for part in parts if part.started_s is not None]
    known = [part.tasks for part in parts if part.tasks is not None]
    tasks = sum(known) if len(known) == len(parts) else None
    state = state_of(part.state for part in parts)
    if state == DONE and tasks == 0 and not share.skip_existing and not share.alone:
        state = FAILED  # a node may have no inputs, but not all of them
    if seconds is None:
        run = max(part.run for part in parts)
        newest = [part for part in parts if part.run == run]
        finished = [part.finished_s for part in newest if part.finished_s is not None]
        until = time.time() if state == RUNNING else max(finished, default=0.0)
        seconds = max(0.0, until - min((part.started_s or until for part in newest), default=until))
    return JobSummary(
        job=share.id,
        run=share.run,
        kind=share.kind,
        indir=share.indir,
        outdir=share.outdir,
        command=share.command,
        state=state,
        tasks=tasks,
        done=sum(part.done for part in parts),
        failed=sum(part.failed for part in parts),
        skipped=sum(part.skipped for part in parts),
        cancelled=sum(part.cancelled for part in parts),
        lost=sum(part.lost or 0 for part in parts),
        bytes_in=sum(part.bytes_in for part in parts),
        bytes_out=sum(part.bytes_out for part in parts),
        started_s=min(started, default=share.started_s),
        seconds=seconds,
        nodes=parts,
    )


def merged(answers: Mapping[str, Sequence[ShareStatus]], *, complete: bool) -> list[JobSummary]:
    """Jobs from all shares that each node has of them, the newest job first; `complete` if no node is
    missing. Otherwise what looks done may not be so there."""
    by_id: dict[str, dict[str, ShareStatus]] = {}
    for node, shares in answers.items():
        for share in shares:
            by_id.setdefault(share.id, {})[node] = share
    summaries = []
    for group in by_id.values():
        first = next(iter(group.values()))
        parts = list(map(part_of, group.values()))
        if not first.alone:
            parts += [missing_part(node) for node in answers if node not in group]
        summary = summarize(first, parts)
        if not complete and not first.alone:
            state = UNKNOWN if summary.state == DONE or summary.is_empty else summary.state
            summary = replace(summary, tasks=None, state=state)
        summaries.append(summary)
    return sorted(summaries, key=lambda summary: (summary.started_s, summary.job), reverse=True)
