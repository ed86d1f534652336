"""A commented recipe for a user's case, as text. It looks at no machine and asks nothing."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from infopo.errors import ConfigError
from infopo.losses.catalog import OBJECTIVES, UNPAIRED, check_objective, objective_name
from infopo.losses.declaration import REQUIRED
from infopo.shipped import shipped_recipe
from infopo.validation import not_a_choice
from infopo.yaml_tree import dump_tree

METHODS = ("full", "lora", "qlora")
"""What is trained: all weights, an adapter, or an adapter on weights of 4 bits."""

PARALLEL = ("none", "fsdp", "deepspeed")
"""How several accelerators share a model. With `none` each of them holds all of it."""

KINDS = {
    "paired": "a chosen and a rejected response per prompt",
    "unpaired": "a response and a label (good or bad) per row",
    "scores": "several responses with a score each",
    "lists": "several chosen and several rejected responses per prompt",
}
"""Kinds of preference data."""

KIND_OF_SHAPE = {
    "unpaired": "unpaired", "unpaired_messages": "unpaired", "alpaca_unpaired": "unpaired", "scored": "scores",
    "rated": "scores", "lists": "lists",
}  # fmt: skip
"""Shape of rows -> kind, for those that are not paired."""


@dataclass(frozen=True)
class Case:
    """What a recipe is written for.

    Attributes:
        model: Folder or hub name.
        data: File, folder, glob or hub name.
        method: One of `METHODS`.
        parallel: One of `PARALLEL`.
        kind: One of `KINDS`.
        objective: Name in the catalog.
        output_dir: The run directory.
        eval_data: Data to evaluate on, or None.
        eval_split: Split to evaluate on, or None.
        is_text: Whether prompts are plain text, and not conversations.
        rows: Number of rows, if it is known and small, or None.
        devices: Number of processes that train together.
        bf16: Whether the accelerator computes in bfloat16.

    Raises:
        ConfigError: Something of this does not exist or does not go together.
    """

    model: str
    data: str
    method: str = "full"
    parallel: str = "none"
    kind: str = "paired"
    objective: str = "infopo"
    output_dir: str = "runs/first"
    eval_data: str | None = None
    eval_split: str | None = None
    is_text: bool = True
    rows: int | None = None
    devices: int = 1
    bf16: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", objective_name(self.objective))
        problems = [
            f"--{name}: {not_a_choice(value, choices)}"
            for name, value, choices in (
                ("method", self.method, METHODS),
                ("parallel", self.parallel, PARALLEL),
                ("data-kind", self.kind, tuple(KINDS)),
            )
            if value not in choices
        ]
        problems += [f"--objective: {problem}" for problem in check_objective(self.objective, {})]
        if not problems and self.kind == "unpaired" and self.objective not in UNPAIRED:
            problems.append(
                f"--objective: {OBJECTIVES[self.objective].title} compares pairs, and the data are unpaired; expected "
                f"one of {', '.join(UNPAIRED)}"
            )
        if self.method == "qlora" and self.parallel == "fsdp":
            problems.append(
                "--parallel: FSDP does not cut up weights of 4 bits; use --parallel none or deepspeed, or --method lora"
            )
        problems += [f"--{name}: is empty" for name in ("model", "data") if not getattr(self, name).strip()]
        if problems:
            raise ConfigError(problems)


def recipe_for(case: Case, file_name: str) -> str:
    """Returns the recipe with its comments.

    Args:
        case: What it is for.
        file_name: Name of its file, for the commands in its first lines.
    """
    lines = [*_head(case, file_name), "", *_model(case), "", *_data(case), "", *_objective(case), ""]
    lines += [*_reference(case), "", *_train(case), "", f"output_dir: {_value(case.output_dir)}"]
    return "\n".join([*lines, ""])


def launcher(case: Case) -> str:
    """Returns what stands before `train` on the command line."""
    if case.parallel == "none" and case.devices < 2:
        return "infopo"
    return f"torchrun --nproc-per-node {max(case.devices, 2)} -m infopo"


def batch_of(case: Case) -> tuple[int, int]:
    """Returns examples per device and accumulated passes, so that a step has 64 examples, or fewer of little data."""
    wanted = 64
    while case.rows is not None and wanted > 8 and case.rows < 20 * wanted:
        wanted //= 2
    per_device = min(2 if case.method == "qlora" else 4, max(1, wanted // case.devices))
    return per_device, max(1, wanted // (per_device * case.devices))


def _head(case: Case, file_name: str) -> Iterator[str]:
    what = {
        "full": "all weights",
        "lora": "a LoRA adapter",
        "qlora": "an adapter on weights of 4 bits (QLoRA)",
    }
    yield f"# {OBJECTIVES[case.objective].title} on {what[case.method]}. The data have {KINDS[case.kind]}."
    yield f"#   infopo check {file_name}{without_sharding(case)}"
    yield f"#   {launcher(case)} train {file_name}"
    if case.method != "full":
        extra = " bitsandbytes" if case.method == "qlora" else ""
        yield f"# It needs: pip install 'infopo[peft]'{extra}"
    if case.parallel == "deepspeed":
        yield "# It needs: pip install deepspeed"
    yield "# Every key: infopo docs recipes. `key=value` behind the command overrides one."


def without_sharding(case: Case) -> str:
    """Returns overrides with which one process checks a recipe for several."""
    return {"fsdp": " train.fsdp= train.fsdp_config=", "deepspeed": " train.deepspeed="}.get(
        case.parallel, ""
    )


def _model(case: Case) -> Iterator[str]:
    yield "model:"
    yield f"  name_or_path: {_value(case.model)}"
    if case.method == "full":
        yield "  dtype: auto                     # float32: bfloat16 would round small updates away"
        return
    if case.method == "qlora":
        yield "  quantization: 4bit              # of the frozen weights; the adapter is trained in float32"
    dtype = "bfloat16" if case.bf16 else "auto"
    yield f"  dtype: {dtype:<25}# of the frozen weights; the adapter is trained in float32"
    yield "  adapter:"
    yield "    r: 16                         # rank"
    yield "    lora_alpha: 32                # the update is multiplied by lora_alpha / r"
    yield "    target_modules: all-linear"


def _data(case: Case) -> Iterator[str]:
    yield "data:"
    yield f"  path: {_value(case.data)}"
    if case.eval_data is not None:
        yield f"  eval_path: {_value(case.eval_data)}"
    if case.eval_split is not None:
        yield f"  eval_split: {_value(case.eval_split)}"
    if case.eval_data is None and case.eval_split is None:
        yield "  # eval_path: held_out.jsonl     # name held-out data, and switch train.eval_strategy on"
    yield "  max_length: 1024                # tokens of prompt + response; `infopo check` shows how long rows are"
    if case.is_text:
        yield "  as_chat: false                  # true applies the chat template to plain text, as a chat model needs"
    if case.kind == "scores":
        yield "  score_rule: best-worst          # or best-rest (the best against all others), or threshold"
    yield "  on_bad_row: raise               # skip counts rows that cannot be used, and names them"


def _objective(case: Case) -> Iterator[str]:
    row = OBJECTIVES[case.objective]
    yield "objective:"
    yield f"  name: {case.objective:<26}# {row.formula}"
    for name, parameter in row.parameters.items():
        if parameter.default is not REQUIRED:
            yield f"  {name + ': ' + _value(parameter.default):<32}# {parameter.help}"


def _reference(case: Case) -> Iterator[str]:
    yield "reference:"
    if OBJECTIVES[case.objective].reference:
        yield "  source: auto                    # the policy as it is now: log-probs are computed once, and kept"
    else:
        yield "  source: auto                    # the loss needs none; metrics of evaluation do"
    yield "  sides: auto                     # both also gives rewards/chosen and rewards/margins in training"


def _train(case: Case) -> Iterator[str]:
    per_device, accumulated = batch_of(case)
    rate = "1.0e-6" if case.method == "full" else "1.0e-5"
    yield "train:"
    yield f"  learning_rate: {rate:<17}# peak"
    yield "  lr_scheduler_type: cosine"
    yield "  warmup_steps: 0.1               # share of all steps"
    yield "  num_train_epochs: 1"
    yield f"  per_device_train_batch_size: {per_device}"
    together = f" x {case.devices} processes" if case.devices > 1 else ""
    yield (
        f"  gradient_accumulation_steps: {accumulated:<3}# {per_device} x {accumulated}{together} examples a step"
    )
    if case.parallel == "fsdp":
        yield "  fsdp: true                      # weights, gradients and Adam's moments are shared out"
        yield "  fsdp_config:"
        yield "    version: 2"
        yield "    cpu_ram_efficient_loading: true   # only the first process loads the weights"
        yield "    reshard_after_forward: true   # the least memory"
        yield "    auto_wrap_policy: TRANSFORMER_BASED_WRAP"
        yield "    state_dict_type: FULL_STATE_DICT"
    elif case.parallel == "deepspeed":
        settings = json.loads(shipped_recipe("deepspeed/zero2.json").text)
        yield f"  deepspeed: {json.dumps(settings)}   # ZeRO-2: gradients and Adam's moments are shared out"
    yield "  logging_steps: 10"
    if case.eval_data is None and case.eval_split is None:
        yield "  eval_strategy: no               # epoch or steps, if there is data to evaluate on"
    else:
        yield "  eval_strategy: epoch"
    yield "  save_strategy: epoch"
    yield "  save_total_limit: 2"
    yield "  seed: 0"


def _value(value: object) -> str:
    return dump_tree({"v": value}).removeprefix("v:").strip()
