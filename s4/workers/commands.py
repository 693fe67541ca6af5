"""Running one command of a job: its folder, its input, its bash, and its outputs."""

import contextlib
import os
import stat

from s4.storage import remove_tree
from s4.streams import checksum_of
from s4.workers.scratch import Scratch, read_tail
from s4.workers.shell import Shell
from s4.workers.tasks import Command, Ran, StoredFile

_FOLDER_MODE = 0o700


class Commands:
    """Runs commands one after the other in one kept bash, with the files of a worker."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._shell = Shell(scratch.job)

    def run(self, task: Command) -> Ran:
        """Run a command and make its outputs finished files beside its folder."""
        stdin, stdout, stderr = task.stdin, task.work + ".out", self._scratch.stderr
        if task.collect == "paths":
            stdout = self._scratch.listing
        elif task.collect == "eval":
            stderr = task.work + ".err"
        made: list[str] = []
        self._scratch.renew()
        self._give_folder(task.folder)
        try:
            if stdin is None:
                stdin = self._scratch.stdin
                with open(stdin, "w", encoding="utf-8") as f:
                    f.writelines(line + "\n" for line in task.input_lines)
            exitcode, usage = self._shell.run(
                task.command, task.folder, stdin, stdout, stderr, task.environment
            )
            outputs: list[StoredFile] = []
            problem = ""
            errors: StoredFile | None = None
            tail = self._read_stderr(stderr)
            if task.collect == "eval":
                outputs, errors = [self._finished(stdout)], self._finished(stderr)
            elif exitcode == 0 and task.collect == "stdout":
                outputs = [self._finished(stdout)]
            elif exitcode == 0:
                files, problem = _named_files(stdout, task.folder, task.work)
                outputs = [self._finished(path, name) for name, path in files]
            elif task.collect == "stdout":
                made.append(stdout)
            return Ran(exitcode, outputs, errors, tail, usage.cpu_seconds, usage.peak_memory, problem)
        finally:
            self._take_folder(task.folder)
            for path in made:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def _give_folder(self, folder: str) -> None:
        """Make the empty folder of a command, of the one before if there is one."""
        try:
            os.rename(self._scratch.folder, folder)
        except FileNotFoundError:
            os.mkdir(folder, _FOLDER_MODE)

    def _take_folder(self, folder: str) -> None:
        """Empty the folder of a command and keep it for the next; one that was tampered with goes."""
        try:
            # Looked at first: what a command put in its place, such as a link, must not be followed.
            if os.lstat(folder).st_mode == stat.S_IFDIR | _FOLDER_MODE:
                for name in os.listdir(folder):
                    remove_tree(os.path.join(folder, name))
                os.rename(folder, self._scratch.folder)
                return
        except OSError:
            pass
        remove_tree(folder)

    def _read_stderr(self, path: str) -> bytes:
        """What a command wrote; the file is empty for the next one."""
        try:
            tail = read_tail(path)
        except PermissionError:  # the command has closed it to itself and to us
            os.chmod(path, 0o600)
            tail = read_tail(path)
        if tail and path == self._scratch.stderr:
            os.truncate(path, 0)
        return tail

    def _finished(self, path: str, name: str = "") -> StoredFile:
        """Make an output immutable: no writer, mode 0444, and its checksum known."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except PermissionError:
            if os.path.islink(path):
                raise
            os.chmod(path, 0o444)
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(fd, 0o444)
            size, checksum = checksum_of(fd)
        finally:
            os.close(fd)
        return StoredFile(path, size, checksum, name)


def _named_files(listing: str, folder: str, work: str) -> tuple[list[tuple[str, str]], str]:
    """(name, path) of the files that a command printed, moved out of its folder; or what is wrong."""
    with open(listing, "rb") as f:
        printed = [line for line in f.read().split(b"\n") if line.strip()]
    top = os.path.realpath(folder)
    found: dict[str, str] = {}
    for raw in printed:
        text = os.fsdecode(raw)
        if "\0" in text:
            return [], f"it printed {text!r}, which is no path"
        path = os.path.realpath(os.path.join(top, text))
        name = os.path.basename(os.path.normpath(text))
        if os.path.commonpath([top, path]) != top:
            return [], f"it printed {text!r}, which leaves its folder"
        try:
            mode = os.stat(path).st_mode
        except OSError as e:
            return [], f"it printed {text!r}: {e.strerror}"
        if not stat.S_ISREG(mode):
            return [], f"it printed {text!r}, which is not a file"
        if name in found:
            return [], f"it printed {text!r}, but a file of that name was printed before"
        found[name] = path
    outputs = []
    for i, (name, path) in enumerate(found.items()):
        target = f"{work}.{i}"
        try:
            os.rename(path, target)
        except FileNotFoundError:  # a second name of the same file, by a symbolic link
            return [], f"it printed {name!r}, which is another name of a file that it printed before"
        outputs.append((name, target))
    return outputs, ""
