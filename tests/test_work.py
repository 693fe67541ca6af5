"""Counts, not times: what makes commands slow is counted, so that it shows on any machine.

Start-up is most of a short command, and imports are most of the start.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import procs
import pytest
from cluster import HOST, Cluster, free_port, write_tree
from reference import checksum_of

from s4.config import Conf, Server
from s4.index import Database, JobIndex, JobRow, KeyIndex, NewKey, NewTask
from s4.node import Limits, Node
from s4.storage import Storage
from s4.transfers import Finished
from s4.workers import shell, transfers
from s4.workers.commands import Commands
from s4.workers.scratch import Scratch
from s4.workers.tasks import Command, Receive, StoredFile

# The script that pip makes of it does this, and depending on pip imports `re` before.
S4 = ("-c", "from s4.cli import main; main()")
# Besides what Python imports for itself: 42 with 3.11, 43 with 3.13. One more is 0.2 to 3 ms: look for
# another way before you raise it.
MOST_FOR_SERVERS = 43
# Calls of the system by a worker for a command, without those of bash.
MOST_FOR_COMMAND = 32
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


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("cp FILE s4://b/single/new", {"/prepare_put": 1, "/confirm_put": 1}),
        ("cp s4://b/single/000 -", {"/prepare_get": 1, "/confirm_get": 1}),
        ("eval s4://b/single/000 cat", {"/eval": 1}),
        ("rm s4://b/single/001", {"/delete": 1}),
        ("ls s4://b/single/", {"/list": 3}),
        ("ls -r s4://b/single/", {"/list": 3}),
        ("health", {"/health": 3}),
        ("servers", {}),
    ],
)
def test_a_command_makes_no_request_that_it_could_do_without(
    three: Cluster, command: str, expected: dict[str, int]
) -> None:
    three.run("rm", "-r", "s4://b/single/")
    three.put_all({"s4://b/single/000": b"x", "s4://b/single/001": b"x"})
    write_tree(three.work, {"FILE": b"x"})
    with _requests(three) as made:
        three.s4(*command.split())
    assert made == expected


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


def test_a_command_is_one_process_below_a_kept_shell(three: Cluster) -> None:
    """A program with plain arguments is the subshell of its task, anything else runs in it."""
    three.put_all({f"s4://b/tree/{i:03}": b"" for i in range(12)})
    three.s4("map", "s4://b/tree/", "s4://b/plain/", "cat /proc/self/stat")
    three.s4("map", "s4://b/tree/", "s4://b/line/", "cat /proc/$BASHPID/stat; true")
    for node in three.nodes:
        below = procs.descendants(node.pid)
        workers = {process.pid for process in below if process.is_python}
        kept = {process.pid for process in below if process.parent in workers and not process.is_python}
        for i in range(three.nodes.index(node), 12, 3):
            for outdir in ("plain", "line"):
                parent = int(three.get(f"s4://b/{outdir}/{i:03}").rpartition(b")")[2].split()[1])
                assert parent in kept, f"a task of s4://b/{outdir}/ costs another fork"


class _Calls:
    """Counts what this process asks of the operating system by the functions of `os`."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        for name, function in list(vars(os).items()):
            if isinstance(function, types.BuiltinFunctionType) and name not in ("fspath", "getpid"):
                setattr(os, name, self._counting(name, function))

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            self.counted[name] += 1
            return function(*arguments, **options)

        return counting

    def of(self, action: Callable[[], object]) -> Counter[str]:
        """What one action asks."""
        before = self.counted.copy()
        action()
        return self.counted - before


def _alone(what: str, folder: Path) -> Any:
    """What a function of this file prints, in a process of its own, for it ends children that it finds."""
    start = "import sys; sys.path.insert(0, sys.argv[1]); import test_work; getattr(test_work, sys.argv[2])()"
    argv = [sys.executable, "-c", start, str(Path(__file__).parent), what]
    done = subprocess.run(argv, cwd=folder, stdout=subprocess.PIPE, timeout=60, check=True)
    return json.loads(done.stdout)


def count_calls_of_commands() -> None:
    """Two commands of different kinds, each after one like it."""
    here = os.getcwd()
    for name in ("run", "dirs", "files"):
        os.mkdir(name)
    write_tree(Path(here), {"input": b"x"})
    commands = Commands(Scratch(f"{here}/run", os.getpid()))
    shell._SAMPLE_SECONDS = 60.0, 60.0  # looks at memory are more, the longer a command takes
    calls = _Calls()
    made = []
    for i, line in enumerate(("cat", "cat", "cat; true", "cat; true")):
        task = Command(line, f"{here}/dirs/{i}", f"{here}/files/{i}", "stdout", f"{here}/input")
        made.append(calls.of(partial(commands.run, task)))
    print(json.dumps(made[1::2]))
    commands._shell._stop()


def test_a_command_takes_few_system_calls_of_its_worker(folder: Path) -> None:
    for made in _alone("count_calls_of_commands", folder):
        assert sum(made.values()) <= MOST_FOR_COMMAND, made
        assert not made.keys() & {"fsync", "fdatasync", "fork", "posix_spawn", "waitpid"}, made


def _dialled(port: int) -> socket.socket:
    return socket.create_connection((HOST, port), source_address=(HOST, 0))


def count_calls_of_received_files() -> None:
    """Of batches with 100 and with 200 files."""
    calls = _Calls()
    made = []
    for count in (100, 200):
        names = [f"{os.getcwd()}/{count}-{i}" for i in range(count)]
        with socket.create_server((HOST, 0)) as listener, _dialled(listener.getsockname()[1]) as sender:
            sender.sendall(bytes(10 * count))
            fds = [os.dup(listener.fileno())]
            task = Receive(names, [10] * count, HOST)
            made.append(calls.of(partial(transfers.receive, task, fds, "arriving")))
    print(json.dumps(made[1] - made[0]))


def test_a_received_file_takes_few_system_calls(folder: Path) -> None:
    made = _alone("count_calls_of_received_files", folder)
    each = {"open", "write", "fchmod", "close", "rename"}
    assert made == dict.fromkeys(each, 100)


def count_calls_of_a_look_at_a_key() -> None:
    """For its file and its size."""
    storage = Storage("data")
    write_tree(Path("data"), {"b/folder/below/000": b"x"})
    calls = _Calls()
    print(json.dumps(calls.of(lambda: storage.locate("b/folder/below/000"))))


def test_the_file_of_a_key_is_found_in_four_system_calls(folder: Path) -> None:
    made = _alone("count_calls_of_a_look_at_a_key", folder)
    assert made == dict.fromkeys(("open", "readlink", "fstat", "close"), 1)


def count_transactions_of_a_node() -> None:
    """Of a batch of 200 outputs, of a put, and of a job with 40 tasks."""
    conf = Conf((Server(HOST, free_port()),), "")
    node = Node(conf, 0, HOST, "data", Limits(4, 4, 60, 10, 1))
    files = [StoredFile(node.storage.temporary_file(str(i)), 0, "0") for i in range(200)]
    for file in files:
        Path(file.file).touch()
    finished = [Finished(f"b/in/{i:03}", file) for i, file in enumerate(files)]
    batch = _transactions(node.database, lambda: node.transfers.publish(finished))

    def put() -> None:
        prepared = node.transfers.prepare_put([("b/x", None, None)], HOST)
        with _dialled(prepared.port) as sender:
            sender.sendall(b"x")
        assert node.transfers.confirm_put(prepared.uuid, [checksum_of(b"x")]) == [None]

    single = _transactions(node.database, put)
    print(json.dumps([batch, single]))
    node.stop()


def test_a_batch_and_a_put_take_few_transactions_of_their_node(folder: Path) -> None:
    """The put's: that it began; and its key, which ends it."""
    assert _alone("count_transactions_of_a_node", folder) == [1, 2]


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
