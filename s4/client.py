"""The client: places keys itself, talks to all nodes at once, and merges what they answer.

`Client` is the Python face of s4, and the command line is generated from it.
"""

import os
from collections.abc import Iterator, Sequence

from s4.asking import ANSWER_SECONDS, at_once
from s4.config import Server, read_conf, timeout_setting
from s4.errors import BadRequestError, NodeError, NonsenseError, S4Error, reason_of
from s4.http import EXITCODE_HEADER, STDERR_SIZE_HEADER, Caller
from s4.keys import new_job_id, owner, parse_key, parse_prefix, url, with_scheme

# What only some commands need is imported where it is used: threading takes 1 ms. What only annotations need
# is not imported at all: typing takes 3.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from s4.following import Watch
    from s4.jobcontrol import Request
    from s4.queries import KeyInfo, Result
    from s4.results import Entry, Evaluation
    from s4.summary import JobSummary, PlanPart, Task

HEALTH_SECONDS = 1.0


class Client:
    """A client of the cluster that a conf file describes.

    conf: the conf file; without it the one that S4_CONF_PATH names, ~/.s4.conf, or the one-node default.
    Raises ConfError. All methods raise S4Error, whose text is one line for the user.
    """

    def __init__(self, conf: str | None = None) -> None:
        self._conf = read_conf(conf)
        self._timeout = timeout_setting()

    def cp(
        self, src: "str | os.PathLike[str]", dst: "str | os.PathLike[str]", *, recursive: bool = False
    ) -> None:
        """Copy a file to a key, or a key to a file; '-' is stdin or stdout.

        A DST that ends in '/' means: into that folder, same name.

        Args:
            src: local path, '-', or s4://BUCKET/KEY.
            dst: local path, '-', or s4://BUCKET/KEY; one of the two sides is s4.
            recursive: copy a folder, or every key that starts with a prefix.
        """
        from s4.copying import copy

        copy(self, os.fspath(src), os.fspath(dst), recursive)

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
            try:
                return rows(caller, caller.open("GET", path, parameters))
            except BaseException:
                caller.close()
                raise

        return without_repeats(merge(at_once(start, self.servers())))

    def rm(self, prefix: str, *, recursive: bool = False) -> None:
        """Remove a key, or with -r every key that starts with a prefix.

        Args:
            prefix: s4://BUCKET/KEY, or with -r any beginning of keys.
            recursive: every key that starts with the prefix; no match is no error.
        """
        if recursive:
            path = parse_prefix(with_scheme(prefix))
            if not path:
                raise BadRequestError("rm -r needs at least a bucket: s4://BUCKET/")
            servers = self.servers()
        else:
            path = parse_key(with_scheme(prefix))
            servers = [self.server_of(path)]
        parameters = {"prefix": url(path), "recursive": "true" if recursive else "false"}

        def remove(server: str) -> bytes:
            with self.caller(server) as caller:
                return caller.call("POST", "/delete", parameters)

        try:
            at_once(remove, servers)
        except NodeError as e:
            if len(servers) == 1:
                raise
            rest = "what others hold may be removed; run it again when that server is back"
            raise NodeError(e.server, f"{reason_of(e, e.server)}; {rest}") from e

    def eval(
        self, key: str, cmd: str, *, stdout: "BinaryIO | None" = None, stderr: "BinaryIO | None" = None
    ) -> "Evaluation":
        """Run a bash command on the key's node with the key's data on stdin.

        Args:
            key: s4://BUCKET/KEY.
            cmd: a bash line.
            stdout: where to write what the command printed, once it has ended; without it, it is returned.
            stderr: the same for its stderr.
        """
        from s4.results import Evaluation

        path = parse_key(with_scheme(key))
        try:
            command = os.fsencode(cmd)
        except UnicodeEncodeError:
            raise BadRequestError("the command is not valid UTF-8") from None
        parameters = {"key": url(path), "raw": "true", "timeout": repr(self._timeout), "job": new_job_id()}
        with self.caller(self.server_of(path)) as caller:
            response = caller.open(
                "POST",
                "/eval",
                parameters,
                command,
                silence=self._timeout + ANSWER_SECONDS,
                accept=(200, 400),
            )
            exitcode = response.getheader(EXITCODE_HEADER)
            with caller.reading():
                if exitcode is None:
                    raise BadRequestError(response.read().decode("utf-8", "replace"))
                errors_size = int(response.getheader(STDERR_SIZE_HEADER) or 0)
                output_size = int(response.getheader("Content-Length") or -1) - errors_size
                if not 0 <= int(exitcode) <= 255 or output_size < 0 or errors_size < 0:
                    raise NonsenseError(caller.server)
            written = []
            for target, size in ((stdout, output_size), (stderr, errors_size)):
                kept: list[bytes] = []
                while size > 0:
                    with caller.reading():
                        block = response.read(min(size, 256 * 1024))
                    size -= len(block)
                    if target is None:
                        kept.append(block)
                    else:
                        _write_all(target, block)
                written.append(b"".join(kept))
            return Evaluation(int(exitcode), *written)

    def map(
        self,
        indir: str,
        outdir: str,
        cmd: str,
        *,
        timeout: float | None = None,
        retries: int = 0,
        keep_going: bool = False,
        skip_existing: bool = False,
        no_overlap: bool = False,
        watch: "Watch | None" = None,
    ) -> "JobSummary":
        """Run a bash command for each key: its data on stdin, stdout becomes OUTDIR + the same path.

        Raises JobError if a task fails.

        Args:
            indir: s4://BUCKET/DIR/ or a glob such as s4://BUCKET/DIR/*/*_2.
            outdir: s4://BUCKET/DIR/.
            cmd: a bash line; $filename is the key's NAME.
            timeout: seconds that a command may take; S4_TIMEOUT or 300 without it.
            retries: how often a task is tried again when its command fails or its worker dies.
            keep_going: run the rest when a task fails, and fail at the end.
            skip_existing: skip inputs whose output exists already.
            no_overlap: start nothing if the same job is still running.
            watch: hears of the progress.
        """
        from s4.jobcontrol import run

        request = self.request(
            "map",
            indir,
            outdir,
            cmd,
            timeout=timeout,
            retries=retries,
            keep_going=keep_going,
            skip_existing=skip_existing,
            no_overlap=no_overlap,
        )
        return run(self, request, watch)

    def map_to_n(
        self,
        indir: str,
        outdir: str,
        cmd: str,
        *,
        timeout: float | None = None,
        retries: int = 0,
        keep_going: bool = False,
        skip_existing: bool = False,
        no_overlap: bool = False,
        watch: "Watch | None" = None,
    ) -> "JobSummary":
        """Run a bash command for each key; it writes files and prints their names: the shuffle.

        Each file becomes OUTDIR + the key's NAME + '/' + the file's name, on the node that owns it.

        Raises JobError if a task fails.

        Args:
            indir: s4://BUCKET/DIR/ or a glob such as s4://BUCKET/DIR/*/*_2.
            outdir: s4://BUCKET/DIR/.
            cmd: a bash line; $filename is the key's NAME.
            timeout: seconds that a command may take; S4_TIMEOUT or 300 without it.
            retries: how often a task is tried again when its command fails or its worker dies.
            keep_going: run the rest when a task fails, and fail at the end.
            skip_existing: skip inputs whose output exists already.
            no_overlap: start nothing if the same job is still running.
            watch: hears of the progress.
        """
        from s4.jobcontrol import run

        request = self.request(
            "map-to-n",
            indir,
            outdir,
            cmd,
            timeout=timeout,
            retries=retries,
            keep_going=keep_going,
            skip_existing=skip_existing,
            no_overlap=no_overlap,
        )
        return run(self, request, watch)

    def map_from_n(
        self,
        indir: str,
        outdir: str,
        cmd: str,
        *,
        timeout: float | None = None,
        retries: int = 0,
        keep_going: bool = False,
        skip_existing: bool = False,
        no_overlap: bool = False,
        watch: "Watch | None" = None,
    ) -> "JobSummary":
        """Run a bash command for each group of keys with the same prefix of NAME: the merge.

        Its stdin lists the paths of the group's files, one a line; stdout becomes OUTDIR + the prefix.

        Raises JobError if a task fails.

        Args:
            indir: s4://BUCKET/DIR/ or a glob such as s4://BUCKET/DIR/*/*_2.
            outdir: s4://BUCKET/DIR/.
            cmd: a bash line.
            timeout: seconds that a command may take; S4_TIMEOUT or 300 without it.
            retries: how often a task is tried again when its command fails or its worker dies.
            keep_going: run the rest when a task fails, and fail at the end.
            skip_existing: skip inputs whose output exists already.
            no_overlap: start nothing if the same job is still running.
            watch: hears of the progress.
        """
        from s4.jobcontrol import run

        request = self.request(
            "map-from-n",
            indir,
            outdir,
            cmd,
            timeout=timeout,
            retries=retries,
            keep_going=keep_going,
            skip_existing=skip_existing,
            no_overlap=no_overlap,
        )
        return run(self, request, watch)

    def request(
        self,
        kind: str,
        indir: str,
        outdir: str,
        cmd: str,
        *,
        timeout: float | None = None,
        retries: int = 0,
        keep_going: bool = False,
        skip_existing: bool = False,
        no_overlap: bool = False,
    ) -> "Request":
        """A job for `submit` and `plan`; the arguments are those of `map`, kind is its name or the like."""
        from s4.jobcontrol import Request

        seconds = self.timeout if timeout is None else timeout
        return Request(kind, indir, outdir, cmd, seconds, retries, keep_going, skip_existing, no_overlap)

    def submit(self, request: "Request") -> str:
        """Start a job and return its id; `wait` follows it."""
        from s4.jobcontrol import start

        return start(self, request)

    def plan(self, request: "Request") -> "list[PlanPart]":
        """What a job would have to do on each node; nothing runs."""
        from s4.jobcontrol import plan

        return plan(self, request)

    def jobs(self, *, limit: int = 20) -> "Iterator[JobSummary]":
        """List the recent jobs of the cluster, the newest first.

        Raises UnreachableError after the last if a node is down.

        Args:
            limit: at most so many.
        """
        from s4.jobcontrol import jobs

        return jobs(self, limit)

    def job(self, job: str) -> "JobSummary":
        """Show a job: how far it is on each node, and what failed.

        Args:
            job: its id, or a beginning of it that no other job has.
        """
        from s4.jobcontrol import find

        return find(self, job).summary()

    def wait(self, job: str, *, watch: "Watch | None" = None) -> "JobSummary":
        """Wait for the end of a job, whoever started it. A Ctrl-C leaves it alone.

        Raises JobError if it does not end well.

        Args:
            job: its id, or a beginning of it that no other job has.
            watch: hears of the progress.
        """
        from s4.jobcontrol import wait

        return wait(self, job, watch)

    def cancel(self, job: str) -> "tuple[JobSummary, bool]":
        """Stop a job on all nodes, with all that it runs.

        Returns how it is then, and whether it had ended before.

        Args:
            job: its id, or a beginning of it that no other job has.
        """
        from s4.jobcontrol import cancel

        return cancel(self, job)

    def retry(self, job: str, *, detach: bool = False, watch: "Watch | None" = None) -> "JobSummary | None":
        """Run again what failed, was cancelled or was lost of a job, and only that.

        Raises JobError if it does not end well, ConflictError while it runs, or another job that does the
        same. Returns None if there is nothing to do.

        Args:
            job: its id, or a beginning of it that no other job has.
            detach: return at once, with how it begins.
            watch: hears of the progress.
        """
        from s4.jobcontrol import retry

        return retry(self, job, watch, detach=detach)

    def tasks(self, job: str, *, state: str = "", stderr: bool = False) -> "Iterator[Task]":
        """The tasks of a job in their order, in one of the states (with ',' between them) or all.

        With `stderr` they come with what their commands wrote. Raises UnreachableError after the last if a
        node is down.
        """
        from s4.jobcontrol import tasks

        return tasks(self, job, state=state, stderr=stderr)

    def stat(self, key: str) -> "KeyInfo":
        """Show what is known of a key: size, checksum, place, and the job, task and command that made it.

        Args:
            key: s4://BUCKET/KEY.
        """
        from s4.queries import stat

        return stat(self, key)

    def sql(self, query: str, *, limit: int = 100_000) -> "Result":
        """Run a query on the index of every node; the first column of the result names the node.

        Raises S4Error, which names the node, for a query that writes, takes too long or finds too much.

        Args:
            query: a SELECT, in SQLite's dialect.
            limit: more rows than this are an error.
        """
        from s4.queries import sql

        return sql(self, query, limit)

    def schema(self) -> "list[list[str]]":
        """What `sql` can ask: rows of table or view, column, type, and what it means."""
        from s4.queries import schema

        return schema(self)

    def health(self) -> dict[str, str | None]:
        """Ask every server whether it is healthy.

        Returns for each server None, or what is wrong with it.
        """
        import threading
        import time

        found: dict[str, str | None] = dict.fromkeys(self.servers(), "no answer in time")

        def ask(server: str) -> None:
            try:
                with Caller(server, self._conf.fingerprint, HEALTH_SECONDS) as caller:
                    healthy = caller.call("GET", "/health").strip() == b"healthy"
                found[server] = None if healthy else "its answer makes no sense"
            except S4Error as e:
                found[server] = str(e).removeprefix(server).lstrip(": ")

        threads = [threading.Thread(target=ask, args=(server,), daemon=True) for server in found]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 2 * HEALTH_SECONDS  # the look-up of a host name has no limit of its own
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return dict(found)

    def servers(self) -> list[str]:
        """The servers, host:port, in the conf's order."""
        return [str(server) for server in self._conf.servers]

    def config(self) -> list[str]:
        """The servers, host:port, in the conf's order (the same as servers)."""
        return self.servers()

    @property
    def conf_source(self) -> str:
        """Where the servers were read: a path, or config.NO_CONF."""
        return self._conf.source

    @property
    def timeout(self) -> float:
        """Seconds that a command may take, and that a busy or silent server is waited for."""
        return self._timeout

    def server_of(self, path: str) -> str:
        """The server that owns a key, given as BUCKET/PATH/NAME."""
        servers: Sequence[Server] = self._conf.servers
        return str(servers[owner(path, len(servers))])

    def caller(self, server: str, timeout: float | None = None) -> Caller:
        """A new connection to a server."""
        return Caller(server, self._conf.fingerprint, self._timeout if timeout is None else timeout)


def _write_all(target: "BinaryIO", data: bytes) -> None:
    """Write until all is written: an unbuffered file may take less at a time."""
    while data:
        count = target.write(data)
        if count is None:
            import errno

            raise BlockingIOError(errno.EAGAIN, "it takes no more now, and does not let itself be waited for")
        data = data[count:]
