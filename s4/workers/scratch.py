"""The files that a worker process uses again and again, in the scratch folder of the pool.

A file or folder that is made and removed for each command costs more than it seems: ext4 looks at every
inode that was freed of late before it gives out a new one.
"""

import contextlib
import os
import stat

from s4.storage import remove_tree

TAIL_BYTES = 64 * 1024  # of stderr, kept in the record of a task


class Scratch:
    """The files of the worker `pid`."""

    def __init__(self, folder: str, pid: int) -> None:
        self.job = os.path.join(folder, f"worker-{pid}.job")  # tells its bash what to run
        self.stderr = os.path.join(folder, f"worker-{pid}.err")  # of the command that runs
        self.stdin = os.path.join(folder, f"worker-{pid}.in")  # the paths that a map-from-n reads
        self.folder = os.path.join(folder, f"worker-{pid}.dir")  # empty, for the next command
        self.listing = os.path.join(folder, f"worker-{pid}.out")  # the paths that a map-to-n prints

    def renew(self) -> None:
        """Remove what the command before has made useless for the next, such as by `chmod 0 /dev/stderr`."""
        for path in (self.stderr, self.listing, self.stdin):
            with contextlib.suppress(FileNotFoundError):
                mode = os.lstat(path).st_mode
                if not stat.S_ISREG(mode) or mode & 0o600 != 0o600:
                    remove_tree(path)

    def remove(self) -> None:
        """Remove them, when the worker is gone."""
        for path in (self.job, self.stdin, self.stderr, self.listing):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self.folder)


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
