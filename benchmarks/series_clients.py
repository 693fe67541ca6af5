"""Clients at once, 1 to 64: puts of 10 KB, then gets of 10 MB, as fast as each can."""

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import s4
from benchmarks.cluster import BenchmarkError, Cluster
from benchmarks.measure import Budget
from benchmarks.results import Result

NODES = 3
PUT_BYTES, GET_BYTES = 10_000, 10_000_000
GET_KEYS = 12
# Scale: the points, and for how many seconds the clients keep at it.
POINTS = {
    "full": ([1, 2, 4, 8, 16, 32, 64], 5.0),
    "quick": ([1, 4, 16, 64], 2.0),
    "tiny": ([1, 3], 0.2),
}
BUDGET_S = 240
KEPT = 0.7  # of the best throughput, with the most clients
SLOWEST_S = 10.0  # a stalled transfer is dropped after five seconds; then there is time for another try
LONGEST_ANSWER_S = 120.0

Move = Callable[[s4.Client, str], None]  # gets a name that is not used elsewhere


class Load(NamedTuple):
    """What some clients achieved together."""

    per_second: float
    median_s: float
    slowest_s: float
    failures: list[str]


def run(scale: str, folder: Path) -> Result:
    """The series."""
    points, seconds = POINTS[scale]
    result = Result(f"Clients at once, {NODES} nodes")
    budget = Budget(BUDGET_S)
    failures: list[str] = []
    small, large = folder / "small", folder / "large"
    small.parent.mkdir(parents=True, exist_ok=True)
    small.write_bytes(os.urandom(PUT_BYTES))
    large.write_bytes(os.urandom(GET_BYTES))

    def put(client: s4.Client, name: str) -> None:
        client.cp(str(small), f"s4://b/puts/{name}")

    def get(client: s4.Client, name: str) -> None:
        client.cp(f"s4://b/gets/{int(name.partition('_')[0]) % GET_KEYS:03d}", "/dev/null")

    with Cluster(folder / "cluster", NODES) as cluster:
        for i in range(GET_KEYS):
            cluster.run("cp", large, f"s4://b/gets/{i:03d}")
        for clients in budget.points(points):
            puts = _load(cluster, clients, seconds, put)
            cluster.run("rm", "-r", "s4://b/puts/")
            gets = _load(cluster, clients, seconds, get)
            failures += puts.failures + gets.failures
            result.rows.append(
                {
                    "clients": clients,
                    "put/s": puts.per_second,
                    "put ms": puts.median_s * 1000,
                    "slowest put ms": puts.slowest_s * 1000,
                    "get/s": gets.per_second,
                    "get MB/s": gets.per_second * GET_BYTES / 1e6,
                    "get ms": gets.median_s * 1000,
                    "slowest get ms": gets.slowest_s * 1000,
                    "failed": len(puts.failures) + len(gets.failures),
                }
            )
    result.notes += budget.note()
    for name in ("put/s", "get/s"):
        result.claim_kept(f"{name}: a plateau that stays", name, KEPT)
    slowest_ms = max(result.column("slowest put ms") + result.column("slowest get ms"))
    result.claim(
        f"the slowest answer is bounded: {SLOWEST_S:g} s",
        slowest_ms <= SLOWEST_S * 1000,
        f"{slowest_ms:,.0f} ms",
    )
    result.claim("nothing fails", not failures, failures[0] if failures else "0 failures")
    return result


def _load(cluster: Cluster, clients: int, seconds: float, move: Move) -> Load:
    """Let so many clients, a process each, do the same thing over and over for some seconds."""
    # Forked, so that a client has imported everything when the clock starts.
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(clients)
    conf = str(cluster.conf)
    pipes, processes = [], []
    try:
        for number in range(clients):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (conf, number, seconds, move, barrier, theirs)
            process = context.Process(target=_client, args=arguments, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        within, answers, failures = 0, [], []
        for ours in pipes:
            if not ours.poll(seconds + LONGEST_ANSWER_S):
                raise BenchmarkError("a client does not end")
            done, took, failed = ours.recv()
            within += done
            answers += took
            failures += failed
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return Load(
        within / seconds,
        statistics.median(answers) if answers else 0.0,
        max(answers, default=0.0),
        failures,
    )


def _client(conf: str, number: int, seconds: float, move: Move, barrier: Any, answer: Connection) -> None:
    """One client. Answers how many it got done in time, how long each took, and what failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started us, who ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    client = s4.Client(conf)
    within, took, failures = 0, [], []
    barrier.wait()
    deadline = time.monotonic() + seconds
    turn = number
    while (began := time.monotonic()) < deadline:
        try:
            # Numbers in front go round the nodes evenly.
            move(client, f"{turn}_{number}")
        except s4.S4Error as e:
            failures.append(str(e))
        ended = time.monotonic()
        took.append(ended - began)
        within += ended <= deadline
        turn += 1
    answer.send((within, took, failures))
