"""The SQLite index of a node: what exists and what is going on. It knows neither files nor HTTP."""

from s4.index.database import Database
from s4.index.keys import KeyIndex, KeyRow
from s4.index.records import JobRow, Records

__all__ = ["Database", "JobRow", "KeyIndex", "KeyRow", "Records"]
