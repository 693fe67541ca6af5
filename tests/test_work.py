"""Counts, not times: what makes commands slow is counted, so that it shows on any machine.

Start-up is most of a short command, and imports are most of the start.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import procs
import pytest
from cluster import Cluster, write_tree

from s4.index import Database, JobIndex, JobRow, KeyIndex, NewKey, NewTask
from s4.storage import Storage

# The script that pip makes of it does this, and depending on pip imports `re` before.
S4 = ("-c", "from s4.cli import main; main()")
# Besides what Python imports for itself: 42 with 3.11, 43 with 3.13. One more is 0.2 to 3 ms: look for
# another way before you raise it.
MOST_FOR_SERVERS = 43
# Easily taken along, and 1 to 40 ms each.
NEVER = {
    "argparse",
    "ast",
    "asyncio",
    "dataclasses",
    "dis",
    "email",
    "falcon",
    "fire.console.console_io",
    "fire.docstrings",
    "fire.helptext",
    "gettext",
    "hashlib",
    "http",
    "http.client",
    "json",
    "linecache",
    "locale",
    "logging",
    "multiprocessing",
    "pathlib",
    "platform",
    "queue",
    "random",
    "re",
    "s4.api",
    "s4.node",
    "sh",
    "shutil",
    "signal",
    "socket",
    "sqlite3",
    "sqlite_utils",
    "ssl",
    "subprocess",
    "tempfile",
    "tokenize",
    "tqdm",
    "typing",
    "urllib.parse",
    "waitress",
}
MOVES_NO_BYTES = {"xxhash", "s4.streams", "s4.copying", "s4.exchange"}


def _imported(env: dict[str, str], *command: str) -> set[str]:
    """The modules that a Python program imports, from the first on."""
    argv = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines[1:]}


@pytest.fixture(scope="module")
def bare() -> set[str]:
    """The modules of a Python that does nothing."""
    return _imported({}, "-c", "pass")


def test_the_servers_are_shown_with_few_modules(cluster: Cluster, bare: set[str]) -> None:
    found = _imported(cluster.env, *S4, "servers") - bare
    assert {"fire", "inspect", "s4.cli", "s4.client"} <= found
    assert len(found) <= MOST_FOR_SERVERS, sorted(found)
    assert not found & (NEVER | MOVES_NO_BYTES | {"contextlib", "threading"})


@pytest.mark.parametrize(
    ("command", "besides"),
    [
        ("health", MOVES_NO_BYTES | {"contextlib"}),
        ("ls BUCKET/", MOVES_NO_BYTES | {"contextlib", "threading"}),
        ("ls -r BUCKET/", MOVES_NO_BYTES | {"contextlib", "threading"}),
        ("eval BUCKET/000 cat", MOVES_NO_BYTES | {"contextlib", "threading"}),
        ("cp FILE BUCKET/new", {"datetime"}),
        ("cp BUCKET/000 -", {"datetime"}),
        ("cp -r BUCKET/ OUT/", {"datetime"}),
        ("rm BUCKET/001", MOVES_NO_BYTES | {"contextlib", "threading"}),
        ("map BUCKET/ BUCKETout/ cat", MOVES_NO_BYTES | {"contextlib", "datetime", "fnmatch"}),
    ],
)
def test_a_command_imports_nothing_large_that_it_does_not_use(
    cluster: Cluster, bucket: str, bare: set[str], folder: Path, command: str, besides: set[str]
) -> None:
    (folder / "file").write_bytes(b"x" * 10_000)
    cluster.put_all({f"{bucket}/000": b"x", f"{bucket}/001": b"x"})
    for name, value in {"BUCKET": bucket, "FILE": f"{folder}/file", "OUT": f"{folder}/out"}.items():
        command = command.replace(name, value)
    found = _imported(cluster.env, *S4, *command.split()) - bare
    assert "s4.client" in found
    assert not found & (NEVER | besides)


@contextmanager
def _requests(cluster: Cluster) -> Iterator[Counter[str]]:
    """How often each kind of request was made inside, on all nodes; filled in at the end."""
    before = [len(node.log) for node in cluster.nodes]
    counted: Counter[str] = Counter()
    yield counted
    for node, start in zip(cluster.nodes, before, strict=True):
        lines = [line.split() for line in node.log[start:].splitlines()]
        counted.update(words[4].partition("?")[0] for words in lines if words[2] == "s4.http")


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    """A cluster that no other test talks to at the same time."""
    with Cluster(3, ["--max-cpu-jobs", "4"]) as cluster:
        yield cluster


def test_many_small_files_are_copied_in_few_round_trips(three: Cluster) -> None:
    write_tree(three.work, {f"small/{i:04}": b"x" * 100 for i in range(1000)})
    with _requests(three) as put:
        three.s4("cp", "-r", "small/", "s4://b/small/")
    # 334 files a node are two batches, each with one request to prepare it and one to confirm it.
    assert put == {"/prepare_puts": 6, "/confirm_puts": 6}
    with _requests(three) as got:
        three.s4("cp", "-r", "s4://b/small/", "copy/")
    assert got == {"/list": 3, "/prepare_gets": 6}
    with _requests(three) as removed:
        three.s4("rm", "-r", "s4://b/small/")
    assert removed == {"/delete": 3}


def test_a_shuffle_speaks_with_nodes_and_not_for_files(three: Cluster) -> None:
    three.put_all({f"s4://b/in/{i:03}": b"" for i in range(12)})
    for files in (10, 100):
        command = f"for i in $(seq -w {files}); do echo > $i; echo $i; done"
        with _requests(three) as sent:
            three.s4("map-to-n", "s4://b/in/", f"s4://b/out{files}/", command)
        assert len(three.keys(f"s4://b/out{files}/")) == 12 * files
        # Each node to each other, a batch for 100 files or so, and what gathers for a fifth of a second.
        assert 6 <= sent["/prepare_puts"] == sent["/confirm_puts"] <= 6 * (2 + 4 * files // 100), sent
        assert sent["/map_to_n"] == sent["/health"] == 3 and sent.total() < 60 + sent["/prepare_puts"] * 2


def test_the_outputs_of_a_shuffle_are_read_once(three: Cluster) -> None:
    size = 1 << 20
    three.put("s4://b/one/000")
    three.s4("map-to-n", "s4://b/one/", "s4://b/warm/", "echo > 0; echo 0")
    before = _read_bytes(three)
    command = f"for i in {{000..029}}; do head -c {size} /dev/zero > $i; echo $i; done"
    three.s4("map-to-n", "s4://b/one/", "s4://b/large/", command)
    assert 30 * size <= _read_bytes(three) - before < 36 * size, "to be hashed and sent"


def _read_bytes(cluster: Cluster) -> int:
    """What the nodes and their workers have read from files so far."""
    own = [p.pid for node in cluster.nodes for p in procs.descendants(node.pid) if p.is_python]
    return sum(procs.read_bytes(pid) for pid in [*own, *(node.pid for node in cluster.nodes)])


def test_commands_share_a_few_shells(three: Cluster) -> None:
    three.put_all({f"s4://b/many/{i:03}": b"" for i in range(90)})
    three.s4("map", "s4://b/many/", "s4://b/shells/", "echo $$")
    for position, node in enumerate(three.nodes):
        shells = {three.get(f"s4://b/shells/{i:03}") for i in range(position, 90, 3)}
        assert len(shells) <= 4, f"{node}: a new bash for each command costs three times as much"


def test_new_files_are_made_where_few_were_removed(three: Cluster) -> None:
    key = "s4://apart/folder/000"
    three.put(key)
    node = three.owner(key)
    run = node.data / "_run"
    made = three.s4("eval", key, "readlink /proc/self/fd/1").lines
    assert Path(made[0]).parent.parent == run and Path(made[0]).parent.name.startswith("worker-")
    if not shutil.which("lsattr") or not _output("stat", "-f", "-c", "%T", run).startswith("ext"):
        pytest.skip("only ext4 has the attribute T")
    for folder in (run, node.data / "apart"):
        assert "T" in _output("lsattr", "-d", folder).split()[0], folder


@pytest.mark.parametrize("job", ["map", "map-from-n"])
@pytest.mark.parametrize("printed", [0, 2, 5_000_000], ids=["nothing", "less", "more"])
def test_disk_space_is_reserved_for_an_output_and_given_back(three: Cluster, job: str, printed: int) -> None:
    size = 3_000_000
    folder, key = f"s4://b/{job}-{printed}/", f"s4://b/{job}-{printed}-out/000_x"
    three.put(f"{folder}000_x", bytes(size))
    look = "stat -L -c '%s %b' /proc/$BASHPID/fd/1 >&2"
    three.s4(job, folder, key.removesuffix("000_x"), f"{look}; head -c {printed} /dev/zero")
    node = three.owner(key)
    path = key.removeprefix("s4://")
    [(said,)] = node.rows("SELECT stderr FROM stderrs JOIN keys USING (job) WHERE path = ?", path)
    at_first, blocks = map(int, said.split())
    assert at_first == 0
    if _can_reserve(node.data):
        assert 512 * blocks >= size, "no space is reserved"
    found = node.path_of(key).stat()
    assert found.st_size == printed
    assert 512 * found.st_blocks <= printed + 64 * 1024, "space stays reserved"


def _can_reserve(folder: Path) -> bool:
    """Whether the file system can, and there is a command to find out."""
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        command = ("fallocate", "--keep-size", "--length", "4096", probe.name)
        return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True).returncode == 0


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _transactions(database: Database, action: Callable[[], object]) -> int:
    statements: list[str] = []
    with database.write() as db:
        db.set_trace_callback(statements.append)
    action()
    with database.write() as db:
        db.set_trace_callback(None)
    return sum(1 for sql in statements if sql.startswith("BEGIN")) - 1


def test_a_batch_is_one_transaction(folder: Path) -> None:
    database = Database(str(folder / "node.db"))
    keys, jobs = KeyIndex(database, list[str]().extend), JobIndex(database)
    batch = [NewKey(f"b/{i}", 1, "0", "job", i) for i in range(200)]
    assert _transactions(database, lambda: keys.add(batch, lambda _i: None)) == 1
    # Rows, then files; and a look that finds nothing more.
    assert _transactions(database, lambda: keys.remove_prefix("b/")) == 3
    jobs.begin(JobRow("job", "map", "s4://b/", "s4://c/", "cat"))
    tasks = [NewTask(i, f"b/{i}", 1, 1) for i in range(1000)]
    assert _transactions(database, lambda: jobs.add_tasks("job", tasks)) == 1
    assert _transactions(database, lambda: jobs.end("job", "cancelled", None)) <= 3
    database.close()


def test_a_batch_is_looked_up_in_a_few_statements(folder: Path) -> None:
    database = Database(str(folder / "node.db"))
    keys = KeyIndex(database, list[str]().extend)
    counts = set()
    for size in (1, 200):
        paths = [f"b/{size}/{i // 10}/{i}" for i in range(size)]
        statements = list[str]()
        with database.read() as read, database.write() as write:
            read.set_trace_callback(statements.append)
            write.set_trace_callback(statements.append)
        keys.conflicts([(path, 7) for path in paths], "j")
        keys.get_all(paths)
        batch = [NewKey(path, 1, "0", "j", 7) for path in paths]
        keys.add(batch, lambda _i: None)
        counts.add(sum(1 for sql in statements if sql.split()[0] == "SELECT"))
    assert len(counts) == 1 and counts.pop() < 10
    database.close()


def test_the_folder_of_many_outputs_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(folder / "data"))
    opened: list[object] = []
    really = os.open

    def spy(path: str, *arguments: Any, **options: Any) -> int:
        opened.append(path)
        return really(path, *arguments, **options)

    monkeypatch.setattr(os, "open", spy)
    with storage.placing() as place:
        for i in range(100):
            made = Path(storage.temporary_file(str(i)))
            made.touch()
            place(str(made), f"b/folder/{i // 50}/{i}")
    monkeypatch.undo()
    assert len(list(storage.walk())) == 100
    # Each of the three folders above a key when it is made, and again for the second.
    assert len([path for path in opened if not str(path).startswith("/")]) < 15, opened
    storage.close()
