"""`infopo rounds` samples, marks, trains and evaluates, again and again, each time on samples of the newest policy.

Each part is a workflow of its own (`pairs`, `train`, `evaluate`, `compare`, `report`), and leaves a file by which it is
known to be finished. A killed command therefore goes on where it stood.
"""

import gc
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from infopo import run_state
from infopo.build import build_arguments, evaluation_settings, train_fields
from infopo.config import Recipe, load_recipe
from infopo.errors import ConfigError, DataError
from infopo.evaluation.comparison import comparisons, p_text
from infopo.evaluation.contenders import read_contender
from infopo.evaluation.harness import Standard
from infopo.evaluation.items import Item
from infopo.evaluation.marking import loaded_tasks
from infopo.evaluation.pairing import PairingSettings
from infopo.evaluation.settings import EvaluationSettings
from infopo.evaluation.tasks import TASKS
from infopo.output import counted, say
from infopo.preflight import check_writable, preflight
from infopo.round_settings import RoundsSettings
from infopo.runs import to_json, write_json_atomic
from infopo.settings import EvaluateSettings
from infopo.validation import options_named
from infopo.workflows.ask_judge import JudgeSettings
from infopo.workflows.compare import compare
from infopo.workflows.evaluate import evaluate
from infopo.workflows.export import export
from infopo.workflows.pairs import marker_of, pairs
from infopo.workflows.report import report_if_possible
from infopo.workflows.round_state import (
    START,
    Round,
    first_round,
    is_evaluated,
    record_of,
    refuse_fewer,
    settle_recipe,
)
from infopo.workflows.train import train_recipe


def rounds(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Trains in rounds as the section `rounds` of a recipe says, or goes on where a killed command stood.

    Returns:
        `output_dir`, with a run directory per round (`round-1`, ...), the evaluation of the start (`start`),
        `comparison.md`, `comparison.json`, `rounds.json` and `report.html`.

    Raises:
        InfoPOError: Recipe, prompts, data, model or an earlier round are at fault. What is finished is kept.
        KeyboardInterrupt: The user pressed Ctrl-C. The same command continues.
    """
    if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        raise ConfigError(
            "infopo rounds runs in one process; with several, take `infopo pairs` and `infopo train` in turns"
        )
    preflight(recipe_path, overrides, makes_a_run=False, section="rounds")
    recipe = load_recipe(recipe_path, overrides, train_fields()).without_resume()
    folder = Path(recipe.output_dir)
    check_writable(folder, "output_dir")
    build_arguments(recipe)
    prompts = _judged(recipe)
    run_state.refuse_to_hold_runs(folder)
    with run_state.in_use(folder):
        refuse_fewer(recipe)
        settle_recipe(recipe, prompts)
        try:
            _all_rounds(recipe, folder)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on where this one stood") from None
    return folder


def _judged(recipe: Recipe) -> str:
    """Refuses rounds that could not be carried out, before anything is written. Returns the hash of the prompts.

    Raises:
        ConfigError: The verifier or a task does not exist, or there are too few prompts.
        DataError: The prompts cannot be read.
    """
    settings = recipe.rounds
    assert settings is not None
    # A judge would begin a file of answers.
    with options_named("rounds"), tempfile.TemporaryDirectory() as scratch:
        _pairing(settings, 1)
        sampling, judge = _sampling(settings, 1), _judge(settings)
        marker = marker_of(settings.verifier, sampling, judge, Path(scratch), limit=_most(settings))
        items = marker.load(settings.prompts)[: settings.limit]
    if not items:
        raise DataError("holds no prompts", settings.prompts, "no prompts")
    per_round = settings.prompts_per_round
    if per_round is not None and per_round * settings.number > len(items):
        raise ConfigError(
            f"rounds.prompts_per_round: {settings.number} rounds of {per_round} prompts take "
            f"{per_round * settings.number}, and {settings.prompts} has {len(items)}; lower rounds.number or "
            "rounds.prompts_per_round, or leave the latter out to take all prompts in each round"
        )
    with options_named("evaluate"):
        if (held_out := evaluation_settings(recipe.evaluate)) is not None:
            Standard.of([name for name in held_out.tasks if name not in TASKS], held_out, None)
            loaded_tasks(held_out, [name for name in held_out.tasks if name in TASKS])
    # Those of the first round, because more rounds may be asked for later.
    return _hash_of(items[: settings.prompts_per_round or settings.limit])


def _hash_of(items: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(to_json(vars(item)).encode())
    return digest.hexdigest()


def _most(settings: RoundsSettings) -> int | None:
    """Returns how many prompts all rounds use, or None for all."""
    if settings.prompts_per_round is not None:
        return settings.prompts_per_round * settings.number
    return settings.limit


def _sampling(settings: RoundsSettings, number: int) -> EvaluationSettings:
    """Returns how the samples of a round are drawn. Each round has random numbers of its own."""
    same = ("temperature", "top_p", "max_new_tokens", "prompting", "num_fewshot", "batch_size", "allow_code_execution",
            "isolation")  # fmt: skip
    return EvaluationSettings(
        tasks=[settings.verifier],
        limit=settings.prompts_per_round or settings.limit,
        num_samples=settings.num_generations,
        seed=settings.seed + number - 1,
        **{name: getattr(settings, name) for name in same},
    )


def _pairing(settings: RoundsSettings, number: int) -> PairingSettings:
    same = ("rule", "pairs_per_prompt", "threshold", "min_pass_rate", "max_pass_rate", "reject_unfinished")
    return PairingSettings(
        seed=settings.seed + number - 1, **{name: getattr(settings, name) for name in same}
    )


def _judge(settings: RoundsSettings) -> JudgeSettings | None:
    if not settings.verifier.startswith("judge:"):
        return None
    return JudgeSettings(settings.verifier.removeprefix("judge:"), settings.judge_model, yes=settings.yes)


def _all_rounds(recipe: Recipe, folder: Path) -> None:
    settings = recipe.rounds
    assert settings is not None
    held_out = evaluation_settings(recipe.evaluate)
    best, since = folder / START, 0
    if held_out is None:
        say("the recipe names no evaluate.tasks: rounds are not compared, and none is left out")
    else:
        _evaluate_start(recipe.model.name_or_path, held_out, best)
    finished: list[Round] = []
    this = first_round(recipe)
    for number in range(1, settings.number + 1):
        say(f"round {number} of {settings.number}: {this.folder}, from {this.policy}")
        if not _has_pairs(settings, this):
            break
        _train(recipe, this)
        finished.append(this)
        if held_out is not None:
            if not this.is_evaluated:
                evaluate(str(this.folder), held_out)
                _forget()
            is_better = _improves(best, this)
            best, since = (this.folder, 0) if is_better else (best, since + 1)
        else:
            best = this.folder
        _show(folder, finished, best, has_marks=held_out is not None)
        if settings.stop_after is not None and since >= settings.stop_after and number < settings.number:
            say(f"no better result in {counted(since, 'round')}: no other is begun (rounds.stop_after)")
            break
        this = this.next()
    which = "the best" if held_out is not None else "the last"
    say(f"{folder}: {counted(len(finished), 'round')}; {which} is {best}")


def _evaluate_start(model: str, held_out: EvaluationSettings, folder: Path) -> None:
    if not is_evaluated(folder):
        evaluate(model, held_out, output=folder)
        _forget()
    read_contender(str(folder))  # what has no marks of items cannot be compared, which is better known now


def _has_pairs(settings: RoundsSettings, this: Round) -> bool:
    """Samples and pairs. Returns whether the round has pairs, without which rounds end.

    Raises:
        DataError: The first round has none.
    """
    if this.is_sampled:
        say(f"{this.pairs}: is there already")
        return True
    skip = (settings.prompts_per_round or 0) * (this.number - 1)
    try:
        with options_named("rounds"):
            pairs(
                this.policy,
                settings.verifier,
                _sampling(settings, this.number),
                _pairing(settings, this.number),
                prompts=settings.prompts,
                skip=skip,
                judge=_judge(settings),
                output=this.pairs,
            )
    except DataError as error:
        if error.reason != "no pairs" or this.number == 1:
            raise
        say(f"round {this.number} has no pairs: {error}. Rounds end here, and those before are kept")
        return False
    finally:
        _forget()
    return True


def _train(recipe: Recipe, this: Round) -> None:
    if this.is_trained:
        say(f"{this.folder}: is trained already")
        return
    train_recipe(recipe_of(recipe, this))
    _forget()
    if this.is_adapter:  # the next round trains a new adapter on the whole model
        export(str(this.folder), output=this.trained)
        _forget()
    this.note_trained()


def recipe_of(recipe: Recipe, this: Round) -> Recipe:
    """Returns the recipe of one round, an ordinary one."""
    assert recipe.rounds is not None
    train = recipe.without_resume().train
    if recipe.rounds.reference == "first" and this.number > 1:
        reference = replace(recipe.reference, source=recipe.model.name_or_path)
    else:
        # The policy that has drawn the samples is the reference.
        reference = replace(recipe.reference, samples=str(this.samples))
    if run_state.holds_run(this.folder):
        train["resume_from_checkpoint"] = True
    during = train.get("eval_strategy", "no") not in ("no", None)
    # A revision is that of a name on the hub.
    revision = recipe.model.revision if this.number == 1 else None
    return replace(
        recipe,
        model=replace(recipe.model, name_or_path=this.policy, revision=revision),
        data=replace(recipe.data, path=str(this.pairs)),
        output_dir=str(this.folder),
        reference=reference,
        train=train,
        evaluate=recipe.evaluate if during else EvaluateSettings(),
        rounds=None,
    )


def _improves(best: Path, this: Round) -> bool:
    """Says how a round compares with the best before, and returns whether it is better on the first task."""
    row = comparisons([read_contender(str(best)), read_contender(str(this.folder))])[0]
    difference, (low, high) = -row.found.difference, row.found.ci95
    say(
        f"round {this.number} against {best.name}: {row.task} {difference:+.3f} [{-high:+.3f}, {-low:+.3f}], "
        f"p {p_text(row.found.p)}, n = {row.found.n}"
    )
    return difference > 0


def _show(folder: Path, finished: Sequence[Round], best: Path, *, has_marks: bool) -> None:
    """Writes the comparison and the report of the rounds so far."""
    directories = [str(each.folder) for each in finished]
    if has_marks:
        for format, name in (("markdown", "comparison.md"), ("json", "comparison.json")):
            compare([str(folder / START), *directories], format=format, output=folder / name)
    report_if_possible(directories, folder / "report.html")
    write_json_atomic(folder / "rounds.json", record_of(finished, best.name))


def _forget() -> None:
    """Frees the memory of the models of a part that is over."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
