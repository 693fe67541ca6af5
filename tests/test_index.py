"""The index on a real SQLite file: migrations, prefix ranges, what queries cost, and the sums of buckets."""

import os
import resource
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4.errors import BadRequestError, BusyError, ConflictError, FullDiskError, MissingError, S4Error
from s4.index import (
    Counts,
    Database,
    JobIndex,
    JobRow,
    KeyIndex,
    KeyRow,
    Maker,
    NewKey,
    NewTask,
    TaskChange,
    Underway,
)
from s4.index import jobs as index_jobs
from s4.index import keys as index_keys
from s4.index.database import IDLE_READERS, RESERVE_BYTES
from s4.index.query import run_query
from s4.index.schema import MEANINGS, schema

OPEN = "import sys; from s4.index import Database; Database(sys.argv[1]).close()"


@pytest.fixture
def database(folder: Path) -> Iterator[Database]:
    opened = Database(str(folder / "_index" / "node.db"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """One for many examples, each of which starts by emptying it."""
    opened = Database(str(tmp_path_factory.mktemp("index") / "node.db"))
    yield opened
    opened.close()


def _fill(
    database: Database, paths: set[str] | list[str], size: int = 1, unlinked: list[str] | None = None
) -> KeyIndex:
    """An index of these keys; what it unlinks is noted in `unlinked`."""
    with database.write() as db:
        db.execute("DELETE FROM keys")
    index = KeyIndex(database, ([] if unlinked is None else unlinked).extend)
    index.restore([KeyRow(path, size, "0", 0) for path in paths])
    return index


def _listed(index: KeyIndex, prefix: str) -> list[str]:
    return [row.path for chunk in index.list_keys(prefix) for row in chunk]


def _folder(index: KeyIndex, prefix: str) -> list[tuple[str, bool]]:
    return [(row.path, row.size is None) for chunk in index.list_folder(prefix) for row in chunk]


def _reader(database: Database) -> sqlite3.Connection:
    with database.read() as db:
        return db


def _applied(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        return [name for (name,) in db.execute("select name from _sqlite_migrations order by name")]


def test_migrations_that_are_applied_again_change_nothing(folder: Path) -> None:
    path = folder / "node.db"
    schemas = []
    for _ in range(2):
        database = Database(str(path))
        schemas.append(_reader(database).execute("select sql from sqlite_master order by name").fetchall())
        _fill(database, {"b/000"})
        database.close()
    assert schemas[0] == schemas[1]
    assert len(_applied(path)) == len(set(_applied(path))) >= 3


def test_processes_that_migrate_at_once_do_not_disturb_each_other(folder: Path) -> None:
    path = folder / "node.db"
    starting = [
        subprocess.Popen([sys.executable, "-c", OPEN, str(path)], stderr=subprocess.PIPE) for _ in range(4)
    ]
    ended = [(process.communicate(timeout=30)[1], process.returncode) for process in starting]
    assert ended == [(b"", 0)] * 4
    assert len(_applied(path)) == len(set(_applied(path))) >= 3


def test_a_file_that_is_no_database_is_reported_and_left_alone(folder: Path) -> None:
    path = folder / "node.db"
    path.write_bytes(b"this is no database\n" * 1000)
    with pytest.raises(S4Error, match=r"node\.db"):
        Database(str(path))
    assert path.read_bytes() == b"this is no database\n" * 1000


def test_the_schema_says_what_its_columns_mean(database: Database) -> None:
    found = schema(database)
    assert {(table, column) for table, column, _type, _meaning in found} == {
        (table, column) for table, columns in MEANINGS.items() for column in columns
    }
    assert all(meaning for _table, _column, _type, meaning in found)
    assert ("keys", "size", "INTEGER", "bytes") in found
    with database.write() as db:
        db.execute("CREATE VIEW mine AS SELECT 1 AS one")
    assert ("mine", "one", "", "") in schema(database)


def test_views_show_keys_and_jobs_to_people(database: Database) -> None:
    _fill(database, {"b/000"}, size=7)
    jobs = JobIndex(database)
    jobs.begin(JobRow("id", "map", "s4://b/", "s4://c/", "cat \udcff"))
    jobs.add_tasks("id", [NewTask(0, "b/000", 1, 7), NewTask(3, "b/003", 1, 7)])
    changes = [
        TaskChange(0, "done", 1),
        TaskChange(3, "failed", 2, exit_code=3, error="exit code 3", stderr=b"no"),
    ]
    jobs.progress("id", changes, Counts())
    jobs.end("id", "failed", "what failed")
    assert jobs.share("id").job.command == "cat \udcff"
    read = _reader(database)
    assert read.execute("select created, size, key from recent_keys").fetchall() == [
        ("1970-01-01 00:00:00", 7, "s4://b/000")
    ]
    assert read.execute("select kind, state, progress, error from recent_jobs").fetchall() == [
        ("map", "failed", "1/2", "what failed")
    ]
    assert read.execute("select task, attempt, exit_code, error, stderr from failed_tasks").fetchall() == [
        (3, 2, 3, "exit code 3", "no")
    ]


# Characters around those that matter: '/', its neighbours, those before the surrogates, and the last one.
_CHARACTERS = st.sampled_from("!ab.-0zé\ud7ff\ue000\uffff\U00010000\U0010ffff")
_SEGMENTS = st.text(_CHARACTERS, min_size=1, max_size=3)
_BUCKETS = st.text(st.sampled_from("ab-\ud7ff\U0010ffff"), min_size=1, max_size=2)
_PATHS = st.builds(
    lambda bucket, rest: "/".join([bucket, *rest]), _BUCKETS, st.lists(_SEGMENTS, min_size=1, max_size=3)
)


def _possible(paths: set[str]) -> set[str]:
    """Without those that need a folder where there is a key."""
    return {path for path in paths if not any(other.startswith(path + "/") for other in paths)}


def _beginning(path: str, cut: int) -> str:
    return path[: cut % (len(path) + 1)]


_PREFIXES = st.one_of(st.just(""), _PATHS, st.builds(_beginning, _PATHS, st.integers(0, 20)))


def _starts(paths: set[str], prefix: str) -> list[str]:
    """The law: the bucket part of a prefix is whole."""
    whole = prefix + "/" if prefix and "/" not in prefix else prefix
    return sorted(path for path in paths if path.startswith(whole))


@settings(max_examples=300, deadline=None)
@given(st.sets(_PATHS, max_size=30), st.data(), st.integers(1, 4))
def test_a_prefix_finds_what_starts_with_it_in_order(
    kept: Database, paths: set[str], data: st.DataObject, chunk: int
) -> None:
    paths = _possible(paths)
    index = _fill(kept, paths)
    own = st.builds(_beginning, st.sampled_from(sorted(paths)), st.integers(0, 20)) if paths else _PREFIXES
    prefix = data.draw(st.one_of(own, _PREFIXES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_keys, "CHUNK", chunk)
        assert _listed(index, prefix) == _starts(paths, prefix)
        if "/" in prefix:
            folder = prefix[: prefix.rfind("/") + 1]
            expected = set()
            for path in _starts(paths, prefix):
                head, slash, _below = path[len(folder) :].partition("/")
                expected.add((folder + head + slash, bool(slash)))
            assert _folder(index, prefix) == sorted(expected)


@settings(max_examples=150, deadline=None)
@given(st.sets(_PATHS, max_size=20), st.data())
def test_removing_a_prefix_removes_exactly_what_starts_with_it(
    kept: Database, paths: set[str], data: st.DataObject
) -> None:
    paths = _possible(paths)
    unlinked: list[str] = []
    index = _fill(kept, paths, unlinked=unlinked)
    own = st.builds(_beginning, st.sampled_from(sorted(paths)), st.integers(1, 20)) if paths else _PATHS
    prefix = data.draw(own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_keys, "REMOVE_CHUNK", 3)
        index.remove_prefix(prefix)
    gone = _starts(paths, prefix)
    assert sorted(unlinked) == gone
    assert _listed(index, "") == sorted(paths - set(gone))
    assert _reader(kept).execute("select count(*) from removals").fetchone() == (0,)


_CHANGES = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "restore", "forget"]), _PATHS, st.integers(0, 2**40)),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(_CHANGES)
def test_the_sums_of_buckets_follow_every_change(kept: Database, changes: list[tuple[str, str, int]]) -> None:
    index = _fill(kept, set())
    for what, path, size in changes:
        match what:
            case "add":
                index.add([NewKey(path, size, "0")], lambda _i: None)
            case "remove":
                try:
                    index.remove(path)
                except MissingError:
                    pass
            case "restore":
                index.restore([KeyRow(path, size, "0", 0)])
            case "forget":
                index.forget([path])
    keys, sizes = Counter[str](), Counter[str]()
    for path, size in _reader(kept).execute("select path, size from keys"):
        keys[path.partition("/")[0]] += 1
        sizes[path.partition("/")[0]] += size
    found = _reader(kept).execute("select bucket, keys, bytes from buckets").fetchall()
    assert {bucket: (count, total) for bucket, count, total in found} == {
        bucket: (keys[bucket], sizes[bucket]) for bucket in keys
    }
    assert [row.path for row in index.list_buckets()] == sorted(keys)


def test_of_one_key_only_the_first_is_added(database: Database) -> None:
    index = KeyIndex(database, list[str]().extend)
    placed: list[int] = []
    given = [("b/x", 1, "a"), ("b/x", 2, "b"), ("b/x/y", 3, "c"), ("b", 4, "d"), ("b/z", 5, "e")]
    rows = [NewKey(*key) for key in given]
    outcome = index.add(rows, placed.append)
    assert [type(error) for error in outcome[:3]] == [type(None), ConflictError, ConflictError]
    assert index.get("b/x").size == 1 and index.get("b/z").size == 5
    assert 1 not in placed and 2 not in placed


def test_a_key_whose_bytes_cannot_be_placed_is_not_there(database: Database) -> None:
    index = KeyIndex(database, list[str]().extend)

    def place(i: int) -> None:
        if i == 1:
            raise S4Error("no")

    outcome = index.add([NewKey(f"b/{i}", 1, "a") for i in range(3)], place)
    assert [str(error) for error in outcome] == ["None", "no", "None"]
    assert _listed(index, "") == ["b/0", "b/2"]


def test_an_unexpected_failure_in_the_middle_adds_nothing(database: Database) -> None:
    index = KeyIndex(database, list[str]().extend)

    def place(_i: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.add([NewKey("b/0", 1, "a")], place)
    assert _listed(index, "") == []
    index.add([NewKey("b/0", 1, "a")], lambda _i: None)
    assert _listed(index, "") == ["b/0"]


def test_files_that_cannot_be_removed_with_their_keys_are_removed_later(database: Database) -> None:
    unlinked: list[str] = []
    problem: S4Error | None = BusyError("too many open files")

    def unlink(paths: Sequence[str]) -> None:
        if problem is not None:
            raise problem
        unlinked.extend(paths)

    def removals() -> int:
        return int(_reader(database).execute("select count(*) from removals").fetchone()[0])

    index = KeyIndex(database, unlink)
    index.restore([KeyRow(f"b/{name}", 1, "0", 0) for name in "abcd"])
    index.remove("b/a")  # it is gone, whatever becomes of its file
    index.remove_prefix("b/b")
    problem = S4Error("read-only file system")
    with pytest.raises(S4Error, match="read-only"):  # which somebody has to do something about
        index.remove("b/c")
    index.add([NewKey("b/a", 1, "a")], lambda _i: None)  # its file is a new one
    problem = None
    assert _listed(index, "") == ["b/a", "b/d"] and unlinked == [] and removals() == 3
    index.remove_prefix("b/d")
    assert unlinked == ["b/d"] and removals() == 3  # the others are still to be swept after a crash
    index.finish_removals()
    assert unlinked == ["b/d", "b/b", "b/c"] and removals() == 0
    index.finish_removals()
    assert unlinked == ["b/d", "b/b", "b/c"]


def test_what_is_left_of_removed_keys_is_not_in_the_way_of_new_ones(database: Database) -> None:
    unlinked: list[str] = []
    problems = [BusyError("too many open files")]

    def unlink(paths: Sequence[str]) -> None:
        if problems:
            raise problems.pop()
        unlinked.extend(paths)

    index = KeyIndex(database, unlink)
    index.restore([KeyRow("b/folder/key", 1, "0", 0)])
    index.remove("b/folder/key")
    index.add([NewKey("b/folder", 1, "a")], lambda _i: unlinked.append("placed"))
    assert unlinked == ["b/folder/key", "placed"]


def test_while_housekeeping_is_at_what_is_left_of_removed_keys_none_is_made_in_its_place(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    problems = [BusyError("too many open files")]

    def unlink(paths: Sequence[str]) -> None:
        if problems:
            raise problems.pop()
        done.extend(paths)

    index = KeyIndex(database, unlink)
    index.restore([KeyRow("b/folder/key", 1, "0", 0)])
    index.remove("b/folder/key")
    remove_files = index._remove_files

    def meanwhile(removal: int, gone: Sequence[str]) -> None:
        monkeypatch.setattr(index, "_remove_files", remove_files)
        assert index.add([NewKey("b/folder", 1, "a")], lambda _i: done.append("placed")) == [None]
        remove_files(removal, gone)

    monkeypatch.setattr(index, "_remove_files", meanwhile)
    index.finish_removals()
    assert done[:2] == ["b/folder/key", "placed"]
    assert _reader(database).execute("select count(*) from removals").fetchone() == (0,)
    index.finish_removals()
    assert "b/folder" not in done and index._unfinished == {}


def test_what_was_placed_is_removed_if_it_cannot_be_committed(database: Database) -> None:
    """But not the key with the same bytes of an earlier attempt, nor what was refused."""
    unlinked: list[str] = []
    index = KeyIndex(database, unlinked.extend)
    rows = [NewKey(path, 1, "a", "job", i) for i, path in enumerate(("b/0", "b/kept", "b/kept/x", "b/1"))]
    index.add(rows[1:2], lambda _i: None)
    placed: list[str] = []

    def raises(db: sqlite3.Connection, outcome: list[S4Error | None]) -> None:
        assert [type(error) for error in outcome] == [type(None), type(None), ConflictError, type(None)]
        db.execute("INSERT INTO nowhere VALUES (1)")

    with pytest.raises(S4Error, match="nowhere"):
        index.add(rows, lambda i: placed.append(rows[i].path), raises)
    assert placed == ["b/0", "b/kept", "b/1"] and unlinked == ["b/0", "b/1"]
    assert _listed(index, "") == ["b/kept"]


def _plans(db: sqlite3.Connection, statements: list[str], table: str = "keys") -> list[str]:
    """How SQLite runs each statement that touches a table, or sorts, a line a step."""
    return [
        row[3]
        for sql in statements
        if sql.split()[0] in ("SELECT", "WITH", "DELETE", "INSERT", "UPDATE")
        for row in db.execute("EXPLAIN QUERY PLAN " + sql)
        if table in row[3] or "TEMP B-TREE" in row[3]
    ]


def test_reading_always_searches_by_the_primary_key(database: Database) -> None:
    index = _fill(database, [f"b/{i}/{j}" for i in range(30) for j in range(30)])
    read, statements = _reader(database), list[str]()
    read.set_trace_callback(statements.append)
    index.get("b/1/1")
    index.exists("b/1/1")
    assert index.missing(["b/1/1", "b/1/x"]) == ["b/1/x"]
    index.conflicts([("b/x/y/z", None)])
    for prefix in ("", "b", "b/", "b/1", "b/\U0010ffff"):
        assert _listed(index, prefix) is not None
        if "/" in prefix:
            assert _folder(index, prefix) is not None
    read.set_trace_callback(None)
    plans = _plans(read, statements)
    assert len(plans) > 10
    assert all(plan.startswith("SEARCH keys USING PRIMARY KEY (path") for plan in plans), set(plans)


def test_writing_always_searches_by_the_primary_key(database: Database) -> None:
    index = _fill(database, [f"b/{i}/{j}" for i in range(30) for j in range(30)])
    statements = list[str]()
    with database.write() as db:
        db.set_trace_callback(statements.append)
    index.add([NewKey("b/new/x", 1, "0")], lambda _i: None)
    index.remove("b/new/x")
    index.remove_prefix("b/2")
    index.forget(["b/1/1"])
    with database.write() as db:
        db.set_trace_callback(None)
    plans = _plans(_reader(database), [sql for sql in statements if not sql.startswith("--")])
    assert len(plans) > 5
    assert all(plan.startswith("SEARCH keys USING PRIMARY KEY (path") for plan in plans), set(plans)


def test_the_newest_jobs_and_those_that_run_are_found_without_a_look_at_the_others(
    database: Database,
) -> None:
    jobs = JobIndex(database)
    for job in "abc":
        jobs.begin(JobRow(job, "map", "s4://b/in/", "s4://b/out/", "cat"))
    jobs.end("b", "failed", "no")
    read, statements = _reader(database), list[str]()
    read.set_trace_callback(statements.append)
    assert [share.job.id for share in jobs.shares("", 2)] == ["c", "b"]
    assert jobs.running() == ["a", "c"]
    assert jobs.running_outdirs() == ["s4://b/out/"] * 2
    read.set_trace_callback(None)
    newest, *running = _plans(read, statements, "jobs")
    assert newest == "SCAN jobs USING INDEX jobs_by_start"  # in its order, to the last that is wanted
    assert len(running) == 2 and all("INDEX jobs_running" in plan for plan in running), running
    assert [share.job.id for share in jobs.shares("b", 2)] == ["b"]


def _steps(database: Database, index: KeyIndex, prefix: str) -> int:
    """Instructions of SQLite's machine for one folder listing."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    read = _reader(database)
    read.set_progress_handler(count, 1)
    assert len(_folder(index, prefix)) == 50
    read.set_progress_handler(None, 1)
    return steps


def test_a_folder_listing_costs_what_it_shows_and_not_what_lies_below(database: Database) -> None:
    few = _steps(database, _fill(database, [f"b/{i:02}/0" for i in range(50)]), "b/")
    many = _steps(database, _fill(database, [f"b/{i:02}/{j}" for i in range(50) for j in range(400)]), "b/")
    beside = [f"b/{i:02}/{j}" for i in range(50) for j in range(10)] + [f"b0/{j}" for j in range(5000)]
    assert many < few * 1.1
    assert _steps(database, _fill(database, beside), "b/") < few * 1.1


def test_a_removal_costs_what_it_removes(database: Database) -> None:
    def steps(keys: int) -> int:
        gone: list[str] = []
        index = _fill(database, [f"b/{i:06}" for i in range(keys)], unlinked=gone)
        hundreds = 0

        def count() -> int:
            nonlocal hundreds
            hundreds += 1
            return 0

        with database.write() as db:
            db.set_progress_handler(count, 100)
        index.remove_prefix("b/")
        assert len(gone) == keys
        with database.write() as db:
            db.set_progress_handler(None, 100)
        return hundreds

    assert steps(8000) < steps(2000) * 4.4


def test_listings_hold_no_transaction_between_chunks(database: Database) -> None:
    index = _fill(database, [f"b/{i:05}" for i in range(5000)])
    chunks = index.list_keys("b/")
    next(chunks)
    assert not _reader(database).in_transaction
    index.remove("b/04999")
    assert [row.path for chunk in chunks for row in chunk][-1] == "b/04998"


def test_what_a_crash_left_is_named_and_then_forgotten(database: Database) -> None:
    underway = Underway(database)
    underway.transfer_began("u1", "put", ["b/é", 'b/"quoted"'], None, "::1")
    underway.transfer_began("u2", "get", ["b/other"], 5, "::1")
    underway.transfer_began("u3", "put", ["b/confirmed"], 5, "::1")
    underway.transfer_ended("u3")
    paths, prefixes = underway.left_by_crash()
    assert (sorted(paths), prefixes) == (['b/"quoted"', "b/é"], [])
    underway.forget_crash()
    assert underway.left_by_crash() == ([], [])


def test_what_ran_when_the_node_stopped_is_lost_and_the_rest_never_began(database: Database) -> None:
    jobs = JobIndex(database)
    jobs.begin(JobRow("j", "map", "s4://b/in/", "s4://b/out/", "cat"))
    jobs.add_tasks("j", [NewTask(i, f"b/in/{i}", 1, 10) for i in range(3)])
    jobs.listed("j", Counts(tasks=3))
    jobs.progress("j", [TaskChange(0, "done", 1, bytes_out=4), TaskChange(1, "running", 1)], Counts(tasks=3))
    assert jobs.running_outdirs() == ["s4://b/out/"]
    for job in jobs.running():
        jobs.interrupt(job)
    assert jobs.running_outdirs() == []
    share = jobs.share("j")
    assert (share.state, share.counts) == ("interrupted", Counts(3, 1, 0, 2, 0, 10, 4))
    [tasks] = jobs.tasks("j")
    assert [task["state"] for task in tasks] == ["done", "cancelled", "cancelled"]
    jobs.begin_again("j", 2)
    assert [(task.task, attempt) for task, attempt in jobs.waiting("j", -1, 10)] == [(1, 1), (2, 0)]
    assert (jobs.share("j").state, jobs.share("j").job.run) == ("running", 2)


def test_a_task_replaces_only_what_it_made_itself(database: Database) -> None:
    placed: list[int] = []
    removed: list[str] = []
    index = KeyIndex(database, removed.extend)

    def add(*keys: NewKey) -> list[str]:
        placed.clear()
        return [type(e).__name__ for e in index.add(keys, placed.append)]

    assert add(NewKey("b/x", 1, "a", "j", 7)) == ["NoneType"]
    assert add(NewKey("b/x", 1, "a", "j", 7)) == ["NoneType"] and (placed, removed) == ([0], [])
    assert add(NewKey("b/x", 2, "b", "j", 7)) == ["NoneType"] and (placed, removed) == ([0], ["b/x"])
    assert add(NewKey("b/x", 3, "c", "j", 8)) == ["ConflictError"]
    assert add(NewKey("b/x", 3, "c", "k", 7)) == ["ConflictError"]
    assert add(NewKey("b/x", 3, "c")) == ["ConflictError"] and placed == []
    assert index.get("b/x")[1:3] == (2, "b")
    # In one batch, too, each stands where the next wants to be.
    batch = ["b/new", "b/new", "b/new/x", "b/y/z", "b/y", "b/x/y", "b/x"]
    outcome = add(*(NewKey(path, 2, "b", "j", 7) for path in batch))
    assert [path for path, no in zip(batch, outcome, strict=True) if no == "NoneType"] == [
        "b/new",
        "b/y/z",
        "b/x",
    ]


def test_what_somebody_removes_while_it_is_replaced_is_made_anew(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = KeyIndex(database, list[str]().extend)
    rows = [NewKey(f"b/{i}", 1, "a", "j", i) for i in range(2)]
    index.add(rows, lambda _i: None)
    remove = index.remove

    def remove_both(path: str) -> None:
        remove(path)
        if path == "b/0":
            remove("b/1")

    monkeypatch.setattr(index, "remove", remove_both)
    again = [row._replace(checksum="b") for row in rows]
    assert index.add(again, lambda _i: None) == [None, None]
    assert [index.get(row.path).checksum for row in rows] == ["b", "b"]


def test_what_stands_in_the_way_is_told_for_each_key_by_itself(database: Database) -> None:
    index = KeyIndex(database, list[str]().extend)
    made = ["b/key", "b/folder/sub/key", "b/free-", "b/free0"]  # '/' stands between '-' and '0'
    index.add([NewKey(path, 1, "a", "j", 7) for path in made], lambda _i: None)
    expected = {
        ("b/key", 7): None,
        ("b/key", 8): "exists already",
        ("b/key/x", 7): "needs a folder where the key s4://b/key is",
        ("b/key/x/y", 7): "needs a folder where the key s4://b/key is",
        ("b/folder", 7): "is a folder here: s4://b/folder/sub/key",
        ("b/folder/sub", 7): "is a folder here: s4://b/folder/sub/key",
        ("b/folder/sub/key", 7): None,
        ("b/folder/sub/key2", 7): None,
        ("b/folder.x", 7): None,
        ("b/fol", 7): None,
        ("b/free", 7): None,
        ("c/key/x", 7): None,
    }
    for (path, task), found in zip(expected, index.conflicts(list(expected), "j"), strict=True):
        part = expected[path, task]
        assert (found is None) if part is None else part in str(found), (path, found)
    assert "exists already" in str(index.conflicts([("b/key", None)])[0])


def _queried(database: Database, sql: str, limit: int = 100) -> list[object]:
    return [list(row) for row in run_query(database.path, sql, limit)]


def test_a_query_can_read(database: Database) -> None:
    _fill(database, {"b/000", "b/001"})
    assert _queried(database, "select path, x'00ff' as raw from keys") == [
        ["path", "raw"],
        ["b/000", b"\x00\xff"],
        ["b/001", b"\x00\xff"],
    ]


@pytest.mark.parametrize(
    "sql",
    [
        "delete from keys",
        "select 1; delete from keys",
        "attach 'other.db' as o",
        "pragma user_version = 5",
        "vacuum into 'copy.db'",
        "create table t (x)",
        "insert into keys values ('b/x', 1, '', 0, null, null) returning path",
        "begin immediate",
        "select load_extension('x')",
        "selec 1",
        "select '",
        "",
        "-- nothing",
        "select \0",
        "select zeroblob(1000000000)",
    ],
)
def test_a_query_that_does_more_or_is_wrong_is_refused(database: Database, sql: str) -> None:
    _fill(database, {"b/000"})
    with pytest.raises(BadRequestError):
        _queried(database, sql)
    assert _listed(KeyIndex(database, list[str]().extend), "") == ["b/000"]
    assert os.listdir(os.path.dirname(database.path)).count("copy.db") == 0


def test_a_query_has_limits(database: Database) -> None:
    endless = "with recursive n(x) as (select 1 union all select x + 1 from n) select x from n"
    with pytest.raises(BadRequestError, match="more than 10 rows"):
        _queried(database, endless, 10)
    assert len(_queried(database, endless + " limit 10", 10)) == 11
    with pytest.raises(BadRequestError, match="longer than 5 seconds"):
        _queried(database, endless.replace("select x from", "select sum(x) from"))
    slow = "instr(hex(zeroblob(300000)), hex(zeroblob(150000)) || x)"  # a step that takes long
    with pytest.raises(BadRequestError, match="longer than 5 seconds"):
        _queried(database, endless.replace("select x from n", f"select sum({slow}) from n where x < 300"))


def test_finished_jobs_are_kept_for_a_week_and_the_last_thousand_longer(database: Database) -> None:
    with database.write() as db:
        old = [(f"old{i}", "done", float(i)) for i in range(1500)]
        db.executemany(
            "insert into jobs (id, kind, indir, outdir, command, state, started_s)"
            " values (?, 'map', '', '', '', ?, ?)",
            [*old, ("hangs", "running", -1.0)],
        )
        # Evals are counted by themselves, however many there are.
        db.executemany(
            "insert into jobs (id, kind, indir, outdir, command, state, started_s, alone)"
            " values (?, 'eval', '', '', '', 'done', ?, 1)",
            [(f"eval{i}", 1e6 + i) for i in range(1001)],
        )
    index = JobIndex(database)
    for alone in (False, True):
        for job_id, run in index.old(1000, 7 * 24 * 3600, alone=alone):
            index.forget(job_id, run)
    index.forget("old999", 7)  # another run than that which was old
    left = {job for (job,) in _reader(database).execute("select id from jobs")}
    evals = {f"eval{i}" for i in range(1, 1001)}
    assert left == {"hangs", *(f"old{i}" for i in range(500, 1500)), *evals}


def test_what_tasks_made_is_found_and_removed(database: Database) -> None:
    gone: list[str] = []
    keys, jobs = KeyIndex(database, gone.extend), JobIndex(database)
    made = {"x/0": ("one", 0), "x/1": ("one", 0), "x/y/2": ("two", 0), "z/0": ("one", 1)}
    rows = [NewKey(f"b/out/{path}", 1, "0", job, task) for path, (job, task) in made.items()]
    rows += [
        NewKey("b/out/top", 1, "0"),
        NewKey("b/out/put/0", 1, "0"),
        NewKey("b/outer/x/0", 1, "0", "one", 0),
    ]
    assert keys.add(rows, lambda _i: None) == [None] * len(rows)
    assert set(keys.makers("b/out/")) == {
        ("x", "one", 0),
        ("x", "two", 0),
        ("z", "one", 1),
        ("put", None, None),
    }
    doomed = [Maker("x", "one", 0), Maker("z", "two", 1), Maker("nothing", "one", 1)]
    keys.remove_made("b/out/", doomed)
    assert gone == ["b/out/x/0", "b/out/x/1"]
    assert set(keys.makers("b/out/")) == {("x", "two", 0), ("z", "one", 1), ("put", None, None)}
    jobs.begin(JobRow("one", "map-to-n", "s4://b/in/", "s4://b/out/", "c"))
    jobs.add_tasks(
        "one", [NewTask(i, f"b/in/{i}", 1, 0, state) for i, state in enumerate(("done", "failed"))]
    )
    assert [jobs.made_from("one", i) for i in range(3)] == [
        ("b/in/0", "running"),
        ("b/in/1", "running"),
        None,
    ]
    jobs.end("one", "failed", None)
    assert [jobs.made_from("one", i) for i in range(2)] == [("b/in/0", "done"), ("b/in/1", "failed")]


def test_all_that_a_task_made_is_removed_however_much_it_is(database: Database) -> None:
    gone: list[str] = []
    keys = KeyIndex(database, gone.extend)
    paths = [f"b/out/x/{i:04}" for i in range(2 * index_keys.REMOVE_CHUNK + 1)]
    keys.restore([KeyRow(path, 1, "0", 0, "one", 0) for path in paths])
    keys.remove_made("b/out/", [Maker("x", "one", 0)])
    assert gone == paths and keys.makers("b/out/") == {}


def test_what_is_done_in_steps_is_done_to_the_end(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_jobs, "STEP", 2)
    jobs = JobIndex(database)
    jobs.begin(JobRow("j", "map", "s4://b/in/", "s4://b/out/", "cat"))
    jobs.add_tasks("j", [NewTask(i, f"b/in/{i}", 1, 10) for i in range(5)])
    jobs.listed("j", Counts(tasks=5))
    jobs.end("j", "failed", None)
    assert jobs.share("j").counts == Counts(tasks=5, cancelled=5)
    jobs.begin_again("j", 2)
    assert [task.task for task, _attempt in jobs.waiting("j", -1, 10)] == list(range(5))
    jobs.end("j", "failed", None)
    jobs.forget("j", 2)
    assert _reader(database).execute("select count(*) from tasks").fetchone() == (0,)


def test_what_each_of_many_tasks_said_is_told(database: Database) -> None:
    jobs = JobIndex(database)
    jobs.begin(JobRow("j", "map", "s4://b/in/", "s4://b/out/", "cat"))
    jobs.add_tasks("j", [NewTask(i, f"b/in/{i}", 1, 1) for i in range(130)])
    changes = [TaskChange(i, "failed", 1, exit_code=3, stderr=b"%d" % i) for i in range(130)]
    jobs.progress("j", changes, Counts(tasks=130, failed=130))
    told = [task["stderr"] for chunk in jobs.tasks("j", ["failed"], stderr=True) for task in chunk]
    assert told == [b"%d" % i for i in range(130)]


def test_an_interrupted_share_ended_with_its_last_task(database: Database) -> None:
    jobs = JobIndex(database)
    jobs.begin(JobRow("j", "map", "s4://b/in/", "s4://b/out/", "cat"))
    jobs.add_tasks("j", [NewTask(i, f"b/in/{i}", 1, 1) for i in range(3)])
    began = jobs.share("j").started_s
    done = [TaskChange(i, "done", 1, started_s=began + i, seconds=5.0 - i) for i in range(2)]
    jobs.progress("j", [*done, TaskChange(2, "running", 1, started_s=began + 3)], Counts(tasks=3, done=2))
    jobs.interrupt("j")
    assert jobs.share("j").finished_s == pytest.approx(began + 5, abs=0.001)


def test_what_is_recorded_twice_is_there_once(database: Database) -> None:
    jobs = JobIndex(database)
    jobs.begin(JobRow("job", "map", "s4://b/in/", "s4://b/out/", "cat"))
    jobs.add_tasks("job", [NewTask(0, "b/in/0", 1, 1)])
    change = TaskChange(0, "failed", 1, exit_code=3, error="exit code 3", stderr=b"oops")
    for _ in range(2):  # as after a disk that was full when the end came
        jobs.progress("job", [change], Counts(tasks=1, failed=1))
        jobs.end("job", "failed", "exit code 3")
    [[task]] = list(jobs.tasks("job", stderr=True))
    assert (task["state"], task["stderr"]) == ("failed", b"oops")


def test_what_was_never_listed_to_its_end_is_listed_anew(database: Database) -> None:
    jobs = JobIndex(database)
    jobs.begin(JobRow("j", "map", "s4://b/in/", "s4://b/out/", "cat"))
    jobs.add_tasks("j", [NewTask(i, f"b/in/{i}", 1, 10) for i in range(3)])
    jobs.interrupt("j")  # before jobs.listed
    jobs.begin_again("j", 2)
    assert jobs.waiting("j", -1, 10) == [] and jobs.share("j").counts == Counts()
    jobs.add_tasks("j", [NewTask(0, "b/in/0", 1, 10)])
    assert [task.task for task, _attempt in jobs.waiting("j", -1, 10)] == [0]


def test_what_an_attempt_said_goes_when_the_next_says_nothing(database: Database) -> None:
    jobs = JobIndex(database)
    jobs.begin(JobRow("j", "map", "s4://b/in/", "s4://b/out/", "cat"))
    jobs.add_tasks("j", [NewTask(0, "b/in/0", 1, 1)])
    for change in (TaskChange(0, "failed", 1, exit_code=3, stderr=b"oops"), TaskChange(0, "done", 2)):
        jobs.progress("j", [change], Counts(tasks=1))
    [[task]] = list(jobs.tasks("j", stderr=True))
    assert (task["state"], task["attempt"], task["stderr"]) == ("done", 2, None)


def test_a_reserve_that_a_crash_left_empty_is_filled_and_none_is_thrown_away(folder: Path) -> None:
    reserve = folder / "node.db-reserve"
    reserve.touch()
    database = Database(str(folder / "node.db"))
    assert reserve.stat().st_size == RESERVE_BYTES
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        database.keep_reserve()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert reserve.stat().st_size == RESERVE_BYTES
    database.close()


def test_the_room_of_the_reserve_is_not_taken_again_before_it_is_used(database: Database) -> None:
    reserve = Path(database.path + "-reserve")
    found: list[bool] = []

    def remove() -> str:
        database.keep_reserve()  # housekeeping comes in between
        found.append(reserve.exists())
        if len(found) == 1:
            raise FullDiskError("full")
        return "removed"

    assert database.making_room(remove) == "removed"
    assert found == [True, False]
    database.keep_reserve()
    assert reserve.stat().st_size == RESERVE_BYTES


def test_few_connections_are_kept_for_further_reads(database: Database) -> None:
    with ExitStack() as together:
        for _ in range(3 * IDLE_READERS):
            together.enter_context(database.read())
    places = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    opened = [place for place in places if os.path.exists(place)]
    assert (
        len([place for place in opened if os.path.samefile(place, database.path + "-wal")])
        <= IDLE_READERS + 1
    )
