"""Corners of eval and jobs: shell characters in keys, odd commands and outputs, bad requests, leftovers."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import procs
import pytest
from cluster import Cluster
from procs import eventually

SHELL_NAMES = [
    "$HOME",
    "a;b",
    "`id`",
    "$(id)",
    "it's",
    'q"q',
    "x*?[y]",
    "a&b|c",
    "<>",
    "\\n",
    "%s",
    "!x",
    "~",
    "-n",
]
JOBS = ["map", "map_to_n", "map_from_n"]


@pytest.fixture(scope="module")
def one_slot() -> Iterator[Cluster]:
    """A cluster of one node that runs one command at a time."""
    with Cluster(1, ["--max-cpu-jobs", "1"]) as cluster:
        yield cluster


@pytest.mark.parametrize("name", SHELL_NAMES)
def test_shell_characters_in_a_key_are_harmless(cluster: Cluster, bucket: str, name: str) -> None:
    key = f"{bucket}/in/{name}"
    cluster.put(key, b"data\n")
    assert cluster.s4("eval", key, 'printf "%s\\n" "$filename"; cat').out.decode() == f"{name}\ndata\n"
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", 'printf "%s" "$filename"')
    assert cluster.contents(f"{bucket}/out/") == {name: name.encode()}
    cluster.s4(
        "map-to-n", f"{bucket}/in/", f"{bucket}/n/", 'cat > "./$filename"; printf "%s\\n" "./$filename"'
    )
    assert cluster.contents(f"{bucket}/n/") == {f"{name}/{name}": b"data\n"}
    cluster.s4("map-from-n", f"{bucket}/in/", f"{bucket}/from/", 'while IFS= read -r p; do cat "$p"; done')
    assert list(cluster.contents(f"{bucket}/from/").values()) == [b"data\n"]


@pytest.mark.parametrize("command", ["", " \n", "echo a\0b"])
def test_an_empty_command_or_one_with_nul_is_400(cluster: Cluster, bucket: str, command: str) -> None:
    cluster.put(f"{bucket}/in/000")
    with cluster.nothing_changes():
        node = cluster.owner("000")
        assert node.post("/eval", key=f"{bucket}/in/000", body=command.encode()).status == 400
        for job in JOBS:
            body = {"cmd": command, "indir": f"{bucket}/in/", "outdir": f"{bucket}/out/"}
            assert node.post_json(f"/{job}", body).status == 400


def test_raw_eval_answers_stdout_then_stderr_whatever_the_exit_code(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/000", b"\0\xff")
    command = b"cat; printf problem >&2; exit 7"
    answer = cluster.nodes[0].post("/eval", key=f"{bucket}/000", raw="true", body=command)
    assert (answer.status, answer.body) == (400, b"\0\xffproblem")
    answer = cluster.nodes[0].post("/eval", key=f"{bucket}/000", raw="true", body=b"cat; echo e >&2")
    assert (answer.status, answer.body) == (200, b"\0\xffe\n")


@pytest.mark.parametrize(
    "command",
    [
        "echo x > 0; echo 0; echo 0",
        "mkdir a; echo x > a/0; echo y > 0; echo 0; echo a/0",
        "echo x > 0; ln -s 0 1; ls",
    ],
)
def test_two_printed_paths_of_one_name_or_file_fail_the_job(
    cluster: Cluster, bucket: str, command: str
) -> None:
    cluster.put(f"{bucket}/in/000")
    line = cluster.fails("map-to-n", f"{bucket}/in/", f"{bucket}/out/", command, code=1)
    assert f"{bucket}/in/000" in line and str(cluster.nodes[0]) in line
    assert cluster.keys(f"{bucket}/out/") == []


def test_commands_of_jobs_arrive_as_typed(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000")
    quotes = b"echo \"it's\" '\"' \\\\\nprintf '\xff\xfe' # " + b"x" * 60_000
    cluster.s4("map", f"{bucket}/in/".encode(), f"{bucket}/out/".encode(), quotes)
    assert cluster.contents(f"{bucket}/out/") == {"000": b"it's \" \\\n\xff\xfe"}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("folders", [("in", "out/"), ("in/", "out"), ("in/", "in/x/")])
def test_a_node_refuses_folders_by_itself(
    cluster: Cluster, bucket: str, job: str, folders: tuple[str, str]
) -> None:
    cluster.put(f"{bucket}/in/000")
    indir, outdir = folders
    with cluster.nothing_changes():
        for name in ("outdir", "outidr"):
            body = {"cmd": "cat", "indir": f"{bucket}/{indir}", name: f"{bucket}/{outdir}"}
            answer = cluster.nodes[0].post(f"/{job}", body=json.dumps(body).encode())
            assert answer.status == 400, answer


def test_nothing_temporary_is_left_after_successes_and_failures(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{i:03}": b"x" for i in range(6)})
    for command in ("mkdir d; echo x > d/f; ls -d d > l", "echo x > f; exit 3", "no-such-command"):
        cluster.run("eval", f"{bucket}/in/000", command)
        for i, job in enumerate(("map", "map-to-n", "map-from-n")):
            cluster.run(job, f"{bucket}/in/", f"{bucket}/out{i}/", command)
    for node in cluster.nodes:
        node.check()


def test_a_command_that_puts_a_link_in_the_place_of_its_folder_harms_nothing(
    cluster: Cluster, bucket: str
) -> None:
    precious = cluster.work / f"precious-{bucket[5:]}"
    precious.mkdir()
    (precious / "file").write_text("stays")
    cluster.put_all({f"{bucket}/in/{i:03}": b"" for i in range(12)})
    command = f'here=$PWD; cd ..; rmdir "$here"; ln -s {precious} "$here"'
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", command)
    assert (precious / "file").read_text() == "stays"
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/again/", '[ -z "$(ls -A)" ] && pwd -P && touch left')
    assert not [path for path in precious.iterdir() if path.name != "file"]


@pytest.mark.parametrize("kind", ["map", "map-to-n", "map-from-n"])
def test_a_command_that_closes_its_standard_files_spoils_none_for_the_next(
    start_cluster: Callable[..., Cluster], kind: str
) -> None:
    cluster = start_cluster(1, ["--max-cpu-jobs", "1"])
    cluster.put_all({f"s4://b/in/{i:03}": b"" for i in range(4)})
    command = "echo noise >&2; echo x > file; chmod 0 /dev/stderr"
    if kind != "map":
        command += '; rm -f "$(readlink /proc/$BASHPID/fd/2)"'
    cluster.s4(kind, "s4://b/in/", "s4://b/out/", command)
    cluster.s4(kind, "s4://b/in/", "s4://b/again/", "xargs -r cat; ls")


OUT, ERR = (f"p=$BASHPID; e=$(readlink /proc/$p/fd/{fd})" for fd in (1, 2))
TAMPERING = {
    "the folder of the worker is removed": f'{ERR}; rm -r "$(dirname $e)"; echo x',
    "a stranger in the folder": f'{ERR}; touch "$(dirname $e)/arriving" "$(dirname $e)/stranger"',
    "the job file is linked": f'{ERR}; ln "$(dirname $e)/job" x; chmod 0 x',
    "stderr is a fifo": f"{ERR}; rm $e; mkfifo $e; sleep 7300",
    "stderr is a folder": f"{ERR}; rm $e; mkdir $e; sleep 7300",
    "stderr is a link to itself": f"{ERR}; rm $e; ln -s $e $e; sleep 7300",
    "stdout is a fifo": f"{OUT}; rm $e; mkfifo $e; echo hi",
    "a process with a strange name": "cp \"$(type -P sleep)\" 'VmHWM:a'; './VmHWM:a' 0.3",
    "the shell is given another answer": "setsid sleep 7300 & echo junk > /proc/$$/fd/1; sleep 7300",
    "stdout is a folder": f"{OUT}; rm $e; mkdir -p $e/x; echo hi",
    "a deep folder": "for i in {1..2000}; do mkdir d; cd d; done; echo x > file",
    "folders that nobody may enter": "mkdir -p a/b; echo secret > a/b/left; chmod 0 a/b a",
}


@pytest.mark.parametrize("kind", ["eval", "map", "map-to-n"])
@pytest.mark.parametrize("what", TAMPERING)
def test_what_a_command_does_to_the_files_of_its_worker_costs_only_itself(
    one_slot: Cluster, bucket: str, what: str, kind: str
) -> None:
    key = f"{bucket}/in/000"
    one_slot.put(key, b"data")
    place = [key] if kind == "eval" else [f"{bucket}/in/", f"{bucket}/out/"]
    command = f"echo before >&2; {TAMPERING[what]}"
    one_slot.run(kind, *place, command, env={"S4_TIMEOUT": "1"}, timeout=20)
    for i in range(6):  # whichever worker it is
        result = one_slot.s4("eval", key, "cat; ls -A; echo noise >&2")
        assert (result.out, result.err) == (b"data", "noise\n")
        one_slot.put(f"{bucket}/more/{i:03}", b"more")
    eventually(lambda: not procs.running("sleep\x007300"), 5)
    one_slot.nodes[0].check()
    assert "Traceback" not in one_slot.nodes[0].log


@pytest.mark.parametrize(
    ("body", "prefix"),
    [
        ("", "s4://b/out/"),
        ("{}", "s4://b/out/"),
        ('[["x", "job"]]', "s4://b/out/"),
        ('[["x", "bad id", 1]]', "s4://b/out/"),
        ('[["x", "job", 1e30]]', "s4://b/out/"),
        ('[["x", "job", 1000000000000000000000000000000]]', "s4://b/out/"),
        ('[["\\ud800", "job", 1]]', "s4://b/out/"),
        ('[["..", "job", 1]]', "s4://b/out/"),
        ('[["x", "job", 1]]', "s4://b/out"),
    ],
)
def test_a_bad_request_to_remove_outputs_is_400(one_slot: Cluster, body: str, prefix: str) -> None:
    node = one_slot.nodes[0]
    assert node.post("/remove_outputs", body=body.encode(), prefix=prefix).status == 400
    assert node.get("/outputs", prefix="s4://b/out").status == node.get("/outputs").status == 400
    assert node.get("/jobs", prefix="\udcff").status == 400
    assert "Traceback" not in node.log


def test_an_output_that_is_another_name_of_stderr_stays_as_it_is(one_slot: Cluster, bucket: str) -> None:
    one_slot.put_all({f"{bucket}/in/{i:03}": b"" for i in range(3)})
    command = f"echo noise >&2; {ERR}; ln $e out; echo out"
    one_slot.s4("map-to-n", f"{bucket}/in/", f"{bucket}/out/", command)
    assert set(one_slot.contents(f"{bucket}/out/").values()) == {b"noise\n"}
    one_slot.nodes[0].check()


@pytest.mark.parametrize(
    "data", ["head -c 3000000 /dev/urandom | tr -d '\\n'", "head -c 20000000 /dev/zero | tr '\\0' '\\n'"]
)
def test_data_in_place_of_names_is_one_short_line(one_slot: Cluster, bucket: str, data: str) -> None:
    one_slot.put(f"{bucket}/in/000", b"x")
    error = one_slot.fails("map-to-n", f"{bucket}/in/", f"{bucket}/out/", data, says="it printed", code=1)
    assert len(error) < 2000


def test_an_input_that_goes_while_its_command_waits_fails_that_task_alone(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(1, ["--max-cpu-jobs", "1"])
    keys = {f"s4://b/in/{i:03}": f"data{i}".encode() for i in range(4)}
    cluster.put_all(keys)
    started = cluster.work / "started"
    command = f"touch {started}; while [ $filename = 000 ] && [ -e {started} ]; do sleep 0.01; done; cat"
    client = cluster.start_s4("map", "s4://b/in/", "s4://b/out/", command, "--keep-going")
    eventually(started.exists, 10)
    cluster.nodes[0].path_of("s4://b/in/001").unlink()
    started.unlink()
    _out, err = client.communicate(timeout=20)
    assert client.returncode == 1 and b"s4://b/in/001" in err and b"No such file" in err, err
    # What it left in the shell must not be taken for the end of a later command.
    left = {key: data for key, data in keys.items() if key != "s4://b/in/001"}
    cluster.s4("rm", "s4://b/in/001")
    for again in ("x", "y"):
        cluster.s4("map", "s4://b/in/", f"s4://b/{again}/", "cat")
        assert cluster.contents(f"s4://b/{again}/") == {key[-3:]: data for key, data in left.items()}
    assert "no such key" in cluster.fails("eval", "s4://b/in/001", "cat", code=1)


def test_tasks_that_are_tried_again_keep_no_others_from_running(one_slot: Cluster) -> None:
    bucket = one_slot.fresh_bucket()
    one_slot.put_all({f"{bucket}/in/{i:03}": b"x" for i in range(6)})
    one_slot.s4(
        "map", f"{bucket}/in/", f"{bucket}/out/", '[ "$S4_ATTEMPT" = 2 ]; cat', "--retries", "1", timeout=30
    )
    assert len(one_slot.keys(f"{bucket}/out/")) == 6


def test_commands_that_wait_for_a_slot_do_not_count_as_running(one_slot: Cluster) -> None:
    bucket = one_slot.fresh_bucket()
    one_slot.put_all({f"{bucket}/in/{i:03}": b"x" for i in range(4)})
    job = one_slot.s4("map", f"{bucket}/in/", f"{bucket}/out/", "sleep 7200.8", "--detach").lines[0]
    eventually(lambda: procs.running("sleep\x007200.8\0"), 10, "the first runs")
    assert one_slot.nodes[0].get("/job", job=job).json()["running"] == 1
    one_slot.s4("cancel", job)


def test_of_two_evals_with_one_id_one_runs(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, ["--max-cpu-jobs", "1"])
    cluster.put("s4://b/000", b"x")
    node = cluster.nodes[0]
    go = cluster.work / "go"
    blocker = cluster.start_s4("eval", "s4://b/000", f"while [ ! -e {go} ]; do sleep 0.01; done")
    eventually(lambda: node.get("/jobs").json(), 10)
    with ThreadPoolExecutor() as pool:
        ask = partial(node.post, "/eval", key="s4://b/000", job="one0one0one0", body=b"cat")
        both = [pool.submit(ask) for _ in range(2)]
        assert eventually(lambda: [f for f in both if f.done()], 10)
        go.touch()
        statuses = sorted(future.result().status for future in both)
    assert statuses == [200, 409] and blocker.wait(10) == 0
    assert {share["state"] for share in node.get("/jobs").json()} == {"done"}
    for _ in range(20):  # more often than evals may run at once
        again = ask(timeout=5)
        assert (again.status, again.text) == (409, "job one0one0one0 ran already")
    assert cluster.s4("eval", "s4://b/000", "cat").out == b"x"
    assert "Traceback" not in node.log


def test_the_end_of_a_job_leaves_alone_another_whose_id_begins_like_it(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    cluster.put(f"{bucket}/in/000", b"data")
    node, go, job = cluster.owner("000"), folder / "go", f"like-{bucket[5:]}"

    def post(job: str, outdir: str, cmd: str, **more: object) -> int:
        body = {"job": job, "cmd": cmd, "indir": f"{bucket}/in/", "outdir": f"{bucket}/{outdir}/", **more}
        return node.post_json("/map", body).status

    waits = f"until [ -e {go} ]; do sleep 0.02; done; cat > copy; cat copy"
    assert post(f"{job}-more", "more", waits, detach=True) == 200
    eventually(lambda: node.get("/job", job=f"{job}-more").json()["running"] == 1, 10)
    assert post(job, "out", "cat") == 200
    go.touch()
    eventually(lambda: node.get("/job", job=f"{job}-more", wait="1").json()["state"] != "running", 10)
    assert cluster.contents(f"{bucket}/more/") == {"000": b"data"}


# Workers and commands of a node that root runs do without its right to read and write everything: they are
# started by an exec, which takes what is dropped here.
UNPRIVILEGED_WORKERS = """
import ctypes
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
"""


def test_a_command_may_close_what_it_made(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, start=False)
    cluster.nodes[0].start(first=UNPRIVILEGED_WORKERS)
    cluster.put("s4://b/in/000")
    probe = cluster.run("eval", "s4://b/in/000", "mkdir d; chmod 0500 d; touch d/x")
    assert probe.code == 1 and "Permission denied" in probe.err  # modes count
    command = "mkdir d; echo x > d/part; chmod 0 d/part; chmod 0500 d; echo d/part"
    cluster.s4("map-to-n", "s4://b/in/", "s4://b/out/", command)
    assert cluster.contents("s4://b/out/") == {"000/part": b"x\n"}


def test_a_folder_whose_mode_a_command_changed_is_not_given_to_the_next(
    cluster: Cluster, bucket: str
) -> None:
    key = f"{bucket}/000"
    cluster.put(key)
    for command, said in ((b"chmod 777 .", ""), (b"stat -c %a .", "700\n")):
        for _ in range(8):  # so that each worker that is free has one
            assert cluster.owner(key).post("/eval", key=key, body=command).text == said
