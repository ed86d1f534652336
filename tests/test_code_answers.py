"""Which program a response is taken to contain, on the forms that models answer in."""

import pytest

from infopo.evaluation.code_answers import Asked, program_in

PROMPT = (
    'from typing import List\n\n\ndef f(xs: List[int]) -> int:\n    """ Return the sum.\n'
    '    >>> f([1])\n    1\n    """\n'
)
CONTINUES = Asked(["f"], PROMPT, "from typing import List")
WHOLE = Asked(["f"])
F = "def f(xs):\n    return sum(xs)"
BODY = "    return sum(xs)"

RIGHT = {
    "fenced": f"```python\n{F}\n```",
    "fenced, other names of the language": f"```Python3\n{F}\n```",
    "fenced, py": f"``` py\n{F}\n```",
    "fenced, attributes": f'```{{.python title="f.py"}}\n{F}\n```',
    "no language": f"```\n{F}\n```",
    "tildes": f"~~~python\n{F}\n~~~",
    "four backticks": f"````python\n{F}\n````",
    "prose around": f"Sure! Here is the function:\n\n```python\n{F}\n```\n\nIt uses `sum`. Let me know!",
    "windows line ends": f"Here:\r\n```python\r\n{F}\r\n```\r\n".replace("\n    ", "\r\n    "),
    "no end of the block": f"```python\n{F}\n",
    "in a list": "1. The code:\n\n   ```python\n   def f(xs):\n       return sum(xs)\n   ```\n2. Done",
    "an example behind": f"```python\n{F}\n```\nUsage:\n```python\nprint(f([1, 2]))\n```\nOutput:\n```\n3\n```",
    "shell first": f"```bash\npip install nothing\n```\n```python\n{F}\n```",
    "a correction": f"```python\ndef f(xs):\n    return 0\n```\nThat is wrong. Better:\n```python\n{F}\n```",
    "a correction that breaks off": f"```python\n{F}\n```\nOr shorter:\n```python\ndef f(xs: return",
    "helper in a block of its own": (
        "```python\ndef add(a, b):\n    return a + b\n```\nand\n"
        "```python\ndef f(xs):\n    s = 0\n    for x in xs:\n        s = add(s, x)\n    return s\n```"
    ),
    "imports in a block of their own": (
        "```python\nimport functools, operator\n```\n```python\ndef f(xs):\n"
        "    return functools.reduce(operator.add, xs, 0)\n```"
    ),
    "reasoning": f"<think>\n```python\ndef f(xs):\n    return 0\n```\nno\n</think>\n```python\n{F}\n```",
    "reasoning opened before": f"```\ndef f(xs): return 0\n```\n</think>\n```python\n{F}\n```",
    "bare": F,
    "bare behind a constant": "START = 0\ndef f(xs):\n    return sum(xs, START)",
    "bare behind prose and a constant": "A constant.\n\nSTART = 0\ndef f(xs):\n    return sum(xs, START)\n\nDone.",
    "bare behind a table": "table = {}\nfor i in range(3):\n    table[i] = i\ndef f(xs):\n    return sum(xs)",
    "bare between prose": f"The function is\n\n{F}\n\nwhich sums.",
    "bare with an apostrophe behind": f"{F}\n\nIt's done, isn't it?",
    "markers of MBPP": f"[BEGIN]\n{F}\n[DONE]\n\nYou are an expert [BEGIN]\ndef f(xs):\n    return 0\n[DONE]",
    "end marker of MBPP": f"{F}\n[DONE]\nYou are an expert Python programmer",
    "decorated": f"```python\nimport functools\n@functools.lru_cache\ndef g(): return 0\n{F}\n```",
    "a lambda": "```python\nf = lambda xs: sum(xs)\n```",
    "a fence in a comment": "```python\ndef f(xs):\n    # ~~~ no fence\n    return sum(xs)\n```",
    "byte order mark": f"\ufeff{F}",
    "a main block": f'```python\n{F}\n\nif __name__ == "__main__":\n    print(f([int(input())]))\n```',
    "async twin first": f"```python\nasync def g(): ...\n\n{F}\n```",
    "asserts behind": f"```python\n{F}\n\nassert f([1]) == 1\n```",
}
RIGHT_IF_CONTINUED = {
    "body": f"{BODY}\n",
    "body without its first indentation": "return sum(xs)",
    "body of two lines without its first indentation": "s = sum(xs)\n    return s",
    "body without indentation": "s = sum(xs)\nreturn s",
    "body behind line feeds": f"\n\n{BODY}",
    "body with tabs": "\treturn sum(xs)",
    "fenced body": f"```python\n{BODY}\n```",
    "fenced body, prose": f"The body:\n```python\n{BODY}\n```\nDone",
    "body, then the model goes on": f"{BODY}\n\n\nprint(f([1]))\nassert f([1]) == 2\n",
    "body, then another function": f"{BODY}\n\n\ndef g(x):\n    return x",
    "body that breaks off in the next thing": f"{BODY}\n\n\ndef g(x):\n    return (x +",
    "body, then prose": f"{BODY}\n\nThis returns the sum. It's easy.",
    "body, then the end of a fence": f"{BODY}\n```\n",
    "the prompt again": f"{PROMPT}{BODY}",
    "the prompt again, fenced": f"```python\n{PROMPT}{BODY}\n```",
    "whole without the prompt's import": "```python\ndef f(xs: List[int]) -> int:\n    return sum(xs)\n```",
}
NONE = {
    "nothing": "",
    "space": " \n\n",
    "refusal": "I'm sorry, but I cannot help with that.",
    "prose": "The function adds all numbers and returns the result.",
    "reasoning that breaks off": f"<think>\nI would write\n```python\n{F}\n```\nbut",
    "a word": "None",
}


def value(program: str | None) -> object:
    assert program is not None
    names: dict[str, object] = {"__name__": "solution"}
    exec(program, names)
    f = names["f"]
    assert callable(f)
    return f([1, 2, 3])


@pytest.mark.parametrize("form", RIGHT)
@pytest.mark.parametrize("asked", [WHOLE, CONTINUES])
def test_the_function_is_found(form: str, asked: Asked):
    program = program_in(RIGHT[form], asked)
    assert program is not None
    if "assert" not in form and "main" not in form:
        assert value(program) == 6
    else:
        assert F in program


@pytest.mark.parametrize("form", RIGHT_IF_CONTINUED)
def test_the_prompt_is_continued(form: str):
    assert value(program_in(RIGHT_IF_CONTINUED[form], CONTINUES)) == 6


@pytest.mark.parametrize("form", NONE)
@pytest.mark.parametrize("asked", [WHOLE, CONTINUES])
def test_no_code_is_made_of_what_is_none(form: str, asked: Asked):
    assert program_in(NONE[form], asked) is None


def test_code_that_does_not_compile_or_defines_something_else_is_code():
    assert "def f(xs:" in (program_in("```python\ndef f(xs:\n  return\n```", WHOLE) or "")
    assert "def g" in (program_in("```python\ndef g(x):\n    return x\n```", WHOLE) or "")
    assert "def f(" in (program_in("Here it is: \ndef f(xs):\n    return (", WHOLE) or "")


@pytest.mark.parametrize(
    "text",
    [
        "(" * 50_000, "-" * 50_000 + "1", "1+" * 20_000 + "1", "a" + ".b" * 20_000, "[" * 5_000 + "]" * 5_000,
        "def f(x):\n" * 5_000, "```\n" * 20_000, "if 1:\n" + " " * 50_000, "\x00", "\ud800", "x = 1" + "0" * 60_000,
        "f(" * 3_000 + ")" * 3_000, "not " * 50_000 + "1", "lambda:" * 20_000 + "1", "# " + "\\\n" * 40_000,
        "def f(x):\n    return x\n" + "It's\n" * 5_000, "@a\n" * 2_000, "f'" + "{" * 200 + "'", "[DONE]" * 10_000,
    ],
)  # fmt: skip
def test_nothing_that_a_model_writes_breaks_the_search(text: str):
    for response in (text, f"```python\n{text}\n```", f"    {text}", f"def f(x):\n    return {text}"):
        program = program_in(response, CONTINUES)
        assert program is None or isinstance(program, str)
