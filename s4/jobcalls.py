"""What the client asks one node about jobs, and the answers as objects."""

from __future__ import annotations

from collections.abc import Iterator

from s4.asking import SILENCE_SECONDS, ask, reaching
from s4.errors import MissingError
from s4.leanjson import dumps, read_answer
from s4.summary import PlanPart, ShareStatus, Task

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from typing import Any

    from s4.client import Client

CANCEL_SECONDS = 15.0  # a node that has not ended its share in so long does not answer


def submit(client: Client, server: str, path: str, request: dict[str, Any]) -> ShareStatus:
    """Start a node's share; returns it as it is then."""
    body = dumps(request)
    return _share(server, ask(client, server, "POST", path, None, body))


def cancel(client: Client, server: str, job: str, run: int | None = None) -> ShareStatus | None:
    """End a node's share and all that it runs; None if it has none, and then it never will."""
    parameters = {"job": job} | ({} if run is None else {"run": str(run)})
    try:
        return _share(server, ask(client, server, "POST", "/cancel", parameters, silence=CANCEL_SECONDS))
    except MissingError:
        return None


def shares(
    client: Client, server: str, silence: float = SILENCE_SECONDS, **parameters: str
) -> list[ShareStatus]:
    """A node's shares, the newest first; `prefix`, `state` and `limit` choose. It may be silent for `silence`
    seconds."""
    answer = ask(client, server, "GET", "/jobs", parameters, silence=silence)
    with reaching(server):
        return [ShareStatus.read(server, value) for value in read_answer(server, answer, list)]


def plan(client: Client, server: str, request: dict[str, Any]) -> PlanPart:
    """What a node would have to do for a job."""
    answer = ask(client, server, "POST", "/plan", None, dumps(request), silence=client.timeout)
    with reaching(server):
        return PlanPart.read(server, read_answer(server, answer, dict))


def tasks_of(
    client: Client, server: str, job: str, *, state: str = "", stderr: bool = False
) -> Iterator[Task]:
    """A node's tasks of a job in their order, as they come; none if it has no share of it."""
    from s4.listing import json_rows  # 0.5 ms, and most jobs have no tasks to be shown

    parameters = {"job": job} | ({"state": state} if state else {}) | ({"stderr": "true"} if stderr else {})
    with reaching(server), client.caller(server) as caller:
        try:
            response = caller.open("GET", "/tasks", parameters, silence=min(SILENCE_SECONDS, client.timeout))
        except MissingError:
            return
        for rows in json_rows(caller, response):
            for row in rows:
                yield Task.read(server, row)


def _share(server: str, answer: bytes) -> ShareStatus:
    with reaching(server):
        return ShareStatus.read(server, read_answer(server, answer, dict))
