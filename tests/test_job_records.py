"""What the index of each node says of jobs and their tasks, and what commands are told of themselves."""

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import BIN, Cluster, Node
from procs import eventually

ENVIRONMENT = (
    'printf "%s\\n" "$filename" "$S4_KEY" "$S4_JOB" "$S4_TASK" "$S4_ATTEMPT" "$S4_NODE" "$S4_CONF_PATH"'
)


def _shares(cluster: Cluster, outdir: str) -> list[tuple[Node, dict[str, Any]]]:
    """The share of the only job into OUTDIR on each node."""
    shares = [(node, share) for node in cluster.nodes for share in node.get("/jobs").json()]
    found = [(node, share) for node, share in shares if share["outdir"] == outdir]
    assert len({share["id"] for _node, share in found}) == 1, found
    return found


def _tasks(node: Node, job: str, **parameters: str) -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = node.request("GET", "/tasks", {"job": job, **parameters}).json()
    return tasks


def _put_numbers(cluster: Cluster, folder: str, count: int) -> None:
    cluster.put_all({f"{folder}{i:03}": b"%d\n" % i for i in range(count)})


@pytest.mark.parametrize("kind", ["map", "map-to-n", "map-from-n"])
def test_each_node_records_its_share_and_each_input_a_task(cluster: Cluster, bucket: str, kind: str) -> None:
    _put_numbers(cluster, f"{bucket}/in/", 9)
    command = {"map": "cat", "map-to-n": "cp /dev/stdin part; echo part", "map-from-n": "xargs cat"}[kind]
    cluster.s4(kind, f"{bucket}/in/", f"{bucket}/out/", command)
    shares = _shares(cluster, f"{bucket}/out/")
    assert len(shares) == 3
    numbers = []
    for position, (node, share) in enumerate(shares):
        assert (share["kind"], share["state"], share["tasks"], share["done"]) == (kind, "done", 3, 3)
        assert share["started_s"] <= share["finished_s"] <= time.time()
        tasks = _tasks(node, share["id"])
        numbers += [task["task"] for task in tasks]
        assert [task["task"] % 3 for task in tasks] == [position] * 3
        assert [task["input"] for task in tasks] == [f"{bucket}/in/{i:03}" for i in range(position, 9, 3)]
        for task in tasks:
            assert (task["state"], task["attempt"], task["exit_code"], task["signal"]) == ("done", 1, 0, None)
            assert task["error"] is None and task["pid"] > 1
            assert share["started_s"] <= task["started_s"] and 0 < task["seconds"] < 60
            assert 0 <= task["cpu_seconds"] < 5 and 500_000 < task["peak_memory"] < 100e6
            assert (task["bytes_in"], task["bytes_out"]) == (2, 2)
    assert sorted(numbers) == list(range(9))


def test_commands_are_told_who_they_are(cluster: Cluster, bucket: str) -> None:
    _put_numbers(cluster, f"{bucket}/in/", 3)
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", ENVIRONMENT)
    job = _shares(cluster, f"{bucket}/out/")[0][1]["id"]
    for i in range(3):
        node = cluster.nodes[i]
        assert cluster.get(f"{bucket}/out/{i:03}").decode().splitlines() == [
            f"{i:03}",
            f"{bucket}/in/{i:03}",
            job,
            str(i),
            "1",
            str(node),
            str(cluster.conf),
        ]
    cluster.s4("map-to-n", f"{bucket}/in/", f"{bucket}/sh/", f"({ENVIRONMENT}) > {{x}}; echo {{x}}")
    assert cluster.get(f"{bucket}/sh/001/{{x}}").decode().splitlines()[:2] == ["001", f"{bucket}/in/001"]
    cluster.s4("map-from-n", f"{bucket}/in/", f"{bucket}/m/", 'echo "$S4_KEY $S4_TASK $S4_ATTEMPT"')
    assert cluster.get(f"{bucket}/m/002") == b"002 2 1\n"
    told = cluster.s4("eval", f"{bucket}/in/001", ENVIRONMENT).lines
    assert told[:2] == ["001", f"{bucket}/in/001"] and told[4:] == [
        "1",
        str(cluster.nodes[1]),
        str(cluster.conf),
    ]


def test_a_command_can_call_s4_itself(cluster: Cluster, bucket: str) -> None:
    _put_numbers(cluster, f"{bucket}/in/", 3)
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", f"s4 ls {bucket}/in/ | wc -l")
    assert cluster.get(f"{bucket}/out/000") == b"3\n"


def test_a_command_finds_s4_although_the_server_has_it_not_on_its_path(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(1, env={"PATH": "/usr/bin:/bin"})
    cluster.put("s4://b/in/x", b"1")
    assert not (Path("/usr/bin") / "s4").exists()
    cluster.s4("map", "s4://b/in/", "s4://b/out/", "s4 servers")
    assert cluster.get("s4://b/out/x").decode() == f"{cluster.nodes[0]}\n"


def test_a_command_finds_the_conf_although_the_server_was_given_a_relative_path(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    node.start("-port", str(node.port), "-conf", os.path.relpath(cluster.conf, node.folder), bare=True)
    cluster.put("s4://b/x")
    assert cluster.s4("eval", "s4://b/x", "s4 servers").lines == [str(node)]


def test_a_task_says_how_it_failed(cluster: Cluster, bucket: str) -> None:
    commands = {
        "exit": "echo first; echo last words >&2; exit 7",
        "killed": "kill -SEGV $BASHPID",
        "slow": "echo begun >&2; sleep 60",
        "liar": "echo nothing-there",
        "fine": "echo fine >&2; echo",
    }
    cluster.put_all({f"{bucket}/in/{name}": command.encode() for name, command in commands.items()})
    arguments = [
        "map-to-n",
        f"{bucket}/in/",
        f"{bucket}/out/",
        'eval "$(cat)"',
        "--keep-going",
        "--timeout",
        "1",
    ]
    assert cluster.run(*arguments).code == 1
    found = {}
    for node, share in _shares(cluster, f"{bucket}/out/"):
        assert share["error"] is None or share["state"] == "failed"
        for task in _tasks(node, share["id"], stderr="true"):
            found[task["input"].rpartition("/")[2]] = task
    shown = {
        name: (task["state"], task["exit_code"], task["signal"], task["error"], task["stderr"])
        for name, task in found.items()
    }
    names = "No such file or directory; a map-to-n prints the names of the files that it made"
    assert shown == {
        "exit": ("failed", 7, None, "exit code 7", "last words\n"),
        "killed": ("failed", 128 + 11, 11, "exit code 139 (SIGSEGV)", None),
        "slow": ("failed", None, 9, "killed after its time limit of 1 s", "begun\n"),
        "liar": ("failed", 0, None, f"it printed 'nothing-there': {names}", None),
        "fine": ("done", 0, None, None, "fine\n"),
    }
    assert 1 <= found["slow"]["seconds"] < 5


def test_the_last_64_kb_of_stderr_are_kept(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000")
    command = 'head -c 100000 /dev/zero | tr "\\0" x >&2; echo end >&2'
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", command)
    node, share = _shares(cluster, f"{bucket}/out/")[0]
    [task] = _tasks(node, share["id"], stderr="true")
    assert len(task["stderr"]) == 64 * 1024 and task["stderr"].endswith("xxxend\n")


def test_cpu_time_and_memory_are_those_of_the_command_and_its_children(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000")
    script = "import time; x = b'x' * 150_000_000\nwhile time.process_time() < 0.5: pass"
    (cluster.work / "busy.py").write_text(script)
    command = f"(python3 {cluster.work}/busy.py | cat) & wait"
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", command.replace("python3", str(BIN / "python3")))
    node, share = _shares(cluster, f"{bucket}/out/")[0]
    [task] = _tasks(node, share["id"])
    assert 0.5 <= task["cpu_seconds"] <= task["seconds"] * 2
    assert 150e6 < task["peak_memory"] < 300e6


def test_what_a_command_left_to_itself_counts_too(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000")
    script = "import time; x = b'x' * 150_000_000\nwhile time.process_time() < 0.5: pass\nopen('over', 'w')"
    (cluster.work / "left.py").write_text(script)
    command = f"({BIN / 'python3'} {cluster.work}/left.py &); until [ -e over ]; do sleep 0.01; done"
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", command)
    node, share = _shares(cluster, f"{bucket}/out/")[0]
    [task] = _tasks(node, share["id"])
    assert 0.5 <= task["cpu_seconds"] <= task["seconds"] * 2
    assert 150e6 < task["peak_memory"] < 300e6


def test_an_eval_is_recorded(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/000", b"12345")
    assert cluster.run("eval", f"{bucket}/000", "cat; echo no >&2; exit 4").code == 4
    node = cluster.nodes[0]
    share = next(share for share in node.get("/jobs").json() if share["indir"] == f"{bucket}/000")
    assert (share["kind"], share["state"], share["failed"]) == ("eval", "failed", 1)
    [task] = _tasks(node, share["id"], stderr="true")
    assert (task["exit_code"], task["stderr"], task["bytes_in"], task["bytes_out"]) == (4, "no\n", 5, 5)


def test_a_job_of_an_older_client_is_recorded(cluster: Cluster, bucket: str) -> None:
    _put_numbers(cluster, f"{bucket}/in/", 3)
    for node in cluster.nodes:
        body = {"cmd": "cat", "indir": f"{bucket}/in/", "outidr": f"{bucket}/old/"}
        answer = node.post_json("/map", body)
        assert answer.status == 200, answer
        [share] = [share for share in node.get("/jobs").json() if share["outdir"] == f"{bucket}/old/"]
        assert (share["state"], share["done"], share["id"]) == ("done", 1, answer.json()["job"])
        assert len(_tasks(node, share["id"])) == 1
        # It is a job of that node, of which the others need not know.
        assert f"job {share['id']} done: 1/1 tasks done" in cluster.s4("wait", share["id"]).err
        assert "nothing" in cluster.s4("retry", share["id"]).err
        assert json.loads(cluster.s4("job", share["id"], "--json").out)["state"] == "done"


def test_keys_know_what_made_them(cluster: Cluster, bucket: str) -> None:
    _put_numbers(cluster, f"{bucket}/in/", 3)
    cluster.s4("map-to-n", f"{bucket}/in/", f"{bucket}/out/", "for i in 0 1 2; do cat > $i; echo $i; done")
    job = _shares(cluster, f"{bucket}/out/")[0][1]["id"]
    made: dict[str, tuple[str | None, int | None]] = {}
    for node in cluster.nodes:
        rows = node.rows("select path, job, task from keys where path like ?", f"{bucket[5:]}/%")
        made |= {path.removeprefix(bucket[5:]): (by, task) for path, by, task in rows}
    assert made["/in/001"] == (None, None)
    assert {name: made[name] for name in made if name.startswith("/out")} == {
        f"/out/{i:03}/{part}": (job, i) for i in range(3) for part in range(3)
    }


def test_the_same_id_twice_is_one_job(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000")
    node = cluster.nodes[0]
    job = f"twice-{bucket[5:]}"
    body = {"cmd": "echo $RANDOM$RANDOM", "indir": f"{bucket}/in/", "outdir": f"{bucket}/out/", "job": job}
    answers = [node.post_json("/map", body | {"detach": detach}) for detach in (True, False, False, True)]
    assert [answer.status for answer in answers] == [200] * 4, answers
    assert answers[1].json() == answers[2].json() == {"job": job, "tasks": 1}
    assert node.rows("select count(*) from tasks where job = ?", job) == [(1,)]
    other = node.post_json("/map", body | {"cmd": "true"})
    assert other.status == 409 and job in other.text


def test_finished_jobs_are_pruned(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, ["--keep-jobs", "2", "--keep-days", "0"])
    node = cluster.nodes[0]
    cluster.put("s4://b/in/000")
    for i in range(4):
        cluster.run("map", "s4://b/in/", f"s4://b/out{i}/", "echo x >&2; exit 1")
    eventually(lambda: node.rows("select count(*) from jobs") == [(2,)], 20)
    assert node.rows("select outdir from jobs order by started_s") == [("s4://b/out2/",), ("s4://b/out3/",)]
    assert node.rows("select count(*) from tasks") == node.rows("select count(*) from stderrs") == [(2,)]


def test_finished_jobs_are_kept_for_as_many_days_as_asked_for(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(1, ["--keep-jobs", "0", "--keep-days", "2"])
    (node,) = cluster.nodes
    cluster.put("s4://b/in/000")
    days = {"s4://b/now/": 0.0, "s4://b/day/": 1.5, "s4://b/old/": 2.5}
    for outdir in days:
        cluster.s4("map", "s4://b/in/", outdir, "cat")
    assert node.terminate() == 0
    with contextlib.closing(sqlite3.connect(node.data / "_index" / "node.db")) as db, db:
        for outdir, past in days.items():
            seconds = past * 24 * 3600
            db.execute(
                "update jobs set started_s = started_s - ?, finished_s = finished_s - ? where outdir = ?",
                (seconds, seconds, outdir),
            )
    node.start()
    eventually(lambda: len(node.rows("select * from jobs")) < 3, 10, "the old one is forgotten")
    assert node.rows("select outdir from jobs order by id") == [("s4://b/now/",), ("s4://b/day/",)]


def test_a_running_task_is_seen(cluster: Cluster, bucket: str) -> None:
    _put_numbers(cluster, f"{bucket}/in/", 1)
    job = cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", "sleep 60", "--detach").lines[0]
    node = cluster.nodes[0]
    query = "select state, attempt, pid is not null, started_s is not null from tasks where job = ?"
    eventually(lambda: node.rows(query, job) == [("running", 1, 1, 1)], 10)
    assert node.get("/job", job=job).json()["running"] == 1
    cluster.s4("cancel", job)
    [task] = _tasks(node, job)
    assert (task["state"], task["attempt"], task["exit_code"]) == ("cancelled", 1, None)


def test_a_cancel_that_comes_before_its_retry_holds(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000")
    node = cluster.owner(f"{bucket}/in/000")
    job = f"late-{bucket[5:]}"
    body = {"cmd": "exit 3", "indir": f"{bucket}/in/", "outdir": f"{bucket}/out/", "job": job}
    assert node.post_json("/map", body).status == 400
    assert node.post("/cancel", job=job, run="2").json()["state"] == "failed"  # the run that it knows
    retried = node.post_json("/retry", body | {"kind": "map", "run": 2})
    assert retried.status == 200, retried
    eventually(lambda: node.get("/job", job=job, wait="1").json()["state"] == "cancelled", 10)
    assert node.post_json("/retry", body | {"kind": "map", "run": 3}).status == 200
    eventually(lambda: node.get("/job", job=job, wait="1").json()["state"] == "failed", 10)


def test_a_record_says_what_a_command_got_and_not_what_was_listed(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{i}_{part}": b"ok\n" for i in range(3) for part in "ab"})
    merge = ("map-from-n", f"{bucket}/in/", f"{bucket}/merged/", "xargs cat | grep large", "--keep-going")
    job_of = {}
    for words in (("map", f"{bucket}/in/", f"{bucket}/out/", "grep large", "--keep-going"), merge):
        cluster.fails(*words, code=1)
        job_of[words[0]] = cluster.s4("jobs", "--limit", "1").lines[1].split()[0]
    cluster.s4("rm", "-r", f"{bucket}/in/")
    large = b"large".ljust(100_000, b"\n")
    cluster.put_all({f"{bucket}/in/{i}_{part}": large for i in range(3) for part in "abc"[: i + 1]})
    cluster.run("retry", job_of["map"])
    tasks = [task for node in cluster.nodes for task in _tasks(node, job_of["map"])]
    got = {task["input"][-3:]: task["bytes_in"] for task in tasks if task["state"] == "done"}
    assert got == {"0_a": 100_000, "1_a": 100_000, "1_b": 100_000, "2_a": 100_000, "2_b": 100_000}
    cluster.s4("retry", job_of["map-from-n"])
    tasks = [task for node in cluster.nodes for task in _tasks(node, job_of["map-from-n"])]
    assert sorted((task["inputs"], task["bytes_in"]) for task in tasks) == [
        (1, 100_000),
        (2, 200_000),
        (3, 300_000),
    ]
    summary = json.loads(cluster.s4("job", job_of["map-from-n"], "--json").out)
    assert summary["bytes_in"] == 600_000


def test_a_job_that_runs_is_forgotten_nowhere(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2, ["--keep-jobs", "1", "--keep-days", "0"])
    cluster.put_all({"s4://b/long/000": b"", "s4://b/in/000": b"", "s4://b/in/001": b""})
    job = cluster.s4("map", "s4://b/long/", "s4://b/out/", "sleep 7333", "--detach").lines[0]
    for i in range(2):
        cluster.s4("map", "s4://b/in/", f"s4://b/out{i}/", "cat")
    query = "select id, outdir from jobs order by started_s"

    def remembered() -> list[int]:
        return [len(node.rows(query)) for node in cluster.nodes]

    eventually(lambda: remembered() == [2, 2], 25, "the first short job is forgotten")
    for node in cluster.nodes:
        (first, _out), (_second, outdir) = node.rows(query)
        assert (first, outdir) == (job, "s4://b/out1/")
    assert [line.split()[2] for line in cluster.s4("jobs").lines[1:]] == ["done", "running"]
    assert json.loads(cluster.s4("job", job, "--json").out)["state"] == "running"
    cluster.s4("cancel", job)
    eventually(lambda: remembered() == [1, 1], 25, "now it is, too")
