"""Fire without its unneeded parts: nothing of that shows in the process, and Fire is what it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def _python(program: str, cwd: Path | None = None) -> str:
    """What a program prints that runs in an interpreter of its own."""
    command = [sys.executable, "-c", program]
    env = {**os.environ, "PYTHONHASHSEED": "0"}  # Fire shows sets in the order that they have
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_program_that_uses_the_client_does_not_get_it() -> None:
    program = (
        "import s4, sys; s4.Client, s4.Entry, s4.Evaluation; print({'s4.lean', 'fire'} & set(sys.modules))"
    )
    assert _python(program) == "set()\n"


def test_no_stand_in_stays_behind() -> None:
    program = """
import sys
import s4.cli
from s4.lean import _STAND_INS, _StandIn
assert not [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]
for name in _STAND_INS:
    __import__(name)
    assert type(sys.modules[name]).__name__ == "module" and sys.modules[name].__spec__, name
import json, asyncio, argparse, typing, dataclasses, ast
assert json.loads("[1]") == [1] and argparse.ArgumentParser() and typing.NamedTuple and ast.parse("1")
assert asyncio.run(asyncio.sleep(0, 7)) == 7
"""
    assert _python(program) == ""


def test_what_is_loaded_already_is_used_as_it_is() -> None:
    program = """
import sys, json, ast, inspect, fire.helptext
before = dict(sys.modules)
import s4.lean
assert all(sys.modules[name] is module for name, module in before.items())
assert s4.lean.inspect is inspect and inspect.ast is ast and s4.lean.fire.core.json is json
"""
    assert _python(program) == ""


def test_a_stand_in_becomes_the_module_at_its_first_use() -> None:
    program = """
import sys
before = set(sys.modules)  # Python 3.13 has linecache at once
from s4.lean import fire, inspect
assert not {"json", "dis", "linecache", "fire.helptext"} & (set(sys.modules) - before)
assert fire.core.json.dumps([1]) == "[1]" and fire.core.json.dumps is sys.modules["json"].dumps
assert inspect.dis.opmap and "dis" in sys.modules
try:
    inspect.dis.nothing
except AttributeError as e:
    assert "'dis'" in str(e)
else:
    raise AssertionError
"""
    assert _python(program) == ""


def test_inspect_finds_sources_and_flags_as_ever(folder: Path) -> None:
    (folder / "module.py").write_text(
        "import os\n\nclass A:\n    class B:\n        x = 1\n\ndef f(*a):\n    yield\n"
    )
    program = """
import sys
{first}
import inspect, module
print(inspect.getsource(module.A.B), inspect.getsource(module.f), inspect.isgeneratorfunction(module.f))
print(inspect.getfullargspec(module.f), inspect.signature(module.f), inspect.getmodule(module.f))
print(sorted(name for name in vars(inspect) if name.startswith("CO_")))
print(inspect.stack()[0].code_context, inspect.CO_VARARGS, inspect.iscoroutinefunction(module.f))
"""
    ours = _python(program.format(first="import s4.lean"), cwd=folder)
    assert ours == _python(program.format(first=""), cwd=folder) and "class B" in ours


FIRES = {
    "a call": ["add", "1", "2.5"],
    "flags": ["add", "1", "--b=7"],
    "a list": ["show", "[1,{a:b},'c',d]"],
    "words": ["show", "True", "False", "None", "1e3", "x=y", "-", "__class__"],
    "an unknown command": ["nothing"],
    "a missing argument": ["add"],
    "too much": ["add", "1", "2", "3", "4"],
    "help": ["--help"],
    "help of a command": ["add", "--help"],
    "help behind dashes": ["add", "--", "--help"],
    "a trace": ["add", "1", "2", "--", "--trace"],
    "a script for completion": ["--", "--completion"],
    "another separator": ["show", "a", "+", "b", "--", "--separator=+"],
    "a bad flag of its own": ["add", "1", "2", "--", "--separator"],
}


@pytest.mark.parametrize("words", FIRES.values(), ids=FIRES)
def test_fire_does_what_it_did(words: list[str]) -> None:
    program = """
import sys
{first}
import fire
def add(a, b=None, *, c=0):
    "Add.\\n\\nArgs:\\n    a: one\\n    b: the other"
    return a + b + c
def show(*values):
    print(repr(values))
sys.stderr = sys.stdout
fire.core.Display = lambda lines, out: print(*lines)
fire.inspectutils.GetFileAndLine = lambda component: (None, None)
try:
    fire.Fire({{"add": add, "show": show}}, {words}, "x")
    print(None)
except SystemExit as e:
    print(e.code)
"""
    ours = _python(program.format(first="import s4.lean", words=words))
    assert ours == _python(program.format(first="", words=words))
    assert ours.splitlines()[-1] in ("None", "0", "2"), ours
