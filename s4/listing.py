"""Listings as the client reads them: the nodes' sorted streams, merged as they come, in bounded memory."""

from collections.abc import Iterator
from operator import attrgetter

from s4.errors import NonsenseError
from s4.http import Caller, Response
from s4.leanjson import read_answer
from s4.results import Entry

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from typing import Any

_READ_BYTES = 256 * 1024

_PATH = attrgetter("path")


def rows(caller: Caller, response: Response) -> Iterator[list[Entry]]:
    """The rows of one node, in chunks, after which `caller` is closed. Raises NodeError if the answer is
    broken or no listing."""
    with caller:
        for found in json_rows(caller, response):
            try:
                yield [Entry(date, time, size, path) for date, time, size, path in found]
            except (ValueError, TypeError):
                raise NonsenseError(caller.server) from None


def json_rows(caller: Caller, response: Response) -> "Iterator[list[Any]]":
    """The values of a JSON list that has each in a line of its own, in chunks. Raises NodeError."""
    with caller.reading():
        opening, tail = response.read(1), b""
    if opening != b"[":
        raise NonsenseError(caller.server)
    while True:
        with caller.reading():
            block = response.read(_READ_BYTES)
        if not block:
            break
        whole, _newline, tail = (tail + block).rpartition(b"\n")
        if whole:
            yield _parse(caller, whole)
    if not tail.endswith(b"]"):
        raise NonsenseError(caller.server)
    yield _parse(caller, tail[:-1])


def _parse(caller: Caller, lines: bytes) -> "list[Any]":
    # A row a line: whole lines are a JSON list but for the brackets and a comma at the end.
    return read_answer(caller.server, b"[" + lines.strip(b",\n") + b"]", list)


def merge(streams: list[Iterator[list[Entry]]]) -> Iterator[list[Entry]]:
    """One sorted stream of chunks from several sorted ones.

    Whole chunks are sorted together up to the smallest path that ends a chunk: below it nothing can come any
    more. Much faster than row by row.
    """
    buffers: list[list[Entry]] = [[] for _ in streams]
    while True:
        for i, stream in enumerate(streams):
            while not buffers[i]:
                chunk = next(stream, None)
                if chunk is None:
                    break
                buffers[i] = chunk
        filled = [buffer for buffer in buffers if buffer]
        if not filled:
            return
        bound = min(buffer[-1].path for buffer in filled)
        ready: list[Entry] = []
        for i, buffer in enumerate(buffers):
            if buffer:
                cut = _past(buffer, bound)
                ready += buffer[:cut]
                buffers[i] = buffer[cut:]
        ready.sort(key=_PATH)
        yield ready


def _past(chunk: list[Entry], bound: str) -> int:
    from bisect import bisect_right

    return bisect_right(chunk, bound, key=_PATH)


def without_repeats(chunks: Iterator[list[Entry]]) -> Iterator[Entry]:
    """Each folder once, though several nodes list it."""
    last = None
    for chunk in chunks:
        for entry in chunk:
            if entry.size != "PRE" or entry.path != last:
                yield entry
            last = entry.path if entry.size == "PRE" else None
