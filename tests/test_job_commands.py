"""Jobs from the command line, on real nodes: what is shown, the options, and the commands about jobs."""

import fcntl
import json
import os
import pty
import re
import signal
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import procs
import pytest
from cluster import Cluster, Node
from procs import eventually

from s4.client import Client
from s4.jobcontrol import JobError
from s4.progress import Lines

KINDS = ["map", "map-to-n", "map-from-n"]
# For each kind a command that copies its input; the shuffle makes two files of it.
COPY = {"map": "cat", "map-to-n": "tee one > two; ls", "map-from-n": "xargs cat"}
JOBLOG = "Seq Host Starttime JobRuntime Send Receive Exitval Signal Command"
JOBLOG_MORE = "Key State Attempt CPU Memory BytesIn BytesOut"
ID = "[0-9a-z]{12}"


def _put_numbers(cluster: Cluster, folder: str, numbers: Sequence[int]) -> None:
    cluster.put_all({f"{folder}{i:03}": b"%d\n" % i for i in numbers})


def _json(cluster: Cluster, *arguments: str, code: int = 0) -> Any:
    result = cluster.run(*arguments, "--json")
    assert result.code == code, result
    return json.loads(result.out)


def _newest(cluster: Cluster) -> str:
    return str(_json(cluster, "jobs", "--limit", "1")[0]["job"])


def _share(node: Node, job: str) -> dict[str, Any]:
    share: dict[str, Any] = node.get("/job", job=job).json()
    return share


def _jobs_into(cluster: Cluster, outdir: str) -> list[dict[str, Any]]:
    return [job for job in _json(cluster, "jobs", "--limit", "1000") if job["outdir"] == outdir]


def _detached(cluster: Cluster, *arguments: str) -> str:
    [job] = cluster.s4(*arguments, "--detach").lines
    return job


@pytest.fixture
def indir(cluster: Cluster, bucket: str) -> str:
    """Six keys of two bytes, two on each node."""
    _put_numbers(cluster, f"{bucket}/in/", range(6))
    return f"{bucket}/in/"


@pytest.fixture
def running(cluster: Cluster, bucket: str, indir: str) -> Iterator[str]:
    """A job whose tasks run for a minute; cancelled afterwards."""
    job = _detached(cluster, "map", indir, f"{bucket}/slow/", "sleep 60; cat")
    try:
        eventually(lambda: all(_share(node, job)["running"] for node in cluster.nodes))
        yield job
    finally:
        cluster.run("cancel", job)


# What is shown of a job


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_terminal_a_job_is_a_line_at_the_start_and_one_at_the_end(
    cluster: Cluster, bucket: str, indir: str, kind: str
) -> None:
    result = cluster.s4(kind, indir, f"{bucket}/out/", COPY[kind])
    assert result.out == b""
    out = 24 if kind == "map-to-n" else 12
    assert re.fullmatch(
        rf"job ({ID}): {kind} {indir} to {bucket}/out/ on 3 nodes\n"
        rf"job \1 done: 6/6 tasks done, 0 failed, 0 skipped, 0 cancelled, 12 B in, {out} B out, [0-9.]+ s\n",
        result.err,
    ), result.err


def test_without_a_terminal_there_is_a_line_now_and_then(
    cluster: Cluster,
    bucket: str,
    indir: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("s4.progress.LINE_SECONDS", 0.5)
    client = Client(str(cluster.conf))
    command = '[ "$filename" -ge 3 ] || exit 1; sleep 2'
    with pytest.raises(JobError):
        client.map(indir, f"{bucket}/out/", command, keep_going=True, watch=Lines())
    first, *now_and_then = capfd.readouterr().err.splitlines()
    assert "on 3 nodes" in first and 2 <= len(now_and_then) <= 8
    line = rf"job {ID}: 3/6 tasks, 3 failed, \d+ B/s, [0-9.]+ s left"
    assert any(re.fullmatch(line, said) for said in now_and_then), now_and_then


def _on_a_terminal(
    cluster: Cluster, *arguments: str, press: str = "", when: Callable[[], object] = lambda: True
) -> tuple[int, str]:
    """Run a command with a terminal for its stderr; the exit code, and everything that was drawn.

    `press` is typed once `when()` is true.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))

    def take_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY)

    process = cluster.start_s4(*arguments, stdin=theirs, stderr=theirs, before=take_terminal)
    os.close(theirs)
    if press:
        eventually(when)
        os.write(ours, press.encode())
    drawn = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # nobody has the other end any more
            break
        drawn += block
    os.close(ours)
    return process.wait(30), drawn.decode()


def _screen(drawn: str) -> list[str]:
    """What remains to be seen of what was drawn with returns and line ends alone."""
    assert "\x1b" not in drawn
    lines = []
    for line in drawn.replace("\r\n", "\n").split("\n"):
        shown = ""
        for piece in line.split("\r"):
            shown = piece + shown[len(piece) :]
        lines.append(shown.rstrip())
    return lines


def test_a_terminal_shows_one_bar_and_at_the_end_only_the_summary(
    cluster: Cluster, bucket: str, indir: str
) -> None:
    command = "[ $filename -lt 3 ] || sleep 2; sleep 0.7; cat"
    code, drawn = _on_a_terminal(cluster, "map", indir, f"{bucket}/out/", command)
    assert code == 0
    bars = re.findall(
        rf"\rjob {ID} map: +\d+%\|[^|]*\| (\d)/6 tasks \[\d\d:\d\d<([\d:?]+), 0 failed, (\d+) B/s\]", drawn
    )
    done = [int(bar[0]) for bar in bars]
    assert done == sorted(done) and 3 in done, drawn
    assert any(":" in left and rate != "0" for _done, left, rate in bars), drawn
    summary, end = _screen(drawn)
    assert re.match(rf"job {ID} done: 6/6 tasks done, ", summary) and end == ""


def test_a_bar_counts_failures_which_follow_line_by_line(cluster: Cluster, bucket: str, indir: str) -> None:
    command = '[ "$filename" -ge 3 ] || exit 4; sleep 1.5'
    code, drawn = _on_a_terminal(cluster, "map", indir, f"{bucket}/out/", command, "--keep-going")
    assert code == 1
    assert re.search(r"3/6 tasks \[\d\d:\d\d<[\d:?]+, 3 failed, \d+ B/s\]", drawn), drawn
    *failed, summary, end = _screen(drawn)
    assert [line.split(" ")[:2] for line in failed] == [["failed:", f"{indir}00{i}"] for i in range(3)]
    assert summary.startswith("fatal: job ") and end == ""


def test_ctrl_c_on_a_terminal_cancels_and_says_so_below_no_bar(
    cluster: Cluster, bucket: str, indir: str
) -> None:
    def runs() -> bool:
        return any(job["state"] == "running" for job in _jobs_into(cluster, f"{bucket}/out/"))

    code, drawn = _on_a_terminal(
        cluster, "map", indir, f"{bucket}/out/", "sleep 983", press="\x03", when=runs
    )
    assert code == 130
    lines = [line.replace("^C", "").rstrip() for line in _screen(drawn)]
    job = _newest(cluster)
    said, end, nothing = lines[-3:]
    assert said == f"cancelling job {job} on all nodes … (Ctrl-C again leaves at once)" and nothing == ""
    counts = "0/6 tasks done, 0 failed, 0 skipped, 6 cancelled, 0 B in, 0 B out, "
    assert end.startswith(f"fatal: interrupted: job {job} is cancelled: {counts}"), drawn
    assert not procs.running("sleep\x00983")
    assert {_share(node, job)["state"] for node in cluster.nodes} == {"cancelled"}


# Of six keys the first is done at once, the second fails, and the others sleep.
HALF_DONE = "case ${S4_KEY##*/} in 000) echo;; 001) echo no >&2; exit 3;; *) sleep 981;; esac"


def _is_half_done(cluster: Cluster, outdir: str) -> bool:
    return any(
        (job["done"], job["failed"], sum(part["running"] for part in job["nodes"])) == (1, 1, 4)
        for job in _jobs_into(cluster, outdir)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_sums_up_what_was_done_also_as_json(
    cluster: Cluster, bucket: str, indir: str, kind: str
) -> None:
    out = f"{bucket}/out/"
    for again in (False, True):
        command = ["retry", _newest(cluster)] if again else [kind, indir, out, HALF_DONE, "--keep-going"]
        client = cluster.start_s4(*command, "--json")
        eventually(lambda: _is_half_done(cluster, out))
        client.send_signal(signal.SIGINT)
        printed, said = client.communicate(timeout=20)
        assert client.returncode == 130
        summary = json.loads(printed)
        names = ("kind", "state", "tasks", "done", "failed", "cancelled", "lost")
        assert [summary[name] for name in names] == [kind, "cancelled", 6, 1, 1, 4, 0]
        assert [(task["key"], task["stderr"]) for task in summary["failures"]] == [(f"{indir}001", "no\n")]
        assert [part["node"] for part in summary["nodes"]] == [str(node) for node in cluster.nodes]
        head = f"fatal: interrupted: job {_newest(cluster)} is cancelled: 1/6 tasks done, 1 failed, "
        assert said.decode().startswith(f"{head}0 skipped, 4 cancelled, ") and said.count(b"\n") == 1, said
    assert not procs.running("sleep\x00981")


def test_ctrl_c_counts_what_cannot_be_told_as_lost(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2)
    _put_numbers(cluster, "s4://b/in/", range(6))
    here, stuck = cluster.nodes
    arguments = ["map", "s4://b/in/", "s4://b/out/", HALF_DONE, "--keep-going", "--json", "--timeout", "99"]
    client = cluster.start_s4(*arguments, env={"S4_TIMEOUT": "2"})
    eventually(lambda: _is_half_done(cluster, "s4://b/out/"))
    os.kill(stuck.pid, signal.SIGSTOP)
    try:
        client.send_signal(signal.SIGINT)
        printed, said = client.communicate(timeout=20)
    finally:
        os.kill(stuck.pid, signal.SIGCONT)
        cluster.s4("cancel", _newest(cluster))
    summary = json.loads(printed)
    assert client.returncode == 130
    assert [summary[name] for name in ("state", "tasks", "done", "cancelled")] == ["cancelled", None, 1, 2]
    assert [(part["node"], part["state"]) for part in summary["nodes"]] == [
        (str(here), "cancelled"),
        (str(stuck), "lost"),
    ]
    assert re.fullmatch(
        rf"fatal: interrupted: job ({ID}) is cancelled: 1/\? tasks done, 0 failed, 0 skipped, 2 cancelled, .*"
        rf"; perhaps not everywhere: {stuck}: no answer in time; later: s4 cancel \1\n",
        said.decode(),
    ), said


def test_each_failed_task_is_a_line(cluster: Cluster, bucket: str) -> None:
    commands = {
        "000": "echo first >&2; echo last words >&2; exit 3",
        "001": "kill -SEGV $BASHPID",
        "002": "sleep 9",
        "003": "printf 'a\\tb\\033[31m\\xff' >&2; false",
        "004": "true",
    }
    cluster.put_all({f"{bucket}/in/{name}": command.encode() for name, command in commands.items()})
    options = ["--keep-going", "--timeout", "0.5"]
    result = cluster.run("map", f"{bucket}/in/", f"{bucket}/out/", 'eval "$(cat)"', *options)
    assert (result.code, result.out) == (1, b"")
    _begin, *failed, end = result.err.splitlines()
    seconds = r"[0-9.]+ s"
    expected = [
        rf"exit code 3 \({seconds}\): first \| last words",
        rf"signal 11 \(SEGV\) \({seconds}\)",
        rf"killed after its time limit of 0.5 s \({seconds}\)",
        rf"exit code 1 \({seconds}\): a b\\x1b\[31m\ufffd",
    ]
    for i, (line, how) in enumerate(zip(failed, expected, strict=True)):
        key = re.escape(f"failed: {bucket}/in/00{i} on {cluster.nodes[i % 3]}: ")
        assert re.fullmatch(key + how, line), line
    assert re.match(
        rf"fatal: job ({ID}) failed: 1/5 tasks done, 4 failed, .*; to do the rest: s4 retry \1$", end
    )


def test_a_failed_group_is_named_by_its_first_key(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{name}": b"" for name in ("1_a", "1_b", "1_c")})
    line = cluster.fails("map-from-n", f"{bucket}/in/", f"{bucket}/out/", "exit 2", code=1)
    assert f"failed: {bucket}/in/1_a and 2 more on {cluster.nodes[1]}: exit code 2 (" in line


# Options


@pytest.mark.parametrize("kind", KINDS)
def test_with_keep_going_the_rest_is_done_and_the_end_is_a_failure(
    cluster: Cluster, bucket: str, indir: str, kind: str
) -> None:
    command = f"[ ${{S4_KEY##*/}} != 001 ] || exit 1; {COPY[kind]}"
    result = cluster.run(kind, indir, f"{bucket}/out/", command, "--keep-going")
    assert result.code == 1 and "5/6 tasks done, 1 failed, 0 skipped, 0 cancelled" in result.fatal
    made = {key.split("/")[4] for key in cluster.keys(f"{bucket}/out/")}
    assert made == {f"{i:03}" for i in range(6) if i != 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_skips_what_exists_is_incremental(
    cluster: Cluster, bucket: str, indir: str, folder: Path, kind: str
) -> None:
    arguments = [kind, indir, f"{bucket}/out/"]
    arguments += [f"echo >> {folder}/${{S4_KEY##*/}}; {COPY[kind]}", "--skip-existing"]
    assert "6/6 tasks done, 0 failed, 0 skipped" in cluster.s4(*arguments).err
    before = cluster.contents(f"{bucket}/out/")
    _put_numbers(cluster, indir, range(6, 9))
    assert "3/9 tasks done, 0 failed, 6 skipped" in cluster.s4(*arguments).err
    assert "0/9 tasks done, 0 failed, 9 skipped" in cluster.s4(*arguments).err
    assert {file.name: file.read_text() for file in folder.iterdir()} == {f"{i:03}": "\n" for i in range(9)}
    after = cluster.contents(f"{bucket}/out/")
    assert before.items() <= after.items() and len(after) * 2 == len(before) * 3


def test_skipping_what_exists_is_fine_with_nothing_to_do(cluster: Cluster, bucket: str) -> None:
    arguments = ["map", f"{bucket}/nothing/", f"{bucket}/out/", "cat"]
    assert "nothing to map" in cluster.s4(*arguments, "--skip-existing").err
    assert "nothing to map" in cluster.fails(*arguments, code=1)
    begun = cluster.s4(*arguments, "--detach").lines[0]
    assert "nothing to map" in cluster.fails("wait", begun, code=1)
    assert json.loads(cluster.s4("job", begun, "--json").out)["state"] == "failed"
    assert "nothing to map" in cluster.fails("retry", begun, code=1)
    assert json.loads(cluster.run(*arguments, "--json").out)["state"] == "failed"
    begun = cluster.s4(*arguments, "--skip-existing", "--detach").lines[0]
    assert "nothing to map" in cluster.s4("wait", begun).err


def test_a_folder_in_the_place_of_an_output_is_no_output_that_exists(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/000": b"x", f"{bucket}/out/000/000": b"y"})
    said = cluster.fails("map", f"{bucket}/in/", f"{bucket}/out/", "cat", "--skip-existing", code=1)
    assert f"{bucket}/out/000" in said and "1 failed, 0 skipped" in said


def test_an_input_whose_attempt_ended_badly_is_not_skipped(cluster: Cluster, bucket: str, indir: str) -> None:
    # One of the two outputs of 001 cannot be stored: the other may be there all the same.
    in_the_way = f"{bucket}/out/001/two"
    cluster.put(in_the_way, b"somebody else's")
    arguments = ["map-to-n", indir, f"{bucket}/out/", COPY["map-to-n"]]
    first = _json(cluster, *arguments, "--keep-going", code=1)
    assert [task["key"] for task in first["failures"]] == [f"{indir}001"]
    again = _json(cluster, *arguments, "--keep-going", "--skip-existing", code=1)
    assert (again["skipped"], again["failed"]) == (5, 1)
    cluster.s4("rm", in_the_way)
    # It has taken the place of the first, whose leftovers it has removed.
    cluster.s4("retry", again["job"])
    assert cluster.get(in_the_way) == b"1\n"
    assert "6 skipped" in cluster.s4(*arguments, "--skip-existing").err


def test_a_retry_that_skips_what_exists_leaves_alone_what_another_job_has_done(
    cluster: Cluster, bucket: str, indir: str, folder: Path
) -> None:
    bad = folder / "bad"
    bad.touch()
    command = f"[ $filename != 001 ] || [ ! -e {bad} ]; cat > p; echo > q-$S4_JOB; ls"
    arguments = ["map-to-n", indir, f"{bucket}/out/", command, "--keep-going", "--skip-existing"]
    first = _json(cluster, *arguments, code=1)
    assert (first["done"], first["failed"]) == (5, 1)
    bad.unlink()
    assert _json(cluster, *arguments)["skipped"] == 5
    made = cluster.keys(f"{bucket}/out/")
    again = _json(cluster, "retry", first["job"])
    assert (again["done"], again["failed"], again["skipped"], again["state"]) == (5, 0, 1, "done")
    assert cluster.keys(f"{bucket}/out/") == made
    assert "6 skipped" in cluster.s4(*arguments).err


def test_an_input_of_the_same_name_in_another_folder_is_not_skipped(cluster: Cluster, bucket: str) -> None:
    arguments = ["map-to-n", f"{bucket}/in/", f"{bucket}/out/", "read x; echo 1 > $x; echo $x"]
    for day in ("one", "two", "three"):
        cluster.put(f"{bucket}/in/{day}/000_log", f"{day}\n".encode())
        done = _json(cluster, *arguments, "--skip-existing")
        assert (done["done"], done["skipped"]) == (1, done["tasks"] - 1)
    made = {f"{bucket}/out/000_log/{day}" for day in ("one", "two", "three")}
    assert set(cluster.keys(f"{bucket}/out/")) == made


@pytest.mark.parametrize("before", ["nothing", "a whole run, removed"])
def test_a_shuffle_that_failed_is_completed_by_one_that_skips(
    cluster: Cluster, bucket: str, indir: str, before: str
) -> None:
    out = f"{bucket}/out/"
    arguments = ["map-to-n", indir, out, "for i in 0 1 2 3 4 5; do echo $i > $i; echo $i; done"]
    if before != "nothing":
        cluster.s4(*arguments)
        cluster.s4("rm", "-r", out)
    cluster.put(f"{out}002/5", b"in the way")
    cluster.fails(*arguments, code=1)
    cluster.s4("rm", f"{out}002/5")
    assert any("/002/" in key for key in cluster.keys(out))
    cluster.s4(*arguments, "--skip-existing")
    assert set(cluster.keys(out)) == {f"{out}{i:03}/{j}" for i in range(6) for j in range(6)}


def test_a_retried_shuffle_leaves_nothing_of_the_attempt_before(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    cluster.put(f"{bucket}/in/000", b"x")
    cluster.put(f"{bucket}/out/000/3", b"in the way")
    # The first attempt makes 0 to 3, of which 3 cannot be stored; the second only 2.
    again = f"if [ -e {folder}/again ]; then echo > 2; echo 2; exit; fi; touch {folder}/again"
    command = f"{again}; for i in 0 1 2 3; do echo first > $i; echo $i; done"
    first = _json(cluster, "map-to-n", f"{bucket}/in/", f"{bucket}/out/", command, code=1)
    cluster.s4("rm", f"{bucket}/out/000/3")
    cluster.s4("retry", first["job"])
    assert cluster.contents(f"{bucket}/out/") == {"000/2": b"\n"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_tells_what_would_be_and_does_nothing(
    cluster: Cluster, bucket: str, folder: Path, kind: str
) -> None:
    keys = {"000_a": 1000, "000_b": 500, "001_a": 20, "002_a": 3, "003_a": 4000}
    cluster.put_all({f"{bucket}/in/{name}": b"x" * size for name, size in keys.items()})
    made = {"map": "003_a", "map-to-n": "003_a/one", "map-from-n": "003_a"}[kind]
    cluster.put(f"{bucket}/out/{made}")
    arguments = [kind, f"{bucket}/in/", f"{bucket}/out/", f"touch {folder}/ran; cat", "--plan"]
    with cluster.nothing_changes():
        plan = _json(cluster, *arguments)
        result = cluster.s4(*arguments)
    assert list(folder.iterdir()) == [] and _jobs_into(cluster, f"{bucket}/out/") == []
    merges = kind == "map-from-n"
    shown = [
        tuple(part[name] for name in ("tasks", "keys", "bytes", "largest_bytes")) for part in plan["nodes"]
    ]
    largest = 4000
    assert shown == [(2 if merges else 3, 3, 5500, largest), (1, 1, 20, 20), (1, 1, 3, 3)]
    tasks = 4 if merges else 5
    assert (plan["tasks"], plan["keys"], plan["bytes"], plan["largest_bytes"]) == (tasks, 5, 5523, largest)
    assert plan["skew_tasks"] == pytest.approx((2 if merges else 3) * 3 / tasks)
    assert plan["skew_bytes"] == pytest.approx(5500 * 3 / 5523)
    # A shuffle's output may be on any node, its input is on the first.
    assert [part["existing"] for part in plan["nodes"]] == [1, 0, 0] and plan["existing"] == 1
    disk = os.statvfs(cluster.root)
    for node, part in zip(cluster.nodes, plan["nodes"], strict=True):
        assert part["node"] == str(node) and part["disk_total"] == disk.f_blocks * disk.f_frsize
        assert part["disk_free"] == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.1)
    head, *rows, _all, skew, largest_key = result.lines
    assert head.split() == ["NODE", "TASKS", "KEYS", "BYTES", "EXISTING", "FREE"]
    assert rows[0].split()[:6] == [str(cluster.nodes[0]), "2" if merges else "3", "3", "5.5", "kB", "1"]
    assert "in tasks, 2.99 in bytes" in skew and largest_key == "largest key: 4.0 kB"


def test_a_detached_job_prints_its_id_and_goes_on(cluster: Cluster, bucket: str, indir: str) -> None:
    began = time.monotonic()
    result = cluster.s4("map", indir, f"{bucket}/out/", "sleep 3; cat", "--detach")
    assert time.monotonic() - began < 3
    assert re.fullmatch(rf"{ID}\n", result.out.decode()) and result.err == ""
    [job] = result.lines
    assert _share(cluster.nodes[0], job)["state"] == "running"
    assert f"job {job} done: 6/6 tasks done" in cluster.s4("wait", job).err
    assert len(cluster.keys(f"{bucket}/out/")) == 6
    begun = _json(cluster, "map", indir, f"{bucket}/out2/", "exit 1", "--detach")
    assert list(begun) == ["job"] and cluster.run("wait", begun["job"]).code == 1
    assert cluster.s4("retry", begun["job"], "--detach").lines == [begun["job"]]
    assert cluster.run("wait", begun["job"]).code == 1
    assert _share(cluster.nodes[0], begun["job"])["run"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_summary_is_json_if_asked_for(cluster: Cluster, bucket: str, indir: str, kind: str) -> None:
    result = cluster.s4(kind, indir, f"{bucket}/out/", COPY[kind], "--json")
    assert result.err == ""
    job = json.loads(result.out)
    names = ("kind", "indir", "outdir", "command", "state", "tasks", "done", "failed", "skipped", "cancelled")
    expected = (kind, indir, f"{bucket}/out/", COPY[kind], "done", 6, 6, 0, 0, 0)
    assert tuple(job[name] for name in names) == expected
    assert job["failures"] == [] and job["bytes_in"] == 12 and job["seconds"] > 0
    assert [part["node"] for part in job["nodes"]] == [str(node) for node in cluster.nodes]


def test_the_summary_of_a_failure_is_json_too(cluster: Cluster, bucket: str, indir: str) -> None:
    command = 'echo "not $filename" >&2; [ "$filename" != 004 ] || exit 3; cat'
    result = cluster.run("map", indir, f"{bucket}/out/", command, "--keep-going", "--json")
    assert result.fatal and result.code == 1
    job = json.loads(result.out)
    assert (job["state"], job["done"], job["failed"]) == ("failed", 5, 1)
    [failure] = job["failures"]
    seconds = failure.pop("seconds")
    assert 0 < seconds < 30 and failure == {
        "key": f"{indir}004",
        "node": str(cluster.nodes[1]),
        "task": 4,
        "attempt": 1,
        "exit_code": 3,
        "signal": None,
        "error": "exit code 3",
        "stderr": "not 004\n",
    }
    assert _json(cluster, "wait", job["job"], code=1)["failures"] == [failure | {"seconds": seconds}]
    assert _json(cluster, "job", job["job"])["failures"][0]["stderr"] == "not 004\n"


def test_quiet_prints_only_failures(cluster: Cluster, bucket: str, indir: str) -> None:
    result = cluster.s4("map", indir, f"{bucket}/out/", "cat", "--quiet")
    assert (result.out, result.err) == (b"", "")
    job = _newest(cluster)
    for command in ("wait", "retry"):
        result = cluster.s4(command, job, "--quiet")
        assert (result.out, result.err) == (b"", ""), command
    result = cluster.run("map", indir, f"{bucket}/bad/", "exit 1", "--keep-going", "--quiet")
    assert (result.code, result.out) == (1, b"")
    *failed, end = result.err.splitlines()
    assert len(failed) == 6 and all(line.startswith(f"failed: {indir}") for line in failed)
    assert end.startswith("fatal: job ")


def test_a_job_does_not_overlap_with_its_twin(
    cluster: Cluster, bucket: str, indir: str, running: str
) -> None:
    twin = ["map", indir, f"{bucket}/slow/", "sleep 60; cat", "--no-overlap"]
    result = cluster.s4(*twin)
    assert (result.out, result.err) == (
        b"",
        f"job {running} is still running: map of {indir}; nothing was started\n",
    )
    quiet = cluster.s4(*twin, "--quiet")
    assert (quiet.out, quiet.err) == (b"", "")
    overlap = _json(cluster, *twin)
    assert (overlap["state"], overlap["job"]) == ("overlap", running)
    assert cluster.s4(*twin, "--detach").out == b""
    assert [job["job"] for job in _jobs_into(cluster, f"{bucket}/slow/")] == [running]
    # Others are no twins.
    cluster.s4("map", indir, f"{bucket}/slow/x/", "cat", "--no-overlap")
    cluster.s4("map", f"{bucket}/in/*", f"{bucket}/slow/y/", "sleep 60; cat", "--no-overlap", "--plan")
    cluster.s4("map", f"{bucket}/in/00[01]", f"{bucket}/slow/", "cat", "--no-overlap")
    cluster.s4("cancel", running)
    assert cluster.run(*twin, "--timeout", "0.1").code == 1  # it runs now


def test_a_job_is_not_retried_beside_its_twin(cluster: Cluster, bucket: str, indir: str) -> None:
    work = (
        "map",
        indir,
        f"{bucket}/slow/",
        f"until [ -e {cluster.work}/go-{bucket[5:]} ]; do sleep 0.1; done; cat",
    )
    assert cluster.run(*work, "--timeout", "0.1", "--quiet").code == 1
    failed = _newest(cluster)
    twin = cluster.s4(*work, "--detach").lines[0]
    line = cluster.fails("retry", failed, says=f"job {twin}, which does the same, is still running", code=1)
    assert f"s4 wait {twin}" in line
    assert [job["run"] for job in _jobs_into(cluster, f"{bucket}/slow/") if job["job"] == failed] == [1]
    (cluster.work / f"go-{bucket[5:]}").touch()
    cluster.s4("wait", twin)


def test_of_twins_submitted_at_the_same_moment_one_runs(cluster: Cluster, bucket: str, indir: str) -> None:
    arguments = ["map", indir, f"{bucket}/out/", "sleep 2; cat", "--no-overlap"]
    clients = [cluster.start_s4(*arguments) for _ in range(4)]
    said = [client.communicate(timeout=60)[1].decode() for client in clients]
    assert [client.returncode for client in clients] == [0] * 4, said
    assert sum("still running" in text for text in said) == 3, said
    assert len(cluster.keys(f"{bucket}/out/")) == 6
    assert [job["state"] for job in _jobs_into(cluster, f"{bucket}/out/")] == ["done"]


# Commands about jobs


def test_jobs_are_listed_with_the_newest_first(
    cluster: Cluster, bucket: str, indir: str, running: str
) -> None:
    cluster.run("map", indir, f"{bucket}/out/", "echo 'a\tb' | c && exit 1", "--keep-going")
    cluster.s4("eval", f"{indir}000", "wc -c\n")
    head, evaluated, failed, slow = cluster.s4("jobs", "--limit", "3").lines
    assert head.split() == ["ID", "KIND", "STATE", "DONE", "FAILED", "AGE", "TOOK", "COMMAND"]
    ids = [line.split()[0] for line in (evaluated, failed, slow)]
    assert ids == sorted(ids, reverse=True) and ids[2] == running
    assert evaluated.split()[1:5] == ["eval", "done", "1/1", "0"] and evaluated.endswith("  wc -c")
    assert failed.split()[1:5] == ["map", "failed", "0/6", "6"]
    assert failed.endswith("  echo 'a b' | c && exit 1")
    assert slow.split()[1:5] == ["map", "running", "0/6", "0"]
    found = _json(cluster, "jobs", "--limit", "3")
    assert [job["job"] for job in found] == ids
    assert found[1]["command"] == "echo 'a\tb' | c && exit 1"
    assert found[2]["nodes"][0]["running"] > 0 and found[0]["outdir"] == ""


def test_a_job_that_not_all_nodes_got_is_listed_as_such(cluster: Cluster, bucket: str, indir: str) -> None:
    cluster.s4("map", indir, f"{bucket}/out/", "cat")
    body = {"cmd": "cat", "indir": indir, "outdir": f"{bucket}/half/", "job": f"half-{bucket[5:]}"}
    assert cluster.nodes[0].post_json("/map", body).status == 200
    # Of the other nodes the newest is another one.
    assert _json(cluster, "jobs", "--limit", "1")[0]["state"] == "interrupted"


def test_however_few_jobs_are_listed_each_is_as_it_is(cluster: Cluster, bucket: str, indir: str) -> None:
    def three(thread: int) -> None:
        for i in range(3):  # begun within moments, not everywhere in the same order
            Client(str(cluster.conf)).map(indir, f"{bucket}/{thread}-{i}/", "true")

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(three, range(6)))
    for limit in range(1, 19):
        states = {job["state"] for job in _json(cluster, "jobs", "--limit", str(limit))}
        assert states == {"done"}, limit


def test_a_listing_of_jobs_fits_the_terminal(cluster: Cluster, bucket: str, indir: str) -> None:
    cluster.s4("map", indir, f"{bucket}/out/", "cat #" + "x" * 300)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 70))
    process = cluster.start_s4("jobs", "--limit", "1", stdout=theirs, env={"COLUMNS": ""})
    assert process.wait(30) == 0
    lines = os.read(ours, 65536).decode().splitlines()
    os.close(ours)
    os.close(theirs)
    assert len(lines) == 2 and len(lines[1]) == 70 and lines[1].endswith("…")


def test_no_job_is_an_empty_list(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    assert len(cluster.s4("jobs").lines) == 1
    assert _json(cluster, "jobs") == []


def test_a_job_is_shown_by_node_with_its_failed_tasks(cluster: Cluster, bucket: str, indir: str) -> None:
    command = '[ "$filename" != 004 ] || { printf "one\\n\\ttwo\\n" >&2; exit 3; }; cat'
    cluster.run("map", indir, f"{bucket}/out/", command, "--keep-going")
    job = _newest(cluster)
    lines = cluster.s4("job", job).lines
    pairs = dict(line.split(":", 1) for line in lines[:9])
    assert {name: value.strip() for name, value in pairs.items() if name not in ("started", "tasks")} == {
        "job": job,
        "kind": "map",
        "state": "failed",
        "input": indir,
        "output": f"{bucket}/out/",
        "command": command,
        "run": "1",
    }
    assert re.match(r" *\d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", pairs["started"])
    assert "5/6 tasks done, 1 failed" in pairs["tasks"]
    head, *nodes = [line.split() for line in lines[10:14]]
    assert head[:8] == ["NODE", "STATE", "TASKS", "DONE", "FAILED", "SKIPPED", "CANCELLED", "RUNNING"]
    assert [row[:5] for row in nodes] == [
        [str(cluster.nodes[0]), "done", "2", "2", "0"],
        [str(cluster.nodes[1]), "failed", "2", "1", "1"],
        [str(cluster.nodes[2]), "done", "2", "2", "0"],
    ]
    assert re.match(f"failed: {indir}004 on {cluster.nodes[1]}: exit code 3 \\(", lines[15])
    assert lines[16:] == ["    one", " " * 12 + "two"]
    shown = _json(cluster, "job", job)
    assert (shown["job"], shown["failed"], len(shown["nodes"]), len(shown["failures"])) == (job, 1, 3, 1)
    assert shown["failures"][0]["stderr"] == "one\n\ttwo\n"


def test_waiting_tells_how_a_job_ended_also_afterwards(cluster: Cluster, bucket: str, indir: str) -> None:
    job = _detached(cluster, "map", indir, f"{bucket}/out/", "sleep 0.5; cat")
    for _ in range(2):
        begin, end = cluster.s4("wait", job).err.splitlines()
        assert begin.startswith(f"job {job}: map {indir} ") and end.startswith(f"job {job} done: 6/6 tasks")
    assert _json(cluster, "wait", job)["state"] == "done"
    job = _detached(cluster, "map", indir, f"{bucket}/out2/", "sleep 0.5; exit 9")
    for _ in range(2):
        result = cluster.run("wait", job)
        assert result.code == 1 and "exit code 9" in result.fatal


def test_ctrl_c_while_waiting_leaves_the_job_alone(cluster: Cluster, running: str) -> None:
    client = cluster.start_s4("wait", running)
    assert client.stderr is not None and client.stderr.readline().startswith(b"job ")
    client.send_signal(signal.SIGINT)
    assert client.stderr.read().decode() == f"fatal: interrupted: job {running} goes on; s4 wait {running}\n"
    assert client.wait() == 130
    assert _share(cluster.nodes[0], running)["state"] == "running"


def test_a_cancelled_job_ends_everywhere_for_everybody(cluster: Cluster, running: str) -> None:
    follower = cluster.start_s4("wait", running)
    assert follower.stderr is not None and follower.stderr.readline()
    result = cluster.s4("cancel", running)
    assert result.err == "" and re.match(
        f"job {running} cancelled: 0/6 tasks done, 0 failed, 0 skipped, 6 cancelled", result.out.decode()
    )
    assert f"fatal: job {running} cancelled" in follower.communicate(timeout=10)[1].decode()
    assert follower.returncode == 1
    for node in cluster.nodes:
        assert not [p for p in procs.descendants(node.pid) if p.command.startswith("sleep\x00")]
        assert not node.temporary()
    with cluster.nothing_changes():
        again = cluster.s4("cancel", running)
    assert again.out.decode().startswith(f"it had ended before: job {running} cancelled: ")
    assert cluster.run("wait", running).code == 1


def test_a_job_that_is_done_cannot_be_cancelled_any_more(cluster: Cluster, bucket: str, indir: str) -> None:
    cluster.s4("map", indir, f"{bucket}/out/", "cat")
    job = _newest(cluster)
    with cluster.nothing_changes():
        result = cluster.s4("cancel", job)
    assert result.out.decode().startswith(f"it had ended before: job {job} done: 6/6 tasks done")
    assert _share(cluster.nodes[0], job)["state"] == "done"


def test_a_running_job_is_not_retried(cluster: Cluster, running: str) -> None:
    for options in ([], ["--detach"], ["--quiet"], ["--json"]):
        line = cluster.fails("retry", running, *options, says="is still running", code=1)
        assert f"s4 cancel {running}" in line
    share = _share(cluster.nodes[0], running)
    assert (share["run"], share["state"], share["running"]) == (1, "running", 2)


def test_a_job_that_is_done_has_nothing_to_retry(cluster: Cluster, bucket: str, indir: str) -> None:
    cluster.s4("map", indir, f"{bucket}/out/", "cat")
    job = _newest(cluster)
    with cluster.nothing_changes():
        assert cluster.s4("retry", job).err == "nothing to do: every task of the job is done\n"
        assert cluster.s4("retry", job, "--detach").lines == [job]
        summary = _json(cluster, "retry", job[:-1])
        assert [summary[name] for name in ("job", "state", "done")] == [job, "done", 6]
        assert _json(cluster, "retry", job, "--detach") == {"job": job}
    assert _share(cluster.nodes[0], job)["run"] == 1


def test_a_retried_job_is_as_new_on_nodes_that_have_nothing_to_do(
    cluster: Cluster, bucket: str, indir: str, folder: Path
) -> None:
    command = f'case $filename in 000) ls "{folder}/reason";; esac'
    job = _json(cluster, "map", indir, f"{bucket}/out/", command, "--keep-going", code=1)["job"]
    for i in range(3):
        cluster.s4("map", indir, f"{bucket}/other-{i}/", "cat")
    (folder / "reason").touch()
    cluster.s4("retry", job)
    newest, _second = _json(cluster, "jobs", "--limit", "2")
    assert (newest["job"], newest["done"], newest["tasks"]) == (job, 6, 6)
    assert {part["run"] for part in _json(cluster, "job", job)["nodes"]} == {2}


def test_an_eval_is_not_retried(cluster: Cluster, indir: str) -> None:
    cluster.run("eval", f"{indir}000", "exit 3")
    cluster.fails("retry", _newest(cluster), says="is an eval", code=1)


def test_a_retry_does_what_is_left_once_the_reason_is_gone(
    cluster: Cluster, bucket: str, indir: str, folder: Path
) -> None:
    command = f"echo >> {folder}/$filename; [ -e {folder}/fixed ] || [ $filename != 001 ]; cat"
    failed = _json(cluster, "map", indir, f"{bucket}/out/", command, "--keep-going", code=1)
    (folder / "fixed").touch()
    begin, end = cluster.s4("retry", failed["job"]).err.splitlines()
    assert begin.endswith(" on 3 nodes, run 2")
    assert end.startswith(f"job {failed['job']} done: 6/6 tasks done, 0 failed")
    ran = {file.name: len(file.read_text()) for file in folder.iterdir()}
    assert ran == {"fixed": 0, **{f"{i:03}": 2 if i == 1 else 1 for i in range(6)}}
    assert len(cluster.keys(f"{bucket}/out/")) == 6


def test_the_log_of_a_job_has_the_columns_of_parallel(cluster: Cluster, bucket: str, indir: str) -> None:
    command = "case $filename in (001) exit 3;; (002) kill -9 $BASHPID;; (*) sleep 0.2; cat; esac #\t\\\n"
    cluster.run("map", indir, f"{bucket}/out/", command, "--keep-going")
    job = _newest(cluster)
    head, *rows = [line.split("\t") for line in cluster.s4("joblog", job).out.decode().splitlines()]
    assert head == f"{JOBLOG} {JOBLOG_MORE}".split()
    shown = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["Seq"] for row in shown] == list("012345")
    assert [row["Host"] for row in shown] == [str(cluster.nodes[i % 3]) for i in range(6)]
    assert [row["Key"] for row in shown] == [f"{indir}{i:03}" for i in range(6)]
    assert [(row["Exitval"], row["Signal"]) for row in shown[:3]] == [("0", "0"), ("3", "0"), ("137", "9")]
    assert [row["State"] for row in shown] == ["done", "failed", "failed", "done", "done", "done"]
    for row in shown:
        assert row["Command"] == command.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
        assert time.time() - 60 < float(row["Starttime"]) < time.time()
        assert (row["Send"], row["BytesIn"], row["Attempt"]) == ("2", "2", "1")
        assert row["Receive"] == row["BytesOut"] == ("2" if row["State"] == "done" else "0")
        if row["State"] == "done":
            assert 0.2 <= float(row["JobRuntime"]) < 30 and int(row["Memory"]) > 100_000
            assert 0 <= float(row["CPU"]) < 2
    tasks = _json(cluster, "joblog", job)
    assert [task["task"] for task in tasks] == list(range(6))
    assert [task["exit_code"] for task in tasks[:3]] == [0, 3, 137] and "stderr" not in tasks[0]


def test_the_log_has_tasks_that_never_ran(cluster: Cluster, bucket: str) -> None:
    _put_numbers(cluster, f"{bucket}/in/", range(60))
    job = _detached(cluster, "map", f"{bucket}/in/", f"{bucket}/out/", "sleep 60")

    def states() -> set[str]:
        return {line.split("\t")[10] for line in cluster.s4("joblog", job).lines[1:]}

    try:
        eventually(lambda: states() == {"running", "waiting"})
    finally:
        cluster.s4("cancel", job)
    rows = [line.split("\t") for line in cluster.s4("joblog", job).lines[1:]]
    assert len(rows) == 60 and {row[10] for row in rows} == {"cancelled"}
    assert {row[2] for row in rows if row[11] == "0"} == {"0.000"}


# Bad input


BAD_IDS = ["nosuchjob", "zzzzzzzzzzzz", "%", "*", "_", "1 or 1=1", "../x", "é", "x" * 300, "0"]


@pytest.mark.parametrize("command", ["job", "wait", "cancel", "retry", "joblog"])
def test_an_unknown_id_is_one_line_and_changes_nothing(cluster: Cluster, command: str) -> None:
    with cluster.nothing_changes():
        for job in BAD_IDS:
            result = cluster.run(command, job)
            assert (result.code, result.out) == (1, b"")
            assert "no job" in result.fatal and "s4 jobs lists them" in result.fatal
        assert cluster.fails(command, "", code=2)


def test_a_beginning_of_an_id_will_do_if_no_other_begins_like_it(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/some/{i:03}": b"" for i in range(3)})
    for name in ("", "-1", "-2"):
        body = {"cmd": "cat", "indir": f"{bucket}/some/", "outdir": f"{bucket}/out{name}/"}
        for node in cluster.nodes:
            assert node.post_json("/map", body | {"job": f"AMB{name}"}).status == 200
    with cluster.nothing_changes():
        for command in ("job", "wait", "cancel", "retry", "joblog"):
            line = cluster.fails(command, "AM", code=1)
            assert line == "fatal: job 'AM' is ambiguous: AMB-2, AMB-1, AMB"
            assert cluster.run(command, "AMB-1").code == 0
    assert _json(cluster, "job", "AMB")["outdir"] == f"{bucket}/out/"
    cluster.fails("job", "amb-1", says="no job", code=1)


def test_many_candidates_are_not_all_listed(cluster: Cluster, bucket: str) -> None:
    for i in range(15):
        body = {"cmd": "cat", "indir": f"{bucket}/none/", "outdir": f"{bucket}/out/", "job": f"MANY-{i:02}"}
        assert cluster.nodes[i % 3].post_json("/map", body).status == 200
    line = cluster.fails("cancel", "MANY", code=1)
    assert line.count("MANY-") == 10 and line.endswith(", …")


def test_a_job_needs_all_nodes_and_says_which_is_missing(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2)
    _put_numbers(cluster, "s4://b/in/", range(4))
    failed = _json(cluster, "map", "s4://b/in/", "s4://b/out/", "[ $filename = 000 ]", "--keep-going", code=1)
    done = _json(cluster, "map", "s4://b/in/", "s4://b/out1/", "cat")
    job, node = failed["job"], cluster.nodes[1]
    node.kill()
    for arguments in (
        ["map", "s4://b/in/", "s4://b/out2/", "cat"],
        ["map", "s4://b/in/", "s4://b/out2/", "cat", "--detach"],
        ["map", "s4://b/in/", "s4://b/out2/", "cat", "--plan"],
        ["map", "s4://b/in/", "s4://b/out2/", "cat", "--no-overlap", "--quiet"],
        ["jobs"],
        ["job", job],
        ["wait", job],
        ["cancel", job],
        ["retry", job],
        ["retry", job, "--detach"],
        ["joblog", job],
        ["job", "nosuchjob"],
        ["stat", "s4://b/in/001"],
        ["sql", "select 1"],
    ):
        began = time.monotonic()
        result = cluster.run(*arguments)
        assert result.code == 3 and str(node) in result.fatal, (arguments, result)
        assert time.monotonic() - began < 10
    # What the other node knows is shown all the same.
    shown = cluster.run("jobs")
    assert [line.split()[:3] for line in shown.lines[1:]] == [
        [done["job"], "map", "unknown"],
        [job, "map", "failed"],
    ]
    assert [found["job"] for found in _json(cluster, "jobs", code=3)] == [done["job"], job]
    assert _json(cluster, "job", done["job"], code=3)["state"] == "unknown"
    assert len(cluster.run("joblog", job).lines) == 3
    assert len(_json(cluster, "joblog", job, code=3)) == 2
    assert _json(cluster, "job", job, code=3)["failures"][0]["key"] == "s4://b/in/002"
    assert _json(cluster, "wait", job, code=3)["state"] == "interrupted"
    assert cluster.s4("stat", "s4://b/in/000").lines[0] == "key:      s4://b/in/000"
    assert cluster.s4("sql", "--schema").lines
    rows = cluster.nodes[0].rows("select outdir from jobs where outdir = 's4://b/out2/'")
    assert rows == []


def test_what_a_running_job_has_made_is_skipped(cluster: Cluster, bucket: str, folder: Path) -> None:
    go, out = folder / "go", f"{bucket}/out/"
    cluster.put_all({f"{bucket}/in/{name}": b"x" for name in ("000", "003")})  # on the same node
    line = f"[ $filename = 000 ] || until [ -e {go} ]; do sleep 0.02; done; cat > p; echo p"
    [job] = cluster.s4("map-to-n", f"{bucket}/in/", out, line, "--detach").lines
    eventually(lambda: cluster.keys(out) == [f"{out}000/p"], 10)
    beside = cluster.s4("map-to-n", f"{bucket}/in/*0", out, "cat > p; echo p", "--skip-existing")
    assert "0/1 tasks done, 0 failed, 1 skipped" in beside.err
    go.touch()
    assert cluster.s4("wait", job) and cluster.keys(out) == [f"{out}000/p", f"{out}003/p"]


def test_what_helps_is_said_of_a_job_that_fails(cluster: Cluster, bucket: str, indir: str) -> None:
    twice = ("map", indir, f"{bucket}/out/", "cat")
    cluster.s4(*twice)
    assert cluster.fails(*twice, "--keep-going", code=1).endswith(
        "; with --skip-existing what exists is left out"
    )
    begun = cluster.s4("map", f"{bucket}/nothing/", f"{bucket}/none/", "cat", "--detach").lines[0]
    assert "there was nothing to map" in cluster.s4("job", begun).out.decode()
    assert f"job {begun} found nothing to map: start it again" in cluster.fails("retry", begun, code=1)


def test_inputs_of_the_same_name_are_named_as_the_reason(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{day}/000": b"" for day in ("one", "two")})
    shuffle = ("map-to-n", f"{bucket}/in/", f"{bucket}/out/", "for i in 000 001 002; do echo > $i; done; ls")
    line = cluster.fails(*shuffle, "--keep-going", code=1)
    assert "it is of another input of this job: inputs of a map-to-n need different NAMEs" in line
    assert "s4 retry" not in line and "--skip-existing" not in line  # which would not help
    line = cluster.fails(*shuffle, "--keep-going", "--skip-existing", code=1)
    assert (
        "it was not made from this input: remove it first, or, if another input made it, give inputs" in line
    )
    assert "--skip-existing" not in line  # which it was, and did not help
