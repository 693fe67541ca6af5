"""Keys in the index of one node, 10 thousand to 5 million: what puts, listings and removals cost on top.

Most rows are written into node.db directly, by the same call that `s4-server reindex` uses, while the node is
down, and have no files: five million files would take an hour and tell about ext4, not about s4. What is
measured goes through the running node and has files.
"""

import hashlib
import shutil
import statistics
import time
from pathlib import Path

from benchmarks.cluster import Cluster
from benchmarks.measure import Budget, median_seconds, seconds
from benchmarks.results import Result
from s4.index import Database, KeyIndex, KeyRow

FOLDER_KEYS = 1000  # of a folder that is filled
BUCKET = "s4://keys/"
# Scale: the points; how many folders of ten keys a put brings, and how often it is repeated.
POINTS = {
    "full": ([10_000, 100_000, 1_000_000, 5_000_000], 500, 5),
    "quick": ([10_000, 100_000, 500_000], 200, 3),
    "tiny": ([1_000, 2_000], 3, 1),
}
BUDGET_S = 420


def run(scale: str, folder: Path) -> Result:
    """The series."""
    points, fresh, repeats = POINTS[scale]
    result = Result("Keys in the index of a node")
    budget = Budget(BUDGET_S)
    cluster = Cluster(folder / "cluster", 1)
    node_db = cluster.data(0) / "_index" / "node.db"
    filled = 0
    for keys in budget.points(points):
        _fill(node_db, filled, keys)
        filled = keys
        with cluster, cluster.watch_memory() as memory:
            row, rows = _measure(cluster, folder, f"{keys}", fresh, repeats)
        size = node_db.stat().st_size
        result.rows.append(
            {
                "keys": keys,
                **row,
                "node MB": memory.node_mb,
                "node.db MB": size / 1e6,
                "bytes a key": size / rows,
                "start s": cluster.start_seconds,
            }
        )
    result.notes += budget.note()
    result.claim_flat("listing a folder of 1,000 stays flat", "folder ms")
    for name, text in (("put/s", "puts"), ("listed/s", "recursive listings"), ("removed/s", "removals")):
        first, last = result.column(name)[0], result.column(name)[-1]
        result.claim(
            f"the rate of {text} falls by less than half",
            last > first / 2,
            f"{name}: {first:,.0f} → {last:,.0f}",
        )
    result.claim_flat("the node's memory stays flat", "node MB")
    result.claim_flat("node.db grows with the keys and no faster", "bytes a key")
    return result


def _fill(node_db: Path, begin: int, end: int) -> None:
    """Rows without files, a folder at a time, the folders in random order as they would come in life."""
    database = Database(str(node_db))  # makes it, at first
    index = KeyIndex(database, lambda _paths: None)
    now = int(time.time())
    for number in range(begin // FOLDER_KEYS, end // FOLDER_KEYS):
        folder = f"keys/{_scattered(f'filled {number}')}"
        index.restore([KeyRow(f"{folder}/{i:06d}", 100, "0123456789abcdef", now) for i in range(FOLDER_KEYS)])
    database.close()


def _scattered(name: str) -> str:
    """A name of a folder whose place among the others is anywhere."""
    return hashlib.blake2s(name.encode()).hexdigest()[:8]


def _measure(
    cluster: Cluster, folder: Path, name: str, fresh: int, repeats: int
) -> tuple[dict[str, float], int]:
    """The numbers of a point, and how many keys there are at its end."""
    client = cluster.client()
    puts, removals = [], []
    for repeat in range(repeats):
        # New folders all over the key space: the worst case for a B-tree. They stay.
        scattered = [_scattered(f"{name} {repeat} {i}") for i in range(fresh)]
        _make_files(folder / "scattered", scattered)
        puts.append(seconds(lambda: cluster.run("cp", "-r", folder / "scattered", BUCKET)))
        _make_files(folder / "together", [f"{i:03d}" for i in range(fresh)])
        cluster.run("cp", "-r", folder / "together", BUCKET + "together/")
        removals.append(seconds(lambda: client.rm(BUCKET + "together/", recursive=True)))
    a_folder = f"{BUCKET}{_scattered('filled 0')}/"
    keys = 0

    def list_all() -> None:
        nonlocal keys
        keys = sum(1 for _ in client.ls(BUCKET, recursive=True))

    listing_s = median_seconds(3 if int(name) <= 100_000 else 1, list_all)
    row = {
        "put/s": 10 * fresh / statistics.median(puts),
        "folder ms": 1000 * median_seconds(9, lambda: list(client.ls(a_folder))),
        "listed/s": keys / listing_s,
        "removed/s": 10 * fresh / statistics.median(removals),
    }
    return row, keys


def _make_files(top: Path, folders: list[str]) -> None:
    """Ten small files in each folder, in place of those that were there."""
    shutil.rmtree(top, ignore_errors=True)
    for name in folders:
        (top / name).mkdir(parents=True)
        for i in range(10):
            (top / name / f"{i:06d}").write_bytes(b"x" * 100)
