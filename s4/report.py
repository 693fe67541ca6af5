"""What is said of a job, each thing in one line: how it begins, how far it is, what failed, how it ended."""

from s4.keys import DIFFERENT_NAMES, REMOVE_FIRST, START_AGAIN
from s4.states import EVAL, FAILED, INTERRUPTED, LOST, MISSING
from s4.summary import JobSummary, Part, Task
from s4.text import duration, size, with_said

NOTHING = "there was nothing to map"


def beginning(summary: JobSummary) -> str:
    """The line at the start."""
    what = f"{summary.kind} {summary.indir}" + (f" to {summary.outdir}" if summary.outdir else "")
    nodes = f"{len(summary.nodes)} node{'s' if len(summary.nodes) != 1 else ''}"
    return f"job {summary.job}: {what} on {nodes}{_run(summary)}"


def _run(summary: JobSummary) -> str:
    return f", run {summary.run}" if summary.run > 1 else ""


def underway(summary: JobSummary, seconds_left: float | None, bytes_per_second: float) -> str:
    """The line now and then."""
    left = f", {duration(seconds_left)} left" if seconds_left is not None else ""
    return (
        f"job {summary.job}: {over(summary)}/{total(summary)} tasks, {summary.failed} failed,"
        f" {size(bytes_per_second)}/s{left}"
    )


def over(summary: JobSummary) -> int:
    """The number of tasks that came to their own end. What was cancelled brings no job forward."""
    return summary.ended - summary.cancelled


def total(summary: JobSummary | Part) -> str:
    """The number of tasks, as far as it is known."""
    return "?" if summary.tasks is None else str(summary.tasks)


def counts(summary: JobSummary) -> str:
    """Tasks, bytes and time."""
    lost = f", {summary.lost} lost" if summary.lost else ""
    return (
        f"{summary.done}/{total(summary)} tasks done, {summary.failed} failed, {summary.skipped} skipped,"
        f" {summary.cancelled} cancelled{lost}, {size(summary.bytes_in)} in, {size(summary.bytes_out)} out,"
        f" {duration(summary.seconds)}"
    )


def ending(summary: JobSummary) -> str:
    """The line at the end; that of a failure says what to do."""
    line = f"job {summary.job} {summary.state}: {counts(summary)}"
    if summary.is_empty:
        return f"{line}; {NOTHING}"
    if summary.state not in (FAILED, INTERRUPTED) or summary.kind == EVAL:
        return line
    if any(START_AGAIN in (part.error or "") for part in summary.nodes):
        return line
    errors = [task.error or "" for task in summary.failures]
    if errors and all(DIFFERENT_NAMES in error for error in errors):
        return line  # a retry would end in the same way
    if errors and all(REMOVE_FIRST in error for error in errors):
        return f"{line}; with --skip-existing what exists is left out"
    return f"{line}; to do the rest: s4 retry {summary.job}"


def failure(task: Task) -> str:
    """What became of a failed task: key, node, exit code or signal, seconds, the end of its stderr."""
    key = task.input if task.inputs <= 1 else f"{task.input} and {task.inputs - 1} more"
    return with_said(f"{key} on {task.node}: {how_it_ended(task)}", task.stderr or "")


def how_it_ended(task: Task) -> str:
    """`exit code 3 (0.012 s, attempt 2)`."""
    how = task.error or "failed"
    if task.exit_code is not None and task.signal:
        how = f"signal {task.signal}{_signal_name(task.signal)}"
    notes = [duration(task.seconds)] if task.seconds is not None else []
    notes += [f"attempt {task.attempt}"] if task.attempt > 1 else []
    return f"{how} ({', '.join(notes)})" if notes else how


def _signal_name(number: int) -> str:
    from signal import Signals

    try:
        return f" ({Signals(number).name.removeprefix('SIG')})"
    except ValueError:
        return ""


def lost(part: Part) -> str:
    """A node that went down, or does not know the job, and how many of its tasks that costs."""
    if part.lost is None:
        return f"{part.node}: {part.error}; its share is {part.state}"
    return f"{part.node}: {part.error}; {part.lost} of its {total(part)} tasks are lost"


def failure_lines(summary: JobSummary) -> list[str]:
    """A line for each task that failed and for each node that did."""
    lines = [failure(task) for task in summary.failures]
    told = {task.node for task in summary.failures}
    for part in summary.nodes:
        if part.state in (LOST, MISSING, INTERRUPTED):
            lines.append(lost(part))
        elif part.state == FAILED and part.node not in told:
            lines.append(f"{part.node}: {part.error or 'its share failed'}")
    return lines
