"""What may go wrong while a cluster works: overload, deaths of every process, bad peers, bad disks.

Each test has nodes of its own; at its end the fixture checks that files and index agree and nothing runs on.
"""

import contextlib
import http.client
import json
import os
import re
import resource
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import procs
import pytest
from cluster import HOST, SERVER, Answer, Cluster, Node, free_port, read_to_end, tree, write_tree
from procs import eventually
from reference import checksum_of

from s4.config import read_conf
from s4.errors import BusyError, MissingError
from s4.node import WAITING_JOBS, WAITING_QUERIES, WAITING_REMOVALS
from s4.waiting import Gate
from s4.workers.pool import SPARE_WORKERS

CLEANED_UP = 13  # seconds: what nobody confirms is dropped 10 s after its last byte
Start = Callable[..., Cluster]


def _alone(start_cluster: Start, *options: str, check: bool = True) -> tuple[Cluster, Node]:
    cluster = start_cluster(1, options, check=check)
    return cluster, cluster.nodes[0]


def _sleeping(seconds: str) -> list[procs.Process]:
    return procs.running(f"sleep\0{seconds}\0")


class Flow:
    """A put of which bytes arrive now and then, so that it keeps its slot."""

    def __init__(self, node: Node, key: str, block: bytes = b"x", pause: float = 0.5) -> None:
        self._node, self._block, self._pause = node, block, pause
        self._ended = threading.Event()
        self.uuid, port = node.prepare_put(key)
        self._connection = node.dial(port)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._connection, contextlib.suppress(OSError):
            while not self._ended.wait(self._pause):
                self._connection.sendall(self._block)

    def end(self) -> None:
        """Stop sending; a confirm with a wrong checksum makes the node forget it at once."""
        self._ended.set()
        self._thread.join()
        assert self._node.post("/confirm_put", uuid=self.uuid, checksum="0").status >= 400


def _request(node: Node, method: str, target: str, body: bytes = b"") -> socket.socket:
    """A request whose answer is not waited for."""
    connection = node.dial(node.port)
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def _answered(connections: list[socket.socket]) -> list[bytes]:
    """The beginnings of the answers that have come so far."""
    return [connection.recv(4096, socket.MSG_PEEK) for connection in select.select(connections, [], [], 0)[0]]


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def test_control_answers_within_a_second_whatever_else_goes_on(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster, "-max-io-jobs", "2", "-max-cpu-jobs", "2")
    write_tree(cluster.work / "src", {f"{i:03}": b"x" for i in range(400)} | {"large": bytes(30 << 20)})
    cluster.s4("cp", "-r", "src", "s4://b/d/")
    with contextlib.ExitStack() as stack:
        endless = Flow(node, "s4://b/endless", bytes(1 << 20), 0)
        stack.callback(endless.end)
        stack.callback(Flow(node, "s4://b/slow").end)
        for _ in range(2):
            _uuid, port = node.prepare_get("s4://b/d/large")
            stack.enter_context(node.dial(port)).recv(1)
        for number in ("600.01", "600.02"):
            body = f"sleep {number}".encode()
            stack.enter_context(_request(node, "POST", "/eval?key=s4://b/d/000", body))
            eventually(lambda number=number: _sleeping(number), 10)  # type: ignore[misc]
        waiting = []
        for i in range(34):
            for method, target, body in (
                ("POST", f"/prepare_put?key=s4://b/new/{i}", b""),
                ("POST", "/prepare_get?key=s4://b/d/large", b""),
                ("POST", "/eval?key=s4://b/d/001", b"cat"),
            ):
                waiting.append(stack.enter_context(_request(node, method, target, body)))
        eventually(
            lambda: len(_answered(waiting)) >= len(waiting) - 40, 5, "those beyond the cap are refused"
        )
        for _ in range(5):
            assert _seconds(lambda: node.get("/health")) < 1
            assert _seconds(lambda: node.listing("s4://b/d/", recursive=False)) < 1
            assert _seconds(lambda: node.get("/list_buckets")) < 1
        assert _seconds(lambda: cluster.s4("health")) < 2  # with the start of the command
        assert len(cluster.s4("ls", "s4://b/d/").lines) == 401
        refused = _answered(waiting)
        assert all(answer.startswith(b"HTTP/1.1 429 ") for answer in refused), refused
        assert all(re.search(rb"\r\nRetry-After: [1-9]\d*\r\n", answer, re.I) for answer in refused), refused[
            0
        ]
        eventually(lambda: len(_answered(waiting)) == len(waiting), 12, "the others wait for a bounded time")
    eventually(lambda: not _sleeping("600.01") + _sleeping("600.02"), 10, "evals end with their callers")


def test_confirms_of_bytes_that_still_arrive_leave_threads_for_others(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    flow = Flow(node, "s4://b/slow")
    with contextlib.ExitStack() as stack:
        stack.callback(flow.end)
        confirms = [
            stack.enter_context(_request(node, "POST", f"/confirm_put?uuid={flow.uuid}&checksum=1"))
            for _ in range(150)
        ]
        eventually(lambda: len(_answered(confirms)) > 50, 5, "many are refused")
        for _ in range(5):
            assert _seconds(lambda: node.get("/health")) < 1
        eventually(lambda: len(_answered(confirms)) == 150, 12, "the others wait for a bounded time")
        assert all(answer.startswith(b"HTTP/1.1 429 ") for answer in _answered(confirms))


def test_what_took_long_to_arrive_may_be_confirmed_late(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    uuid, port = node.prepare_put("s4://b/000")
    with node.dial(port) as connection:
        for _ in range(13):
            connection.sendall(b"x")
            time.sleep(1)
    time.sleep(11)  # more than the ten seconds that there are for others
    assert node.confirm_put(uuid, 13 * b"x").status == 200


def test_a_client_asks_a_busy_node_again_until_it_is_served(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster, "-max-io-jobs", "1")
    with contextlib.ExitStack() as stack:
        stack.callback(Flow(node, "s4://b/slow").end)
        for i in range(40):
            stack.enter_context(_request(node, "POST", f"/prepare_put?key=s4://b/waits/{i}"))
        process = cluster.start_s4("cp", "-", "s4://b/patient", stdin=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(b"data")
        process.stdin.close()
        eventually(lambda: len(re.findall(r"b%2Fpatient 429", node.log)) >= 2, 15, "it was refused twice")
        hasty = cluster.fails("cp", "/dev/null", "s4://b/hasty", code=1, timeout=8, env={"S4_TIMEOUT": "1.5"})
        assert "busy" in hasty or "waiting" in hasty or "slot" in hasty or "in time" in hasty
    assert process.wait(30) == 0
    assert node.fetch("s4://b/patient") == b"data"
    assert "s4://b/hasty" not in cluster.keys("s4://b")


def test_dead_transfers_free_their_slots_within_six_seconds(start_cluster: Start) -> None:
    cluster = start_cluster(3, ["-max-io-jobs", "1"])
    dead, silent, unread = cluster.nodes
    cluster.put("s4://b/002", bytes(30 << 20))
    never_sent, _port = dead.prepare_put("s4://b/000")
    begun, begun_port = silent.prepare_put("s4://b/001")
    _uuid, get_port = unread.prepare_get("s4://b/002")
    with silent.dial(begun_port) as put, unread.dial(get_port) as get, ThreadPoolExecutor(3) as threads:
        put.sendall(b"some")
        get.recv(1)
        works: list[Callable[[], object]] = [
            lambda: cluster.put("s4://b/003", b"x"),
            lambda: cluster.put("s4://b/004", b"x"),
            lambda: unread.prepare_get("s4://b/002"),
        ]
        assert max(threads.map(_seconds, works)) < 6
        assert 400 <= dead.confirm_put(never_sent, b"").status < 500
        assert 400 <= silent.confirm_put(begun, b"some").status < 500
    assert cluster.keys("s4://b") == ["s4://b/002", "s4://b/003", "s4://b/004"]


def _whole_again(node: Node, before: set[int]) -> None:
    eventually(lambda: len({worker.pid for worker in node.workers()} - before) >= 2, 3, "new workers")
    assert node.put("s4://after/000", b"x").status == 200
    assert node.fetch("s4://after/000") == b"x"
    assert node.post("/eval", key="s4://after/000", body=b"cat").body == b"x"


def test_the_death_of_idle_workers_is_not_noticed(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    workers = eventually(lambda: len(found := node.workers()) >= 2 and found, 10)
    assert isinstance(workers, list)
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    _whole_again(node, {worker.pid for worker in workers})


def test_the_death_of_the_helpers_of_the_pool_is_survived(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    eventually(lambda: len(node.workers()) >= 2, 10)
    below = [process.pid for process in procs.descendants(node.pid)]
    for pid in below:
        procs.kill(pid)
    _whole_again(node, set(below))


def test_workers_whose_fork_server_is_gone_are_still_looked_after(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    # They wait for work: one that is just forked is not yet known to the pool.
    workers = eventually(
        lambda: len(found := [worker for worker in node.workers() if worker.state == "S"]) >= 2 and found, 10
    )
    assert isinstance(workers, list)
    for pid in {worker.parent for worker in workers}:
        procs.kill(pid)
    eventually(
        lambda: all(worker.parent == node.pid for worker in node.workers()), 5, "they have a new parent"
    )
    for worker in workers:
        procs.kill(worker.pid)
    _whole_again(node, {worker.pid for worker in workers})
    assert node.log.count("died, exit code -9") == len(workers)
    gone = [Path(f"/proc/{worker.pid}") for worker in workers]
    eventually(lambda: not any(place.exists() for place in gone), 5, "none is left as a zombie")


def test_jobs_and_evals_together_keep_to_the_limit_of_commands(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster, "-max-cpu-jobs", "2")
    for i in range(12):
        assert node.put(f"s4://b/in/{i:03}", b"x").status == 200
    log = cluster.work / "log"
    line = f"echo + >>{log}; sleep 0.1; echo - >>{log}"
    processes = [cluster.start_s4("map", "s4://b/in/", f"s4://b/out{i}/", line) for i in range(2)]
    processes += [cluster.start_s4("eval", "s4://b/in/000", line) for _ in range(4)]
    for process in processes:
        _out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
    running, most = 0, 0
    for mark in log.read_text().split():
        running += 1 if mark == "+" else -1
        most = max(most, running)
    assert (running, most) == (0, 2) and len(log.read_text().split()) == 2 * (12 * 2 + 4)


@pytest.mark.parametrize("command", ["eval", "map", "map-to-n", "map-from-n"])
def test_the_death_of_a_worker_fails_its_one_command_clearly(start_cluster: Start, command: str) -> None:
    cluster, node = _alone(start_cluster)
    assert node.put("s4://b/in/000", b"x").status == 200
    number = f"600.1{len(command)}"
    line = f"setsid sleep {number} & sleep {number}"
    arguments = ["s4://b/in/000"] if command == "eval" else ["s4://b/in/", "s4://b/out/"]
    process = cluster.start_s4(command, *arguments, line)
    eventually(lambda: len(_sleeping(number)) == 2, 10, "it runs")
    worker = node.worker_of(_sleeping(number)[0].pid)
    os.kill(worker, signal.SIGKILL)
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out) == (1, b"")
    assert err.splitlines()[-1].startswith(b"fatal: ") and err.count(b"\n") == (1 if command == "eval" else 3)
    assert f"worker process {worker} died".encode() in err and b"signal 9" in err
    assert b"s4://b/in/000" in err
    eventually(lambda: not _sleeping(number), 3, "nothing of the command is left")
    _whole_again(node, {worker})


def test_the_death_of_a_worker_costs_no_other_transfer(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    uuids = {}

    def holder() -> int:
        for worker in node.workers():
            with contextlib.suppress(OSError):
                links = [os.readlink(path) for path in Path(f"/proc/{worker.pid}/fd").iterdir()]
                if any(link.endswith("/arriving") for link in links):
                    return worker.pid
        return 0

    with contextlib.ExitStack() as stack:
        killed = 0
        for name in ("doomed", "other"):
            uuid, port = node.prepare_put(f"s4://b/{name}")
            uuids[name] = uuid, stack.enter_context(node.dial(port))
            uuids[name][1].sendall(b"some")
            killed = killed or eventually(holder, 5, "a worker writes it")
        os.kill(killed, signal.SIGKILL)
        answer = eventually(
            lambda: (got := node.confirm_put(uuids["doomed"][0], b"some")).status != 429 and got, 5
        )
        assert isinstance(answer, Answer) and answer.status >= 400 and f"{killed} died" in answer.text
        uuids["other"][1].sendall(b" more")
    assert node.confirm_put(uuids["other"][0], b"some more").status == 200
    assert cluster.keys("s4://b") == ["s4://b/other"]
    _whole_again(node, {killed})


def test_the_death_of_a_worker_in_the_middle_of_a_get_fails_the_copy(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    assert node.put("s4://b/000", bytes(60 << 20)).status == 200
    read, write = os.pipe()
    process = cluster.start_s4("cp", "s4://b/000", "-", stdout=write)
    os.close(write)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        pipe.read(1)
        (killed,) = [worker.pid for worker in node.workers() if procs.holds_open(worker.pid, node.data / "b")]
        os.kill(killed, signal.SIGKILL)
        while pipe.read(1 << 20):
            pass
    _out, err = process.communicate(timeout=10)
    assert process.returncode == 1 and err.startswith(b"fatal: ") and err.count(b"\n") == 1
    _whole_again(node, {killed})


@contextlib.contextmanager
def _killed_and_restarted(node: Node) -> Iterator[None]:
    """Kill the node; inside the block it is down; then it starts again."""
    below = {process.pid for process in procs.descendants(node.pid)}
    node.kill()
    yield
    eventually(lambda: not below & {process.pid for process in procs.everyone()}, 5, "its processes are gone")
    node.start()
    assert node.rows("select * from transfers") == node.rows("select * from removals") == []
    node.check()


def test_confirmed_keys_survive_the_death_of_the_node_in_the_middle_of_puts(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    confirmed: dict[str, bytes] = {}
    numbers = iter(range(1_000_000))
    dying = threading.Event()

    def put_many() -> None:
        while not dying.is_set():
            number = next(numbers)
            key, data = f"s4://b/{number % 10}/{number}", os.urandom(number % 5000)
            with contextlib.suppress(OSError, AssertionError, subprocess.SubprocessError, Exception):
                if node.put(key, data).status == 200:
                    confirmed[key] = data

    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            threads.submit(put_many)
        eventually(lambda: len(confirmed) > 100, 20)
        with _killed_and_restarted(node):
            dying.set()
            threads.shutdown()
    assert {key: node.fetch(key) for key in confirmed} == confirmed
    assert len(cluster.keys("s4://b")) - len(confirmed) <= 4  # stored, but the answer was lost


def test_a_key_of_which_another_put_was_under_way_survives_the_death_of_the_node(
    start_cluster: Start,
) -> None:
    _cluster, node = _alone(start_cluster)
    puts = [node.prepare_put("s4://b/000") for _ in range(2)]
    for (_uuid, port), data in zip(puts, (b"first", b"second"), strict=True):
        node.send(port, data)
    assert node.confirm_put(puts[0][0], b"first").status == 200
    assert node.rows("select count(*) from transfers") == [(1,)]
    with _killed_and_restarted(node):
        pass
    assert node.fetch("s4://b/000") == b"first"


def test_the_death_of_the_node_in_the_middle_of_a_recursive_copy(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    files = {f"{i % 9}/{i:04}": os.urandom(5000) for i in range(4000)}
    write_tree(cluster.work / "src", files)
    process = cluster.start_s4("cp", "-r", "src", "s4://b/d/")
    eventually(lambda: node.rows("select 1 from keys limit 1"), 20)
    with _killed_and_restarted(node):
        _out, err = process.communicate(timeout=15)
        assert process.returncode == 1 and b"Traceback" not in err
        assert err.splitlines()[-1].startswith(b"fatal: ") and str(node).encode() in err
    stored = {path for (path,) in node.rows("select path from keys")}
    assert stored and stored <= {f"b/d/{name}" for name in files}
    cluster.s4("cp", "-r", "s4://b/d/", "back/")
    assert tree(cluster.work / "back").items() <= files.items()


def test_the_death_of_the_node_in_the_middle_of_a_recursive_removal(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    write_tree(cluster.work / "src", {f"{i % 9}/{i:04}": b"" for i in range(5000)})
    cluster.s4("cp", "-r", "src", "s4://b/d/")
    process = cluster.start_s4("rm", "-r", "s4://b/d/")
    eventually(lambda: node.rows("select count(*) from keys") < [(5000,)], 10)
    with _killed_and_restarted(node):
        _out, err = process.communicate(timeout=15)
        assert process.returncode == 0 or err.startswith(b"fatal: ")
    cluster.s4("rm", "-r", "s4://b/")
    eventually(lambda: not (node.data / "b").exists(), 5, "no file is left over")


def test_the_death_of_the_node_in_the_middle_of_a_map(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster, "-max-cpu-jobs", "2")
    for i in range(40):
        assert node.put(f"s4://b/in/{i:03}", str(i).encode()).status == 200
    line = "setsid sleep 600.31 & if [ $filename = 020 ]; then sleep 600.32; fi; cat; echo"
    process = cluster.start_s4("map", "s4://b/in/", "s4://b/out/", line)
    eventually(lambda: _sleeping("600.32") and len(node.rows("select path from keys")) > 55, 20)
    with _killed_and_restarted(node):
        _out, err = process.communicate(timeout=15)
        assert process.returncode == 3 and b"\nfatal: " in err and str(node).encode() in err
        eventually(lambda: not _sleeping("600.31") + _sleeping("600.32"), 5, "no command survives")
    outputs = cluster.contents("s4://b/out/")
    assert len(outputs) > 15 and "020" not in outputs
    assert outputs == {name: f"{int(name)}\n".encode() for name in outputs}
    assert node.rows("select state from jobs") == [("interrupted",)]


@contextlib.contextmanager
def _index_of(node: Node) -> Iterator[sqlite3.Connection]:
    """The index of a node, to be written to; what is not committed is undone at the end."""
    path = node.data / "_index" / "node.db"
    with contextlib.closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as index:
        yield index


def test_the_death_of_the_node_between_a_rename_and_its_commit_leaves_no_file(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    for key in ("s4://b/in/000", "s4://b/out/other"):
        assert node.put(key, b"x").status == 200
    with _index_of(node) as index:  # the transaction that makes the output a key never ends
        index.execute(
            "create view endless as with recursive n(x) as"
            " (select 1 union all select x + 1 from n) select x from n"
        )
        index.execute(
            "create trigger hang after update on tasks when new.state = 'done'"
            " begin select count(*) from endless; end"
        )
    job = cluster.s4("map", "s4://b/in/", "s4://b/out/", "cat", "--detach").lines[0]
    output = node.path_of("s4://b/out/000")
    eventually(output.exists, 20, "the output is in its place")
    with _killed_and_restarted(node):
        assert output.exists() and node.rows("select path from keys where path = 'b/out/000'") == []
        with _index_of(node) as index:
            index.execute("drop trigger hang")
            index.execute("drop view endless")
    assert cluster.contents("s4://b/out/") == {"other": b"x"}
    cluster.s4("retry", job)
    assert cluster.contents("s4://b/out/") == {"000": b"x", "other": b"x"}


def _housekeeping(node: Node) -> None:
    """Wait until a round of housekeeping has begun that had not before; the one before it is over then."""
    reserve = node.data / "_index" / "node.db-reserve"  # made again first of all
    reserve.unlink()
    eventually(reserve.exists, 10, "housekeeping")


def test_the_end_of_a_transfer_that_cannot_be_recorded_is_recorded_later(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    assert node.put("s4://b/000", b"x").status == 200
    get, get_port = node.prepare_get("s4://b/000")
    put, put_port = node.prepare_put("s4://b/001")
    assert node.receive(get_port) == b"x"
    node.send(put_port, b"x")
    with _index_of(node) as index:
        index.execute("alter table transfers rename to gone")
        assert node.post("/confirm_get", uuid=get, checksum=checksum_of(b"x")).status == 200
        assert node.post("/confirm_put", uuid=put, checksum="0").status == 400
        for _ in range(2):
            _housekeeping(node)  # which tries in vain
        index.execute("alter table gone rename to transfers")
    assert {uuid for (uuid,) in node.rows("select uuid from transfers")} == {get, put}
    eventually(lambda: not node.rows("select * from transfers"), 10, "the ends are recorded")
    assert node.put("s4://b/001", b"x").status == 200


def test_a_transfer_whose_file_cannot_be_removed_is_over_all_the_same(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False, check=False)
    (node,) = cluster.nodes
    node.start(
        first="""if True:
        import errno, os, s4.transfers
        s4.transfers.UNCONFIRMED_SECONDS = 2.0
        really = os.unlink
        def unlink(path, **options):
            if "/_tempfiles/" in path:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            really(path, **options)
        os.unlink = unlink
        """
    )
    expires, port = node.prepare_put("s4://b/000")
    node.send(port, b"x")
    told = f"_tempfiles/{expires}.0 stays until the next start: [Errno 5]"
    eventually(lambda: told in node.log, 10, "it expires")
    eventually(lambda: not node.rows("select * from transfers"), 5, "its row is gone")
    refused, port = node.prepare_put("s4://b/000")
    node.send(port, b"x")
    assert node.post("/confirm_put", uuid=refused, checksum="0").status == 400
    assert node.rows("select * from transfers") == []
    assert node.put("s4://b/000", b"x").status == 200
    assert "housekeeping failed" not in node.log


def test_an_end_that_cannot_be_recorded_while_housekeeping_runs_is_recorded_later(
    start_cluster: Start,
) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    # Just before an end is added to those that wait, there is a round of housekeeping.
    node.start(
        first="""if True:
        from collections import deque
        from s4.evals import Evals
        from s4.transfers import Transfers
        def interrupted(kind, keep_house):
            class Ends(deque):
                def append(self, end):
                    keep_house(self.owner)
                    super().append(end)
            def replace(owner, ends):
                owner.ends = Ends(ends)
                owner.ends.owner = owner
            kind._unrecorded = property(lambda owner: owner.ends, replace)
        interrupted(Evals, Evals.keep_house)
        interrupted(Transfers, Transfers.expire)
        """
    )
    assert node.put("s4://b/000", b"x").status == 200
    get, port = node.prepare_get("s4://b/000")
    assert node.receive(port) == b"x"
    go = cluster.work / "go"
    line = f"until [ -e {go} ]; do sleep 0.02; done"
    with ThreadPoolExecutor(1) as threads:
        evaluation = threads.submit(node.post, "/eval", key="s4://b/000", body=line.encode())
        eventually(lambda: node.rows("select listed from jobs") == [(1,)], 10)
        with _index_of(node) as index:
            index.execute("alter table transfers rename to gone")
            index.execute("alter table tasks rename to lost")
            assert node.post("/confirm_get", uuid=get, checksum=checksum_of(b"x")).status == 200
            go.touch()
            assert evaluation.result().status == 200
            index.execute("alter table lost rename to tasks")
            index.execute("alter table gone rename to transfers")
    eventually(lambda: not node.rows("select * from transfers"), 10, "the end of the transfer is recorded")
    eventually(lambda: node.rows("select state from jobs") == [("done",)], 10, "the end of the eval, too")


def test_removals_beyond_those_that_may_wait_are_told_to_come_back(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    assert node.put("s4://b/d/000", b"x").status == 200
    with contextlib.ExitStack() as stack:
        index = stack.enter_context(_index_of(node))
        index.execute("begin immediate")  # until it ends nothing can be removed
        target = "/delete?prefix=s4://b/&recursive=true"
        asked = [stack.enter_context(_request(node, "POST", target)) for _ in range(WAITING_REMOVALS + 3)]
        eventually(lambda: len(_answered(asked)) == 3, 10, "those beyond the limit are refused")
        assert all(answer.startswith(b"HTTP/1.1 429 ") for answer in _answered(asked))
        made = node.post("/remove_outputs", body=b'[["d", "job", 0]]', prefix="s4://b/")
        assert made.status == 429 and int(made.headers["Retry-After"]) >= 1
        assert node.get("/health", timeout=10).status == 200
        index.execute("rollback")
        eventually(lambda: len(_answered(asked)) == len(asked), 20, "the others are done")
        answers = Counter(answer[9:12] for answer in _answered(asked))
    assert answers == {b"429": 3, b"200": WAITING_REMOVALS}
    assert node.post("/remove_outputs", body=b'[["d", "job", 0]]', prefix="s4://b/").status == 200
    assert node.listing("s4://b") == []


def test_queries_beyond_those_that_may_wait_are_told_to_come_back(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    node.start(first="import s4.index.query; s4.index.query.QUERY_SECONDS = 1000.0")
    endless = b"with recursive n(x) as (select 1 union all select x + 1 from n) select sum(x) from n"
    with contextlib.ExitStack() as stack:
        asked = [
            stack.enter_context(_request(node, "POST", "/sql", endless)) for _ in range(WAITING_QUERIES + 3)
        ]
        eventually(lambda: len(_answered(asked)) == 3, 10, "those beyond the limit are refused")
        assert all(answer.startswith(b"HTTP/1.1 429 ") for answer in _answered(asked))
        assert node.get("/health", timeout=10).status == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_client_that_dies_in_a_put_or_a_get_leaves_nothing(start_cluster: Start, number: int) -> None:
    cluster, node = _alone(start_cluster)
    assert node.put("s4://large/000", bytes(60 << 20)).status == 200
    write_tree(cluster.work, {"src/000": b""})
    os.truncate(cluster.work / "src" / "000", 6 << 30)  # so much is reserved on the disk
    stream = cluster.start_s4("cp", "-", "s4://b/stream", stdin=subprocess.PIPE)
    file = cluster.start_s4("cp", "/dev/zero", "s4://b/file")
    batch = cluster.start_s4("cp", "-r", "src", "s4://b/batch/")
    read, write = os.pipe()
    get = cluster.start_s4("cp", "s4://large/000", "-", stdout=write)
    os.close(write)
    assert stream.stdin is not None
    with stream.stdin as pipe:
        pipe.write(b"x" * 500_000)
        pipe.flush()
        eventually(lambda: len(node.temporary()) == 3, 15, "bytes arrive")
        assert os.read(read, 1)
        for process in (stream, file, batch, get):
            process.send_signal(number)
        os.close(read)
        for process in (stream, file, batch, get):
            assert process.wait(5) != 0
    eventually(lambda: not node.temporary() and not node.rows("select * from transfers"), CLEANED_UP)
    assert cluster.keys("s4://b") == []
    assert node.put("s4://b/stream", b"x").status == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_command_of_a_client_that_dies_in_an_eval_is_ended(start_cluster: Start, number: int) -> None:
    cluster, node = _alone(start_cluster)
    assert node.put("s4://b/000", b"x").status == 200
    process = cluster.start_s4("eval", "s4://b/000", "sleep 600.41")
    eventually(lambda: _sleeping("600.41"), 10)
    process.send_signal(number)
    assert process.wait(5) != 0
    eventually(lambda: not _sleeping("600.41"), 5, "its command is ended")


def test_a_stop_ends_transfers_and_commands(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    assert node.put("s4://b/in/000", bytes(30 << 20)).status == 200
    evaluation = cluster.start_s4("eval", "s4://b/in/000", "trap '' TERM; sleep 600.51 & sleep 600.51")
    job = cluster.start_s4(
        "map", "s4://b/in/", "s4://b/out/", "trap '' TERM; setsid sleep 600.52 & sleep 600.52"
    )
    put = cluster.start_s4("cp", "/dev/zero", "s4://b/endless")
    _uuid, port = node.prepare_get("s4://b/in/000")
    with node.dial(port) as get:
        get.recv(1)
        eventually(lambda: len(_sleeping("600.51")) == len(_sleeping("600.52")) == 2, 10)
        eventually(lambda: node.rows("select * from transfers where direction = 'put'"), 10)
        below = {process.pid for process in procs.descendants(node.pid)}
        assert node.terminate(within=5) == 0
    assert _sleeping("600.51") == _sleeping("600.52") == []
    eventually(lambda: not below & {process.pid for process in procs.everyone()}, 3, "nothing runs on")
    for process in (evaluation, job, put):
        _out, err = process.communicate(timeout=10)
        told = [line for line in err.splitlines() if not line.startswith((b"job ", b"failed: "))]
        assert process.returncode in ((1, 3) if process is job else (1,)), err
        assert len(told) == 1 and told[0].startswith(b"fatal: "), err
    node.start()
    assert node.rows("select path from keys") == [("b/in/000",)]
    node.check()


SLOW_RECORDS = """if True:
    import time
    from s4.evals import Evals
    at_once = Evals._record_end
    def slowly(*arguments):
        time.sleep(0.5)
        at_once(*arguments)
    Evals._record_end = slowly
"""


def test_a_stop_removes_what_nobody_has_confirmed(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    _uuid, port = node.prepare_put("s4://b/000")
    node.send(port, b"x")
    eventually(lambda: list(node.data.glob("_tempfiles/*")), 10, "it has arrived")
    assert node.terminate() == 0
    assert node.temporary() == []


def test_a_stop_waits_for_the_record_of_an_eval_that_it_ended(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    node.start(first=SLOW_RECORDS)  # otherwise the one or the other may be first
    assert node.put("s4://b/000", b"x").status == 200
    evaluation = cluster.start_s4("eval", "s4://b/000", "sleep 600.53")
    eventually(lambda: node.rows("select pid from tasks") and _sleeping("600.53"), 10, "it runs")
    assert node.terminate() == 0
    assert evaluation.wait(10) == 1
    assert node.rows("select kind, state, error from jobs") == [("eval", "interrupted", "the node stopped")]
    [(state, pid, seconds)] = node.rows("select state, pid, seconds from tasks")
    assert state == "cancelled" and pid and seconds > 0


def test_a_checksum_that_does_not_match_stores_nothing(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    for checksum in ("0", "", "nonsense", checksum_of(b"right").upper() + "0", "0" + checksum_of(b"right")):
        uuid, port = node.prepare_put("s4://b/000")
        node.send(port, b"right")
        answer = node.post("/confirm_put", uuid=uuid, checksum=checksum)
        assert answer.status == 400 and "s4://b/000" in answer.text, answer
        assert cluster.keys("s4://b") == [] and node.temporary() == []
    assert node.put("s4://b/000", b"right").status == 200
    uuid, port = node.prepare_get("s4://b/000")
    assert node.receive(port) == b"right"
    assert node.post("/confirm_get", uuid=uuid, checksum=checksum_of(b"wrong")).status == 400


def test_a_repeated_confirm_gets_the_same_answer(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    first, second = node.prepare_put("s4://b/000"), node.prepare_put("s4://b/000")
    for (_uuid, port), data in ((first, b"first"), (second, b"second")):
        node.send(port, data)
    assert [node.confirm_put(first[0], b"first").status for _ in range(3)] == [200] * 3
    assert [node.confirm_put(second[0], b"second").status for _ in range(3)] == [409] * 3
    assert [node.confirm_put(first[0], b"first").status for _ in range(2)] == [200] * 2
    assert node.fetch("s4://b/000") == b"first"
    for uuid in ("", "nonsense", "../../etc/passwd"):
        assert node.confirm_put(uuid, b"").status in (400, 404)
        assert node.post("/confirm_get", uuid=uuid, checksum="0").status in (400, 404)
    assert cluster.keys("s4://b") == ["s4://b/000"]


def test_a_key_that_is_removed_during_a_get_arrives_whole(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    data = os.urandom(20 << 20)
    assert node.put("s4://b/000", data).status == 200
    uuid, port = node.prepare_get("s4://b/000")
    with node.dial(port) as connection:
        head = connection.recv(1000)
        assert node.post("/delete", prefix="s4://b/000").status == 200
        assert node.post("/prepare_get", key="s4://b/000").status == 404
        assert node.put("s4://b/000", b"new").status == 200
        assert head + read_to_end(connection) == data
    assert node.post("/confirm_get", uuid=uuid, checksum=checksum_of(data)).status == 200
    assert node.fetch("s4://b/000") == b"new"


def _call_from_its_own_address(node: Node, target: str) -> str:
    """The answer to a POST by a caller that has the node's address, not 127.0.0.1."""
    with socket.create_connection((node.host, node.port), 10, (node.host, 0)) as control:
        control.sendall(f"POST {target} HTTP/1.0\r\nContent-Length: 0\r\n\r\n".encode())
        answer = read_to_end(control)
    assert answer.startswith(b"HTTP/1.0 200 "), answer
    return answer.partition(b"\r\n\r\n")[2].decode()


def test_a_node_connects_to_the_port_that_a_get_names(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    data = os.urandom(300_000)
    assert node.put("s4://b/000", data).status == 200
    with socket.create_server((node.host, 0)) as listener:
        listener.settimeout(10)
        target = f"/prepare_get?key=s4://b/000&port={listener.getsockname()[1]}"
        answer = _call_from_its_own_address(node, target)
        connection, _address = listener.accept()
        with connection:
            assert read_to_end(connection) == data
    (uuid,) = answer.split()
    assert node.post("/confirm_get", uuid=uuid, checksum=checksum_of(data)).status == 200
    nobody = node.post("/prepare_get", key="s4://b/000", port=free_port())
    assert nobody.status < 500
    for port in ("0x50", "-1", "70000", ""):
        assert node.post("/prepare_get", key="s4://b/000", port=port).status == 400


GARBAGE = {
    "binary": os.urandom(5000),
    "nothing": b"",
    "ends of lines": b"\r\n" * 1000,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "half a request line": b"GET /hea",
    "half a head": b"GET /health HTTP/1.1\r\nHost: x\r\n",
    "half a body": b"POST /eval?key=s4://b/000 HTTP/1.1\r\nContent-Length: 1000\r\n\r\nrm",
    "a huge line": b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\n\r\n",
    "a huge header": b"GET /health HTTP/1.1\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
    "an endless header": b"GET /health HTTP/1.1\r\nX: " + b"x" * 3_000_000,
    "no number": b"POST /map HTTP/1.1\r\nContent-Length: many\r\n\r\n",
    "a negative number": b"POST /map HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "a huge body": b"POST /map HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\n{",
    "bad chunks": b"POST /map HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    "no JSON": b"POST /map HTTP/1.1\r\nContent-Length: 4\r\n\r\n\xff\x00{[",
    "deep JSON": b"POST /map HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000,
    "JSON of another shape": b'POST /prepare_puts HTTP/1.1\r\nContent-Length: 12\r\n\r\n[["s4://b"]]',
    "bad percents": b"GET /list?prefix=%zz%f&recursive=%ff HTTP/1.1\r\n\r\n",
    "NUL": b"POST /prepare_put?key=s4://b/%00 HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "an unknown method": b"BREW /health HTTP/1.1\r\n\r\n",
    "the wrong method": b"GET /prepare_put?key=s4://b/1 HTTP/1.1\r\n\r\n",
    "an unknown path": b"GET /../../etc/passwd HTTP/1.1\r\n\r\n",
}


def test_garbage_at_the_http_port_harms_nobody(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    assert node.put("s4://b/000", b"x").status == 200
    odd = {}
    with cluster.nothing_changes():
        for name, garbage in GARBAGE.items():
            answer = b""
            with contextlib.suppress(ConnectionError), node.dial(node.port) as connection:
                connection.settimeout(10)
                connection.sendall(garbage)
                with contextlib.suppress(OSError):  # the node may have hung up already
                    connection.shutdown(socket.SHUT_WR)
                answer = read_to_end(connection)
            status = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
            if answer and (status is None or not (400 <= int(status[1]) < 500 or int(status[1]) == 501)):
                odd[name] = answer[:300]
            assert node.get("/health", timeout=5).status == 200, name
    assert set(odd) <= {"bad percents"}, odd
    assert "Traceback" not in node.log


def test_half_requests_that_stay_open_keep_nobody_out(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    with contextlib.ExitStack() as stack:
        for i in range(150):
            connection = stack.enter_context(node.dial(node.port))
            connection.sendall(list(GARBAGE.values())[4 + i % 3])
        assert _seconds(lambda: node.get("/health")) < 1
        assert node.put("s4://b/001", b"x").status == 200


def _ask_slowly(node: Node, method: str, target: str, body: bytes = b"") -> socket.socket:
    """A request over a connection that takes little of the answer before it is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect((node.host, node.port))
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def _read_slowly(connection: socket.socket) -> bytes:
    """The body of an answer, read at 2 MB a second. Raises HTTPException if it breaks off."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    blocks = []
    while block := response.read(40_000):
        blocks.append(block)
        time.sleep(0.02)
    return b"".join(blocks)


@contextlib.contextmanager
def _idle_connections(node: Node, count: int) -> Iterator[None]:
    """Connections on which nothing is asked; they may be more than a process has files by default."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(node.dial(node.port))
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_thousands_of_idle_connections_keep_nobody_out(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    with _idle_connections(node, 1500):
        assert node.get("/health", timeout=10).status == 200


def test_more_connections_than_descriptors_are_no_errors(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    with open(node.log_path, "ab") as log:
        node.process = cluster.start_s4(
            *("-port", str(node.port), "-conf", str(cluster.conf)),
            program=[SERVER],
            cwd=node.folder,
            stdout=log,
            stderr=log,
            before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400)),
        )
    node.wait_healthy()
    with _idle_connections(node, 600):
        eventually(lambda: "reached the connection limit" in node.log, 10)
    assert node.get("/health", timeout=10).status == 200
    assert node.put("s4://b/000", b"x").status == 200
    assert "accept() threw" not in node.log


@contextlib.contextmanager
def _without_descriptors(node: Node) -> Iterator[None]:
    """Nothing more can be opened by the node."""
    # While it starts a worker it has descriptors that it closes soon.
    eventually(lambda: [worker.state for worker in node.workers()].count("S") >= SPARE_WORKERS, 10)
    own = resource.prlimit(node.pid, resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir(f"/proc/{node.pid}/fd")))
    first_free = next(fd for fd in range(len(taken) + 1) if fd not in taken)
    resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (first_free, own[1]))
    try:
        yield
    finally:
        resource.prlimit(node.pid, resource.RLIMIT_NOFILE, own)


def test_a_moment_without_descriptors_is_told_and_passes(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    connection = http.client.HTTPConnection(node.host, node.port, timeout=20)
    connection.request("GET", "/health")
    connection.getresponse().read()
    before = len(node.log)
    with _without_descriptors(node):
        connection.request("POST", "/sql", b"select 1")
        answer = connection.getresponse()
        assert (answer.status, b"too many files are open" in answer.read()) == (429, True)
        client = cluster.start_s4("sql", "select 7 as seven", "--format", "csv")
        eventually(lambda: "a connection has to wait" in node.log, 10)
        time.sleep(1)  # in which it is tried again and again
        assert len(node.log) - before < 10_000
    out, err = client.communicate(timeout=20)
    assert (client.returncode, err) == (0, b"") and out.splitlines()[1:] == [f"{node},7".encode()]
    connection.close()


def test_an_eval_whose_output_cannot_be_opened_failed(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    cluster.put("s4://b/000", b"x")
    go = cluster.work / "go"
    connection = http.client.HTTPConnection(node.host, node.port, timeout=20)
    command = f"until [ -e {go} ]; do sleep 0.02; done; cat".encode()
    connection.request("POST", "/eval?key=s4://b/000", command)
    eventually(lambda: node.rows("select listed from jobs") == [(1,)], 10)
    with _without_descriptors(node):
        go.touch()
        answer = connection.getresponse()
        said = answer.read().decode()
    assert answer.status == 500 and said.startswith("s4://b/000: what it printed cannot be read: "), said
    assert node.rows("select state, error from jobs") == [("failed", said.removeprefix("s4://b/000: "))]
    connection.close()


def test_files_that_cannot_be_removed_now_are_removed_soon(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    cluster.put_all({f"s4://b/d/{i:03}": b"x" for i in range(5)})
    connection = http.client.HTTPConnection(node.host, node.port, timeout=20)
    for path in ("/list?prefix=s4://b/", "/delete?prefix=s4://b/d/000"):  # which opens what is kept open
        connection.request("GET" if "list" in path else "POST", path)
        connection.getresponse().read()
    with _without_descriptors(node):
        connection.request("POST", "/delete?prefix=s4://b/d/&recursive=true")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"deleted")
        assert len(list(node.data.glob("b/d/*"))) == 4
        assert node.rows("select prefix from removals") == [("b/d/",)]
    eventually(lambda: not (node.data / "b").exists(), 10)
    eventually(lambda: node.rows("select * from removals") == [], 5)
    connection.close()


def test_a_file_that_can_be_no_key_keeps_no_node_from_starting(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    cluster.put("s4://b/in/000", b"x")
    client = cluster.start_s4("map", "s4://b/in/", "s4://b/out/", "sleep 600.03")
    eventually(lambda: _sleeping("600.03"), 10)
    node.kill()
    assert client.wait(30) == 3
    odd = os.fsencode(node.data) + b"/b/out/caf\xe9"
    os.makedirs(os.path.dirname(odd), exist_ok=True)
    with open(odd, "wb"), open(node.data / "b" / "out" / "left", "wb"):
        pass
    node.start()
    assert os.listdir(os.path.dirname(odd)) == [b"caf\xe9"]
    os.unlink(odd)


def test_what_bash_takes_from_the_environment_of_a_node_changes_no_command(start_cluster: Start) -> None:
    environment = {"SHELLOPTS": "errexit:noexec:xtrace", "BASHOPTS": "failglob", "OLDPWD": "/usr"}
    cluster = start_cluster(1, env=environment)
    cluster.put_all({f"s4://b/in/{i}": b"1\n" for i in range(4)})
    cluster.s4("map", "s4://b/in/", "s4://b/out/", "sed s/1/2/ | sort; echo ${OLDPWD-none}; echo no*such >&2")
    assert set(cluster.contents("s4://b/out/").values()) == {b"2\nnone\n"}
    (node,) = cluster.nodes
    assert set(node.rows("select stderr from stderrs")) == {(b"no*such\n",)}


def test_only_a_connection_without_a_request_is_closed_for_being_idle(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    assert node.put("s4://b/000").status == 200
    closed = cluster.work / "closed"
    with (
        _ask_slowly(node, "POST", "/eval?key=s4://b/000", b"seq 400000") as unread,
        _request(
            node,
            "POST",
            "/eval?key=s4://b/000",
            f"until [ -e {closed} ]; do sleep 0.1; done; echo x".encode(),
        ) as working,
    ):
        eventually(lambda: _answered([unread]), 10)
        with node.dial(node.port) as idle:
            idle.settimeout(35)
            assert idle.recv(1) == b""
        closed.touch()
        assert _read_slowly(unread) == b"".join(b"%d\n" % i for i in range(1, 400_001))
        assert _read_slowly(working) == b"x\n"


def test_garbage_at_a_transfer_port_is_never_a_key(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    uuid, port = node.prepare_put("s4://b/000")
    node.send(port, b"GET / HTTP/1.1\r\n\r\n" + os.urandom(1000))
    assert node.confirm_put(uuid, b"data").status == 400

    body = b'[["s4://b/one", 10], ["s4://b/two", 10]]'
    for data in (b"", b"short", b"x" * 19):
        prepared = node.post("/prepare_puts", body=body).json()
        with contextlib.suppress(ConnectionError):
            node.send(prepared["port"], data)
        confirmed = node.post("/confirm_puts", uuid=prepared["uuid"], body=b'["0", "0"]')
        assert 400 <= confirmed.status < 500, (data, confirmed)

    assert node.put("s4://b/get", b"data").status == 200
    uuid, port = node.prepare_get("s4://b/get")
    with contextlib.suppress(ConnectionError):
        node.send(port, os.urandom(100_000))
    assert node.post("/confirm_get", uuid=uuid, checksum="0").status == 400
    assert node.fetch("s4://b/get") == b"data"
    assert cluster.keys("s4://b") == ["s4://b/get"]


def test_only_the_one_who_prepared_a_transfer_can_use_its_port(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    answer = _call_from_its_own_address(node, "/prepare_put?key=s4://b/000")
    uuid, port = answer.split()
    with socket.create_connection((node.host, int(port)), 10, ("127.0.0.1", 0)) as stranger:
        stranger.sendall(b"from a stranger")
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(1) == b""
    with socket.create_connection((node.host, int(port)), 10, (node.host, 0)) as ours:
        ours.sendall(b"ours")
    assert node.confirm_put(uuid, b"ours").status == 200
    assert node.fetch("s4://b/000") == b"ours"


COMMANDS = {
    "put": ["cp", "-", "s4://b/000"],
    "get": ["cp", "s4://b/000", "-"],
    "recursive put": ["cp", "-r", "src", "s4://b/d/"],
    "recursive get": ["cp", "-r", "s4://b/d/", "out/"],
    "ls": ["ls", "-r", "s4://b/"],
    "buckets": ["ls"],
    "rm": ["rm", "s4://b/000"],
    "rm -r": ["rm", "-r", "s4://b/"],
    "eval": ["eval", "s4://b/000", "cat"],
    "map": ["map", "s4://b/d/", "s4://b/out/", "cat"],
    "map-to-n": ["map-to-n", "s4://b/d/", "s4://b/out/", "cat"],
    "map-from-n": ["map-from-n", "s4://b/d/", "s4://b/out/", "cat"],
}


def _all_fail(
    cluster: Cluster, server: str, env: dict[str, str], only: list[str] | None = None, job_code: int = 3
) -> None:
    """Every command ends with one clear line that names the server."""
    write_tree(cluster.work, {"src/000": b"x"})
    starting = {
        name: cluster.start_s4(*COMMANDS[name], env=env, stdin=subprocess.DEVNULL)
        for name in only or COMMANDS
    }
    for name, process in starting.items():
        out, err = process.communicate(timeout=30)
        assert process.returncode == (job_code if name.startswith("map") else 1), (name, out, err)
        lines = err.decode().splitlines()
        assert lines[-1].startswith("fatal: ") and len(lines) <= 2 and server in err.decode(), (name, err)
        assert out == b"" or name == "buckets", (name, out)
    assert tree(cluster.work) == {"src/000": b"x"}


def test_a_server_that_is_down_is_named(start_cluster: Start) -> None:
    cluster = start_cluster(2)
    assert cluster.nodes[1].put("s4://b/d/001", b"x").status == 200
    cluster.nodes[0].terminate()
    with cluster.nothing_changes():
        _all_fail(cluster, str(cluster.nodes[0]), {}, [name for name in COMMANDS if name != "rm -r"])


class Impostor:
    """Something that listens on a port and answers whatever it is asked in one way."""

    def __init__(self, answer: Callable[[socket.socket], None], folder: Path) -> None:
        self._answer = answer
        self._listener = socket.create_server((HOST, free_port()))
        self.server = f"{HOST}:{self._listener.getsockname()[1]}"
        self.conf = folder / "impostor.conf"
        self.conf.write_text(self.server + "\n")
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> "Impostor":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(20)
            self._answer(connection)


def _bytes(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"\x00\xffno HTTP at all\r\n\r\n" * 10)


def _page(connection: socket.socket) -> None:
    while connection.recv(65536):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>hi</html>")


def _closed(connection: socket.socket) -> None:
    connection.recv(65536)


def _silence(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


@pytest.mark.parametrize("answer", [_bytes, _page, _closed, _silence])
def test_a_server_that_answers_nonsense_is_named(
    start_cluster: Start, folder: Path, answer: Callable[[socket.socket], None]
) -> None:
    cluster = start_cluster(1, start=False)
    with Impostor(answer, folder) as impostor:
        env = {"S4_CONF_PATH": str(impostor.conf), "S4_TIMEOUT": "2"}
        wanted = ["put", "get", "ls", "rm", "rm -r", "recursive put"]
        if answer is not _silence:  # a command may take as long as it is allowed to
            wanted += ["eval", "map", "map-from-n"]
        _all_fail(cluster, impostor.server, env, wanted)
        result = cluster.run("health", env=env, timeout=5)
    assert (result.code, result.lines) == (1, [f"unhealthy: {impostor.server}"])


@pytest.mark.parametrize(
    "body", [b"<html>hi</html>", b"", b"[[1, 2], 3\n", b'{"uuid": 7}', b"uuid 99999999", b"\xff\xfe"]
)
def test_a_server_that_speaks_like_a_node_but_nonsense_is_named(
    start_cluster: Start, folder: Path, body: bytes
) -> None:
    cluster = start_cluster(1, start=False)
    marks: list[str] = []

    def answer(connection: socket.socket) -> None:
        while connection.recv(65536):
            head = f"HTTP/1.1 200 OK\r\nS4-Conf: {marks[0]}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)

    with Impostor(answer, folder) as impostor:
        marks.append(read_conf(str(impostor.conf)).fingerprint)
        env = {"S4_CONF_PATH": str(impostor.conf), "S4_TIMEOUT": "2"}
        where = impostor.server.partition(":")[0]
        _all_fail(cluster, where, env, ["put", "get", "ls", "recursive put"])


def test_a_server_of_another_cluster_is_reported_and_gets_nothing(start_cluster: Start, folder: Path) -> None:
    one, other = start_cluster(1), start_cluster(1)
    (folder / "conf").write_text(f"{one.nodes[0]}\n{other.nodes[0]}\n")
    env = {"S4_CONF_PATH": str(folder / "conf")}
    result = one.run("health", env=env)
    assert result.code == 1
    assert result.lines == [f"unhealthy: {cluster.nodes[0]}" for cluster in (one, other)]
    assert "conf" in result.err
    with one.nothing_changes(), other.nothing_changes():
        _all_fail(one, str(one.nodes[0]).partition(":")[0], env, job_code=1)


def test_symbolic_links_in_the_data_folder_lead_nowhere(start_cluster: Start, folder: Path) -> None:
    cluster, node = _alone(start_cluster, check=False)
    write_tree(folder, {"secret": b"secret", "below/001": b"secret"})
    for key in ("s4://b/in/000", "s4://b/in/002", "s4://b/far/001"):
        assert node.put(key, b"x").status == 200
    node.path_of("s4://b/far/001").unlink()
    node.path_of("s4://b/far").rmdir()
    node.path_of("s4://b/far").symlink_to(folder / "below")
    node.path_of("s4://b/in/000").unlink()
    node.path_of("s4://b/in/000").symlink_to(folder / "secret")
    node.path_of("s4://b/link").symlink_to(folder / "below")
    node.path_of("s4://linked").symlink_to(folder)
    before = tree(folder)

    for key in ("s4://b/link/new", "s4://b/link/001", "s4://linked/new", "s4://linked/below/new"):
        assert node.put(key, b"x").status == 409, key
        cluster.fails("cp", "-", key, data=b"x", code=1, says=key)
    for key in ("s4://b/in/000", "s4://b/far/001", "s4://b/link/001", "s4://linked/secret"):
        assert node.post("/prepare_get", key=key).status >= 400
        assert node.post("/eval", key=key, body=b"cat").status >= 400
        assert "secret" not in cluster.run("cp", key, "-").out.decode()
    result = cluster.run("map", "s4://b/in/", "s4://b/out/", "cat")
    assert result.code == 1 and "s4://b/in/000" in result.fatal
    result = cluster.run("map-from-n", "s4://b/far/", "s4://b/out/", "xargs cat")
    assert result.code == 1 and "s4://b/far/001" in result.fatal
    cluster.s4("map", "s4://b/in/*2", "s4://b/link2/", "cat")
    cluster.s4("rm", "-r", "s4://b/")
    cluster.s4("rm", "-r", "s4://linked/")
    assert tree(folder) == before
    assert not node.path_of("s4://b/in/000").is_symlink()


def test_a_full_disk_of_the_client_is_one_clear_line(start_cluster: Start, folder: Path) -> None:
    cluster, node = _alone(start_cluster)
    assert node.put("s4://b/d/000", os.urandom(3 << 20)).status == 200
    assert node.put("s4://b/e/000", bytes(400_000)).status == 200
    line = cluster.fails("cp", "s4://b/d/000", "/dev/full", code=1, says="/dev/full")
    assert "No space left" in line
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "s4-test", str(folder)], capture_output=True
    )
    if mounted.returncode != 0:
        return  # only root can have a small disk; the limit of file sizes in test_cp is nearly the same
    try:
        for arguments in (["s4://b/d/000", "out"], ["s4://b/d/000", "dir/"], ["-r", "s4://b/d/", "dir/"]):
            assert "No space left" in cluster.fails("cp", *arguments, code=1, cwd=folder)
            assert tree(folder) == {}
        cluster.s4("cp", "s4://b/e/000", "out", cwd=folder)  # what is reserved ahead of it does not fit
        assert tree(folder) == {"out": bytes(400_000)}
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def _small_disk(node: Node, megabytes: int) -> Iterator[None]:
    """A data folder of this size for a node that the block starts; it is stopped at the end."""
    node.data.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "s4-test", str(node.data)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can have a small disk")
    try:
        yield
    finally:
        node.terminate()
        # A process that the node has left to itself may take a moment to end.
        umount = ["umount", str(node.data)]
        eventually(lambda: subprocess.run(umount, capture_output=True).returncode == 0, 5, "umount")


def _fill_disk(node: Node, leave: int = 0) -> Path:
    """Leave so many bytes of room in the data folder; the file that takes the others."""
    path = node.data / "_index" / "fill"  # which a node leaves alone
    with open(path, "ab", buffering=0) as fill, contextlib.suppress(OSError):
        while (disk := os.statvfs(node.data)).f_bavail * disk.f_frsize > leave:
            fill.write(bytes(4096))
    return path


def test_on_a_full_disk_keys_can_be_read_and_removed(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False, check=False)
    (node,) = cluster.nodes
    with _small_disk(node, 12):
        node.start()
        cluster.put_all({f"s4://b/{i:03}": bytes(10_000) for i in range(300)})
        result = cluster.run("map", "s4://b/", "s4://o/", "head -c 25000000 /dev/zero > x")
        assert result.code == 1 and "No space left on device" in result.err  # what a command says has room
        eventually(lambda: cluster.run("eval", "s4://b/000", "true").code == 0, 5, "there is room again")
        node.terminate()  # which leaves the index without room of its own
        node.start()
        _fill_disk(node)
        cluster.fails("cp", "-", "s4://b/more", data=b"x", code=1, says="full; s4 rm makes room")
        node.kill()
        node.start()
        assert cluster.s4("cp", "s4://b/000", "-").out == bytes(10_000)
        cluster.s4("cp", "-r", "s4://b/", "copy/")
        cluster.s4("rm", "s4://b/000")
        cluster.s4("rm", "-r", "s4://b/0")
        assert len(cluster.keys("s4://b/")) == 200
        cluster.s4("cp", "-", "s4://b/more", data=b"x")


def test_jobs_that_a_crash_ended_are_over_as_soon_as_there_is_room_to_record_it(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    with _small_disk(node, 24):
        node.start()
        write_tree(cluster.work / "src", {f"{i:04}{'x' * 200}": b"" for i in range(4000)})
        cluster.s4("cp", "-r", "src", "s4://b/in/")
        cluster.s4("map", "s4://b/in/", "s4://b/out/", "sleep 600.04", "--detach")
        eventually(lambda: _sleeping("600.04"), 10)
        node.terminate()
        with contextlib.closing(sqlite3.connect(node.data / "_index" / "node.db")) as db:
            db.execute("update jobs set state = 'running', finished_s = null")
            db.execute("update tasks set state = 'waiting'")
            db.commit()
        (node.data / "_index" / "node.db-reserve").unlink(missing_ok=True)
        fill = _fill_disk(node)
        os.truncate(fill, fill.stat().st_size - 100_000)  # enough to start with, but not to record 4000 tasks
        node.start()
        assert "not recorded as over" in node.log
        assert node.rows("select state from jobs") == [("running",)]
        fill.unlink()
        eventually(lambda: node.rows("select state from jobs") == [("interrupted",)], 10)
        [(job,)] = node.rows("select id from jobs")
        cluster.s4("cancel", job)
        cluster.s4("retry", job, "--detach")
        cluster.s4("cancel", job)


def test_folders_that_a_crash_left_empty_are_removed(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    cluster.put("s4://b/x/kept/000", b"x")
    node.kill()
    for folder in ("x/gone/deep", "y/gone"):
        (node.data / "b" / folder).mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(node.data / "_index" / "node.db")) as db:
        db.executemany("insert into removals (prefix) values (?)", [("b/x/",), ("b/y/gone/000",)])
        db.commit()
    node.start()
    assert [str(path.relative_to(node.data)) for path in node.data.glob("b/**/*")] == [
        "b/x",
        "b/x/kept",
        "b/x/kept/000",
    ]


def test_a_stop_on_a_full_disk_loses_nothing(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    with _small_disk(node, 12):
        node.start()
        cluster.put_all({f"s4://b/{i:03}{'x' * 200}": b"" for i in range(200)})
        fill = _fill_disk(node)
        assert node.terminate() == 0
        assert "Traceback" not in node.log
        fill.unlink()
        node.start()
        assert len(cluster.keys("s4://b/")) == 200


def test_on_a_disk_without_a_byte_left_a_node_starts_and_keys_can_be_removed(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False, check=False)
    (node,) = cluster.nodes
    with _small_disk(node, 12):
        node.start()
        cluster.put_all({f"s4://b/{i:03}": bytes(10_000) for i in range(20)})
        assert node.terminate() == 0
        _fill_disk(node)
        node.start()
        assert cluster.s4("cp", "s4://b/000", "-").out == bytes(10_000)
        assert cluster.s4("eval", "s4://b/000", "wc -c").lines == ["10000"]
        cluster.s4("rm", "-r", "s4://b/00")
        assert len(cluster.keys("s4://b/")) == 10


def test_on_a_disk_without_a_byte_left_an_index_is_rebuilt_or_the_reason_told(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False, check=False)
    (node,) = cluster.nodes
    place = ["-port", str(node.port), "-conf", str(cluster.conf)]

    def fails(*action: str) -> None:
        done = subprocess.run([SERVER, *action, *place], cwd=node.folder, capture_output=True, timeout=60)
        assert done.returncode == 1
        assert done.stderr.endswith(b"node.db: the disk is full; to be opened it needs a little room\n")

    with _small_disk(node, 12):
        node.start()
        cluster.put("s4://b/000", b"x")
        assert node.terminate() == 0
        _fill_disk(node)
        subprocess.run([SERVER, "reindex", *place], cwd=node.folder, check=True, timeout=60)
        (node.data / "_index" / "node.db-reserve").unlink(missing_ok=True)  # the room that was used for this
        fill = _fill_disk(node)
        fails("reindex")
        fails()
        fill.unlink()
        node.start()
        assert cluster.keys("s4://b/") == ["s4://b/000"]


def test_on_a_full_disk_a_slow_reader_gets_a_long_answer_whole(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    folder = "/".join(letter * 255 for letter in "abc")
    names = [f"{folder}/{i:04}{'x' * 236}" for i in range(4000)]
    printed, full = cluster.work / "printed", cluster.work / "full"
    with _small_disk(node, 64), contextlib.ExitStack() as stack:

        def ask(method: str, target: str, body: bytes = b"") -> socket.socket:
            return stack.enter_context(_ask_slowly(node, method, target, body))

        node.start()
        write_tree(cluster.work / "src", dict.fromkeys(names, b""))
        cluster.s4("cp", "-r", "src", "s4://b/")
        line = f"seq 600000; touch {printed}; until [ -e {full} ]; do sleep 0.05; done"
        evaluation = ask("POST", f"/eval?key=s4://b/{names[0]}", line.encode())
        eventually(printed.exists, 10)
        _fill_disk(node, leave=10 << 20)
        half = ask("GET", "/list?prefix=s4://b/&recursive=true")
        eventually(lambda: procs.holds_open(node.pid, node.data / "_tempfiles"), 5, "a part is in a file")
        _fill_disk(node)
        full.touch()
        listing = ask("GET", "/list?prefix=s4://b/&recursive=true")
        assert [row[3] for row in json.loads(_read_slowly(listing))] == names
        assert [row[3] for row in json.loads(_read_slowly(half))] == names
        assert _read_slowly(evaluation) == b"".join(b"%d\n" % i for i in range(1, 600_001))
        cluster.s4("rm", "-r", "s4://b/")


def test_a_full_disk_of_the_node_is_one_clear_line_and_it_goes_on(start_cluster: Start, folder: Path) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    node.start(files_up_to=4 << 20)
    (folder / "large").write_bytes(bytes(6 << 20))
    with cluster.nothing_changes():
        for arguments in (["large", "s4://b/000"], ["-r", ".", "s4://b/d/"]):
            assert "too large" in cluster.fails("cp", *arguments, code=1, cwd=folder)
        assert "too large" in cluster.fails("cp", "-", "s4://b/000", code=1, data=bytes(6 << 20))
    assert node.put("s4://b/in/000", b"x").status == 200
    line = "head -c 6000000 /dev/zero"
    assert "s4://b/in/000" in cluster.fails("map", "s4://b/in/", "s4://b/out/", line, code=1)
    assert cluster.keys("s4://b") == ["s4://b/in/000"]


def test_an_idle_node_takes_less_than_150_megabytes(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    write_tree(cluster.work / "src", {f"{i:03}": b"x" for i in range(100)})
    cluster.s4("cp", "-r", "src", "s4://b/in/")
    marks = cluster.work / "marks"
    marks.mkdir()
    together = f"touch {marks}/$filename; until [ $(ls {marks} | wc -l) -ge 3 ]; do sleep 0.01; done; cat"
    cluster.s4("map", "s4://b/in/", "s4://b/out/", together)
    assert len(node.workers()) >= 3

    def megabytes() -> float:
        pids = [node.pid, *(process.pid for process in procs.descendants(node.pid))]
        return sum(procs.proportional_megabytes(pid) for pid in pids)

    eventually(lambda: megabytes() < 150, 20, "it takes little")
    eventually(lambda: len(node.workers()) == SPARE_WORKERS, 30, "workers that are not needed go")


def test_a_put_can_be_confirmed_again_after_a_moment_without_descriptors(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    uuid, port = node.prepare_put("s4://b/folder/000")
    node.send(port, b"data")
    eventually(lambda: list(node.data.glob("_tempfiles/*")), 10, "it has arrived")
    connection = http.client.HTTPConnection(node.host, node.port, timeout=20)
    connection.request("GET", "/health")
    connection.getresponse().read()
    with _without_descriptors(node):
        connection.request("POST", f"/confirm_put?uuid={uuid}&checksum={checksum_of(b'data')}")
        answer = connection.getresponse()
        assert (answer.status, b"Too many open files" in answer.read()) == (429, True)
    assert node.confirm_put(uuid, b"data").status == 200
    assert node.fetch("s4://b/folder/000") == b"data"
    connection.close()


def test_no_further_command_starts_while_too_much_waits_to_leave(start_cluster: Start) -> None:
    cluster = start_cluster(2, ["--max-cpu-jobs", "1"], start=False)
    node, other = cluster.nodes
    node.start(first="import s4.outbox; s4.outbox.MAX_UNSENT_FILES = 10")
    other.start()
    cluster.put_all({f"s4://b/in/{2 * i:03}": b"" for i in range(40)})  # all on the first node
    log = cluster.work / "log"
    command = f"echo >> {log}; for i in 001 003 005 007 009; do echo > $i; echo $i; done"
    job = {"job": "job", "cmd": command, "indir": "s4://b/in/", "outdir": "s4://b/out/", "detach": True}
    os.kill(other.pid, signal.SIGSTOP)
    try:
        assert node.post_json("/map_to_n", job).status == 200
        eventually(lambda: log.exists() and node.get("/job", job="job").json()["running"] == 0, 20)
        assert log.stat().st_size <= 6  # two whose outputs fill the box, and those that were waiting by then
    finally:
        os.kill(other.pid, signal.SIGCONT)
    eventually(lambda: node.get("/job", job="job", wait="1").json()["state"] == "done", 60)
    assert len(cluster.keys("s4://b/out/")) == 200


def test_a_put_that_cannot_be_recorded_holds_no_slot(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster, "-max-io-jobs", "1")
    with _index_of(node) as index:
        index.execute("alter table transfers rename to gone")
        assert node.post("/prepare_put", key="s4://b/000").status == 500
        index.execute("alter table gone rename to transfers")
    began = time.monotonic()
    assert node.put("s4://b/000", b"x").status == 200
    assert time.monotonic() - began < 4  # what nobody sends to holds its slot for five seconds


def test_a_job_that_was_cancelled_before_it_came_never_runs(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    cluster.put("s4://b/in/000")
    assert node.post("/cancel", job="early").status == 404
    for _ in range(3):
        _housekeeping(node)
    body = {"cmd": "cat", "indir": "s4://b/in/", "outdir": "s4://b/out/", "job": "early", "detach": True}
    assert node.post_json("/map", body).status == 200
    eventually(lambda: node.get("/job", job="early", wait="1").json()["state"] == "cancelled", 10)
    assert cluster.keys("s4://b/out/") == []


def test_an_eval_that_was_told_to_come_back_may_have_its_id_again(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster, "-max-cpu-jobs", "1")
    cluster.put("s4://b/000", b"x")
    go = cluster.work / "go"
    holder = cluster.start_s4("eval", "s4://b/000", f"until [ -e {go} ]; do sleep 0.02; done")
    eventually(lambda: node.get("/jobs").json(), 10, "the only place is taken")
    ask = partial(node.post, "/eval", key="s4://b/000", job="patient", body=b"cat")
    assert ask().status == 429
    assert node.get("/job", job="patient").status == 404
    go.touch()
    assert holder.wait(10) == 0
    assert (ask().status, ask().status) == (200, 409)


def test_jobs_that_are_waited_for_leave_threads_for_others(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    cluster.put("s4://b/in/000")

    def running() -> list[str]:
        return [share["id"] for share in node.get("/jobs", state="running").json()]

    with contextlib.ExitStack() as stack:
        asked = []
        for i in range(WAITING_JOBS + 3):
            body = {"cmd": "sleep 7200.1", "indir": "s4://b/in/", "outdir": f"s4://b/out{i}/"}
            asked.append(stack.enter_context(_request(node, "POST", "/map", json.dumps(body).encode())))
        eventually(lambda: len(_answered(asked)) == 3 and len(running()) == WAITING_JOBS, 10)
        assert all(answer.startswith(b"HTTP/1.1 429 ") for answer in _answered(asked))
        assert node.get("/health", timeout=5).status == 200
        assert node.post_json("/plan", body | {"kind": "map"}).status == 429
        jobs = running()
        assert node.get("/job", job=jobs[0], wait="20").json()["state"] == "running"  # without a place
        for job in jobs:
            assert node.post("/cancel", job=job).status == 200


def test_the_port_of_a_transfer_that_failed_is_not_used_again(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    uuid, port = node.prepare_put("s4://b/silent")
    assert (
        node.confirm_put(uuid, b"").status == 400
    )  # nobody came; who is late must not be taken for the next
    _uuid, other = node.prepare_put("s4://b/next")
    assert other != port


def test_while_a_node_is_down_no_job_is_forgotten(start_cluster: Start) -> None:
    cluster = start_cluster(2, ["--keep-jobs", "0", "--keep-days", "0"], start=False)
    here, other = cluster.nodes
    here.start(first="import s4.server; s4.server.PRUNE_SECONDS = 1.0")
    other.start()
    cluster.put("s4://b/in/000")
    other.kill()
    body = {"cmd": "cat", "indir": "s4://b/in/", "outdir": "s4://b/out/", "job": "some"}
    assert here.post_json("/map", body).status == 200
    eventually(lambda: "1 old jobs are not forgotten yet" in here.log, 25)
    assert here.rows("select id from jobs") == [("some",)]
    other.start()
    eventually(lambda: here.rows("select id from jobs") == [], 25)


def _is_connected_to(node: Node) -> bool:
    """Whether somebody has a connection to a node's port: proc(5), whose state 01 is ESTABLISHED."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[2].endswith(f":{node.port:04X}") and row[3] == "01" for row in rows)


def test_a_share_that_waits_for_a_silent_node_can_be_ended(start_cluster: Start) -> None:
    cluster = start_cluster(2)
    here, other = cluster.nodes
    cluster.put_all({"s4://b/in/000": b"", "s4://b/in/001": b""})
    evaluation = cluster.start_s4("eval", "s4://b/in/000", "sleep 600.91")
    eventually(lambda: _sleeping("600.91"), 10)
    os.kill(other.pid, signal.SIGSTOP)
    try:
        for job in ("one", "two"):
            body: dict[str, object] = {
                "cmd": "ls",
                "indir": "s4://b/in/",
                "outdir": f"s4://b/{job}/",
                "job": job,
            }
            body |= {"skip_existing": True, "detach": True}
            assert here.post_json("/map_to_n", body).status == 200
            eventually(lambda: _is_connected_to(other), 10, "it asks the other")
            if job == "one":
                assert here.post("/cancel", job=job).json()["state"] == "cancelled"
        here.terminate()
    finally:
        os.kill(other.pid, signal.SIGCONT)
    assert "left behind" not in here.log
    assert not _sleeping("600.91") and evaluation.wait(5) == 1
    assert here.rows("select id, state from jobs where kind != 'eval' order by id") == [
        ("one", "cancelled"),
        ("two", "interrupted"),
    ]
    assert not [*here.data.glob("_run/*"), *here.data.glob("_temp*/*")]


def test_what_is_older_than_an_input_was_not_made_from_it(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    shuffle = partial(cluster.s4, "map-to-n", "s4://b/in/", "s4://b/out/")
    cluster.put("s4://b/in/one/000")
    shuffle("echo > one; ls")
    with _index_of(node) as index:  # much later, when its records are pruned
        index.execute("update keys set created_s = created_s - 1000")
        index.execute("update _sqlite_migrations set applied_at = '2020-01-01 00:00:00'")
        index.execute("delete from tasks")
        index.execute("delete from jobs")
    cluster.put("s4://b/in/two/000")
    assert "1/2 tasks done, 0 failed, 1 skipped" in shuffle("echo > two; ls", "--skip-existing").err
    assert cluster.keys("s4://b/out/") == ["s4://b/out/000/one", "s4://b/out/000/two"]
    assert "0/2 tasks done, 0 failed, 2 skipped" in shuffle("echo > two; ls", "--skip-existing").err


def test_what_a_shuffle_left_half_made_is_known_when_its_record_is_pruned(start_cluster: Start) -> None:
    cluster = start_cluster(2, ["--keep-jobs", "0", "--keep-days", "0"], start=False)
    here, _other = cluster.nodes
    for node in cluster.nodes:
        node.start(first="import s4.server; s4.server.PRUNE_SECONDS = 2.0")
    cluster.put_all({"s4://b/in/000": b"x", "s4://b/in/002": b"x", "s4://b/out/000/001": b"in the way"})
    shuffle = ("map-to-n", "s4://b/in/", "s4://b/out/", "cp /dev/stdin 000; cp 000 001; ls")

    def pruned() -> bool:
        return all(node.rows("select * from jobs") == [] for node in cluster.nodes)

    assert cluster.run(*shuffle, "--keep-going").code == 1
    assert cluster.keys("s4://b/out/000/") == ["s4://b/out/000/000", "s4://b/out/000/001"]
    cluster.s4("rm", "s4://b/out/000/001")
    eventually(pruned, 20, "pruned")
    assert here.rows("select task, input, outdir from half_made") == [(0, "b/in/000", "b/out/")]
    assert "1/2 tasks done, 0 failed, 1 skipped" in cluster.s4(*shuffle, "--skip-existing").err
    assert len(cluster.keys("s4://b/out/")) == 4

    cluster.s4("rm", "-r", "s4://b/out/000/")
    cluster.fails("map-to-n", "s4://b/in/000*", "s4://b/out/", "echo x > 000; echo 000; echo none", code=1)
    eventually(pruned, 20, "pruned")
    assert here.rows("select * from half_made") == []  # of what is gone nothing need be known


def test_a_get_whose_worker_dies_was_not_sent_whole(start_cluster: Start) -> None:
    _cluster, node = _alone(start_cluster)
    assert node.put("s4://b/000", bytes(60 << 20)).status == 200
    uuid, port = node.prepare_get("s4://b/000")
    with node.dial(port) as connection:
        connection.recv(1)
        for worker in node.workers():
            os.kill(worker.pid, signal.SIGKILL)
        with contextlib.suppress(ConnectionResetError):
            read_to_end(connection)
        answer = node.post("/confirm_get", uuid=uuid, checksum="1")
    assert answer.status == 400 and "was not sent whole: worker process" in answer.text


def test_a_retry_of_what_a_lost_index_knew_removes_nothing(start_cluster: Start) -> None:
    cluster = start_cluster(2)
    here, other = cluster.nodes
    cluster.put_all({f"s4://b/in/{i:03}": b"" for i in range(4)})
    shuffle = ("map-to-n", "s4://b/in/", "s4://b/out/", "echo > 000; echo > 001; ls")
    cluster.s4(*shuffle)
    before = cluster.contents("s4://b/out/")
    here.terminate()
    for file in (here.data / "_index").glob("node.db*"):
        file.unlink()
    reindex = ("reindex", "-port", str(here.port), "-conf", str(cluster.conf))
    assert cluster.run(*reindex, program=[SERVER], cwd=here.folder).code == 0
    here.start()
    [(job,)] = other.rows("select id from jobs where kind = 'map-to-n'")
    shown = cluster.run("retry", job)
    assert shown.code == 1 and f"the record of job {job} is lost here" in shown.err
    assert cluster.contents("s4://b/out/") == before
    # What a part of them made is here, and nothing says that it is not a part of what it should be.
    failed = cluster.run(*shuffle, "--skip-existing")
    assert failed.code == 1 and "since a reindex it is not known" in failed.err
    assert "(all such: s4 rm -r s4://b/out/) and start the job again" in failed.err
    assert "s4 retry" not in failed.err + shown.err  # which would not look again at what was skipped
    assert cluster.contents("s4://b/out/") == before
    assert "4" in cluster.s4(*shuffle, "--plan").out.decode().splitlines()[-3].split()
    cluster.fails(*shuffle, "--plan", "--skip-existing", says="since a reindex it is not known", code=1)
    cluster.s4("rm", "-r", "s4://b/out/")
    cluster.s4(*shuffle, "--skip-existing")
    assert cluster.contents("s4://b/out/") == before


def test_outputs_of_failed_tasks_are_removed_together(start_cluster: Start) -> None:
    cluster = start_cluster(3, start=False)
    here, between, silent = cluster.nodes  # who is asked in this order
    here.start(first="import s4.outbox, s4.outputs; s4.outbox.SEND_SECONDS = s4.outputs._SECONDS = 1.0")
    between.start()
    silent.start()
    cluster.put_all({f"s4://b/in/{3 * i:03}": b"" for i in range(6)})  # all on the first
    body: dict[str, object] = {"cmd": "echo > 002; echo 002", "indir": "s4://b/in/", "outdir": "s4://b/out/"}
    body |= {"job": "job", "retries": 1, "keep_going": True, "detach": True}
    os.kill(silent.pid, signal.SIGSTOP)
    try:
        assert here.post_json("/map_to_n", body).status == 200
        eventually(lambda: here.get("/job", job="job", wait="1").json()["state"] == "failed", 30)
    finally:
        os.kill(silent.pid, signal.SIGCONT)
    errors = [error for (error,) in here.rows("select error from tasks")]
    assert len(errors) == 6 and all("not tried again, for its outputs cannot be removed" in e for e in errors)
    assert 0 < between.log.count("/remove_outputs") < 6


def test_a_cancel_of_a_job_that_never_comes_is_forgotten(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    node.start(first="import s4.jobs; s4.jobs.CANCELLED_SECONDS = 0.0")
    cluster.put("s4://b/in/000")
    assert node.post("/cancel", job="late").status == 404
    for _ in range(2):
        _housekeeping(node)
    body = {"cmd": "cat", "indir": "s4://b/in/", "outdir": "s4://b/out/", "job": "late"}
    assert node.post_json("/map", body).status == 200


def test_evals_are_forgotten_also_while_a_node_is_down(start_cluster: Start) -> None:
    cluster = start_cluster(2, ["--keep-jobs", "0", "--keep-days", "0"], start=False)
    here, _down = cluster.nodes
    here.start(first="import s4.server; s4.server.PRUNE_SECONDS = 0.5")
    cluster.put("s4://b/in/000")
    body = {"cmd": "cat", "indir": "s4://b/in/", "outdir": "s4://b/out/", "job": "some"}
    assert here.post_json("/map", body).status == 200
    assert here.post("/eval", key="s4://b/in/000", job="evaluated", body=b"cat").status == 200
    assert here.rows("select id from jobs where id = 'some'")
    eventually(lambda: here.rows("select id from jobs") == [("some",)], 25, "the eval is forgotten")


def test_a_share_that_gets_no_thread_has_failed_and_may_run_again(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    node.start(
        first="""
from s4.shares import Share
start = Share.start
def refuse(share, ended):
    if share.job.run == 1:
        raise RuntimeError("can't start new thread")
    start(share, ended)
Share.start = refuse
"""
    )
    cluster.put("s4://b/in/000", b"x")
    body = {"cmd": "cat", "indir": "s4://b/in/", "outdir": "s4://b/out/", "job": "one"}
    refused = node.post_json("/map", body)
    assert refused.status == 500 and "cannot be started" in refused.text
    assert node.get("/jobs", state="running").json() == []
    assert node.get("/job", job="one").json()["state"] == "failed"
    cluster.s4("retry", "one")
    assert cluster.contents("s4://b/out/") == {"000": b"x"}


def test_on_a_full_disk_an_answer_that_nobody_reads_is_given_up(start_cluster: Start) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    node.start(
        first="""
import s4.webserver
s4.webserver.UNREAD_SECONDS = 0.5
def full(spool, memory):
    raise OSError(28, "No space left on device")
s4.webserver._Spool.__init__ = full
"""
    )
    cluster.put("s4://b/000")
    printed = cluster.work / "printed"
    line = f"seq 2000000; touch {printed}"
    with _ask_slowly(node, "POST", "/eval?key=s4://b/000", line.encode()) as reader:
        ends = [f":{port:04X}" for port in (node.port, reader.getsockname()[1])]

        def is_answered() -> bool:
            """Whether the node's end of the connection is open: proc(5), whose state 01 is ESTABLISHED."""
            rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            return any([row[1][-5:], row[2][-5:], row[3]] == [*ends, "01"] for row in rows)

        eventually(printed.exists, 20)
        eventually(lambda: not is_answered(), 10, "the node has hung up")


def test_ctrl_c_ends_a_recursive_copy_from_a_silent_node_at_once(start_cluster: Start) -> None:
    cluster, node = _alone(start_cluster)
    cluster.put("s4://b/d/000", b"x")
    write_tree(cluster.work / "files", {"001": b"x"})
    # It does not wait for threads that nothing ends.
    program = "import s4.copying; s4.copying.STOP_SECONDS = 60.0; from s4.cli import main; main()"
    os.kill(node.pid, signal.SIGSTOP)
    try:
        copy = cluster.start_s4("cp", "-r", "files", "s4://b/d/", program=[sys.executable, "-c", program])
        threads = f"/proc/{copy.pid}/task"
        eventually(lambda: len(os.listdir(threads)) > 1 and _is_connected_to(node), 20, "it asks the node")
        os.killpg(copy.pid, signal.SIGINT)
        assert copy.wait(20) == 130
    finally:
        os.kill(node.pid, signal.SIGCONT)


def test_a_request_that_fails_while_it_waits_gives_its_place_back() -> None:
    gate = Gate(1)
    for _ in range(2):
        with pytest.raises(MissingError), gate.waiting():
            raise MissingError("it is gone")
    with gate.waiting(), pytest.raises(BusyError), gate.waiting():
        pass


@pytest.mark.parametrize("line", [b"1" * 100_000, b"1;" + b"a" * 100_000, b"0\r\n" + b"A: b\r\n" * 20_000])
def test_a_line_without_end_in_a_chunked_body_ends_its_connection(cluster: Cluster, line: bytes) -> None:
    node = cluster.nodes[0]
    with node.dial(node.port) as connection:
        connection.sendall(
            b"POST /eval?key=s4://b/000 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        with contextlib.suppress(ConnectionError):
            connection.sendall(line)
            assert connection.recv(1) == b""


def test_an_unknown_transfer_is_told_in_one_line(cluster: Cluster) -> None:
    answer = cluster.nodes[0].post("/confirm_put", uuid="a\r\nb\0", checksum="1")
    assert answer.status == 404 and "\n" not in answer.text.rstrip("\n") and "\0" not in answer.text
