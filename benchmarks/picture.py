"""The picture: a panel for each series."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.results import Result

COLOURS = ("#1f5fa8", "#d1602a", "#2f8a57", "#7b4fa3")
GREY = "#555555"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "figure.constrained_layout.w_pad": 0.12,  # inches
    "figure.constrained_layout.h_pad": 0.1,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "path",  # the same everywhere, whatever fonts there are
    "svg.hashsalt": "s4",  # the same numbers give the same file
}


def draw(results: dict[str, Result], path: Path) -> None:
    """Draw all series into a file; its ending chooses the format."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        (keys, tasks, shuffle), (sizes, clients, nodes) = figure.subplots(2, 3)
        _keys(keys, results["keys"])
        _per_piece(tasks, results["tasks"], "tasks", "ms a task", "node MB", "MB a node")
        tasks.set_title("map over tiny keys")
        _per_piece(shuffle, results["shuffle"], "files", "ms a file", "connections", "connections")
        shuffle.set_title("shuffle: m inputs, n files of each")
        _sizes(sizes, results["sizes"])
        _clients(clients, results["clients"])
        _nodes(nodes, results["nodes"])
        machines = sorted({result.machine for result in results.values()})
        figure.supxlabel("; ".join(machines), fontsize=8, color=GREY)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _keys(axes: Axes, result: Result) -> None:
    axes.set_title("keys in the index of one node")
    keys = result.column("keys")
    _line(axes, keys, result.column("listed/s"), "keys listed", 0)
    _line(axes, keys, result.column("removed/s"), "keys removed", 1)
    _line(axes, keys, result.column("put/s"), "keys put", 2)
    _line(axes, keys, [1000 / ms for ms in result.column("folder ms")], "folders of 1,000 listed", 3)
    _log_x(axes, keys, "keys")
    _log_y(axes, "per second")


def _per_piece(axes: Axes, result: Result, pieces: str, cost: str, note: str, unit: str) -> None:
    """What a piece of work costs, from zero, with another number at each point."""
    xs, ys, notes = result.column(pieces), result.column(cost), result.column(note)
    _line(axes, xs, ys, "", 0)
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        last = i == len(xs) - 1
        axes.annotate(
            f"{notes[i]:,.0f} {unit}" if i == 0 else f"{notes[i]:,.0f}",
            (x, y),
            xytext=(4 if last else 0, 8),
            textcoords="offset points",
            ha="left" if i == 0 else "right" if last else "center",
            fontsize=8,
            color=GREY,
        )
    _log_x(axes, xs, pieces)
    axes.set_ylim(0, 1.5 * max(ys))
    axes.set_ylabel(cost)


def _sizes(axes: Axes, result: Result) -> None:
    axes.set_title("one file, with the start of the command")
    sizes = result.column("bytes")
    for i, side in enumerate(("put", "get")):
        peak = max(result.column(f"{side} client MB"))
        _line(axes, sizes, result.column(f"{side} MB/s"), f"{side}: client at most {peak:.0f} MB", i)
    _line(axes, [], [], f"node at most {max(result.column('node MB')):.0f} MB", None)
    _log_x(axes, sizes, "file size")
    axes.set_xticks([tick for tick in (1e3, 1e6, 1e9) if tick <= max(sizes)])
    axes.xaxis.set_minor_locator(LogLocator(subs=(1.0,), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _at: _short(size, ("B", "KB", "MB", "GB"))))
    _log_y(axes, "MB/s")


def _clients(axes: Axes, result: Result) -> None:
    axes.set_title(f"clients at once, {sum(result.column('failed')):.0f} failures")
    clients = result.column("clients")
    for i, (kind, label) in enumerate((("put", "puts of 10 KB"), ("get", "gets of 10 MB"))):
        slowest_s = max(result.column(f"slowest {kind} ms")) / 1000
        _line(axes, clients, result.column(f"{kind}/s"), f"{label}, slowest {slowest_s:.2g} s", i)
    _log_x(axes, clients, "clients", each=True)
    _log_y(axes, "per second")


def _nodes(axes: Axes, result: Result) -> None:
    axes.set_title("nodes, all on one machine")
    nodes = result.column("nodes")
    _line(axes, nodes, result.column("map ms"), "map of 16 keys", 2)
    _line(axes, nodes, result.column("ls ms"), "ls of a folder", 1)
    _line(axes, nodes, result.column("health ms"), "health", 0)
    _line(axes, nodes, result.column("servers ms"), "start of the command", None)
    _log_x(axes, nodes, "nodes", each=True)
    axes.set_ylim(0, 1.45 * max(result.column("map ms")))
    axes.set_ylabel("ms a command")
    axes.legend(loc="upper left")


def _line(axes: Axes, xs: Sequence[float], ys: Sequence[float], label: str, colour: int | None) -> None:
    shade = GREY if colour is None else COLOURS[colour]
    style = "" if not xs else "--" if colour is None else "-"
    marker = "o" if xs and colour is not None else ""
    axes.plot(xs, ys, linestyle=style, marker=marker, markersize=4, linewidth=1.6, color=shade, label=label)


def _log_x(axes: Axes, xs: Sequence[float], label: str, each: bool = False) -> None:
    """A logarithmic axis with a tick at powers of ten or, with `each`, at each point."""
    axes.set_xscale("log")
    if each:
        axes.set_xticks(xs)
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _at: _short(value, ("", "k", "M", "G"))))
    axes.set_xlabel(label)


def _log_y(axes: Axes, label: str) -> None:
    """A logarithmic axis with room for the legend above the lines."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    lines = len(axes.get_legend_handles_labels()[0])
    share = 0.05 + 0.085 * lines  # of the height
    axes.set_ylim(low, high * (high / low) ** (share / (1 - share)))
    # Powers of ten alone leave an axis of little range without numbers.
    steps = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _at: _short(value, ("", "k", "M", "G"))))
    axes.set_ylabel(label)
    axes.legend(loc="upper left")


def _short(value: float, units: tuple[str, ...]) -> str:
    """A number with a unit of thousands: 10000 is 10k."""
    power = 0
    while value >= 1000 and power < len(units) - 1:
        value /= 1000
        power += 1
    space = " " if len(units[0]) else ""
    return f"{value:.3g}{space}{units[power]}"
