"""The error tree. All that s4 raises on purpose is an S4Error, whose text is the one line a user sees."""

# Exit codes of the `s4` command.
EXIT_FAILED = 1
EXIT_MISUSE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130


class S4Error(Exception):
    """Base of all errors of s4. `str(error)` names the key, file or node and says what to do."""

    exit_code = EXIT_FAILED

    def __reduce__(self) -> "tuple[object, ...]":
        return _unpickled, (type(self), self.args, self.__dict__)


def _unpickled(kind: type[S4Error], arguments: "tuple[object, ...]", state: "dict[str, object]") -> S4Error:
    error = kind.__new__(kind)  # some take more than a text
    error.args = arguments
    error.__dict__.update(state)
    return error


def reason_of(error: S4Error, server: str) -> str:
    """The text of an error without the name of the server in front, for messages that name it themselves."""
    return str(error).removeprefix(f"{server}: ")


def rebuilt(name: str, message: str) -> S4Error:
    """An error that crossed from another process as the name of its class and its text; fields that its class
    has besides, such as `server`, are lacking."""
    kind = globals().get(name)
    if not (isinstance(kind, type) and issubclass(kind, S4Error)):
        kind = S4Error
    return _unpickled(kind, (message,), {})


class MisuseError(S4Error):
    """The command line was not understood: unknown command, option, number of arguments, or bad value."""

    exit_code = EXIT_MISUSE


class ConfError(S4Error):
    """The conf file, or a setting of the server, is bad, empty or unreadable."""


class BadRequestError(S4Error):
    """The request breaks a rule of s4 and changed nothing: a bad key, prefix, folder or parameter."""


class BadKeyError(BadRequestError):
    """A key breaks one of the key rules."""

    def __init__(self, key: str, rule: str) -> None:
        super().__init__(f"bad key {key!r}: {rule}")
        self.key = key
        self.rule = rule


class WrongNodeError(BadRequestError):
    """The key belongs to another node: the conf of the caller and of the node disagree."""


class MissingError(S4Error):
    """No such key, transfer or job."""


class ConflictError(S4Error):
    """What is there already, a key, a folder or a job, stands in the way."""


class OverlapError(S4Error):
    """A job that must not overlap with its twin was submitted while the twin runs; `job` is the id of that,
    None if only a node knows."""

    job: str | None = None

    def __init__(self, text: str, job: str | None = None) -> None:
        super().__init__(text)
        self.job = job


class BusyError(S4Error):
    """The node cannot do it now, as without a free slot, place or descriptor; trying again later is right."""


class StoppingError(S4Error):
    """The node is shutting down."""

    def __init__(self, text: str = "the node is shutting down") -> None:
        super().__init__(text)


class TransferError(S4Error):
    """The bytes of a key did not arrive whole: stalled, cut short, or with another checksum."""


class StalledError(TransferError):
    """No byte moved for too long."""


class CommandError(S4Error):
    """A command of a job failed: exit code, signal, time limit, or outputs that break the rules."""


class CancelledError(S4Error):
    """The job was cancelled."""


class TimeLimitError(S4Error):
    """A command ran longer than its time limit and was killed."""


class NodeError(S4Error):
    """A node cannot be reached, or answers something that is not s4."""

    def __init__(self, server: str, reason: str) -> None:
        super().__init__(f"{server}: {reason}")
        self.server = server


class NonsenseError(NodeError):
    """What a node answered is not what was asked for."""

    def __init__(self, server: str) -> None:
        super().__init__(server, "its answer makes no sense")


class UnreachableError(NodeError):
    """A node that a job, or a question about one, needs cannot be reached."""

    exit_code = EXIT_UNREACHABLE


class DamagedIndexError(S4Error):
    """node.db is not a database of ours, or damaged."""


class FullDiskError(S4Error):
    """The index cannot be written, for its disk is full."""


class LocalFileError(S4Error):
    """A local file or folder cannot be read or written."""


class WorkerDiedError(S4Error):
    """A worker process ended in the middle of a task. `exitcode` is negative for a signal."""

    def __init__(self, pid: int, exitcode: int | None) -> None:
        how = f"signal {-exitcode}" if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
        super().__init__(f"worker process {pid} died ({how}); try again")
        self.pid = pid
        self.exitcode = exitcode
