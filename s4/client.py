"""The client: places keys itself, talks to all nodes at once, and merges what they answer.

`Client` is the Python face of s4, and the command line is generated from it.
"""

import os
from collections.abc import Callable, Iterator, Sequence

from s4.config import Server, read_conf, timeout_setting
from s4.errors import BadRequestError, MissingError, NodeError, S4Error
from s4.http import EXITCODE_HEADER, FOREVER, STDERR_SIZE_HEADER, Caller
from s4.keys import check_job_folders, new_job_id, owner, parse_key, parse_prefix, url

# What only some commands need is imported where it is used: threading takes 1 ms, json 1.5. What only
# annotations need is not imported at all: typing takes 3.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO, TypeVar

    from s4.results import Entry, Evaluation

    T = TypeVar("T")

HEALTH_SECONDS = 1.0
GRACE_SECONDS = 30.0  # how much longer than a command's time limit its answer may take


class Client:
    """A client of the cluster that a conf file describes.

    conf: the conf file; without it the one that S4_CONF_PATH names, ~/.s4.conf, or the one-node default.
    Raises ConfError. All methods raise S4Error, whose text is one line for the user.
    """

    def __init__(self, conf: str | None = None) -> None:
        self._conf = read_conf(conf)
        self._timeout = timeout_setting()

    def cp(self, src: str, dst: str, *, recursive: bool = False) -> None:
        """Copy a file to a key, or a key to a file; '-' is stdin or stdout.

        A DST that ends in '/' means: into that folder, same name.

        Args:
            src: local path, '-', or s4://BUCKET/KEY.
            dst: local path, '-', or s4://BUCKET/KEY; one of the two sides is s4.
            recursive: copy a folder, or every key that starts with a prefix.
        """
        from s4.copying import copy

        copy(self, src, dst, recursive)

    def ls(self, prefix: str = "", *, recursive: bool = False) -> "Iterator[Entry]":
        """List buckets, or keys and folders that start with a prefix.

        Args:
            prefix: s4://BUCKET/PATH, any beginning of a key; without it the buckets. 's4://' may be left out.
            recursive: every key below instead of folders.
        """
        path = parse_prefix(prefix)
        if "/" not in path and not recursive:
            return self._buckets(path)
        parameters = {"prefix": url(path), "recursive": "true" if recursive else "false"}
        return self._listing("/list", parameters)

    def _buckets(self, bucket: str) -> "Iterator[Entry]":
        from s4.results import Entry

        merged: dict[str, Entry] = {}
        for entry in self._listing("/list_buckets", {}):
            if bucket in ("", entry.path):
                known = merged.get(entry.path, entry._replace(size="0"))
                date, time = min(known[:2], entry[:2])
                size = str(int(known.size) + int(entry.size))
                merged[entry.path] = Entry(date, time, size, entry.path)
        return iter(merged.values())

    def _listing(self, path: str, parameters: dict[str, str]) -> "Iterator[Entry]":
        from s4.listing import merge, rows, without_repeats

        def start(server: str) -> "Iterator[list[Entry]]":
            caller = self.caller(server)
            return rows(caller, caller.open("GET", path, parameters))

        return without_repeats(merge(at_once(start, self.servers())))

    def rm(self, prefix: str, *, recursive: bool = False) -> None:
        """Remove a key, or with -r every key that starts with a prefix.

        Args:
            prefix: s4://BUCKET/KEY, or with -r any beginning of keys.
            recursive: every key that starts with the prefix; none is fine.
        """
        if recursive:
            path = parse_prefix(_with_scheme(prefix))
            if not path:
                raise BadRequestError("rm -r needs at least a bucket: s4://BUCKET/")
            servers = self.servers()
        else:
            path = parse_key(_with_scheme(prefix))
            servers = [self.server_of(path)]
        parameters = {"prefix": url(path), "recursive": "true" if recursive else "false"}

        def remove(server: str) -> bytes:
            with self.caller(server) as caller:
                return caller.call("POST", "/delete", parameters)

        at_once(remove, servers)

    def eval(
        self, key: str, cmd: str, *, stdout: "BinaryIO | None" = None, stderr: "BinaryIO | None" = None
    ) -> "Evaluation":
        """Run a bash command on the key's node with the key's data on stdin.

        Args:
            key: s4://BUCKET/KEY.
            cmd: a bash line.
            stdout: where to write the command's output as it comes; without it, it is returned.
            stderr: the same for its stderr.
        """
        from s4.results import Evaluation

        path = parse_key(_with_scheme(key))
        parameters = {"key": url(path), "raw": "true", "timeout": repr(self._timeout), "job": new_job_id()}
        with self.caller(self.server_of(path)) as caller:
            response = caller.open(
                "POST",
                "/eval",
                parameters,
                os.fsencode(cmd),
                silence=self._timeout + GRACE_SECONDS,
                accept=(200, 400),
            )
            exitcode = response.getheader(EXITCODE_HEADER)
            with caller.reading():
                if exitcode is None:
                    raise BadRequestError(response.read().decode("utf-8", "replace"))
                errors_size = int(response.getheader(STDERR_SIZE_HEADER) or 0)
                output_size = int(response.getheader("Content-Length") or 0) - errors_size
            written = []
            for target, size in ((stdout, output_size), (stderr, errors_size)):
                kept: list[bytes] = []
                while size > 0:
                    with caller.reading():
                        block = response.read(min(size, 256 * 1024))
                    if not block:
                        raise NodeError(caller.server, "the answer broke off")
                    size -= len(block)
                    (target.write if target is not None else kept.append)(block)
                written.append(b"".join(kept))
            return Evaluation(int(exitcode), *written)

    def map(self, indir: str, outdir: str, cmd: str) -> int:
        """Run a bash command for each key: its data on stdin, stdout becomes OUTDIR + the same path.

        Returns the number of commands.

        Args:
            indir: s4://BUCKET/DIR/ or a glob such as s4://BUCKET/DIR/*/*_2.
            outdir: s4://BUCKET/DIR/.
            cmd: a bash line; $filename is the key's NAME.
        """
        return self._job("/map", indir, outdir, cmd)

    def map_to_n(self, indir: str, outdir: str, cmd: str) -> int:
        """Run a bash command for each key; it writes files and prints their paths: the shuffle.

        Each file becomes OUTDIR + the key's NAME + '/' + the file's name, on the node that owns it. Returns
        the number of commands.

        Args:
            indir: s4://BUCKET/DIR/ or a glob such as s4://BUCKET/DIR/*/*_2.
            outdir: s4://BUCKET/DIR/.
            cmd: a bash line; $filename is the key's NAME.
        """
        return self._job("/map_to_n", indir, outdir, cmd)

    def map_from_n(self, indir: str, outdir: str, cmd: str) -> int:
        """Run a bash command for each group of keys with the same prefix of NAME: the merge.

        Its stdin are the paths of the group's files, one a line; stdout becomes OUTDIR + the prefix. Returns
        the number of commands.

        Args:
            indir: s4://BUCKET/DIR/ or a glob such as s4://BUCKET/DIR/*/*_2.
            outdir: s4://BUCKET/DIR/.
            cmd: a bash line.
        """
        return self._job("/map_from_n", indir, outdir, cmd)

    def _job(self, path: str, indir: str, outdir: str, cmd: str) -> int:
        import json

        check_job_folders(_with_scheme(indir), _with_scheme(outdir))
        job_id = new_job_id()
        request = {"cmd": cmd, "indir": indir, "outdir": outdir, "job": job_id, "timeout": self._timeout}
        body = json.dumps(request).encode()

        callers: list[Caller] = []

        def run(server: str) -> int:
            with self.caller(server) as caller:
                callers.append(caller)
                caller.call("GET", "/health")  # a job has no time limit; find out now who is no node
                answer = caller.call("POST", path, None, body, silence=FOREVER)
                try:
                    return int(json.loads(answer)["tasks"])
                except (ValueError, TypeError, KeyError):
                    raise NodeError(server, "its answer makes no sense") from None

        def give_up() -> None:
            self._cancel(job_id)
            for caller in callers:
                caller.abort()

        tasks = at_once(run, self.servers(), on_failure=give_up)
        if sum(tasks) == 0:
            raise MissingError(f"nothing to map: no keys in {indir}")
        return sum(tasks)

    def _cancel(self, job_id: str) -> None:
        def cancel(server: str) -> None:
            try:
                with Caller(server, self._conf.fingerprint, HEALTH_SECONDS) as caller:
                    caller.call("POST", "/cancel", {"job": job_id}, silence=self._timeout)
            except S4Error:
                pass  # it is down, or has not begun or has ended its share; the first failure is what counts

        at_once(cancel, self.servers())

    def health(self) -> dict[str, str | None]:
        """Ask every server whether it is healthy: None, or what is wrong with it."""
        import threading

        found: dict[str, str | None] = dict.fromkeys(self.servers(), "no answer in time")

        def ask(server: str) -> None:
            try:
                with Caller(server, self._conf.fingerprint, HEALTH_SECONDS) as caller:
                    healthy = caller.call("GET", "/health").strip() == b"healthy"
                found[server] = None if healthy else "its answer makes no sense"
            except S4Error as e:
                found[server] = str(e).removeprefix(f"{server}: ")

        threads = [threading.Thread(target=ask, args=(server,), daemon=True) for server in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * HEALTH_SECONDS)  # the look-up of a host name has no time limit of its own
        return dict(found)

    def servers(self) -> list[str]:
        """The servers, host:port, in the conf's order."""
        return [str(server) for server in self._conf.servers]

    def config(self) -> list[str]:
        """The servers, host:port, in the conf's order (the same as servers)."""
        return self.servers()

    def server_of(self, path: str) -> str:
        """The server that owns a key, given as BUCKET/PATH/NAME."""
        servers: Sequence[Server] = self._conf.servers
        return str(servers[owner(path, len(servers))])

    def caller(self, server: str) -> Caller:
        """A new connection to a server."""
        return Caller(server, self._conf.fingerprint, self._timeout)


def _with_scheme(text: str) -> str:
    if not text.startswith("s4://"):
        raise BadRequestError(f"{text!r} is not an s4 path: write s4://BUCKET/…")
    return text


def at_once(
    call: "Callable[[str], T]", servers: Sequence[str], on_failure: Callable[[], None] = lambda: None
) -> "list[T]":
    """Call all servers, each in a thread, and return the results in order.

    At the first failure, or a Ctrl-C, `on_failure()` is called, which should make the others end; then the
    first error is raised.
    """
    import threading

    results: dict[int, T] = {}
    errors: list[BaseException] = []
    changed = threading.Condition()

    def run(i: int, server: str) -> None:
        try:
            result = call(server)
        except BaseException as e:
            with changed:
                errors.append(e)
                changed.notify()
        else:
            with changed:
                results[i] = result
                changed.notify()

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(servers)]
    for thread in threads:
        thread.start()
    try:
        with changed:
            changed.wait_for(lambda: errors or len(results) == len(servers))
    except KeyboardInterrupt:
        on_failure()
        raise
    if errors:
        first = errors[0]
        on_failure()
        for thread in threads:
            thread.join(GRACE_SECONDS)
        raise first
    return [results[i] for i in range(len(servers))]
