"""The demo's runs and their start on the same problems: marks of every problem, and what a paired test says of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infopo.evaluation.asking import in_memory, wanted
from infopo.evaluation.comparison import comparisons, p_text
from infopo.evaluation.contenders import read_contender
from infopo.evaluation.lab_task import lab_item, lab_task
from infopo.evaluation.marking import loaded, marked, task_record
from infopo.evaluation.prompting import Prompts
from infopo.evaluation.results import FOLDER, write_evaluation
from infopo.evaluation.settings import EvaluationSettings
from infopo.evaluation.subjects import LoadedModel
from infopo.lab import Problem
from infopo.lab.evaluation import AccuracyResult, wilson_interval

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
    task, settings = lab_task(), EvaluationSettings(tasks=[TASK])
    subject = LoadedModel(name, model, tokenizer, batch_size=256)
    prompts = Prompts(tokenizer, task)
    law = settings.law(task, prompts.stop)
    each = loaded(task, [lab_item(problem, number) for number, problem in enumerate(problems)], "demo")
    needed = list(wanted(subject, prompts, each.items, law, num_samples=1, seed=settings.seed))
    responses = marked(task, in_memory(subject, prompts, TASK, needed, law))
    found = task_record(each, settings, responses) | {"prompting": prompts.style, "law": law.record}
    write_evaluation(folder / FOLDER, {"model": subject.record, "tasks": {TASK: found}}, responses)
    figures = found["rules"][TASK]
    return AccuracyResult(
        figures["correct"],
        figures["n"],
        figures["accuracy"],
        wilson_interval(figures["correct"], figures["n"]),
    )


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
