"""Text for people: one clean line, sizes, durations, tables; and a line on stderr."""

import sys
from collections.abc import Iterable, Sequence

STDERR_SHOWN = 2000  # characters of what a failed command said, in messages and summaries
_UNITS = ("kB", "MB", "GB", "TB", "PB")
# A unit of time in seconds, its name, and what would be shown as a whole one of the next.
_SPANS = ((1.0, "s", 59.95), (60.0, "min", 59.95), (3600.0, "h", 23.95), (86400.0, "d", float("inf")))


def without_controls(text: str, kept: str = "") -> str:
    """A text whose control characters, which could change what a terminal shows, are escapes, but those
    `kept`; of bytes that are no UTF-8 too."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    """One line without control characters, its blanks made one each."""
    return without_controls(" ".join(text.replace("\0", "").split()))


def say(line: str) -> None:
    """A line on stderr. One that cannot be written is lost, and decides nothing: the exit code tells."""
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        pass


def as_typed(text: str) -> str:
    """A text as it is, in as many lines and with its blanks, without control characters but tabs."""
    return without_controls(text, kept="\n\t")


def one_line(text: str, most: int) -> str:
    """The end of a text of several lines as one, joined by " | "; empty if there is nothing."""
    lines = [line for line in map(printable, text[-4 * most :].splitlines()) if line]
    return " | ".join(lines)[-most:]


def with_said(problem: str, stderr: str) -> str:
    """What went wrong with a command, and the end of what it wrote to stderr."""
    said = one_line(stderr, STDERR_SHOWN)
    return f"{problem}: {said}" if said else problem


def shortened(text: str, width: int) -> str:
    """A text that fits into so many columns, with an ellipsis if something is missing."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def size(count: float) -> str:
    """A number of bytes: 0 B, 999 B, 1.2 MB."""
    if count < 999.5:
        return f"{count:.0f} B"
    power = 1
    while count / 1000**power >= 999.95 and power < len(_UNITS):
        power += 1
    return f"{count / 1000**power:.1f} {_UNITS[power - 1]}"


def duration(seconds: float) -> str:
    """A span of time as precise as it is short: 0.012 s, 12.3 s, 3.5 min, 2.1 h, 4.0 d."""
    if seconds < 0.9995:
        return f"{seconds:.3f} s"
    length, unit = next((length, unit) for length, unit, end in _SPANS if seconds / length < end)
    return f"{seconds / length:.1f} {unit}"


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = (), gap: str = "  ") -> list[str]:
    """Rows as lines with aligned columns, those in `right` to the right; nothing pads the last column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_the_right = set(right)
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in to_the_right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(gap.join(cells).rstrip())
    return lines


def pairs(values: Iterable[tuple[str, str]]) -> list[str]:
    """Lines `name: value`, the values aligned, also the further lines of one."""
    named = [(f"{name}:", value) for name, value in values]
    indent = "\n" + " " * (max(len(name) for name, _value in named) + 1)
    return table([(name, value.replace("\n", indent)) for name, value in named], gap=" ")
