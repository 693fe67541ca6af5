"""s4-server reindex: rebuild the index of a node from the files in its data folder."""

import contextlib
import os
import stat
import sys
import time
from collections.abc import Iterator
from itertools import islice

from s4.config import Conf
from s4.errors import BadKeyError, ConflictError, DamagedIndexError, S4Error
from s4.index import UNKNOWN_JOB, Database, KeyIndex, KeyRow
from s4.keys import owner, parse_key, url
from s4.recovery import recover
from s4.storage import Storage
from s4.workers import Kind, Pool, Ticket
from s4.workers.tasks import Checksum, Checksums

BATCH = 1000  # files a task and a transaction
START_SECONDS = 30.0  # for the first worker process


def reindex(conf: Conf, position: int, data: str) -> None:
    """Make the index agree with the files: add, correct and drop rows. Prints progress and what was done.

    What is no file, has a name that breaks the key rules, belongs to another node or cannot be read is named
    and left alone. Raises S4Error if a node runs on the folder, the index cannot be written or no worker
    process can be started.
    """
    if not os.path.isdir(data):
        raise S4Error(f"data folder {data} does not exist: name that of the node with --data")
    storage = Storage(data)
    unfinished = os.path.exists(storage.reindex_mark)
    try:
        with open(storage.reindex_mark, "wb") as mark:
            os.fsync(mark.fileno())
        try:
            database = _open(storage.index_path)
        except S4Error:  # such as of a newer s4: nothing was changed
            if not unfinished:
                os.unlink(storage.reindex_mark)
            raise
        counts = _reindex(conf, position, storage, database)
        os.unlink(storage.reindex_mark)
    except KeyboardInterrupt:
        print("interrupted; the node does not start before a reindex has ended", file=sys.stderr)
        raise
    finally:
        storage.close()
    print(", ".join(f"{count} {what}" for what, count in counts.items()))


def _reindex(conf: Conf, position: int, storage: Storage, database: Database) -> dict[str, int]:
    """What reindex does with what it has opened; how many files there were, and what became of them."""
    keys = KeyIndex(database, storage.unlink)
    recover(storage, database, adopting=True)
    cpus = len(os.sched_getaffinity(0))
    pool = Pool({Kind.COMPUTE: cpus, Kind.SEND: 1, Kind.RECEIVE: 1}, storage.run_folder)
    counts = {"files": 0, "added": 0, "corrected": 0, "dropped": 0, "left alone": 0}
    try:
        _wait_for_worker(pool)
        under_way: list[tuple[list[str], Ticket]] = []
        progress = _Progress()
        paths = _acceptable(conf, position, storage, counts)
        while True:
            batch = list(islice(paths, BATCH))
            if batch:
                files = [os.path.join(storage.root, path) for path in batch]
                under_way.append((batch, pool.submit(Ticket(Kind.COMPUTE, Checksum(files)))))
            if not batch or len(under_way) > 2 * cpus:
                if not under_way:
                    break
                _record(keys, *under_way.pop(0), counts)
                progress.show(counts["files"])
        for chunk in keys.list_keys(""):
            gone = [row.path for row in chunk if not _has_file(storage, row.path)]
            counts["dropped"] += len(gone)
            keys.forget(gone)
        progress.end()
    finally:
        pool.stop()
        storage.empty_temporary()
        database.close()
    return counts


def _open(path: str) -> Database:
    """The index; a damaged one is set aside and a new one begun."""
    database = None
    try:
        database = Database(path)
        database.check()
        return database
    except DamagedIndexError as e:
        aside = f"{path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
        print(f"{e}; it is set aside as {aside}", file=sys.stderr)
    if database is not None:
        database.abandon()  # before the files move: SQLite removes its WAL by the name that it had
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(path + suffix, aside + suffix)
    return Database(path)


def _wait_for_worker(pool: Pool) -> None:
    # A node tries for ever, in case that there are too many processes just now; here somebody waits.
    try:
        pool.submit(Ticket(Kind.COMPUTE, Checksum([]))).result(START_SECONDS)
    except TimeoutError:
        raise S4Error(f"no worker process could be started in {START_SECONDS:g} s") from None


def _acceptable(conf: Conf, position: int, storage: Storage, counts: dict[str, int]) -> Iterator[str]:
    for path in storage.walk("", lambda path, reason: _leave_alone(path, reason, counts)):
        try:
            parse_key(path)
            reason = "" if owner(path, len(conf.servers)) == position else "it belongs to another node"
        except BadKeyError as e:
            reason = e.rule
        if not reason:
            yield path
        else:
            _leave_alone(path, reason, counts)


def _leave_alone(path: str, reason: str, counts: dict[str, int]) -> None:
    counts["left alone"] += 1
    print(f"left alone: {path!r}: {reason}", file=sys.stderr)


def _record(keys: KeyIndex, paths: list[str], ticket: Ticket, counts: dict[str, int]) -> None:
    answer = ticket.result()
    assert isinstance(answer, Checksums)
    changed = []
    for path, found, known in zip(paths, answer.found, keys.get_all(paths), strict=True):
        if isinstance(found, str):  # the second pass drops its row if it is gone
            _leave_alone(path, found, counts)
            continue
        size, checksum, changed_s = found
        counts["files"] += 1
        if known is None:
            counts["added"] += 1
        elif (known.size, known.checksum) != (size, checksum):
            counts["corrected"] += 1
            print(f"corrected: {url(path)}: its bytes are not those that were stored", file=sys.stderr)
        else:
            continue
        changed.append(KeyRow(path, size, checksum, changed_s, UNKNOWN_JOB))
    keys.restore(changed)


def _has_file(storage: Storage, path: str) -> bool:
    """Whether a key has a file, readable or not; it is told if that is one of elsewhere, by a link."""
    try:
        if not stat.S_ISREG(os.stat(os.path.join(storage.root, path)).st_mode):
            return False
    except PermissionError:
        return True
    except OSError:
        return False
    with contextlib.suppress(S4Error):  # it cannot be read
        try:
            storage.locate(path)
        except ConflictError as e:
            print(f"dropped: {e}", file=sys.stderr)
            return False
    return True


class _Progress:
    """A line about ten times a second on a terminal, otherwise one every ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._pause = 0.1 if self._terminal else 10.0
        self._next = time.monotonic() + self._pause

    def show(self, files: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._pause
            end = "" if self._terminal else "\n"
            start = "\r" if self._terminal else ""
            print(f"{start}{files} files", end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
