"""The files of a node, below its data folder.

    _tempfiles/   bytes that have arrived or were made, not yet a key
    _tempdirs/    a folder per running command
    _index/       node.db
    _run/         what the worker processes need while they run
    BUCKET/…      the keys, mode 0444

Contract: a path is `BUCKET/DIR/NAME` as the key rules allow it; its file is reached one folder at a time
without following symbolic links, so nothing below the data folder leads outside it. (For commands, which get
a path, it is enough that none is on the way.) Publishing is a rename on one file system. Which keys exist is
for the index to say.
"""

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import stat
import sys
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Sequence

from s4.errors import BusyError, ConflictError, MissingError, S4Error
from s4.keys import url

log = logging.getLogger("s4.storage")

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS and FS_IOC_SETFLAGS of linux/fs.h, 64 bits
_TOP_OF_HIERARCHY = 0x00020000  # FS_TOPDIR_FL
_FLEETING_FOLDERS = ("_tempfiles", "_tempdirs", "_run")


def _leave_alone(path: str, reason: str) -> None:
    log.warning("left alone: %.1000r: %s", path, reason)


class Storage:
    """The data folder of one node, locked against a second process while it is open.

    Raises S4Error if the folder cannot be made or another process holds it.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root)
        # Commands read and print paths, one a line. Cc are control characters, Cs what is no UTF-8.
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in self.root):
            raise S4Error(f"data folder {root!r}: its path must be valid UTF-8, without control characters")
        try:
            for name in ("_index", *_FLEETING_FOLDERS):
                os.makedirs(os.path.join(self.root, name), exist_ok=True)
            self._root_fd = os.open(self.root, _FOLDER_FLAGS)
            with self._folder("_run") as run:
                spread_folders(run)
            self._lock = os.open(os.path.join(self.root, "_index", "lock"), os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as e:
            raise S4Error(f"data folder {root}: {e.strerror}") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise S4Error(f"data folder {root} is in use by another s4-server; stop that one first") from None

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._root_fd)
        os.close(self._lock)

    @property
    def index_path(self) -> str:
        """Where node.db lies."""
        return os.path.join(self.root, "_index", "node.db")

    @property
    def reindex_mark(self) -> str:
        """A file that is there while a reindex is not finished."""
        return os.path.join(self.root, "_index", "reindexing")

    @property
    def run_folder(self) -> str:
        """A folder for the worker processes, whose folders in it are spread over the disk."""
        return os.path.join(self.root, "_run")

    def temporary_file(self, name: str) -> str:
        """The path of a file for bytes that are not yet a key."""
        return os.path.join(self.root, "_tempfiles", name)

    def temporary_folder(self, name: str) -> str:
        """The path of a folder for a command."""
        return os.path.join(self.root, "_tempdirs", name)

    def locate(self, path: str) -> tuple[str, int]:
        """The absolute path of a key's file, for commands, and its bytes.

        Raises MissingError, ConflictError if a link is on the way, BusyError.
        """
        # The kernel tells where a descriptor leads: half the work of going there folder by folder.
        wanted = os.path.join(self.root, path)
        try:
            fd = os.open(wanted, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                found = os.readlink(f"/proc/self/fd/{fd}")
                size = os.fstat(fd).st_size
            finally:
                os.close(fd)
            if found == f"{wanted} (deleted)":  # by now; no key has a blank in it
                raise _missing(path)
            if found != wanted:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        except FileNotFoundError:
            raise _missing(path) from None
        except OSError as e:
            raise _explained(path, e) from e
        return wanted, size

    def open(self, path: str) -> int:
        """A descriptor that reads the key's file. Raises MissingError, S4Error for what is no file, BusyError
        if too many files are open."""
        folder, name = os.path.split(path)
        try:
            with self._folder(folder) as fd:
                found = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
        except FileNotFoundError:
            raise _missing(path) from None
        except OSError as e:
            raise _explained(path, e) from e
        if not stat.S_ISREG(os.fstat(found).st_mode):
            os.close(found)
            raise ConflictError(f"{url(path)}: something that is no file is in its place")
        return found

    @contextlib.contextmanager
    def placing(self) -> Iterator[Callable[[str, str], None]]:
        """Gives `place(temporary, path)`, which moves finished bytes to the place of a key, over what a crash
        may have left there.

        It keeps the folder of the last key open for the next, so nobody may remove folders meanwhile. It
        raises ConflictError if a folder with files stands there, or a symbolic link on the way; S4Error.
        """
        opened = ""  # the folder of `fd`; a bucket has a name
        fd = -1

        def place(temporary: str, path: str) -> None:
            nonlocal opened, fd
            folder, name = os.path.split(path)
            try:
                if folder != opened:
                    below = self._open_folder(folder, create=True)
                    if opened:
                        os.close(fd)
                    opened, fd = folder, below
                try:
                    os.rename(temporary, name, dst_dir_fd=fd)
                except IsADirectoryError:
                    self._remove_empty_folders(os.path.join(self.root, path))
                    os.rename(temporary, name, dst_dir_fd=fd)
            except OSError as e:
                raise _explained(path, e) from e

        try:
            yield place
        finally:
            if opened:
                os.close(fd)

    def unlink(self, paths: Sequence[str]) -> None:
        """Remove the files of keys, and the folders that this leaves empty. Missing files are fine."""
        for folder, group in itertools.groupby(map(os.path.split, paths), key=lambda parts: parts[0]):
            path = folder
            try:
                with self._folder(folder) as fd:
                    for _folder, name in group:
                        path = os.path.join(folder, name)
                        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                            os.unlink(name, dir_fd=fd)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as e:
                raise _explained(path, e) from e
            self._remove_if_empty(folder)

    def _remove_if_empty(self, folder: str) -> None:
        """Remove a folder of keys and those above it, up to the first that is not empty."""
        while folder:
            parent, name = os.path.split(folder)
            try:
                with self._folder(parent) as fd:
                    os.rmdir(name, dir_fd=fd)
            except OSError:  # not empty, or gone already
                return
            folder = parent

    def remove_empty_folders(self, prefix: str) -> None:
        """Remove what has no files among the folders of keys that start with `prefix`, and the folder that
        they are in and those above it if they are empty then."""
        folder, _slash, start = prefix.rpartition("/")
        with contextlib.suppress(OSError), self._folder(folder) as top:
            with os.scandir(top) as entries:
                meant = [
                    e.name for e in entries if e.name.startswith(start) and e.is_dir(follow_symlinks=False)
                ]
            for name in meant:
                # What cannot be looked into stays: closed folders, and thousands in each other.
                with contextlib.suppress(OSError, RecursionError):
                    for _path, names, _files, fd in os.fwalk(name, topdown=False, dir_fd=top):
                        for below in names:
                            with contextlib.suppress(OSError):  # not empty, or a link
                                os.rmdir(below, dir_fd=fd)
                    os.rmdir(name, dir_fd=top)
        self._remove_if_empty(folder)

    @contextlib.contextmanager
    def _folder(self, folder: str) -> Iterator[int]:
        fd = self._open_folder(folder)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open_folder(self, folder: str, *, create: bool = False) -> int:
        fd = os.dup(self._root_fd)
        try:
            for depth, name in enumerate(folder.split("/") if folder else ()):
                try:
                    below = os.open(name, _FOLDER_FLAGS, dir_fd=fd)
                except FileNotFoundError:
                    if not create:
                        raise
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o755, dir_fd=fd)
                    below = os.open(name, _FOLDER_FLAGS, dir_fd=fd)
                    if depth == 0:  # a bucket
                        spread_folders(below)
                except NotADirectoryError:
                    # The index has no key of this name, so a plain file here is what a crash left.
                    if not create or not stat.S_ISREG(os.lstat(name, dir_fd=fd).st_mode):
                        raise
                    os.unlink(name, dir_fd=fd)
                    os.mkdir(name, 0o755, dir_fd=fd)
                    below = os.open(name, _FOLDER_FLAGS, dir_fd=fd)
                os.close(fd)
                fd = below
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _remove_empty_folders(self, top: str) -> None:
        for folder, _folders, files in os.walk(top, topdown=False):
            if files:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            os.rmdir(folder)

    def discard(self, name: str) -> None:
        """Remove what a task, or all tasks of a job, left in the temporary folders: NAME and NAME.…"""
        for folder in ("_tempfiles", "_tempdirs"):
            try:
                entries = list(os.scandir(os.path.join(self.root, folder)))
            except OSError as e:
                log.warning("what %s left in %s stays until the next start: %s", name, folder, e.strerror)
                continue
            for entry in entries:
                if entry.name == name or entry.name.startswith(name + "."):
                    remove_if_possible(entry.path)

    def empty_temporary(self) -> None:
        """Remove all that is no key: what a node that was killed left. What cannot be removed, such as
        what a command made as another user, is told."""
        for name in _FLEETING_FOLDERS:
            for entry in list(os.scandir(os.path.join(self.root, name))):
                remove_if_possible(entry.path)

    def walk(self, prefix: str = "", leave_alone: Callable[[str, str], None] = _leave_alone) -> Iterator[str]:
        """The path of every plain file of keys that starts with `prefix`, in no order.

        `leave_alone(path, reason)` hears of what is neither file nor folder, such as a symbolic link, and of
        folders that cannot be looked into.
        """
        pending = [prefix.rpartition("/")[0]]
        while pending:
            current = pending.pop()
            try:
                entries = os.scandir(os.path.join(self.root, current))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as e:
                if e.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
                    raise
                # Such as lost+found, or thousands in each other.
                leave_alone(current, e.strerror or str(e))
                continue
            with entries:
                for entry in entries:
                    path = f"{current}/{entry.name}" if current else entry.name
                    if not path.startswith(prefix) or (not current and entry.name.startswith("_")):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                    elif entry.is_file(follow_symlinks=False):
                        yield path
                    else:
                        leave_alone(path, "it is neither a file nor a folder")


def spread_folders(fd: int) -> None:
    """Have ext4 put the folders that are made in this one, and what is made in them, into block groups apart.

    ext4 gives out the first free inode of a group, but none that was freed in the last minutes, and it looks
    those up one by one for each new file: up to a millisecond where much is made and removed. Attribute T of
    chattr(1). Other file systems do not have it.
    """
    flags = bytearray(4)
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _GET_FLAGS, flags)
        wanted = int.from_bytes(flags, sys.byteorder) | _TOP_OF_HIERARCHY
        fcntl.ioctl(fd, _SET_FLAGS, wanted.to_bytes(4, sys.byteorder))


def remove_tree(path: str) -> None:
    """Remove a file or folder, of whatever modes and depth a command left it. What is gone already is fine.

    Folders in it are brought up beside it one by one, for paths have a limit, and so has recursion.
    """
    try:
        os.unlink(path)
        return
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        pass
    pending = [path]
    while pending:
        folder = pending[-1]
        with contextlib.suppress(FileNotFoundError):
            os.chmod(folder, 0o700)
            for name in os.listdir(folder):
                entry = os.path.join(folder, name)
                try:
                    os.unlink(entry)
                except FileNotFoundError:
                    pass
                except (IsADirectoryError, PermissionError):
                    aside = os.path.join(os.path.dirname(path), f".{uuid.uuid4()}")
                    os.chmod(entry, 0o700)
                    os.rename(entry, aside)
                    pending.append(aside)
            if pending[-1] == folder:
                os.rmdir(folder)
        if pending[-1] == folder:
            pending.pop()


def remove_if_possible(path: str) -> None:
    """Remove a file or folder like `remove_tree`; what cannot be removed is told, and stays."""
    try:
        remove_tree(path)
    except OSError as e:
        log.warning("%s stays until the next start: %s", path, e)


def _missing(path: str) -> MissingError:
    return MissingError(f"no file for {url(path)}: run 's4-server reindex'")


def _explained(path: str, e: OSError) -> S4Error:
    if e.errno in (errno.EMFILE, errno.ENFILE):
        return BusyError(f"{url(path)}: {e.strerror}; try again later")
    if e.errno in (errno.ELOOP, errno.ENOTDIR):
        return ConflictError(
            f"{url(path)}: something that is no folder of keys, such as a symbolic link, is in the way"
        )
    if e.errno in (errno.ENOTEMPTY, errno.EISDIR, errno.EEXIST):
        return ConflictError(f"{url(path)}: a folder with files that are no keys is in the way")
    return S4Error(f"{url(path)}: {e.strerror}")
