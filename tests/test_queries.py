"""stat and sql on real nodes: what is known of a key, and questions to all indexes that can only read."""

import contextlib
import csv
import io
import json
import math
import re
import sqlite3
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import procs
import pytest
from cluster import Cluster, walk
from reference import checksum_of

NUMBERS = "with recursive n(x) as (select 1 union all select x + 1 from n limit {}) select {} from n"
ENDLESS = "with recursive n(x) as (select 1 union all select x + 1 from n) select sum(x) from n"
WRITES = [
    "delete from keys",
    "update keys set size = 0",
    "insert into removals values ('b/') returning prefix",
    "with d as (select 1) delete from jobs",
    "drop table keys",
    "create table t (x)",
    "create temp table t (x)",
    "alter table keys add column x",
    "attach 'other.db' as other",
    "detach main",
    "vacuum",
    "vacuum into 'copy.db'",
    "reindex",
    "analyze",
    "begin immediate",
    "savepoint s",
    "commit",
    "pragma user_version = 7",
    "pragma journal_mode = delete",
    "pragma writable_schema = 1",
    "select load_extension('x')",
    "select * from pragma_wal_checkpoint",
    "select 1; delete from keys",
]


def _rows(cluster: Cluster, query: str, *options: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(cluster.s4("sql", query, "--format", "json", *options).out)
    return rows


def _stat(cluster: Cluster, key: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.s4("stat", key, "--json").out)
    return found


def test_stat_tells_what_is_known_of_a_key(cluster: Cluster, bucket: str) -> None:
    key = f"{bucket}/a/001_x"
    cluster.put(key, b"hello")
    node = cluster.nodes[1]
    lines = dict(re.split(": +", line, maxsplit=1) for line in cluster.s4("stat", key).lines)
    created = datetime.strptime(lines.pop("created"), "%Y-%m-%d %H:%M:%S")
    now = datetime.now(timezone(timedelta(hours=5, minutes=30))).replace(tzinfo=None)
    assert timedelta(0) <= now - created < timedelta(minutes=1)
    assert lines == {
        "key": key,
        "size": "5",
        "checksum": checksum_of(b"hello"),
        "node": str(node),
        "file": str(node.path_of(key)),
    }
    assert node.path_of(key).read_bytes() == b"hello"
    found = _stat(cluster, key)
    assert found["size"] == 5 and time.time() - 60 < found["created_s"] <= time.time()
    assert [found[name] for name in ("job", "task", "kind", "command", "input")] == [None] * 5


@pytest.mark.parametrize("kind", ["map", "map-to-n", "map-from-n"])
def test_stat_tells_what_made_a_key(cluster: Cluster, bucket: str, kind: str) -> None:
    cluster.put_all({f"{bucket}/in/{i:03}": b"x" for i in range(3)})
    command = {"map": "cat", "map-to-n": "touch 0 1 2; ls", "map-from-n": "xargs cat"}[kind]
    job = json.loads(cluster.s4(kind, f"{bucket}/in/", f"{bucket}/out/", command, "--json").out)["job"]
    # A shuffle's output is on another node than the record of its task.
    key = f"{bucket}/out/001/2" if kind == "map-to-n" else f"{bucket}/out/001"
    found = _stat(cluster, key)
    names = ("job", "task", "kind", "command", "input", "node")
    assert tuple(found[name] for name in names) == (
        job,
        1,
        kind,
        command,
        f"{bucket}/in/001",
        str(cluster.nodes[2 if kind == "map-to-n" else 1]),
    )
    lines = cluster.s4("stat", key).lines
    assert lines[-5:] == [
        f"job:      {job}",
        "task:     1",
        f"kind:     {kind}",
        f"command:  {command}",
        f"input:    {bucket}/in/001",
    ]


@pytest.mark.parametrize("key", ["s4://b/nothing", "s4://b/in/", "s4://b", "b/in/000", "s4://b/a b", "s4://"])
def test_stat_of_no_key_is_one_line(cluster: Cluster, key: str) -> None:
    cluster.fails("stat", key, code=1)


def test_stat_shows_what_it_can_when_the_node_of_the_task_is_down(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(2)
    cluster.put("s4://b/in/001", b"x")
    cluster.s4("map-to-n", "s4://b/in/", "s4://b/out/", "echo >000; echo 000")
    cluster.nodes[1].kill()
    result = cluster.run("stat", "s4://b/out/001/000")
    assert result.code == 3 and str(cluster.nodes[1]) in result.fatal
    assert "size:     1" in result.lines and "task:     1" in result.lines


def test_every_node_answers_a_query(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/{i:03}": b"x" * i for i in range(4)})
    query = f"select path, size from keys where path like '{bucket[5:]}/%' order by 1"
    assert _rows(cluster, query) == [
        {"node": str(cluster.nodes[i % 3]), "path": f"{bucket[5:]}/{i:03}", "size": i} for i in (0, 3, 1, 2)
    ]
    assert _rows(cluster, query) == json.loads(cluster.s4("sql", query, "--json").out)
    none = f"select path from keys where path = '{bucket[5:]}/nothing'"
    assert _rows(cluster, none) == []
    assert cluster.s4("sql", none).lines == ["node | path", "-----+-----"]


def test_jobs_and_tasks_can_be_asked_for(cluster: Cluster, bucket: str) -> None:
    cluster.put_all({f"{bucket}/in/{i:03}": b"x" for i in range(3)})
    command = "echo no >&2; exit 3"
    result = cluster.run("map", f"{bucket}/in/", f"{bucket}/out/", command, "--keep-going", "--json")
    job = json.loads(result.out)["job"]
    rows = _rows(cluster, f"select task, input, exit_code, stderr from failed_tasks where job = '{job}'")
    assert [tuple(row.values()) for row in rows] == [
        (str(node), i, f"{bucket[5:]}/in/00{i}", 3, "no\n") for i, node in enumerate(cluster.nodes)
    ]
    rows = _rows(cluster, f"select state, failed from jobs where id = '{job}'")
    assert [(row["state"], row["failed"]) for row in rows] == [("failed", 1)] * 3


# A text with all that could break a line, a blob, nothing, numbers, and two columns of the same name.
ODD = "select 'a|b' || char(9, 10, 13, 27, 34, 44, 92) || 'é' as t, x'00ff' as b, null as n, 1.5 as f, 2 as f"
ODD_TEXT = 'a|b\t\n\r\x1b",\\é'


def test_rows_come_as_a_table(cluster: Cluster) -> None:
    head, rule, *rows = cluster.s4("sql", ODD).lines
    assert re.split(r" *\| *", head) == ["node", "t", "b", "n", "f", "f"]
    assert set(rule) == {"-", "+"} and len(rows) == 3
    text = r'a\|b\t\n\r\x1b",\\é'
    for row, node in zip(rows, cluster.nodes, strict=True):
        assert [cell.strip() for cell in row.split(" | ")] == [str(node), text, "x'00ff'", "", "1.5", "2"]
        assert "\x1b" not in row and len(row) == len(rows[0])


def test_rows_come_as_csv(cluster: Cluster) -> None:
    out = cluster.s4("sql", ODD, "--format", "csv").out.decode()
    head, *rows = csv.reader(io.StringIO(out, newline=""))
    assert head == ["node", "t", "b", "n", "f", "f"]
    assert rows == [[str(node), ODD_TEXT, "x'00ff'", "", "1.5", "2"] for node in cluster.nodes]


def test_rows_come_as_tab_separated_text(cluster: Cluster) -> None:
    out = cluster.s4("sql", ODD, "--format=tsv").out.decode()
    head, *rows = [line.split("\t") for line in out.removesuffix("\n").split("\n")]
    assert head == ["node", "t", "b", "n", "f", "f"]
    text = r"a|b\t\n\r" + '\x1b",\\\\é'
    assert rows == [[str(node), text, "x'00ff'", "", "1.5", "2"] for node in cluster.nodes]


def test_rows_come_as_json(cluster: Cluster) -> None:
    expected = {"t": ODD_TEXT, "b": "x'00ff'", "n": None, "f": 1.5, "f_2": 2}
    assert _rows(cluster, ODD) == [{"node": str(node), **expected} for node in cluster.nodes]
    assert _rows(cluster, "select 1 as g, 2 as g, 3 as g_2, 4 as g") == [
        {"node": str(node), "g": 1, "g_2": 2, "g_2_2": 3, "g_3": 4} for node in cluster.nodes
    ]
    out = cluster.s4("sql", "select 9e999 as x, -9e999 as y", "--json").out

    def no_json(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    rows = json.loads(out, parse_constant=no_json)
    assert [(row["x"], row["y"]) for row in rows] == [("inf", "-inf")] * 3
    answer = cluster.nodes[0].post("/sql", body=b"select 9e999, -9e999, null, 'inf', 1.5").body
    row = json.loads(answer.splitlines()[1], parse_constant=no_json)
    assert row == [math.inf, -math.inf, None, "inf", 1.5]


def test_the_schema_says_what_there_is_to_ask(cluster: Cluster) -> None:
    head, _rule, *rows = cluster.s4("sql", "--schema").lines
    assert [cell.strip() for cell in head.split("|")] == ["table", "column", "type", "meaning"]
    known = [tuple(cell.strip() for cell in row.split(" | ")) for row in rows]
    assert all(len(row) == 4 and row[3] for row in known)
    columns = {(row[0], row[1]) for row in known}
    expected = {("keys", "job"), ("keys", "task"), ("tasks", "peak_memory"), ("stderrs", "stderr")}
    assert expected < columns and ("failed_tasks", "stderr") in columns
    shown = json.loads(cluster.s4("sql", "--schema", "--json").out)
    assert {(row["table"], row["column"]) for row in shown} == columns
    for table in {row[0] for row in known}:
        names = ", ".join(column for owner, column in columns if owner == table)
        cluster.s4("sql", f"select {names} from {table}")


@pytest.mark.parametrize("query", WRITES)
def test_a_query_cannot_change_anything(cluster: Cluster, query: str) -> None:
    with cluster.nothing_changes():
        line = cluster.fails("sql", query, code=1)
    assert any(str(node) in line for node in cluster.nodes)
    for node in cluster.nodes:
        assert not {"copy.db", "other.db"} & {path.name for path in walk(node.folder)}
        assert not list(node.folder.glob("*.db"))
        assert node.rows("pragma user_version") == [(0,)] and node.rows("pragma journal_mode") == [("wal",)]


@pytest.mark.parametrize(
    "query",
    [
        "selec 1",
        "select '",
        "select nothing",
        "select * from nothing",
        "--",
        " ",
        "select ?",
        b"select '\xff'",
    ],
)
def test_a_query_that_makes_no_sense_is_one_line(cluster: Cluster, query: str | bytes) -> None:
    for format in ("table", "json"):
        result = cluster.run("sql", query, "--format", format)
        assert result.code in (1, 2) and result.fatal and result.out == b""


def test_an_endless_query_ends_and_names_the_node(cluster: Cluster) -> None:
    slow = ENDLESS.replace("select sum", "select count(*), sum")
    for query in (ENDLESS, f"{slow} where x < 0"):
        began = time.monotonic()
        line = cluster.fails("sql", query, says="the query took longer than 5 seconds", code=1)
        assert 4.5 < time.monotonic() - began < 8
        assert any(str(node) in line for node in cluster.nodes)


def test_a_text_too_long_for_a_quick_search_is_refused(cluster: Cluster) -> None:
    # Within a function like instr() nothing could end it.
    text = "replace(hex(zeroblob(400000)), '0', 'aa')"
    cluster.fails("sql", f"select instr({text}, {text} || 'b')", says="too big", code=1)


def test_what_is_printed_is_not_wider_than_a_value(cluster: Cluster) -> None:
    for wide in ("'%.*c', 2147483647, 'x'", "'%2000000000d', 1"):  # each would take many seconds, for nothing
        for function in ("printf", "format"):
            columns = ", ".join([f"{function}({wide})"] * 3)
            cluster.fails("sql", f"select {columns}", says="up to five digits", code=1, timeout=10)
    cluster.fails("sql", f"select {', '.join(['1'] * 101)}", says="too many columns", code=1)
    query = "select printf('%05d|%-3s|%.2f %% 1000000', 3, 'a', 0.5) as x"
    lines = cluster.s4("sql", query, "--format", "tsv").lines
    assert lines[1].split("\t")[1] == "00003|a  |0.50 % 1000000"


@pytest.mark.parametrize(
    "query",
    [
        "select length(ltrim(hex(zeroblob(490000)), replace(hex(zeroblob(30000)), '0', '1') || '0'))",
        "select hex(zeroblob(200000)) like '%' || substr(hex(zeroblob(30000)), 1, 49000) || '1'",
        "select hex(zeroblob(200000)) glob '*' || substr(hex(zeroblob(30000)), 1, 49000) || '1'",
    ],
)
def test_a_function_of_long_texts_takes_no_longer_than_a_query_may(cluster: Cluster, query: str) -> None:
    assert cluster.nodes[0].post("/sql", body=query.encode(), timeout=15).status in (200, 400)


def test_trim_is_as_in_sqlite(cluster: Cluster) -> None:
    query = """select trim('  a b '), ltrim('xxyax', 'xy'), rtrim('abab', 'ba'), trim(null), trim('a', null),
        trim(120, 0), trim(x'2041'), trim('a', '')"""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        wanted = list(db.execute(query).fetchone())
    assert json.loads(cluster.nodes[0].post("/sql", body=query.encode()).text.splitlines()[1]) == wanted


def test_there_are_only_so_many_rows(cluster: Cluster) -> None:
    million = NUMBERS.format(1_000_000, "x")
    line = cluster.fails("sql", million, says="more than 100000 rows", code=1)
    assert any(str(node) in line for node in cluster.nodes)
    assert len(cluster.s4("sql", NUMBERS.format(33_333, "x"), "--format", "tsv").lines) == 99_999 + 1
    cluster.fails("sql", NUMBERS.format(33_334, "x"), says="100002 rows", code=1)
    assert len(_rows(cluster, NUMBERS.format(2, "x"), "--limit", "6")) == 6
    cluster.fails(
        "sql", NUMBERS.format(2, "x"), "--limit", "5", says="6 rows, more than the limit of 5", code=1
    )
    cluster.fails("sql", NUMBERS.format(6, "x"), "--limit", "5", says="more than 5 rows", code=1)
    assert len(cluster.s4("sql", NUMBERS.format(40_000, "x"), "--limit", "120000").lines) == 120_002


def test_large_values_do_not_fill_the_memory_of_a_node(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, start=False)
    cluster.nodes[0].start(first="import s4.index.query; s4.index.query.QUERY_SECONDS = 60.0")  # not on trial
    answer = cluster.nodes[0].post("/sql", body=NUMBERS.format(300, "zeroblob(900000)").encode())
    assert answer.status == 200 and len(answer.body) > 300 * 2 * 900_000
    assert procs.peak_megabytes(cluster.nodes[0].pid) < 200


def test_a_command_of_several_lines_is_shown_as_it_was_typed(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000", b"x")
    command = "x='a  b'\n\nprintf '%s\\t' \"$x\"\tz\n"
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", command)
    job = cluster.s4("jobs", "--limit", "1").lines[1].split()[0]
    for words in (("job", job), ("stat", f"{bucket}/out/000")):
        lines = cluster.s4(*words).lines
        [first] = [i for i, line in enumerate(lines) if line.startswith("command:")]
        indent = lines[first].index("x=")
        assert [line[indent:] for line in lines[first : first + 3]] == command.splitlines()


def test_commands_that_are_no_text_are_shown_all_the_same(cluster: Cluster, bucket: str) -> None:
    cluster.put(f"{bucket}/in/000", b"x")
    cluster.s4("map", f"{bucket}/in/", f"{bucket}/out/", b"cat #\xff")
    [row] = _rows(cluster, f"select command from jobs where outdir = '{bucket}/out/' and tasks = 1")
    assert row["command"] == "x'" + b"cat #\xff".hex() + "'"
    assert cluster.s4("stat", f"{bucket}/out/000").lines[-2] == "command:  cat #\\udcff"
    assert cluster.s4("jobs", "--limit", "1").lines[1].endswith("cat #\\udcff")
