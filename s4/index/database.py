"""The connections to node.db: WAL, one writer at a time, as many readers as read at once.

Contract: `write()` is the only way to change anything and is one transaction; `read()` is a connection on
which no transaction stays open. Private: how connections are kept.
"""

import contextlib
import errno
import fcntl
import importlib.util
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias, TypeVar

from s4.errors import BusyError, DamagedIndexError, FullDiskError, S4Error, StoppingError

# A cache of 1 MB a connection: there may be several, and the system's page cache serves them all.
_PRAGMAS = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    PRAGMA temp_store = MEMORY;
    PRAGMA cache_size = -1000;
"""


RESERVE_BYTES = 1024 * 1024  # several times what the removal of a few hundred keys writes
IDLE_READERS = 8  # connections kept for further reads

# What SQLite says on a full disk, the second when it opens a file: "disk I/O error".
_NO_ROOM = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")

# What `write` gives: the connection, inside a transaction.
Transaction: TypeAlias = sqlite3.Connection

T = TypeVar("T")


class Database:
    """node.db, migrated to the newest schema when it is opened.

    Raises DamagedIndexError if the file is not a database of ours.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._reserve = path + "-reserve"
        self._reserve_lock = threading.Lock()  # held while somebody uses the room of the reserve, or makes it
        try:
            self._writer = self.making_room(self._open)
        except FullDiskError as e:  # no node runs that could make room
            raise FullDiskError(
                f"the index {path}: the disk is full; to be opened it needs a little room"
            ) from e
        # One lock instead of a writer thread: a commit takes 15 µs, handing it to a thread takes longer.
        self._write_lock = threading.Lock()
        self._readers: list[sqlite3.Connection] = []  # idle ones
        self._closed = False
        self.keep_reserve()

    def _open(self) -> sqlite3.Connection:
        try:
            _migrate(self.path)
            writer = self._connect()
            writer.execute("PRAGMA cache_size = -8000")
        except sqlite3.Error as e:
            raise explained(self.path, e) from e
        return writer

    def _connect(self) -> sqlite3.Connection:
        # Autocommit, so that transactions are only where they are written down. The writer moves between
        # threads under the lock.
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=30, check_same_thread=False)
        connection.executescript(_PRAGMAS)
        return connection

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """One transaction; rolled back if the block raises. Raises S4Error if SQLite fails."""
        with self._write_lock:
            if self._closed:
                raise StoppingError()
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException as e:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                if isinstance(e, sqlite3.Error):
                    raise explained(self.path, e) from e
                raise

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep every writer out without a transaction, for work that must not meet a new row."""
        with self._write_lock:
            yield

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection for reading. Raises S4Error if SQLite fails in the block."""
        try:
            connection = self._reader()
            try:
                yield connection
            finally:
                if len(self._readers) < IDLE_READERS:
                    self._readers.append(connection)
                else:
                    connection.close()
        except sqlite3.Error as e:
            raise explained(self.path, e) from e

    def _reader(self) -> sqlite3.Connection:
        with contextlib.suppress(IndexError):
            return self._readers.pop()
        connection = self._connect()
        connection.execute("PRAGMA query_only = 1")
        return connection

    def keep_reserve(self) -> None:
        """Reserve some disk space, unless that is done, or there is none left, or it is just being used:
        letting go of it makes removals work on a full disk."""
        if not self._reserve_lock.acquire(blocking=False):
            return
        try:
            if os.path.exists(self._reserve) and os.path.getsize(self._reserve) >= RESERVE_BYTES:
                return
            try:
                with open(self._reserve, "wb") as f:
                    os.posix_fallocate(f.fileno(), 0, RESERVE_BYTES)
            except OSError:
                self._free_reserve()
        finally:
            self._reserve_lock.release()

    def _free_reserve(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._reserve)

    def making_room(self, action: Callable[[], T]) -> T:
        """What `action()` returns, which has to work on a full disk: tried again without the reserve."""
        try:
            return action()
        except FullDiskError:
            with self._reserve_lock:  # housekeeping would take the room again before it is used
                self._free_reserve()
                return action()

    def check(self) -> None:
        """Read the whole file. Raises DamagedIndexError if it is not sound."""
        with self.read() as db:
            [(found,)] = db.execute("PRAGMA quick_check(1)").fetchall()
        if found != "ok":
            raise DamagedIndexError(f"{self.path}: {found}")

    def close(self) -> None:
        """Close the writer, with everything in node.db and nothing left in the WAL."""
        with self._write_lock:
            self._closed = True
            # SQLite does it by itself only for the last connection, and somebody may be reading.
            # On a full disk it fails; then what is in the WAL stays there, and the next start reads it there.
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._writer.close()
            self._close_readers()

    def abandon(self) -> None:
        """Close a damaged file, as it is; nobody reads it."""
        with self._write_lock:
            self._closed = True
            self._writer.close()
            self._close_readers()

    def _close_readers(self) -> None:
        while self._readers:
            self._readers.pop().close()


def explained(path: str, e: sqlite3.Error) -> S4Error:
    """An error of SQLite as one of ours, with what to do."""
    name = getattr(e, "sqlite_errorname", "")  # errors of the Python module itself have none
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return DamagedIndexError(f"{path}: {e}; 's4-server reindex' makes a new one from the files")
    if name in _NO_ROOM:
        return FullDiskError(f"the index {path}: the disk is full; s4 rm makes room")
    if name.startswith("SQLITE_CANTOPEN") and _no_descriptor_is_left():
        return BusyError(f"the index {path}: too many files are open here; try again later")
    return S4Error(f"the index {path}: {e}")


def _no_descriptor_is_left() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as e:
        return e.errno in (errno.EMFILE, errno.ENFILE)
    return False


def _migrate(path: str) -> None:
    import sqlite_utils

    # Two processes that apply at once would both see the same step pending.
    with open(path + ".migrate.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        database = sqlite_utils.Database(path)
        spec = importlib.util.spec_from_file_location("s4_migrations", _migrations_file())
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        migrations = module.migrations
        with contextlib.closing(sqlite_utils.Database(memory=True)) as empty:
            known = {step.name for step in migrations.pending(empty)}
        newer = [step.name for step in migrations.applied(database) if step.name not in known]
        if newer:
            database.close()
            raise S4Error(f"the index {path} was made by a newer s4, with {newer[-1]}: use that one here")
        migrations.apply(database)
        database.close()


def _migrations_file() -> Path:
    """In a wheel the folder lies inside the package, in a checkout beside it."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "migrations" / "migrations.py"
    return inside if inside.exists() else package.parent / "migrations" / "migrations.py"
