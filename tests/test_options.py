"""Pure things of the command line: options, job ids, and how sizes, times and tasks are written."""

import contextlib
import csv
import inspect
import json
import os
import pty
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from s4 import following, keys
from s4.errors import BusyError, MisuseError, S4Error, UnreachableError
from s4.jobtables import JOBLOG_COLUMNS, joblog_row, plan_totals
from s4.progress import Bar
from s4.queries import Result
from s4.record import asdict, replace
from s4.report import failure, failure_lines, underway
from s4.rowformats import FORMATS
from s4.summary import (
    JobSummary,
    PlanPart,
    ShareStatus,
    Task,
    lost_part,
    merged,
    newest,
    part_of,
    state_of,
    summarize,
)
from s4.text import duration, one_line, printable, size, table
from s4.words import Usage, command_of


def _map(
    indir: str,
    outdir: str,
    cmd: str,
    *,
    timeout: float | None = None,
    retries: int = 0,
    keep_going: bool = False,
    format: str = "",
) -> None: ...


USAGE = Usage("map", list(inspect.signature(_map).parameters.values()))


@pytest.mark.parametrize(
    ("words", "positionals", "options"),
    [
        (["a", "b", "c"], ["a", "b", "c"], {}),
        (["--timeout", "5", "a", "b", "c"], ["a", "b", "c"], {"timeout": "5"}),
        (["a", "--timeout=5", "b", "c"], ["a", "b", "c"], {"timeout": "5"}),
        (["a", "b", "--keep-going", "c"], ["a", "b", "c"], {"keep_going": "True"}),
        (["a", "b", "c", "--keep-going=true"], ["a", "b", "c"], {"keep_going": "True"}),
        (["a", "b", "c", "--format", "--x"], ["a", "b", "c"], {"format": "--x"}),
        (["a", "b", "c", "--format="], ["a", "b", "c"], {"format": ""}),
        (["a", "b", "c", "--format=x=y"], ["a", "b", "c"], {"format": "x=y"}),
        (["a", "b", "c", "--retries", "1", "--retries", "2"], ["a", "b", "c"], {"retries": "2"}),
        (["a", "b", "-n5"], ["a", "b", "-n5"], {}),
        (["a", "b", "--what ever"], ["a", "b", "--what ever"], {}),
        (["--", "--keep-going", "-r", "--"], ["--keep-going", "-r", "--"], {}),
        (["a", "-", "c"], ["a", "-", "c"], {}),
    ],
)
def test_options_stand_anywhere(words: list[str], positionals: list[str], options: dict[str, str]) -> None:
    line = USAGE.read(words)
    assert (line.positionals, line.options) == (positionals, options)


@pytest.mark.parametrize("word", ["-n5", "--keep_going", "--keep", "-k", "-r", "--recursive", "--limit=3"])
def test_what_is_no_option_of_the_command_is_refused(word: str) -> None:
    for words in ([word, "a", "b", "c"], ["a", "b", "c", word]):
        with pytest.raises(MisuseError, match="no option"):
            USAGE.read(words)


def test_an_unknown_option_before_the_command_line_is_not_taken_for_it() -> None:
    line = USAGE.read(["a", "b", "--keep", "c"])
    with pytest.raises(MisuseError, match="no option '--keep'"):
        USAGE.check_count(line.positionals)


def test_values_become_what_the_parameter_takes() -> None:
    typed = {"timeout": "1.5e1", "retries": "003", "keep_going": "True", "format": "1"}
    values = USAGE.values(typed)
    assert values == {"timeout": 15.0, "retries": 3, "keep_going": True, "format": "1"}
    for name, text in (("timeout", "1_0"), ("timeout", "٣"), ("timeout", "1e999"), ("retries", "0x1")):
        with pytest.raises(MisuseError, match=text):
            USAGE.values({name: text})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ls", "a"], ("ls", ["a"])),
        (["-r", "ls", "a"], ("ls", ["-r", "a"])),
        (["-c", "ls", "cp", "a"], ("cp", ["-c", "ls", "a"])),
        (["--", "ls", "-x"], ("ls", ["--", "-x"])),
        (["--help"], ("", ["--help"])),
        ([], ("", [])),
    ],
)
def test_the_command_is_the_first_word_that_is_no_option(
    words: list[str], expected: tuple[str, list[str]]
) -> None:
    assert command_of(words, ["ls", "cp"]) == expected


def test_job_ids_are_short_and_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    ids = []
    for step in range(200):
        monkeypatch.setattr("time.time", lambda step=step: now + step / 16)
        ids.append(keys.new_job_id())
    assert sorted(ids) == ids and len(set(ids)) == 200
    assert {len(job) for job in ids} == {12}
    assert set("".join(ids)) <= set("0123456789abcdefghjkmnpqrstvwxyz")


def test_sizes_and_durations_are_short() -> None:
    shown = [size(n) for n in (0, 999, 1000, 1234, 999_949, 999_950, 12_345_678, 5e18, 999.6)]
    assert shown == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.2 kB",
        "999.9 kB",
        "1.0 MB",
        "12.3 MB",
        "5000.0 PB",
        "1.0 kB",
    ]
    times = [duration(s) for s in (0, 0.0123, 1, 59.9, 60, 5400, 90_000)]
    assert times == ["0.000 s", "0.012 s", "1.0 s", "59.9 s", "1.0 min", "1.5 h", "1.0 d"]
    times = [duration(s) for s in (0.9994, 0.9996, 59.96, 3596, 3599.9, 86_399)]
    assert times == ["0.999 s", "1.0 s", "1.0 min", "59.9 min", "1.0 h", "1.0 d"]


def test_text_of_others_is_one_harmless_line() -> None:
    assert printable("a\tb\n\x1b[31mc\udcff\0") == "a b \\x1b[31mc\\udcff"
    assert one_line("\n one \n\n two\r\n", 100) == "one | two"
    assert one_line("x" * 5000, 2000) == "x" * 2000
    assert table([("a", "bb"), ("ccc", "d")], right=(0,)) == ["  a  bb", "ccc  d"]


TASK = Task(
    node="h:1",
    task=3,
    input="s4://b/in/003",
    inputs=1,
    state="failed",
    attempt=1,
    pid=7,
    started_s=1000.5,
    seconds=0.0124,
    cpu_seconds=0.004,
    peak_memory=4096,
    bytes_in=10,
    bytes_out=None,
    exit_code=3,
    signal=None,
    error="exit code 3",
    stderr="one\n\x1b[31mtwo\n",
)


def test_a_failed_task_is_one_line() -> None:
    assert failure(TASK) == "s4://b/in/003 on h:1: exit code 3 (0.012 s): one | \\x1b[31mtwo"
    killed = replace(TASK, exit_code=137, signal=9, stderr="", attempt=2, inputs=3)
    assert failure(killed) == "s4://b/in/003 and 2 more on h:1: signal 9 (KILL) (0.012 s, attempt 2)"
    late = replace(TASK, exit_code=None, signal=9, error="killed after its time limit of 5 s", stderr=None)
    assert failure(late) == "s4://b/in/003 on h:1: killed after its time limit of 5 s (0.012 s)"


def test_a_row_of_the_joblog_has_all_columns_whatever_happened() -> None:
    row = joblog_row(TASK, "a\tb\\\nc").split("\t")
    assert len(row) == len(JOBLOG_COLUMNS)
    assert row[:9] == ["3", "h:1", "1000.500", "0.012", "10", "0", "3", "0", "a\\tb\\\\\\nc"]
    never = replace(TASK, state="waiting", attempt=0, started_s=None, seconds=None, exit_code=None)
    assert joblog_row(never, "").split("\t")[2:9] == ["0.000", "0.000", "10", "0", "", "", ""]
    lost = replace(TASK, exit_code=None, error="worker process 7 died")
    assert joblog_row(lost, "").split("\t")[6:8] == ["-1", "0"]


def test_a_record_is_made_changed_and_compared_by_its_fields() -> None:
    changed = replace(TASK, attempt=2)
    assert (changed.attempt, TASK.attempt, changed == TASK) == (2, 1, False)
    assert replace(changed, attempt=1) == TASK
    assert list(asdict(changed))[:3] == ["node", "task", "input"]
    with pytest.raises(TypeError, match="fields"):
        PlanPart("h:1", 1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="fields"):
        replace(TASK, colour="red")  # type: ignore[call-arg]


SHARE = ShareStatus(
    node="h:1",
    id="1abc",
    run=1,
    kind="map",
    indir="s4://b/in/",
    outdir="s4://b/out/",
    command="cat",
    state="running",
    tasks=10,
    done=3,
    failed=1,
    cancelled=0,
    skipped=2,
    running=2,
    bytes_in=5,
    bytes_out=6,
    started_s=1000.0,
    finished_s=None,
    error=None,
    timeout=300.0,
    retries=0,
    keep_going=True,
    skip_existing=False,
    alone=False,
)


def _summary(*shares: ShareStatus) -> JobSummary:
    return summarize(shares[0], [part_of(share) for share in shares])


def test_a_job_is_as_far_as_its_shares() -> None:
    both = _summary(SHARE, replace(SHARE, node="h:2", started_s=999.0))
    assert (both.state, both.tasks, both.done, both.ended, both.started_s) == ("running", 20, 6, 12, 999.0)
    assert _summary(SHARE, replace(SHARE, tasks=None)).tasks is None


def test_the_seconds_of_a_job_are_those_of_its_newest_run() -> None:
    first = replace(SHARE, state="done", started_s=1000.0, finished_s=1003.0)
    assert _summary(first, replace(first, node="h:2", finished_s=1005.0)).seconds == 5
    again = replace(first, node="h:2", run=2, started_s=9000.0, finished_s=9002.5)
    assert _summary(first, again).seconds == 2.5
    assert _summary(replace(SHARE, started_s=time.time() - 100)).seconds >= 100


def test_a_job_is_not_known_to_be_done_while_a_node_is_down() -> None:
    done = replace(SHARE, state="done", finished_s=1001.0)
    [whole] = merged({done.node: [done]}, complete=True)
    [partly] = merged({done.node: [done]}, complete=False)
    assert [(job.state, job.tasks) for job in (whole, partly)] == [("done", 10), ("unknown", None)]
    [own] = merged({done.node: [replace(done, kind="eval", alone=True)]}, complete=False)
    assert own.state == "done"


def test_a_job_is_not_done_that_a_node_never_got() -> None:
    done = replace(SHARE, state="done", finished_s=1001.0)
    other = replace(done, node="h:2", id="other")
    jobs = merged({done.node: [done], "h:2": [other]}, complete=True)
    assert [(job.state, job.tasks) for job in jobs] == [("interrupted", None)] * 2
    own = replace(done, kind="eval", alone=True)
    [job] = merged({own.node: [own], "h:2": []}, complete=True)
    assert job.state == "done"


def test_a_job_without_inputs_has_failed_unless_it_may_be_without() -> None:
    empty = replace(SHARE, state="done", tasks=0, done=0, failed=0, skipped=0, running=0)
    other = replace(empty, node="h:2")
    assert _summary(empty, other).is_empty and _summary(empty, other).state == "failed"
    assert _summary(empty, replace(other, tasks=1, done=1)).state == "done"
    skipping = [replace(share, skip_existing=True) for share in (empty, other)]
    assert _summary(*skipping).state == "done"
    [partly] = merged({empty.node: [empty]}, complete=False)
    assert partly.state == "unknown"


def test_what_a_lost_node_had_to_do_is_lost() -> None:
    done = replace(SHARE, state="done", tasks=4, done=4, failed=0, skipped=0, running=0)
    job = summarize(done, [part_of(done), lost_part("h:2", "cannot be reached", SHARE)])
    assert (job.state, job.lost, [part.node for part in job.unreachable]) == ("interrupted", 4, ["h:2"])
    assert failure_lines(job) == ["h:2: cannot be reached; 4 of its 10 tasks are lost"]
    never = summarize(done, [part_of(done), lost_part("h:2", "cannot be reached", None)])
    assert (never.state, never.tasks, never.lost) == ("interrupted", None, 0)
    assert failure_lines(never) == ["h:2: cannot be reached; its share is lost"]


def test_what_was_cancelled_is_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = _summary(replace(SHARE, cancelled=4))
    assert underway(stopped, None, 0) == "job 1abc: 6/10 tasks, 1 failed, 0 B/s"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with os.fdopen(ours, "rb", 0) as screen, os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        for begin in (_summary(SHARE), stopped):
            bar = Bar()
            bar.started(begin)
            bar.progress(stopped)
            bar.ended()
            drawn = b""
            while b"B/s]" not in drawn:
                drawn += screen.read(4096)
            assert b"6/10 tasks" in drawn and b"10/10" not in drawn, drawn


@pytest.mark.parametrize(
    ("states", "state"),
    [
        (["done", "done"], "done"),
        (["done", "running", "failed"], "running"),
        (["failed", "cancelled", "done"], "failed"),
        (["cancelled", "done"], "cancelled"),
        (["failed", "lost"], "interrupted"),
        (["missing", "done"], "interrupted"),
        (["missing", "failed"], "failed"),
    ],
)
def test_the_state_of_a_job_is_that_of_its_worst_share(states: list[str], state: str) -> None:
    assert state_of(states) == state


def test_the_skew_of_a_plan_is_the_largest_share_by_the_mean() -> None:
    parts = [PlanPart(f"h:{i}", n, n, 100 * n, 90, 0, 5, 9) for i, n in enumerate((1, 2, 6))]
    totals = plan_totals(parts)
    assert (totals["tasks"], totals["bytes"], totals["skew_tasks"]) == (9, 900, 2.0)
    assert plan_totals([replace(part, tasks=0, bytes=0) for part in parts])["skew_bytes"] == 1.0


ROWS = Result(["node", "a", "a"], [["h:1", None, "x|y\n\t\\"], ["h:1", 1.5, b"\x01\xff"]])


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("table", "node | a | a\n-----+-----+---\n"),
        ("csv", "node,a,a\nh:1,,\"x|y\n\t\\\"\nh:1,1.5,x'01ff'\n"),
        ("tsv", "node\ta\ta\nh:1\t\tx|y\\n\\t\\\\\nh:1\t1.5\tx'01ff'\n"),
        (
            "json",
            '[\n{"node": "h:1", "a": null, "a_2": "x|y\\n\\t\\\\"},\n'
            '{"node": "h:1", "a": 1.5, "a_2": "x\'01ff\'"}\n]\n',
        ),
    ],
)
def test_rows_keep_their_shape_in_every_format(format: str, text: str) -> None:
    lines = list(FORMATS[format](ROWS))
    if format == "table":
        assert [line.count("|") - line.count("\\|") for line in lines] == [2, 0, 2, 2]
        assert {len(line) for line in lines[2:]} and "x\\|y\\n\\t\\\\" in lines[2]
    else:
        assert "\n".join(lines) + "\n" == text


def test_csv_reads_back_whatever_ends_lines_in_it(folder: Path) -> None:
    texts = ["\r", "a\rb", "\n", "a\nb", "a\r\nb", "\r\n", '"\r"', ",", "", " a "]
    rows = [["node", "a"], *(["h:1", text] for text in texts)]
    file = folder / "rows.csv"
    file.write_bytes("".join(f"{line}\n" for line in FORMATS["csv"](Result(rows[0], rows[1:]))).encode())
    with open(file, newline="") as written:
        assert list(csv.reader(written)) == rows


class _Answers:
    """In the place of a client, and of its connection to the one node: what the node answers, one by one."""

    server = "h:1"

    def __init__(self, *answers: ShareStatus | S4Error) -> None:
        self._answers = iter(answers)

    @contextlib.contextmanager
    def caller(self, _server: str, _seconds: float) -> Iterator[Any]:
        yield self

    def call(self, *_request: object, silence: float) -> bytes:
        answer = next(self._answers)
        if isinstance(answer, S4Error):
            raise answer
        return json.dumps(asdict(answer)).encode()


def test_a_node_is_lost_when_it_does_not_answer_twice_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "PAUSE_SECONDS", 0.0)
    running = replace(SHARE, failed=0)
    done = replace(running, state="done", done=8, running=0, finished_s=1001.0)
    silent, busy = UnreachableError("h:1", "no answer in time"), BusyError("try again later")

    def followed(*answers: ShareStatus | S4Error) -> JobSummary:
        client: Any = _Answers(*answers)
        return following.Follower(client, {"h:1": running}, following.Watch()).wait()

    assert followed(silent, done).state == "done"
    assert followed(silent, running, silent, done).state == "done"
    assert followed(silent, busy, busy, busy, done).state == "done"
    lost = followed(silent, silent)
    assert (lost.state, lost.lost, [part.node for part in lost.unreachable]) == ("interrupted", 5, ["h:1"])


def test_what_a_stopped_node_did_not_end_is_lost_and_not_cancelled_too() -> None:
    stopped = replace(SHARE, state="interrupted", running=0, cancelled=4, finished_s=1001.0)
    job = _summary(stopped)
    assert (job.tasks, job.done, job.skipped, job.failed, job.lost, job.cancelled) == (10, 3, 2, 1, 4, 0)


def test_a_job_is_in_the_newest_run_of_its_shares() -> None:
    assert newest([replace(SHARE, run=2), None, replace(SHARE, run=3), replace(SHARE, run=1)]).run == 3
