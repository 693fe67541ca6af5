"""Nodes, 1 to 16 on this machine: what asking all of them costs the client.

The work stays the same, so that what grows is the fan-out alone. All share the cores of one machine: with
machines of their own, the nodes' part would not grow.
"""

from pathlib import Path

from benchmarks.cluster import Cluster
from benchmarks.measure import Budget, median_seconds
from benchmarks.results import Result

# Scale: the points, and how often a command is repeated.
POINTS = {"full": ([1, 2, 4, 8, 16], 15), "quick": ([1, 2, 4, 8], 7), "tiny": ([1, 2], 1)}
BUDGET_S = 150
KEYS = 16
DEARER = 3.0


def run(scale: str, folder: Path) -> Result:
    """The series."""
    points, repeats = POINTS[scale]
    result = Result("Nodes on one machine")
    budget = Budget(BUDGET_S)
    inputs = folder / "inputs"
    inputs.mkdir(parents=True)
    for i in range(KEYS):
        (inputs / f"{i:03d}").write_bytes(b"one line\n")
    for nodes in budget.points(points):
        with Cluster(folder / f"{nodes}-nodes", nodes) as cluster:
            cluster.run("cp", "-r", inputs, "s4://b/in/")

            def timed_ms(*commands: str, cluster: Cluster = cluster) -> float:
                return 1000 * median_seconds(repeats, lambda: cluster.run(*commands))

            def map_ms(cluster: Cluster = cluster) -> float:
                outdirs = (f"s4://b/out-{i}/" for i in range(repeats))
                return 1000 * median_seconds(
                    repeats, lambda: cluster.run("map", "s4://b/in/", next(outdirs), "cat")
                )

            with cluster.watch_memory() as memory:
                result.rows.append(
                    {
                        "nodes": nodes,
                        "servers ms": timed_ms("servers"),
                        "health ms": timed_ms("health"),
                        "ls ms": timed_ms("ls", "s4://b/in/"),
                        "map ms": map_ms(),
                    }
                )
            result.rows[-1] |= {"node MB": memory.node_mb, "start s": cluster.start_seconds}
    result.notes += [
        f"servers asks no node: the start of a command; map runs {KEYS} commands",
        *budget.note(),
    ]
    for name in ("health ms", "ls ms", "map ms"):
        first, last = result.rows[0], result.rows[-1]
        added = (last[name] - first[name]) / (last["nodes"] - first["nodes"])
        result.claim(
            f"{name.removesuffix(' ms')}: all nodes cost less than {DEARER:g} times one node",
            last[name] < DEARER * first[name],
            f"{first[name]:.0f} → {last[name]:.0f} ms, {added:.1f} ms a further node",
        )
    result.claim_flat("the memory of a node stays flat", "node MB")
    return result
