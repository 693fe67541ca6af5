"""Questions about what the nodes hold: a key's origin, and SQL over all indexes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from s4.asking import SILENCE_SECONDS, ask, at_once, down, reaching
from s4.errors import (
    BadRequestError,
    MissingError,
    NodeError,
    NonsenseError,
    S4Error,
    UnreachableError,
    rebuilt,
)
from s4.jobcontrol import check_limit
from s4.keys import parse_key, url, with_scheme
from s4.leanjson import read_answer
from s4.record import record

if TYPE_CHECKING:
    from s4.client import Client

NODE_COLUMN = "node"
SQL_SECONDS = 10.0  # a node gives up a query after 5, or a little later, at the end of a slow function

Value = None | int | float | str | bytes


@record
class KeyInfo:
    """What is known of a key. `kind`, `command`, `input` and `inputs` are of the task that made it: for a
    merge the first of its keys, and how many these were.

    They are None if no job made the key or its record is gone, or if its node is down: then `problem`
    says so.
    """

    key: str
    size: int
    checksum: str
    created_s: float
    node: str
    file: str
    job: str | None
    task: int | None
    kind: str | None = None
    command: str | None = None
    input: str | None = None
    inputs: int | None = None
    problem: str | None = None


def stat(client: "Client", key: str) -> KeyInfo:
    """What the owner of a key knows of it, and what the node that ran its task knows of that."""
    path = parse_key(with_scheme(key))
    found = _object(client, client.server_of(path), "/stat", {"key": url(path)})
    info = _key_info(client.server_of(path), found)
    if info.job is None or info.task is None:
        return info
    servers = client.servers()
    server = servers[info.task % len(servers)]
    try:
        made = _object(client, server, "/task", {"job": info.job, "task": str(info.task)})
    except MissingError:
        return info  # its record is no longer kept
    except UnreachableError as e:
        return _key_info(server, found | {"problem": str(e)})
    origin = {name: made.get(name) for name in ("kind", "command", "input", "inputs")}
    return _key_info(server, found | origin)


def _object(client: "Client", server: str, path: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    answer = ask(client, server, "GET", path, parameters, silence=SILENCE_SECONDS)
    with reaching(server):
        return read_answer(server, answer, dict)


def _key_info(server: str, found: Mapping[str, Any]) -> KeyInfo:
    try:
        return KeyInfo(**{name: found[name] for name in KeyInfo.__annotations__ if name in found})
    except TypeError:
        raise NonsenseError(server) from None


@record
class Result:
    """What a query found: the names of its columns, the first of which is the node, and its rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]


def sql(client: "Client", query: str, limit: int) -> Result:
    """Run a query on all indexes. Raises S4Error, which names the node, also for too many rows."""
    check_limit(limit)
    try:
        text = query.encode()
    except UnicodeEncodeError:
        raise BadRequestError("the query is not valid UTF-8") from None

    def ask_node(server: str) -> tuple[list[str], list[list[Value]]]:
        try:
            answer = ask(client, server, "POST", "/sql", {"limit": str(limit)}, text, silence=SQL_SECONDS)
            with reaching(server):
                return _columns_and_rows(server, answer)
        except S4Error as e:
            raise e if server in str(e) else rebuilt(type(e).__name__, f"{server}: {e}") from None

    servers = client.servers()
    answers = at_once(ask_node, servers)
    rows = [[server, *row] for server, (_, found) in zip(servers, answers, strict=True) for row in found]
    if len(rows) > limit:
        raise S4Error(f"the nodes have {len(rows)} rows, more than the limit of {limit}: see --limit")
    return Result([NODE_COLUMN, *answers[0][0]], rows)


def _columns_and_rows(server: str, answer: bytes) -> tuple[list[str], list[list[Value]]]:
    """Raises NodeError for nonsense, S4Error if the query failed under way."""
    lines = read_answer(server, b"[" + b",".join(answer.strip().split(b"\n")) + b"]", list)
    if len(lines) < 2 or not isinstance(lines[-1], dict):
        raise NodeError(server, "the answer broke off")
    if "error" in lines[-1]:
        raise S4Error(str(lines[-1]["error"]))
    try:
        columns = [str(name) for name in lines[0]]
        rows = [[_value(value) for value in row] for row in lines[1:-1]]
    except (TypeError, KeyError, ValueError):
        raise NonsenseError(server) from None
    if any(len(row) != len(columns) for row in rows):
        raise NonsenseError(server)
    return columns, rows


def _value(value: Any) -> Value:
    if isinstance(value, dict):
        return bytes.fromhex(value["blob"])
    found: Value = value
    return found


def schema(client: "Client") -> list[list[str]]:
    """Tables, columns, types and what they mean, from the first node that can be reached."""

    def ask_node(server: str) -> list[list[str]]:
        answer = ask(client, server, "GET", "/schema", silence=SILENCE_SECONDS)
        with reaching(server):
            return [[str(text or "") for text in row] for row in read_answer(server, answer, list)]

    errors = []
    for server in client.servers():
        try:
            return ask_node(server)
        except UnreachableError as e:
            errors.append(e)
    raise down(errors)
