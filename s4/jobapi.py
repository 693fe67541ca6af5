"""The HTTP interface to jobs and to the records of a node; the other half of api.py."""

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import falcon

from s4.errors import BadRequestError, S4Error
from s4.index import JobRow, Maker, ShareRow
from s4.index.schema import schema
from s4.jobs import row_of
from s4.keys import url
from s4.leanjson import is_infinite
from s4.node import Node
from s4.outputs import REMOVED_AT_ONCE
from s4.parameters import (
    answer_json,
    checked_command,
    checked_job_id,
    checked_prefix,
    flag,
    is_size,
    job_id_or_new,
    json_lines,
    json_list,
    json_object,
    needed,
    positive_seconds,
    query_of,
    truth_of,
    whole_number,
    whole_of,
)
from s4.states import EVAL, MAP, MAP_FROM_N, MAP_TO_N, RUNNING, TASK_STATES

DEFAULT_ROWS = 100_000  # of an SQL query
BLOCK_BYTES = 64 * 1024  # of its answer that are sent together


class Resource:
    """A resource of a node."""

    def __init__(self, node: Node) -> None:
        self._node = node


class Job(Resource):
    """POST /map, /map_to_n, /map_from_n, body {"cmd", "indir", "outdir"}: runs this node's share.

    Optional: "job", an id that is the same on all nodes (the same id twice is one job); "timeout" in seconds
    for each task; "retries", how often a failed task is tried again; "keep_going", "skip_existing",
    "no_overlap" (423 while a twin runs). Answers JSON {"job": ID, "tasks": N} at the end, or 4xx with what
    failed; with "detach" at once, with the share as /job shows it.
    """

    def __init__(self, node: Node, kind: str) -> None:
        super().__init__(node)
        self._kind = kind

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = json_object(req)
        job = _job(body, self._kind, self._node.limits.timeout)
        no_overlap = truth_of(body, "no_overlap")
        if truth_of(body, "detach"):
            answer_json(resp, _shown(self._node.submit(job, no_overlap=no_overlap)))
        else:
            tasks = self._node.run_job(job, no_overlap=no_overlap)
            answer_json(resp, {"job": job.id, "tasks": tasks})


class Retry(Resource):
    """POST /retry, body as for /map with "job" and "kind": runs again what failed, was cancelled or was lost.

    "run" is the number of this run, one more than the last on all nodes, so from 2. A node that never had the
    job runs its whole share; one that had this run already does nothing. Answers the share; 409 while it
    runs, unless it is the same run.
    """

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = json_object(req)
        job = _job(body, _kind(body), self._node.limits.timeout)
        if not body.get("job"):
            raise BadRequestError('"job" is missing: the id of the job that is to run again')
        if job.run < 2:
            raise BadRequestError('"run" is missing: a number from 2, one more than that of the last run')
        answer_json(resp, _shown(row_of(self._node.jobs.retry(job))))


class Plan(Resource):
    """POST /plan, body as for /map and "kind": what this node's share would be; nothing runs.

    JSON {"tasks", "keys", "bytes", "largest_bytes" (of one task), "existing" (tasks whose output exists),
    "disk_free", "disk_total"}.
    """

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = json_object(req)
        answer_json(resp, self._node.plan(_job(body, _kind(body), self._node.limits.timeout)))


class Cancel(Resource):
    """POST /cancel?job=[&run=]: ends this node's share of a job and all that it runs; the share afterwards.

    404 if it never began; then it never will. `run` spares the share if it was started again since.
    """

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        run = whole_number(given, "run") if "run" in given else None
        answer_json(resp, _shown(self._node.cancel(checked_job_id(needed(given, "job")), run)))


class JobStatus(Resource):
    """GET /job?job=[&wait=]: this node's share of a job, after its end or at most `wait` seconds, and at most
    30; 404."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        wait = positive_seconds("wait", given.get("wait"), 0, or_zero=True)
        answer_json(resp, _shown(self._node.await_job(checked_job_id(needed(given, "job")), wait)))


class JobList(Resource):
    """GET /jobs[?limit=][&prefix=][&state=running]: a JSON list of this node's shares, the newest
    first, at most `limit` (1000); with `state` of all that run, evals too, in no order."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        limit = whole_number(given, "limit") if "limit" in given else 1000
        if given.get("state", RUNNING) != RUNNING:
            raise BadRequestError(f"state={given['state']!r}: only {RUNNING} can be asked for")
        running = "state" in given
        prefix = checked_prefix(given.get("prefix", ""))
        rows = self._node.jobs.newest(prefix, limit, running=running)
        if running:
            rows += self._node.evals.running(prefix)
        answer_json(resp, [_shown(row) for row in rows])


class TaskStatus(Resource):
    """GET /task?job=&task=: one task, with the command and the kind of its job; 404."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        job_id = checked_job_id(needed(given, "job"))
        number = whole_number(given, "task")
        job = self._node.job_index.share(job_id).job
        task = _shown_task(self._node.job_index.task(job_id, number))
        answer_json(resp, task | {"command": job.command, "kind": job.kind})


class TaskList(Resource):
    """GET /tasks?job=[&state=failed,…][&stderr=true]: a JSON list of tasks, one a line, in order; 404."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        states = [state for state in given.get("state", "").split(",") if state]
        for state in states:
            if state not in TASK_STATES:
                raise BadRequestError(f"state={state!r}: it must be one of {', '.join(TASK_STATES)}")
        chunks = self._node.tasks(checked_job_id(needed(given, "job")), states, stderr=flag(given, "stderr"))
        resp.content_type = falcon.MEDIA_JSON
        resp.stream = json_lines([json.dumps(_shown_task(task)) for task in chunk] for chunk in chunks)


class Outputs(Resource):
    """GET /outputs?prefix=: what made the keys here in the folders of an OUTDIR, as JSON [folder, job, task,
    seconds since 1970 of the last].

    Asked by a node that is to skip inputs of a shuffle whose outputs exist.
    """

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        found = self._node.makers(needed(query_of(req), "prefix"))
        answer_json(resp, [[*maker, created_s] for maker, created_s in found.items()])


class RemoveOutputs(Resource):
    """POST /remove_outputs?prefix=, body a JSON list of [folder, job, task]: removes what these made here.

    Sent by a node that runs a task of a shuffle again.
    """

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = json_list(req, REMOVED_AT_ONCE)
        try:
            makers = [Maker(str(folder), checked_job_id(job), task) for folder, job, task in body]
        except (ValueError, TypeError):
            makers = []
        if not makers or not all(is_size(maker.task) for maker in makers):
            raise BadRequestError("the body must be a JSON list of [folder, job, task]")
        self._node.remove_made(needed(query_of(req), "prefix"), makers)
        resp.text = "removed"


class Stat(Resource):
    """GET /stat?key=: size, checksum, times and file of a key, and the job and task that made it; 404."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        row, file = self._node.stat(needed(query_of(req), "key"))
        shown = row._asdict()
        del shown["path"]
        shown["job"] = row.job or None
        answer_json(
            resp,
            {
                "key": url(row.path),
                **shown,
                "node": str(self._node.conf.servers[self._node.position]),
                "file": file,
            },
        )


class Sql(Resource):
    """POST /sql[?limit=], body: one SELECT over the index, which can only be read.

    JSON, a line each: the names of the columns; each row as a list, a blob as {"blob": HEX}; at the end {} or
    {"error": …}. 400 for SQL that fails before its first row. At most `limit` rows (100,000) and 5 seconds.
    """

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = query_of(req)
        limit = whole_number(given, "limit") if "limit" in given else DEFAULT_ROWS
        rows = self._node.query(os.fsdecode(req.bounded_stream.read()), limit)
        resp.content_type = "application/jsonlines"
        resp.stream = itertools.chain([_json_row(next(rows))], _json_result(rows))


def _json_row(row: Sequence[Any]) -> bytes:
    try:
        line = _json(row)
    except ValueError:  # JSON has no infinity, but numbers that are read as one
        shown = (str(value).replace("inf", "1e999") if is_infinite(value) else _json(value) for value in row)
        line = f"[{', '.join(shown)}]"
    return line.encode() + b"\n"


def _json(value: object) -> str:
    return json.dumps(value, default=lambda blob: {"blob": blob.hex()}, allow_nan=False)


def _json_result(rows: Iterator[Sequence[Any]]) -> Iterator[bytes]:
    block = bytearray()
    try:
        for row in rows:
            block += _json_row(row)
            if len(block) >= BLOCK_BYTES:  # not a number of rows: a value may have megabytes
                yield bytes(block)
                block.clear()
        yield bytes(block + b"{}\n")
    except S4Error as e:
        yield bytes(block) + json.dumps({"error": str(e)}).encode() + b"\n"


class Schema(Resource):
    """GET /schema: a JSON list of [table or view, column, type, meaning] of the index."""

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        answer_json(resp, schema(self._node.database))


def _shown(row: ShareRow) -> dict[str, Any]:
    """A share as JSON has it."""
    job, counts = row.job, vars(row.counts)
    if not row.listed:
        counts = counts | {"tasks": None}
    return {
        **vars(job),
        **counts,
        "state": row.state,
        "started_s": row.started_s,
        "finished_s": row.finished_s,
        "error": row.error,
    }


def _shown_task(task: dict[str, Any]) -> dict[str, Any]:
    """A task as JSON has it."""
    task["input"] = url(task["input"])
    if task.get("stderr") is not None:
        task["stderr"] = task["stderr"].decode("utf-8", "replace")
    return task


def _kind(body: dict[str, Any]) -> str:
    kind = body.get("kind")
    if kind == EVAL:
        raise BadRequestError("an eval cannot be retried, its output went to its caller: run s4 eval again")
    if kind not in (MAP, MAP_TO_N, MAP_FROM_N):
        raise BadRequestError(f'"kind" must be {MAP}, {MAP_TO_N} or {MAP_FROM_N}')
    return str(kind)


def _job(body: dict[str, Any], kind: str, timeout: float) -> JobRow:
    """The job that a request describes; `timeout` is the default."""
    outdir = body.get("outdir", body.get("outidr"))  # as an older client spells it
    texts = (body.get("indir"), outdir, body.get("cmd"), body.get("job", ""))
    if not all(isinstance(text, str) for text in texts):
        raise BadRequestError('the body must be JSON {"cmd", "indir", "outdir"}, and "job" a string')
    indir, outdir, command, job_id = map(str, texts)
    return JobRow(
        job_id_or_new(job_id),
        kind,
        indir,
        outdir,
        checked_command(command),
        positive_seconds("timeout", body.get("timeout"), timeout),
        whole_of(body, "retries", 0),
        truth_of(body, "keep_going"),
        truth_of(body, "skip_existing"),
        max(1, whole_of(body, "run", 1)),
        alone=not job_id,
    )
