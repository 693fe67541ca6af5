"""What `ls` and `eval` of the client return."""

from collections import namedtuple


# With typing.NamedTuple these would be shorter, and typing takes 3 ms of each start to import.
class Entry(namedtuple("Entry", ("date", "time", "size", "path"))):
    """A line of a listing, all text: a key, or a folder with size "PRE" and neither date nor time."""

    __slots__ = ()
    date: str
    time: str
    size: str
    path: str


class Evaluation(namedtuple("Evaluation", ("exitcode", "stdout", "stderr"))):
    """How an eval ended: the command's exit code and, unless streams were given, what it wrote."""

    __slots__ = ()
    exitcode: int
    stdout: bytes
    stderr: bytes
