"""Nodes that die, hang or are overrun while jobs and copies over several nodes go on."""

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Answer, Cluster, Node, write_tree
from procs import descendants, eventually, kill, running, touching
from reference import checksum_of

from s4.config import read_conf

JOBS = ["map", "map-to-n", "map-from-n"]


def _all_slots_work(node: Node) -> None:
    """As many commands as a node of these tests allows run at once, and bytes come and go."""
    evals = [node.cluster.start_s4("eval", "s4://b/000", "sleep 0.2; cat") for _ in range(3)]
    assert [process.communicate(timeout=20)[0] for process in evals] == [b"data"] * 3
    key = f"s4://b/{random.getrandbits(64):x}"
    assert node.put(key, b"x").status == 200 and node.fetch(key) == b"x"


def test_the_helpers_of_a_node_are_replaced_when_they_are_killed(
    start_cluster: Callable[..., Cluster],
) -> None:
    (node,) = start_cluster(1, ["-max-cpu-jobs", "3"]).nodes
    node.put("s4://b/000", b"data")
    _all_slots_work(node)
    for child in [process for process in descendants(node.pid) if process.parent == node.pid]:
        kill(child.pid)  # the fork server among them
    _all_slots_work(node)
    for worker in node.workers():
        kill(worker.pid)
    _all_slots_work(node)


def test_half_a_request_for_a_worker_is_no_traceback_in_the_log(
    start_cluster: Callable[..., Cluster],
) -> None:
    (node,) = start_cluster(1, ["-max-cpu-jobs", "3"]).nodes
    node.put("s4://b/000", b"data")
    eventually(lambda: len(node.workers()) == 2, 10, "the spare workers are there")
    (server,) = {worker.parent for worker in node.workers()}
    (listener,) = [path for path in node.data.rglob("*") if path.is_socket()]
    with socket.socket(socket.AF_UNIX) as dying:  # as a node that is killed before it has sent its request
        dying.connect(str(listener))
    eventually(lambda: server not in {child.pid for child in descendants(node.pid)}, 10, "it ended")
    assert "EOFError" not in node.log
    _all_slots_work(node)


def test_a_killed_node_takes_all_its_commands_along(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    (node,) = cluster.nodes
    cluster.put_all({f"s4://b/{i:03}": b"x" for i in range(40)})
    busy = [
        cluster.start_s4("map", "s4://b/", "s4://out/", "sleep 7401 & setsid sleep 7401"),
        cluster.start_s4("eval", "s4://b/000", "nohup sleep 7401"),
    ]
    eventually(lambda: len(running("sleep\x007401")) > 4, 10, "commands run")
    node.kill()
    eventually(lambda: not running("sleep\x007401"), 5, "no command survives")
    for process, code in zip(busy, (3, 1), strict=True):
        _out, err = process.communicate(timeout=30)
        *_others, last = err.splitlines()
        assert process.returncode == code and last.startswith(b"fatal: ") and str(node).encode() in err, err
    eventually(lambda: not touching(cluster.root), 5, "nothing survives")
    node.start()
    assert node.listing("s4://out") == []
    assert node.rows("select count(*) from jobs where state = 'running'") == [(0,)]


def test_a_node_killed_again_and_again_never_shows_a_part(
    start_cluster: Callable[..., Cluster], folder: Path
) -> None:
    cluster = start_cluster(1)
    (node,) = cluster.nodes
    files = {f"{i:04}": os.urandom(3000) for i in range(1500)}
    write_tree(folder, files)
    moments = random.Random(7)
    for attempt in range(4):
        busy = [
            cluster.start_s4("cp", "-r", ".", f"s4://b/{attempt}/", cwd=folder),
            cluster.start_s4("rm", "-r", f"s4://b/{attempt - 1}/1"),
        ]
        eventually(lambda attempt=attempt: node.listing(f"s4://b/{attempt}/"), 20, "some keys")  # type: ignore[misc]
        time.sleep(moments.random() / 5)  # whatever moment this is, what follows must hold
        node.kill()
        for process in busy:
            process.communicate(timeout=60)
        node.start()
        node.check()
        rows = node.rows("select path, checksum from keys")
        for path, checksum in rows:
            assert checksum == checksum_of(files[path.rpartition("/")[2]])
        for path, _checksum in moments.sample(rows, min(20, len(rows))):
            assert node.fetch(f"s4://{path}") == files[path.rpartition("/")[2]]


@pytest.mark.parametrize("job", JOBS)
def test_a_job_with_a_server_down_names_it_and_leaves_nothing_running(
    start_cluster: Callable[..., Cluster], job: str
) -> None:
    cluster = start_cluster(3)
    cluster.put_all({f"s4://b/in/{i:03}": b"x" for i in range(6)})
    cluster.nodes[2].kill()
    cluster.fails(job, "s4://b/in/", "s4://b/out/", "sleep 7701", says=str(cluster.nodes[2]), code=3)
    eventually(lambda: not running("sleep\x007701"), 5, "the others stop")


def test_a_shuffle_whose_target_dies_fails_and_names_it(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2)
    cluster.put("s4://b/in/000", b"x")
    job = cluster.start_s4(
        *("map-to-n", "s4://b/in/", "s4://b/out/", "sleep 7711 || true; echo x > 001; echo 001"),
        env={"S4_TIMEOUT": "5"},
    )
    (sleep,) = eventually(lambda: running("sleep\x007711"), 10)
    cluster.nodes[1].kill()
    kill(sleep.pid)
    _out, err = job.communicate(timeout=60)
    assert job.returncode == 1 and str(cluster.nodes[1]).encode() in err, err
    eventually(lambda: cluster.nodes[0].rows("select state from jobs") == [("failed",)], 5)


def test_a_recursive_removal_with_a_server_down_says_what_is_left_to_do(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(2)
    cluster.put_all({f"s4://b/{i:03}": b"x" for i in range(4)})
    here, down = cluster.nodes
    down.kill()
    line = cluster.fails("rm", "-r", "s4://b/", says=str(down), code=1)
    assert "what others hold may be removed; run it again when that server is back" in line
    assert here.listing("s4://b/") == []
    down.start()
    cluster.s4("rm", "-r", "s4://b/")
    assert cluster.keys("s4://b/") == []


def test_a_server_that_hangs_does_not_hang_the_client(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2)
    cluster.put_all({"s4://b/000": b"x", "s4://b/001": b"x"})
    well, stuck = cluster.nodes
    os.kill(stuck.pid, signal.SIGSTOP)
    try:
        result = cluster.run("health", timeout=4)
        assert (result.code, result.lines) == (1, [f"healthy:   {well}", f"unhealthy: {stuck}"])
        assert cluster.s4("cp", "s4://b/000", "-").out == b"x"
        for arguments in (["cp", "s4://b/001", "-"], ["ls", "s4://b/"]):
            cluster.fails(*arguments, env={"S4_TIMEOUT": "2"}, says=str(stuck), code=1)
    finally:
        os.kill(stuck.pid, signal.SIGCONT)
    assert cluster.s4("cp", "s4://b/001", "-").out == b"x"


def test_questions_do_not_wait_for_a_server_that_hangs(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2)
    cluster.put_all({"s4://b/in/001": b"x"})
    cluster.s4("map-to-n", "s4://b/in/", "s4://b/out/", "echo >000; echo 000")
    stuck = cluster.nodes[1]
    # With the seconds that each may take, or as many as the time limit has if that is less.
    questions = [
        (["stat", "s4://b/in/001"], 5),
        (["stat", "s4://b/out/001/000"], 5),  # here is the key, there what made it
        (["jobs"], 5),
        (["sql", "select 1"], 10),
    ]
    os.kill(stuck.pid, signal.SIGSTOP)
    try:
        for limit in ("2", ""):
            began = time.monotonic()
            asked = [
                cluster.start_s4(*arguments, env={"S4_TIMEOUT": limit}) for arguments, _most in questions
            ]
            for process, (arguments, most) in zip(asked, questions, strict=True):
                _out, err = process.communicate(timeout=30)
                assert process.returncode == 3 and f"{stuck}: no answer in time" in err.decode(), err
                assert time.monotonic() - began < (2 if limit else most) + 2, arguments
    finally:
        os.kill(stuck.pid, signal.SIGCONT)


def test_too_many_requests_are_told_when_to_come_back(start_cluster: Callable[..., Cluster]) -> None:
    (node,) = start_cluster(1, ["-max-cpu-jobs", "1"]).nodes
    node.put("s4://b/000", b"x")
    answers: list[Answer] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(node.post("/eval", key="s4://b/000", body=b"sleep 0.05; cat"))
        )
        for _ in range(150)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {answer.status for answer in answers} == {200, 429} and len(answers) == 150
    refused = [answer for answer in answers if answer.status == 429]
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)


def test_the_client_gives_up_at_its_time_limit(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, ["-max-cpu-jobs", "1"])
    cluster.put("s4://b/000", b"data")
    holder = cluster.start_s4("eval", "s4://b/000", "sleep 7611")
    eventually(lambda: running("sleep\x007611"), 10, "the only place is taken")
    began = time.monotonic()
    cluster.fails("eval", "s4://b/000", "cat", env={"S4_TIMEOUT": "2"}, code=1)
    assert 1 < time.monotonic() - began < 30
    holder.send_signal(signal.SIGINT)
    assert holder.wait(10) == 130


def test_of_two_servers_that_start_at_once_on_a_folder_one_runs(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(2, start=False, check=False)
    for node in cluster.nodes:
        node.launch("-data", str(cluster.root / "shared"))

    def ended() -> list[Node]:
        return [node for node in cluster.nodes if node.process and node.process.poll() is not None]

    (loser,) = eventually(ended, 20, "one gives up")
    (winner,) = (node for node in cluster.nodes if node is not loser)
    assert loser.process and loser.process.returncode == 1 and "fatal: " in loser.log
    winner.wait_healthy()
    assert ended() == [loser]


def test_a_cancel_reaches_the_others_while_a_server_hangs(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2)
    cluster.put_all({"s4://b/in/000": b"", "s4://b/in/001": b""})
    job = cluster.s4("map", "s4://b/in/", "s4://b/out/", "sleep 7444", "--keep-going", "--detach").lines[0]
    eventually(lambda: len(running("sleep\x007444")) == 2, 10)
    well, stuck = cluster.nodes
    os.kill(stuck.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        cancel = cluster.start_s4("cancel", job[:10])
        eventually(lambda: well.rows("select state from jobs") == [("cancelled",)], 5)
        assert time.monotonic() - began < 5 and len(running("sleep\x007444")) == 1
        _out, err = cancel.communicate(timeout=30)
        assert cancel.returncode == 3
        told = f"{stuck}: no answer in time; the others have ended the job; later: s4 cancel {job}"
        assert err.decode() == f"fatal: {told}\n"
    finally:
        os.kill(stuck.pid, signal.SIGCONT)
    cluster.s4("cancel", job)
    assert running("sleep\x007444") == []


class Fake:
    """In the place of a node: answers what a test gives it by path, and is silent to all other requests."""

    def __init__(self, node: Node, answers: dict[str, bytes]) -> None:
        self._fingerprint = read_conf(str(node.cluster.conf)).fingerprint
        self._answers = answers
        self._listener = socket.create_server((node.host, node.port))
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                connection, _address = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while request := connection.recv(65536):
                answer = self._answers.get(request.split()[1].partition(b"?")[0].decode())
                if answer is not None:
                    head = f"HTTP/1.1 200 OK\r\nS4-Conf: {self._fingerprint}\r\nContent-Length: {len(answer)}"
                    connection.sendall(head.encode() + b"\r\n\r\n" + answer)

    def close(self) -> None:
        for place in (self._listener, *self._connections):
            place.close()


@pytest.fixture
def beside_a_fake(start_cluster: Callable[..., Cluster]) -> Iterator[Callable[[dict[str, bytes]], Cluster]]:
    """Two nodes, of which the second is a Fake with the given answers."""
    with contextlib.ExitStack() as stack:

        def start(answers: dict[str, bytes]) -> Cluster:
            cluster = start_cluster(2, start=False)
            cluster.nodes[0].start()
            stack.callback(Fake(cluster.nodes[1], answers).close)
            assert cluster.nodes[0].put("s4://b/in/000", b"x").status == 200
            return cluster

        yield start


def test_a_start_whose_answer_is_lost_says_how_to_end_the_job(
    beside_a_fake: Callable[[dict[str, bytes]], Cluster],
) -> None:
    cluster = beside_a_fake({"/health": b"healthy"})
    line = cluster.fails("map", "s4://b/in/", "s4://b/out/", "cat", code=3, env={"S4_TIMEOUT": "1"})
    [(job,)] = cluster.nodes[0].rows("select id from jobs")
    assert f"job {job} is cancelled, perhaps not on {cluster.nodes[1]}; later: s4 cancel {job}" in line


def test_a_node_that_is_silent_about_its_tasks_is_not_waited_for(
    beside_a_fake: Callable[[dict[str, bytes]], Cluster],
) -> None:
    answers: dict[str, bytes] = {}
    cluster = beside_a_fake(answers)
    job = {"job": "one", "cmd": "cat", "indir": "s4://b/in/", "outdir": "s4://b/out/"}
    assert cluster.nodes[0].post_json("/map", job).status == 200
    answers["/jobs"] = cluster.nodes[0].get("/jobs").body
    began = time.monotonic()
    assert str(cluster.nodes[1]) in cluster.fails("joblog", "one", code=3, env={"S4_TIMEOUT": "60"})
    assert time.monotonic() - began < 10
