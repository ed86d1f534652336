"""The settings of `infopo rounds`: what is sampled, how it becomes pairs, and when rounds end. Imports no torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge

from infopo.catalog import PAIRING_RULES
from infopo.settings import Positive
from infopo.validation import OneOf, Problem, Settings, Text, setting

REFERENCES = ("previous", "first")
"""Which policy is the reference of a round: the one it begins with, or that of the first round."""


@dataclass
class RoundsSettings(Settings):
    """Rounds of sampling, marking, training and evaluation, each on samples of the policy of the round before."""

    prompts: Text = setting(
        text="A file or hub name with problems of the verifier's task, or rows with a prompt. `lab` for the lab.",
        see="pairs.md#verifiers",
    )
    verifier: Text = setting(
        text="What marks samples: a task, `my_module:my_reward`, `reward:MODEL`, `judge:URL` or "
        "`judge:my_module:my_judge`.",
        see="pairs.md#verifiers",
    )
    number: Positive = setting(3, "Largest number of rounds.")
    prompts_per_round: Positive | None = setting(
        None, "Number of prompts of a round, of which no other round has any. null takes all in each round."
    )
    limit: Positive | None = setting(
        None, "Number of prompts to use, the first of the data. null takes all (of the lab 1000)."
    )
    reference: Annotated[str, OneOf(REFERENCES)] = setting(
        REFERENCES[0],
        "Policy that log π_ref is of: `previous` is the one that the round begins with, `first` that of round 1.",
        see="rounds.md#which-reference",
    )
    stop_after: Positive | None = setting(
        1,
        "Number of rounds in a row without a better result on the first of `evaluate.tasks`, after which no other is "
        "begun. null goes on to the last.",
        see="rounds.md#when-rounds-end",
    )
    num_generations: Annotated[int, Ge(2)] = setting(8, "Samples per prompt.")
    temperature: float = setting(1.0, "Divisor of the logits, above 0.")
    top_p: float = setting(1.0, "Mass of the nucleus that tokens are drawn from.")
    max_new_tokens: Positive | None = setting(
        None, "Largest number of tokens of a response. null is that of the task, else 512."
    )
    prompting: Annotated[str, OneOf(("chat", "plain"))] | None = setting(
        None, "`chat` or `plain`. null is chat if the tokenizer has a chat template."
    )
    num_fewshot: Annotated[int, Ge(0)] = setting(0, "Number of worked examples before each prompt.")
    batch_size: Positive = setting(32, "Number of sequences that are drawn together.")
    seed: Annotated[int, Ge(0)] = setting(
        0, "Seed of the samples and of the rule `random` in round 1, and one more in each later round."
    )
    rule: Annotated[str, OneOf(PAIRING_RULES)] = setting(
        PAIRING_RULES[0], "How marked samples become pairs.", see="pairs.md#rules"
    )
    pairs_per_prompt: Positive = setting(1, "Largest number of pairs of a prompt.")
    threshold: float | None = setting(
        None, "Score from which a response is right, for verifiers that give scores."
    )
    min_pass_rate: float | None = setting(None, "Least share of right samples of a prompt that is used.")
    max_pass_rate: float | None = setting(None, "Largest one.")
    reject_unfinished: bool = setting(False, "Whether responses that were cut off may be rejected.")
    judge_model: Text | None = setting(
        None, "Name of the model behind `judge:URL`. null is the only one that it serves."
    )
    yes: bool = setting(False, "Whether `judge:URL` is asked as often as it takes.")
    allow_code_execution: bool = setting(
        False, "Whether code that the model wrote may run, as verifiers of code need."
    )
    isolation: Annotated[str, OneOf(("namespaces", "uid", "none"))] = setting(
        "uid", "The weakest isolation that such code may run at: `namespaces`, `uid` or `none`."
    )

    @classmethod
    def contradictions(cls, given: Any) -> Iterator[Problem]:
        numbers = {
            name: value
            for name in ("temperature", "top_p", "seed", "number")
            if isinstance(value := getattr(given, name), int | float)
        }
        # The comparisons are written so that NaN fails, too.
        if not 0 < numbers.get("temperature", 1) < math.inf:
            yield (
                "temperature",
                f"expected a finite number above 0 (greedy decoding has one response), got {given.temperature}",
            )
        if not 0 < numbers.get("top_p", 1) <= 1:
            yield "top_p", f"expected a number in (0, 1], got {given.top_p}"
        if numbers.get("seed", 0) + numbers.get("number", 1) > 2**32:
            yield "seed", f"expected a number below 2**32 with one more for each round, got {given.seed}"
        if given.judge_model is not None and not str(given.verifier).startswith(
            ("judge:http://", "judge:https://")
        ):
            yield "judge_model", f"does not apply to the verifier {given.verifier}, only to judge:URL"
        if given.rule == "lists" and given.pairs_per_prompt != 1:
            yield "pairs_per_prompt", "does not apply to the rule lists, which takes all in one row"
        number, slice_, limit = given.number, given.prompts_per_round, given.limit
        if all(isinstance(each, int) for each in (number, slice_, limit)) and number * slice_ > limit:
            yield (
                "limit",
                f"{number} rounds of {slice_} prompts take {number * slice_}, but {limit} are used; lower "
                "rounds.number or rounds.prompts_per_round",
            )
