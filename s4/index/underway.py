"""The tables of what is under way: transfers and unfinished removals.

They are written for people who look in with SQL, and for the sweep after a crash.
"""

import json
import time
from collections.abc import Sequence

from s4.index.database import Database, Transaction


class Underway:
    """Transfers and removals of this node."""

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
            self.transfer_stored(db, uuid)

    def transfer_stored(self, db: Transaction, uuid: str) -> None:
        """A put becomes keys in this transaction, which is its end."""
        db.execute("DELETE FROM transfers WHERE uuid = ?", (uuid,))

    def left_by_crash(self) -> tuple[list[str], list[str]]:
        """(paths, prefixes) where the node that ran before may have left files without a row."""
        puts = "SELECT value FROM transfers, json_each(paths) WHERE direction = 'put'"
        with self._db.read() as db:
            paths = [path for (path,) in db.execute(puts)]
            prefixes = [prefix for (prefix,) in db.execute("SELECT DISTINCT prefix FROM removals")]
        return paths, prefixes

    def forget_crash(self) -> None:
        """After the sweep: nothing is under way any more."""
        with self._db.write() as db:
            db.execute("DELETE FROM transfers")
            db.execute("DELETE FROM removals")
