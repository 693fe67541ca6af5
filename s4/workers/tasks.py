"""What a worker can be asked to do, and what it answers. Plain data: it crosses between processes.

Descriptors (a listening socket, opened files) travel beside a task, in the order given by its docstring.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Failure:
    """The task failed: `error` is the name of a class in s4.errors, `message` its text."""

    error: str
    message: str


@dataclass(frozen=True)
class StoredFile:
    """Finished bytes at `file`: `size` in bytes and their checksum. `name` tells outputs apart.

    What does not become a key of this node has an empty checksum: the output of an eval, and that which
    belongs to another node, for it is hashed when it is sent there.
    """

    file: str
    size: int
    checksum: str
    name: str = ""


@dataclass(frozen=True)
class Receive:
    """Accept one connection from `peer` and write what comes to `files`, one after the other.

    `sizes` in bytes; a single file may have None: all until the sender closes. Descriptors: the listening
    socket. Answers Received.
    """

    files: list[str]
    sizes: list[int | None]
    peer: str


@dataclass(frozen=True)
class Received:
    """What arrived, file by file."""

    files: list[StoredFile]


@dataclass(frozen=True)
class Send:
    """Send opened files one after the other, to a connection from `peer`, or to its port `port` if given.

    Descriptors: the listening socket unless `port` is given, then the files. Answers None.
    """

    sizes: list[int]
    peer: str
    port: int | None


@dataclass(frozen=True)
class Destination:
    """Where the outputs of a map-to-n go: `folder`, a path that ends in '/', in a ring of `servers`, of which
    this node is at `position`."""

    folder: str
    servers: int
    position: int


@dataclass(frozen=True)
class Command:
    """Run a bash command.

    `folder` is its own, empty at first, and gone afterwards; `work` is the beginning of the paths of its
    finished outputs. Input: the file `stdin`, or the lines of `input_lines`. Answers Ran.

    `collect` says what becomes of its output: "stdout" (one file), "eval" (stdout and stderr, whatever the
    exit code), or a Destination for the files that stdout names. `stdout_bytes` is how much the command may
    print, as far as one can know before: disk space is reserved for so much.
    """

    command: str
    folder: str
    work: str
    collect: str | Destination
    stdin: str | None = None
    input_lines: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    stdout_bytes: int = 0


@dataclass(frozen=True)
class Ran:
    """How a command ended. `exitcode` as bash reports it (128 + signal for a killed command).

    `problem` says what is wrong with the outputs of a command that ended well. `stderr` is, of an eval, the
    whole file; `tail` its last bytes. `cpu_seconds` and `peak_memory` (bytes) are those of shell.Usage.
    """

    exitcode: int
    outputs: list[StoredFile]
    stderr: StoredFile | None
    tail: bytes
    cpu_seconds: float
    peak_memory: int
    problem: str = ""


@dataclass(frozen=True)
class Push:
    """Store finished files on another node, as one batch, as outputs of tasks of `job`, and remove them here.

    Answers Pushed.
    """

    server: str
    fingerprint: str
    job: str
    entries: list[tuple[str, StoredFile, int]]  # (path of the key, bytes, number of the task)
    timeout: float


@dataclass(frozen=True)
class Pushed:
    """Per entry None, or why the other node refused it: the name of a class in s4.errors, and its text."""

    refused: list[Failure | None]


@dataclass(frozen=True)
class Checksum:
    """Make files read-only and compute their checksums. Answers Checksums."""

    files: list[str]


@dataclass(frozen=True)
class Checksums:
    """Per file (bytes, checksum, seconds since 1970 of its last change), or why it cannot be read."""

    found: list[tuple[int, str, int] | str]


Task = Receive | Send | Command | Push | Checksum
Result = Received | Ran | Pushed | Checksums | Failure | None
