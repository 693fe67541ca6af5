"""The HTTP interface of a node: Falcon resources that translate requests and answers, and nothing else."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from json.encoder import encode_basestring
from typing import Any

import falcon

from s4.errors import (
    BadRequestError,
    BusyError,
    CancelledError,
    CommandError,
    ConflictError,
    MissingError,
    OverlapError,
    S4Error,
    StoppingError,
    TimeLimitError,
    TransferError,
    WrongNodeError,
)
from s4.evals import EvalOutput
from s4.exchange import MAX_BATCH_KEYS
from s4.http import EXITCODE_HEADER, FINGERPRINT_HEADER, STDERR_SIZE_HEADER
from s4.index.keys import ListRow
from s4.jobapi import (
    Cancel,
    Job,
    JobList,
    JobStatus,
    Outputs,
    Plan,
    RemoveOutputs,
    Resource,
    Retry,
    Schema,
    Sql,
    Stat,
    TaskList,
    TaskStatus,
)
from s4.keys import SCHEME
from s4.node import Node
from s4.parameters import (
    answer_json,
    checked_command,
    checked_job_id,
    flag,
    is_size,
    job_id_or_new,
    json_lines,
    json_list,
    json_strings,
    needed,
    positive_seconds,
    query_of,
    whole_number,
)
from s4.states import MAP, MAP_FROM_N, MAP_TO_N
from s4.streams import BLOCK
from s4.text import without_controls
from s4.transfers import Prepared

# The one place where errors become statuses; a class that is not here takes its base's, in the end 500.
STATUSES: dict[type[S4Error], int] = {
    BadRequestError: 400,
    TransferError: 400,
    CommandError: 400,
    CancelledError: 400,
    TimeLimitError: 400,
    MissingError: 404,
    ConflictError: 409,
    OverlapError: 423,
    BusyError: 429,
    StoppingError: 503,
    S4Error: 500,
}
RETRY_AFTER_SECONDS = 1
MAX_JSON_OUTPUT = 1024 * 1024  # bytes of the end of stdout, and of stderr, in the JSON of a failed eval

log = logging.getLogger("s4.http")


def make_app(node: Node) -> "falcon.App[falcon.Request, falcon.Response]":
    """The WSGI application of a node."""
    app = falcon.App(middleware=[_Gatekeeper(node)], media_type=falcon.MEDIA_TEXT)
    app.add_error_handler(Exception, _answer_unexpected)
    app.add_error_handler(falcon.HTTPError, _answer_http_error)
    app.add_error_handler(S4Error, _answer_error)
    app.add_route("/health", Health())
    app.add_route("/list", List(node))
    app.add_route("/list_buckets", Buckets(node))
    app.add_route("/delete", Delete(node))
    app.add_route("/prepare_put", PreparePut(node))
    app.add_route("/confirm_put", ConfirmPut(node))
    app.add_route("/prepare_get", PrepareGet(node))
    app.add_route("/confirm_get", ConfirmGet(node))
    app.add_route("/prepare_puts", PreparePuts(node))
    app.add_route("/confirm_puts", ConfirmPuts(node))
    app.add_route("/prepare_gets", PrepareGets(node))
    app.add_route("/eval", Eval(node))
    app.add_route("/map", Job(node, MAP))
    app.add_route("/map_to_n", Job(node, MAP_TO_N))
    app.add_route("/map_from_n", Job(node, MAP_FROM_N))
    app.add_route("/cancel", Cancel(node))
    app.add_route("/retry", Retry(node))
    app.add_route("/plan", Plan(node))
    app.add_route("/job", JobStatus(node))
    app.add_route("/jobs", JobList(node))
    app.add_route("/task", TaskStatus(node))
    app.add_route("/tasks", TaskList(node))
    app.add_route("/outputs", Outputs(node))
    app.add_route("/remove_outputs", RemoveOutputs(node))
    app.add_route("/stat", Stat(node))
    app.add_route("/sql", Sql(node))
    app.add_route("/schema", Schema(node))
    return app


def status_of(error: S4Error) -> int:
    """The HTTP status of an error."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def _answer_error(
    _req: falcon.Request, resp: falcon.Response, error: S4Error, _params: dict[str, Any]
) -> None:
    status = status_of(error)
    resp.status = status
    resp.content_type = falcon.MEDIA_TEXT  # which the resource may have set for its own answer
    resp.text = str(error).encode("utf-8", "backslashreplace").decode()
    if status in (429, 503):
        resp.set_header("Retry-After", str(RETRY_AFTER_SECONDS))


def _answer_http_error(
    _req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, _params: dict[str, Any]
) -> None:
    resp.status = error.status
    resp.text = f"{error.title}: {error.description}" if error.description else str(error.title)
    for name, value in dict(error.headers or {}).items():
        resp.set_header(name, value)


def _answer_unexpected(
    req: falcon.Request, resp: falcon.Response, error: Exception, _params: dict[str, Any]
) -> None:
    log.error("%s %s failed", req.method, req.relative_uri, exc_info=error)
    resp.status = 500
    resp.content_type = falcon.MEDIA_TEXT
    resp.text = f"internal error: {error!r}; the log of the node has more"


class _Gatekeeper:
    """Refuses callers with another conf, tells them ours, and logs one line a request."""

    def __init__(self, node: Node) -> None:
        self._fingerprint = node.conf.fingerprint
        self._server = node.conf.servers[node.position]

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        req.context.began = time.monotonic()
        resp.set_header(FINGERPRINT_HEADER, self._fingerprint)
        theirs = req.get_header(FINGERPRINT_HEADER)
        if theirs is not None and theirs != self._fingerprint:
            raise WrongNodeError(f"{self._server} has another conf: other servers, or in another order")

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, _resource: object, _succeeded: bool
    ) -> None:
        milliseconds = (time.monotonic() - req.context.began) * 1000
        log.info(
            "%s %s %s %.1fms",
            req.method,
            without_controls(req.relative_uri),  # its path is decoded
            falcon.code_to_http_status(resp.status)[:3],
            milliseconds,
        )


class Health:
    """GET /health: 200 `healthy`; 400 for a caller whose conf differs."""

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        resp.text = "healthy"


class List(Resource):
    """GET /list?prefix=&recursive=: JSON rows [date, time, size, path], a folder ["", "", "PRE", "name/"].

    Sorted by path, one row a line. Paths are relative to the folder of the prefix, or if recursive to the
    bucket. Times are local to the node.
    """

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        prefix = given.get("prefix", "").removeprefix(SCHEME)
        recursive = flag(given, "recursive")
        chunks = self._node.list(prefix, recursive=recursive)
        if recursive:
            cut = len(prefix.partition("/")[0]) + 1 if prefix else 0
        else:
            cut = prefix.rfind("/") + 1
        resp.content_type = falcon.MEDIA_JSON
        resp.stream = _json_rows(chunks, cut)


class Buckets(Resource):
    """GET /list_buckets: as /list, path = bucket, size = bytes of its keys on this node."""

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = falcon.MEDIA_JSON
        resp.stream = _json_rows(self._node.list("", recursive=False), 0)


def _json_rows(chunks: Iterator[list[ListRow]], cut: int) -> Iterator[bytes]:
    stamps: dict[int, tuple[str, str]] = {}  # many keys are made in the same second

    # By hand: as fast as orjson, whose buffers would stay in each thread, 10 MB each.
    def shown(chunk: list[ListRow]) -> list[str]:
        lines = []
        for path, size, created_s in chunk:
            if size is None:
                lines.append(f'["","","PRE",{encode_basestring(path[cut:])}]')
                continue
            stamp = stamps.get(created_s)
            if stamp is None:
                if len(stamps) > 10_000:
                    stamps.clear()
                day, clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created_s)).split()
                stamp = stamps[created_s] = (day, clock)
            lines.append(f'["{stamp[0]}","{stamp[1]}","{size}",{encode_basestring(path[cut:])}]')
        return lines

    return json_lines(map(shown, chunks))


class Delete(Resource):
    """POST /delete?prefix=&recursive=: removes one key (404 if it is missing) or all that start with it."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        self._node.delete(needed(given, "prefix"), recursive=flag(given, "recursive"))
        resp.text = "deleted"


class PreparePut(Resource):
    """POST /prepare_put?key=[&size=]: `UUID PORT`; the bytes then go raw to PORT.

    With `size` in bytes the disk space is reserved beforehand and exactly so many are read; without it all
    until the sender closes its side.
    """

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        path = self._node.own_key(needed(given, "key"))
        size = whole_number(given, "size") if "size" in given else None
        prepared = self._node.transfers.prepare_put([(path, size, None)], _peer(req))
        _raise_refusal(prepared.refused)
        resp.text = f"{prepared.uuid} {prepared.port}"


class ConfirmPut(Resource):
    """POST /confirm_put?uuid=&checksum=: 200 once the key is stored and visible."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        uuid, checksum = needed(given, "uuid"), needed(given, "checksum")
        _raise_refusal(self._node.transfers.confirm_put(uuid, [checksum]))
        resp.text = "stored"


class PrepareGet(Resource):
    """POST /prepare_get?key=[&port=]: `UUID PORT` to read the bytes from, or with `port` (of the caller,
    to which the node connects) `UUID`."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        path = self._node.own_key(needed(given, "key"))
        port = whole_number(given, "port", 65535) if "port" in given else None
        if port == 0:
            raise BadRequestError("port=0: a port of the caller is needed")
        prepared = self._node.transfers.prepare_get([path], _peer(req), port, confirmed=True)
        _raise_refusal(prepared.refused)
        resp.text = prepared.uuid if port is not None else f"{prepared.uuid} {prepared.port}"


class ConfirmGet(Resource):
    """POST /confirm_get?uuid=&checksum=: 200 only if the checksum is the stored one."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        self._node.transfers.confirm_get(needed(given, "uuid"), needed(given, "checksum"))
        resp.text = "confirmed"


class PreparePuts(Resource):
    """POST /prepare_puts[?job=], body [[key, size], …], at most 200: {"uuid", "port", "refused"}.

    `refused` has per key null or [status, reason]. The bytes of the others follow each other on one
    connection to `port`, in order. Outputs of a `job` are [key, size, number of the task]; they may replace
    what the same task made before.
    """

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = json_list(req, MAX_BATCH_KEYS)
        given = query_of(req)
        job = checked_job_id(given["job"]) if "job" in given else None
        length = 2 if job is None else 3
        if not all(
            isinstance(entry, list)
            and len(entry) == length
            and isinstance(entry[0], str)
            and all(map(is_size, entry[1:]))
            for entry in body
        ):
            fields = "key, size in bytes" if job is None else "key, size in bytes, number of the task"
            raise BadRequestError(f"the body must be a JSON list of [{fields}]")
        entries = [(self._node.own_key(key), size, task[0] if task else None) for key, size, *task in body]
        _answer_prepared(resp, self._node.transfers.prepare_put(entries, _peer(req), job))


class ConfirmPuts(Resource):
    """POST /confirm_puts?uuid=, body [checksum, …] of the keys that were sent: {"refused"} as above."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        uuid = needed(query_of(req), "uuid")
        checksums = json_strings(req, MAX_BATCH_KEYS)
        refused = self._node.transfers.confirm_put(uuid, checksums)
        answer_json(resp, {"refused": _refusals(refused)})


class PrepareGets(Resource):
    """POST /prepare_gets, body [key, …], at most 200: {"uuid", "port", "refused", "files"}.

    `files` are [bytes, checksum] of the keys that are there; their bytes follow each other on one connection
    to `port`. Nothing is to be confirmed: the caller compares the checksums.
    """

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        paths = [self._node.own_key(key) for key in json_strings(req, MAX_BATCH_KEYS)]
        _answer_prepared(resp, self._node.transfers.prepare_get(paths, _peer(req), confirmed=False))


def _answer_prepared(resp: falcon.Response, prepared: Prepared) -> None:
    answer = {"uuid": prepared.uuid, "port": prepared.port, "files": prepared.files}
    answer_json(resp, answer | {"refused": _refusals(prepared.refused)})


class Eval(Resource):
    """POST /eval?key=, body = command: 200 and its stdout; 400 with JSON {"exitcode", "stdout", "stderr"}
    (of long outputs the last MiB).

    With `raw=true` the body is always stdout followed by stderr, byte for byte, and headers tell the exit
    code and the length of stderr. `timeout` is the time limit in seconds, beyond which the exit code is that
    of a killed command, as when it was cancelled; `job` is the id, 409 for one that was used before.
    """

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        command = os.fsdecode(req.bounded_stream.read())
        abandoned: Callable[[], bool] = req.env.get("waitress.client_disconnected", lambda: False)
        raw = flag(given, "raw")
        try:
            done = self._node.evals.run(
                self._node.own_key(needed(given, "key")),
                job_id_or_new(given.get("job", "")),
                checked_command(command),
                positive_seconds("timeout", given.get("timeout"), self._node.limits.timeout),
                abandoned,
            )
        except (TimeLimitError, CancelledError) as e:
            if raw:
                raise
            resp.status = 400
            answer_json(resp, {"exitcode": 128 + signal.SIGKILL, "stdout": "", "stderr": f"{e}\n"})
            return
        resp.status = 200 if done.exitcode == 0 else 400
        if raw:
            resp.content_type = "application/octet-stream"
            resp.set_header(EXITCODE_HEADER, str(done.exitcode))
            resp.set_header(STDERR_SIZE_HEADER, str(done.stderr_size))
            resp.content_length = done.stdout_size + done.stderr_size
            resp.stream = _blocks((done.stdout, done.stdout_size), (done.stderr, done.stderr_size))
        elif done.exitcode == 0:
            os.close(done.stderr)
            resp.content_type = "application/octet-stream"
            resp.content_length = done.stdout_size
            resp.stream = _blocks((done.stdout, done.stdout_size))
        else:
            answer_json(resp, _failed_eval(done))


def _failed_eval(done: EvalOutput) -> dict[str, object]:
    texts = []
    for fd, size in ((done.stdout, done.stdout_size), (done.stderr, done.stderr_size)):
        os.lseek(fd, max(0, size - MAX_JSON_OUTPUT), os.SEEK_SET)
        texts.append(b"".join(_blocks((fd, min(size, MAX_JSON_OUTPUT)))).decode("utf-8", "replace"))
    return {"exitcode": done.exitcode, "stdout": texts[0], "stderr": texts[1]}


def _blocks(*files: tuple[int, int]) -> Iterator[bytes]:
    """The bytes of open files, given as (descriptor, size), which are closed at the end."""
    try:
        for fd, size in files:
            while size > 0 and (block := os.read(fd, min(size, BLOCK))):
                size -= len(block)
                yield block
    finally:
        for fd, _size in files:
            os.close(fd)


def _raise_refusal(refused: list[S4Error | None]) -> None:
    for error in refused:
        if error is not None:
            raise error


def _refusals(errors: list[S4Error | None]) -> list[tuple[int, str] | None]:
    return [None if error is None else (status_of(error), str(error)) for error in errors]


def _peer(req: falcon.Request) -> str:
    return str(req.env["REMOTE_ADDR"])
