"""Jobs: `map` over ever more tiny keys, and the shuffle of ever more small files between three nodes."""

import shutil
from pathlib import Path

from benchmarks.cluster import Cluster
from benchmarks.measure import Budget, accepted_connections, median_seconds
from benchmarks.results import Result

NODES = 3
TASKS = {"full": [100, 1_000, 10_000, 50_000], "quick": [100, 1_000, 5_000], "tiny": [10, 30]}
SHUFFLES = {"full": [10, 30, 100, 300], "quick": [10, 30, 100], "tiny": [2, 4]}
TASKS_BUDGET_S = 300
SHUFFLES_BUDGET_S = 240
# A busy node has more workers than an idle one, up to its limits, and its threads fill their caches: neither
# is growth with the work, which would show in a process and go on.
MEMORY_BOUNDED = "memory is bounded: no process of a node grows on and on"
SMALL = 1000  # commands or files; below, a point is repeated


def run_tasks(scale: str, folder: Path) -> Result:
    """`map` with `cat`; a task is what it costs beyond the job with a single key."""
    result = Result(f"Tasks of a map, {NODES} nodes")
    budget = Budget(TASKS_BUDGET_S)
    with Cluster(folder / "cluster", NODES) as cluster:
        one_s = _alone(cluster, folder, "map", "cat")
        for tasks in budget.points(TASKS[scale]):
            inputs = _make_inputs(folder / "inputs", tasks, b"one line\n")
            cluster.run("cp", "-r", inputs, "s4://b/in/")
            with cluster.watch_memory() as memory:
                took_s = _job(cluster, "map", "cat", 5 if tasks <= SMALL else 1)
            cluster.run("rm", "-r", "s4://b/")
            result.rows.append(
                {
                    "tasks": tasks,
                    "s": took_s,
                    "ms a task": max(0.0, took_s - one_s) * 1000 / (tasks - 1),
                    "node MB": memory.node_mb,
                    "its largest process MB": memory.process_mb,
                }
            )
    result.notes += [f"a job with one key: {one_s * 1000:.0f} ms", *budget.note()]
    result.claim_flat("a task costs the same, however many there are", "ms a task")
    result.claim_bounded(MEMORY_BOUNDED, "its largest process MB")
    return result


def run_shuffle(scale: str, folder: Path) -> Result:
    """`map-to-n` of m inputs into n files each; a file is what it costs beyond the job of one file."""
    result = Result(f"Shuffle of m inputs into n small files each, {NODES} nodes")
    budget = Budget(SHUFFLES_BUDGET_S)
    command = "split -d -a 3 -l 1 - ''; ls"
    with Cluster(folder / "cluster", NODES) as cluster:
        one_s = _alone(cluster, folder, "map-to-n", command)
        for m in budget.points(SHUFFLES[scale]):
            inputs = _make_inputs(folder / "inputs", m, b"one line\n" * m)
            cluster.run("cp", "-r", inputs, "s4://b/in/")
            repeats = 5 if m * m <= SMALL else 1
            requests, connections = cluster.requests(), accepted_connections()
            with cluster.watch_memory() as memory:
                took_s = _job(cluster, "map-to-n", command, repeats)
            requests = cluster.requests() - requests
            connections = accepted_connections() - connections
            cluster.run("rm", "-r", "s4://b/")
            result.rows.append(
                {
                    "files": m * m,
                    "m = n": m,
                    "s": took_s,
                    "ms a file": max(0.0, took_s - one_s) * 1000 / (m * m - 1),
                    "requests": requests / repeats,
                    "connections": connections / repeats,
                    "node MB": memory.node_mb,
                    "its largest process MB": memory.process_mb,
                }
            )
    result.notes += [f"a job with one file: {one_s * 1000:.0f} ms", *budget.note()]
    result.claim_flat("a file costs the same or less, however many there are", "ms a file")
    last = result.rows[-1]
    result.claim(
        "requests and connections follow nodes and batches, not files: at last fewer than one for ten files",
        max(last["requests"], last["connections"]) < last["files"] / 10,
        ", ".join(f"{last[name]:,.0f} {name}" for name in ("files", "requests", "connections")),
    )
    result.claim_bounded(MEMORY_BOUNDED, "its largest process MB")
    return result


def _alone(cluster: Cluster, folder: Path, kind: str, command: str) -> float:
    """Seconds of a job with a single tiny key: the start of the command, and the same for all points."""
    cluster.run("cp", "-r", _make_inputs(folder / "inputs", 1, b"one line\n"), "s4://b/in/")
    took_s = _job(cluster, kind, command, 5)
    cluster.run("rm", "-r", "s4://b/")
    return took_s


def _job(cluster: Cluster, kind: str, command: str, repeats: int) -> float:
    """Median seconds of `s4 map` or `s4 map-to-n`, each time into a fresh folder."""
    outdirs = (f"s4://b/out-{i}/" for i in range(repeats))
    return median_seconds(repeats, lambda: cluster.run(kind, "s4://b/in/", next(outdirs), command))


def _make_inputs(folder: Path, count: int, data: bytes) -> Path:
    """So many files, numbered, in place of those that were there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:06d}").write_bytes(data)
    return folder
