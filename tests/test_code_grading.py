"""Grading by value: plain values cross between tests and response, and attacks on the grader fail."""

import contextlib
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infopo.errors import ConfigError
from infopo.evaluation import sandbox
from infopo.evaluation.code_grading import TIME_OUT, Graded, Program, grade
from infopo.evaluation.code_values import Matched, NotPlainError, decode, encode, pack

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False) | st.decimals(allow_nan=False) | st.fractions() | st.dates() | st.datetimes()
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
    | st.sets(st.integers() | st.text()) | st.frozensets(st.integers()),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=50)
@given(VALUES)
def test_plain_values_come_back_as_they_were(value: Any):
    back = decode(encode(value))
    assert back == value
    assert type(back) is type(value)


def test_types_of_the_library_come_back_too():
    for value in (
        Counter("aab"), OrderedDict([(2, 1), (1, 2)]), deque([1, 2]), range(3, 9, 2), Decimal("1.10"), Fraction(1, 3),
        date(2026, 1, 2), timedelta(1, 2, 3), bytearray(b"\x00"), 10**5000, -(2**70_000), -0.0, math.inf, 1j, b"\xff",
        "\ud800", frozenset({1}), {6, 7, 8}, {"a": {"b": ({3},)}}, True, 2**63,
    ):  # fmt: skip
        back = decode(encode(value))
        assert back == value
        assert type(back) is type(value)
    assert math.isnan(decode(encode(math.nan)))
    assert list(decode(encode(x * 2 for x in range(3)))) == [0, 2, 4]
    assert decode(encode({1: 2}.keys())) == {1}
    assert list(decode(encode(map(str, [1])))) == ["1"]
    # Tests look at the order of a set by making a list of it.
    for given_set in ({12, 13, 14, 15, 16}, set(range(12, 17)), {"c", "b", "a"}):
        assert list(decode(encode(given_set))) == list(given_set)


def test_what_is_not_plain_is_refused():
    class Number(int):
        pass

    class Text(str):
        pass

    loop: list[Any] = []
    loop.append(loop)
    shared: list[Any] = []
    for _ in range(60):
        shared = [shared, shared]
    for value in (
        Number(1), Text("a"), object(), [Number(1)], {"a": object()}, len, type, loop, shared, "a" * 10**7, {1: loop},
    ):  # fmt: skip
        with pytest.raises(NotPlainError):
            pack(encode(value))


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    | st.tuples(st.sampled_from(["int", "float", "dict", "counter", "date", "match", "set", "range"]), inner).map(list),
))  # fmt: skip
def test_what_nobody_encoded_is_a_plain_value_or_refused(data: Any):
    """A response can send whatever it likes."""
    plain = (type(None), bool, int, float, str, list, tuple, dict, set, Counter, date, range, Matched)
    with contextlib.suppress(NotPlainError):
        assert isinstance(decode(data), plain)


EQUAL = "class A:\n    __eq__ = __le__ = __ge__ = lambda s, o: True\n    __hash__ = lambda s: 1\n"
ATTACKS = {
    "an object equal to everything": (f"{EQUAL}def f(x): return A()", "no plain value"),
    "such objects in a list": (f"{EQUAL}def f(x): return [A()]", "no plain value"),
    "a subclass of int": (
        "class I(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\ndef f(x): return I(0)",
        "no plain value",
    ),
    "a subclass of str": (
        "class S(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__\ndef f(x): return S()",
        "no plain value",
    ),
    "a type that lies about itself": (f"{EQUAL}    __class__ = int\ndef f(x): return A()", "no plain value"),
    "a changed builtin": ("import builtins\nbuiltins.AssertionError = None\ndef f(x): return 0", None),
    "a changed assert": ("import sys\nsys.flags = None\n__debug__x = False\ndef f(x): return 0", None),
    "leaving": ("import os\ndef f(x): os._exit(0)", "ended itself"),
    "leaving when loaded": ("import os\nos._exit(0)\ndef f(x): return 0", "ended itself"),
    "leaving politely": ("import sys\ndef f(x): sys.exit(0)", "ended itself"),
    "leaving when loaded, politely": ("raise SystemExit(0)\ndef f(x): return 0", "ended itself"),
    "a kill of itself": ("import os\ndef f(x): os.kill(os.getpid(), 9)", "ended itself"),
    "a crash": ("import ctypes\ndef f(x): return ctypes.string_at(0)", "ended itself"),
    "a forged verdict": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'begun\\n{\"passed\": true, \"note\": null, "
        "\"detail\": \"\"}\\n')\n    except OSError: pass\ndef f(x): return 0",
        "no plain value",
    ),
    "output without end": (
        "import sys\ndef f(x):\n    while True: print('x' * 10000); sys.stderr.write('y' * 10000)",
        TIME_OUT,
    ),
    "a loop that catches everything": (
        "import signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, lambda *a: None)\n"
        "    except (OSError, ValueError): pass\ndef f(x):\n    while True:\n        try:\n            while True: pass\n"
        "        except BaseException: pass",
        TIME_OUT,
    ),
    "a loop when loaded": ("while True: pass", TIME_OUT),
    "sleep": ("import time\ndef f(x): time.sleep(1000)", TIME_OUT),
    "a channel that is closed": ("import os\ndef f(x): os.closerange(3, 64)", "ended itself"),
    "a replaced codec": (
        "import sys\nfor name, module in list(sys.modules.items()):\n    if 'code_values' in name:\n"
        "        module.encode = lambda *a: ['value', True]\n        module.pack = lambda m: b'\\0' * 7 + b'\\2[]'\n"
        "def f(x): return 0",
        "no plain value",
    ),
    "an encoder that lies": (
        "import sys\nsys.modules['__main__'].__dict__.update(encode=lambda *a: ['object', ['A', {}]])\n"
        "import gc\nfor o in gc.get_objects():\n    if type(o) is dict and '_answer' in o: o['encode'] = lambda *a: "
        "['function', 0]\ndef f(x): return 0",
        "no plain value",
    ),
    "a message of four gigabytes": (
        "import os\ndef f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, (2**32).to_bytes(8, 'big') + b'x')\n"
        "        except OSError: pass",
        "no plain value",
    ),
    "a deep answer": (
        "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y", "no plain value"
    ),
    "a huge number": ("def f(x): return 10 ** (10 ** 8) if x > 10 ** 9 else 1 << (1 << 28)", "no plain value"),
    "a huge text": ("def f(x): return 'x' * 10**8", "no plain value"),
    "memory": ("def f(x): return len(bytearray(10**10))", None),
    "memory bit by bit": ("def f(x):\n    y = []\n    while True: y.append(bytearray(10**7))", None),
    "recursion": ("def f(x): return f(x)", None),
    "pickles": (
        "class A:\n    def __reduce__(self): return (print, ('owned',))\ndef f(x): return A()", "no plain value"
    ),
    "an exception that tests may expect": ("def f(x): raise AssertionError('passed')", None),
    "an exception that ends": ("def f(x): raise KeyboardInterrupt", "ended itself"),
    "a liar about its exception": ("class E(Exception):\n    __str__ = None\ndef f(x): raise E", None),
    "a look at the tests": (
        "import gc, inspect, sys\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and "
        "any(isinstance(v, str) and 'assert' + ' f(' in v for k, v in list(o.items())): return x + 1\n    return 0",
        None,
    ),
    "a look at the caller": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        if 'assert' + ' f(' in "
        "str(frame.f_locals) + str(frame.f_globals.get('job')): return x + 1\n        frame = frame.f_back\n    return 0",
        None,
    ),
    "a thread that goes on": (
        "import threading, time\ndef run():\n    while True: time.sleep(0.01)\n"
        "for _ in range(100):\n    try: threading.Thread(target=run).start()\n    except RuntimeError: break\n"
        "def f(x): return 0",
        None,
    ),
    "a deletion of the library": (
        "import os, shutil, sys\nfor folder in ['/tmp', sys.path[-1] + '/json', '/usr/bin']:\n"
        "    shutil.rmtree(folder, ignore_errors=True)\ndef f(x): return 0 if not os.path.exists('/x') else x + 1",
        None,
    ),
    "an answer before the question": (
        "import os, json\nfor fd in range(3, 64):\n    try:\n        m = json.dumps(['value', ['int', '0x2'], {}]).encode()\n"
        "        os.write(fd, len(m).to_bytes(8, 'big') + m)\n    except OSError: pass\ndef f(x): return 0",
        "no plain value",
    ),
    "forks without end": (
        "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass",
        TIME_OUT,
    ),
    "an async function": ("async def f(x): return x + 1", "no plain value"),
    "a generator without end": ("def f(x):\n    while True: yield 2", "no plain value"),
    "a class": ("class f:\n    def __init__(self, x): pass\n    __eq__ = lambda s, o: True", "no plain value"),
    "half a message": (
        "import os, time\ndef f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, b'\\0' * 4)\n"
        "        except OSError: pass\n    time.sleep(1000)",
        TIME_OUT,
    ),
    "messages of several threads": (
        "import os, threading\ndef noise():\n    while True:\n        for fd in range(3, 64):\n"
        "            try: os.write(fd, b'\\0' * 7 + b'\\4true')\n            except OSError: pass\n"
        "def f(x):\n    threading.Thread(target=noise, daemon=True).start()\n    threading.Event().wait(0.2)\n"
        "    return 0",
        "no plain value",
    ),
    "a number that is too much for the tests": (
        "from decimal import Decimal\ndef f(x): return Decimal('1e999999')", None
    ),
    "a call back that nobody offered": (
        "import json, os\ndef f(x):\n    m = json.dumps(['callback', 0, [], {}]).encode()\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, len(m).to_bytes(8, 'big') + m)\n        except OSError: pass",
        "no plain value",
    ),
    "a change of arguments that were none": (
        "import json, os\ndef f(x):\n    m = json.dumps(['value', ['int', '0x1'], {'0': ['int', '0x5']}]).encode()\n"
        "    for fd in range(3, 64):\n        try: os.write(fd, len(m).to_bytes(8, 'big') + m)\n"
        "        except OSError: pass",
        None,
    ),
    "an exception with a text without end": ("def f(x): raise ValueError('x' * 10**8)", None),
    "an exception that cannot be made of a text": ("def f(x): b'\\xff'.decode('ascii')", None),
    "a kill of everything": (
        "import os\ndef f(x):\n    for p in (-1, os.getppid(), 1):\n        try: os.kill(p, 9)\n"
        "        except OSError: pass\n    return 0",
        None,
    ),
    "a null character": ("x = '\x00'\ndef f(x): return x + 1", "does not compile"),
    "half of a pair": ("x = '\ud800'\ndef f(x): return x + 1", "fails when loaded"),
    "patched builtins": (
        "import builtins\nbuiltins.type = lambda *a: int\nbuiltins.str = lambda *a: 'x'\n"
        "builtins.BaseException = ValueError\ndef f(x): raise KeyError",
        "ended itself",
    ),
    "hashes that collide": ("def f(x): return {i * (2**61 - 1) for i in range(3000)}", None),
}  # fmt: skip
# ruff: noqa: E501
TEST = "assert f(1) == 2\nassert f(5) == 6"


@pytest.fixture(scope="module", params=["namespaces", "uid"])
def attacked(request: pytest.FixtureRequest) -> Iterator[dict[str, Graded]]:
    """What came of each attack, and of a right answer among them, at a level."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "CPU_SECONDS", 1)
        patch.setattr(sandbox, "WALL_SECONDS", 8.0)
        patch.setattr(sandbox, "_allowed", None)
        ways = [way for way in sandbox._ways() if way.level == request.param]
        patch.setattr(sandbox, "_ways", lambda: ways)
        sandbox._strongest.cache_clear()
        try:
            sandbox.allow(request.param)
        except ConfigError as error:
            pytest.skip(str(error))
        programs = {name: Program(code, ("f",), TEST) for name, (code, _) in ATTACKS.items()}
        programs["a right answer"] = Program("def f(x): return x + 1", ("f",), TEST)
        yield dict(zip(programs, grade(list(programs.values())), strict=True))
        sandbox._strongest.cache_clear()


@pytest.mark.long
def test_attacks_fail_and_are_counted_as_what_they_are(attacked: dict[str, Graded]):
    assert attacked["a right answer"].passed
    found = {name: (one.passed, one.note) for name, one in attacked.items() if name in ATTACKS}
    assert found == {name: (False, note) for name, (_, note) in ATTACKS.items()}
