"""Grades model solutions that somebody else has labelled, and lists each disagreement with its reason.

The reason is found by running the solution three times more: with the imports that a labeller may have had in scope,
in one process with its tests, as most graders do, and there without looking for the code in it.

    python scripts/code_labels.py FILE... [--out benchmarks/results/code-labels.json]

A row of a file has `task_id`, `prompt`, `entry_point`, `test`, `solution` and the label `is_solved`.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from infopo.evaluation import sandbox
from infopo.evaluation.code_answers import program_in
from infopo.evaluation.code_grading import Graded, Program, grade
from infopo.evaluation.code_tasks import asked_of, humaneval_item, program_of

IMPORTS = "import collections, heapq, itertools, math, re, sys\nfrom typing import *\n"


def in_one_process(program: Program, code: str) -> Program:
    """Returns a program that runs the tests where the solution runs."""
    code = f"{program.setup}\n{code}\n{program.test}\ndef passed():\n    return True\n"
    return Program(code, ("passed",), "assert passed()")


def reason(label: bool, ours: Graded, imported: Graded, together: Graded, as_it_is: Graded) -> str:
    """Returns why a label and the verdict differ."""
    if label and imported.passed:
        return "uses a module that it does not import"
    if ours.passed and not as_it_is.passed:
        return "passes, but not as it stands: the code continues the prompt, or stands between other text"
    if together.passed == ours.passed:
        return "its own tests say the same in one process: the label does not follow from them"
    return "unexplained"


def graded(path: Path) -> dict[str, Any]:
    """Returns how many labels of a file the grader shares, and what it says of the others."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    items = [humaneval_item(row, f"{path.name}:{number}") for number, row in enumerate(rows, 1)]
    codes = [program_in(row["solution"], asked_of(item)) or "" for row, item in zip(rows, items, strict=True)]
    started = time.perf_counter()
    found = grade([program_of(code, item) for code, item in zip(codes, items, strict=True)])
    seconds = time.perf_counter() - started
    places = [
        i for i, (row, one) in enumerate(zip(rows, found, strict=True)) if one.passed != row["is_solved"]
    ]
    programs = [program_of(codes[place], items[place]) for place in places]
    imported = grade([replace(program, code=IMPORTS + program.code) for program in programs])
    together = grade([in_one_process(program, program.code) for program in programs])
    texts = [rows[place]["solution"] for place in places]
    as_it_is = grade([in_one_process(*both) for both in zip(programs, texts, strict=True)])
    differ = [
        {
            "task": rows[place]["task_id"],
            "label": rows[place]["is_solved"],
            "note": found[place].note,
            "detail": found[place].detail,
            "reason": reason(rows[place]["is_solved"], *four),
        }
        for place, *four in zip(
            places, [found[place] for place in places], imported, together, as_it_is, strict=True
        )
    ]
    return {
        "solutions": len(rows),
        "labelled_right": sum(row["is_solved"] for row in rows),
        "passed": sum(one.passed for one in found),
        "per_minute": round(60 * len(rows) / seconds),
        "disagreements": differ,
    }


def main() -> None:
    """Grades the files and writes what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    isolation = sandbox.allow()
    record = {"isolation": isolation.as_record()} | {path.name: graded(path) for path in arguments.files}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
