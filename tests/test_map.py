"""s4 map, and what all jobs share: INDIR and OUTDIR, globs, order, limits, and the first failure."""

import fnmatch
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from cluster import Cluster
from hypothesis import given, settings
from hypothesis import strategies as st
from procs import alive, descendants, eventually, running

from s4.keys import matcher

INPUTS = {
    "000": b"zero\n",
    "001_x": b"",
    "002": b"no newline",
    "a.txt": bytes(range(256)),
    "sub/000": b"%s\0",
    "sub/dir/d.txt": b"\r\n",
}
CPUS = len(os.sched_getaffinity(0))
JOBS = ["map", "map-to-n", "map-from-n"]


@pytest.fixture
def indir(cluster: Cluster, bucket: str) -> str:
    cluster.put_all({f"{bucket}/in/{name}": data for name, data in INPUTS.items()})
    cluster.put(f"{bucket}/other/000", b"not an input")
    return f"{bucket}/in/"


def test_each_key_becomes_the_key_of_the_same_path_with_the_output(
    cluster: Cluster, bucket: str, indir: str
) -> None:
    result = cluster.s4("map", indir, f"{bucket}/out/", "cat")
    assert all(line.startswith("job ") for line in result.err.splitlines())
    assert cluster.contents(f"{bucket}/out/") == INPUTS
    assert cluster.contents(indir) == INPUTS


def test_outputs_stay_on_the_node_of_their_input(cluster: Cluster, bucket: str, indir: str) -> None:
    cluster.s4("map", indir, f"{bucket}/out/", "echo x")
    for node in cluster.nodes:
        inputs = {row[3].removeprefix("in/") for row in node.listing(indir)}
        assert {row[3].removeprefix("out/") for row in node.listing(f"{bucket}/out/")} == inputs


def test_a_command_knows_the_name_of_its_key(cluster: Cluster, bucket: str, indir: str) -> None:
    cluster.s4("map", indir, f"{bucket}/out/", 'printf "%s" "$filename"; printf "%s" ".$LC_ALL"; ls -A')
    names = {name: name.rpartition("/")[2].encode() + b".C" for name in INPUTS}
    assert cluster.contents(f"{bucket}/out/") == names


def test_pipelines_statements_and_loops_work(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{i:03}": b"c 1\na 2\nb 3\n" for i in range(4)})
    command = 'sort | while read key value; do\n echo "$value-$key"\ndone; echo end'
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", command)
    assert set(cluster.contents(f"{bucket}/out/").values()) == {b"2-a\n3-b\n1-c\nend\n"}


def test_a_command_may_ignore_its_input_and_print_nothing(cluster: Cluster, bucket: str, indir: str) -> None:
    cluster.s4("map", indir, f"{bucket}/out/", "true")
    assert cluster.contents(f"{bucket}/out/") == dict.fromkeys(INPUTS, b"")


def test_standard_error_of_a_success_is_no_output(cluster: Cluster, bucket: str, indir: str) -> None:
    cluster.s4("map", indir, f"{bucket}/out/", "echo noise >&2")
    assert cluster.contents(f"{bucket}/out/") == dict.fromkeys(INPUTS, b"")


def test_a_chain_of_jobs_works(cluster: Cluster, bucket: str, indir: str) -> None:
    cluster.s4("map", indir, f"{bucket}/one/", "cat; echo +")
    cluster.s4("map", f"{bucket}/one/", f"{bucket}/two/", "cat; echo +")
    assert cluster.contents(f"{bucket}/two/") == {name: data + b"+\n+\n" for name, data in INPUTS.items()}


GLOBS = {
    "in/*": ["000", "001_x", "002", "a.txt"],
    "in/*_x": ["001_x"],
    "in/00?": ["000", "002"],
    "in/00[12]": ["002"],
    "in/00[!1]*": ["000", "002"],
    "in/[0-9]*": ["000", "001_x", "002"],
    "in/*/*": ["sub/000"],
    "in/s*/*": ["sub/000"],
    "in/*/dir/*": ["sub/dir/d.txt"],
    "in/*/*/?.txt": ["sub/dir/d.txt"],
    "in/*/000": ["sub/000"],
    "*/0*0": ["in/000", "other/000"],
    "i*/000": ["in/000"],
}


@pytest.mark.parametrize(("pattern", "names"), GLOBS.items())
def test_a_glob_chooses_inputs_and_the_folder_ends_before_it(
    cluster: Cluster, bucket: str, indir: str, pattern: str, names: list[str]
) -> None:
    cluster.s4("map", f"{bucket}/{pattern}", f"{bucket}-out/", "true")
    assert cluster.keys(f"{bucket}-out") == [f"{bucket}-out/{name}" for name in sorted(names)]


@pytest.mark.parametrize("pattern", ["in/*.csv", "in/?", "in/*/*/*/*", "none/*", "in/000*x", "in/[x]*"])
def test_a_glob_that_matches_nothing_is_exit_1(
    cluster: Cluster, bucket: str, indir: str, pattern: str
) -> None:
    with cluster.nothing_changes():
        for job in JOBS:
            cluster.fails(job, f"{bucket}/{pattern}", f"{bucket}/out/", "true", code=1)


def test_a_glob_with_a_class_is_refused(cluster: Cluster, bucket: str, indir: str) -> None:
    for glob in ("[[:digit:]]*", "[x[:digit:]]*"):
        cluster.fails("map", indir + glob, f"{bucket}/out/", "cat", says="write [0-9]", code=1)
    for glob in ("x:]]/*", "[[:x]*"):  # which are none
        cluster.fails("map", indir + glob, f"{bucket}/out/", "cat", says="nothing to map", code=1)


@pytest.mark.parametrize("indir", ["s4://*/in/*", "s4://b[12]/x", "s4://?", "s4://*"])
def test_the_bucket_of_a_glob_is_whole(cluster: Cluster, indir: str) -> None:
    for job in JOBS:
        cluster.fails(job, indir, "s4://out/", "true")


SEGMENTS = st.text("ab.0_", min_size=1, max_size=4)
PATTERNS = st.lists(
    st.sampled_from(["a", "b", ".", "0", "_", "*", "?", "[ab]", "[!a]", "[0-9]"]), min_size=1, max_size=4
)


@settings(deadline=None)
@given(st.lists(PATTERNS.map("".join), min_size=1, max_size=3), st.lists(SEGMENTS, min_size=1, max_size=3))
def test_globs_agree_with_a_plain_reference(pattern: list[str], path: list[str]) -> None:
    expected = len(pattern) == len(path) and all(map(fnmatch.fnmatchcase, path, pattern))
    assert matcher("/".join(pattern))("/".join(path)) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "[[^]x",
        "[^a]x",
        "[!a]x",
        "[]a]x",
        "[^]a]x",
        "[!]a]x",
        "[a^]x",
        "[a!]x",
        "[^",
        "[^a",
        "[[]x",
        "[^]",
        "[^][",
        "[!]",
        "[]",
    ],
)
def test_a_set_of_a_glob_is_that_of_bash(pattern: str) -> None:
    names = [f"{c}x" for c in "ab^[]!"] + ["[^", "[^a", "[!a", "[^]", "[!]", "[^][", "[]"]
    script = 'pattern=$1; shift; for name; do if [[ $name == $pattern ]]; then echo "$name"; fi; done'
    command = ["bash", "-c", script, "bash", pattern, *names]
    chosen = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in names if matcher(pattern)(name)] == chosen


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("in", "out/"),
        ("in/", "out"),
        ("in/000", "out/"),
        ("in/*/", "out/"),
        ("none/", "out/"),
        ("in/no", "out/"),
        ("in/", "in/"),
        ("in/", "in/out/"),
        ("", "out/"),  # a whole bucket holds its OUTDIR too
        ("in/*", "in/"),
        ("in/*/*", "in/x/"),
    ],
)
def test_folders_that_a_job_cannot_use_are_one_clear_line(
    cluster: Cluster, bucket: str, indir: str, job: str, source: str, target: str
) -> None:
    with cluster.nothing_changes():
        cluster.fails(job, f"{bucket}/{source}", f"{bucket}/{target}", "true")


def test_an_output_may_lie_deeper_than_a_glob_looks(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000", b"x")
    cluster.s4("map", f"{bucket}/in/*", f"{bucket}/in/deep/", "cat")
    assert cluster.contents(f"{bucket}/in/deep/") == {"000": b"x"}


def test_an_empty_indir_is_nothing_to_map(cluster: Cluster, bucket: str) -> None:
    for job in JOBS:
        assert "nothing" in cluster.fails(job, f"{bucket}/none/", f"{bucket}/out/", "cat", code=1)


def test_the_failure_names_key_node_exit_code_and_the_end_of_stderr(
    cluster: Cluster, bucket: str, indir: str
) -> None:
    command = 'if [ "$filename" = 001_x ]; then echo much >&2; echo the problem >&2; exit 7; fi'
    line = cluster.fails("map", indir, f"{bucket}/out/", command, code=1)
    for part in (f"{bucket}/in/001_x", str(cluster.nodes[1]), "7", "the problem"):
        assert part in line
    assert f"{bucket}/out/001_x" not in cluster.keys(bucket)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("no-such-command", "127"),
        ("kill -9 $BASHPID", "signal 9 (KILL)"),
        ("cat | false | cat", "1"),
        ("echo $unset", "unset"),
        ("if", "syntax error"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("job", JOBS)
def test_a_command_that_cannot_end_well_fails_the_job(
    cluster: Cluster, bucket: str, indir: str, job: str, command: str, says: str
) -> None:
    cluster.fails(job, indir, f"{bucket}/out/", command, says=says)
    assert cluster.keys(f"{bucket}/out/") == []


@pytest.mark.parametrize("job", JOBS)
def test_an_output_that_exists_fails_the_job_and_stays(cluster: Cluster, bucket: str, job: str) -> None:
    command = "cat > 000; echo 000" if job == "map-to-n" else "cat"
    taken = f"{bucket}/out/000/000" if job == "map-to-n" else f"{bucket}/out/000"
    cluster.put_all({f"{bucket}/in/000": b"new", taken: b"old"})
    line = cluster.fails(job, f"{bucket}/in/", f"{bucket}/out/", command, code=1)
    assert taken in line and "exists" in line
    body = {"cmd": command, "indir": f"{bucket}/in/", "outdir": f"{bucket}/out/"}
    assert cluster.nodes[0].post_json("/" + job.replace("-", "_"), body).status == 409
    assert cluster.get(taken) == b"old"


@pytest.mark.parametrize("job", JOBS)
def test_the_first_failure_stops_everything_on_all_nodes(
    cluster: Cluster, bucket: str, folder: Path, job: str
) -> None:
    cluster.put_all({f"{bucket}/in/{i:03}_{i}": b"" for i in range(60)})
    seconds = f"7101.{JOBS.index(job)}"  # the same test may run for another job at the same time
    # All but one wait; the one fails as soon as others are seen to run.
    key_name = "$(basename $(cat))" if job == "map-from-n" else "$filename"
    command = f"""
        touch {folder}/{key_name}
        if [ {key_name} = 000_0 ]; then
            while [ $(ls {folder} | wc -l) -lt 6 ]; do sleep 0.05; done
            exit 9
        fi
        sleep {seconds} & sleep {seconds}"""
    if job == "map-from-n":
        command = f"name=$(basename $(cat)); {command.replace(key_name, '$name')}"
    began = time.monotonic()
    line = cluster.fails(job, f"{bucket}/in/", f"{bucket}/out/", command, code=1)
    assert "9" in line and "000_0" in line
    assert time.monotonic() - began < 15
    assert not running(f"sleep\x00{seconds}")
    assert len(os.listdir(folder)) < 20  # the rest was not started
    assert cluster.keys(f"{bucket}/out/") == []


def test_a_command_over_its_time_limit_fails_the_job(cluster: Cluster, bucket: str, indir: str) -> None:
    for job in JOBS:
        command = "cat > /dev/null; sleep 7111 & (setsid sleep 7111 &); sleep 7111"
        line = cluster.fails(job, indir, f"{bucket}/out/", command, env={"S4_TIMEOUT": "1"}, code=1)
        assert "time" in line and bucket in line
        eventually(lambda: not running("sleep\x007111"), 5, "children gone")


def test_the_servers_own_time_limit_holds_for_other_clients(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, env={"S4_TIMEOUT": "1"})
    (node,) = cluster.nodes
    cluster.put("s4://b/in/000")
    answer = node.post_json("/map", {"cmd": "sleep 7121", "indir": "s4://b/in/", "outdir": "s4://b/out/"})
    assert 400 <= answer.status < 500 and "time" in answer.text
    assert node.post("/eval", key="s4://b/in/000", body=b"sleep 7121").status == 400
    assert not running("sleep\x007121")


def _most_at_once(log: Path) -> int:
    most = now = 0
    for line in log.read_text().splitlines():
        now += 1 if line == "+" else -1
        most = max(most, now)
    return most


def test_no_more_commands_than_allowed_run_at_once(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, ["-max-cpu-jobs", "3"])
    cluster.put_all({f"s4://b/in/{i:03}": b"" for i in range(30)})
    log = cluster.work / "log"
    command = f"echo + >> {log}; sleep 0.05; echo - >> {log}"
    jobs = [cluster.start_s4("map", "s4://b/in/", f"s4://b/out{i}/", command) for i in range(2)]
    evals = [cluster.start_s4("eval", f"s4://b/in/{i:03}", command) for i in range(10)]
    assert [process.wait(60) for process in jobs + evals] == [0] * 12
    assert _most_at_once(log) == 3


def test_with_one_place_commands_run_in_key_order(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, ["--max-cpu-jobs", "1"])
    names = ["10", "9", "a/1", "a-b", "Z", "é", "a/b/0"]
    cluster.put_all({f"s4://b/in/{name}": b"" for name in names})
    log = cluster.work / "log"
    cluster.s4("map", "s4://b/in/", "s4://b/out/", f'echo "$filename" >> {log}')
    assert log.read_text().split() == [name.rpartition("/")[2] for name in sorted(names)]


@pytest.mark.parametrize(
    ("options", "keys", "own", "threads"),
    [
        ([], 2 * CPUS, "", 1),
        (["--max-cpu-jobs", "1"], 2 * CPUS, "", CPUS),
        ([], 1, "", CPUS),
        ([], 2 * CPUS, "7", 7),
    ],
    ids=["all CPUs are taken", "one place", "one command", "the node has a wish of its own"],
)
def test_commands_that_run_side_by_side_share_the_cpus(
    start_cluster: Callable[..., Cluster], options: list[str], keys: int, own: str, threads: int
) -> None:
    cluster = start_cluster(1, options, start=False)
    cluster.env.pop("OMP_NUM_THREADS", None)
    if own:
        cluster.env["OMP_NUM_THREADS"] = own
    cluster.nodes[0].start()
    cluster.put_all({f"s4://b/in/{i:03}": b"" for i in range(keys)})
    cluster.s4("map", "s4://b/in/", "s4://b/out/", "nproc")
    assert set(cluster.contents("s4://b/out/").values()) == {b"%d\n" % threads}


@pytest.mark.parametrize("policy", [os.SCHED_OTHER, os.SCHED_IDLE], ids=["usual", "chosen for the server"])
def test_commands_are_scheduled_as_batch_unless_the_server_is_scheduled_as_something_else(
    start_cluster: Callable[..., Cluster], policy: int
) -> None:
    cluster = start_cluster(1)
    node = cluster.nodes[0]
    eventually(lambda: len(node.workers()) == 2, 10, "no further worker is being started")
    for pid in (node.pid, *(process.pid for process in descendants(node.pid))):
        os.sched_setscheduler(pid, policy, os.sched_param(0))
    cluster.put("s4://b/in/000", b"")
    for command in ("cut -d ' ' -f 41 /proc/self/stat", "cut -d ' ' -f 41 /proc/self/stat | cat"):
        assert int(cluster.s4("eval", "s4://b/in/000", command).out) == (policy or os.SCHED_BATCH)
    assert os.sched_getscheduler(node.pid) == policy


@pytest.mark.parametrize("kind", JOBS)
def test_no_command_starts_after_the_failure_that_ends_the_job(
    start_cluster: Callable[..., Cluster], kind: str
) -> None:
    cluster = start_cluster(1, ["-max-cpu-jobs", "1"])
    cluster.put_all({f"s4://b/in/{i:03}": b"" for i in range(9)})
    for i in range(6):
        log = cluster.work / f"log{i}"
        command = f'echo "${{S4_KEY##*/}}" >>{log}; exit 3'
        result = cluster.run(kind, "s4://b/in/", f"s4://b/out{i}/", command)
        assert (result.code, log.read_text()) == (1, "000\n")


def test_ctrl_c_ends_a_job_with_all_its_commands(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{i:03}": b"" for i in range(30)})
    process = cluster.start_s4("map", f"{bucket}/in/", f"{bucket}/out/", "sleep 7131 & sleep 7131")
    eventually(lambda: len(running("sleep\x007131")) >= 6, 10, "commands run")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) == 130
    eventually(lambda: not running("sleep\x007131"), 5, "commands gone")
    assert cluster.keys(f"{bucket}/out/") == []


def test_jobs_run_while_others_do(cluster: Cluster, bucket: str, indir: str) -> None:
    jobs = [cluster.start_s4("map", indir, f"{bucket}/out{i}/", "cat; sleep 0.1") for i in range(5)]
    assert [job.wait(60) for job in jobs] == [0] * 5
    for i in range(5):
        assert cluster.contents(f"{bucket}/out{i}/") == INPUTS


def test_many_keys_are_mapped(cluster: Cluster, bucket: str, folder: Path) -> None:
    for i in range(600):
        (folder / f"{i:03}").write_text(f"{i}\n")
    cluster.s4("cp", "-r", ".", f"{bucket}/in/", cwd=folder)
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", "read n; echo $((n * 2))")
    out = cluster.contents(f"{bucket}/out/")
    assert out == {f"{i:03}": f"{i * 2}\n".encode() for i in range(600)}


def test_a_running_job_is_a_row_and_so_is_its_end(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    (node,) = cluster.nodes
    cluster.put("s4://b/in/000")
    columns = "state, kind, indir, outdir, command"
    process = cluster.start_s4("map", "s4://b/in/", "s4://b/out/", "sleep 7141")
    expected = ("map", "s4://b/in/", "s4://b/out/", "sleep 7141")
    eventually(lambda: node.rows(f"select {columns} from jobs") == [("running", *expected)], 10)
    (sleep,) = eventually(lambda: running("sleep\x007141"), 10)
    os.kill(sleep.pid, signal.SIGTERM)
    assert process.wait(10) == 1 and not alive(sleep.pid)
    ((state, error),) = node.rows("select state, error from jobs")
    assert state == "failed" and "143" in error
    assert re.search(r"(?m)^\S+ \w+ .*\bmap\b.*failed", node.log)


def _is_stopped(pid: int) -> bool:
    return " T " in Path(f"/proc/{pid}/stat").read_text()


def test_a_command_that_is_paused_goes_on_when_it_may(cluster: Cluster, bucket: str, folder: Path) -> None:
    cluster.put(f"{bucket}/in/000", b"data")
    for stop in (signal.SIGSTOP, signal.SIGTSTP):
        note, go = folder / f"{stop.name}.pid", folder / f"{stop.name}.go"
        command = f"echo $BASHPID >new; mv new {note}; until [ -e {go} ]; do sleep 0.05; done; cat"
        job = cluster.start_s4("map", f"{bucket}/in/", f"{bucket}/{stop.name}/", command)
        eventually(note.exists, 20)
        pid = int(note.read_text())
        os.kill(pid, stop)
        eventually(partial(_is_stopped, pid), 10)
        os.kill(pid, signal.SIGCONT)
        go.touch()
        _out, err = job.communicate(timeout=20)
        assert job.returncode == 0, err
        assert cluster.get(f"{bucket}/{stop.name}/000") == b"data"
    line = cluster.fails(
        "map", f"{bucket}/in/", f"{bucket}/never/", "kill -STOP $BASHPID", "--timeout", "1", code=1
    )
    assert "time limit of 1 s" in line


def test_what_is_left_of_a_job_has_all_the_cpus(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, start=False)
    cluster.env.pop("OMP_NUM_THREADS", None)
    cluster.nodes[0].start()
    cpus = len(os.sched_getaffinity(0))
    cluster.put_all({f"s4://b/in/{i:03}": b"" for i in range(2 * cpus)})
    command = "[ $filename != 000 ] || [ $S4_ATTEMPT = 2 ]; nproc"
    assert cluster.run("map", "s4://b/in/", "s4://b/out/", command, "--keep-going").code == 1
    [(job,)] = cluster.nodes[0].rows("select id from jobs")
    cluster.s4("retry", job)
    assert cluster.get("s4://b/out/000") == b"%d\n" % cpus
    assert cluster.get("s4://b/out/001") == b"1\n"
