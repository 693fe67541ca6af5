"""The tables of jobs: this node's share of each job, and a row for each of its tasks.

Contract: a share begins, gets its tasks (all waiting), and ends; `change` records what became of tasks and is
called inside the transaction that publishes their outputs, so that a task is done exactly if its outputs are
keys. Counters of a share are those of its tasks.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from s4.errors import MissingError
from s4.index.database import Database, Transaction
from s4.states import DONE, INTERRUPTED, RUNNING, WAITING

STEP = 5000  # rows that one transaction changes at most; bounds how long other writers wait

STOPPED = "the node stopped"  # the error of an interrupted share, and of its tasks that ran


@dataclass(frozen=True)
class JobRow:
    """A job as it is submitted. `indir` and `outdir` as the user wrote them; an eval has its key as indir.

    `timeout` in seconds for each task; `retries` is how often a failed task is tried again; `run` counts
    from 1 and grows when what failed is run again. `alone`: other nodes have no share of it, for it is an
    eval or was submitted without an id.
    """

    id: str
    kind: str
    indir: str
    outdir: str
    command: str
    timeout: float = 300.0
    retries: int = 0
    keep_going: bool = False
    skip_existing: bool = False
    run: int = 1
    alone: bool = False

    def same_work(self, other: "JobRow") -> bool:
        """Whether two jobs are twins: the same command over the same folders."""
        return (self.kind, self.indir, self.outdir, self.command) == (
            other.kind,
            other.indir,
            other.outdir,
            other.command,
        )


@dataclass
class Counts:
    """How far a share is, in tasks and in bytes of the tasks that ended. `running` is not stored."""

    tasks: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    skipped: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    running: int = 0


class ShareRow(NamedTuple):
    """This node's share of a job. `listed`: its tasks are known. Times are seconds since 1970."""

    job: JobRow
    state: str
    listed: bool
    counts: Counts
    started_s: float
    finished_s: float | None
    error: str | None


class NewTask(NamedTuple):
    """A task to be recorded: its number, input (path of a key, of a group the first), how many keys and
    bytes it has as input, and its state."""

    task: int
    input: str
    inputs: int
    bytes_in: int
    state: str = WAITING


class HalfMade(NamedTuple):
    """A task of a map-to-n that made keys but did not end well, and paths: of its input, and of its outputs'
    folder, with '/'."""

    job: str
    task: int
    input: str
    outdir: str


class TaskChange(NamedTuple):
    """What became of a task. Times in seconds, sizes in bytes, None where it is not known.

    `inputs` and `bytes_in` are what the command got, if that is not what was listed.
    """

    task: int
    state: str
    attempt: int
    pid: int | None = None
    started_s: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory: int | None = None
    inputs: int | None = None
    bytes_in: int | None = None
    bytes_out: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None
    stderr: bytes = b""


# The fields of a JobRow, in their order.
_JOB = "id, kind, indir, outdir, command, timeout_s, retries, keep_going, skip_existing, run, alone"
_SHARE = (
    f"SELECT {_JOB}, state, listed, tasks, done, failed, cancelled, skipped, bytes_in, bytes_out,"
    " started_s, finished_s, error FROM jobs"
)
_COUNTS = """
    UPDATE jobs SET (tasks, done, failed, cancelled, skipped, bytes_in, bytes_out) = (
        SELECT count(*),
               total(state = 'done'), total(state = 'failed'), total(state = 'cancelled'),
               total(state = 'skipped'), total(iif(state IN ('done', 'failed'), bytes_in, 0)),
               total(bytes_out)
        FROM tasks WHERE job = jobs.id)
"""
_TASK_COLUMNS = (
    "task, input, inputs, state, attempt, pid, started_s, seconds, cpu_seconds, peak_memory,"
    " bytes_in, bytes_out, exit_code, signal, error"
)
_UNFINISHED = "state IN ('waiting', 'running')"
_AGAIN = "state IN ('failed', 'cancelled', 'running')"


class JobIndex:
    """The jobs and tasks of this node."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def begin(self, job: JobRow) -> None:
        """Record that a share begins, its tasks not yet known."""
        fields = vars(job) | {"command": _stored_text(job.command)}
        values = [*fields.values(), RUNNING, 0, time.time()]
        places = ", ".join("?" * len(values))
        with self._db.write() as db:
            db.execute(f"INSERT INTO jobs ({_JOB}, state, listed, started_s) VALUES ({places})", values)

    def begin_again(self, job_id: str, run: int) -> None:
        """Make what failed, was cancelled or was lost wait again; tasks that were never all listed go."""
        share = self.share(job_id)
        if not share.listed:
            self._in_steps("DELETE FROM tasks WHERE job = ? AND task > ?", job_id)
        self._in_steps(f"UPDATE tasks SET state = 'waiting' WHERE job = ? AND task > ? AND {_AGAIN}", job_id)
        with self._db.write() as db:
            db.execute(
                "UPDATE jobs SET run = ?, state = 'running', started_s = ?, finished_s = NULL, error = NULL"
                " WHERE id = ?",
                (run, time.time(), job_id),
            )
            db.execute(_COUNTS + "WHERE id = ?", (job_id,))

    def pass_over(self, job_id: str, run: int) -> None:
        """A share that is done has nothing to do in a further run: it begins and ends now, so that the job is
        equally new on all nodes."""
        with self._db.write() as db:
            db.execute(
                "UPDATE jobs SET run = ?, started_s = ?, finished_s = ? WHERE id = ?",
                (run, time.time(), time.time(), job_id),
            )

    def _in_steps(self, statement: str, job_id: str) -> None:
        """Run a statement, with the parameters job and task number, over all tasks of a job in steps."""
        last = -1
        while True:
            with self._db.write() as db:
                row = db.execute(
                    "SELECT max(task) FROM (SELECT task FROM tasks WHERE job = ? AND task > ?"
                    " ORDER BY task LIMIT ?)",
                    (job_id, last, STEP),
                ).fetchone()
                if row[0] is None:
                    return
                db.execute(statement + " AND task <= ?", (job_id, last, row[0]))
                last = row[0]

    def add_tasks(self, job_id: str, tasks: Sequence[NewTask]) -> None:
        """Record tasks of a share that is being listed."""
        with self._db.write() as db:
            db.executemany(
                "INSERT INTO tasks (job, task, input, inputs, bytes_in, state) VALUES (?, ?, ?, ?, ?, ?)",
                [(job_id, *task) for task in tasks],
            )

    def listed(self, job_id: str, counts: Counts) -> None:
        """All tasks of a share are recorded."""
        with self._db.write() as db:
            db.execute("UPDATE jobs SET listed = 1 WHERE id = ?", (job_id,))
            self._count(db, job_id, counts)

    def waiting(self, job_id: str, after: int, limit: int) -> list[tuple[NewTask, int]]:
        """The next waiting tasks with a number above `after`, each with its last attempt."""
        with self._db.read() as db:
            rows = db.execute(
                "SELECT task, input, inputs, bytes_in, state, attempt FROM tasks"
                " WHERE job = ? AND task > ? AND state = 'waiting' ORDER BY task LIMIT ?",
                (job_id, after, limit),
            ).fetchall()
        return [(NewTask(*row[:5]), row[5]) for row in rows]

    def change(self, db: Transaction, job_id: str, changes: Sequence[TaskChange]) -> None:
        """Record what became of tasks, inside a transaction."""
        db.executemany(
            "UPDATE tasks SET state = ?, attempt = ?, pid = ?, started_s = ?, seconds = ?, cpu_seconds = ?,"
            " peak_memory = ?, inputs = coalesce(?, inputs), bytes_in = coalesce(?, bytes_in), bytes_out = ?,"
            " exit_code = ?, signal = ?, error = ? WHERE job = ? AND task = ?",
            [(*change[1:-1], job_id, change.task) for change in changes],
        )
        for change in changes:  # which may be recorded already, or follow another attempt that said something
            if change.stderr:
                what = (job_id, change.task, change.stderr)
                db.execute("INSERT OR REPLACE INTO stderrs VALUES (?, ?, ?)", what)
            elif change.attempt > 1:
                db.execute("DELETE FROM stderrs WHERE job = ? AND task = ?", (job_id, change.task))

    def progress(self, job_id: str, changes: Sequence[TaskChange], counts: Counts) -> None:
        """Record what became of tasks, and how far the share is."""
        with self._db.write() as db:
            self.change(db, job_id, changes)
            self._count(db, job_id, counts)

    def _count(self, db: Transaction, job_id: str, counts: Counts) -> None:
        db.execute(
            "UPDATE jobs SET tasks = ?, done = ?, failed = ?, cancelled = ?, skipped = ?, bytes_in = ?,"
            " bytes_out = ? WHERE id = ?",
            (
                counts.tasks,
                counts.done,
                counts.failed,
                counts.cancelled,
                counts.skipped,
                counts.bytes_in,
                counts.bytes_out,
                job_id,
            ),
        )

    def end(self, job_id: str, state: str, error: str | None, finished_s: float | None = None) -> None:
        """A share ended, now or at `finished_s`; tasks that never began are cancelled."""
        if state != DONE:
            self._in_steps(
                f"UPDATE tasks SET state = 'cancelled' WHERE job = ? AND task > ? AND {_UNFINISHED}",
                job_id,
            )
        with self._db.write() as db:
            db.execute(_COUNTS + "WHERE id = ?", (job_id,))
            db.execute(
                "UPDATE jobs SET state = ?, error = ?, finished_s = ? WHERE id = ?",
                (state, error, time.time() if finished_s is None else finished_s, job_id),
            )

    def share(self, job_id: str) -> ShareRow:
        """The share of a job. Raises MissingError."""
        with self._db.read() as db:
            row = db.execute(_SHARE + " WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise MissingError(f"no such job: {job_id}")
        return _share(row)

    def shares(self, prefix: str, limit: int) -> list[ShareRow]:
        """The newest shares whose id starts with `prefix`."""
        # Without a prefix no range: SQLite would go through all of it and sort, instead of by jobs_by_start.
        within, range_ = ("WHERE id >= ? AND id < ?", (prefix, prefix + "\U0010ffff")) if prefix else ("", ())
        query = f"{_SHARE} {within} ORDER BY started_s DESC LIMIT ?"
        with self._db.read() as db:
            rows = db.execute(query, (*range_, limit)).fetchall()
        return [_share(row) for row in rows]

    def tasks(
        self, job_id: str, states: Sequence[str] = (), *, stderr: bool = False
    ) -> Iterator[list[dict[str, Any]]]:
        """The tasks of a share in order, in chunks, those in one of `states` or all."""
        columns = f"{_TASK_COLUMNS}, stderr" if stderr else _TASK_COLUMNS
        joined = "tasks LEFT JOIN stderrs USING (job, task)" if stderr else "tasks"
        chosen = f"AND state IN ({','.join('?' * len(states))})" if states else ""
        chunk = 50 if stderr else 1000  # a stderr may be 64 KB
        last = -1
        while True:
            with self._db.read() as db:
                cursor = db.execute(
                    f"SELECT {columns} FROM {joined} WHERE job = ? AND task > ? {chosen}"
                    " ORDER BY task LIMIT ?",
                    (job_id, last, *states, chunk),
                )
                names = [column[0] for column in cursor.description]
                rows = [dict(zip(names, row, strict=True)) for row in cursor]
            yield rows
            if len(rows) < chunk:
                return
            last = rows[-1]["task"]

    def task(self, job_id: str, number: int) -> dict[str, Any]:
        """One task. Raises MissingError."""
        with self._db.read() as db:
            cursor = db.execute(
                f"SELECT {_TASK_COLUMNS} FROM tasks WHERE job = ? AND task = ?", (job_id, number)
            )
            row = cursor.fetchone()
        if row is None:
            raise MissingError(f"no task {number} of a job {job_id} here")
        return dict(zip([column[0] for column in cursor.description], row, strict=True))

    def made_from(self, job_id: str, number: int) -> tuple[str, str] | None:
        """(input, state) of a task, the state that of its job while that runs; None if it is not recorded. Of
        a job that was forgotten only those that `forget` was told of."""
        query = (
            "SELECT input, CASE jobs.state WHEN 'running' THEN 'running' ELSE tasks.state END"
            " FROM tasks JOIN jobs ON job = id WHERE job = :job AND task = :task"
            " UNION ALL SELECT input, 'failed' FROM half_made WHERE job = :job AND task = :task"
        )
        with self._db.read() as db:
            row = db.execute(query, {"job": job_id, "task": number}).fetchone()
        found: tuple[str, str] | None = row
        return found

    def kept_since(self) -> float:
        """When this index was made, in seconds since 1970: what there was of jobs before is lost."""
        with self._db.read() as db:
            [(made_s,)] = db.execute("SELECT unixepoch(min(applied_at)) FROM _sqlite_migrations")
        return float(made_s)

    def old(self, keep_jobs: int, keep_seconds: float, *, alone: bool) -> list[tuple[str, int]]:
        """The jobs that have ended here and are neither among the newest `keep_jobs` nor young enough: those
        of this node alone, or the others; with their runs. Each kind is counted by itself, so that all nodes
        forget alike."""
        with self._db.read() as db:
            return db.execute(
                "SELECT id, run FROM jobs WHERE alone = ? AND state != 'running' AND started_s < ?"
                " AND id NOT IN (SELECT id FROM jobs WHERE alone = ? ORDER BY started_s DESC LIMIT ?)",
                (alone, time.time() - keep_seconds, alone, keep_jobs),
            ).fetchall()

    def half_made(self, outdir: str) -> list[HalfMade]:
        """What is still known of forgotten jobs: tasks that made keys in `outdir` but did not end well."""
        with self._db.read() as db:
            rows = db.execute("SELECT job, task, input, outdir FROM half_made WHERE outdir = ?", (outdir,))
            return list(map(HalfMade._make, rows))

    def forget(
        self, job_id: str, run: int, outdir: str | None = None, half_made: Sequence[HalfMade] = ()
    ) -> None:
        """Remove the record of a job, unless it has run again since. `half_made` is what of that, and of
        jobs that were forgotten before, is to stay known of `outdir`."""
        share = self.share(job_id)
        if share.job.run != run or share.state == RUNNING:
            return
        with self._db.write() as db:
            db.execute("DELETE FROM half_made WHERE job = ? OR outdir = ?", (job_id, outdir))
            db.executemany("INSERT INTO half_made VALUES (?, ?, ?, ?)", half_made)
        self._in_steps("DELETE FROM stderrs WHERE job = ? AND task > ?", job_id)
        self._in_steps("DELETE FROM tasks WHERE job = ? AND task > ?", job_id)
        with self._db.write() as db:
            db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    def running(self) -> list[str]:
        """The ids of the shares that run by the record."""
        with self._db.read() as db:
            return [job_id for (job_id,) in db.execute("SELECT id FROM jobs WHERE state = 'running'")]

    def interrupt(self, job_id: str) -> None:
        """A share that ran when the node stopped is lost. It counts as ended with its last task."""
        self._in_steps(
            f"UPDATE tasks SET state = 'cancelled', error = '{STOPPED}'"
            " WHERE job = ? AND task > ? AND state = 'running'",
            job_id,
        )
        with self._db.read() as db:
            [(finished_s,)] = db.execute(
                "SELECT coalesce(max(tasks.started_s + coalesce(seconds, 0)), jobs.started_s)"
                " FROM jobs LEFT JOIN tasks ON job = id WHERE id = ?",
                (job_id,),
            )
        self.end(job_id, INTERRUPTED, STOPPED, finished_s)

    def running_outdirs(self) -> list[str]:
        """Where jobs that run, or ran when the node stopped, put their outputs."""
        query = "SELECT outdir FROM jobs WHERE state = 'running' AND outdir != ''"
        with self._db.read() as db:
            rows = db.execute(query).fetchall()
        return [outdir for (outdir,) in rows]


def _share(row: tuple[Any, ...]) -> ShareRow:
    job_id, kind, indir, outdir, command, timeout, retries, keep_going, skip_existing, run, alone = row[:11]
    job = JobRow(
        job_id,
        kind,
        indir,
        outdir,
        os.fsdecode(command),
        timeout,
        retries,
        bool(keep_going),
        bool(skip_existing),
        run,
        bool(alone),
    )
    return ShareRow(job, row[11], bool(row[12]), Counts(*map(int, row[13:20])), *row[20:])


def _stored_text(text: str) -> str | bytes:
    """Text as SQLite can hold it: bytes where they are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text)
    return text
