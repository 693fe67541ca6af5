"""The command line: runs series, prints a table for each, keeps the numbers, draws the picture."""

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import series_clients, series_jobs, series_keys, series_nodes, series_sizes
from benchmarks.cluster import BenchmarkError
from benchmarks.results import Result, load, save, table, this_machine
from s4 import S4Error

HERE = Path(__file__).parent
TRIES = HERE.parent / ".cache" / "bench"  # not for the repository

SERIES: dict[str, Callable[[str, Path], Result]] = {
    "keys": series_keys.run,
    "tasks": series_jobs.run_tasks,
    "shuffle": series_jobs.run_shuffle,
    "sizes": series_sizes.run,
    "clients": series_clients.run,
    "nodes": series_nodes.run,
}


def main() -> int:
    """The command; its exit code: 1 if a series could not be measured, not if a claim does not hold."""
    arguments = _parse()
    scale = "tiny" if arguments.tiny else "quick" if arguments.quick else "full"
    out: Path = arguments.out or (HERE if scale == "full" else TRIES)
    numbers = out / "results.json"
    results = load(numbers)
    # A SIGTERM ends us like Ctrl-C does: through the contexts that stop the nodes and remove their data.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = False
    for name in arguments.series or SERIES:
        try:
            results[name] = result = _run(name, scale, arguments.dir)
        except (BenchmarkError, S4Error, OSError) as e:
            print(f"fatal: {name}: {e}", file=sys.stderr)
            failed = True
            continue
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        print(table(result), end="\n\n", flush=True)
        save(numbers, results, list(SERIES))
    print(f"numbers: {numbers}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: pip install -e '.[bench]' brings matplotlib", file=sys.stderr)
    elif results.keys() == SERIES.keys():
        from benchmarks.picture import draw

        draw(results, out / "growth.svg")
        print(f"picture: {out / 'growth.svg'}")
    return int(failed)


def _run(name: str, scale: str, parent: str | None) -> Result:
    with tempfile.TemporaryDirectory(prefix="s4-bench-", dir=parent) as folder:
        began = time.monotonic()
        result = SERIES[name](scale, Path(folder))
    os.sync()  # the next series does not pay for what this one left to be written
    result.seconds = round(time.monotonic() - began, 1)
    result.scale = scale
    result.machine = this_machine()
    return result


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="How s4 grows, measured on this machine.")
    parser.add_argument("series", nargs="*", metavar="SERIES", help=", ".join(SERIES))
    parser.add_argument("--quick", action="store_true", help="smaller numbers, a few minutes")
    parser.add_argument("--tiny", action="store_true", help="whether it works at all, some seconds")
    parser.add_argument("--out", type=Path, help="folder for results.json and growth.svg")
    parser.add_argument(
        "--dir", help="folder for the nodes' data, 15 GB for all series; by default in TMPDIR"
    )
    arguments = parser.parse_args()
    for name in arguments.series:
        if name not in SERIES:
            parser.error(f"there is no series {name!r}, but {', '.join(SERIES)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
