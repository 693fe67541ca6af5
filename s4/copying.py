"""cp: which local file becomes which key or the other way round, and moving them, many at once.

Files for one server travel in batches. A download is written beside its place and renamed, so that nothing
half-written is ever seen under its name.
"""

import contextlib
import errno
import os
import stat
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator

from s4.asking import NOTICE_SECONDS
from s4.errors import BadRequestError, LocalFileError, MissingError, S4Error, TransferError
from s4.exchange import MAX_BATCH_BYTES, MAX_BATCH_KEYS, get_batch, get_one, put_batch, put_one
from s4.keys import SCHEME, name_of, parse_key, parse_prefix, url
from s4.streams import Incoming, send_all, send_hashed, widen_pipe

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms
if TYPE_CHECKING:
    import _socket
    from typing import Protocol

    from s4.client import Client
    from s4.http import Caller

    class _Move(Protocol):
        def __call__(
            self, caller: "Caller", items: "list[Item]", failed: "Callable[[Item, str], None]"
        ) -> None: ...


THREADS_PER_SERVER = 2
MAX_THREADS = 16
STOP_SECONDS = 2.0  # for each thread to tidy up after a Ctrl-C
_MAX_LINKS = 40  # as many symbolic links as the kernel follows


class Item(namedtuple("Item", ("file", "path", "size"))):
    """One file to copy: its local path, the path of its key, and its size in bytes."""

    __slots__ = ()
    file: str
    path: str
    size: int


class CopyError(S4Error):
    """Files of a recursive copy failed: `failures` are lines that name each."""

    def __init__(self, message: str, failures: list[str]) -> None:
        super().__init__(message)
        self.failures = failures


def copy(client: "Client", src: str, dst: str, recursive: bool) -> None:
    """What `Client.cp` does."""
    for path in (src, dst):
        if not path or "\0" in path:
            raise BadRequestError(f"{path!r} is no path")
    if src.startswith(SCHEME) and dst.startswith(SCHEME):
        raise BadRequestError("both sides are s4: there is no move, there is only cp and rm")
    if not src.startswith(SCHEME) and not dst.startswith(SCHEME):
        raise BadRequestError("one side must be s4://BUCKET/…")
    if recursive and "-" in (src, dst):
        raise BadRequestError("'-' is a single file: leave -r out")
    if dst.startswith(SCHEME):
        if src != "-":
            with _local_errors(src):
                os.stat(src)  # a folder of which nothing can be seen would be taken for a file
        if recursive and os.path.isdir(src):
            _put_folder(client, src, dst)
        else:
            _put(client, src, dst)
    elif recursive:
        _get_folder(client, src, dst)
    else:
        _get(client, src, dst)


def _put(client: "Client", src: str, dst: str) -> None:
    if src != "-" and os.path.isdir(src):
        raise LocalFileError(f"{src} is a folder: use cp -r")
    if dst.endswith("/"):
        if src == "-":
            raise BadRequestError(f"{dst} is a folder, and stdin has no name: write s4://BUCKET/KEY")
        dst += os.path.basename(os.path.normpath(src))
    path = parse_key(dst)
    with _local_errors(src):
        source = 0 if src == "-" else os.open(src, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(source)
            # Files of /proc claim to be empty, those of /sys to fill a page, but have no blocks; pipes and a
            # stdin that was read from have no size either.
            known = src != "-" and stat.S_ISREG(status.st_mode) and status.st_blocks
            size = status.st_size if known else 0
            if not size:
                widen_pipe(source)
            with client.caller(client.server_of(path)) as caller:
                put_one(caller, path, source, size or None, src)
        finally:
            if source != 0:
                os.close(source)


def _get(client: "Client", src: str, dst: str) -> None:
    path = parse_key(src)
    with client.caller(client.server_of(path)) as caller:
        if dst == "-":
            sys.stdout.flush()
            with _local_errors("stdout"):
                get_one(caller, path, 1, reserve=False)
            return
        if dst.endswith("/") or dst in (".", ".."):
            dst = os.path.join(dst, name_of(path))
        if os.path.isdir(dst):
            raise LocalFileError(f"{dst} is a folder: write {dst}/ to copy into it")
        with _arriving(dst) as (target, new):
            get_one(caller, path, target, reserve=new)


@contextlib.contextmanager
def _arriving(dst: str) -> Iterator[tuple[int, bool]]:
    """(descriptor, whether it is a new file) for the bytes of `dst`, which appears, whole, at a good end.

    Missing folders are made, and removed again on failure. What is open already is written into as it is.
    Raises LocalFileError.
    """
    made: list[str] = []
    temporary = ""
    with _local_errors(dst):
        place = os.path.realpath(dst)
        own = _own_descriptor(dst)
        try:
            if own is not None:
                target = os.dup(own)
            elif os.path.exists(dst) and not os.path.isfile(dst):  # such as /dev/null or a pipe
                target = os.open(dst, os.O_WRONLY | os.O_CLOEXEC)
            else:
                if os.path.exists(place) and not os.access(place, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                # Not those of `place`: where a link leads, nobody asked for folders.
                made = _make_folders(os.path.dirname(os.path.join(".", dst)))
                name = f".s4-{os.getpid()}-{threading.get_ident()}"
                temporary = os.path.join(os.path.dirname(place), name)
                target = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                yield target, bool(temporary)
            finally:
                os.close(target)  # which may fail, as on NFS
            if temporary:
                os.rename(temporary, place)
                temporary, made = "", []
        finally:
            if temporary:
                # A Ctrl-C may come just before it is there, or just after it was renamed.
                with contextlib.suppress(OSError):  # in a closed folder it cannot even be looked for
                    os.unlink(temporary)
            _remove_folders(made)


def _own_descriptor(path: str) -> int | None:
    """The descriptor of this process that a path stands for, like /dev/stdout or /dev/fd/3; None for others.

    It may be of a file that others write too, as with `>> log`, or that has no name any more: opened by its
    path it would be written from its start, and another renamed to that path would take its place.
    """
    for _ in range(_MAX_LINKS):
        if not os.path.islink(path):
            break
        folder, name = os.path.split(path)
        folder = os.path.realpath(folder)
        if folder.startswith(f"/proc/{os.getpid()}/") and folder.endswith("/fd"):
            return int(name)
        path = os.path.join(folder, os.readlink(path))
    return None


def _make_folders(folder: str) -> list[str]:
    """Make a folder and its parents; returns those that were made, the innermost first."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        parent = os.path.dirname(folder)
        if parent == folder:
            break
        folder = parent
    try:
        for made in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another thread was first; a file there fails later
                os.mkdir(made)
    except OSError:
        _remove_folders(missing)
        raise
    return missing


def _remove_folders(made: list[str]) -> None:
    for folder in made:
        with contextlib.suppress(OSError):  # somebody put something into it
            os.rmdir(folder)


@contextlib.contextmanager
def _local_errors(name: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        raise LocalFileError(f"{name}: {e.strerror or e}") from e


def _put_folder(client: "Client", src: str, dst: str) -> None:
    folder = parse_prefix(dst)
    if folder and not folder.endswith("/"):
        folder += "/"
    failures: list[str] = []
    items: list[Item] = []
    refused: list[str] = []
    for file, below in _local_files(src, failures):
        try:
            items.append(Item(file, parse_key(url(folder + below)), os.stat(file).st_size))
        except S4Error as e:
            refused.append(f"{file}: {e}")
        except OSError as e:
            failures.append(f"{file}: {e.strerror}")
    if refused:  # a rule is broken: nothing is created at all
        total = len(items) + len(refused) + len(failures)
        raise CopyError(
            f"nothing was copied, for {len(refused)} of {total} files have a path that no key can have",
            refused + failures,
        )
    _Crew(client, _put_items, failures).run(items)


def _local_files(top: str, failures: list[str]) -> Iterator[tuple[str, str]]:
    """(file, path below `top`) of all files, links followed; what is neither file nor folder is a failure."""
    pending: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(top, "", frozenset())]
    while pending:
        folder, below, above = pending.pop()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as e:
            failures.append(f"{folder}: {e.strerror}")
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            failures.append(f"{folder}: a symbolic link to a folder above it")
            continue
        for entry in entries:
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as e:  # such as a symbolic link to itself
                failures.append(f"{entry.path}: {e.strerror}")
                continue
            if is_folder:
                pending.append((entry.path, f"{below}{entry.name}/", above | {identity}))
            elif is_file:
                yield entry.path, below + entry.name
            else:
                broken = entry.is_symlink() and not os.path.exists(entry.path)
                what = "a broken symbolic link" if broken else "not a file"
                failures.append(f"{entry.path}: {what}")


def _get_folder(client: "Client", src: str, dst: str) -> None:
    prefix = parse_prefix(src)
    if not prefix:
        raise BadRequestError("cp -r needs at least a bucket: s4://BUCKET/")
    bucket, slash, _rest = prefix.partition("/")
    if not slash:
        prefix += "/"
    if os.path.exists(dst) and not os.path.isdir(dst):
        raise LocalFileError(f"{dst} is not a folder")
    # To `.` the last folder of the prefix comes along, unless it is the bucket.
    keep = prefix.rstrip("/").rfind("/") + 1 if os.path.normpath(dst) == "." else len(prefix)
    keep = keep or len(prefix)
    items = []
    targets: dict[str, str] = {}
    for entry in client.ls(url(prefix), recursive=True):
        path = parse_key(f"{bucket}/{entry.path}")
        below = path[keep:]
        if keep == len(prefix) and not prefix.endswith("/"):
            below = below[1:] if below.startswith("/") else path[prefix.rfind("/") + 1 :]
        target = os.path.join(dst, below)
        if targets.setdefault(target, path) != path:
            raise BadRequestError(f"{url(targets[target])} and {url(path)} would both become {target}")
        items.append(Item(target, path, int(entry.size)))
    if not items:
        raise MissingError(f"no key starts with {url(prefix)}")
    _Crew(client, _get_items, []).run(items)


class _Crew:
    """Threads that copy batches of items, a few for each server."""

    def __init__(self, client: "Client", move: "_Move", failures: list[str]) -> None:
        self._client = client
        self._move = move
        self._failures = failures
        self._failed_before = len(failures)
        self._failed: set[Item] = set()  # a batch that breaks fails items that may have failed before
        self._lock = threading.Lock()
        self._ended = threading.Semaphore(0)  # once for each thread: Thread.join forgets a thread at Ctrl-C
        self._stopping = False
        self._callers: set[Caller] = set()
        self._errors: list[BaseException] = []

    def run(self, items: list[Item]) -> None:
        """Copy all; raises CopyError, with a line for each file that failed."""
        batches = _batches(self._client, items)
        count = max(1, min(MAX_THREADS, THREADS_PER_SERVER * len(self._client.servers()), len(items)))
        with _progress(len(items), sum(item.size for item in items)) as advance:
            threads = [
                threading.Thread(target=self._work, args=(batches, advance), daemon=True)
                for _ in range(count)
            ]
            begun = ended = 0
            try:
                for thread in threads:
                    begun += 1
                    thread.start()
                while ended < len(threads):
                    # A Ctrl-C that another thread takes, as after a pause (SIGSTOP), does not wake this one.
                    ended += self._ended.acquire(timeout=NOTICE_SECONDS)
            except BaseException:
                self._stop()
                for _ in range(begun - ended):
                    self._ended.acquire(timeout=STOP_SECONDS)
                raise
        if self._errors:
            raise self._errors[0]
        if self._failures:
            total = len(items) + self._failed_before
            raise CopyError(f"{len(self._failures)} of {total} files were not copied", self._failures)

    def _stop(self) -> None:
        with self._lock:
            self._stopping = True
            for caller in self._callers:
                caller.abort()

    def _work(self, batches: Iterator[tuple[str, list[Item]]], advance: Callable[[list[Item]], None]) -> None:
        callers: dict[str, Caller] = {}
        try:
            while True:
                with self._lock:
                    batch = None if self._stopping else next(batches, None)
                    if batch is None:
                        break
                    server, items = batch
                    caller = callers.get(server) or self._client.caller(server)
                    callers[server] = caller
                    self._callers.add(caller)
                try:
                    self._move(caller, items, self._fail)
                except S4Error as e:
                    for item in items:
                        self._fail(item, str(e))
                with self._lock:
                    advance(items)
        except BaseException as e:
            with self._lock:
                self._errors.append(e)
                self._stopping = True
        finally:
            for caller in callers.values():
                caller.close()
            self._ended.release()

    def _fail(self, item: Item, reason: str) -> None:
        named = reason if item.file in reason else f"{item.file}: {reason}"
        with self._lock:
            if not self._stopping and item not in self._failed:
                self._failed.add(item)
                self._failures.append(named)


def _batches(client: "Client", items: Iterable[Item]) -> Iterator[tuple[str, list[Item]]]:
    """Items by the server that owns them, in batches."""
    gathered: dict[str, list[Item]] = {server: [] for server in client.servers()}
    sizes = dict.fromkeys(gathered, 0)
    for item in items:
        server = client.server_of(item.path)
        if gathered[server] and sizes[server] + item.size > MAX_BATCH_BYTES:
            yield server, gathered[server]
            gathered[server], sizes[server] = [], 0
        gathered[server].append(item)
        sizes[server] += item.size
        if len(gathered[server]) == MAX_BATCH_KEYS:
            yield server, gathered[server]
            gathered[server], sizes[server] = [], 0
    for server, rest in gathered.items():
        if rest:
            yield server, rest


def _put_items(caller: "Caller", items: list[Item], failed: Callable[[Item, str], None]) -> None:
    dropped: set[int] = set()
    unsized: list[Item] = []

    def send(sock: "_socket.socket", index: int) -> str:
        item = items[index]
        sent, checksum = 0, ""
        try:
            fd = os.open(item.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if item.size == 0 and os.read(fd, 1):
                    unsized.append(item)
                else:
                    sent, checksum = send_hashed(sock, fd, item.size)
            except OSError:
                sent = os.lseek(fd, 0, os.SEEK_CUR)  # what was read before the failure went out
                raise
            finally:
                os.close(fd)
            if sent != item.size:
                failed(item, "the file became shorter while it was sent")
        except OSError as e:
            failed(item, f"{item.file}: {e.strerror}")
        if sent == item.size and checksum:
            return checksum
        dropped.add(index)
        _fill(sock, item.size - sent)
        return ""

    refused = put_batch(caller, [(item.path, item.size) for item in items], send)
    for i, error in enumerate(refused):
        if error is not None and i not in dropped:
            failed(items[i], str(error))
    for item in unsized:  # files of /proc claim to be empty
        try:
            with open(item.file, "rb") as f:
                put_one(caller, item.path, f.fileno(), None, item.file)
        except OSError as e:
            failed(item, f"{item.file}: {e.strerror}")
        except S4Error as e:
            failed(item, str(e))


def _fill(sock: "_socket.socket", size: int) -> None:
    """Send something in place of a file that cannot be read, so that the others of its batch arrive."""
    if size > MAX_BATCH_BYTES:
        raise TransferError("a large file could not be read")
    send_all(sock, memoryview(bytes(size)))


def _get_items(caller: "Caller", items: list[Item], failed: Callable[[Item, str], None]) -> None:
    over: set[int] = set()  # those that are in place, or were told to have failed

    def receive(incoming: Incoming, index: int, size: int, checksum: str) -> None:
        item = items[index]
        before = incoming.taken
        try:
            with _arriving(item.file) as (target, new):
                arrived, found = incoming.copy(target, size, reserve=new)
                if arrived != size:
                    raise TransferError(f"{url(item.path)}: only {arrived} of {size} bytes came")
                if found != checksum:
                    raise LocalFileError(f"{item.file}: {checksum} is the stored checksum, but {found} came")
        except LocalFileError as e:
            failed(item, str(e))
            over.add(index)  # by now, for the next line may find that the connection broke
            incoming.skip(size - (incoming.taken - before))
        over.add(index)

    try:
        refused = get_batch(caller, [item.path for item in items], receive)
    except S4Error as e:
        refused = [None if index in over else e for index in range(len(items))]
    for item, error in zip(items, refused, strict=True):
        if error is not None:
            failed(item, str(error))


@contextlib.contextmanager
def _progress(files: int, size: int) -> Iterator[Callable[[list[Item]], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda items: None
        return
    from tqdm import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, desc=f"{files} files", leave=False) as bar:

        def advance(items: list[Item]) -> None:
            bar.update(sum(item.size for item in items))

        yield advance
