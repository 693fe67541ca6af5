"""How the commands about jobs are shown. What `show_x` does not name, it takes as `Client.x` does.

What is said of a job goes to stderr, results to stdout. Tables are imported by commands that print one.
"""

import sys
from collections.abc import Callable, Iterable

from s4.errors import EXIT_UNREACHABLE, MisuseError, OverlapError, S4Error, UnreachableError
from s4.jobcontrol import JobError, JobInterrupt
from s4.progress import columns, watch_for
from s4.record import asdict
from s4.report import ending
from s4.states import FAILED
from s4.summary import JobSummary, Task
from s4.text import as_typed, pairs, say

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from typing import Any

    from s4.client import Client


def _job_command(kind: str) -> Callable[..., int]:
    def show(
        client: "Client",
        *words: str,
        plan: bool = False,
        detach: bool = False,
        json: bool = False,
        quiet: bool = False,
        **options: "Any",
    ) -> int:
        """Run a job.

        Args:
            plan: run nothing; show tasks, keys, bytes and outputs that exist, by node.
            detach: print the id of the job and return; the job goes on.
            json: print the summary, or what else there is, as JSON on stdout.
            quiet: print failures only.
        """
        _exclude(plan=plan, detach=detach, quiet=quiet)
        request = client.request(kind, *words, **options)
        if plan:
            return _show_plan(client.plan(request), json)
        try:
            if detach:
                return _show_id(client.submit(request), json)
            method = getattr(client, kind.replace("-", "_"))
            watch = watch_for(quiet=quiet or json)
            return _show_end(lambda: method(*words, **options, watch=watch), quiet, json)
        except OverlapError as e:
            if json:
                _print_json({"job": e.job, "state": "overlap", "message": str(e)})
            elif not quiet:
                say(str(e))
            return 0

    return show


show_map = _job_command("map")
show_map_to_n = _job_command("map-to-n")
show_map_from_n = _job_command("map-from-n")


def show_wait(client: "Client", *words: str, json: bool = False, quiet: bool = False) -> int:
    """Follow a job.

    Args:
        json: print the summary as JSON on stdout.
        quiet: print failures only.
    """
    watch = watch_for(quiet=quiet or json)
    return _show_end(lambda: client.wait(*words, watch=watch), quiet, json)


def show_retry(
    client: "Client", *words: str, detach: bool = False, json: bool = False, quiet: bool = False
) -> int:
    """Run the rest of a job.

    Args:
        detach: print the id of the job and return; the job goes on.
        json: print the summary, or the id, as JSON on stdout.
        quiet: print failures only.
    """
    _exclude(detach=detach, quiet=quiet)
    if not detach:
        watch = watch_for(quiet=quiet or json)

        def follow() -> JobSummary | None:
            # As JSON a job of which nothing is left to do is shown as it is.
            return client.retry(*words, watch=watch) or (client.job(*words) if json else None)

        return _show_end(follow, quiet, json)
    begun = client.retry(*words, detach=True)
    if begun is None and not json:
        say(_NOTHING_TO_RETRY)
    return _show_id((begun or client.job(*words)).job, json)


_NOTHING_TO_RETRY = "nothing to do: every task of the job is done"


def _exclude(**flags: bool) -> None:
    """Raises MisuseError if more than one of the flags is there."""
    given = [f"--{name}" for name, is_there in flags.items() if is_there]
    if len(given) > 1:
        raise MisuseError(f"{' and '.join(given)} exclude each other")


def _show_end(follow: Callable[[], JobSummary | None], quiet: bool, as_json: bool) -> int:
    """The summary of a job, however it ends."""
    try:
        summary = follow()
    except (JobError, JobInterrupt) as e:
        if as_json and e.summary is not None:
            _print_json(_summary_json(e.summary))
        raise
    if as_json and summary is not None:
        _print_json(_summary_json(summary))
    elif quiet:
        pass
    elif summary is None:
        say(_NOTHING_TO_RETRY)
    else:
        nothing = not summary.tasks and summary.outdir
        say(f"job {summary.job}: nothing to map: no keys in {summary.indir}" if nothing else ending(summary))
    return 0


def _show_id(job: str, as_json: bool) -> int:
    if as_json:
        _print_json({"job": job})
    else:
        print(job)
    return 0


def _show_plan(parts: "Any", as_json: bool) -> int:
    from s4 import jobtables

    if as_json:
        nodes = [asdict(part) for part in parts]
        _print_json({"nodes": nodes, **jobtables.plan_totals(parts)})
    else:
        _print_lines(jobtables.plan_page(parts))
    return 0


def show_jobs(client: "Client", *, json: bool = False, **options: "Any") -> int:
    """List jobs.

    Args:
        json: print a JSON list, with whole commands.
    """
    found: list[JobSummary] = []
    problem = None
    try:
        for job in client.jobs(**options):
            found.append(job)  # noqa: PERF402 - what came before a node turned out to be down is kept
    except UnreachableError as e:
        problem = e
    if json:
        _print_json_list(_summary_json(job) for job in found)
    else:
        from s4 import jobtables

        width = columns(sys.stdout) if sys.stdout.isatty() else None
        _print_lines(jobtables.jobs_table(found, width))
    if problem is not None:
        raise problem
    return 0


def show_job(client: "Client", *words: str, json: bool = False) -> int:
    """Show a job.

    Args:
        json: print a JSON object.
    """
    from s4 import jobtables

    summary = client.job(*words)
    failed = client.tasks(summary.job, state=FAILED, stderr=True) if summary.failed else iter(())
    problem = None
    if json:
        fields = _summary_json(summary)
        del fields["failures"]  # they follow, one by one
        sys.stdout.write(_encoded(fields).removesuffix("}") + ', "failures": [')
        separator = ""
    else:
        _print_lines(jobtables.job_page(summary))
    try:
        for task in failed:
            if json:
                sys.stdout.write(separator + _encoded(_failure_json(task)))
                separator = ", "
            else:
                _print_lines(["", *jobtables.failed_task(task)])
    except UnreachableError as e:
        problem = e
    if json:
        print("]}")
    for part in summary.unreachable:
        problem = problem or UnreachableError(part.node, part.error or "")
    if problem is not None:
        raise problem
    return 0


def show_cancel(client: "Client", *words: str) -> int:
    """Cancel a job: a line on stdout says how it was, or is."""
    summary, over = client.cancel(*words)
    print(f"{'it had ended before: ' if over else ''}{ending(summary)}")
    return 0


def show_joblog(client: "Client", job: str, *, json: bool = False) -> int:
    """Print every task of a job, with the columns of GNU parallel's --joblog and some more.

    Args:
        job: its id, or a beginning of it that no other job has.
        json: print a JSON list of tasks.
    """
    from s4 import jobtables

    summary = client.job(job)
    tasks = client.tasks(summary.job)
    if not json:
        print("\t".join(jobtables.JOBLOG_COLUMNS))
        for task in tasks:
            sys.stdout.write(jobtables.joblog_row(task, summary.command) + "\n")
        return 0
    problem: list[UnreachableError] = []

    def objects() -> "Iterable[dict[str, Any]]":
        try:
            for task in tasks:
                fields = asdict(task)
                del fields["stderr"]
                yield fields
        except UnreachableError as e:
            problem.append(e)

    _print_json_list(objects())
    if problem:
        raise problem[0]
    return 0


def show_stat(client: "Client", *words: str, json: bool = False) -> int:
    """Show a key.

    Args:
        json: print a JSON object.
    """
    found = client.stat(*words)
    fields = asdict(found)
    problem = fields.pop("problem")
    if json:
        _print_json(fields)
    else:
        from s4 import jobtables

        fields["created_s"] = jobtables.moment(found.created_s)
        inputs = fields.pop("inputs")
        if inputs is not None and inputs > 1:
            fields["input"] += f" and {inputs - 1} more"
        shown = {name.removesuffix("_s"): value for name, value in fields.items() if value is not None}
        _print_lines(pairs((name, as_typed(str(value))) for name, value in shown.items()))
    if problem:
        error = S4Error(problem)
        error.exit_code = EXIT_UNREACHABLE
        raise error
    return 0


def show_sql(
    client: "Client",
    query: str = "",
    *,
    format: str | None = None,
    schema: bool = False,
    json: bool = False,
    **options: "Any",
) -> int:
    """Ask the indexes.

    Args:
        query: a SELECT, in SQLite's dialect; none with --schema.
        format: table, csv, tsv or json; a table without it.
        schema: print the tables and views, their columns, and what they mean.
        json: the same as --format json.
    """
    from s4.queries import Result
    from s4.rowformats import FORMATS

    if format not in (None, *FORMATS):
        raise MisuseError(f"--format {format!r}: it must be one of {', '.join(FORMATS)}")
    if json and format not in (None, "json"):
        raise MisuseError("--json and --format exclude each other")
    if schema and query:
        raise MisuseError("--schema takes no query")
    if not schema and not query.strip():
        raise MisuseError("the query is missing; the usage is: s4 sql QUERY, or s4 sql --schema")
    if schema:
        result = Result(["table", "column", "type", "meaning"], client.schema())
    else:
        result = client.sql(query, **options)
    for line in FORMATS["json" if json else format or "table"](result):
        sys.stdout.write(line + "\n")
    return 0


def _summary_json(summary: JobSummary) -> "dict[str, Any]":
    return asdict(summary) | {"failures": [_failure_json(task) for task in summary.failures]}


def _failure_json(task: Task) -> "dict[str, Any]":
    names = ("node", "task", "attempt", "exit_code", "signal", "seconds", "error", "stderr")
    return {"key": task.input} | {name: getattr(task, name) for name in names}


def _encoded(value: "Any") -> str:
    import json  # 2 ms

    return json.dumps(value)


def _print_json(value: "Any") -> None:
    print(_encoded(value), flush=True)


def _print_json_list(values: "Iterable[Any]") -> None:
    """A value a line."""
    separator = "[\n"
    for value in values:
        sys.stdout.write(separator + _encoded(value))
        separator = ",\n"
    print("[]" if separator == "[\n" else "\n]")


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(line + "\n")
