"""Jobs while workers, nodes and clients are killed; and that nothing of a job outlives it."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import procs
import pytest
from cluster import Answer, Cluster, Node
from procs import eventually

KEYS = 200
# Each task leaves a mark that tells how often it ran, then takes a moment.
MARKED = 'echo "$S4_NODE" >> {marks}/$filename; sleep 0.05; cat; echo "$filename"'


def _put(cluster: Cluster, folder: str, count: int) -> None:
    files = cluster.work / "files"
    files.mkdir(exist_ok=True)
    for i in range(count):
        (files / f"{i:03}").write_text(f"{i}\n" * 3)
    cluster.s4("cp", "-r", f"{files}/", folder)


def _marks(cluster: Cluster) -> dict[str, int]:
    """How often the command ran for each key."""
    return {file.name: len(file.read_text().splitlines()) for file in (cluster.work / "marks").iterdir()}


def _marked(cluster: Cluster) -> str:
    marks = cluster.work / "marks"
    marks.mkdir(exist_ok=True)
    return MARKED.format(marks=marks)


def _state(node: Node, job: str) -> dict[str, Any]:
    share: dict[str, Any] = node.get("/job", job=job).json()
    return share


def _running_on(node: Node, text: str) -> list[procs.Process]:
    return [process for process in procs.descendants(node.pid) if text in process.command]


def _runs(node: Node, text: str, count: int) -> bool:
    return len(_running_on(node, text)) >= count


def _mark(cluster: Cluster) -> str:
    """The beginning of a command that leaves a file for each task that has begun."""
    marks = cluster.work / "begun"
    marks.mkdir(exist_ok=True)
    return f"touch {marks}/$filename; "


def _begun(cluster: Cluster, nodes: int) -> bool:
    """Whether a command with such a mark has begun on so many nodes, for keys with numbers as NAMEs."""
    owners = {str(cluster.owner(path.name)) for path in (cluster.work / "begun").iterdir()}
    return len(owners) >= nodes


def _is_followed(node: Node, job: str) -> bool:
    """Whether a client has heard from a node how far a job is: it asks again."""
    return node.log.count(f" GET /job?job={job}&") >= 2


def _is_tidy(node: Node) -> bool:
    return not node.temporary()


def _job_of(process: "subprocess.Popen[bytes]", cluster: Cluster) -> str:
    """The id of the newest job."""
    newest = eventually(lambda: cluster.nodes[0].get("/jobs", limit=1).json(), 10)
    return str(newest[0]["id"])


@pytest.fixture
def three(start_cluster: Callable[..., Cluster]) -> Cluster:
    return start_cluster(3)


@pytest.mark.parametrize("kind", ["map", "map-to-n"])
def test_a_node_killed_in_the_middle_costs_only_what_it_ran(three: Cluster, kind: str) -> None:
    _put(three, "s4://b/in/", KEYS)
    command = _marked(three)
    if kind == "map-to-n":
        command = f"({command}) > own; split -l 1 -d -a 2 own p; ls p*; echo own"
    three.s4(kind, "s4://b/in/", "s4://b/undisturbed/", command, timeout=120)
    undisturbed = three.contents("s4://b/undisturbed/")
    before = _marks(three)
    assert set(before.values()) == {1}

    client = three.start_s4(kind, "s4://b/in/", "s4://b/out/", command)
    job = ""

    def in_the_middle() -> bool:
        nonlocal job
        shares = [s for s in three.nodes[1].get("/jobs", limit=1).json() if s["outdir"] == "s4://b/out/"]
        job = shares[0]["id"] if shares else ""
        # Recorded ones: outputs of many tasks arrive together, and are told of just before they are recorded.
        query = "select count(*) from tasks where job = ? and state = 'done'"
        [(done,)] = three.nodes[1].rows(query, job)
        return done in range(11, 50)

    eventually(in_the_middle, 20)
    three.nodes[1].kill()
    killed = time.monotonic()
    _out, err = client.communicate(timeout=30)
    assert time.monotonic() - killed < 15
    assert client.returncode == 3, err
    said = err.decode()
    assert str(three.nodes[1]) in said and "lost" in said and "Traceback" not in said

    three.nodes[1].start()
    share = _state(three.nodes[1], job)
    assert share["state"] == "interrupted" and 10 < share["done"] < 66
    done = {
        task["input"].rpartition("/")[2]
        for node in three.nodes
        for task in node.get("/tasks", job=job, state="done").json()
    }
    marks = _marks(three)
    three.s4("retry", job[:10], timeout=120)
    assert three.contents("s4://b/out/") == undisturbed
    again = {name for name, count in _marks(three).items() if count > marks.get(name, 0)}
    assert again == set(before) - done
    states = {_state(node, job)["state"] for node in three.nodes}
    assert states == {"done"}
    assert {s for n in three.nodes for (s,) in n.rows("select state from tasks where job = ?", job)} == {
        "done"
    }
    assert "nothing" in three.s4("retry", job, timeout=60).err


@pytest.mark.parametrize("options", ["", "--keep-going", "--keep-going --quiet", "--keep-going --json"])
def test_a_node_that_is_stopped_in_a_job_is_told_as_lost(three: Cluster, options: str) -> None:
    _put(three, "s4://b/in/", 30)
    hold = three.work / "hold"
    hold.touch()
    command = f"{_mark(three)}while [ -e {hold} ]; do sleep 0.02; done; cat"
    client = three.start_s4("map", "s4://b/in/", "s4://b/out/", command, "--timeout", "20", *options.split())
    eventually(lambda: _begun(three, 3), 20)
    job = _job_of(client, three)
    eventually(lambda: _is_followed(three.nodes[1], job), 20)
    three.nodes[1].terminate()
    assert client.stderr is not None
    said = b""
    while options and b"are lost" not in said:  # it is told at once, while the others still work
        line = client.stderr.readline()
        assert line, said
        said += line
    hold.unlink()
    said += client.communicate(timeout=20)[1]
    assert client.returncode == 3, said
    assert str(three.nodes[1]).encode() in said and b"10 of its 10 tasks are lost" in said, said
    three.nodes[1].start()
    three.s4("retry", job)
    assert len(three.keys("s4://b/out/")) == 30


def test_an_interrupt_says_which_node_could_not_be_told(three: Cluster) -> None:
    _put(three, "s4://b/in/", 6)
    client = three.start_s4("map", "s4://b/in/", "s4://b/out/", "sleep 7200.5")
    eventually(lambda: all(_running_on(node, "sleep\x007200.5") for node in three.nodes), 20)
    job = _job_of(client, three)
    os.kill(three.nodes[2].pid, signal.SIGSTOP)
    try:
        client.send_signal(signal.SIGINT)
        _out, err = client.communicate(timeout=40)
    finally:
        os.kill(three.nodes[2].pid, signal.SIGCONT)
    assert client.returncode == 130 and b"not everywhere" in err and str(three.nodes[2]).encode() in err, err
    three.run("cancel", job)
    eventually(lambda: not procs.running("sleep\x007200.5"), 5)


def _index(node: Node) -> sqlite3.Connection:
    return sqlite3.connect(node.data / "_index" / "node.db", isolation_level=None)


def _rename_table(node: Node, table: str, to: str) -> None:
    with contextlib.closing(_index(node)) as index:
        index.execute(f"ALTER TABLE {table} RENAME TO {to}")


def test_the_end_of_an_eval_that_cannot_be_recorded_is_recorded_later(three: Cluster) -> None:
    three.put("s4://b/000", b"data")
    node = three.owner("s4://b/000")
    hold = three.work / "hold"
    hold.touch()
    command = f"{_mark(three)}while [ -e {hold} ]; do sleep 0.02; done; cat"
    client = three.start_s4("eval", "s4://b/000", command)
    eventually(lambda: _begun(three, 1), 20)
    # Until its command has ended nothing more of it is to be recorded.
    eventually(lambda: node.rows("select listed from jobs where kind = 'eval'") == [(1,)], 10)
    _rename_table(node, "jobs", "gone")
    hold.unlink()
    assert client.communicate(timeout=20) == (b"data", b"") and client.returncode == 0
    _rename_table(node, "gone", "jobs")
    eventually(lambda: node.rows("select state from jobs where kind = 'eval'") == [("done",)], 10)


def test_what_a_start_on_a_full_disk_cannot_record_is_recorded_later(
    start_cluster: Callable[..., Cluster],
) -> None:
    (node,) = start_cluster(1).nodes
    assert node.put("s4://b/in/000", b"x").status == 200
    body = {"cmd": "sleep 7200.7", "indir": "s4://b/in/", "outdir": "s4://b/out/", "detach": True}
    assert node.post_json("/map", body).status == 200
    node.kill()
    node.start(
        first="""if True:
            from s4.errors import FullDiskError
            from s4.index import JobIndex
            interrupt, failures = JobIndex.interrupt, [1, 2]
            def fails(index, job):
                if failures:
                    failures.pop()
                    raise FullDiskError("no room")
                return interrupt(index, job)
            JobIndex.interrupt = fails
        """
    )
    eventually(lambda: node.rows("select state from jobs") == [("interrupted",)], 10, "it is recorded")


def test_an_end_that_cannot_be_recorded_is_recorded_later(three: Cluster) -> None:
    _put(three, "s4://b/in/", 30)
    hold = three.work / "hold"
    hold.touch()
    command = f"[ ! -e {hold} ] || sleep 7200.6; cat"
    client = three.start_s4("map", "s4://b/in/", "s4://b/out/", command)
    eventually(lambda: all(_running_on(node, "sleep\x007200.6") for node in three.nodes), 20)
    job = _job_of(client, three)
    broken = three.nodes[1]
    _rename_table(broken, "jobs", "gone")
    _out, err = client.communicate(timeout=30)
    assert client.returncode == 1 and f"failed: {broken}: the index" in err.decode(), err
    eventually(lambda: not procs.running("sleep\x007200.6"), 10)
    assert _state(broken, job)["state"] == "failed"
    _rename_table(broken, "gone", "jobs")
    hold.unlink()
    eventually(lambda: broken.rows("select state from jobs where id = ?", job) == [("failed",)], 10)
    three.s4("retry", job)
    assert three.contents("s4://b/out/") == three.contents("s4://b/in/")


def test_waiting_for_a_job_that_not_all_nodes_have_got_lets_it_run(three: Cluster) -> None:
    _put(three, "s4://b/in/", 3)
    hold = three.work / "hold"
    hold.touch()
    command = f"{_mark(three)}while [ -e {hold} ]; do sleep 0.02; done; cat"
    job = {"job": "some", "cmd": command, "indir": "s4://b/in/", "outdir": "s4://b/out/", "detach": True}
    assert three.nodes[0].post_json("/map", job).status == 200
    waiting = three.start_s4("wait", "some", "--json")
    # Both nodes that have nothing of it were asked twice, and so are taken to be without.
    eventually(lambda: all(node.log.count("GET /job?job=some") >= 2 for node in three.nodes[1:]), 20)
    time.sleep(1)  # in which it could be cancelled
    assert _state(three.nodes[0], "some")["state"] == "running"
    hold.unlink()
    out, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 1 and "missing" in err.decode(), err
    assert [part["state"] for part in json.loads(out)["nodes"]] == ["done", "missing", "missing"]
    assert three.keys("s4://b/out/") == ["s4://b/out/000"]


def test_a_job_that_ended_without_a_record_of_it_does_not_overlap(three: Cluster) -> None:
    _put(three, "s4://b/in/", 3)
    arguments = ["map", "s4://b/in/", "s4://b/out/", "cat", "--no-overlap"]
    for node in three.nodes:
        with contextlib.closing(_index(node)) as db:
            db.execute(
                "create trigger full before update of finished_s on jobs"
                " begin select raise(abort, 'no room'); end"
            )
    three.s4(*arguments)
    assert all("its end is not recorded: " in node.log for node in three.nodes)
    again = three.run(*arguments)
    assert again.code == 1 and "is still running" not in again.err and "key exists already" in again.err
    for node in three.nodes:
        with contextlib.closing(_index(node)) as db:
            db.execute("drop trigger full")
        eventually(lambda node=node: node.rows("select 1 from jobs where finished_s is null") == [], 10)  # type: ignore[misc]


def test_a_job_that_one_node_refuses_ends_on_all(three: Cluster) -> None:
    _put(three, "s4://b/in/", 9)
    refusing = three.nodes[1]
    _rename_table(refusing, "jobs", "gone")
    refused = three.run("map", "s4://b/in/", "s4://b/out/", "sleep 7200.7; cat", timeout=30)
    _rename_table(refusing, "gone", "jobs")
    assert refused.code == 1 and "no such table" in refused.fatal
    eventually(lambda: not procs.running("sleep\x007200.7"), 10)
    for node in (three.nodes[0], three.nodes[2]):
        assert [state for (state,) in node.rows("select state from jobs")] in ([], ["cancelled"])
    assert refusing.rows("select * from jobs") == []


def test_with_keep_going_the_other_nodes_finish(three: Cluster) -> None:
    _put(three, "s4://b/in/", 60)
    client = three.start_s4("map", "s4://b/in/", "s4://b/out/", "sleep 0.3; cat", "--keep-going")
    eventually(lambda: _running_on(three.nodes[2], "sleep\x000.3"), 20)
    job = _job_of(client, three)
    three.nodes[2].kill()
    _out, err = client.communicate(timeout=60)
    assert client.returncode == 3 and str(three.nodes[2]) in err.decode(), err
    assert [_state(node, job)["state"] for node in three.nodes[:2]] == ["done", "done"]
    three.nodes[2].start()
    three.s4("retry", job, timeout=60)
    assert len(three.keys("s4://b/out/")) == 60


def test_the_time_limit_of_a_task_is_not_one_for_sending_what_it_made(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(2, ["--max-io-jobs", "1"])
    cluster.put("s4://b/in/000", b"x")
    cluster.nodes[1].prepare_put("s4://b/001")  # never sent: it holds the one slot for five seconds
    cluster.s4(
        "map-to-n", "s4://b/in/", "s4://b/out/", "echo x > 001; echo 001", "--timeout", "1", timeout=60
    )
    assert cluster.contents("s4://b/out/") == {"000/001": b"x\n"}


def test_a_stream_of_evals_does_not_keep_a_job_waiting(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, ["--max-cpu-jobs", "2"])
    cluster.put_all({f"s4://b/in/{i}": b"x" for i in range(3)})
    stop, log = cluster.work / "stop", cluster.work / "log"
    log.touch()
    loop = f"while [ ! -e {stop} ]; do s4 eval s4://b/in/0 'echo >> {log}; sleep 0.2'; done"
    loops = [subprocess.Popen(["bash", "-c", loop], env=cluster.env) for _ in range(6)]
    try:
        eventually(lambda: log.stat().st_size > 6, 20, "one loop at least is in its second eval")
        cluster.s4("map", "s4://b/in/", "s4://b/out/", "cat", timeout=10)
    finally:
        stop.touch()
        assert [process.wait(30) for process in loops] == [0] * 6


def test_jobs_and_job_agree_while_a_node_is_down_or_silent(three: Cluster) -> None:
    _put(three, "s4://b/in/", 30)
    three.s4("map", "s4://b/in/", "s4://b/done/", "cat")
    client = three.start_s4("map", "s4://b/in/", "s4://b/out/", "sleep 0.3; cat")
    eventually(lambda: _running_on(three.nodes[2], "sleep\x000.3"), 20)
    three.nodes[2].kill()
    assert client.wait(60) == 3

    def states() -> dict[str, str]:
        listed = three.run("jobs", "--json", timeout=60)
        assert listed.code == 3 and str(three.nodes[2]) in listed.err
        return {job["job"]: job["state"] for job in json.loads(listed.out)}

    down = states()
    assert list(down.values()) == ["cancelled", "unknown"]
    assert {job: json.loads(three.run("job", job, "--json").out)["state"] for job in down} == down
    three.nodes[2].start()
    os.kill(three.nodes[2].pid, signal.SIGSTOP)
    try:
        assert states() == down
    finally:
        os.kill(three.nodes[2].pid, signal.SIGCONT)


def test_a_node_stopped_by_sigterm_leaves_its_share_interrupted(three: Cluster) -> None:
    _put(three, "s4://b/in/", 30)
    job = three.s4("map", "s4://b/in/", "s4://b/out/", "sleep 0.5; cat", "--detach", "--keep-going").lines[0]
    eventually(lambda: _running_on(three.nodes[0], "sleep\x000.5"), 10)
    assert three.nodes[0].terminate() == 0
    three.nodes[0].start()
    share = _state(three.nodes[0], job)
    assert share["state"] == "interrupted" and share["error"] == "the node stopped"
    assert share["done"] + share["failed"] + share["cancelled"] == share["tasks"] == 10
    three.run("wait", job)
    three.s4("retry", job)
    assert len(three.keys("s4://b/out/")) == 30


def test_a_killed_worker_costs_one_attempt(three: Cluster) -> None:
    three.put("s4://b/in/000", b"x")
    command = 'if [ "$S4_ATTEMPT" = 1 ]; then sleep 979; fi; cat; echo "$S4_ATTEMPT"'
    client = three.start_s4("map", "s4://b/in/", "s4://b/out/", command, "--retries", "1")
    [sleeping] = eventually(lambda: _running_on(three.nodes[0], "sleep\x00979"), 20)
    os.kill(three.nodes[0].worker_of(sleeping.pid), signal.SIGKILL)
    _out, err = client.communicate(timeout=30)
    assert client.returncode == 0, err
    assert three.get("s4://b/out/000") == b"x2\n"
    assert three.nodes[0].rows("select attempt, state from tasks") == [(2, "done")]
    client = three.start_s4("map", "s4://b/in/", "s4://b/out2/", "sleep 979")
    [sleeping] = eventually(lambda: _running_on(three.nodes[0], "sleep\x00979"), 20)
    os.kill(three.nodes[0].worker_of(sleeping.pid), signal.SIGKILL)
    _out, err = client.communicate(timeout=30)
    assert client.returncode == 1 and "worker process" in err.decode() and "signal 9" in err.decode()
    eventually(lambda: not procs.running("sleep\x00979"), 5)


def test_a_job_outlives_its_client_and_wait_picks_it_up(three: Cluster) -> None:
    _put(three, "s4://b/in/", 30)
    client = three.start_s4("map", "s4://b/in/", "s4://b/out/", "sleep 0.2; cat")
    # It is submitted everywhere, not only to the first.
    eventually(lambda: all(node.get("/jobs").json() for node in three.nodes), 20)
    job = _job_of(client, three)
    client.kill()
    client.wait()
    assert three.run("wait", job).code == 0
    assert len(three.keys("s4://b/out/")) == 30
    assert three.run("wait", job).code == 0


def test_ctrl_c_cancels_the_job_on_all_nodes(three: Cluster) -> None:
    _put(three, "s4://b/in/", 30)
    client = three.start_s4("map", "s4://b/in/", "s4://b/out/", "setsid sleep 987 & sleep 987")
    for node in three.nodes:
        eventually(partial(_runs, node, "sleep\0987", 4), 20)
    job = _job_of(client, three)
    client.send_signal(signal.SIGINT)
    _out, err = client.communicate(timeout=5)
    assert client.returncode == 130
    assert "cancel" in err.decode() and job in err.decode()
    eventually(lambda: not procs.running("sleep\0987"), 5)
    for node in three.nodes:
        assert _state(node, job)["state"] == "cancelled"
        eventually(partial(_is_tidy, node), 5)


def test_a_second_ctrl_c_leaves_at_once(three: Cluster) -> None:
    _put(three, "s4://b/in/", 3)
    client = three.start_s4("map", "s4://b/in/", "s4://b/out/", "sleep 986")
    eventually(lambda: _running_on(three.nodes[0], "sleep\0986"), 20)
    os.kill(three.nodes[0].pid, signal.SIGSTOP)
    try:
        client.send_signal(signal.SIGINT)
        assert client.stderr is not None
        said = iter(client.stderr.readline, b"")
        assert any(b"cancelling job" in line for line in said)  # the first has arrived
        assert client.poll() is None
        client.send_signal(signal.SIGINT)
        assert client.wait(2) == 130
    finally:
        os.kill(three.nodes[0].pid, signal.SIGCONT)
    three.run("cancel", _job_of(client, three))
    eventually(lambda: not procs.running("sleep\0986"), 5)


def test_the_failure_of_a_detached_job_stops_it_on_all_nodes(three: Cluster) -> None:
    _put(three, "s4://b/in/", 30)
    command = 'if [ "$filename" = 000 ]; then sleep 1; exit 5; fi; sleep 985'
    job = three.s4("map", "s4://b/in/", "s4://b/out/", command, "--detach").lines[0]
    eventually(lambda: _running_on(three.nodes[1], "sleep\0985"), 10)
    eventually(lambda: not procs.running("sleep\0985"), 10)
    waited = three.run("wait", job)
    assert waited.code == 1 and "exit code 5" in waited.err
    assert [_state(node, job)["state"] for node in three.nodes] == ["failed", "cancelled", "cancelled"]
    assert all(not node.temporary() for node in three.nodes)


def test_a_timeout_leaves_nothing_running(three: Cluster) -> None:
    _put(three, "s4://b/in/", 6)
    arguments = ["s4://b/in/", "s4://b/out/", "setsid sleep 984 & sleep 984", "--timeout", "0.5"]
    failed = three.run("map", *arguments)
    assert failed.code == 1 and "time limit of 0.5 s" in failed.err
    eventually(lambda: not procs.running("sleep\0984"), 5)


def test_a_node_that_never_got_the_job_runs_its_share_at_the_retry(three: Cluster) -> None:
    _put(three, "s4://b/in/", 30)
    job = "never-got-it"
    body = {"cmd": "cat", "indir": "s4://b/in/", "outdir": "s4://b/out/", "job": job}
    for node in three.nodes[:2]:
        assert node.post_json("/map", body).status == 200
    assert len(three.keys("s4://b/out/")) == 20
    waited = three.run("wait", job)
    assert waited.code != 0 and str(three.nodes[2]) in waited.err
    three.s4("retry", job)
    assert len(three.keys("s4://b/out/")) == 30


def test_small_jobs_do_not_wait_behind_large_ones(three: Cluster) -> None:
    _put(three, "s4://b/in/", KEYS)
    three.put_all({f"s4://b/few/{i}": b"" for i in range(3)})
    job = three.s4("map", "s4://b/in/", "s4://b/out/", "sleep 0.5", "--detach").lines[0]
    eventually(lambda: all(_running_on(node, "sleep\x000.5") for node in three.nodes), 10)
    began = time.monotonic()
    three.s4("map", "s4://b/few/", "s4://b/out2/", "true")
    assert time.monotonic() - began < 4  # the large one takes at least eight
    assert _state(three.nodes[0], job)["state"] == "running"
    three.s4("cancel", job)


def test_more_jobs_than_may_run_are_told_to_come_back(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    node.start(first="import s4.jobs; s4.jobs.MAX_RUNNING = 2")
    cluster.put("s4://b/in/000", b"x")

    def post(job: str, path: str = "/map", command: str = "sleep 7200.8", **more: object) -> Answer:
        body = {"job": job, "cmd": command, "indir": "s4://b/in/", "outdir": f"s4://b/{job}/", **more}
        return node.post_json(path, body)

    assert post("failed", command="false").status == 400
    assert [post(job, detach=True).status for job in ("one", "two", "two")] == [200] * 3
    for refused in (
        post("three", detach=True),
        post("failed", "/retry", "false", kind="map", run=2),
        post("three", "/retry", kind="map", run=2),
    ):
        assert refused.status == 429 and "2 jobs are running" in refused.text, refused
        assert int(refused.headers["Retry-After"]) >= 1
    assert [job["id"] for job in node.get("/jobs", state="running").json()] == ["one", "two"]
    assert node.post("/cancel", job="one").status == 200
    assert post("three", detach=True).status == 200
    for job in ("two", "three"):
        assert node.post("/cancel", job=job).status == 200


def test_what_a_batch_of_outputs_finishes_is_recorded_at_once(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2, start=False)
    node, other = cluster.nodes
    node.start(first="import s4.shares; s4.shares.RECORD_SECONDS = 60")
    other.start()
    cluster.put_all({"s4://b/in/000": b"x", "s4://b/in/002": b"x"})
    command = "[ $filename = 000 ] || sleep 7200.9; echo x > 001; echo 001"
    body = {"job": "job", "cmd": command, "indir": "s4://b/in/", "outdir": "s4://b/out/", "detach": True}
    assert node.post_json("/map_to_n", body).status == 200
    done = "select input from tasks where state = 'done'"
    eventually(lambda: node.rows(done) == [("b/in/000",)], 20, "it is recorded, while the other runs")
    node.kill()
    node.start()
    assert node.rows(done) == [("b/in/000",)]
    assert other.fetch("s4://b/out/000/001") == b"x\n"
    assert _state(node, "job")["state"] == "interrupted"


def test_retries_count_attempts_and_stop_at_the_limit(three: Cluster) -> None:
    _put(three, "s4://b/in/", 3)
    (three.work / "tries").mkdir()
    command = f'echo "$S4_ATTEMPT" >> {three.work}/tries/$filename; [ "$S4_ATTEMPT" -ge 3 ]'
    three.s4("map", "s4://b/in/", "s4://b/out/", command, "--retries", "2")
    assert (three.work / "tries" / "001").read_text() == "1\n2\n3\n"
    failed = three.run("map", "s4://b/in/", "s4://b/out2/", command, "--retries", "1", "--keep-going")
    assert failed.code == 1
    assert (three.work / "tries" / "001").read_text() == "1\n2\n3\n1\n2\n"
    job = json.loads(three.s4("jobs", "--json").out)[0]["job"]
    three.s4("retry", job)
    assert (three.work / "tries" / "001").read_text() == "1\n2\n3\n1\n2\n3\n"


def test_a_shuffle_keeps_going_without_a_node_also_if_it_may_try_again(three: Cluster) -> None:
    _put(three, "s4://b/in/", 21)
    go = three.work / "go"
    command = f"""
        {_mark(three)}echo "$S4_ATTEMPT" >> {three.work}/tries.$filename
        while [ ! -e {go} ]; do sleep 0.01; done
        for name in 000 001 002; do
            [ "$filename" -lt 12 ] && [ $name = 002 ] || {{ echo > $name; echo $name; }}
        done"""
    options = ("--keep-going", "--retries", "1", "--json")
    client = three.start_s4("map-to-n", "s4://b/in/", "s4://b/out/", command, *options)
    eventually(lambda: _begun(three, 3), 20)
    job = _job_of(client, three)
    eventually(lambda: all(_is_followed(node, job) for node in three.nodes), 20)
    three.nodes[2].kill()
    go.touch()
    out, err = client.communicate(timeout=60)
    assert client.returncode == 3
    states = {part["node"]: part for part in json.loads(out)["nodes"]}
    for node in three.nodes[:2]:
        part = states[str(node)]
        assert (part["tasks"], part["done"], part["failed"], part["cancelled"]) == (7, 4, 3, 0), err
    for i in range(12, 21):
        if i % 3 != 2:
            assert f"failed: s4://b/in/{i:03} on" in err.decode()
            assert (three.work / f"tries.{i:03}").read_text() == "1\n"
    assert err.decode().count("not tried again, for its outputs cannot be removed") == 6
    three.nodes[2].start()
    three.s4("retry", job, timeout=60)
    assert len(three.keys("s4://b/out/")) == 12 * 2 + 9 * 3


def test_a_task_is_tried_again_although_most_of_its_outputs_never_left(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(2)
    cluster.put("s4://b/in/000", b"x")
    again, go = cluster.work / "again", cluster.work / "go"
    command = f"""
        [ "$S4_ATTEMPT" = 1 ] || touch {again}
        while [ -e {again} ] && [ ! -e {go} ]; do sleep 0.01; done
        seq 1 2 1999 | xargs touch; ls"""
    with contextlib.closing(_index(cluster.nodes[1])) as db:
        db.execute("create trigger full before insert on keys begin select raise(abort, 'no room'); end")
        arguments = ("map-to-n", "s4://b/in/", "s4://b/out/", command, "--retries", "1")
        client = cluster.start_s4(*arguments)
        eventually(lambda: again.exists() or client.poll() is not None, 20)
        db.execute("drop trigger full")
    go.touch()
    _out, err = client.communicate(timeout=60)
    assert client.returncode == 0 and b"1/1 tasks done" in err, err
    assert len(cluster.keys("s4://b/out/000/")) == 1000


def test_a_task_of_which_one_output_was_refused_is_not_done_when_the_others_arrive(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(3)
    cluster.put_all({"s4://b/in/000": b"x", "s4://b/out/000/001": b"somebody else"})
    body = {"cmd": "touch 001 002; ls", "indir": "s4://b/in/", "outdir": "s4://b/out/", "job": "one"}
    os.kill(cluster.nodes[2].pid, signal.SIGSTOP)
    node = cluster.nodes[0]
    assert node.post_json("/map_to_n", body | {"keep_going": True, "detach": True}).status == 200
    eventually(lambda: _state(node, "one")["failed"] == 1, 10)
    os.kill(cluster.nodes[2].pid, signal.SIGCONT)
    share = eventually(lambda: (found := _state(node, "one"))["state"] != "running" and found, 20)
    assert isinstance(share, dict) and (share["state"], share["done"], share["failed"]) == ("failed", 0, 1)
    assert cluster.keys("s4://b/out/") == ["s4://b/out/000/001", "s4://b/out/000/002"]


def test_a_retry_may_replace_only_keys_of_its_own_task(three: Cluster) -> None:
    _put(three, "s4://b/in/", 3)
    command = 'echo "$S4_ATTEMPT" > part; echo part; [ "$S4_ATTEMPT" -ge 2 ] || [ "$filename" != 001 ]'
    arguments = ["map-to-n", "s4://b/in/", "s4://b/out/", command, "--keep-going"]
    assert three.run(*arguments).code == 1
    job = json.loads(three.s4("jobs", "--json").out)[0]["job"]
    three.put("s4://b/out/001/part", b"somebody else")
    failed = three.run("retry", job)
    assert failed.code == 1 and "key exists already: s4://b/out/001/part" in failed.err
    assert three.get("s4://b/out/001/part") == b"somebody else"
    three.s4("rm", "s4://b/out/001/part")
    three.s4("retry", job)
    assert three.get("s4://b/out/001/part") == b"3\n"


def test_what_could_not_be_committed_is_not_done_and_what_failed_before_stays_failed(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(1, ["--max-cpu-jobs", "1"])
    (node,) = cluster.nodes
    cluster.put_all({"s4://b/in/000": b"bad", "s4://b/in/001": b"good"})
    with contextlib.closing(_index(node)) as db:
        db.execute(
            "create trigger full before update of state on tasks when new.state = 'done'"
            " begin select raise(abort, 'no room'); end"
        )
        failed = cluster.run("map", "s4://b/in/", "s4://b/out/", "grep good", "--keep-going")
        assert failed.code == 1 and "0/2 tasks done, 1 failed" in failed.fatal
        db.execute("drop trigger full")
    eventually(lambda: node.rows("select state from jobs") == [("failed",)], 10)
    assert [state for (state,) in node.rows("select state from tasks order by task")] == [
        "failed",
        "cancelled",
    ]
    assert cluster.keys("s4://b/out/") == []
    cluster.s4("rm", "s4://b/in/000")
    cluster.put("s4://b/in/000", b"good")
    [(job,)] = node.rows("select id from jobs")
    cluster.s4("retry", job)
    assert cluster.contents("s4://b/out/") == {"000": b"good\n", "001": b"good\n"}
    node.check()


def test_what_exists_already_is_no_reason_to_try_again(start_cluster: Callable[..., Cluster]) -> None:
    three = start_cluster(3)
    three.put_all({f"s4://b/in/{i:03}": b"" for i in range(3)})
    three.put("s4://b/out/001/part", b"somebody else's")
    log = three.work / "tries"
    command = f"echo $filename >> {log}; echo > part; echo part"
    options = ("--keep-going", "--retries", "2")
    said = "key exists already: s4://b/out/001/part"
    three.fails("map-to-n", "s4://b/in/", "s4://b/out/", command, *options, says=said, code=1)
    assert sorted(log.read_text().split()) == ["000", "001", "002"]


def test_a_late_cancel_of_an_earlier_run_spares_the_retry(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000")
    node, job = cluster.owner(f"{bucket}/in/000"), f"again-{bucket[5:]}"
    command = "[ $S4_ATTEMPT -ge 2 ] || exit 3; sleep 60"
    body = {"cmd": command, "indir": f"{bucket}/in/", "outdir": f"{bucket}/out/", "job": job}
    assert node.post_json("/map", body).status == 400
    assert node.post_json("/retry", body | {"kind": "map", "run": 2}).status == 200
    eventually(lambda: node.get("/job", job=job).json()["running"] == 1, 10)
    assert node.post("/cancel", job=job, run=1).json()["state"] == "running"
    assert node.post("/cancel", job=job, run=2).json()["state"] == "cancelled"


def test_a_failure_is_told_to_all_others_although_one_is_down(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(3, start=False)
    failing, _down, other = cluster.nodes  # who is told in this order
    for node in (failing, other):
        node.start()
    cluster.put_all({"s4://b/in/000": b"", "s4://b/in/002": b""})
    command = "[ $filename = 000 ] && exit 3; sleep 7200.21"
    body = {"cmd": command, "indir": "s4://b/in/", "outdir": "s4://b/out/", "job": "some"}
    assert other.post_json("/map", body | {"detach": True}).status == 200
    eventually(lambda: procs.running("sleep\x007200.21"), 10)
    assert failing.post_json("/map", body).status == 400
    eventually(lambda: _state(other, "some")["state"] == "cancelled", 10)
    assert not procs.running("sleep\x007200.21")


def test_the_same_retry_twice_is_one_run(cluster: Cluster, bucket: str, folder: Path) -> None:
    cluster.put(f"{bucket}/in/000")
    node, job = cluster.owner(f"{bucket}/in/000"), f"same-{bucket[5:]}"
    command = f"[ $S4_ATTEMPT = 1 ] || until [ -e {folder}/go ]; do sleep 0.02; done; exit 3"
    body = {"cmd": command, "indir": f"{bucket}/in/", "outdir": f"{bucket}/out/", "job": job}
    assert node.post_json("/map", body).status == 400
    again = body | {"kind": "map", "run": 2}
    assert [node.post_json("/retry", again).status for _ in range(2)] == [200, 200]
    (folder / "go").touch()
    eventually(lambda: node.rows("select state from jobs where id = ?", job) == [("failed",)], 10)
    late = node.post_json("/retry", again)  # as of a client that lost the answer
    assert (late.status, late.json()["state"]) == (200, "failed")
    assert node.rows("select attempt from tasks where job = ?", job) == [(2,)]


def test_a_node_that_never_got_the_job_gets_it_with_its_options(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(2)
    cluster.put_all({"s4://b/in/000": b"", "s4://b/in/001": b""})
    body: dict[str, object] = {"cmd": "cat", "indir": "s4://b/in/", "outdir": "s4://b/out/", "job": "some"}
    body |= {"timeout": 77.5, "retries": 3, "keep_going": True, "skip_existing": True}
    assert cluster.nodes[0].post_json("/map", body).status == 200
    cluster.s4("retry", "some")
    for node in cluster.nodes:
        options = node.rows("select timeout_s, retries, keep_going, skip_existing, run from jobs")
        assert options == [(77.5, 3, 1, 1, 2)]


def test_of_an_eval_only_its_node_is_needed(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2)
    here, other = cluster.nodes
    cluster.put("s4://b/000", b"x")
    assert here.post("/eval", key="s4://b/000", job="evaluated", body=b"cat").status == 200
    other.kill()
    assert len(cluster.s4("joblog", "evaluated").lines) == 2
    assert cluster.s4("cancel", "evaluated").out.startswith(b"it had ended before: job evaluated done")
