"""The files that a worker process uses again and again, in a folder of its own.

All files that a worker or its commands make begin here, and move to where they belong when they are whole: on
ext4 a new file is much cheaper where few were removed of late (storage.spread_folders). For the same reason
files and folders are kept for the next command rather than removed.
"""

import contextlib
import os
import stat

from s4.storage import remove_tree

TAIL_BYTES = 64 * 1024  # of stderr, kept in the record of a task


class Scratch:
    """The files of the worker `pid`."""

    def __init__(self, folder: str, pid: int) -> None:
        self.root = os.path.join(folder, f"worker-{pid}")
        self.job = os.path.join(self.root, "job")  # tells its bash what to run
        self.stdin = os.path.join(self.root, "stdin")  # the paths that a map-from-n reads
        self.stdout = os.path.join(self.root, "stdout")  # of the command that runs, until it is moved away
        self.stderr = os.path.join(self.root, "stderr")  # of the command that runs
        self.listing = os.path.join(self.root, "listing")  # the paths that a map-to-n prints
        self.folder = os.path.join(self.root, "folder")  # empty, for the next command
        self.arriving = os.path.join(self.root, "arriving")  # a key that is received, until it is moved away

    def make(self) -> None:
        """Make the folder of the worker, if it is not there or a command has removed it."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.root, 0o700)

    def renew(self) -> None:
        """Remove what the command before has made useless for the next, such as by `chmod 0 /dev/stderr`."""
        for path in (self.stdin, self.stdout, self.stderr, self.listing):
            with contextlib.suppress(FileNotFoundError):
                mode = os.lstat(path).st_mode
                if not stat.S_ISREG(mode) or mode & 0o600 != 0o600:
                    remove_tree(path)

    def remove(self) -> None:
        """Remove everything, when the worker is gone."""
        remove_tree(self.root)


def read_tail(path: str) -> bytes:
    """The last 64 KB of what a command wrote to stderr, none if it could not even be started."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        size = os.fstat(fd).st_size
        return os.pread(fd, TAIL_BYTES, max(0, size - TAIL_BYTES)) if size else b""
    finally:
        os.close(fd)
