"""What a series found: rows of numbers, claims computed from them, and how both are shown and kept."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Flat is what stays within this factor. Two shared cores and a virtual disk vary by a third by themselves.
FLAT = 1.5

Row = dict[str, float]


@dataclass(frozen=True)
class Claim:
    """Something that is said about how s4 grows, and whether the numbers of this run bear it out."""

    text: str
    holds: bool
    numbers: str


@dataclass
class Result:
    """One series. The first column of `rows` is what grows."""

    title: str
    rows: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scale: str = ""
    seconds: float = 0.0
    machine: str = ""

    def column(self, name: str) -> list[float]:
        """The numbers of one column."""
        return [row[name] for row in self.rows]

    def claim(self, text: str, holds: bool, numbers: str) -> None:
        """Add a claim; `numbers` are those that decided it."""
        self.claims.append(Claim(text, holds, numbers))

    def claim_flat(self, text: str, name: str) -> None:
        """Claim that the last number of a column is at most FLAT times the first."""
        first, last = self.column(name)[0], self.column(name)[-1]
        self.claim(text, last <= FLAT * first, f"{name}: {shown(first)} → {shown(last)}")

    def claim_bounded(self, text: str, name: str) -> None:
        """Claim that a column levels off: its last number is at most FLAT times the one before."""
        *_earlier, before, last = [0.0, *self.column(name)]
        numbers = " → ".join(map(shown, self.column(name)))
        self.claim(text, last <= FLAT * (before or last), f"{name}: {numbers}")

    def claim_kept(self, text: str, name: str, share: float) -> None:
        """Claim that the last number of a column is at least `share` of the largest."""
        best, last = max(self.column(name)), self.column(name)[-1]
        self.claim(text, last >= share * best, f"{name}: best {shown(best)}, last {shown(last)}")


def shown(number: float) -> str:
    """A number as a table has it: three digits that count, thousands apart."""
    if number == int(number) or abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def table(result: Result) -> str:
    """A result for a terminal: title, aligned columns, claims."""
    lines = [f"{result.title}  ({result.seconds:.0f} s)"]
    if result.rows:
        names = list(result.rows[0])
        cells = [names, *([shown(row[name]) for name in names] for row in result.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["  " + "  ".join(map(str.rjust, line, widths)) for line in cells]
    lines += [f"  note: {note}" for note in result.notes]
    lines += [f"  {'yes' if c.holds else 'NO '}  {c.text}  [{c.numbers}]" for c in result.claims]
    return "\n".join(lines)


def load(path: Path) -> dict[str, Result]:
    """The results that a file holds, by name of series; none if there is no file."""
    if not path.exists():
        return {}
    found = {}
    for name, kept in json.loads(path.read_text()).items():
        claims = [Claim(**claim) for claim in kept.pop("claims")]
        found[name] = Result(**kept, claims=claims)
    return found


def save(path: Path, results: dict[str, Result], order: Sequence[str]) -> None:
    """Write results in the order of the series; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: asdict(results[name]) for name in order if name in results}
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    temporary.rename(path)


def this_machine() -> str:
    """What the numbers were taken on, in a few words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    linux = ".".join(platform.release().split(".")[:2])  # the rest names a build
    return f"{cores} cores, {memory:.0f} GiB, Linux {linux}, Python {platform.python_version()}"
