"""Fire, and the part of `inspect` that it needs, without the modules that a command never comes to use.

Start-up is most of a short command. `import fire` takes 40 ms, a bare Python 7; this takes 4, and it is Fire
as it is installed. While it is imported, modules that it needs only for help, errors or its other features
are stand-ins, which load the real module as soon as something asks them for it. In sys.modules none of them
stays behind, and modules that are there already are used as they are.
"""

import gc
import sys
from types import FunctionType, MethodType, ModuleType, SimpleNamespace

TYPE_CHECKING = False  # typing itself is one of the modules to do without
if TYPE_CHECKING:
    from typing import Any

__all__ = ["fire", "inspect"]


class _StandIn(ModuleType):
    """A module that is loaded at its first use. What its importers ask for at once, it may have already."""

    def __getattr__(self, name: str) -> "Any":
        if name.startswith("__"):  # the import system and inspect ask every module for these
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        from importlib import import_module

        return getattr(import_module(self.__name__), name)


class _NodeVisitor:
    """The base of a class in inspect: ast.NodeVisitor, once it is used."""

    def __getattr__(self, name: str) -> "Any":
        import ast

        method = getattr(ast.NodeVisitor, name)
        return MethodType(method, self) if isinstance(method, FunctionType) else method


def _constant(value: object) -> "Any":
    """ast.Constant, which Fire's parser makes of bare words."""
    import ast

    return ast.Constant(value)  # type: ignore[arg-type]


# The flags of code objects, as dis names them; inspect makes its CO_ constants of them.
_CODE_FLAGS = {
    1: "OPTIMIZED",
    2: "NEWLOCALS",
    4: "VARARGS",
    8: "VARKEYWORDS",
    16: "NESTED",
    32: "GENERATOR",
    64: "NOFREE",
    128: "COROUTINE",
    256: "ITERABLE_COROUTINE",
    512: "ASYNC_GENERATOR",
}

# With the milliseconds that a start takes longer without it, measured on Python 3.11.
_STAND_INS: "dict[str, dict[str, Any]]" = {
    "asyncio": {"iscoroutinefunction": lambda _function: False},  # 26
    "fire.console.console_io": {},  # 7.5: subprocess, platform
    "ast": {"NodeVisitor": _NodeVisitor, "Constant": _constant},  # 3
    "re": {},  # 1.5
    "typing": {"Any": object, "Dict": dict},  # 3
    "dis": {"COMPILER_FLAG_NAMES": _CODE_FLAGS},  # 1.5
    "fire.completion": {},  # 1.5
    "fire.docstrings": {},  # 1.5: textwrap
    "argparse": {},  # 1
    "json": {},  # 1
    "tokenize": {},  # 1
    "fire.formatting": {},  # 0.5: termcolor
    "fire.helptext": {},  # 0.5
    "linecache": {},  # 0.5
    "shlex": {},  # 0.5
}

_put = [name for name in _STAND_INS if name not in sys.modules]
for _name in _put:
    sys.modules[_name] = _StandIn(_name)
    vars(sys.modules[_name]).update(_STAND_INS[_name])
_collects = gc.isenabled()
gc.disable()  # imports make many objects and no garbage; measured, 0.8 ms
try:
    import inspect

    import fire
    import fire.core
finally:
    for _name in _put:
        if isinstance(sys.modules.get(_name), _StandIn):
            del sys.modules[_name]
    if _collects:
        gc.enable()


class _Flags:
    """Fire's own flags: the words behind a last `--`, of which there are none in a plain command.

    Measured: to make the ArgumentParser for them takes 5 ms, with argparse, gettext, shutil and their like.
    """

    def parse_known_args(self, words: list[str]) -> "Any":
        if words:
            return _create_parser().parse_known_args(words)
        plain = SimpleNamespace(
            verbose=False, interactive=False, separator="-", completion=None, help=False, trace=False
        )
        return plain, []


def _is_flag(word: str) -> "Any":
    """Whether Fire takes a word for a flag. Ours begin with `--` or NUL, and need no regular expression."""
    return word.startswith("--") or (word.startswith("-") and _is_any_flag(word))


def _parse_value(text: str) -> "Any":
    """What Fire takes a word for. Python's parser need not be asked about these; measured, 2.5 ms."""
    if "\0" in text:
        return text
    return True if text == "True" else _parse_any_value(text)


_create_parser, fire.parser.CreateParser = fire.parser.CreateParser, _Flags
_is_any_flag, fire.core._IsFlag = fire.core._IsFlag, _is_flag
_parse_any_value, fire.parser.DefaultParseValue = fire.parser.DefaultParseValue, _parse_value
# Where a function stands is for a trace that nobody sees. Measured: to read its source takes 1.3 ms.
fire.inspectutils.GetFileAndLine = lambda _component: (None, None)
