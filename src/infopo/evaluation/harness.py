"""Standard tasks through lm-evaluation-harness, with the model that is loaded, in our result format.

The harness renders, asks and marks by its own rules, so that figures are those that others publish for its version. Its
cache is never used: it does not know which model wrote an answer. Names are those of its tasks, groups and tags, and of
task files in a local folder. The library is imported in functions alone.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infopo.errors import ConfigError, InfoPOError
from infopo.evaluation.items import Mark
from infopo.evaluation.results import Response, gold_text, summary
from infopo.evaluation.settings import EvaluationSettings, unread
from infopo.evaluation.subjects import LoadedModel, Subject
from infopo.evaluation.tasks import TASKS
from infopo.intervals import Z_95, wilson
from infopo.output import say
from infopo.runs import Record

_FIRST = ("acc_norm,none", "acc,none", "exact_match,strict-match", "prompt_level_strict_acc,none")
"""Metrics that stand for a task if it has them, in this order, as leaderboards have it. Else its first does."""


@dataclass(frozen=True)
class HarnessResult:
    """What the harness found.

    Attributes:
        tasks: Records of single tasks, as `eval.json` has them.
        groups: Figures of groups, such as the mean over the subjects of MMLU.
        responses: Responses with marks, one per item.
    """

    tasks: Mapping[str, Record]
    groups: Mapping[str, Record]
    responses: Sequence[Response]


@dataclass(frozen=True)
class Standard:
    """Tasks of the harness that an evaluation names, checked and not yet run.

    Attributes:
        names: Their names.
        manager: The harness's `TaskManager`, or None if there are none.
    """

    names: Sequence[str]
    manager: Any

    @classmethod
    def of(cls, names: Sequence[str], settings: EvaluationSettings, responses: object) -> "Standard":
        """Checks the names and what is asked of them.

        Raises:
            ConfigError: There is no such task, lm-eval is not installed, or a setting does not apply.
        """
        if not names:
            return cls(names, None)
        if responses is not None:
            raise ConfigError(
                f"--responses: {', '.join(names)}: expected tasks among {', '.join(TASKS)}; lm-evaluation-harness "
                "marks what it asked itself"
            )
        check_harness(names, settings)
        return cls(names, harness_tasks(names, settings.include_path))

    def run(self, subject: Subject, settings: EvaluationSettings) -> HarnessResult:
        """Evaluates a model on the tasks, if there are any."""
        if not self.names:
            return HarnessResult({}, {}, [])
        assert isinstance(subject, LoadedModel)
        return run_harness(subject.model, subject.tokenizer, self.names, self.manager, settings)


def check_harness(names: Sequence[str], settings: EvaluationSettings) -> None:
    """Refuses what the harness would leave undone, before a model is loaded.

    Raises:
        ConfigError: lm-eval is not installed, or a setting does not apply to its tasks.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            f"--tasks: no task {', '.join(map(repr, names))}; there are {', '.join(TASKS)}, and with "
            "pip install 'infopo[eval]' those of lm-evaluation-harness"
        )
    which = f"{', '.join(names)}, tasks of lm-evaluation-harness"
    names_unread = ("server", "shard", "temperature", "max_new_tokens", "num_samples", "top_p")
    problems = unread(settings, names_unread, which)
    problems += [f"--data: {name} is a task of lm-evaluation-harness, whose data its task file names; give a task file "
                 "of your own with --include-path" for name in names if name in settings.data]  # fmt: skip
    if problems:
        raise ConfigError(problems)


def harness_tasks(names: Sequence[str], include_path: str | None) -> Any:
    """Returns the harness's `TaskManager`, which knows all of these names.

    Args:
        names: Tasks, groups or tags.
        include_path: Folder of task files of the user's own, or None.

    Raises:
        ConfigError: There is no task of that name.
    """
    import lm_eval.tasks

    own = [include_path] if include_path else []
    manager = lm_eval.tasks.TaskManager(include_path=own, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    # Its index of 14,000 task files takes long, for a name that is a slip of the pen too.
    folders = [Path(lm_eval.tasks.__file__).parent, *map(Path, own)]
    _refuse([name for name in names if not _is_mentioned(name, folders)])
    say("reading the task files of lm-evaluation-harness, which takes a while")
    manager = lm_eval.tasks.TaskManager(include_path=own)
    _refuse([name for name in names if name not in manager.all_tasks], manager.all_tasks)
    return manager


def _is_mentioned(name: str, folders: Iterable[Path]) -> bool:
    text = name.encode()
    return any(text in file.read_bytes() for folder in folders for file in folder.rglob("*.yaml"))


def _refuse(unknown: Sequence[str], known: Iterable[str] = ()) -> None:
    problems = []
    for name in unknown:
        close = difflib.get_close_matches(name, {*known, *TASKS}, 3)
        hint = f"; did you mean {', '.join(close)}?" if close else f"; there are {', '.join(TASKS)}"
        problems.append(f"--tasks: no task {name!r} here, and none in lm-evaluation-harness{hint}")
    if problems:
        raise ConfigError(problems)


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: Any,
    settings: EvaluationSettings,
) -> HarnessResult:
    """Evaluates a loaded model on tasks of the harness.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        names: Tasks, groups or tags that `manager` knows.
        manager: See `harness_tasks`.
        settings: `limit`, `num_fewshot` (0 means each task's own), `prompting` (`chat` applies the chat template; the
            harness's default is none), `batch_size` and `seed` are used.

    Raises:
        ConfigError: Data of a task cannot be loaded, or the harness fails.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
            tasks=list(names),
            task_manager=manager,
            num_fewshot=settings.num_fewshot or None,
            limit=settings.limit,
            apply_chat_template=settings.prompting == "chat",
            bootstrap_iters=1000,
            use_cache=None,
            cache_requests=False,
            log_samples=True,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    except InfoPOError:
        raise
    except Exception as error:  # data sets, templates, metrics and task files fail in ways of their own
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ConfigError(
            f"--tasks {', '.join(names)}: lm-evaluation-harness stops with {type(error).__name__}: {reason:.250}; "
            "without the hub, give task files that name local data: --include-path FOLDER"
        ) from error
    return converted(found, settings)


def converted(found: Mapping[str, Any], settings: EvaluationSettings) -> HarnessResult:
    """Returns what `simple_evaluate` found in our format.

    A metric that is 0 or 1 for every item becomes a rule with marks and Wilson's interval, which `infopo compare` pairs
    by item. Another one (perplexity, F1) is a figure with the interval of the harness's standard error.
    """
    tasks: dict[str, Record] = {}
    responses: list[Response] = []
    for name, samples in found["samples"].items():
        answered = _responses(name, samples)
        rules = _figures(found["results"][name], len(answered))
        for rule in answered[0].marks if answered else ():
            if all(rule in each.marks for each in answered):
                rules[rule] = summary(answered, rule)
        responses += answered
        tasks[name] = {
            "headline": next((rule for rule in _FIRST if rule in rules), next(iter(rules), None)),
            "items": len(answered),
            "samples": 1,
            "data": {"source": "lm-evaluation-harness", "sha256": _hash_of(samples, "doc_hash")},
            "prompting": "chat" if settings.prompting == "chat" else "plain",
            "num_fewshot": found["n-shot"].get(name),
            "prompt_sha256": _hash_of(samples, "prompt_hash"),
            "rules": rules,
            "harness": {"lm_eval": found["lm_eval_version"], "task_version": found["versions"].get(name)},
        }
    return HarnessResult(tasks, _groups(found), responses)


def _groups(found: Mapping[str, Any]) -> dict[str, Record]:
    groups: dict[str, Record] = {}
    for name, figures in found.get("groups", {}).items():
        members = list(found["group_subtasks"].get(name, ()))
        n = sum(found["n-samples"].get(member, {}).get("effective", 0) for member in members)
        rules = _figures(figures, n)
        if rules:
            headline = next((rule for rule in _FIRST if rule in rules), next(iter(rules)))
            groups[name] = {"headline": headline, "tasks": members, "rules": rules}
    return groups


def _responses(task: str, samples: Iterable[Mapping[str, Any]]) -> list[Response]:
    """Returns one response per item, with the marks of all filters. The first filter's text stands for the response."""
    found: dict[int, Response] = {}
    for sample in samples:
        marks = {
            f"{metric},{sample['filter']}": Mark(bool(sample[metric]), _answer(sample))
            for metric in sample["metrics"]
            if _is_binary(sample.get(metric))
        }
        place = sample["doc_id"]
        if place in found:
            marks = {**found[place].marks, **marks}
        prompt, text = _asked(sample), _said(sample)
        gold = gold_text(str(sample["target"])) if "target" in sample else None
        found[place] = Response(task, f"{task}/{place}", 0, prompt, text, None, True, marks, gold)
    return [found[place] for place in sorted(found)]


def _asked(sample: Mapping[str, Any]) -> str:
    arguments = sample["arguments"]
    first = next(iter(arguments.values())) if isinstance(arguments, Mapping) else arguments[0]
    return str(next(iter(first.values())) if isinstance(first, Mapping) else first[0])


def _said(sample: Mapping[str, Any]) -> str:
    """Returns the text of a generated response, and log-likelihoods of the choices otherwise."""
    first = sample["resps"][0][0]
    return first if isinstance(first, str) else json.dumps(sample["resps"], default=str)


def _answer(sample: Mapping[str, Any]) -> str | None:
    first = sample["filtered_resps"][0]
    return first if isinstance(first, str) else None


def _is_binary(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value in (0, 1)


def _figures(results: Mapping[str, Any], n: int) -> dict[str, Record]:
    """Returns each metric as a rule of `eval.json`: its value with the interval of its standard error."""
    rules: dict[str, Record] = {}
    for key, value in results.items():
        metric, _, which = key.partition(",")
        if not which or metric.endswith("_stderr") or not _is_number(value):
            continue
        error = results.get(f"{metric}_stderr,{which}")
        interval = _interval(float(value), float(str(error)) if _is_number(error) else None, n)
        rules[key] = {"accuracy": float(value), "correct": None, "n": n, "ci95": interval, "notes": {}}
    return rules


def _interval(value: float, error: float | None, n: int) -> tuple[float, float] | None:
    if error == 0:  # items that do not differ, which does not mean that others would not
        return wilson(value, n) if n and 0 <= value <= 1 else None
    return None if error is None else (value - Z_95 * error, value + Z_95 * error)


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _hash_of(samples: Iterable[Mapping[str, Any]], key: str) -> str:
    hashes = {sample["doc_id"]: str(sample[key]) for sample in samples}
    return hashlib.sha256("".join(hashes[place] for place in sorted(hashes)).encode()).hexdigest()
