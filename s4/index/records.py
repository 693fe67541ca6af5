"""The tables of what is under way: transfers, jobs and unfinished removals.

They are written for people who look in with SQL, and for the sweep after a crash.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from s4.index.database import Database

KEEP_JOBS = 1000  # finished jobs kept at least
KEEP_SECONDS = 7 * 24 * 3600  # and for at least so long


@dataclass(frozen=True)
class JobRow:
    """A job as it is submitted. `indir` and `outdir` as the user wrote them; an eval has its key as indir."""

    id: str
    kind: str
    indir: str
    outdir: str
    command: str


class Records:
    """Transfers, jobs and removals of this node."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def transfer_began(
        self, uuid: str, direction: str, paths: Sequence[str], size: int | None, peer: str
    ) -> None:
        """A transfer got its slot. `size` in bytes, None if it is not known beforehand."""
        with self._db.write() as db:
            db.execute(
                "INSERT INTO transfers VALUES (?, ?, ?, ?, ?, ?, ?)",
                (uuid, direction, len(paths), size, peer, time.time(), json.dumps(paths, ensure_ascii=False)),
            )

    def transfer_ended(self, uuid: str) -> None:
        """A transfer was confirmed, failed or expired."""
        with self._db.write() as db:
            db.execute("DELETE FROM transfers WHERE uuid = ?", (uuid,))

    def job_began(self, job: JobRow) -> bool:
        """Record a job; False if it is recorded already (a retry after a lost answer)."""
        # Bytes of a command that are no UTF-8 are shown as \udcXX; SQLite stores only characters.
        command = job.command.encode("utf-8", "backslashreplace").decode()
        with self._db.write() as db:
            cursor = db.execute(
                "INSERT OR IGNORE INTO jobs (id, kind, indir, outdir, command, state, started_s)"
                " VALUES (?, ?, ?, ?, ?, 'running', ?)",
                (job.id, job.kind, job.indir, job.outdir, command, time.time()),
            )
            return cursor.rowcount == 1

    def job_progress(self, job_id: str, tasks: int, done: int) -> None:
        """How far a job is."""
        with self._db.write() as db:
            db.execute("UPDATE jobs SET tasks = ?, done = ? WHERE id = ?", (tasks, done, job_id))

    def job_ended(self, job_id: str, state: str, tasks: int, done: int, error: str | None) -> None:
        """The end of a job: `state` is done, failed or cancelled."""
        with self._db.write() as db:
            db.execute(
                "UPDATE jobs SET state = ?, tasks = ?, done = ?, error = ?, finished_s = ? WHERE id = ?",
                (state, tasks, done, error, time.time(), job_id),
            )

    def prune_jobs(self) -> None:
        """Forget finished jobs that are neither among the last 1,000 nor younger than 7 days."""
        with self._db.write() as db:
            db.execute(
                "DELETE FROM jobs WHERE state != 'running' AND started_s < ? AND id NOT IN"
                " (SELECT id FROM jobs ORDER BY started_s DESC LIMIT ?)",
                (time.time() - KEEP_SECONDS, KEEP_JOBS),
            )

    def left_by_crash(self) -> tuple[list[str], list[str]]:
        """(paths, prefixes) where the node that ran before may have left files without a row."""
        db = self._db.read()
        puts = "SELECT value FROM transfers, json_each(paths) WHERE direction = 'put'"
        paths = [path for (path,) in db.execute(puts)]
        prefixes = [prefix for (prefix,) in db.execute("SELECT prefix FROM removals")]
        prefixes += [
            outdir.removeprefix("s4://")
            for (outdir,) in db.execute("SELECT outdir FROM jobs WHERE state = 'running' AND outdir != ''")
        ]
        return paths, prefixes

    def forget_crash(self) -> None:
        """After the sweep: nothing is under way any more, and running jobs were interrupted."""
        with self._db.write() as db:
            db.execute("DELETE FROM transfers")
            db.execute("DELETE FROM removals")
            db.execute(
                "UPDATE jobs SET state = 'interrupted', finished_s = ?, error = 'the node stopped'"
                " WHERE state = 'running'",
                (time.time(),),
            )
