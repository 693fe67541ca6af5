"""JSON without the module json: the same values, the same texts, the same refusals."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4.leanjson import dumps, loads

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
TEXTS = [
    "",
    " ",
    "[",
    "[1",
    "[1,]",
    "[1] 2",
    "[1]]",
    "{'a': 1}",
    '{"a": 1,}',
    '{"a" 1}',
    '"a',
    '"\t"',
    "01",
    "+1",
    "nul",
    "\ufeff[]",
    "[] \x0b",
    " \t\r\n[1, 2.5e3, true]\n",
    '"\\ud83d\\ude00 \\u00e9"',
    "-Infinity",
    "[" * 100_000,
]


@settings(deadline=None)  # a busy machine may take its time
@given(VALUES)
def test_what_is_written_is_read_again_as_json_does(value: object) -> None:
    assert dumps(value) == json.dumps(value).encode()
    again = loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    assert repr(again) == repr(value)


@pytest.mark.parametrize("other_python", [False, True])
def test_a_text_is_understood_or_refused_as_json_does(other_python: bool) -> None:
    program = """
import ast, sys
if {other_python}:
    sys.modules["_json"] = None
from s4.leanjson import dumps, loads
print("json" in sys.modules, dumps(loads(b"[1]")))
for text in ast.literal_eval(sys.stdin.read()):
    try:
        print(ascii(loads(text.encode())))
    except (ValueError, RecursionError) as e:
        print(type(e).__name__ if isinstance(e, RecursionError) else "ValueError")
"""
    program = program.format(other_python=other_python)
    done = subprocess.run(
        [sys.executable, "-c", program], input=repr(TEXTS), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{other_python} b'[1]'", *map(_as_json_does, TEXTS)]


def _as_json_does(text: str) -> str:
    try:
        return ascii(json.loads(text))
    except (ValueError, RecursionError) as e:
        return type(e).__name__ if isinstance(e, RecursionError) else "ValueError"


def test_what_is_no_text_or_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        loads(b'"\xff"')
    with pytest.raises(TypeError, match="bytes"):
        dumps({"a": b"x"})
    assert math.isnan(loads(b"NaN"))
