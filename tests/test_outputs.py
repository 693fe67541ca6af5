"""What a node knows of the outputs of shuffles: which inputs it may skip, and what it removes before it tries
again. On a real index; other nodes are not asked."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from s4 import outputs
from s4.config import Conf, Server
from s4.errors import ConflictError
from s4.index import Database, JobIndex, JobRow, KeyIndex, KeyRow, Maker, NewTask
from s4.inputs import CLOCK_SECONDS, Input, Inputs
from s4.outputs import REMOVED_AT_ONCE, Outputs

JOB = JobRow("now", "map-to-n", "s4://b/in/", "s4://b/out/", "ls", skip_existing=True)
ALONE = Conf((Server("h", 1),), "a test")


@pytest.fixture
def database(folder: Path) -> Iterator[Database]:
    opened = Database(str(folder / "node.db"))
    with opened.write() as db:  # it is older than all that happens in these tests
        db.execute("UPDATE _sqlite_migrations SET applied_at = '1970-01-01 00:00:00'")
    yield opened
    opened.close()


def _made(name: str, created_s: int, job: str, task: int = 0) -> KeyRow:
    return KeyRow(f"b/out/{name}", 1, "0", created_s, job, task)


@pytest.mark.parametrize(
    ("made_s", "exists"),
    [
        ([1000], True),
        ([1000 - CLOCK_SECONDS], True),
        ([1000 - CLOCK_SECONDS - 1], False),
        ([10, 1000, 20], True),
        ([], False),
    ],
)
def test_what_forgotten_jobs_made_of_an_input_is_not_much_older(
    database: Database, made_s: list[int], exists: bool
) -> None:
    keys = KeyIndex(database, list[str]().extend)
    keys.restore([KeyRow("b/in/000", 1, "0", 1000)])
    keys.restore([_made(f"000/{i}", created_s, f"forgotten{i}") for i, created_s in enumerate(made_s)])
    inputs = Inputs(JOB, ALONE, 0, keys, JobIndex(database))
    assert inputs.exists("b/in/000") == exists


def test_what_was_made_before_the_index_may_be_a_part(database: Database) -> None:
    keys = KeyIndex(database, list[str]().extend)
    keys.restore([KeyRow("b/in/000", 1, "0", 1000), _made("000/0", 1000, "lost")])
    with database.write() as db:
        db.execute("UPDATE _sqlite_migrations SET applied_at = '1970-01-01 00:16:41'")
    with pytest.raises(ConflictError, match="since a reindex it is not known"):
        Inputs(JOB, ALONE, 0, keys, JobIndex(database)).exists("b/in/000")


def test_what_was_half_made_of_one_input_is_not_of_another_of_its_name(database: Database) -> None:
    keys, jobs = KeyIndex(database, list[str]().extend), JobIndex(database)
    paths = ["b/in/one/000", "b/in/two/000"]
    jobs.begin(JobRow("failed", "map-to-n", "s4://b/in/", "s4://b/out/", "ls"))
    jobs.add_tasks("failed", [NewTask(i, path, 1, 1, "failed") for i, path in enumerate(paths)])
    jobs.end("failed", "failed", None)
    keys.restore([KeyRow(path, 1, "0", 1000) for path in paths])
    keys.restore([_made(f"000/{i}", 1000, "failed", i) for i in range(2)])
    inputs = Inputs(JOB, ALONE, 0, keys, jobs)
    assert [inputs.half_made(path) for path in paths] == [[Maker("000", "failed", i)] for i in range(2)]


def test_groups_come_in_the_order_of_their_prefixes(database: Database) -> None:
    keys = KeyIndex(database, list[str]().extend)
    keys.restore([KeyRow(f"b/in/{name}", 1, "0", 1) for name in ("a/2_x", "b/1_x", "c/2_y")])
    merge = JobRow("now", "map-from-n", "s4://b/in/", "s4://b/out/", "cat")
    inputs = Inputs(merge, ALONE, 0, keys, JobIndex(database))
    assert list(inputs.all()) == [Input("b/in/b/1_x", 1, 1), Input("b/in/a/2_x", 2, 2)]


def test_a_maker_was_last_at_work_when_it_made_its_newest_key(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KeyIndex(database, list[str]().extend)
    keys.restore([_made("000/0", 10, "a"), _made("000/1", 30, "a"), _made("000/2", 20, "a")])
    assert keys.makers("b/out/") == {Maker("000", "a", 0): 30}
    told = {Maker("000", "a", 0): 25, Maker("000", "b", 1): 5}
    makers_on = Outputs._makers_on
    monkeypatch.setattr(
        Outputs, "_makers_on", lambda self, position: told if position != 1 else makers_on(self, position)
    )
    ring = Conf(tuple(Server("h", port) for port in (1, 2, 3)), "a test")
    expected = {"000": {Maker("000", "a", 0): 30, Maker("000", "b", 1): 5}}
    assert Outputs(ring, 1, keys, "b/out/").makers() == expected


def test_what_many_tasks_made_is_all_removed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert REMOVED_AT_ONCE > 2
    monkeypatch.setattr(outputs, "REMOVED_AT_ONCE", 2)
    keys = KeyIndex(database, list[str]().extend)
    keys.restore([_made(f"{i:03}/x", 1, "failed", i) for i in range(5)])
    Outputs(ALONE, 0, keys, "b/out/").remove(sorted(keys.makers("b/out/")))
    assert keys.makers("b/out/") == {}
