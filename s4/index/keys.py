"""The table of keys: add, remove, look up and list.

Contract: paths in, rows out; the order is that of code points. A row is what makes a key exist. Listings
read in chunks and hold no transaction in between, so a key that comes or goes during a long listing may or
may not be in it, and every other key is in it once.
"""

import contextlib
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from s4.errors import BusyError, ConflictError, FullDiskError, MissingError, S4Error
from s4.index.database import Database, Transaction
from s4.keys import DIFFERENT_NAMES, REMOVE_FIRST, range_end, url

CHUNK = 2000  # rows of a listing a transaction
REMOVE_CHUNK = 200  # keys removed a transaction; bounds how long other writers wait
# Of a JSON list of paths, in one statement whatever its size: those that are keys, those that are none, and
# those that are folders, with a key in each.
_FOUND = """
    SELECT keys.path, size, checksum, created_s, job, task
    FROM json_each(?) CROSS JOIN keys ON keys.path = value
"""
_GONE = """
    SELECT value FROM json_each(?) WHERE NOT EXISTS (SELECT 1 FROM keys WHERE path = value)
"""
_KEYS_IN_THEM = """
    SELECT value, (SELECT path FROM keys WHERE path >= value || '/' AND path < value || '0' LIMIT 1) AS inside
    FROM json_each(?) WHERE inside IS NOT NULL
"""
UNKNOWN_JOB = ""  # the job of keys that a reindex found: whether one made them, and which, is not known
_LAST = b""  # above every path: to SQLite any blob is larger than any text

log = logging.getLogger("s4.index")


class KeyRow(NamedTuple):
    """A key in the index: `size` in bytes, `checksum` xxh64 in hex, `created_s` seconds since 1970; the job
    and the number of the task that made it, None for a put; see UNKNOWN_JOB."""

    path: str
    size: int
    checksum: str
    created_s: int
    job: str | None = None
    task: int | None = None


class NewKey(NamedTuple):
    """A key to be created; fields as those of KeyRow."""

    path: str
    size: int
    checksum: str
    job: str | None = None
    task: int | None = None


class ListRow(NamedTuple):
    """A line of a listing: a key, or a folder when `size` is None (its path ends in `/` then)."""

    path: str
    size: int | None
    created_s: int


class Maker(NamedTuple):
    """Who made keys in OUTDIR/`folder`/: a task of a job, None for what was not made by a job."""

    folder: str
    job: str | None
    task: int | None


class KeyIndex:
    """The keys of this node. `unlink(paths)` removes the files of keys; it runs after the commit that removes
    their rows, but not for a path that has a row again."""

    def __init__(self, database: Database, unlink: Callable[[Sequence[str]], None]) -> None:
        self._db = database
        self._unlink = unlink
        self._unfinished: dict[int, Sequence[str]] = {}  # by removal: paths of which files are still there

    def get(self, path: str) -> KeyRow:
        """The row of a key. Raises MissingError."""
        [found] = self.get_all([path])
        if found is None:
            raise MissingError(f"no such key: {url(path)}")
        return found

    def get_all(self, paths: Sequence[str]) -> list[KeyRow | None]:
        """The rows of many keys, None for a missing one."""
        with self._db.read() as db:
            found = {row[0]: KeyRow._make(row) for row in db.execute(_FOUND, (json.dumps(paths),))}
        return [found.get(path) for path in paths]

    def missing(self, paths: Sequence[str]) -> list[str]:
        """Those of many paths that are no keys."""
        with self._db.read() as db:
            return [path for (path,) in db.execute(_GONE, (json.dumps(paths),))]

    def conflicts(
        self, wanted: Sequence[tuple[str, int | None]], job: str | None = None
    ) -> list[ConflictError | None]:
        """Why keys, given as (path, number of the task of `job` that makes it), cannot be created, each by
        itself: it exists, or a key stands where it needs a folder, or it would stand where keys need a
        folder. A key that the same task of the same job made does not stand in its own way."""
        with self._db.read() as db:
            standing = _Standing(db, [path for path, _task in wanted])
        return [standing.conflict(path, job, task) for path, task in wanted]

    def add(
        self,
        rows: Sequence[NewKey],
        place: Callable[[int], None],
        also: Callable[[Transaction, list[S4Error | None]], None] = lambda _db, _outcome: None,
    ) -> list[S4Error | None]:
        """Create keys in one transaction: the commit point of s4.

        `place(i)` puts the bytes of row i where they belong; it runs after the row was inserted and before
        the commit, and may raise S4Error to refuse. A key that an earlier attempt of the same task made is
        replaced; if its bytes are the same, it is there all the while. `also(db, outcome)` writes more into
        the same transaction. Returns per row None or why it was refused; refused rows leave nothing new.
        Raises S4Error if nothing could be committed; what was placed is removed then.
        """
        now = int(time.time())
        outcome: list[S4Error | None] = []
        if self._unfinished:  # what is left of removed keys could be in the way of these
            self.finish_removals()
        self._drop_earlier(rows)
        try:
            with self._db.write() as db:
                standing = _Standing(db, [row.path for row in rows])
                for i, row in enumerate(rows):
                    if standing.alike(row):
                        refused = _refusal(place, i)
                    else:
                        refused = standing.conflict(row.path, row.job, row.task, replaces=False)
                        refused = refused or self._insert(db, row, now, place, i)
                    if refused is None:
                        standing.add(row.path)
                    outcome.append(refused)
                also(db, outcome)
        except S4Error:
            placed = [row.path for row, refused in zip(rows, outcome, strict=False) if refused is None]
            with self._db.exclusive():
                found = self.get_all(placed)
                self._unlink([path for path, row in zip(placed, found, strict=True) if row is None])
            raise
        return outcome

    def _insert(
        self, db: sqlite3.Connection, row: NewKey, now: int, place: Callable[[int], None], i: int
    ) -> S4Error | None:
        path, size, checksum, job, task = row
        db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?)", (path, size, checksum, now, job, task))
        refused = _refusal(place, i)
        if refused is not None:
            db.execute("DELETE FROM keys WHERE path = ?", (path,))
        return refused

    def _drop_earlier(self, rows: Sequence[NewKey]) -> None:
        """Remove what earlier attempts of the same tasks made, but for keys with the same bytes."""
        made = [row for row in rows if row.job is not None]
        for row, found in zip(made, self.get_all([row.path for row in made]), strict=True):
            if found is None or (found.job, found.task) != (row.job, row.task):
                continue
            if (found.size, found.checksum) != (row.size, row.checksum):
                with contextlib.suppress(MissingError):  # somebody else has removed it meanwhile
                    self.remove(row.path)

    def remove(self, path: str) -> None:
        """Remove one key. Raises MissingError."""
        if not self._remove(path, "path = ?", (path,)):
            raise MissingError(f"no such key: {url(path)}")

    def remove_prefix(self, prefix: str) -> None:
        """Remove every key that starts with `prefix`. One without '/' is a bucket, meant whole."""
        start, end = bounds(prefix)
        while self._remove(start, "path >= ? AND path < ?", (start, end)) == REMOVE_CHUNK:
            pass

    def _remove(self, prefix: str, which: str, parameters: tuple[object, ...]) -> int:
        """Remove the first REMOVE_CHUNK keys of those for which `which`, a condition in SQL, holds; how many
        there were."""
        removal, gone = self._db.making_room(lambda: self._remove_rows(prefix, which, parameters))
        if gone:
            try:
                self._remove_files(removal, gone)
            except S4Error as e:
                self._unfinished[removal] = gone
                if not isinstance(e, (BusyError, FullDiskError)):  # nothing that passes
                    raise
                log.warning("the files of removed keys stay for now: %s", e)
        return len(gone)

    def _remove_files(self, removal: int, gone: Sequence[str]) -> None:
        # A file goes only while no row stands for it: a put of the same key may have come in between.
        with self._db.write() as db:
            self._unlink([path for (path,) in db.execute(_GONE, (json.dumps(gone),))])
            db.execute("DELETE FROM removals WHERE id = ?", (removal,))

    def finish_removals(self) -> None:
        """Remove the files that could not be removed with their keys; what cannot be now stays for later."""
        # A removal stays here until its files are gone: two threads may do the same one, which is no harm,
        # but none goes on to make a key where files still are.
        for removal, gone in list(self._unfinished.items()):
            with contextlib.suppress(S4Error):
                self._remove_files(removal, gone)
                self._unfinished.pop(removal, None)

    def _remove_rows(
        self, prefix: str, which: str, parameters: tuple[object, ...]
    ) -> tuple[int, Sequence[str]]:
        """Remove the rows alone; the number of the removal, and the paths that they had."""
        removal = 0
        with self._db.write() as db:
            select = f"SELECT path FROM keys WHERE {which} ORDER BY path LIMIT ?"
            doomed = [path for (path,) in db.execute(select, (*parameters, REMOVE_CHUNK))]
            if doomed:
                removal = db.execute("INSERT INTO removals (prefix) VALUES (?)", (prefix,)).lastrowid or 0
                query = "DELETE FROM keys WHERE path IN (SELECT value FROM json_each(?))"
                db.execute(query, (json.dumps(doomed),))
        return removal, doomed

    def makers(self, folder: str) -> dict[Maker, int]:
        """All that made keys below the folders in `folder`, a path that ends in '/', and when they made the
        last of them, in seconds since 1970."""
        found: dict[Maker, int] = {}
        for rows in self._chunks("path, job, task, created_s", folder):
            for path, job, task, created_s in rows:
                name, slash, _rest = path[len(folder) :].partition("/")
                if slash:
                    maker = Maker(name, job, task)
                    found[maker] = max(created_s, found.get(maker, created_s))
        return found

    def remove_made(self, folder: str, makers: Sequence[Maker]) -> None:
        """Remove the keys that tasks made, as `makers` tells them."""
        which = "path >= ? AND path < ? AND job = ? AND task = ?"
        for name, job, task in makers:
            prefix = f"{folder}{name}/"
            parameters = (*bounds(prefix), job, task)
            with self._db.read() as db:
                found = db.execute(f"SELECT 1 FROM keys WHERE {which} LIMIT 1", parameters).fetchone()
            there = found is not None
            while there:
                there = self._remove(prefix, which, parameters) == REMOVE_CHUNK

    def list_keys(self, prefix: str) -> Iterator[list[ListRow]]:
        """Every key that starts with `prefix`, in chunks."""
        for rows in self._chunks("path, size, created_s", prefix):
            yield list(map(ListRow._make, rows))

    def _chunks(self, columns: str, prefix: str) -> Iterator[list[Any]]:
        """These columns, the first of which is the path, of every key that starts with `prefix`."""
        start, end = bounds(prefix)
        query = f"SELECT {columns} FROM keys WHERE path >= ? AND path < ? ORDER BY path LIMIT ?"
        while True:
            with self._db.read() as db:
                rows = db.execute(query, (start, end, CHUNK)).fetchall()
            yield rows
            if len(rows) < CHUNK:
                return
            start = rows[-1][0] + " "  # no path holds a space: the smallest text above this path

    def list_folder(self, prefix: str) -> Iterator[list[ListRow]]:
        """The keys and folders that stand in the folder of `prefix` and start with it, in chunks.

        A skip-scan: each step of the recursion seeks past everything below the entry before, so the cost
        follows the entries and not the keys below them.
        """
        start, end = bounds(prefix)
        folder = prefix.rfind("/") + 1
        while True:
            parameters = {"folder": folder, "first": start, "past": end, "chunk": CHUNK}
            with self._db.read() as db:
                found = db.execute(_SKIP_SCAN, parameters).fetchall()
            rows = []
            for path, size, created_s in found:
                slash = path.find("/", folder) + 1
                rows.append(ListRow(path[:slash], None, 0) if slash else ListRow(path, size, created_s))
            yield rows
            if len(rows) < CHUNK:
                return
            last = rows[-1].path
            start = last[:-1] + "0" if last.endswith("/") else last + " "  # '0' follows '/'

    def list_buckets(self) -> list[ListRow]:
        """Every bucket: its name, bytes, and when its first key was made."""
        with self._db.read() as db:
            rows = db.execute("SELECT bucket, bytes, created_s FROM buckets ORDER BY bucket").fetchall()
        return [ListRow(*row) for row in rows]

    def restore(self, rows: Sequence[KeyRow]) -> None:
        """Add or correct rows of files that are in place already: for reindex."""
        with self._db.write() as db:
            db.executemany("DELETE FROM keys WHERE path = ?", [(row.path,) for row in rows])
            db.executemany("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?)", rows)

    def forget(self, paths: Sequence[str]) -> None:
        """Drop rows whose files are gone: for reindex."""
        with self._db.write() as db:
            db.executemany("DELETE FROM keys WHERE path = ?", [(path,) for path in paths])

    def exists(self, path: str) -> bool:
        """Whether there is such a key."""
        with self._db.read() as db:
            return db.execute("SELECT 1 FROM keys WHERE path = ?", (path,)).fetchone() is not None


# One entry a step: the first key of each line of the listing. SQLite's substr counts characters, as we do.
_SKIP_SCAN = """
    WITH RECURSIVE entry(path) AS (
        SELECT (SELECT path FROM keys WHERE path >= :first AND path < :past ORDER BY path LIMIT 1)
        UNION ALL
        SELECT (SELECT keys.path FROM keys
                WHERE keys.path >= CASE instr(substr(entry.path, :folder + 1), '/')
                    WHEN 0 THEN entry.path || ' '
                    ELSE substr(entry.path, 1, :folder + instr(substr(entry.path, :folder + 1), '/') - 1)
                         || '0' END
                AND keys.path < :past ORDER BY keys.path LIMIT 1)
        FROM entry WHERE entry.path IS NOT NULL
        LIMIT :chunk
    )
    SELECT keys.path, keys.size, keys.created_s FROM entry JOIN keys ON keys.path = entry.path
"""


def bounds(prefix: str) -> tuple[str, str | bytes]:
    """The half-open range of paths that start with `prefix`. A bucket without `/` is meant whole."""
    if prefix and "/" not in prefix:
        prefix += "/"
    end = range_end(prefix)
    return prefix, _LAST if end is None else end


class _Standing:
    """What stands in the index where some keys are to be created."""

    def __init__(self, db: sqlite3.Connection, paths: Sequence[str]) -> None:
        folders = {folder for path in paths for folder in _folders_above(path)}
        rows = map(KeyRow._make, db.execute(_FOUND, (json.dumps([*paths, *folders]),)))
        self._keys: dict[str, KeyRow | None] = {row.path: row for row in rows}  # None: new in this batch
        self._in_folders: dict[str, str] = dict(db.execute(_KEYS_IN_THEM, (json.dumps(paths),)))

    def conflict(
        self, path: str, job: str | None, task: int | None, *, replaces: bool = True
    ) -> ConflictError | None:
        """See KeyIndex.conflicts; `replaces` says whether a key of the same task is out of the way."""
        if path in self._in_folders:
            return ConflictError(f"{url(path)} is a folder here: {url(self._in_folders[path])} stands in it")
        if path in self._keys:
            found = self._keys[path]
            same_job = job is not None and (found is None or found.job == job)
            same_task = same_job and found is not None and found.task == task
            if not (same_task and replaces):
                advice = REMOVE_FIRST
                if same_job and not same_task:
                    advice = f"it is of another input of this job: {DIFFERENT_NAMES}"
                return ConflictError(f"key exists already: {url(path)}; {advice}")
        for folder in _folders_above(path):
            if folder in self._keys:
                return ConflictError(f"{url(path)} needs a folder where the key {url(folder)} is")
        return None

    def alike(self, row: NewKey) -> bool:
        """Whether an earlier attempt of the same task has made this key, with the same bytes."""
        found = self._keys.get(row.path)
        if found is None or row.job is None:
            return False
        return (found.size, found.checksum, found.job, found.task) == row[1:]

    def add(self, path: str) -> None:
        """This key stands there now, too."""
        self._keys[path] = None
        for folder in _folders_above(path):
            self._in_folders.setdefault(folder, path)


def _folders_above(path: str) -> list[str]:
    """The folders that a key stands in, without its bucket."""
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(2, len(parts))]


def _refusal(place: Callable[[int], None], i: int) -> S4Error | None:
    try:
        place(i)
    except S4Error as e:
        return e
    return None
