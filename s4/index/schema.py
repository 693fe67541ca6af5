"""What the tables and columns of the index mean, for people who look in with SQL."""

from s4.index.database import Database

_JOB = "id of the job"
_TASK = "number of the task, the same in the whole cluster; task % servers is its node"
_TIME = "seconds since 1970, UTC"

_TABLES: dict[str, dict[str, str]] = {
    "keys": {
        "path": "BUCKET/DIR/NAME, also the file's path below s4_data",
        "size": "bytes",
        "checksum": "xxh64, lower-case hex without leading zeros",
        "created_s": _TIME,
        "job": "id of the job that made it; null for a put, empty if a reindex has found it",
        "task": "number of the task that made it; null for a put",
    },
    "buckets": {
        "bucket": "name",
        "keys": "number of its keys on this node",
        "bytes": "sum of their sizes",
        "created_s": f"when its first key was made, {_TIME}",
    },
    "transfers": {
        "uuid": "the transfer, under way now",
        "direction": "put or get",
        "keys": "number of keys that travel together",
        "bytes": "sum of their sizes; null if not known beforehand",
        "peer": "address of the other side",
        "started_s": _TIME,
        "paths": "paths of the keys, a JSON list",
    },
    "removals": {
        "id": "counts removals, each of up to 200 keys",
        "prefix": "what their paths start with: their rows are gone, their files may not be yet",
    },
    "jobs": {
        "id": "the same on all nodes; sorts by time",
        "kind": "map, map-to-n, map-from-n or eval",
        "indir": "INDIR, or the key of an eval",
        "outdir": "OUTDIR, empty for an eval",
        "command": "the bash line; a blob if it is no UTF-8",
        "state": "of this node's share: running, done, failed, cancelled or interrupted",
        "tasks": "number of tasks of this node",
        "done": "tasks whose outputs are stored",
        "started_s": f"start of the last run, {_TIME}",
        "finished_s": f"{_TIME}; null while it runs",
        "error": "what failed first, one line",
        "run": "1, and one more for each retry",
        "listed": "1 once all tasks are known",
        "failed": "tasks that failed",
        "cancelled": "tasks that were ended, or never began",
        "skipped": "tasks whose output existed already",
        "bytes_in": "input of the tasks that ended",
        "bytes_out": "output of the tasks that are done",
        "timeout_s": "time limit for a task, seconds",
        "retries": "how often a failed task is tried again",
        "keep_going": "1: the other tasks run on after a failure",
        "skip_existing": "1: inputs whose output exists are skipped",
        "alone": "1: other nodes have no share of it: an eval, or submitted without an id",
    },
    "tasks": {
        "job": _JOB,
        "task": _TASK,
        "input": "path of the input key, of a group its first",
        "inputs": "number of keys of the group, else 1",
        "bytes_in": "bytes of the input",
        "state": "waiting, running, done, failed, cancelled or skipped",
        "attempt": "of the last try, from 1; 0: not yet tried",
        "pid": "worker process of the last try",
        "started_s": f"of the last try, {_TIME}",
        "seconds": "how long it ran",
        "cpu_seconds": "CPU time of the command and its children; null if it was killed",
        "peak_memory": "most bytes that its processes had resident together; null if it was killed",
        "bytes_out": "bytes of its outputs; null unless done",
        "exit_code": "as bash reports it; null if it did not end by itself",
        "signal": "number of the signal that ended it",
        "error": "why it failed, one line",
    },
    "half_made": {
        "job": "id of a map-to-n whose record is pruned",
        "task": "number of a task that did not end well, but made keys",
        "input": "path of its input key",
        "outdir": "path of the folder of its outputs",
    },
    "stderrs": {"job": _JOB, "task": _TASK, "stderr": "last 64 KB of the command's stderr"},
}


def _of(table: str, columns: str) -> dict[str, str]:
    return {column: _TABLES[table][column] for column in columns.split()}


MEANINGS = _TABLES | {  # and of the views
    "recent_keys": {"created": "UTC", "key": "s4://…", **_of("keys", "size checksum job task")},
    "recent_jobs": {
        "progress": "done/tasks",
        "started": "start of the last run, UTC",
        "seconds": "how long its last run took, or takes",
        **_of("jobs", "id kind state failed cancelled skipped indir outdir command error"),
    },
    "failed_tasks": {
        **_of("tasks", "job task input attempt exit_code signal seconds error"),
        **_of("stderrs", "stderr"),
    },
}


def schema(database: Database) -> list[tuple[str, str, str, str]]:
    """(table or view, column, type, meaning) of every column of the index."""
    with database.read() as db:
        found = db.execute(
            "SELECT m.name, c.name, c.type FROM sqlite_master m, pragma_table_info(m.name) c"
            " WHERE m.type IN ('table', 'view') AND m.name NOT LIKE '\\_%' ESCAPE '\\'"
            " AND m.name NOT LIKE 'sqlite%' ORDER BY m.type, m.rowid, c.cid"
        ).fetchall()
    return [(table, column, kind, MEANINGS.get(table, {}).get(column, "")) for table, column, kind in found]
