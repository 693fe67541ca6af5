"""s4 ls and GET /list: columns, folders, prefixes, order, merging, and a million keys."""

import contextlib
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone

import pytest
from cluster import Cluster, Node
from procs import eventually, forget_peak, peak_megabytes
from reference import owner_of

KEYS = [
    "a",
    "a-b",
    "a/000",
    "a/b/000",
    "a/b/001",
    "a.txt",
    "listing/dir/000",
    "listing/dog",
    "listing-2/000",
    "z/000_x",
]
# In order, without "a", which would stand where "a/…" needs a folder.
LISTED = [
    "a-b",
    "a.txt",
    "a/000",
    "a/b/000",
    "a/b/001",
    "listing-2/000",
    "listing/dir/000",
    "listing/dog",
    "z/000_x",
]
ZONE = timezone(timedelta(hours=5, minutes=30))  # as cluster.TIMEZONE


@pytest.fixture(scope="module")
def listed(cluster: Cluster) -> str:
    """A bucket with KEYS, except those that another one conflicts with on its node, each holding its path."""
    bucket = cluster.fresh_bucket()
    cluster.put_all({f"{bucket}/{key}": key.encode() for key in KEYS if key != "a"})
    return bucket


def _columns(cluster: Cluster, *arguments: str) -> list[tuple[str, str]]:
    """Size (or PRE) and path of each line."""
    rows = []
    for line in cluster.s4("ls", *arguments).lines:
        match = re.fullmatch(r"(?:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +(\d+)| +(PRE)) (\S+)", line)
        assert match, line
        rows.append((match[1] or match[2], match[3]))
    return rows


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("/", ["a-b", "a.txt", "a/", "listing-2/", "listing/", "z/"]),
        ("/a", ["a-b", "a.txt", "a/"]),
        ("/a/", ["000", "b/"]),
        ("/a/b", ["b/"]),
        ("/a/b/", ["000", "001"]),
        ("/a/b/00", ["000", "001"]),
        ("/a/b/001", ["001"]),
        ("/listing", ["listing-2/", "listing/"]),
        ("/listing/d", ["dir/", "dog"]),
        ("/listing/di", ["dir/"]),
    ],
)
def test_a_folder_lists_its_keys_and_folders_relative_to_it(
    cluster: Cluster, listed: str, prefix: str, expected: list[str]
) -> None:
    paths = [path for _size, path in _columns(cluster, listed + prefix)]
    assert paths == expected
    assert [path for _size, path in _columns(cluster, listed.removeprefix("s4://") + prefix)] == expected
    over_http = sorted(
        {
            (row[3], row[2] == "PRE")
            for node in cluster.nodes
            for row in node.listing(listed + prefix, recursive=False)
        }
    )
    assert over_http == [(path, path.endswith("/")) for path in expected]


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("", LISTED),
        ("/", LISTED),
        ("/a/", ["a/000", "a/b/000", "a/b/001"]),
        ("/a/b", ["a/b/000", "a/b/001"]),
        ("/listing", ["listing-2/000", "listing/dir/000", "listing/dog"]),
        ("/listing/", ["listing/dir/000", "listing/dog"]),
        ("/z/000_x", ["z/000_x"]),
    ],
)
def test_recursion_lists_every_key_relative_to_the_bucket(
    cluster: Cluster, listed: str, prefix: str, expected: list[str]
) -> None:
    for arguments in (["-r", listed + prefix], [listed + prefix, "-r"], ["--recursive", listed + prefix]):
        rows = _columns(cluster, *arguments)
        assert rows == [(str(len(path)), path) for path in expected]


@pytest.mark.parametrize("flags", [[], ["-r"]])
@pytest.mark.parametrize(
    "prefix", ["/x", "/a/b/000/", "/a/b/002", "/listing/dogs", "/A", "-no", "/a%", "/a_", "/a.txt/", "/*"]
)
def test_nothing_that_matches_is_exit_1(cluster: Cluster, listed: str, prefix: str, flags: list[str]) -> None:
    result = cluster.run("ls", *flags, listed + prefix)
    assert (result.code, result.out) == (1, b"")


def test_another_scheme_is_named_as_the_reason(cluster: Cluster) -> None:
    cluster.fails("ls", "s3://b/", says="bad key 's3://b/': a key begins with s4://", code=1)


def test_the_bucket_part_of_a_prefix_is_always_whole(cluster: Cluster, listed: str) -> None:
    for flags in ([], ["-r"]):
        assert cluster.run("ls", *flags, "s4://bucke").code == 1
        assert cluster.run("ls", *flags, listed + "x").code == 1
    for node in cluster.nodes:
        assert node.listing("s4://bucke") == node.listing("s4://bucke", recursive=False) == []


def test_a_bucket_is_one_line_with_its_total(cluster: Cluster, listed: str) -> None:
    total = str(sum(len(key) for key in KEYS if key != "a"))
    name = listed.removeprefix("s4://")
    assert _columns(cluster, listed) == [(total, name)]
    assert (total, name) in _columns(cluster)
    over_http = [row for node in cluster.nodes for row in node.get("/list_buckets").json() if row[3] == name]
    assert sum(int(row[2]) for row in over_http) == int(total)


def test_buckets_are_listed_once_and_in_order(cluster: Cluster, listed: str) -> None:
    paths = [path for _size, path in _columns(cluster)]
    assert paths == sorted(set(paths)) and listed.removeprefix("s4://") in paths
    cluster.s4("rm", "-r", "s4://gone/")
    cluster.put("s4://gone/000")
    assert ("0", "gone") in _columns(cluster)
    cluster.s4("rm", "s4://gone/000")
    assert "gone" not in [path for _size, path in _columns(cluster)]
    assert cluster.run("ls", "s4://gone").code == 1


def test_an_empty_cluster_lists_nothing(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    assert cluster.nodes[0].get("/list_buckets").json() == []
    assert cluster.run("ls").out == b""


def test_columns_are_aligned_and_times_local(cluster: Cluster, bucket: str) -> None:
    before = datetime.now(ZONE).replace(tzinfo=None, microsecond=0)
    cluster.put_all({f"{bucket}/000": b"", f"{bucket}/001": b"x" * 1234567, f"{bucket}/dir/002": b"xyz"})
    after = datetime.now(ZONE).replace(tzinfo=None)
    lines = cluster.s4("ls", f"{bucket}/").lines
    assert lines[2].split() == ["PRE", "dir/"]
    assert {len(line) - len(line.split()[-1]) for line in lines} == {len(lines[0]) - 3}
    for line in lines[:2]:
        assert before <= datetime.strptime(line[:19], "%Y-%m-%d %H:%M:%S") <= after
    for node in cluster.nodes:
        for row in node.listing(f"{bucket}/", recursive=False):
            assert all(isinstance(value, str) for value in row) and len(row) == 4
            if row[2] == "PRE":
                assert row == ["", "", "PRE", "dir/"]
            else:
                assert before <= datetime.strptime(" ".join(row[:2]), "%Y-%m-%d %H:%M:%S") <= after


def test_order_is_by_code_point_with_folders_among_the_keys(cluster: Cluster, bucket: str) -> None:
    names = ["Z", "a", "a!", "a-", "a.", "a0", "a/000", "b/001", "b/002", "é", "\uffee", "🙂", "~", "10", "9"]
    for name in names:
        if name != "a":  # the folder a/ is on another node than some of these, but not on all
            cluster.put(f"{bucket}/{name}")
    expected = sorted({name.split("/")[0] + "/" if "/" in name else name for name in names if name != "a"})
    assert [path for _size, path in _columns(cluster, f"{bucket}/")] == expected
    assert [path for _size, path in _columns(cluster, "-r", bucket)] == sorted(set(names) - {"a"})


def test_a_key_and_a_folder_of_one_name_on_two_nodes_are_both_listed(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/000": b"", f"{bucket}/000/001": b""})
    assert [path for _size, path in _columns(cluster, f"{bucket}/")] == ["000", "000/"]


def test_folders_on_all_nodes_are_listed_once(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/{folder}/{i:03}": b"" for folder in ("x", "y") for i in range(9)})
    assert _columns(cluster, f"{bucket}/") == [("PRE", "x/"), ("PRE", "y/")]


def test_listing_with_a_server_down_names_it(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2)
    cluster.put("s4://b/000")
    cluster.nodes[1].kill()
    for arguments in (["ls"], ["ls", "s4://b/"], ["ls", "-r", "s4://b"], ["ls", "s4://b"]):
        cluster.fails(*arguments, says=str(cluster.nodes[1]), code=1)


@pytest.fixture(scope="module")
def million() -> Iterator[Node]:
    """A node whose index has a million keys in a thousand folders, and 300,000 in one, without files."""
    with Cluster(1, start=False, check=False) as cluster:
        (node,) = cluster.nodes
        node.start()
        node.terminate()
        with contextlib.closing(sqlite3.connect(node.data / "_index" / "node.db")) as db, db:
            insert = "insert into keys (path, size, checksum, created_s) values (?, 1, '1', 1700000000)"
            db.executemany(
                insert, ((f"b/{folder:03}/{i:03}",) for folder in range(1000) for i in range(1000))
            )
            db.executemany(insert, ((f"wide/{i:06}",) for i in range(300_000)))
        node.start()
        yield node


def test_a_folder_among_a_million_keys_is_listed_at_once(million: Node) -> None:
    for prefix, count in (("s4://b/", 1000), ("s4://b/500/", 1000), ("s4://b/50", 10), ("s4://b/500/9", 100)):
        began = time.monotonic()
        assert len(million.listing(prefix, recursive=False)) == count
        assert time.monotonic() - began < 1
    began = time.monotonic()
    assert million.cluster.s4("ls", "s4://b").lines[0].split()[2:] == ["1000000", "b"]
    assert time.monotonic() - began < 2


def test_a_million_keys_stream_through_node_and_client_in_bounded_memory(million: Node) -> None:
    process = million.cluster.start_s4("ls", "-r", "s4://b")
    assert process.stdout is not None
    client, last = 0.0, b""
    for lines, line in enumerate(process.stdout, 1):
        last = line
        if lines % 50_000 == 0:
            client = max(client, peak_megabytes(process.pid))
    assert process.wait(20) == 0
    assert lines == 1_000_000 and last.split()[-1] == b"999/999"
    assert 0 < client < 150 and peak_megabytes(million.pid) < 150, (client, peak_megabytes(million.pid))


def test_a_reader_who_keeps_up_with_a_listing_costs_the_node_no_memory(million: Node) -> None:
    forget_peak(million.pid)
    before, size = peak_megabytes(million.pid), 0
    with socket.create_connection((million.host, million.port), timeout=10) as eager:
        eager.sendall(b"GET /list?prefix=s4://b&recursive=true HTTP/1.0\r\n\r\n")
        while data := eager.recv(1 << 20):
            size += len(data)
    assert size > 30_000_000 and peak_megabytes(million.pid) - before < 20


def test_a_reader_who_stops_reading_a_listing_holds_nobody_up(million: Node) -> None:
    with socket.create_connection((million.host, million.port), timeout=10) as lazy:
        lazy.sendall(b"GET /list?prefix=s4://b&recursive=true HTTP/1.1\r\nHost: s4\r\n\r\n")
        assert lazy.recv(1000).startswith(b"HTTP/1.1 200")
        for i in range(20):
            began = time.monotonic()
            assert million.get("/health").status == 200
            assert million.put(f"s4://c/{i}", b"x").status == 200
            assert million.post("/delete", prefix=f"s4://c/{i}").status == 200
            assert time.monotonic() - began < 2


@pytest.mark.parametrize("listing", ["prefix=s4://b&recursive=true", "prefix=s4://wide/"])
def test_a_hundred_listings_at_once_leave_room_for_others(million: Node, listing: str) -> None:
    with contextlib.ExitStack() as readers:
        for _ in range(100):
            reader = readers.enter_context(socket.create_connection((million.host, million.port), timeout=30))
            reader.sendall(f"GET /list?{listing} HTTP/1.1\r\nHost: s4\r\n\r\n".encode())
        for _ in range(5):
            assert million.get("/health", timeout=10).status == 200
            assert len(million.listing("s4://b/500/", recursive=False)) == 1000
    assert len(million.cluster.s4("ls", "-r", "s4://b/50").lines) == 10_000


def test_a_closed_pipe_ends_a_listing_quietly(million: Node) -> None:
    command = "s4 ls -r s4://b | head -n 3; echo ${PIPESTATUS[1]}"
    done = subprocess.run(
        ["bash", "-c", command], env=million.cluster.env, capture_output=True, timeout=30, check=True
    )
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [
        b"000/000",
        b"000/001",
        b"000/002",
        b"0",
    ]
    assert done.stderr == b""


def test_a_listing_in_python_leaves_no_connection_open(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/{i:03}": b"" for i in range(9)})
    script = "import s4, sys; print(len(list(s4.Client(sys.argv[1]).ls(sys.argv[2]))))"
    command = [sys.executable, "-X", "dev", "-c", script, str(cluster.conf), f"{bucket}/"]
    done = subprocess.run(command, capture_output=True, timeout=20, text=True)
    assert (done.stdout, done.stderr) == ("9\n", "")


def test_removing_many_keys_does_not_block_others(million: Node) -> None:
    remove = million.cluster.start_s4("rm", "-r", "s4://b/1")

    def answers_in_time() -> bool:
        began = time.monotonic()
        assert million.listing("s4://b/500/", recursive=False)
        assert time.monotonic() - began < 1
        return remove.poll() is not None

    eventually(answers_in_time, 60, "100,000 keys removed")
    assert remove.returncode == 0
    assert million.listing("s4://b/1") == []
    assert len(million.listing("s4://b/", recursive=False)) == 900


def test_placement_of_the_listing_is_that_of_the_keys(cluster: Cluster, listed: str) -> None:
    for i, node in enumerate(cluster.nodes):
        for row in node.listing(listed):
            assert owner_of(row[3].rsplit("/", 1)[-1], 3) == i
