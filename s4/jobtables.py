"""Jobs as tables and pages of text: the recent ones, one in detail, its log, and a plan."""

import time
from collections.abc import Sequence

from s4.report import NOTHING, counts, how_it_ended, total
from s4.states import FAILED, INTERRUPTED, LOST, MISSING, RUNNING
from s4.summary import JobSummary, PlanPart, Task
from s4.text import as_typed, duration, pairs, printable, shortened, size, table, without_controls

# The columns of GNU parallel's --joblog, then our own.
JOBLOG_COLUMNS = (
    "Seq",
    "Host",
    "Starttime",
    "JobRuntime",
    "Send",
    "Receive",
    "Exitval",
    "Signal",
    "Command",
    "Key",
    "State",
    "Attempt",
    "CPU",
    "Memory",
    "BytesIn",
    "BytesOut",
)
NO_EXIT_CODE = -1  # as parallel has it for a command that was killed before it ended by itself
_STDERR_INDENT = " " * 4


def jobs_table(jobs: Sequence[JobSummary], width: int | None) -> list[str]:
    """A line a job below a header, not wider than `width` if that is given."""
    now = time.time()
    rows = [("ID", "KIND", "STATE", "DONE", "FAILED", "AGE", "TOOK", "COMMAND")]
    for job in jobs:
        took = now - job.started_s if job.state == RUNNING else job.seconds
        rows.append(
            (
                job.job,
                job.kind,
                job.state,
                f"{job.done + job.skipped}/{total(job)}",
                str(job.failed),
                duration(max(0.0, now - job.started_s)),
                duration(max(0.0, took)),
                printable(job.command),
            )
        )
    lines = table(rows, right=(3, 4, 5, 6))
    return lines if width is None else [shortened(line, width) for line in lines]


def job_page(job: JobSummary) -> list[str]:
    """What a job is, how far it is, and its part on each node."""
    lines = pairs(
        [
            ("job", job.job),
            ("kind", job.kind),
            ("state", job.state),
            ("input", job.indir),
            *([("output", job.outdir)] if job.outdir else []),
            ("command", as_typed(job.command)),
            ("run", str(job.run)),
            ("started", moment(job.started_s)),
            ("tasks", counts(job) + (f"; {NOTHING}" if job.is_empty else "")),
        ]
    )
    rows: list[tuple[str, ...]] = [
        ("NODE", "STATE", "TASKS", "DONE", "FAILED", "SKIPPED", "CANCELLED", "RUNNING", "LOST", "IN", "OUT")
    ]
    for part in job.nodes:
        numbers = (part.done, part.failed, part.skipped, part.cancelled, part.running)
        rows.append(
            (
                part.node,
                part.state,
                total(part),
                *map(str, numbers),
                "?" if part.lost is None else str(part.lost),
                size(part.bytes_in),
                size(part.bytes_out),
            )
        )
    lines += ["", *table(rows, right=range(2, 11))]
    # That a share was cancelled, or failed as its tasks did, is told elsewhere.
    unusual = [
        part
        for part in job.nodes
        if part.error
        and (part.state in (LOST, MISSING, INTERRUPTED) or (part.state == FAILED and not part.failed))
    ]
    return lines + [f"{part.node}: {printable(part.error or '')}" for part in unusual]


def failed_task(task: Task) -> list[str]:
    """A failed task and, indented, what it wrote to stderr."""
    stderr = (task.stderr or "").splitlines()
    inputs = f" and {task.inputs - 1} more" if task.inputs > 1 else ""
    head = f"{FAILED}: {task.input}{inputs} on {task.node}: {printable(how_it_ended(task))}"
    return [head, *(_STDERR_INDENT + without_controls(line.expandtabs()) for line in stderr)]


def joblog_row(task: Task, command: str) -> str:
    """A task as a line of the log; what never began or has not ended has empty fields."""
    exit_code: int | None = task.exit_code
    if exit_code is None and task.state == FAILED:
        exit_code = NO_EXIT_CODE
    ended = exit_code is not None
    fields = (
        task.task,
        task.node,
        f"{task.started_s or 0:.3f}",
        f"{task.seconds or 0:.3f}",
        task.bytes_in or 0,
        task.bytes_out or 0,
        exit_code if ended else "",
        (task.signal or 0) if ended else "",
        without_controls(escaped(command)),
        task.input,
        task.state,
        task.attempt,
        "" if task.cpu_seconds is None else f"{task.cpu_seconds:.3f}",
        "" if task.peak_memory is None else task.peak_memory,
        task.bytes_in or 0,
        task.bytes_out or 0,
    )
    return "\t".join(map(str, fields))


def escaped(text: str) -> str:
    """A field of tab-separated text: tabs, line ends and backslashes as \\t, \\n, \\r and \\\\."""
    text = text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
    return text.replace("\r", "\\r")


def plan_page(parts: Sequence[PlanPart]) -> list[str]:
    """A row a node, the totals, and how unevenly the work is spread."""
    rows: list[tuple[str, ...]] = [("NODE", "TASKS", "KEYS", "BYTES", "EXISTING", "FREE")]
    for part in parts:
        numbers = (part.tasks, part.keys)
        free = f"{size(part.disk_free)} of {size(part.disk_total)}"
        rows.append((part.node, *map(str, numbers), size(part.bytes), str(part.existing), free))
    sums = plan_totals(parts)
    rows.append(
        ("all", str(sums["tasks"]), str(sums["keys"]), size(sums["bytes"]), str(sums["existing"]), "")
    )
    return [
        *table(rows, right=range(1, 6)),
        f"skew (largest share / mean): {sums['skew_tasks']:.2f} in tasks, {sums['skew_bytes']:.2f} in bytes",
        f"largest key: {size(sums['largest_bytes'])}",
    ]


def plan_totals(parts: Sequence[PlanPart]) -> dict[str, float]:
    """The sums over all nodes, the largest key, and the skew: the largest share divided by the mean."""
    return {
        "tasks": sum(part.tasks for part in parts),
        "keys": sum(part.keys for part in parts),
        "bytes": sum(part.bytes for part in parts),
        "existing": sum(part.existing for part in parts),
        "largest_bytes": max(part.largest_bytes for part in parts),
        "skew_tasks": _skew([part.tasks for part in parts]),
        "skew_bytes": _skew([part.bytes for part in parts]),
    }


def _skew(shares: Sequence[int]) -> float:
    return max(shares) * len(shares) / sum(shares) if sum(shares) else 1.0


def moment(seconds: float) -> str:
    """A time as listings show it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
