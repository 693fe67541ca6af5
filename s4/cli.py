"""The command `s4`: Fire over the client, with every argument arriving as the exact string typed.

Fire parses values (`1e3`, `{a,b}`), takes a lone `-` for itself and runs a command before it complains. So
the words are encoded first, Fire calls a wrapper that only records the call, and the call is made afterwards.
Commands import what they need when they run: `s4` runs in loops, and its start-up is what users wait for.

What a command takes is the signature of the function that shows it, `show_…`: its own parameters, and those
of the client's method of the same name where it has `*words` and `**options` for them.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # not signal: its enumerations take 0.4 ms

# A Ctrl-C before main() can catch it ends the process without a traceback, also during the other imports,
# which take most of the time until then.
if _signal.getsignal(_signal.SIGINT) != _signal.SIG_IGN:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import gc
import io
import os
import sys

from s4.config import NO_CONF, NO_CONF_HINT
from s4.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISUSE, MisuseError, NodeError, S4Error
from s4.lean import fire, inspect
from s4.text import say
from s4.words import Line, Usage, command_of

TYPE_CHECKING = False  # what only annotations need is not imported: 3 ms for typing
if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

_MARK = (
    "\0"  # before each positional; no argument of a process can hold it, and Fire's parser leaves it alone
)
_WRITE_ERRORS = ("EBADF", "EDQUOT", "EFBIG", "EIO", "ENOSPC")
_CLOSED_PIPE: int = 128 + _signal.SIGPIPE  # the exit code of a command that SIGPIPE ends
_PYTHON_ONLY = ("client", "self", "stdout", "stderr", "watch")  # parameters that are not for the command line

# Where each is shown. Modules with jobs in them are imported for those alone.
_COMMANDS = {
    **dict.fromkeys(("cp", "ls", "rm", "eval"), "s4.commands"),
    **dict.fromkeys(("map", "map-to-n", "map-from-n"), "s4.jobcommands"),
    **dict.fromkeys(("jobs", "job", "wait", "cancel", "retry", "joblog", "stat", "sql"), "s4.jobcommands"),
    **dict.fromkeys(("health", "servers", "config"), "s4.commands"),
}
_USAGE = "usage: s4 [-c CONF] COMMAND …\n\n{}\n\n's4 COMMAND --help' tells more"


def main() -> NoReturn:
    """Run `s4` with the arguments of this process, and exit."""
    code = EXIT_INTERRUPTED
    try:
        code = _exit_code(sys.argv[1:])
        try:
            sys.stderr.flush()  # what an eval wrote there
        except OSError:
            pass  # as in text.say
    except KeyboardInterrupt:
        pass  # one more, while it was said what the first one did
    # Nothing is left to flush, and threads that wait for a dead server must not hold the exit up.
    os._exit(code)


def _exit_code(words: Sequence[str]) -> int:
    _open_standard_streams()
    try:
        for number in (_signal.SIGINT, _signal.SIGTERM):
            if _signal.getsignal(number) != _signal.SIG_IGN:  # as in the background of a script
                _signal.signal(number, _signal.default_int_handler)
        try:
            return _run(words)
        finally:
            if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                sys.stdout.flush()  # also what came before an error
    except BrokenPipeError:
        return _CLOSED_PIPE
    except KeyboardInterrupt as e:
        say(f"fatal: interrupted{': ' if e.args else ''}{e}")
        return EXIT_INTERRUPTED
    except S4Error as e:
        _show_place()
        for line in getattr(e, "failures", []):
            say(f"failed: {line}")
        say(f"fatal: {e}")
        return e.exit_code
    except Exception as e:
        _show_place()
        from errno import errorcode  # here, for most commands do without

        # What happens to another file than stdout is an S4Error.
        if isinstance(e, OSError) and errorcode.get(e.errno or 0) in _WRITE_ERRORS:
            say(f"fatal: stdout: {e.strerror}")
        else:
            say(f"fatal: {str(e) or repr(e)}; S4_DEBUG=1 shows where")
        return EXIT_FAILED


def _show_place() -> None:
    """Of the error that is handled, where it arose, if that is asked for."""
    if os.environ.get("S4_DEBUG") == "1":
        import traceback

        try:
            traceback.print_exc()
        except OSError:  # as in `say`
            pass


def _open_standard_streams() -> None:
    """Make sure of stdin, stdout and stderr, so that no socket becomes one, and that they take any key.

    One that is closed stays useless: what would be read or written there is an error.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while os.open(os.devnull, os.O_RDWR) <= 2:
            pass
        for number, stream, mode in ((0, sys.stdin, os.O_WRONLY), (1, sys.stdout, os.O_RDONLY)):
            if stream is None:
                os.dup2(os.open(os.devnull, mode), number)
        sys.stdin = sys.stdin or os.fdopen(0)
        sys.stdout = sys.stdout or os.fdopen(1, "w")
        sys.stderr = sys.stderr or os.fdopen(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper) and not isinstance(sys.stdout.buffer, io.BufferedWriter):
        # With PYTHONUNBUFFERED. What a write leaves over, as on a full disk, would be lost in silence.
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(sys.stdout.buffer), line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _run(words: Sequence[str]) -> int:
    gc.disable()  # imports make many objects and no garbage; measured, 2 to 3 ms
    from s4.client import Client

    name, rest = command_of(words, _COMMANDS)
    if not name:
        wants_help = Usage(name, []).read(rest).wants_help
        about = [f"  {name:12}  {_documentation(_shown(name)).partition(chr(10))[0]}" for name in _COMMANDS]
        print(_USAGE.format("\n".join(about)), file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else EXIT_MISUSE
    shown = _shown(name)
    usage = Usage(name, _parameters(shown))
    line = usage.read(rest)
    if not line.wants_help:
        usage.check_count(line.positionals)
        usage.values(line.options)
    calls: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    record = _recorder(name, usage, calls)
    if line.wants_help:
        record.__doc__ = _documentation(shown)
    _fire(name, record, _encoded(line))
    gc.freeze()
    gc.enable()
    if line.wants_help:
        return 0
    [(args, options)] = calls
    typed = {option: str(value).removeprefix(_MARK) for option, value in options.items()}
    client = Client(line.conf)
    try:
        code: int = shown[0](client, *(arg.removeprefix(_MARK) for arg in args), **usage.values(typed))
        return code
    except NodeError as e:
        if client.conf_source == NO_CONF:
            e.args = (f"{e}; {NO_CONF_HINT}",)
        raise


def _shown(name: str) -> list[Callable[..., Any]]:
    """The function that shows a command, and the client's method of the same name, if there is one."""
    from importlib import import_module

    from s4.client import Client

    method = name.replace("-", "_")
    show = getattr(import_module(_COMMANDS[name]), f"show_{method}")
    return [show, getattr(Client, method)] if hasattr(Client, method) else [show]


def _encoded(line: Line) -> list[str]:
    """Arguments and options as Fire takes them without a look inside."""
    if line.wants_help:
        return ["--", "--help"]
    options = [f"--{parameter}={_MARK}{value}" for parameter, value in line.options.items()]
    return [*(_MARK + word for word in line.positionals), *options]


def _parameters(shown: Sequence[Callable[..., Any]]) -> list[inspect.Parameter]:
    """What a command takes: the parameters of `show_…`, and those of the method that it passes on."""
    own, *methods = (inspect.signature(function).parameters.values() for function in shown)
    takes = {p.kind for p in own}
    found = {p.name: p for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for method in methods:
        for p in method:
            passed_on = p.VAR_KEYWORD if p.kind is p.KEYWORD_ONLY else p.VAR_POSITIONAL
            if passed_on in takes:
                found.setdefault(p.name, p)
    named = [p for p in found.values() if p.name not in _PYTHON_ONLY]
    return sorted(named, key=lambda p: p.kind)


def _recorder(
    name: str, usage: Usage, calls: list[tuple[tuple[str, ...], dict[str, Any]]]
) -> Callable[..., None]:
    """A function with the signature of a command that only notes how it was called."""

    def record(*args: str, **options: Any) -> None:
        calls.append((args, options))

    # Fire would offer an optional positional as a flag.
    parameters = [
        p.replace(kind=p.VAR_POSITIONAL, default=p.empty)
        if p in usage.places and p.default is not p.empty
        else p
        for p in usage.parameters
    ]
    vars(record)["__signature__"] = inspect.Signature(parameters)
    record.__name__ = name
    return record


def _documentation(shown: Sequence[Callable[..., Any]]) -> str:
    """What the method does, and all arguments and options."""
    import re  # for help only: 1.5 ms

    texts = [inspect.getdoc(function) or "" for function in reversed(shown)]
    arguments: dict[str, str] = {}
    for text in texts:
        arguments |= {entry[1]: entry[0] for entry in re.finditer(_ARGUMENT, text.partition("Args:\n")[2])}
    paragraphs = texts[0].partition("\n\nArgs:")[0].split("\n\n")
    about = [paragraph for paragraph in paragraphs if not paragraph.startswith(("Raises ", "Returns "))]
    return "\n\n".join(about) + "\n\nArgs:\n" + "\n".join(arguments.values())


_ARGUMENT = r"(?m)^    (\w+): .*(?:\n {5,}\S.*)*"


def _fire(name: str, command: Callable[..., None], argv: list[str]) -> None:
    fire.core.Display = lambda lines, out: _show_help("\n".join(lines))  # without a pager
    try:
        fire.Fire({name: command}, command=[name, *argv], name="s4")
    except SystemExit as e:
        if e.code:
            raise MisuseError(f"s4 {name}: arguments not understood; see s4 {name} --help") from None


def _show_help(text: str) -> None:
    import re

    # What Fire says of flags for positionals is not so here, its separator is no part of a command, and of an
    # optional positional there is one at most. All are text.
    text = text.partition("\n\nNOTES\n")[0].replace(" -\n\nDESC", "\n\nDESC").removesuffix(" -")
    text = re.sub(_OPTION, _as_typed, text.replace("]...", "]"))
    print(re.sub(r"(?m)^ +Type: .*\n", "", text))


# Fire's `-k, --keep_going=KEEP_GOING`, its type and its default, each in a line.
_OPTION = r"(?m)^    (?:-\w, )?--(\w+)=(\w+)((?:\n +(?:Type|Default): .*)*)$"


def _as_typed(option: re.Match[str]) -> str:
    """An option of the help as it is typed here: with hyphens, without letters that mean nothing."""
    import re

    name, value, about = option.groups()
    shown = ("-r, " if name == "recursive" else "") + "--" + name.replace("_", "-")
    default = re.search(r"\n +Default: (?!None|False|'').*", about)
    return f"    {shown}" + ("" if "Type: bool" in about else f"={value}") + (default[0] if default else "")


if __name__ == "__main__":
    main()
