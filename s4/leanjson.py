"""JSON by what the module json is made of, without the module, whose import takes 2 ms of each start.

For what the client says to nodes and hears from them. What is shown to users goes through json itself.
"""

from s4.errors import NonsenseError

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")

_BLANKS = " \t\n\r"


class _Settings:
    """How json.loads reads; a setting that is not here is None."""

    strict = True
    parse_float = float
    parse_int = int
    parse_constant = float  # NaN and Infinity

    def __getattr__(self, _name: str) -> None:
        return None


def _refuse(value: object) -> object:
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


_scan: "Any"
_encode: "Any"
try:
    from _json import encode_basestring_ascii, make_encoder, make_scanner

    _scan = make_scanner(_Settings())  # type: ignore[arg-type]
    _encode = make_encoder(None, _refuse, encode_basestring_ascii, None, ": ", ", ", False, False, True)
except (ImportError, TypeError):  # a Python that is made otherwise
    import json

    _scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]

    def _encode(value: object, _level: int) -> str:
        return json.dumps(value)


def loads(data: bytes) -> "Any":
    """The value of a JSON text in UTF-8, as json.loads gives it. Raises ValueError."""
    text = data.decode().strip(_BLANKS)
    try:
        value, end = _scan(text, 0)
    except (StopIteration, SystemError):  # the latter where Python 3.11 would need json.decoder for its error
        end = -1
    if end != len(text):
        raise ValueError("not JSON")
    return value


def dumps(value: object) -> bytes:
    """A value of lists, dicts, texts, numbers, booleans and None as json.dumps writes it.

    Raises TypeError for any other.
    """
    return "".join(_encode(value, 0)).encode("ascii")


def is_infinite(value: object) -> bool:
    """Whether a value is a number that JSON does not have."""
    return isinstance(value, float) and abs(value) == float("inf")


def read_answer(server: str, answer: bytes, kind: "type[T]") -> "T":
    """The value of the JSON text that a server answered, which must be a `kind`. Raises NonsenseError."""
    try:
        value = loads(answer)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise NonsenseError(server)
    return value
