"""Finds the program in a response to a coding problem. Imports no torch.

The rule, in this order. A fenced block is Python if its fence says so, or says nothing.

1. Reasoning up to the last `</think>` is left out. Without that tag, a response that begins with `<think>` has no
   answer. `[BEGIN]` and `[DONE]`, which few-shot prompts of MBPP set around an answer, bound it.
2. Of the Python blocks that define a function of the problem, the last one that compiles is the answer. Blocks before
   it which define names that it uses and does not define stand in front of it.
3. A block that defines none of them but continues the function of the prompt, or a text that begins with an indented
   line, is appended to the prompt. It ends before the first statement in column 0 that is no definition, import or
   assignment.
4. In a text without fences, the answer is what compiles from its first line on, or from the first line that begins a
   definition, an import or a constant.
5. Otherwise there is no code in the response.

In front of 2 and 4 stands what the prompt has before its function: imports and other functions.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

_FENCE = re.compile(r"^[ \t]*(?:[-*+>] +)?(?P<fence>`{3,}|~{3,})[ \t]*\{?\.?(?P<language>[^\s`{}]*)[^`]*$")
_PYTHON = {"", "python", "py", "python3", "py3", "python2", "ipython", "ipython3", "python-repl", "sage"}
_BEGINS = re.compile(r"^(?:async +def|def|class|import|from|@)\b|^@\w")
_CONSTANT = re.compile(r"[A-Z_][A-Z0-9_]* *=[^=]")
_DEFINITIONS = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign,
)  # fmt: skip
_INDENT = " " * 4
_LONGEST = 100_000
"""Characters of a response that are looked at."""


@dataclass(frozen=True)
class Asked:
    """What a response has to define.

    Attributes:
        functions: Names of the functions.
        prompt: Beginning of a program that the response may continue, up to the body of the function. "" if there is
            none.
        preamble: What a program of its own needs in front of it: imports and other functions of the prompt.
    """

    functions: Sequence[str]
    prompt: str = ""
    preamble: str = ""


def program_in(response: str, asked: Asked) -> str | None:
    r"""Returns the program in a response, or None if there is no code in it.

    The program is code that somebody may have meant, and need not compile.

    Example:
        >>> print(program_in("Sure!\n```python\ndef f(x):\n    return x\n```\nIt returns x.", Asked(["f"])))
        def f(x):
            return x
    """
    text = _answer(response)
    if not text.strip():
        return None
    blocks = _blocks(text)
    own = [block for block in blocks if _defines(block, asked.functions)]
    if own:
        chosen = next((block for block in reversed(own) if _parsed(block) is not None), own[-1])
        return _joined(asked.preamble, *_helpers(blocks[: blocks.index(chosen)], chosen), chosen)
    for block in blocks:
        if (program := _continued(asked.prompt, block)) is not None:
            return program
    if blocks:
        # There is code, which defines something else.
        return _joined(asked.preamble, *blocks)
    if "```" in text or "~~~" in text:
        text = _without_fences(text)
    begins_indented = text.lstrip("\r\n")[:1] in (" ", "\t")
    if begins_indented and (program := _continued(asked.prompt, text)) is not None:
        return program
    if (whole := _whole(text, asked.functions)) is not None:
        return _joined(asked.preamble, whole)
    return _continued(asked.prompt, text)


def _answer(response: str) -> str:
    text = response[:_LONGEST].replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
    _, tag, after = text.rpartition("</think>")
    if tag:
        text = after
    elif text.lstrip().startswith("<think>"):
        return ""
    # A base model may go on with a next problem. So it is the first answer.
    text = re.split(r"^[ \t]*\[BEGIN\]", text, maxsplit=1, flags=re.M)[-1]
    return re.split(r"^[ \t]*\[DONE\]", text, maxsplit=1, flags=re.M)[0]


def _blocks(text: str) -> list[str]:
    """Returns the Python blocks. The last one may have no end, if the response was cut off."""
    found: list[str] = []
    lines: list[str] = []
    opening, is_python = None, False
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if opening is None:
            if match is not None:
                opening, lines = match, []
                is_python = match["language"].lower().rstrip(":,") in _PYTHON
        elif match is not None and not match["language"] and match["fence"].startswith(opening["fence"]):
            if is_python:
                found.append(_dedented(lines))
            opening = None
        else:
            lines.append(line)
    if opening is not None and is_python:
        found.append(_dedented(lines))
    return [block for block in found if block.strip()]


def _dedented(lines: list[str]) -> str:
    """Returns a block as it stands, or without the indentation that a list or a quotation gives it."""
    text = "\n".join(lines)
    # A body that continues the prompt's function keeps its indentation.
    first = next((line for line in lines if line.strip()), "")
    return textwrap.dedent(text) if _BEGINS.match(first.strip()) else text


def _without_fences(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if _FENCE.match(line) is None)


def _parsed(code: str) -> ast.Module | None:
    with warnings.catch_warnings():
        # Of escapes such as "\d", which compile.
        warnings.simplefilter("ignore")
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _defines(code: str, functions: Sequence[str]) -> bool:
    """Returns whether code defines one of the functions. Code that does not compile is judged by its lines."""
    tree = _parsed(code)
    if tree is None:
        return any(re.search(rf"^(?:async +)?def +{re.escape(name)}\b", code, re.M) for name in functions)
    return bool(_defined(tree) & set(functions))


def _defined(tree: ast.Module) -> set[str]:
    """Returns the names that a program has at its end."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _helpers(before: Sequence[str], chosen: str) -> list[str]:
    """Returns the blocks that define what the chosen one uses and does not define."""
    tree = _parsed(chosen)
    if tree is None:
        return []
    wanted = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - _defined(tree)
    found = []
    for block in reversed(before):
        other = _parsed(block)
        if other is not None and (given := _defined(other) & wanted):
            found.append(block)
            wanted -= given
    return found[::-1]


def _joined(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part.strip())


def _continued(prompt: str, text: str) -> str | None:
    """Returns the prompt with the text behind it, if that gives its function a body."""
    if not prompt:
        return None
    body = text.strip("\n")
    # Tokenizers and chat models lose the first indentation, or all of it. The form that keeps the most is meant.
    forms = (body, _INDENT + body.lstrip(), textwrap.indent(textwrap.dedent(body), _INDENT))
    start = prompt.rstrip("\n")
    programs = [_compiling(f"{start}\n{form}", start.count("\n") + 1) for form in forms]
    return max(
        (one for one in programs if one and _has_body(one)), key=lambda one: one.count("\n"), default=None
    )


def _compiling(code: str, least: int) -> str | None:
    """Returns as much of a program as is of use: what compiles, up to the first statement that is run at its end.

    Args:
        code: The program.
        least: Number of lines that have to be left.
    """
    lines = code.split("\n")
    for _ in range(_tries(code)):
        if len(lines) <= least:
            break
        tree = _parsed("\n".join(lines))
        if tree is not None:
            run = [node.lineno for node in tree.body if not isinstance(node, _DEFINITIONS)]
            ends = [line for line in run if line > least]
            if not ends:
                return "\n".join(lines)
            lines = lines[: ends[0] - 1]
            continue
        lines = lines[: _last_outside(lines, _error_line(lines))]
    return None


def _tries(text: str) -> int:
    """Returns how often a text may be parsed. What a model writes must not keep the grader busy."""
    return min(200, 4 + 200_000 // (len(text) + 1))


def _error_line(lines: Sequence[str]) -> int:
    try:
        compile("\n".join(lines), "response", "exec", dont_inherit=True)
    except SyntaxError as error:
        return min(error.lineno or len(lines), len(lines))
    except (ValueError, RecursionError, MemoryError):
        pass
    return len(lines)


def _last_outside(lines: Sequence[str], until: int) -> int:
    """Returns the index of the last line up to a number that begins in column 0, since a statement may begin there."""
    for index in range(until - 1, -1, -1):
        if lines[index].strip() and lines[index][0] not in " \t)]}#":
            return index
    return 0


def _has_body(program: str) -> bool:
    """Returns whether the last function of the program has more than a docstring."""
    tree = _parsed(program)
    assert tree is not None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    if not functions:
        return False
    return any(
        not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant | ast.Name))
        for statement in functions[-1].body
    )


def _whole(text: str, functions: Sequence[str]) -> str | None:
    """Returns the part of a text without fences that is a program and defines one of the functions."""
    lines = text.split("\n")
    starts = [0, *(index for index, line in enumerate(lines) if _BEGINS.match(line) or _CONSTANT.match(line))]
    left = _tries(text)
    for start in starts:
        part = lines[start:]
        while part and (left := left - 1) > 0:
            code = "\n".join(part)
            if _parsed(code) is not None:
                if _defines(code, functions):
                    return code
                break
            part = part[: _last_outside(part, _error_line(part))]
    # Something that was meant as the function and does not compile.
    names = "|".join(map(re.escape, functions))
    meant = re.search(rf"^(?:async +)?def +(?:{names})\b", text, re.M)
    return text[meant.start() :] if meant else None
