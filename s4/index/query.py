"""SQL of users over the index: read-only whatever it says, and limited in time and rows."""

import contextlib
import functools
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import quote

from s4.errors import BadRequestError
from s4.index.database import explained

QUERY_SECONDS = 5.0
# Of one text or blob, or of the query; what is recorded is shorter. A function such as instr() cannot be
# interrupted, and takes as long again as QUERY_SECONDS for the worst that fits.
MAX_VALUE_BYTES = 1_000_000
MAX_PATTERN_BYTES = 1000  # of LIKE and GLOB, for the same reason
MAX_COLUMNS = 100  # for the same reason: a row is not interrupted between them
_AGAIN_SECONDS = 0.1  # after which a query that was interrupted too soon, before it began, is so again

_ALLOWED = frozenset(
    (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
)


def run_query(path: str, sql: str, limit: int) -> Iterator[Sequence[Any]]:
    """The names of the columns, then each row, of one SELECT over the database file `path`.

    Raises BadRequestError, also between rows: for SQL that SQLite does not take or that would change
    something, after QUERY_SECONDS, and when there are more than `limit` rows.
    """
    deadline = time.monotonic() + QUERY_SECONDS
    connection = None
    try:
        connection = sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True, timeout=QUERY_SECONDS)
        connection.execute("PRAGMA query_only = 1")
        connection.execute("PRAGMA trusted_schema = 0")
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MAX_COLUMNS)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, MAX_PATTERN_BYTES)
        for name, strip in _TRIMS.items():
            for arguments in (1, 2):
                connection.create_function(name, arguments, functools.partial(_trimmed, strip))
        connection.set_authorizer(_authorize)
        with contextlib.closing(sqlite3.connect(":memory:")) as plain, _interrupted_at(deadline, connection):
            for name in ("printf", "format"):
                connection.create_function(name, -1, functools.partial(_printf, plain))
            cursor = connection.execute(sql)
            if cursor.description is None:
                raise BadRequestError("the query is empty: write one SELECT")
            yield [column[0] for column in cursor.description]
            for count, row in enumerate(cursor):
                if count == limit:
                    raise BadRequestError(f"more than {limit} rows: narrow the query, or raise --limit")
                yield row
    except sqlite3.OperationalError as e:
        if time.monotonic() > deadline:
            raise BadRequestError(f"the query took longer than {QUERY_SECONDS:g} seconds") from e
        if getattr(e, "sqlite_errorname", "").startswith("SQLITE_CANTOPEN"):
            raise explained(path, e) from e
        raise BadRequestError(_refusal(e)) from e
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as e:
        raise BadRequestError(_refusal(e)) from e
    finally:
        if connection is not None:
            connection.close()


@contextlib.contextmanager
def _interrupted_at(deadline: float, connection: sqlite3.Connection) -> Iterator[None]:
    """Have queries fail that run beyond `deadline` (monotonic). SQLite itself would let us look at a clock
    only after so many steps of its machine, and a step may take a second."""
    over = threading.Event()

    def watch() -> None:
        pause = deadline - time.monotonic()
        while not over.wait(pause):
            connection.interrupt()
            pause = _AGAIN_SECONDS

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


_WIDE = re.compile(r"%[^%a-zA-Z]*(\*|[0-9]{6})")  # a width or precision of a conversion

# In the place of SQLite's own, which take minutes for a long second argument.
_TRIMS = {"trim": str.strip, "ltrim": str.lstrip, "rtrim": str.rstrip}


def _trimmed(strip: Callable[[str, str], str], value: Any, characters: Any = " ") -> str | None:
    if value is None or characters is None:
        return None
    return strip(_text(value), "".join(set(_text(characters))))


def _printf(plain: sqlite3.Connection, *arguments: Any) -> Any:
    """What SQLite's own prints, which works for seconds at a width of a billion before it says "too big"."""
    if arguments and _WIDE.search(_text(arguments[0]).replace("%%", "")):
        raise ValueError  # which SQLite tells as that of "a user-defined function"
    places = ", ".join("?" * len(arguments))
    [value] = plain.execute(f"SELECT printf({places})", arguments).fetchone()
    return value


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _refusal(error: Exception) -> str:
    if "authoriz" in str(error):
        return "SQL: only reading is allowed"
    if "user-defined function" in str(error):
        return "SQL: printf() and format() take a width and a precision of up to five digits, and no '*'"
    hint = "; s4 sql --schema says what there is" if str(error).startswith("no such") else ""
    return f"SQL: {error}{hint}"


def _authorize(action: int, *_details: object) -> int:
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY
