"""A real cluster on loopback: nodes, commands, the bare HTTP interface, and the proof that nothing is left.

Every process of a cluster works below its folder or has the folder in its environment, so that whatever
survives a test is found in /proc, ended and reported.
"""

import contextlib
import http.client
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import quote, urlencode

import procs
import xxhash
from procs import eventually
from reference import checksum_of, name_of, owner_of

from s4.workers.processes import die_with_parent

BIN = Path(sys.executable).parent
S4 = str(BIN / "s4")
SERVER = str(BIN / "s4-server")
START_SECONDS = 30
STOP_SECONDS = 5  # what a node may take after a SIGTERM
TIMEZONE = "TST-05:30"  # far from UTC, so that a listing in UTC is noticed

# An address and a range of ports that no other test process has, below those that the kernel hands out.
HOST = f"127.{64 + (os.getpid() >> 16) % 64}.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
_ports = iter(range(20000, 32000))
_buckets = itertools.count(1)

# Starts a program without root's right to read and write everything, so that modes count, for root too.
UNPRIVILEGED = (
    sys.executable,
    "-c",
    """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, see capabilities(7)
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.argv[1], sys.argv[1:])
""",
)


def free_port(host: str = HOST) -> int:
    for port in _ports:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


@dataclass(frozen=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.decode().splitlines()

    @property
    def fatal(self) -> str:
        """The one line of an error, after a check that it is one; above it a line for each thing that failed.

        What a job said before does not belong to it.
        """
        assert self.code in (1, 2, 3), f"exit {self.code}\n{self.err}"
        *others, last = self.err.splitlines()
        assert last.startswith("fatal: ") and self.err.endswith("\n"), self.err
        failed = [line for line in others if not line.startswith("job ")]
        assert all(line.startswith("failed: ") for line in failed), f"not one line:\n{self.err}"
        return "\n".join([*failed, last])


class Node:
    """One `s4-server` in a folder of its own."""

    def __init__(self, cluster: "Cluster", index: int, host: str, port: int) -> None:
        self.cluster, self.index, self.host, self.port = cluster, index, host, port
        self.folder = cluster.root / f"node{index}"
        self.data = self.folder / "s4_data"
        self.log_path = self.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.folder.mkdir(exist_ok=True)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def launch(
        self, *options: str, bare: bool = False, files_up_to: int | None = None, first: str = ""
    ) -> None:
        """Start the server without waiting.

        `bare`: without the usual options. `files_up_to`: bytes that fit into a file, as on a full disk.
        `first`: Python code that the process of the node runs before all else, to lower a limit, say.
        """
        place = [] if bare else ["-port", str(self.port), "-conf", str(self.cluster.conf)]
        changed = [sys.executable, "-c", f"{first}\nfrom s4.server import main\nmain()"]

        def prepare() -> None:
            die_with_parent()  # a Ctrl-C ends pytest's own processes without their fixtures
            if files_up_to is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (files_up_to, files_up_to))

        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*(changed if first else [SERVER]), *place, *self.cluster.options, *options],
                cwd=self.folder,
                env=self.cluster.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=prepare,
            )
        self.cluster.processes.append(self.process)

    def start(
        self, *options: str, bare: bool = False, files_up_to: int | None = None, first: str = ""
    ) -> None:
        self.launch(*options, bare=bare, files_up_to=files_up_to, first=first)
        self.wait_healthy()

    def wait_healthy(self) -> None:
        def healthy() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, (
                f"node ended with {self.process.returncode}:\n{self.log[-3000:]}"
            )
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.get("/health", timeout=1).status == 200
            return False

        eventually(healthy, START_SECONDS, f"node {self} healthy")

    def terminate(self, within: float = STOP_SECONDS) -> int:
        """SIGTERM; the exit code. Fails if the node takes longer than it may."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(within)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.cluster.killed = True

    def workers(self) -> list[procs.Process]:
        """The worker processes: forked by the fork server, which the node started."""
        below = procs.descendants(self.pid)
        helpers = {process.pid for process in below if process.parent == self.pid}
        return [process for process in below if process.is_python and process.parent in helpers]

    def worker_of(self, pid: int) -> int:
        """The worker above a process that a command started."""
        parents = {process.pid: process.parent for process in procs.everyone()}
        workers = {process.pid for process in self.workers()}
        while pid not in workers:
            pid = parents[pid]
        return pid

    def request(
        self,
        method: str,
        path: str,
        params: Mapping[str, object],
        body: bytes = b"",
        timeout: float = 60,
    ) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        query = urlencode(dict(params), quote_via=quote, errors="surrogateescape")
        try:
            connection.request(method, f"{path}?{query}" if query else path, body)
            response = connection.getresponse()
            return Answer(response.status, response.read(), dict(response.headers))
        finally:
            connection.close()

    def get(self, path: str, *, timeout: float = 60, **params: object) -> Answer:
        return self.request("GET", path, params, timeout=timeout)

    def post(self, path: str, *, body: bytes = b"", timeout: float = 60, **params: object) -> Answer:
        return self.request("POST", path, params, body, timeout)

    def post_json(self, path: str, value: object, *, timeout: float = 60) -> Answer:
        return self.request("POST", path, {}, json.dumps(value).encode(), timeout)

    def prepare_put(self, key: str) -> tuple[str, int]:
        """The uuid of a put and the port where its bytes go."""
        return _uuid_and_port(self.post("/prepare_put", key=key))

    def prepare_get(self, key: str) -> tuple[str, int]:
        """The uuid of a get and the port where its bytes come from."""
        return _uuid_and_port(self.post("/prepare_get", key=key))

    def dial(self, port: int) -> socket.socket:
        return socket.create_connection((self.host, port), timeout=60)

    def send(self, port: int, data: bytes) -> None:
        with self.dial(port) as connection:
            connection.sendall(data)

    def receive(self, port: int) -> bytes:
        with self.dial(port) as connection:
            return read_to_end(connection)

    def confirm_put(self, uuid: str, data: bytes) -> Answer:
        return self.post("/confirm_put", uuid=uuid, checksum=checksum_of(data))

    def put(self, key: str, data: bytes = b"") -> Answer:
        """Put a key as the specification says; the answer is that of the first step that is not 200."""
        prepared = self.post("/prepare_put", key=key)
        if prepared.status != 200:
            return prepared
        uuid, port = _uuid_and_port(prepared)
        self.send(port, data)
        return self.confirm_put(uuid, data)

    def fetch(self, key: str) -> bytes:
        uuid, port = self.prepare_get(key)
        data = self.receive(port)
        confirmed = self.post("/confirm_get", uuid=uuid, checksum=checksum_of(data))
        assert confirmed.status == 200, confirmed
        return data

    def listing(self, prefix: str, *, recursive: bool = True) -> list[list[str]]:
        answer = self.get("/list", prefix=prefix, recursive=str(recursive).lower())
        assert answer.status == 200, answer
        rows: list[list[str]] = answer.json()
        return rows

    def path_of(self, key: str) -> Path:
        return self.data / key.removeprefix("s4://")

    def temporary(self) -> list[Path]:
        """What arrives or is being made and is not yet a key, and the folders of commands that run."""
        places = ("_tempfiles/*", "_tempdirs/*", "_run/*/arriving", "_run/*/stdout")
        return [path for place in places for path in self.data.glob(place)]

    def rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Ask the index, as somebody with sqlite3 would."""
        file = f"file:{quote(str(self.data / '_index' / 'node.db'))}?mode=ro"
        with contextlib.closing(sqlite3.connect(file, uri=True, timeout=30)) as db:
            return db.execute(sql, parameters).fetchall()

    def check(self) -> None:
        """Rows and files agree on keys, sizes and checksums; all are read-only; nothing half-made is left."""
        eventually(lambda: not self.temporary(), 15, f"{self}: temporary files gone")
        files: dict[str, tuple[int, str]] = {}
        for path in walk(self.data):
            below = path.relative_to(self.data)
            if below.parts[0].startswith("_") or path.is_dir():
                continue
            status = path.lstat()
            assert stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o444, path
            files[str(below)] = (status.st_size, file_checksum(path))
        rows = {
            path: (size, checksum)
            for path, size, checksum in self.rows("select path, size, checksum from keys")
        }
        assert rows == files


def _uuid_and_port(answer: Answer) -> tuple[str, int]:
    assert answer.status == 200, answer
    uuid, port = answer.text.split()
    return uuid, int(port)


def read_to_end(connection: socket.socket) -> bytes:
    blocks = []
    while block := connection.recv(1 << 18):
        blocks.append(block)
    return b"".join(blocks)


def file_checksum(path: Path) -> str:
    digest = xxhash.xxh64()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return format(digest.intdigest(), "x")


class Cluster:
    """Nodes with one conf, and a shell's view of them. A context manager that leaves nothing behind.

    At its end it stops the nodes and fails if one does not stop in time, if a process survives, if a log
    holds a traceback, or (`check=True`) if rows and files of a node do not agree.
    """

    def __init__(
        self,
        nodes: int = 3,
        options: Sequence[str] = (),
        *,
        hosts: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        start: bool = True,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="s4-test-"))
        self.options, self.checked, self._start = list(options), check, start
        self.processes: list[subprocess.Popen[bytes]] = []
        self.killed = False  # a killed process cannot tidy up the folder for temporary files
        self.conf = self.root / "conf"
        self.work = self.root / "work"
        self.temporary = self.root / "tmp"
        home = self.root / "home"
        for folder in (self.work, self.temporary, home):
            folder.mkdir()
        ours = ("S4_", "PYTHONUNBUFFERED")  # as users have it: what is printed is buffered
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.env |= {
            "HOME": str(home),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "S4_CONF_PATH": str(self.conf),
            "TMPDIR": str(self.temporary),
            "TZ": TIMEZONE,
            **(env or {}),
        }
        self.nodes = [Node(self, i, host, free_port(host)) for i, host in enumerate(hosts or [HOST] * nodes)]
        self.conf.write_text("".join(f"{node}\n" for node in self.nodes))

    def __enter__(self) -> "Cluster":
        try:
            if self._start:
                for node in self.nodes:
                    node.launch()
                for node in self.nodes:
                    node.wait_healthy()
        except BaseException:
            self._end_everything()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            for node in self.nodes if kind is not None else ():
                if node.process is not None:
                    print(f"{node}, exit code {node.process.poll()}: {node.log[-2000:]}")
        finally:
            self._end_everything()

    def _finish(self) -> None:
        running = [node for node in self.nodes if node.process is not None and node.process.poll() is None]
        if self.checked:
            for node in running:
                node.check()
        for node in running:
            os.kill(node.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for node in running:
            assert node.process is not None
            assert node.process.wait(max(0.1, deadline - time.monotonic())) == 0, node.log[-3000:]
        eventually(lambda: not procs.touching(self.root), 5, f"no process left in {self.root}")
        if not self.killed:
            assert sorted(map(str, self.temporary.rglob("*"))) == []
        for node in self.nodes:
            before, _found, trace = node.log.partition("Traceback")
            assert not trace, before[-1000:] + trace[:3000]

    def _end_everything(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        deadline = time.monotonic() + 10
        while (left := procs.touching(self.root)) and time.monotonic() < deadline:
            for survivor in left:
                procs.kill(survivor.pid)
            time.sleep(0.05)
        for process in self.processes:
            process.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def owner(self, key: str) -> Node:
        return self.nodes[owner_of(name_of(key), len(self.nodes))]

    def fresh_bucket(self) -> str:
        """A bucket that no other test uses, as `s4://NAME`."""
        return f"s4://bucket-{next(_buckets)}"

    def put(self, key: str, data: bytes = b"") -> None:
        answer = self.owner(key).put(key, data)
        assert answer.status == 200, (key, answer)

    def put_all(self, keys: Mapping[str, bytes]) -> None:
        for key, data in keys.items():
            self.put(key, data)

    def get(self, key: str) -> bytes:
        return self.owner(key).fetch(key)

    def keys(self, prefix: str) -> list[str]:
        """All keys that start with the prefix, as `s4://…`, in order."""
        bucket = "/".join(prefix.split("/")[:3])
        return sorted(f"{bucket}/{row[3]}" for node in self.nodes for row in node.listing(prefix))

    def contents(self, prefix: str) -> dict[str, bytes]:
        """The keys below a prefix, relative to it, with their data."""
        return {key.removeprefix(prefix): self.get(key) for key in self.keys(prefix)}

    def start_s4(
        self,
        *arguments: str | bytes,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] = subprocess.PIPE,
        stderr: int | IO[bytes] = subprocess.PIPE,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = (S4,),
        before: Callable[[], None] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own."""
        process = subprocess.Popen(
            [*program, *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd or self.work,
            env=self.env | dict(env or {}),
            start_new_session=True,
            preexec_fn=before,
        )
        self.processes.append(process)
        return process

    def run(
        self,
        *arguments: str | bytes,
        data: bytes | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        program: Sequence[str] = (S4,),
        before: Callable[[], None] | None = None,
    ) -> Result:
        """Run a command to its end, whatever that is."""
        stdin = subprocess.DEVNULL if data is None else subprocess.PIPE
        process = self.start_s4(*arguments, stdin=stdin, cwd=cwd, env=env, program=program, before=before)
        try:
            out, err = process.communicate(data, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{arguments} took longer than {timeout} s\n{out!r}\n{err!r}") from None
        result = Result(process.returncode, out, err.decode(errors="replace"))
        if not (env or {}).get("S4_DEBUG"):
            assert "Traceback" not in result.err, result.err
        return result

    def s4(
        self,
        *arguments: str | bytes,
        data: bytes | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> Result:
        """Run an `s4` command that has to succeed."""
        result = self.run(*arguments, data=data, cwd=cwd, env=env, timeout=timeout)
        assert result.code == 0, f"s4 {arguments} exited {result.code}\n{result.out!r}\n{result.err}"
        return result

    def fails(
        self,
        *arguments: str | bytes,
        says: str = "",
        code: int | None = None,
        data: bytes | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        privileged: bool = True,
        before: Callable[[], None] | None = None,
    ) -> str:
        """Run an `s4` command that has to fail with one clear line, which is returned and holds `says`."""
        program = (S4,) if privileged else (*UNPRIVILEGED, S4)
        result = self.run(
            *arguments, data=data, cwd=cwd, env=env, timeout=timeout, program=program, before=before
        )
        assert result.fatal and says in result.fatal, f"{says!r} is not in {result.fatal!r}"
        assert code in (None, result.code), f"exit {result.code}: {result.fatal}"
        return result.fatal

    @contextlib.contextmanager
    def nothing_changes(self) -> Iterator[None]:
        """Whatever happens inside makes and removes no key, file or folder on any node."""
        before = self._state()
        yield
        assert self._state() == before

    def _state(self) -> list[tuple[str, list[str]]]:
        state = []
        for node in self.nodes:
            eventually(lambda node=node: not node.temporary(), 15, f"{node}: temporary files gone")  # type: ignore[misc]
            below = (
                path for path in walk(node.data) if not path.relative_to(node.data).parts[0].startswith("_")
            )
            keys = [row[0] for row in node.rows("select path from keys")]
            state.append((str(node), sorted([*map(str, below), *keys])))
        return state


def walk(folder: Path) -> Iterator[Path]:
    """All below a folder. Unlike Path.rglob it bears that some of it goes meanwhile, as with a worker."""
    for root, folders, files in os.walk(folder):
        yield from (Path(root, name) for name in [*folders, *files])


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if not path.is_dir()
    }


def write_tree(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
