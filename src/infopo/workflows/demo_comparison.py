"""The demo's runs and their start on the same problems: marks of every problem, and what a paired test says of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infopo.evaluation.comparison import comparisons, p_text
from infopo.evaluation.contenders import read_contender
from infopo.evaluation.items import Answered, shown_text
from infopo.evaluation.lab_task import lab_item, lab_marks
from infopo.evaluation.results import FOLDER, Response, gold_text, summary, write_evaluation
from infopo.lab import Problem
from infopo.lab.evaluation import AccuracyResult, answers, wilson_interval

TASK = "lab"


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    folder: Path,
    name: str,
) -> AccuracyResult:
    """Solves problems greedily, and writes the marks where `infopo compare` finds them.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        problems: The problems.
        folder: Folder of the run, or one for the start.
        name: Name of the model in `eval.json`.
    """
    responses = answers(model, tokenizer, problems)
    items = [lab_item(problem, number) for number, problem in enumerate(problems)]
    answered = [Answered(item, each.text, each.finished) for item, each in zip(items, responses, strict=True)]
    marked = [
        Response(
            TASK,
            each.item.id,
            0,
            shown_text(each.item.prompt),
            each.response,
            len(response.token_ids),
            each.finished,
            {TASK: mark},
            gold_text(each.item.gold),
        )
        for each, response, mark in zip(answered, responses, lab_marks(answered), strict=True)
    ]
    figures = summary(marked, TASK)
    record = {
        "headline": TASK,
        "items": len(items),
        "samples": 1,
        "rules": {TASK: figures},
        "prompting": "chat",
    }
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_evaluation(folder / FOLDER, {"model": {"name": name}, "tasks": {TASK: record}}, marked)
    correct, n = figures["correct"], len(items)
    return AccuracyResult(correct, n, correct / n, wilson_interval(correct, n))


def against_start(start: Path, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns what each run has changed, problem by problem, with p-values adjusted for the number of runs (Holm).

    Args:
        start: Folder that `solve` wrote the marks of the starting policy to.
        runs: Folders of the runs.
    """
    contenders = [read_contender(str(folder), [TASK]) for folder in (start, *runs)]
    found = []
    for row in comparisons(contenders):
        low, high = row.found.ci95
        found.append(
            {
                "run": row.other,
                "difference": -row.found.difference,
                "ci95": (-high, -low),
                "p_holm": row.p_holm,
                "wins": row.found.losses,
                "losses": row.found.wins,
                "n": row.found.n,
                "smallest": row.found.smallest,
            }
        )
    return found


def comparison_lines(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Returns the comparison with the start as the lines of a Markdown table.

    Args:
        rows: Results of `against_start`.
        names: Name of each run, e.g. method and learning rate.
    """
    lines = [
        f"against the start, on the same {rows[0]['n']} problems (McNemar's exact test, adjusted for {len(rows)} "
        "runs):",
        "",
        "| run | accuracy − start [95 %] | p | now right / now wrong | smallest difference shown |",
        "|---|---|---|---|---|",
    ]
    for row, name in zip(rows, names, strict=True):
        low, high = row["ci95"]
        smallest = "none" if row["smallest"] is None else f"{row['smallest']:.3f}"
        lines.append(
            f"| {name} | {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}] | {p_text(row['p_holm'])} "
            f"| {row['wins']} / {row['losses']} | {smallest} |"
        )
    return lines
