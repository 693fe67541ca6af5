"""The HTTP interface as another client uses it: each request, each status, and raw sockets for the bytes."""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Answer, Cluster, Node, read_to_end
from procs import eventually
from reference import checksum_of

from s4.api import STATUSES
from s4.config import read_conf
from s4.errors import S4Error
from s4.exchange import MAX_BATCH_KEYS, put_outputs
from s4.http import ERROR_OF_STATUS, Caller
from s4.transfers import IDLE_LISTENERS
from s4.webserver import MAX_REQUEST_BYTES


@pytest.fixture
def node(cluster: Cluster) -> Node:
    """The node that owns NAMEs such as 000 and 003_x."""
    return cluster.nodes[0]


def test_health_is_the_word_healthy(cluster: Cluster) -> None:
    for node in cluster.nodes:
        answer = node.get("/health")
        assert (answer.status, answer.text.strip()) == (200, "healthy")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/no/such/thing", 404),
        ("POST", "/health", 405),
        ("GET", "/prepare_put", 405),
        ("GET", "/delete", 405),
        ("DELETE", "/list", 405),
        ("POST", "/prepare_put", 400),
        ("POST", "/prepare_get", 400),
        ("POST", "/confirm_put", 400),
        ("POST", "/confirm_get", 400),
        ("POST", "/delete", 400),
        ("POST", "/eval", 400),
        ("POST", "/map", 400),
        ("POST", "/map_to_n", 400),
        ("POST", "/map_from_n", 400),
    ],
)
def test_what_is_no_request_is_refused(node: Node, method: str, path: str, status: int) -> None:
    answer = node.request(method, path, {})
    assert answer.status == status
    assert "Traceback" not in answer.text


def test_an_error_is_the_same_on_both_sides_of_a_connection() -> None:
    """What a node answers for an error makes the caller raise it; what has no error of its own is a 500."""
    assert set(ERROR_OF_STATUS) <= set(STATUSES.values())
    back = {status: STATUSES[ERROR_OF_STATUS.get(status, S4Error)] for status in STATUSES.values()}
    assert all(status == again for status, again in back.items()), back
    assert STATUSES[S4Error] == 500


def test_a_put_is_prepared_sent_raw_and_confirmed(node: Node, bucket: str) -> None:
    prepared = node.post("/prepare_put", key=f"{bucket}/dir/000")
    assert prepared.status == 200
    uuid, port = prepared.text.split(" ")
    with socket.create_connection((node.host, int(port)), timeout=10) as connection:
        connection.sendall(b"hello")
        connection.shutdown(socket.SHUT_WR)  # closes its side only
        assert node.post("/confirm_put", uuid=uuid, checksum=checksum_of(b"hello")).status == 200
    assert node.fetch(f"{bucket}/dir/000") == b"hello"


def test_an_existing_key_is_409_and_a_missing_one_404(node: Node, bucket: str) -> None:
    assert node.post("/prepare_get", key=f"{bucket}/000").status == 404
    assert node.post("/prepare_get", key=f"{bucket}/000", port=1).status == 404
    assert node.put(f"{bucket}/000").status == 200
    assert node.post("/prepare_put", key=f"{bucket}/000").status == 409


def test_a_get_to_the_callers_port_connects_and_sends(node: Node, bucket: str) -> None:
    data = bytes(range(256)) * 5000
    node.put(f"{bucket}/000", data)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        answer = node.post("/prepare_get", key=f"{bucket}/000", port=server.getsockname()[1])
        assert answer.status == 200 and len(answer.text.split()) == 1
        connection, _peer = server.accept()
        with connection:
            assert read_to_end(connection) == data
    assert node.post("/confirm_get", uuid=answer.text, checksum=checksum_of(data)).status == 200


def test_a_get_from_the_nodes_port_sends_and_wants_the_stored_checksum(node: Node, bucket: str) -> None:
    node.put(f"{bucket}/000", b"data")
    uuid, port = node.prepare_get(f"{bucket}/000")
    assert node.receive(port) == b"data"
    wrong = node.post("/confirm_get", uuid=uuid, checksum=checksum_of(b"other"))
    assert 400 <= wrong.status < 500
    assert node.fetch(f"{bucket}/000") == b"data"


@pytest.mark.parametrize("port", ["0", "-1", "65536", "http", "", "1e3", "22 "])
def test_a_port_that_is_none_is_refused(node: Node, bucket: str, port: str) -> None:
    node.put(f"{bucket}/000")
    assert node.post("/prepare_get", key=f"{bucket}/000", port=port).status == 400


@pytest.mark.parametrize("path", ["/confirm_put", "/confirm_get"])
@pytest.mark.parametrize("uuid", ["", "nonsense", "../../etc/passwd", "00000000-0000-0000-0000-000000000000"])
def test_an_unknown_uuid_is_refused(node: Node, path: str, uuid: str) -> None:
    assert 400 <= node.post(path, uuid=uuid, checksum="0").status < 500


def test_a_transfer_is_confirmed_by_its_own_kind_only(node: Node, bucket: str) -> None:
    put, port = node.prepare_put(f"{bucket}/000")
    node.send(port, b"data")
    assert 400 <= node.post("/confirm_get", uuid=put, checksum=checksum_of(b"data")).status < 500
    assert node.confirm_put(put, b"data").status == 200
    get, port = node.prepare_get(f"{bucket}/000")
    assert node.receive(port) == b"data"
    assert 400 <= node.post("/confirm_put", uuid=get, checksum=checksum_of(b"data")).status < 500


def test_parameters_are_percent_encoded_as_usual(node: Node, bucket: str) -> None:
    key = f"{bucket}/000_+&=%25?#é"
    assert node.put(key, b"x").status == 200
    encoded = f"/prepare_get?key={bucket}/000_%2B%26%3D%2525%3F%23%C3%A9"
    assert node.request("POST", encoded, {}).status == 200
    assert node.request("POST", f"/prepare_put?key={bucket}/000+x", {}).status == 400  # a plus is a space


@pytest.mark.parametrize("value", ["true", "True", "1", "false", "0", "", None])
def test_recursive_is_true_or_false(node: Node, bucket: str, value: str | None) -> None:
    node.put(f"{bucket}/dir/000")
    options = {} if value is None else {"recursive": value}
    is_true = value in ("true", "True", "1")
    (row,) = node.request("GET", "/list", {"prefix": f"{bucket}/", **options}).json()
    assert row[3] == ("dir/000" if is_true else "dir/")
    answer = node.request("POST", "/delete", {"prefix": f"{bucket}/dir/", **options})
    assert answer.status == (200 if is_true else 400)


def test_recursive_that_is_neither_true_nor_false_is_400(node: Node, bucket: str) -> None:
    node.put(f"{bucket}/000")
    for method, path in (("GET", "/list"), ("POST", "/delete")):
        answer = node.request(method, path, {"prefix": f"{bucket}/000", "recursive": "maybe"})
        assert (answer.status, answer.text) == (400, "recursive='maybe': true or false is needed")
    assert len(node.listing(f"{bucket}/")) == 1


@pytest.mark.parametrize("seconds", ["true", "0", "-1", '"x"', "1e400", "1e9", "1" + "0" * 400, "[]"])
def test_a_time_limit_that_is_no_number_of_seconds_is_400(node: Node, bucket: str, seconds: str) -> None:
    body = f'{{"cmd": "cat", "indir": "{bucket}/in/", "outdir": "{bucket}/out/", "timeout": {seconds}}}'
    answer = node.post("/map", body=body.encode())
    wanted = "timeout: a number of seconds above 0 and at most 31622400 (366 days) is needed"
    assert (answer.status, answer.text) == (400, wanted)


def test_a_job_or_state_that_there_cannot_be_is_400(node: Node) -> None:
    empty = node.post("/cancel", job="")
    assert (empty.status, empty.text) == (400, "bad job id '': letters, digits and '-', at most 64")
    assert node.get("/jobs", state="running").status == 200
    for path in ("/job?job=%ff", "/tasks?job=%ff", "/task?job=%ff&task=1"):
        assert node.request("GET", path, {}).status == 400
    for path in ("/jobs", "/tasks"):
        answer = node.get(path, job="none", state="nonsense")
        assert answer.status == 400 and "state='nonsense'" in answer.text


def test_removing_nothing_is_404_for_a_key_and_200_for_a_prefix(node: Node, bucket: str) -> None:
    assert node.post("/delete", prefix=f"{bucket}/000").status == 404
    assert node.post("/delete", prefix=f"{bucket}/000", recursive="true").status == 200


def test_listings_are_json_arrays_of_strings(cluster: Cluster, node: Node, bucket: str) -> None:
    node.put(f"{bucket}/dir/000_'\"\\é", b"xyz")
    (row,) = node.get("/list", prefix=f"{bucket}/dir/").json()
    assert row[2:] == ["3", "000_'\"\\é"]
    (bucket_row,) = [
        row for row in node.get("/list_buckets").json() if row[3] == bucket.removeprefix("s4://")
    ]
    assert bucket_row[2] == "3" and len(bucket_row) == 4
    for other in cluster.nodes[1:]:
        assert other.get("/list", prefix=f"{bucket}/dir/").json() == []


def test_the_three_jobs_run_this_nodes_share_and_answer_when_done(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{part}/{i:03}_x": f"{i}\n".encode() for part in "ab" for i in range(3)})
    node = cluster.nodes[1]
    for outdir in ("outdir", "outidr"):
        body = {"cmd": "cat", "indir": f"{bucket}/in/", outdir: f"{bucket}/{outdir}/"}
        assert node.post_json("/map", body).status == 200
        assert cluster.contents(f"{bucket}/{outdir}/") == {"a/001_x": b"1\n", "b/001_x": b"1\n"}
    body = {"cmd": "cat > 0; cp 0 1; cp 0 2; ls", "indir": f"{bucket}/in/b/", "outdir": f"{bucket}/to/"}
    assert node.post_json("/map_to_n", body).status == 200
    assert cluster.contents(f"{bucket}/to/") == {f"001_x/{i}": b"1\n" for i in range(3)}
    body = {"cmd": "xargs cat", "indir": f"{bucket}/in/", "outdir": f"{bucket}/from/"}
    assert node.post_json("/map_from_n", body).status == 200
    assert cluster.contents(f"{bucket}/from/") == {"001_x": b"1\n1\n"}


def test_a_node_without_inputs_has_nothing_to_do(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000")
    body = {"cmd": "exit 1", "indir": f"{bucket}/in/", "outdir": f"{bucket}/out/"}
    assert cluster.nodes[1].post_json("/map", body).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[]",
        b"{}",
        b'{"cmd": "cat", "indir": "s4://b/in/"}',
        b'{"indir": "s4://b/in/", "outdir": "s4://b/out/"}',
        b'{"cmd": 1, "indir": "s4://b/in/", "outdir": "s4://b/out/"}',
        b'{"cmd": "", "indir": "s4://b/in/", "outdir": "s4://b/out/"}',
        b'{"cmd": "a\\u0000b", "indir": "s4://b/in/", "outdir": "s4://b/out/"}',
        b'{"cmd": "cat", "indir": null, "outdir": "s4://b/out/"}',
        b'{"cmd": "cat", "indir": "s4://b/in", "outdir": "s4://b/out/"}',
        b'{"cmd": "cat", "indir": "s4://b/in/", "outdir": "s4://b/out"}',
        b'{"cmd": "cat", "indir": "s4://b/in/", "outdir": "s4://b/in/out/"}',
        b"\xff\xfe",
        b"[" * 10_000,
        rb'{"cmd": "echo \ud800", "indir": "s4://b/in/", "outdir": "s4://b/out/"}',
    ],
)
@pytest.mark.parametrize("path", ["/map", "/map_to_n", "/map_from_n"])
def test_a_job_with_a_bad_body_is_refused(node: Node, path: str, body: bytes) -> None:
    answer = node.post(path, body=body)
    assert answer.status == 400, answer


@pytest.mark.parametrize("path", ["/map", "/map_to_n", "/map_from_n"])
def test_a_failing_job_says_what_failed(cluster: Cluster, bucket: str, path: str) -> None:
    cluster.put(f"{bucket}/in/000")
    body = {"cmd": "echo why >&2; exit 6", "indir": f"{bucket}/in/", "outdir": f"{bucket}/out/"}
    answer = cluster.nodes[0].post_json(path, body)
    assert 400 <= answer.status < 500
    for part in (f"{bucket}/in/000", str(cluster.nodes[0]), "6", "why"):
        assert part in answer.text


def test_a_transfer_under_way_is_a_row(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    (node,) = cluster.nodes
    _uuid, port = node.prepare_put("s4://b/000")
    with node.dial(port) as connection:
        connection.sendall(b"x")
        ((direction, keys, paths),) = node.rows("select direction, keys, paths from transfers")
        assert (direction, keys) == ("put", 1) and "b/000" in paths
    eventually(lambda: node.rows("select * from transfers") == [], 15, "the dead transfer is forgotten")


@pytest.fixture
def narrow(start_cluster: Callable[..., Cluster]) -> Node:
    """A node with one slot for sends and one for receives."""
    node: Node = start_cluster(1, ["-max-io-jobs", "1"]).nodes[0]
    return node


def _within_six_seconds(request: Callable[[], Answer]) -> None:
    began = time.monotonic()
    answer = request()
    assert answer.status == 200, answer
    assert time.monotonic() - began < 6


def test_a_reader_that_is_slow_but_steady_gets_all(narrow: Node) -> None:
    size = 20 << 20
    narrow.put("s4://b/000", bytes(size))
    uuid, port = narrow.prepare_get("s4://b/000")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        slow.settimeout(60)
        slow.connect((narrow.host, port))
        took = 0
        end = time.monotonic() + 8  # longer than a receiver may stand still
        while time.monotonic() < end:
            took += len(slow.recv(20_000))
            time.sleep(0.2)
        took += len(read_to_end(slow))
    assert took == size
    assert narrow.post("/confirm_get", uuid=uuid, checksum=checksum_of(bytes(size))).status == 200


def test_what_is_no_file_in_the_place_of_a_key_holds_nobody_up(narrow: Node) -> None:
    narrow.put("s4://b/000", b"x")
    narrow.path_of("s4://b/000").unlink()
    os.mkfifo(narrow.path_of("s4://b/000"))
    body = b'["s4://b/000"]'
    for _ in range(3):
        answer = narrow.post("/prepare_get", key="s4://b/000", timeout=5)
        assert answer.status == 409 and "no file is in its place" in answer.text
        answer = narrow.post("/prepare_gets", body=body, timeout=5)
        assert answer.json()["refused"][0][0] == 409
        answer = narrow.post("/eval", key="s4://b/000", body=b"cat", timeout=5)
        assert answer.status >= 400 and "s4://b/000" in answer.text
    narrow.path_of("s4://b/000").unlink()
    assert narrow.post("/delete", prefix="s4://b/000").status == 200


def test_a_get_beside_removals_and_puts_of_the_key_is_whole_or_not_there(node: Node) -> None:
    stop = threading.Event()

    def change() -> None:
        for i in itertools.count():
            if stop.is_set():
                return
            node.put("s4://churn/000", b"%d" % i * (i % 50 + 1))
            node.post("/delete", prefix="s4://churn/000")

    thread = threading.Thread(target=change)
    thread.start()
    found = Counter[int]()
    try:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            answer = node.post("/prepare_get", key="s4://churn/000")
            found[answer.status] += 1
            if answer.status == 200:
                uuid, port = answer.text.split()
                data = node.receive(int(port))
                confirmed = node.post("/confirm_get", uuid=uuid, checksum=checksum_of(data))
                assert confirmed.status == 200, confirmed
            elif answer.status == 404:
                assert "no such key" in answer.text
            answer = node.post("/eval", key="s4://churn/000", body=b"cat")
            assert answer.status in (200, 404), answer
    finally:
        stop.set()
        thread.join()
    assert set(found) <= {200, 404, 429} and found[200] > 10, found


def test_a_prepared_put_that_nobody_sends_to_lets_the_next_through(narrow: Node) -> None:
    narrow.prepare_put("s4://b/silent")
    _within_six_seconds(lambda: narrow.put("s4://b/next", b"x"))
    assert narrow.fetch("s4://b/next") == b"x"


def test_a_sender_that_connects_late_and_is_silent_lets_the_next_through(narrow: Node) -> None:
    _uuid, port = narrow.prepare_put("s4://b/silent")
    late: list[socket.socket] = []
    timer = threading.Timer(3, lambda: late.append(narrow.dial(port)))
    timer.start()
    try:
        _within_six_seconds(lambda: narrow.put("s4://b/next", b"x"))
    finally:
        timer.join()
        late[0].close()


def test_a_put_that_stalls_lets_the_next_through_and_stores_nothing(narrow: Node) -> None:
    uuid, port = narrow.prepare_put("s4://b/stalls")
    with narrow.dial(port) as connection:
        connection.sendall(b"beginning")
        _within_six_seconds(lambda: narrow.put("s4://b/next", b"x"))
    assert 400 <= narrow.confirm_put(uuid, b"beginning").status < 600
    assert [row[3] for row in narrow.listing("s4://b")] == ["next"]


@pytest.mark.parametrize("how", ["never connects", "never reads", "cannot be reached", "does not accept"])
def test_a_get_that_stalls_lets_the_next_through(narrow: Node, how: str) -> None:
    narrow.put("s4://b/000", bytes(50 << 20))
    narrow.put("s4://b/001", b"x")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if how == "does not accept":
            silent.listen(0)
        if how in ("cannot be reached", "does not accept"):
            assert narrow.post("/prepare_get", key="s4://b/000", port=silent.getsockname()[1]).status == 200
        else:
            _uuid, port = narrow.prepare_get("s4://b/000")
            if how == "never reads":
                silent.close()
                silent = narrow.dial(port)
                silent.recv(1)
        _within_six_seconds(lambda: narrow.post("/prepare_get", key="s4://b/001"))
        silent.close()


def test_empty_folders_in_the_place_of_a_key_make_way_for_it(node: Node, bucket: str) -> None:
    key = f"{bucket}/d/000"
    for folder in ("x/y", "z"):
        (node.path_of(key) / folder).mkdir(parents=True)
    assert node.put(key, b"data").status == 200
    assert node.path_of(key).read_bytes() == node.fetch(key) == b"data"


def test_slow_transfers_are_not_dropped_and_beyond_the_slots_it_is_429(narrow: Node) -> None:
    uuid, port = narrow.prepare_put("s4://b/slow")
    with narrow.dial(port) as connection:
        connection.settimeout(0.2)
        sent = b""

        def drip() -> None:
            nonlocal sent
            connection.sendall(b"x")
            sent += b"x"

        # Another prepare waits for the slot; nobody frees it, so it must end in 429.
        waiting = socket.create_connection((narrow.host, narrow.port), timeout=60)
        waiting.sendall(
            b"POST /prepare_put?key=s4://b/next HTTP/1.1\r\nHost: s4\r\nConnection: close\r\n\r\n"
        )
        waiting.settimeout(0.5)
        head = b""
        began = time.monotonic()
        while not head and time.monotonic() < began + 60:
            drip()
            try:
                head = waiting.recv(10_000)
            except TimeoutError:
                continue
        waiting.close()
        assert head.startswith(b"HTTP/1.1 429")
        assert b"retry-after:" in head.lower()
        assert time.monotonic() - began > 1  # it did wait
    assert narrow.confirm_put(uuid, sent).status == 200
    assert narrow.put("s4://b/next").status == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("POST /prepare_get?key=s4://none/000 HTTP/1.1\r\nContent-Length: 0", "404"),
        ("POST /prepare_get?key=s4://none/000 HTTP/1.1", "404"),
        ("POST /eval?key=s4://b/000 HTTP/1.1\r\nContent-Length: 99999999", "413"),
    ],
)
def test_a_caller_who_expects_100_is_not_asked_for_a_body_in_vain(node: Node, head: str, status: str) -> None:
    with node.dial(node.port) as connection:
        connection.sendall(f"{head}\r\nHost: x\r\nExpect: 100-continue\r\n\r\n".encode())
        assert connection.recv(4096).decode().startswith(f"HTTP/1.1 {status} ")


def test_a_late_confirm_of_an_attempt_whose_task_runs_again_makes_no_key(node: Node, bucket: str) -> None:
    body = json.dumps([[f"{bucket}/out/x/000", 4, 7], [f"{bucket}/out/x/003", 4, 7]]).encode()
    prepared = node.post("/prepare_puts", body=body, job="late").json()
    node.send(prepared["port"], b"late" * 2)
    eventually(node.temporary, 5)
    again = json.dumps([["x", "late", 7]]).encode()
    assert node.post("/remove_outputs", body=again, prefix=f"{bucket}/out/").status == 200
    sums = json.dumps([checksum_of(b"late")] * 2).encode()
    assert node.post("/confirm_puts", body=sums, uuid=prepared["uuid"]).status == 404
    assert node.listing(f"{bucket}/") == [] and not node.temporary()


def test_a_put_under_way_of_a_task_that_runs_again_is_ended(node: Node, bucket: str) -> None:
    body = json.dumps([[f"{bucket}/out/x/000", 4, 7], [f"{bucket}/out/x/003", 4, 7]]).encode()
    prepared = node.post("/prepare_puts", body=body, job="late").json()
    with node.dial(prepared["port"]) as sender:
        sender.sendall(b"latela")
        eventually(node.temporary, 5)
        again = json.dumps([["x", "late", 7]]).encode()
        assert node.post("/remove_outputs", body=again, prefix=f"{bucket}/out/").status == 200
        assert node.rows("select * from transfers where uuid = ?", prepared["uuid"]) == []
        assert not node.temporary()


def test_a_put_that_waits_when_the_node_stops_is_told_so(narrow: Node) -> None:
    narrow.prepare_put("s4://b/000")
    with narrow.dial(narrow.port) as waiting:
        waiting.sendall(b"POST /prepare_put?key=s4://b/001 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        # The end of an eval tells that the put, which came before it, waits.
        narrow.post("/eval", key="s4://b/missing", body=b"cat")
        assert narrow.terminate() == 0
        assert waiting.recv(4096).startswith(b"HTTP/1.1 503 ")


def test_sends_and_receives_have_slots_of_their_own(narrow: Node) -> None:
    narrow.put("s4://b/000", b"x")
    _uuid, _port = narrow.prepare_put("s4://b/001")
    began = time.monotonic()
    assert narrow.fetch("s4://b/000") == b"x"
    assert time.monotonic() - began < 2


def test_a_put_that_is_never_confirmed_is_cleaned_up(narrow: Node) -> None:
    uuid, port = narrow.prepare_put("s4://b/000")
    narrow.send(port, b"data")
    eventually(narrow.temporary, 5, "bytes arrived")
    eventually(lambda: not narrow.temporary(), 15, "bytes are gone")
    assert 400 <= narrow.confirm_put(uuid, b"data").status < 500
    assert narrow.listing("s4://b") == []


def test_a_connection_that_breaks_off_stores_nothing(node: Node, bucket: str) -> None:
    uuid, port = node.prepare_put(f"{bucket}/000")
    connection = node.dial(port)
    connection.sendall(b"data")
    eventually(lambda: [p for p in node.data.glob("_run/*/arriving") if p.stat().st_size == 4], 5, "it came")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close sends a reset
    connection.close()
    answer = node.confirm_put(uuid, b"data")  # which is all that came
    assert answer.status == 400 and "the connection broke" in answer.text
    assert node.listing(bucket) == []


def test_a_confirmation_may_come_before_the_last_byte(node: Node, bucket: str) -> None:
    uuid, port = node.prepare_put(f"{bucket}/000")
    confirm = socket.create_connection((node.host, node.port), timeout=30)
    with node.dial(port) as connection:
        connection.sendall(b"first ")
        request = f"POST /confirm_put?uuid={uuid}&checksum={checksum_of(b'first second')} HTTP/1.0\r\n\r\n"
        confirm.sendall(request.encode())
        connection.sendall(b"second")
    with confirm:
        assert read_to_end(confirm).split(b" ", 2)[1] == b"200"
    assert node.fetch(f"{bucket}/000") == b"first second"


def test_transfers_use_the_same_few_ports_again(start_cluster: Callable[..., Cluster]) -> None:
    # Each port would be taken for a minute: at some hundred transfers a second a free one takes long to find.
    cluster = start_cluster(1)
    (node,) = cluster.nodes
    ports = set()
    for i in range(20):
        prepared = node.post("/prepare_put", key=f"s4://b/{i:03}")
        uuid, port = prepared.text.split()
        ports.add(port)
        # Somebody who comes too late, or by mistake, is not taken for the next who has this port.
        node.send(int(port), b"right")
        assert node.post("/confirm_put", uuid=uuid, checksum=checksum_of(b"right")).status == 200
        with socket.create_connection((node.host, int(port)), timeout=5) as stranger:
            stranger.sendall(b"wrong")
    assert len(ports) == 1
    for i in range(20):
        assert cluster.get(f"s4://b/{i:03}") == b"right"
    assert cluster.nodes[0].rows("select * from transfers") == []


def test_outputs_that_are_sent_again_replace_those_of_the_same_task(
    cluster: Cluster, bucket: str, folder: Path
) -> None:
    key = f"{bucket}/out/000/0"
    node = cluster.owner(key)
    caller = Caller(str(node), read_conf(str(cluster.conf)).fingerprint, 30)
    made = folder / "made"

    def under_way() -> set[object]:  # also of other tests, until they are cleaned up
        return {*node.rows("select uuid from transfers"), *(node.data / "_tempfiles").iterdir()}

    before = under_way()

    def send(data: bytes, task: int) -> list[str]:
        made.write_bytes(data)
        entry = (key.removeprefix("s4://"), str(made), len(data), task)
        return [type(no).__name__ for no in put_outputs(caller, "job", [entry])]

    for data, task, outcome in (
        (b"one", 7, "NoneType"),
        (b"one", 7, "NoneType"),
        (b"two", 7, "NoneType"),
        (b"three", 8, "ConflictError"),
    ):
        assert send(data, task) == [outcome]
        assert made.exists() == (outcome == "ConflictError")  # what was sent makes room for what arrives
        assert under_way() <= before
    assert node.fetch(key) == b"two"
    node.check()


def _turned_away(node: Node, port: int) -> None:
    """Connect to a transfer port from another address than the caller's, and be hung up on."""
    with socket.create_connection((node.host, port), 5, source_address=("127.0.0.9", 0)) as stranger:
        assert stranger.recv(1) == b""


def test_who_connects_from_elsewhere_does_not_prolong_a_dead_put(narrow: Node) -> None:
    uuid, port = narrow.prepare_put("s4://b/000")
    done = threading.Event()

    def strangers() -> None:
        with contextlib.suppress(OSError):  # in the end nobody listens there any more
            while not done.is_set():
                _turned_away(narrow, port)

    other = threading.Thread(target=strangers)
    other.start()
    try:
        _within_six_seconds(lambda: narrow.put("s4://b/next", b"x"))
        answer = narrow.confirm_put(uuid, b"")
        assert answer.status == 400 and "connections from other addresses were turned away" in answer.text
    finally:
        done.set()
        other.join()


def test_who_connects_to_a_transfer_too_late_is_hung_up_on(node: Node, bucket: str) -> None:
    uuid, port = node.prepare_put(f"{bucket}/000")
    node.send(port, b"data")
    with node.dial(port) as late:
        assert node.confirm_put(uuid, b"data").status == 200
        late.settimeout(5)
        assert late.recv(1) == b""
    with node.dial(port) as later:
        later.settimeout(5)
        assert later.recv(1) == b""
    assert node.put(f"{bucket}/003", b"x").status == 200 and node.fetch(f"{bucket}/003") == b"x"


@pytest.mark.parametrize(
    ("request_line", "body", "answered"),
    [
        ("GET /health", b"", b"healthy"),
        ("GET /list?prefix={bucket}/&recursive=true", b"", b'"000"]'),
        ("GET /stat?key={bucket}/000", b"", b'"checksum"'),
        ("POST /prepare_get?key={bucket}/000", b"", b"-4"),  # of a uuid of version 4
        ("POST /eval?key={bucket}/000", b"cat", b"data"),
        ("POST /map", b'{"cmd": "cat", "indir": "{bucket}/", "outdir": "{bucket}2/"}', b'"tasks": 1'),
    ],
)
def test_a_caller_who_will_say_no_more_is_answered(
    node: Node, bucket: str, request_line: str, body: bytes, answered: bytes
) -> None:
    node.put(f"{bucket}/000", b"data")
    name = bucket.encode()
    body = body.replace(b"{bucket}", name)
    head = f"{request_line.replace('{bucket}', bucket)} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(5 if request_line.startswith("GET") else 1):
        with node.dial(node.port) as caller:
            caller.sendall(head.encode() + body)
            caller.shutdown(socket.SHUT_WR)
            caller.settimeout(10)
            answer = read_to_end(caller)
        line, _end, said = answer.partition(b"\r\n\r\n")
        assert line.startswith(b"HTTP/1.1 200 OK\r\n") and answered in said, answer


def test_a_long_answer_to_a_caller_who_will_say_no_more_is_whole(node: Node) -> None:
    numbers = "with recursive n(x) as (select 1 union all select x + 1 from n limit 8)"
    query = f"{numbers} select zeroblob(900000) from n"
    request = f"POST /sql HTTP/1.1\r\nContent-Length: {len(query)}\r\n\r\n{query}".encode()
    for i in range(20):
        with socket.socket() as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            caller.settimeout(20)
            caller.connect((node.host, node.port))
            caller.sendall(request)
            beginning = caller.recv(1)
            time.sleep(0.002 * i)  # nothing is waited for: the moments are to differ
            caller.shutdown(socket.SHUT_WR)
            answer = beginning + read_to_end(caller)
        assert len(answer) > 8 * 1_800_000 and answer.endswith(b"{}\n\r\n0\r\n\r\n"), (i, len(answer))


def test_an_error_is_plain_text_whatever_the_answer_would_be(node: Node) -> None:
    for answer in (
        node.post("/sql", body=b"garbage"),
        node.get("/list", prefix="s4://b/../x", recursive="true"),
        node.get("/tasks", job="there-is-none"),
    ):
        assert answer.status >= 400 and answer.headers["Content-Type"].startswith("text/plain"), answer


@pytest.mark.parametrize("missing", ["job", "run"])
def test_a_retry_names_its_job_and_its_run(node: Node, bucket: str, missing: str) -> None:
    node.put(f"{bucket}/in/000")
    body = {"cmd": "cat", "indir": f"{bucket}/in/", "outdir": f"{bucket}/out/", "kind": "map"}
    answer = node.post_json(
        "/retry", {key: v for key, v in {**body, "job": "x", "run": 2}.items() if key != missing}
    )
    assert answer.status == 400 and f'"{missing}" is missing' in answer.text
    assert node.listing(f"{bucket}/out/") == []


def test_the_outputs_of_a_job_whose_id_can_be_none_are_refused(node: Node, bucket: str) -> None:
    body = f'[["{bucket}/000", 1, 0]]'.encode()
    assert node.post("/prepare_puts?job=%FF", body=body).status == 400
    assert node.post("/prepare_puts", body=body, job="no id").status == 400
    assert node.post("/prepare_puts", body=body, job="id").status == 200


def test_a_command_that_bash_could_not_be_given_is_400(node: Node, bucket: str) -> None:
    node.put(f"{bucket}/000")
    longest = b"true # ".ljust(128 * 1024 - 1, b"x")
    assert node.post("/eval", key=f"{bucket}/000", body=longest).status == 200
    answer = node.post("/eval", key=f"{bucket}/000", body=longest + b"x")
    assert answer.status == 400 and "131072 bytes" in answer.text


def test_the_share_of_a_job_can_be_asked_for_without_waiting(node: Node, bucket: str) -> None:
    node.put(f"{bucket}/in/000")
    body = {"cmd": "sleep 60", "indir": f"{bucket}/in/", "outdir": f"{bucket}/out/", "detach": True}
    job = node.post_json("/map", body).json()["id"]
    answer = node.get("/job", job=job, wait=0, timeout=20)
    assert answer.status == 200 and answer.json()["state"] == "running"
    assert node.post("/cancel", job=job).json()["state"] == "cancelled"


def test_who_was_told_that_all_slots_are_taken_gets_none_later(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, ["-max-io-jobs", "1"], start=False)
    (node,) = cluster.nodes
    node.start(first="import s4.waiting; s4.waiting.SLOT_SECONDS = 0.5")
    uuid, port = node.prepare_put("s4://b/first")
    assert node.post("/prepare_put", key="s4://b/refused").status == 429
    node.send(port, b"x")
    assert node.confirm_put(uuid, b"x").status == 200
    # Nobody sends to the one that was refused: with a slot it would keep it for five seconds.
    assert node.put("s4://b/next").status == 200


def test_few_ports_are_kept_for_further_transfers(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, ["-max-io-jobs", "6"], start=False)
    (node,) = cluster.nodes
    node.start(first="import s4.transfers; s4.transfers.IDLE_LISTENERS = 2")
    prepared = [node.prepare_put(f"s4://b/{i}") for i in range(6)]
    for uuid, port in prepared:
        node.send(port, b"x")
        assert node.confirm_put(uuid, b"x").status == 200

    def listens(port: int) -> bool:
        with contextlib.suppress(ConnectionRefusedError), node.dial(port):
            return True
        return False

    assert sum(listens(port) for _uuid, port in prepared) == 2


def test_the_outcome_of_a_put_is_kept_for_a_while_only(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, start=False)
    (node,) = cluster.nodes
    node.start(first="import s4.transfers; s4.transfers.OUTCOME_SECONDS = 0.1")
    uuid, port = node.prepare_put("s4://b/000")
    node.send(port, b"x")
    assert node.confirm_put(uuid, b"x").status == 200
    eventually(lambda: node.confirm_put(uuid, b"x").status == 404, 10, "it is forgotten")


def test_a_batch_that_nobody_will_confirm_is_forgotten_once_it_is_sent(
    start_cluster: Callable[..., Cluster],
) -> None:
    (node,) = start_cluster(1).nodes
    assert node.put("s4://b/000", b"x").status == 200
    prepared = node.post("/prepare_gets", body=b'["s4://b/000"]').json()
    assert node.rows("select direction from transfers") == [("get",)]
    assert node.receive(prepared["port"]) == b"x"
    eventually(lambda: not node.rows("select * from transfers"), 8, "it is forgotten")


def test_a_body_that_is_too_long_is_refused_before_it_is_sent(node: Node) -> None:
    head = "POST /eval?key=s4://b/000 HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n"
    with node.dial(node.port) as connection:
        connection.sendall(head.format(MAX_REQUEST_BYTES + 1).encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_batch_has_so_many_keys_and_no_more(node: Node) -> None:
    for count, status in ((MAX_BATCH_KEYS, 200), (MAX_BATCH_KEYS + 1, 400), (0, 400)):
        assert node.post_json("/prepare_gets", ["s4://b/000-none/000"] * count).status == status


def test_requests_leave_no_descriptor_open(start_cluster: Callable[..., Cluster]) -> None:
    (node,) = start_cluster(1, ["-max-io-jobs", "2", "-max-cpu-jobs", "2"]).nodes
    assert node.put("s4://b/in/000", b"data").status == 200

    def ask(i: int) -> None:
        assert node.put(f"s4://b/{i}", b"x").status == 200
        uuid, port = node.prepare_put(f"s4://b/{i}-more")
        node.send(port, b"x")
        assert node.confirm_put(uuid, b"y").status == 400
        assert node.fetch("s4://b/in/000") == b"data"
        prepared = node.post("/prepare_gets", body=b'["s4://b/in/000", "s4://b/000-none"]').json()
        assert node.receive(prepared["port"]) == b"data"
        for raw in ("true", "false"):
            for command, status in ((b"cat; echo e >&2", 200), (b"cat; exit 3", 400)):
                assert node.post("/eval", key="s4://b/in/000", raw=raw, body=command).status == status
        body = {"cmd": "cat", "indir": "s4://b/in/", "outdir": f"s4://b/out{i}/"}
        assert node.post_json("/map_from_n", body).status == 200
        failing = body | {"cmd": "exit 3", "outdir": f"s4://b/failed{i}/"}
        assert node.post_json("/map", failing).status == 400

    def opened() -> list[int]:
        """How many descriptors the node has, and the worker that has the most."""
        of_workers = [len(os.listdir(f"/proc/{worker.pid}/fd")) for worker in node.workers()]
        return [len(os.listdir(f"/proc/{node.pid}/fd")), max(of_workers)]

    for i in range(3):
        ask(i)
    # So many ports are kept for further transfers.
    most = [count + IDLE_LISTENERS for count in opened()]
    for i in range(3, 3 + 2 * IDLE_LISTENERS):
        ask(i)
    eventually(lambda: all(map(int.__le__, opened(), most)), 10, f"at most {most}")
