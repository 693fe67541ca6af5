"""File size, 1 KB to 4 GB: one `s4 cp` in and one out, how fast, and what memory either side takes."""

import os
import statistics
from pathlib import Path

from benchmarks.cluster import Cluster
from benchmarks.measure import Budget, seconds
from benchmarks.results import Result, Row

KB, MB, GB = 1_000, 1_000_000, 1_000_000_000
POINTS = {  # by scale: bytes, and how often that is repeated
    "full": [(KB, 7), (32 * KB, 7), (MB, 7), (32 * MB, 7), (256 * MB, 3), (GB, 3), (4 * GB, 1)],
    "quick": [(KB, 5), (32 * KB, 5), (MB, 5), (32 * MB, 5), (256 * MB, 3)],
    "tiny": [(KB, 1), (MB, 1)],
}
BUDGET_S = 240
BLOCK = 4 * MB


def run(scale: str, folder: Path) -> Result:
    """The series."""
    result = Result("File size, one put and one get")
    budget = Budget(BUDGET_S)
    with Cluster(folder / "cluster", 1) as cluster:
        for size, repeats in budget.points(POINTS[scale]):
            result.rows.append(_measure(cluster, folder, size, repeats))
    result.notes += budget.note()
    for side in ("put client MB", "get client MB", "node MB"):
        result.claim_flat(f"memory stays flat: {side.removesuffix(' MB')}", side)
    return result


def _measure(cluster: Cluster, folder: Path, size: int, repeats: int) -> Row:
    source, back, key = folder / "source", folder / "back", "s4://b/key"
    _make_file(source, size)
    puts, gets, put_mb, get_mb = [], [], 0.0, 0.0

    def put() -> None:
        nonlocal put_mb
        put_mb = max(put_mb, cluster.run_and_watch("cp", source, key))

    def get() -> None:
        nonlocal get_mb
        get_mb = max(get_mb, cluster.run_and_watch("cp", key, back))

    with cluster.watch_memory() as memory:
        for _ in range(repeats):
            _settle(size)
            puts.append(seconds(put))
            _settle(size)
            gets.append(seconds(get))
            back.unlink()
            cluster.run("rm", key)
    source.unlink()
    put_s, get_s = statistics.median(puts), statistics.median(gets)
    return {
        "bytes": size,
        "put ms": put_s * 1000,
        "put MB/s": size / MB / put_s,
        "get ms": get_s * 1000,
        "get MB/s": size / MB / get_s,
        "put client MB": put_mb,
        "get client MB": get_mb,
        "node MB": memory.node_mb,
    }


def _settle(size: int) -> None:
    """Write out what the last step left in the page cache: if it is much, the next one would pay for it."""
    if size >= 32 * MB:
        os.sync()


def _make_file(path: Path, size: int) -> None:
    block = os.urandom(BLOCK)
    with open(path, "wb") as f:
        while size > 0:
            size -= f.write(block[:size])
