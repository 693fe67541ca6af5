"""Running one command of a job: its folder, its input, its bash, and its outputs."""

import contextlib
import os
import stat

from s4.errors import MissingError, S4Error
from s4.keys import owner, parse_key
from s4.storage import remove_tree
from s4.streams import checksum_of
from s4.workers.scratch import FOLDER_MODE, Scratch, emptied, open_made, read_tail, reserved
from s4.workers.shell import Shell
from s4.workers.tasks import Command, Destination, Ran, StoredFile

MAX_LISTING_BYTES = 16 * 1024 * 1024  # of the names that a map-to-n prints: half a million of usual length
MAX_PATH_BYTES = 4096  # of Linux
SHOWN_CHARACTERS = 200  # of a name that is no good


class Commands:
    """Runs commands one after the other in one kept bash, with the files of a worker."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._shell = Shell(scratch.job)
        # What programs such as `sort` spill would stay if they are killed. An administrator's choice is kept.
        self._variables = {} if "TMPDIR" in os.environ else {"TMPDIR": scratch.temporary}

    def run(self, task: Command) -> Ran:
        """Run a command and make its outputs finished files, whose paths begin with `task.work`."""
        scratch = self._scratch
        scratch.renew()
        stdout = scratch.stdout
        self._give_folder(task.folder)
        source = -1
        try:
            if task.stdin is None:
                stdin = scratch.stdin
                with open(stdin, "w", encoding="utf-8") as f:
                    f.writelines(line + "\n" for line in task.input_lines)
            else:
                source = _open_input(task.stdin)
                stdin = f"/proc/{os.getpid()}/fd/{source}"  # which stays what it is
            with reserved(stdout, task.stdout_bytes):
                exitcode, usage = self._shell.run(
                    task.command,
                    task.folder,
                    stdin,
                    stdout,
                    scratch.stderr,
                    self._variables | task.environment,
                )
            outputs: list[StoredFile] = []
            errors: StoredFile | None = None
            problem = ""
            tail = read_tail(scratch.stderr)
            if task.collect == "eval":
                outputs = [_finished(stdout, task.work + ".out", hashed=False)]
                errors = _finished(scratch.stderr, task.work + ".err", hashed=False)
            elif exitcode == 0 and task.collect == "stdout":
                outputs = [_finished(stdout, task.work + ".out")]
            elif exitcode == 0:
                assert isinstance(task.collect, Destination)
                files, problem = _named_files(stdout, task.folder, task.collect.folder)
                outputs = [
                    _finished(path, f"{task.work}.{i}", name, hashed=_stays(name, task.collect))
                    for i, (name, path) in enumerate(files.items())
                ]
            return Ran(exitcode, outputs, errors, tail, usage.cpu_seconds, usage.peak_memory, problem)
        finally:
            if source >= 0:
                os.close(source)
            self._take_folder(task.folder)
            emptied(scratch.temporary)
            remove_tree(scratch.stdout)

    def _give_folder(self, folder: str) -> None:
        """Give a command its empty folder, that of the one before if there is one."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._scratch.folder, FOLDER_MODE)
        os.rename(self._scratch.folder, folder)

    def _take_folder(self, folder: str) -> None:
        """Empty the folder of a command and keep it for the next."""
        if emptied(folder):
            try:
                os.rename(folder, self._scratch.folder)
            except OSError:  # the command has put something there
                remove_tree(folder)


def _open_input(path: str) -> int:
    """A descriptor of the file of a key. Raises MissingError if it was removed while the task waited."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise MissingError(f"its input is gone: {e.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise S4Error(f"its input is gone: something that is no file is in its place: {path}")
    return fd


def _finished(made: str, target: str, name: str = "", *, hashed: bool = True) -> StoredFile:
    """Make an output immutable, with no writer and mode 0444, and move it to `target`; `hashed` if it is to
    be a key of this node."""
    fd = open_made(made)
    try:
        os.fchmod(fd, 0o444)
        size, checksum = checksum_of(fd) if hashed else (os.fstat(fd).st_size, "")
    finally:
        os.close(fd)
    try:
        os.rename(made, target)
    except PermissionError:  # the command has closed the folder
        os.chmod(os.path.dirname(made), 0o700)
        os.rename(made, target)
    return StoredFile(target, size, checksum, name)


def _stays(name: str, destination: Destination) -> bool:
    """Whether an output is to be a key of this node."""
    return owner(destination.folder + name, destination.servers) == destination.position


def _named_files(listing: str, folder: str, target: str) -> tuple[dict[str, str], str]:
    """The files in `folder` that a command printed, path by name; or what is wrong, also with the keys that
    they would be in the folder `target`."""
    with open(open_made(listing), "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size > MAX_LISTING_BYTES:
            return {}, f"it printed {size} bytes: the names of files are expected, not what is in them"
        printed = [line for line in f.read().split(b"\n") if line.strip()]
    top = os.path.realpath(folder)
    if top != folder and printed:
        return {}, f"{folder} is no folder any more: the command has put something else there"
    folders = {top: top}
    found: dict[str, str] = {}
    paths: set[str] = set()
    for raw in printed:
        text = os.fsdecode(raw)
        said = f"it printed {text[:SHOWN_CHARACTERS]!r}{'…' if len(text) > SHOWN_CHARACTERS else ''}"
        if "\0" in text or len(raw) > MAX_PATH_BYTES:
            return {}, f"{said}, which is no path"
        path = _real_path(os.path.join(top, text), folders)
        name = os.path.basename(os.path.normpath(text))
        if not f"{path}/".startswith(f"{top}/"):
            return {}, f"{said}, which leaves its folder"
        try:
            mode = os.stat(path).st_mode
        except OSError as e:
            return {}, f"{said}: {e.strerror}; a map-to-n prints the names of the files that it made"
        if not stat.S_ISREG(mode):
            return {}, f"{said}, which is not a file"
        if name in found:
            return {}, f"{said}, but its NAME {name!r}, which its key would have, was printed before"
        if path in paths:  # by a symbolic link
            return {}, f"{said}, which is another name of a file that it printed before"
        try:
            parse_key(target + name)
        except S4Error as e:
            return {}, str(e)
        found[name] = path
        paths.add(path)
    return found, ""


def _real_path(path: str, folders: dict[str, str]) -> str:
    """What os.path.realpath says, which looks at every folder on the way; `folders` keeps where they lead."""
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    real = os.path.join(folders[folder], name)
    return os.path.realpath(real) if name in ("", ".", "..") or os.path.islink(real) else real
