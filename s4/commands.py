"""How commands for keys and servers are shown. What `show_x` does not name, it takes as `Client.x` does."""

from __future__ import annotations

import sys

from s4.config import NO_CONF, NO_CONF_HINT
from s4.errors import EXIT_FAILED
from s4.text import say

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from typing import Any

    from s4.client import Client


def show_cp(client: Client, *words: str, **options: Any) -> int:
    """Print nothing on success."""
    client.cp(*words, **options)
    return 0


def show_ls(client: Client, *words: str, **options: Any) -> int:
    """A line a key or folder; exit 1 if there is none."""
    lines: list[str] = []
    found = False
    for date, time, size, path in client.ls(*words, **options):
        lines.append(f"{date:10} {time:8} {size:>12} {path}\n")
        if len(lines) == 5000:
            sys.stdout.write("".join(lines))
            lines.clear()
            found = True
    sys.stdout.write("".join(lines))
    return 0 if found or lines else EXIT_FAILED


def show_rm(client: Client, *words: str, **options: Any) -> int:
    """Print nothing on success."""
    client.rm(*words, **options)
    return 0


def show_eval(client: Client, *words: str) -> int:
    """What the command writes goes where it belongs; the exit code is its own."""
    done = client.eval(*words, stdout=sys.stdout.buffer, stderr=sys.stderr.buffer)
    return int(done.exitcode)


def show_health(client: Client) -> int:
    """A line a server; exit 1 if one is unhealthy."""
    found = client.health()
    for server, problem in found.items():
        print(f"{'unhealthy' if problem else 'healthy'}: {'' if problem else '  '}{server}")
        if problem:
            say(f"{server}: {problem}")
    if any(found.values()) and client.conf_source == NO_CONF:
        say(NO_CONF_HINT)
    return EXIT_FAILED if any(found.values()) else 0


def show_servers(client: Client) -> int:
    """A line a server."""
    for server in client.servers():
        print(server)
    return 0


show_config = show_servers
