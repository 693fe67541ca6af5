"""The command `s4`: Fire over the client, with every argument arriving as the exact string typed.

Fire parses values (`1e3`, `{a,b}`), takes a lone `-` for itself and runs a command before it complains. So
the words are encoded first, Fire calls a wrapper that only records the call, and the call is made afterwards.
Commands import what they need when they run: `s4` runs in loops, and its start-up is what users wait for.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import sys

from s4.errors import FAILED, INTERRUPTED, MisuseError, S4Error
from s4.lean import fire, inspect

TYPE_CHECKING = False  # what only annotations need is not imported: 3 ms for typing
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

# A Ctrl-C before main() can catch it ends the process without a traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)

_MARK = (
    "\0"  # before each positional; no argument of a process can hold it, and Fire's parser leaves it alone
)
_CLOSED_PIPE = 128 + signal.SIGPIPE  # the exit code of a command that SIGPIPE ends
_PRESENTATION = ("stdout", "stderr")  # parameters of the Python face that are not for the command line

_COMMANDS = {
    "cp": "cp",
    "ls": "ls",
    "rm": "rm",
    "eval": "eval",
    "map": "map",
    "map-to-n": "map_to_n",
    "map-from-n": "map_from_n",
    "health": "health",
    "servers": "servers",
    "config": "config",
}
_USAGE = f"""usage: s4 [-c CONF] COMMAND …
commands: {", ".join(_COMMANDS)}
's4 COMMAND --help' tells more"""


def main() -> NoReturn:
    """Run `s4` with the arguments of this process, and exit."""
    _open_standard_streams()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        code = _run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        code = _CLOSED_PIPE
    except KeyboardInterrupt:
        print("fatal: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except S4Error as e:
        if os.environ.get("S4_DEBUG") == "1":
            raise
        for line in getattr(e, "failures", []):
            print(f"failed: {_printable(line)}", file=sys.stderr)
        print(f"fatal: {_printable(str(e))}", file=sys.stderr)
        code = e.exit_code
    except Exception as e:
        if os.environ.get("S4_DEBUG") == "1":
            raise
        print(f"fatal: {_printable(str(e) or repr(e))}; S4_DEBUG=1 shows where", file=sys.stderr)
        code = FAILED
    # Nothing is left to flush, and threads that wait for a dead server must not hold the exit up.
    sys.stderr.flush()
    os._exit(code)


def _open_standard_streams() -> None:
    """Make sure of stdin, stdout and stderr, so that no socket becomes one, and that they take any key."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while os.open(os.devnull, os.O_RDWR) <= 2:
            pass
        sys.stdin = sys.stdin or os.fdopen(0)
        sys.stdout = sys.stdout or os.fdopen(1, "w")
        sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _printable(text: str) -> str:
    """One line without control characters, which could change what a terminal shows."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().replace(_MARK, "").split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _run(words: Sequence[str]) -> int:
    gc.disable()  # imports make many objects and no garbage; measured, 2 to 3 ms
    from s4.client import Client

    name, positionals, recursive, conf, wants_help = _read_words(words)
    if not name:
        print(_USAGE, file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else MisuseError.exit_code
    calls: list[tuple[tuple[str, ...], dict[str, bool]]] = []
    commands = {shown: _recorder(getattr(Client, method), calls) for shown, method in _COMMANDS.items()}
    if wants_help:
        argv = [name, "--", "--help"]
    else:
        _check_count(name, getattr(Client, _COMMANDS[name]), positionals, recursive)
        argv = [name, *(_MARK + word for word in positionals), *(["--recursive=True"] if recursive else [])]
    _fire(commands, argv)
    gc.freeze()
    gc.enable()
    if wants_help:
        return 0
    [(args, options)] = calls
    present: Callable[..., int] = globals()[f"_show_{_COMMANDS[name]}"]
    return present(Client(conf), *(arg.removeprefix(_MARK) for arg in args), **options)


def _read_words(words: Sequence[str]) -> tuple[str, list[str], bool, str | None, bool]:
    """(command, positionals, recursive, conf, help) of a command line. Raises MisuseError."""
    name, recursive, conf, wants_help = "", False, None, False
    positionals: list[str] = []
    rest = list(words)
    plain = False  # after `--` everything is a positional
    while rest:
        word = rest.pop(0)
        if plain or not word.startswith("-") or word == "-" or _is_command_line(name, positionals, word):
            if name:
                positionals.append(word)
            elif word in _COMMANDS:
                name = word
            else:
                raise MisuseError(f"unknown command {word!r}; the commands are {', '.join(_COMMANDS)}")
        elif word == "--":
            plain = True
        elif word in ("-r", "--recursive", "--recursive=true", "--recursive=True"):
            recursive = True
        elif word in ("-h", "--help"):
            wants_help = True
        elif word in ("-c", "--conf"):
            if not rest:
                raise MisuseError(f"{word} needs the path of a conf file")
            conf = rest.pop(0)
        elif word.startswith("--conf="):
            conf = word.removeprefix("--conf=")
        else:
            raise MisuseError(f"unknown option {word!r}; write -- before arguments that start with '-'")
    return name, positionals, recursive, conf, wants_help


def _is_command_line(name: str, positionals: list[str], word: str) -> bool:
    """Whether a word with a dash stands where eval and the jobs take CMD, which may be any text."""
    place = {"eval": 1, "map": 2, "map-to-n": 2, "map-from-n": 2}.get(name)
    return (
        len(positionals) == place
        and word not in ("--", "-h", "--help", "-c", "--conf")
        and not word.startswith("--conf=")
    )


def _parameters(method: Callable[..., Any]) -> list[inspect.Parameter]:
    found = inspect.signature(method).parameters.values()
    return [p for p in found if p.name not in ("self", *_PRESENTATION)]


def _check_count(name: str, method: Callable[..., Any], positionals: list[str], recursive: bool) -> None:
    parameters = _parameters(method)
    places = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [p for p in places if p.default is p.empty]
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if recursive and "recursive" not in options:
        raise MisuseError(f"s4 {name} has no option -r")
    if not len(needed) <= len(positionals) <= len(places):
        shown = " ".join(p.name.upper() if p in needed else f"[{p.name.upper()}]" for p in places)
        flag = "[-r] " if options else ""
        raise MisuseError(f"{len(positionals)} arguments, but the usage is: s4 {name} {flag}{shown}")


def _recorder(
    method: Callable[..., Any], calls: list[tuple[tuple[str, ...], dict[str, bool]]]
) -> Callable[..., None]:
    """A function with the signature and the help of a client method that only notes how it was called."""

    def record(*args: str, **options: bool) -> None:
        calls.append((args, options))

    # Fire would offer an optional positional as a flag.
    shown = [
        p.replace(kind=p.VAR_POSITIONAL, default=p.empty)
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty
        else p
        for p in _parameters(method)
    ]
    vars(record)["__signature__"] = inspect.Signature(shown)
    record.__name__ = method.__name__
    record.__doc__ = method.__doc__
    return record


def _fire(commands: dict[str, Callable[..., None]], argv: list[str]) -> None:
    fire.core.Display = lambda lines, out: _show_help("\n".join(lines))  # without a pager
    try:
        fire.Fire(commands, command=argv, name="s4")
    except SystemExit as e:
        if e.code:
            raise MisuseError(f"s4 {argv[0]}: arguments not understood; see s4 {argv[0]} --help") from None


def _show_help(text: str) -> None:
    # What Fire says of flags for positionals is not so here, and its separator is no part of a command.
    print(text.partition("\n\nNOTES\n")[0].replace(" -\n\nDESC", "\n\nDESC").removesuffix(" -"))


def _show_cp(client: Any, src: str, dst: str, recursive: bool = False) -> int:
    client.cp(src, dst, recursive=recursive)
    return 0


def _show_ls(client: Any, prefix: str = "", recursive: bool = False) -> int:
    lines: list[str] = []
    found = False
    for date, time, size, path in client.ls(prefix, recursive=recursive):
        lines.append(f"{date:10} {time:8} {size:>12} {path}\n")
        if len(lines) == 5000:
            sys.stdout.write("".join(lines))
            lines.clear()
            found = True
    sys.stdout.write("".join(lines))
    return 0 if found or lines else FAILED


def _show_rm(client: Any, prefix: str, recursive: bool = False) -> int:
    client.rm(prefix, recursive=recursive)
    return 0


def _show_eval(client: Any, key: str, cmd: str) -> int:
    done = client.eval(key, cmd, stdout=sys.stdout.buffer, stderr=sys.stderr.buffer)
    return int(done.exitcode)


def _show_map(client: Any, indir: str, outdir: str, cmd: str) -> int:
    client.map(indir, outdir, cmd)
    return 0


def _show_map_to_n(client: Any, indir: str, outdir: str, cmd: str) -> int:
    client.map_to_n(indir, outdir, cmd)
    return 0


def _show_map_from_n(client: Any, indir: str, outdir: str, cmd: str) -> int:
    client.map_from_n(indir, outdir, cmd)
    return 0


def _show_health(client: Any) -> int:
    found = client.health()
    for server, problem in found.items():
        print(f"{'unhealthy' if problem else 'healthy'}: {'' if problem else '  '}{server}")
        if problem:
            print(f"{server}: {_printable(problem)}", file=sys.stderr)
    return FAILED if any(found.values()) else 0


def _show_servers(client: Any) -> int:
    for server in client.servers():
        print(server)
    return 0


_show_config = _show_servers

if __name__ == "__main__":
    main()
