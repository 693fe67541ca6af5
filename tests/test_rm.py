"""s4 rm and POST /delete: one key, prefixes, empty folders, and what must not be removed."""

import threading
from pathlib import Path

import pytest
from cluster import Cluster

KEYS = ["a-x/000", "a/000", "a/b/001", "a/b/002", "ab/000", "z.txt"]


@pytest.fixture
def filled(cluster: Cluster, bucket: str) -> str:
    cluster.put_all({f"{bucket}/{key}": b"x" for key in KEYS})
    return bucket


def _folders(cluster: Cluster, bucket: str) -> list[str]:
    """The folders on disk of a bucket, over all nodes."""
    found: set[str] = set()
    for node in cluster.nodes:
        top: Path = node.path_of(bucket)
        found |= {str(path.relative_to(top)) for path in top.rglob("*") if path.is_dir()}
    return sorted(found)


def test_one_key_is_removed_and_its_empty_folders_with_it(cluster: Cluster, filled: str) -> None:
    cluster.s4("rm", f"{filled}/a/b/001")
    assert cluster.keys(filled) == [f"{filled}/{key}" for key in KEYS if key != "a/b/001"]
    assert _folders(cluster, filled) == ["a", "a-x", "a/b", "ab"]
    cluster.s4("rm", f"{filled}/a/b/002")
    assert _folders(cluster, filled) == ["a", "a-x", "ab"]
    assert not any(path.is_file() for node in cluster.nodes for path in node.path_of(filled).rglob("00[12]"))


@pytest.mark.parametrize("path", ["a", "a/b", "missing", "a/000/x"])
def test_what_is_no_key_is_exit_1(cluster: Cluster, filled: str, path: str) -> None:
    with cluster.nothing_changes():
        cluster.fails("rm", f"{filled}/{path}", says=f"{filled}/{path}", code=1)
        node = cluster.owner(f"{filled}/{path}")
        assert node.post("/delete", prefix=f"{filled}/{path}").status == 404


@pytest.mark.parametrize("path", ["", "/", "/a/"])
def test_folders_and_buckets_need_recursion(cluster: Cluster, filled: str, path: str) -> None:
    with cluster.nothing_changes():
        cluster.fails("rm", filled + path)
        for node in cluster.nodes:
            assert node.post("/delete", prefix=filled + path).status == 400


@pytest.mark.parametrize(
    ("prefix", "left"),
    [
        ("/a/", ["a-x/000", "ab/000", "z.txt"]),
        ("/a", ["z.txt"]),
        ("/a/b", ["a-x/000", "a/000", "ab/000", "z.txt"]),
        ("/a/b/00", ["a-x/000", "a/000", "ab/000", "z.txt"]),
        ("/z.txt", ["a-x/000", "a/000", "a/b/001", "a/b/002", "ab/000"]),
        ("/", []),
        ("", []),
        ("/none", KEYS),
        ("/A", KEYS),
        ("/%", KEYS),
        ("/*", KEYS),
    ],
)
@pytest.mark.parametrize("flag_first", [True, False])
def test_recursion_removes_what_starts_with_the_prefix(
    cluster: Cluster, filled: str, prefix: str, left: list[str], flag_first: bool
) -> None:
    neighbours = [f"{filled}-2/a/000", f"{filled}x/a/000"]
    cluster.put_all(dict.fromkeys(neighbours, b""))
    cluster.s4("rm", *(["-r", filled + prefix] if flag_first else [filled + prefix, "-r"]))
    assert cluster.keys(filled) == [f"{filled}/{key}" for key in left]
    assert [key for key in neighbours if cluster.owner(key).listing(key)] == neighbours
    kept = {"/".join(key.split("/")[:i]) for key in left for i in range(1, key.count("/") + 1)}
    assert set(_folders(cluster, filled)) == kept


def test_the_bucket_part_of_a_prefix_is_always_whole(cluster: Cluster, filled: str) -> None:
    with cluster.nothing_changes():
        cluster.s4("rm", "-r", filled[:-3])
        for node in cluster.nodes:
            assert node.post("/delete", prefix=filled[:-3], recursive="true").status == 200
    assert cluster.keys(filled)


@pytest.mark.parametrize(
    "prefix", ["", "s4://", "s4:///", "s4://_index/", "s4://_", "{}/../", "{}/./", "{}//", "{}/ a"]
)
def test_prefixes_that_no_key_could_have_are_refused(cluster: Cluster, filled: str, prefix: str) -> None:
    bad = prefix.format(filled)
    with cluster.nothing_changes():
        cluster.fails("rm", "-r", bad)
        for node in cluster.nodes:
            assert node.post("/delete", prefix=bad, recursive="true").status == 400


def test_a_key_that_is_removed_while_it_is_read_arrives_whole(cluster: Cluster, bucket: str) -> None:
    key, data = f"{bucket}/000", b"0123456789" * 2_000_000
    node = cluster.nodes[0]
    assert node.put(key, data).status == 200
    uuid, port = node.prepare_get(key)
    with node.dial(port) as connection:
        first = connection.recv(10)
        assert node.post("/delete", prefix=key).status == 200
        assert node.put(key, b"another").status == 200
        rest = bytearray()
        while block := connection.recv(1 << 18):
            rest += block
    assert first + rest == data
    assert uuid and node.fetch(key) == b"another"


def test_puts_and_removals_of_one_prefix_at_once_leave_rows_and_files_agreeing(
    cluster: Cluster, bucket: str
) -> None:
    node = cluster.nodes[0]
    statuses: list[int] = []

    def put() -> None:
        statuses.extend(node.put(f"{bucket}/dir/sub/{i * 3:03}_x", b"x").status for i in range(60))

    def remove() -> None:
        statuses.extend(
            node.post("/delete", prefix=f"{bucket}/dir", recursive="true").status for _ in range(60)
        )

    threads = [threading.Thread(target=work) for work in (put, remove, put, remove)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 409}
    node.check()
