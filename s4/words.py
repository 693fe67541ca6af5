"""The words of a command line: which is the command, which are its arguments, which its options.

Options stand anywhere, as `--name value` or `--name=value`, flags as `--name`. What a command takes is read
from a signature: its keyword-only parameters are the options, and their types say what a value must be.
"""

from __future__ import annotations

from s4.errors import MisuseError

TYPE_CHECKING = False  # what only annotations need is not imported: typing takes 3 ms of each start
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from inspect import Parameter
    from typing import Any

_WHOLE = r"-?[0-9]{1,18}"
_NUMBER = r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
_SHORT = {"-r": "--recursive", "-c": "--conf", "-h": "--help"}
# Arguments that may be any text, also with a dash in front, and whether only if there is white space in it:
# a dash before SQL is the start of a comment.
_ANY_TEXT = {"cmd": False, "query": True}


class Option:
    """An option as it is typed, `--keep-going`; the parameter that it sets; and the type of its value."""

    def __init__(self, name: str, parameter: str, kind: type) -> None:
        self.name = name
        self.parameter = parameter
        self.type = kind

    def value(self, text: str) -> Any:
        """The value that a text stands for. Raises MisuseError."""
        if self.type is str:
            return text
        import re  # 1.5 ms

        if self.type is int:
            if re.fullmatch(_WHOLE, text):
                return int(text)
            raise MisuseError(f"{self.name} {text!r}: a whole number is needed")
        if re.fullmatch(_NUMBER, text) and abs(float(text)) < float("inf"):
            return float(text)
        raise MisuseError(f"{self.name} {text!r}: a number is needed")


class Line:
    """What a command line says. Values of options are as typed; a flag that is there is "True"."""

    def __init__(self) -> None:
        self.positionals: list[str] = []
        self.options: dict[str, str] = {}  # by parameter
        self.conf: str | None = None
        self.wants_help = False


def command_of(words: Sequence[str], commands: Collection[str]) -> tuple[str, list[str]]:
    """(the command, the other words); the command is "" if there is none. Raises MisuseError."""
    skip = False
    for i, word in enumerate(words):
        if skip:
            skip = False
        elif word in ("-c", "--conf"):
            skip = True
        elif word == "-" or not word.startswith("-") or "--" in words[:i]:
            if word not in commands:
                raise MisuseError(f"unknown command {word!r}; {_suggestion(word, commands)}")
            return word, [*words[:i], *words[i + 1 :]]
    return "", list(words)


def _suggestion(word: str, commands: Collection[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, commands, 1)
    return f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(commands)}"


class Usage:
    """What a command takes: its arguments, some of them perhaps optional, and its options."""

    def __init__(self, command: str, parameters: Sequence[Parameter]) -> None:
        self.command = command
        self.parameters = parameters
        self.places = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.options: dict[str, Option] = {}
        for parameter in parameters:
            if parameter.kind is parameter.KEYWORD_ONLY:
                name = "--" + parameter.name.replace("_", "-")
                self.options[name] = Option(name, parameter.name, _plain_type(parameter.annotation))

    def read(self, words: Sequence[str]) -> Line:
        """Make sense of the words after the command. Raises MisuseError."""
        line = Line()
        rest = list(words)
        plain = False  # after `--` everything is an argument
        while rest:
            word = rest.pop(0)
            if plain or word == "-" or not word.startswith("-"):
                line.positionals.append(word)
            elif word == "--":
                plain = True
            elif not self._take_option(word, rest, line):
                if not self._is_text(len(line.positionals), word):
                    raise self._unknown(word, line.positionals)
                line.positionals.append(word)
        return line

    def _take_option(self, word: str, rest: list[str], line: Line) -> bool:
        """Whether a word is an option of this command, which is then noted."""
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        name = _SHORT.get(name, name)
        if name == "--help" and not equals:
            line.wants_help = True
            return True
        option = self.options.get(name)
        if option is None and name != "--conf":
            return False
        if option is not None and option.type is bool:
            if equals and value.lower() != "true":
                raise MisuseError(f"{name} is a flag and takes no value")
            value = "True"
        elif not equals:
            if not rest:
                what = "a value" if option is not None else "the path of a conf file"
                raise MisuseError(f"{word} needs {what}")
            value = rest.pop(0)
        if option is None:
            if not value:
                raise MisuseError(f"{word} needs the path of a conf file")
            line.conf = value
        else:
            line.options[option.parameter] = value
        return True

    def _is_text(self, place: int, word: str) -> bool:
        """Whether a word with a dash stands where CMD or the like does, which may be any text."""
        needs_space = _ANY_TEXT.get(self.places[place].name) if place < len(self.places) else None
        return needs_space is False or (needs_space is True and any(map(str.isspace, word)))

    def _unknown(self, word: str, positionals: Sequence[str]) -> MisuseError:
        where = f"s4 {self.command} has no option" if self.command else "unknown option"
        if len(positionals) >= len(self.places) and self._text_last:
            hint = self._text_last
        else:
            hint = "write -- before arguments that start with '-'"
        if self.command:
            hint = f"see s4 {self.command} --help, or {hint}"
        return MisuseError(f"{where} {word!r}; {hint}")

    @property
    def _text_last(self) -> str:
        """What to say of too many words where the last argument is a text of several; empty if it is none."""
        last = self.places[-1].name if self.places else ""
        return f"put quotes around all of {last.upper()}" if last in _ANY_TEXT else ""

    def check_count(self, positionals: Sequence[str]) -> None:
        """Raises MisuseError if there are too few or too many arguments."""
        needed = [p for p in self.places if p.default is p.empty]
        if len(needed) <= len(positionals) <= len(self.places):
            return
        for place, word in zip(self.places, positionals, strict=False):
            if place.name in _ANY_TEXT and word.startswith("--"):
                raise self._unknown(word, ())  # rather that than a command of this name with more behind it
        shown = " ".join(p.name.upper() if p in needed else f"[{p.name.upper()}]" for p in self.places)
        options = {(): "", ("--recursive",): "[-r] "}.get(tuple(self.options), "[OPTION…] ")
        count = f"{len(positionals)} argument{'s' if len(positionals) != 1 else ''}"
        hint = f"; {self._text_last}" if self._text_last and len(positionals) > len(self.places) else ""
        raise MisuseError(f"{count}, but the usage is: s4 {self.command} {options}{shown}{hint}")

    def values(self, options: Mapping[str, str]) -> dict[str, Any]:
        """The options with their values as the parameters take them. Raises MisuseError."""
        by_parameter = {option.parameter: option for option in self.options.values()}
        return {
            name: True if by_parameter[name].type is bool else by_parameter[name].value(text)
            for name, text in options.items()
        }


def _plain_type(annotation: Any) -> type:
    """The type of a value: that of `int`, and of `float | None` float."""
    (found,) = {a for a in getattr(annotation, "__args__", (annotation,)) if a is not type(None)}
    assert isinstance(found, type)
    return found
