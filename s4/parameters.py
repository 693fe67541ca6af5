"""What requests carry, checked: query parameters and JSON bodies; and answers in JSON.

What is not as it should be raises BadRequestError, which says what is needed.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import parse_qsl

import falcon

from s4.config import MAX_TIMEOUT, TIMEOUT_NEEDED, plain_number
from s4.errors import BadRequestError
from s4.keys import new_job_id

MAX_COMMAND_BYTES = 128 * 1024 - 1  # what bash -c takes: of a word to a program, execve(2)
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")


def query_of(req: falcon.Request) -> dict[str, str]:
    """The query parameters; bytes that are no UTF-8 as lone surrogates."""
    # Falcon would replace bytes that are no UTF-8; here they stay, and the key rules refuse them.
    return dict(parse_qsl(req.query_string, keep_blank_values=True, errors="surrogateescape"))


def needed(given: dict[str, str], name: str) -> str:
    """A parameter that must be there."""
    try:
        return given[name]
    except KeyError:
        raise BadRequestError(f"the parameter {name!r} is missing") from None


def flag(given: dict[str, str], name: str) -> bool:
    """A parameter that is true or false, without it false."""
    text = given.get(name, "").lower()
    if text in ("true", "1", "yes"):
        return True
    if text in ("false", "0", "no", ""):
        return False
    raise BadRequestError(f"{name}={given[name]!r}: true or false is needed")


def whole_number(given: dict[str, str], name: str, most: int = 2**62) -> int:
    """A parameter that must be there, a whole number up to `most`."""
    text = needed(given, name)
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most):
        raise BadRequestError(f"{name}={text!r}: a whole number is needed")
    return int(text)


def positive_seconds(name: str, given: object, default: float, *, or_zero: bool = False) -> float:
    """The number of seconds above 0 (`or_zero`) that is given for `name`, `default` for None."""
    try:
        seconds = default if given is None else plain_number(str(given))
    except (ValueError, OverflowError):
        seconds = -1
    if not 0 <= seconds <= MAX_TIMEOUT or (seconds == 0 and not or_zero):
        raise BadRequestError(f"{name}: {TIMEOUT_NEEDED}")
    return seconds


def is_size(value: object) -> bool:
    """Whether a JSON value is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def answer_json(resp: falcon.Response, value: object) -> None:
    """Answer with a value as JSON."""
    resp.content_type = falcon.MEDIA_JSON
    resp.data = json.dumps(value).encode()


def _json_body(req: falcon.Request) -> object:
    """The value of the body, None if it is no JSON."""
    try:
        return json.loads(req.bounded_stream.read())
    except (ValueError, RecursionError):
        return None


def json_object(req: falcon.Request) -> dict[str, Any]:
    """The body, a JSON object."""
    body = _json_body(req)
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object")
    return body


def json_list(req: falcon.Request, most: int) -> list[Any]:
    """The body, a JSON list of one up to `most` entries."""
    body = _json_body(req)
    if not isinstance(body, list) or not 0 < len(body) <= most:
        raise BadRequestError(f"the body must be a JSON list of 1 to {most} entries")
    return body


def json_strings(req: falcon.Request, most: int) -> list[str]:
    """The body, a JSON list of one up to `most` texts."""
    body = json_list(req, most)
    if not all(isinstance(text, str) for text in body):
        raise BadRequestError("the body must be a JSON list of strings")
    return body


def truth_of(body: dict[str, Any], name: str) -> bool:
    """A JSON value that is true or false, without it false."""
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise BadRequestError(f'"{name}" must be true or false')
    return value


def whole_of(body: dict[str, Any], name: str, default: int) -> int:
    """A JSON value that is a whole number from 0."""
    value = body.get(name, default)
    if not is_size(value):
        raise BadRequestError(f'"{name}" must be a whole number from 0')
    return int(value)


def checked_job_id(text: str) -> str:
    """The id of a job."""
    if not _JOB_ID.fullmatch(text):
        raise BadRequestError(f"bad job id {text!r}: letters, digits and '-', at most 64")
    return text


def job_id_or_new(text: str) -> str:
    """The id of a job, a new one for an empty text."""
    return checked_job_id(text) if text else new_job_id()


def checked_prefix(text: str) -> str:
    """The beginning of the id of a job, which may be empty."""
    return checked_job_id(text) if text else ""


def checked_command(text: str) -> str:
    """A command as bash can take it."""
    if not text.strip():
        raise BadRequestError("the command is empty")
    if "\0" in text:
        raise BadRequestError("the command holds a NUL character")
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        raise BadRequestError("the command is not valid UTF-8") from None
    if size > MAX_COMMAND_BYTES:
        raise BadRequestError(f"the command has {size} bytes, but bash takes {MAX_COMMAND_BYTES}: use a file")
    return text


def json_lines(chunks: Iterable[list[str]]) -> Iterator[bytes]:
    """A JSON list with a row a line, of rows that are JSON already. The first chunk is asked for at once, so
    that its failure is still an answer of its own."""
    following = iter(chunks)
    first = list(itertools.islice(following, 1))
    return _json_lines(itertools.chain(first, following))


def _json_lines(chunks: Iterable[list[str]]) -> Iterator[bytes]:
    separator = b"[\n"
    for lines in chunks:
        if lines:
            yield separator + ",\n".join(lines).encode()
            separator = b",\n"
    yield b"\n]" if separator == b",\n" else b"[]"
