"""The settings of each subject, with their defaults, limits and meanings. Imports no torch.

Recipes have a section per subject (`config.py`), and `InfoPOConfig` inherits `RowSettings` and `TrainSettings`. A new
setting is one edit here: the recipe and `InfoPOConfig` accept and judge it, and `make docs` writes its row of
`docs/recipes.md`. Only a setting of another subject that `InfoPOConfig` has too, under a longer name (`argument`), is
declared there once more, by that name alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from annotated_types import Ge, Lt

from infopo.catalog import (
    DATA_SHAPES,
    LOGPS_PATHS,
    ON_BAD_ROW,
    ON_TOO_LONG,
    ON_VERDICT,
    REFERENCE_MODES,
    REFERENCE_SIDES,
    SCORE_RULES,
    suggestion,
)
from infopo.evidence import KL_BUDGET
from infopo.losses.catalog import complete_parameters, objective_name
from infopo.validation import OneOf, Problem, Settings, Text, setting
from infopo.vocabulary import check_columns

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types that model weights are loaded in."""

QUANTIZATIONS = ("4bit", "8bit")
"""Quantizations by bitsandbytes of the frozen weights beneath an adapter. 4bit is NF4 with double quantization."""

Positive = Annotated[int, Ge(1)]
Sources = Text | list[str] | dict[str, float]


@dataclass
class AdapterSettings(Settings):
    """A LoRA adapter to train in place of the whole model (needs the `peft` extra)."""

    r: Positive = setting(16, "Rank of the update.")
    lora_alpha: Positive = setting(32, "Scale: the update is multiplied by `lora_alpha` / `r`.")
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = setting(
        0.0,
        "Probability of dropping an input of the adapter in training, in [0, 1). `train.disable_dropout` leaves it "
        "alone. A new adapter adds 0, whatever it drops.",
    )
    target_modules: Text | list[str] | None = setting(
        None,
        "Modules to adapt: a list of names, a regular expression, `all-linear`, or null for peft's choice.",
    )


@dataclass
class ModelSettings(Settings):
    """The policy that training starts from."""

    name_or_path: Text = setting(
        text="Folder of a saved model, a name on the hub, or `lab:policy`, the model that ships with the package."
    )
    dtype: Annotated[str, OneOf(DTYPES)] = setting(
        "auto",
        "Type of the weights: `float32`, `bfloat16`, `float16`, or `auto`, which is `float32` if all weights are "
        "trained, and the checkpoint's own beneath an adapter.",
    )
    attn_implementation: Text | None = setting(
        None,
        "Attention kernel by transformers' name. If it is null, transformers chooses `sdpa`. With `sdpa`, `eager` and "
        "flash attention prompts are shared, by the fastest kernel that works here; with others rows are padded.",
    )
    trust_remote_code: bool = setting(
        False, "Whether code that comes with the model may run.", argument="trust_remote_code"
    )
    revision: Text | None = setting(None, "Branch, tag or commit of a model on the hub.")
    quantization: Annotated[str, OneOf(QUANTIZATIONS)] | None = setting(
        None,
        "`4bit` or `8bit` for the frozen weights beneath an adapter (QLoRA). This needs `bitsandbytes` and an "
        "accelerator.",
    )
    adapter: AdapterSettings | None = setting(
        None, "LoRA adapter to train in place of all weights. `{}` takes the defaults below."
    )

    @classmethod
    def contradictions(cls, given: Any) -> Iterator[Problem]:
        if given.quantization is not None and given.adapter is None:
            yield "quantization", "quantized weights cannot be trained; add model.adapter, or leave it out"


@dataclass
class SourceSettings(Settings):
    """Where rows come from. A caller from Python opens the data itself."""

    path: Sources = setting(
        text="A `.jsonl`, `.json` or `.csv` file (each also `.gz`, `.zst`), a `.parquet` or `.arrow` file, a glob or "
        "folder of such, a folder written by `Dataset.save_to_disk`, the name of a dataset on the hub, or "
        "`lab:verified`, `lab:graded`. A list of these takes all their rows, and a mapping of them to weights mixes "
        "them.",
        see="data.md",
    )
    split: Text = setting("train", "Split to train on.")
    shape: Annotated[str, OneOf(tuple(DATA_SHAPES))] | None = setting(
        None, "Shape of the rows. If it is null, the shape is recognised from the columns.", see="data.md"
    )
    streaming: bool = setting(
        False,
        "Whether rows are read when they are needed, and not all before training. This needs `train.max_steps`.",
    )
    eval_path: Sources | None = setting(
        None, "Data to evaluate on. null with `eval_split` takes that split of `path`."
    )
    eval_split: Text | None = setting(
        None, "Split to evaluate on. null with `eval_path` takes the split named by `split`."
    )
    num_proc: Positive | None = setting(
        None,
        "Number of processes that encode rows. If it is null, this one does.",
        argument="dataset_num_proc",
    )
    cache: Text | None = setting(
        "auto",
        "Folder in which encoded rows are kept for later runs, by content. `auto` is `$INFOPO_CACHE/examples`, else "
        "`~/.cache/infopo/examples`. `off` or null keeps none.",
        argument="dataset_cache",
        expects="a folder, auto or off",
        see="data.md#rows-are-encoded-once",
    )
    limit: Positive | None = setting(None, "Number of rows to read, from the start. null reads all.")

    @property
    def has_eval(self) -> bool:
        """Whether there is data to evaluate on."""
        return self.eval_path is not None or self.eval_split is not None

    @classmethod
    def contradictions(cls, given: Any) -> Iterator[Problem]:
        for name in ("path", "eval_path"):
            sources = getattr(given, name)
            if sources in ([], {}):
                yield name, "is empty; expected at least one source"
            for source, weight in sources.items() if isinstance(sources, dict) else ():
                if isinstance(weight, int | float) and not 0 < weight < math.inf:
                    yield name, f"{source}: expected a weight > 0, got {weight}"


@dataclass
class RowSettings(Settings):
    """How rows become tokens."""

    columns: dict[str, str | None] | None = setting(
        None,
        "Columns of the data by the names that shapes know: `{prompt: question, chosen: good}`. A name mapped to null "
        "is left out.",
        see="data.md#columns-of-other-names",
    )
    score_rule: Annotated[str, OneOf(SCORE_RULES)] = setting(
        SCORE_RULES[0],
        "How responses with scores are split: `best-worst` (the best against the worst), `best-rest` (the best "
        "against all others), or `threshold`.",
    )
    score_threshold: float | None = setting(
        None, "Least score of a chosen response, for `score_rule: threshold`."
    )
    max_length: Annotated[int, Ge(2)] | None = setting(
        1024,
        "Largest number of tokens of prompt and response together, beyond which the response's end is cut off. null "
        "cuts nothing.",
    )
    max_prompt_length: Positive | None = setting(
        None,
        "Largest number of tokens of the prompt, whose beginning is cut off. It is below `max_length`, which is the "
        "only limit if this is null.",
    )
    on_too_long: Annotated[str, OneOf(ON_TOO_LONG)] = setting(
        "cut",
        "What to do with a row that has more tokens than these: `cut` it, or `drop` and count it.",
        see="data.md#truncation",
    )
    chat_template_kwargs: dict[str, Any] | None = setting(
        None,
        "Variables of the chat template for all rows, e.g. `{enable_thinking: false}`. A row's own take precedence. "
        "`{strftime_now: 2026-11-26}` is today for templates that write the date.",
        see="data.md#chat-templates",
    )
    as_chat: bool = setting(
        False,
        "Whether plain text is taken as a conversation, to which the chat template is applied: the prompt as the "
        "user's turn, a response as the assistant's.",
    )
    on_bad_row: Annotated[str, OneOf(ON_BAD_ROW)] = setting(
        "raise",
        "What to do with a row that cannot be used: `raise` stops at the first, `skip` counts it and continues.",
    )

    @classmethod
    def contradictions(cls, given: Any) -> Iterator[Problem]:
        longest, prompt = given.max_length, given.max_prompt_length
        if isinstance(longest, int) and isinstance(prompt, int) and prompt >= longest:
            yield (
                "max_prompt_length",
                f"{prompt} leaves no room for a response within max_length ({longest} tokens)",
            )
        if isinstance(given.columns, dict) and all(isinstance(c, str | None) for c in given.columns.values()):
            for problem in check_columns(given.columns):
                target, _, sentence = problem.partition(": ")
                yield f"columns.{target}", sentence
        if (given.score_rule == "threshold") != (given.score_threshold is not None):
            yield (
                "score_threshold",
                "goes with score_rule: threshold, and the rule needs it; set both or neither",
            )


@dataclass
class DataSettings(RowSettings, SourceSettings):
    """The preference data and how they are turned into tokens."""

    @classmethod
    def contradictions(cls, given: Any) -> Iterator[Problem]:
        yield from RowSettings.contradictions(given)
        yield from SourceSettings.contradictions(given)


@dataclass(frozen=True)
class ObjectiveSettings:
    """The loss, or a term of it. In YAML its parameters are beside the name: `{name: dpo, beta: 0.1}`, or only `dpo`.

    Raises:
        ConfigError: The catalog has no such objective or parameter, or refuses a value.
    """

    name: str = "infopo"
    """Name in the catalog of objectives."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Values by parameter name. The catalog's defaults are filled in, so that a written recipe is complete."""
    weight: float = 1.0
    """Weight in the sum, where there are several."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", objective_name(self.name))
        object.__setattr__(self, "parameters", complete_parameters(self.name, self.parameters))


@dataclass
class ReferenceSettings(Settings):
    """The source of log π_ref. In YAML `reference: live` means `reference: {source: live}`."""

    source: Text = setting(
        "auto",
        "Where log π_ref comes from: `live` (a second model beside the policy), `precompute` (computed once and "
        "stored), `adapter-off` (the policy without its adapter), `auto` (`precompute` if rows can be enumerated, and "
        "`live` if they stream), or the path of a model.",
        argument="reference",
        see="reference.md",
    )
    store: Text | None = setting(
        "auto",
        "Folder in which precomputed values are kept for all runs. `auto` is `$INFOPO_CACHE/reference`, else "
        "`~/.cache/infopo/reference`, or memory if that cannot be written to. `off` or null is memory only.",
        argument="reference_store",
        expects="a folder, auto or off",
    )
    sides: Annotated[str, OneOf(REFERENCE_SIDES)] = setting(
        "auto",
        "`needed` computes the reference of the responses for which the loss needs it, `both` of all, so that metrics "
        "of both sides exist, and `auto` is needed in training and both in evaluation.",
        argument="reference_sides",
        see="metrics.md",
    )

    samples: Text | None = setting(
        None,
        "A file of samples (`samples.jsonl` of `infopo pairs`), whose log-probs are taken for responses that the "
        "reference itself has drawn, if a few that are computed agree.",
        argument="reference_samples",
        see="reference.md#log-probs-of-samples",
    )

    @property
    def is_path(self) -> bool:
        """Whether `source` names a model, not a mode."""
        return self.source not in REFERENCE_MODES

    @classmethod
    def contradictions(cls, given: Any) -> Iterator[Problem]:
        source, modes = given.source, ", ".join(REFERENCE_MODES)
        is_name = isinstance(source, str) and source not in REFERENCE_MODES
        if is_name and (meant := suggestion(source, REFERENCE_MODES)):
            yield (
                "source",
                f"{source!r} is none of {modes}{meant}; write ./{source} for a folder of that name",
            )


@dataclass
class DiagnosticsSettings(Settings):
    """What is measured of the policy during training, on examples and samples that stay the same."""

    probe_size: Annotated[int, Ge(0)] = setting(
        64,
        "Examples of the probe set, on which likelihood and drift are measured. They are held-out ones if there are "
        "any, else training examples. 0 switches it off, and what depends on it.",
        see="diagnostics.md",
    )
    probe_steps: Positive | None = setting(
        None,
        "Optimizer steps between two measurements on the probe set. null takes the fewest for which they cost at most "
        "1.5 % of training's time. The start and the last step are always measured.",
    )
    anchor_size: Annotated[int, Ge(0)] = setting(
        64,
        "Responses that are sampled once from the starting policy, to measure KL, entropy and length. 0 switches this "
        "off, and generations.",
    )
    anchor_tokens: Positive = setting(128, "Largest number of tokens of a sampled response.")
    gradient_steps: Positive | None = setting(
        None,
        "Optimizer steps between two measurements of the gradients of chosen and rejected responses. null takes the "
        "fewest for which they cost at most 1.5 % of training's time.",
    )
    gradient_size: Annotated[int, Ge(0)] = setting(
        16, "Examples of the probe set whose gradients are measured. 0 switches it off."
    )
    generation_steps: Positive | None = setting(
        None,
        "Optimizer steps between two samplings of responses to the prompts of the anchor set, which are kept in "
        "`generations.jsonl`. null samples at the start and after the last step.",
    )


@dataclass
class TrainSettings(DiagnosticsSettings):
    """What a step of training does, beyond the arguments of transformers."""

    max_tokens_per_forward: Positive | None = setting(
        None,
        "Largest number of tokens that go through the model at once. A larger device batch runs in pieces, with the "
        "same loss and gradient. null is 2048 on a CPU, where pieces save memory and cost no time, and no limit "
        "elsewhere.",
    )
    precompute_ref_batch_size: Positive | None = setting(
        None,
        "Number of examples per forward pass of the reference. null takes `per_device_train_batch_size`.",
    )
    logps_path: Annotated[str, OneOf(LOGPS_PATHS)] = setting(
        "auto",
        "`auto` encodes each prompt once for all its responses, without padding, if the model's attention can do so "
        "(`infopo train` prints which way is taken). `naive` runs one padded row per response and computes the logits "
        "of every position.",
    )
    disable_dropout: bool = setting(
        True,
        "Whether dropout is set to 0 in policy and reference. The dropout of a new adapter is kept, because it was "
        "asked for, and changes nothing before the first update.",
    )
    router_aux_loss_coef: float | None = setting(
        None,
        "Factor of the load-balancing loss of mixture-of-experts models, which is added to the loss and logged as "
        "`aux_loss`. null is the value of the model's configuration, and 0 leaves it out.",
    )
    pad_token: Text | None = setting(
        None, "Token to pad with. null takes the tokenizer's own, or else its end of sequence."
    )
    on_verdict: Annotated[str, OneOf(ON_VERDICT)] = setting(
        ON_VERDICT[0],
        "What to do when a verdict is reached, such as instability or an unfrozen reference: `warn` says so, `stop` "
        "also saves a checkpoint and ends training.",
        see="verdicts.md",
    )
    kl_budget: Annotated[float, Ge(0)] = setting(
        KL_BUDGET,
        "Largest `kl/forward` (nats per response) that is no drift beyond the budget.",
        see="verdicts.md",
    )


@dataclass
class EvaluateSettings(Settings):
    """Tasks that the policy is asked at each evaluation, beside the loss on the evaluation data."""

    tasks: Text | list[str] | None = setting(
        None,
        "Names of tasks. Each adds the metric `eval_tasks/NAME`, by which `load_best_model_at_end` can choose. null is "
        "none.",
        see="evaluation.md#during-training",
    )
    data: dict[str, str] | None = setting(
        None, "A file or hub name by task. Tasks without one use their own source."
    )
    limit: Positive | None = setting(
        None, "Number of items of each task, the first of its data. null takes all."
    )
    num_samples: Positive = setting(1, "Responses per item.")
    temperature: Annotated[float, Ge(0)] | None = setting(
        None, "Divisor of the logits. null is greedy decoding for one sample per item, and 1 for several."
    )
    max_new_tokens: Positive | None = setting(
        None, "Largest number of tokens of a response. null is that of the task."
    )
    prompting: Annotated[str, OneOf(("chat", "plain"))] | None = setting(
        None, "`chat` or `plain`. null is chat if the tokenizer has a chat template."
    )
    num_fewshot: Annotated[int, Ge(0)] = setting(0, "Number of worked examples before each problem.")
    batch_size: Positive = setting(32, "Number of sequences that are drawn together.")
    seed: Annotated[int, Ge(0)] = setting(0, "Seed of the samples, which is the same at each evaluation.")
    allow_code_execution: bool = setting(
        False, "Whether code that the model wrote may run, as code tasks need."
    )
    isolation: Annotated[str, OneOf(("namespaces", "uid", "none"))] = setting(
        "uid",
        "The weakest isolation that such code may run at: `namespaces`, `uid` or `none` (`infopo docs evaluation`).",
    )

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [self.tasks] if isinstance(self.tasks, str) else list(self.tasks or [])


def arguments_of(section: type[Settings]) -> dict[str, str]:
    """Returns the settings of a section that `InfoPOConfig` has too, with their names there.

    Example:
        >>> arguments_of(ReferenceSettings)
        {'source': 'reference', 'store': 'reference_store', 'sides': 'reference_sides', 'samples': 'reference_samples'}
    """
    inherited = {f.name: f.name for shared in (RowSettings, TrainSettings) for f in fields(shared)}
    names = {f.name: inherited.get(f.name) or f.metadata["help"].argument for f in fields(section)}
    return {name: argument for name, argument in names.items() if argument}
