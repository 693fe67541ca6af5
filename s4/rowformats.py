"""Rows of a query as text: a table, CSV, tab-separated or JSON."""

from collections.abc import Callable, Iterator, Mapping

from s4.jobtables import escaped
from s4.leanjson import is_infinite
from s4.queries import Result, Value
from s4.text import table, without_controls


def _as_table(result: Result) -> Iterator[str]:
    """Columns aligned and divided by '|', numbers to the right; what would break a line is escaped."""
    texts = [[_in_table(_text(value)) for value in row] for row in result.rows]
    numbers = [
        i
        for i in range(len(result.columns))
        if result.rows and all(isinstance(row[i], int | float | None) for row in result.rows)
    ]
    lines = table([[_in_table(name) for name in result.columns], *texts], numbers, gap=" | ")
    widths = [max(map(len, column)) for column in zip(map(_in_table, result.columns), *texts, strict=True)]
    yield lines[0]
    yield "-+-".join("-" * width for width in widths)
    yield from lines[1:]


def _in_table(text: str) -> str:
    return without_controls(text.replace("\\", "\\\\").replace("|", "\\|"))


def _as_csv(result: Result) -> Iterator[str]:
    import csv
    import io

    buffer = io.StringIO()
    # Before Python 3.13 it quotes of the characters that end a line only those that it ends lines with.
    writer = csv.writer(buffer, lineterminator="\r\n")
    for row in [result.columns, *result.rows]:
        writer.writerow([_text(value) for value in row])
        yield buffer.getvalue().removesuffix("\r\n")
        buffer.seek(0)
        buffer.truncate()


def _as_tsv(result: Result) -> Iterator[str]:
    for row in [result.columns, *result.rows]:
        yield "\t".join(escaped(_text(value)) for value in row)


def _as_json(result: Result) -> Iterator[str]:
    """A list of objects, one a line. Of columns with the same name the later ones get a number."""
    import json

    names: list[str] = []
    for column in result.columns:
        name, same = column, 1
        while name in names:
            same += 1
            name = f"{column}_{same}"
        names.append(name)
    if not result.rows:
        yield "[]"
        return
    yield "["
    for i, row in enumerate(result.rows):
        values = [_text(value) if isinstance(value, bytes) or is_infinite(value) else value for value in row]
        yield json.dumps(dict(zip(names, values, strict=True))) + ("," if i + 1 < len(result.rows) else "")
    yield "]"


def _text(value: Value) -> str:
    if value is None:
        return ""
    return f"x'{value.hex()}'" if isinstance(value, bytes) else str(value)


FORMATS: Mapping[str, Callable[[Result], Iterator[str]]] = {
    "table": _as_table,
    "csv": _as_csv,
    "tsv": _as_tsv,
    "json": _as_json,
}
