"""The files of a worker process, in a folder of its own.

All files that a worker or its commands make begin here, and move to where they belong when they are whole: on
ext4 a new file is much cheaper where few were removed of late (storage.spread_folders). For the same reason
the folder of a command is kept for the next, and stderr if nothing was said there. Other files are not: one
that is emptied and written again goes to the disk when it is closed (auto_da_alloc in ext4(5)), which takes
0.16 ms; a new one takes 0.03.
"""

import contextlib
import ctypes
import os
import stat
from collections.abc import Iterator

from s4.errors import S4Error
from s4.storage import remove_tree

FOLDER_MODE = 0o700
TAIL_BYTES = 64 * 1024  # of stderr, kept in the record of a task
RESERVED_BYTES = 1024 * 1024, 64 * 1024 * 1024  # for stdout: less is not worth it, nor much more
STDERR_BYTES = 16 * 1024  # reserved for stderr
FREE_TIMES = 100  # what is reserved must be free so many times, for the outputs of others come first

_FALLOC_FL_KEEP_SIZE = 1  # fallocate(2)
_libc = ctypes.CDLL(None)


class Scratch:
    """The files of the worker `pid`."""

    def __init__(self, folder: str, pid: int) -> None:
        self.root = os.path.join(folder, f"worker-{pid}")
        self.job = os.path.join(self.root, "job")  # tells its bash what to run
        self.stdin = os.path.join(self.root, "stdin")  # the paths that a map-from-n reads
        self.stdout = os.path.join(self.root, "stdout")  # of the command that runs, until it is moved or read
        self.stderr = os.path.join(self.root, "stderr")  # of the command that runs
        self.folder = os.path.join(self.root, "folder")  # empty, for the next command
        self.temporary = os.path.join(self.root, "tmp")  # TMPDIR of the command that runs
        self.arriving = os.path.join(self.root, "arriving")  # a key that is received, until it is moved away

    def renew(self) -> None:
        """Bring the folder into the state that the next task needs, whatever a command has done to it.

        Raises OSError.
        """
        try:
            if not is_own_folder(os.lstat(self.root)):
                remove_tree(self.root)
                os.mkdir(self.root, FOLDER_MODE)
        except FileNotFoundError:
            os.mkdir(self.root, FOLDER_MODE)
        kept = set()
        for entry in list(os.scandir(self.root)):
            found = entry.stat(follow_symlinks=False)
            if entry.path in (self.folder, self.temporary):
                good = is_own_folder(found)
            else:
                good = entry.path == self.stderr and _is_own_file(found) and not found.st_size
            if good:
                kept.add(entry.path)
            else:
                remove_tree(entry.path)
        if self.temporary not in kept:
            os.mkdir(self.temporary, FOLDER_MODE)
        if self.stderr not in kept:  # with room for what a command has to say of a full disk
            fd = os.open(self.stderr, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            _reserve(fd, STDERR_BYTES)
            os.close(fd)

    def remove(self) -> None:
        """Remove everything, when the worker is gone."""
        remove_tree(self.root)


def emptied(folder: str) -> bool:
    """Empty a folder that a command had; whether it is as it was. One that was tampered with goes."""
    try:
        # Looked at first: what a command put in its place, such as a link, must not be followed.
        if is_own_folder(os.lstat(folder)):
            for name in os.listdir(folder):
                remove_tree(os.path.join(folder, name))
            return True
    except OSError:
        pass
    remove_tree(folder)
    return False


def is_own_folder(found: os.stat_result) -> bool:
    """Whether a folder can be used again: it is one, and ours alone."""
    return stat.S_ISDIR(found.st_mode) and found.st_mode & 0o777 == FOLDER_MODE


def _is_own_file(found: os.stat_result) -> bool:
    """Whether a file can be written again: it is one, may be, and has no other name, such as of an output."""
    return stat.S_ISREG(found.st_mode) and found.st_mode & 0o600 == 0o600 and found.st_nlink == 1


@contextlib.contextmanager
def reserved(path: str, size: int) -> Iterator[None]:
    """Have disk space for `size` bytes at `path`, which stays empty, while somebody else writes there; what
    is not used is given back.

    On ext4 `tr` is done a tenth sooner if its blocks need not be looked for as it writes. Raises OSError.
    """
    least, most = RESERVED_BYTES
    size = min(size, most)
    if size < least:
        yield
        return
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        disk = os.fstatvfs(fd)
        if disk.f_bavail * disk.f_frsize >= FREE_TIMES * size:
            _reserve(fd, size)
        yield
        os.ftruncate(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _reserve(fd: int, size: int) -> None:
    # Where that fails, as on a file system without it, the space is taken as it is written.
    _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size))


def open_made(path: str) -> int:
    """A descriptor that reads a file which a command may have changed for something else.

    Raises S4Error if it is no plain file any more, OSError.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a fifo would block
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise S4Error(f"{path} is no file any more: the command has put something else there")
    try:
        return os.open(path, flags)
    except PermissionError:  # the command has closed it to itself and to us
        os.chmod(path, 0o600)
        return os.open(path, flags)


def read_tail(path: str) -> bytes:
    """The last 64 KB of what a command wrote to stderr, none if there is no such file."""
    try:
        fd = open_made(path)
    except (OSError, S4Error):
        return b""
    try:
        size = os.fstat(fd).st_size
        return os.pread(fd, TAIL_BYTES, max(0, size - TAIL_BYTES)) if size else b""
    finally:
        os.close(fd)
