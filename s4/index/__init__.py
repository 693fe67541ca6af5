"""The SQLite index of a node: what exists and what is going on. It knows neither files nor HTTP."""

from s4.index.database import Database, Transaction
from s4.index.jobs import Counts, HalfMade, JobIndex, JobRow, NewTask, ShareRow, TaskChange
from s4.index.keys import UNKNOWN_JOB, KeyIndex, KeyRow, Maker, NewKey
from s4.index.underway import Underway

__all__ = [
    "UNKNOWN_JOB",
    "Counts",
    "Database",
    "HalfMade",
    "JobIndex",
    "JobRow",
    "KeyIndex",
    "KeyRow",
    "Maker",
    "NewKey",
    "NewTask",
    "ShareRow",
    "TaskChange",
    "Transaction",
    "Underway",
]
