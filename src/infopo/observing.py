"""When training is measured, and where the numbers go: a callback around `measuring`, `probes` and `diagnostics`.

Measuring changes nothing of training. At its default intervals it costs less than 3 % of training's time, as
`benchmarks/diagnostics.py` measures it.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from infopo import probes, ranks
from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.data.streaming import ExampleStream
from infopo.diagnostics import distinct_n, forward_kl, mean_and_half_width, without_nan
from infopo.errors import InfoPOError, ModelError
from infopo.generate import sample_ids
from infopo.intervals import Z_95
from infopo.measuring import Instruments
from infopo.models import first_lines
from infopo.output import get_logger
from infopo.probes import AnchorSet, ProbeSet
from infopo.records import PreferenceExample, Role
from infopo.runs import FORECAST, GENERATIONS, Dispensable, JsonLines

logger = get_logger(__name__)

BUDGET = 0.015
"""Share of training's time that measuring likelihood may cost, and the same for gradients."""

STEP_COST, LIKELIHOOD_COST, GRADIENT_COST = 3.0, 1.4, 45.0
"""Cost of a pair in a step of training, in a measurement of likelihood, and in one of gradients.

The unit is a pair's forward pass, of which a backward pass takes two. Gradients take ten units of each pair in the set,
and ten of it alone, which fills a processor badly: `benchmarks/diagnostics.py` measured the last two.
"""

SHOWN_GENERATIONS = 16
"""Responses that are kept of each sampling."""

RESPONSES_AT_A_TIME = 64
"""Responses that are sampled at a time."""

GUARDED = 4
"""Examples on which a live reference is computed again, to see whether it moves."""

SHARDED = "the weights are sharded, and sampling needs all of them on each rank"


@dataclass(frozen=True)
class Subject:
    """What is observed.

    Attributes:
        instruments: Measures the policy.
        examples: The held-out examples of the run, else its training examples.
        source: Which of the two they are, in words.
        starts_as_reference: Whether policy and reference are the same function before the first update, or there is no
            reference.
        without_samples: Why the policy cannot be sampled from in this run, or None.
        without_gradients: Why gradients cannot be measured in this run, or None.
    """

    instruments: Instruments
    examples: ExampleDataset | ExampleStream
    source: str
    starts_as_reference: bool
    without_samples: str | None = None
    without_gradients: str | None = None


def gradient_obstacle(model: nn.Module, *, has_deepspeed: bool) -> str | None:
    """Returns why the gradients of a policy cannot be measured beside its training, or None if they can.

    Args:
        model: The policy.
        has_deepspeed: Whether DeepSpeed trains it.
    """
    if has_deepspeed:
        return "DeepSpeed keeps the gradients to itself"
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in model.parameters()):
        return "the optimizer updates each weight within the backward pass"
    return None


class Observer(TrainerCallback):
    """Measures the policy before the first update, at intervals, and after the last step.

    Args:
        args: Settings.
        subject: Returns what is observed, once the policy is prepared for training.
        log: Writes a record of metrics.
        checkpoint: Folder that the run is resumed from, or None.
    """

    def __init__(
        self,
        args: InfoPOConfig,
        subject: Callable[[], Subject],
        log: Callable[[dict[str, float]], None],
        checkpoint: Path | None,
    ) -> None:
        self.args = args
        self._subject_of = subject
        self._log = log
        self._checkpoint = checkpoint
        self._pending: dict[str, float] = {}
        self._files = Dispensable(logger.warning, "what is measured is")
        run_dir = Path(args.output_dir)
        self._generations = JsonLines(run_dir / GENERATIONS)
        self._forecast = JsonLines(run_dir / FORECAST)

    def take(self) -> dict[str, float]:
        """Returns what was measured since the last record, and forgets it."""
        pending, self._pending = self._pending, {}
        return pending

    # ---- transformers calls these --------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._probe: ProbeSet | None = None
        self._anchors: AnchorSet | None = None
        if not self.args.probe_size:
            return
        self._subject = self._subject_of()
        self._instruments = self._subject.instruments
        self._is_main = state.is_world_process_zero
        if self._is_main:
            for lines in (self._generations, self._forecast):
                step = state.global_step if self._checkpoint else -1
                self._files.write(partial(lines.truncate_after, step))
        kept = probes.read(self._checkpoint) if self._checkpoint else None
        if kept is not None:
            self._probe, self._anchors = kept
        else:
            self._start(state.global_step)
        if self._is_main and (self._probe or self._anchors):
            run_dir = Path(self.args.output_dir)
            self._files.write(partial(probes.write, run_dir, self._probe, self._anchors))
        if self._is_main and self.args.gradient_size and self._subject.without_gradients:
            logger.warning("gradients are not measured: %s", self._subject.without_gradients)
        self._guard = self._guarded()
        self._set_intervals(state)
        if state.global_step == 0:
            self._pending |= self._measure(0, likelihood=True, gradients=True)
            if self._anchors is not None:
                self._pending |= self._about(self._anchors.responses, self._anchors.finished)
                self._write(0, self._anchors.responses, self._anchors.finished)
            self._log(self.take())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._probe is None:
            return
        step = state.global_step
        is_last = step >= state.max_steps or control.should_training_stop
        due = [is_last or step % every == 0 for every in (self.probe_steps, self.gradient_steps)]
        self._pending |= self._measure(step, likelihood=due[0], gradients=due[1])
        if is_last or (self.args.generation_steps and step % self.args.generation_steps == 0):
            self._pending |= self._sample(step)
        if self._pending and not control.should_log:
            self._log(self.take())

    # ---- the start -----------------------------------------------------------------------------------------------

    def _start(self, step: int) -> None:
        """Chooses the probe set, samples the anchor set, and measures both as the policy is now."""
        subject, args = self._subject, self.args
        # A stream gives each rank its own share.
        examples = ranks.from_first(
            partial(probes.choose, subject.examples, args.probe_size, args.seed), args
        )
        if not examples:
            return
        if step:
            logger.warning(
                "the checkpoint has no probe set: changes of likelihood are counted from step %d on", step
            )
        start, _ = self._instruments.log_probs(examples)
        self._probe = ProbeSet(examples, subject.source, start, self._reference(examples, start, step), step)
        reason = subject.without_samples
        if args.anchor_size and not step and reason is None:
            try:
                self._anchors = self._sampled_anchors(examples[: args.anchor_size])
            except InfoPOError as error:
                reason = str(error)
        if args.anchor_size and reason is not None and self._is_main:
            logger.warning("no responses are sampled, so KL and length are not measured: %s", reason)

    def _reference(self, examples: Sequence[PreferenceExample], start: Any, step: int) -> Any:
        """Returns log π_ref of every response (nats), NaN where training does not know it either."""
        if self._subject.starts_as_reference and not step:
            return start
        if (live := self._instruments.live_reference(examples)) is not None:
            return live
        stored = [
            value
            for example in examples
            for value in (example.reference or [math.nan] * len(example.response_ids))
        ]
        return np.array(stored, dtype=np.float64)

    def _sampled_anchors(self, examples: Sequence[PreferenceExample]) -> AnchorSet | None:
        prompts = [list(example.prompt_ids) for example in examples]
        drawn = self._drawn(prompts, step=0)
        kept = [i for i, (ids, _) in enumerate(drawn) if ids]
        if not kept:
            return None
        anchors = AnchorSet(
            [prompts[i] for i in kept],
            [drawn[i][0] for i in kept],
            [drawn[i][1] for i in kept],
            [examples[i].row_id for i in kept],
        )
        start, _ = self._instruments.log_probs(anchors.examples)
        return replace(anchors, start=start.tolist())

    def _drawn(self, prompts: Sequence[Sequence[int]], step: int) -> list[tuple[list[int], bool]]:
        """Samples a response to each prompt on the first rank, for all of them.

        Raises:
            ModelError: The model cannot generate, as some that can be trained.
        """
        tools = self._instruments

        def draw() -> list[tuple[list[int], bool]]:
            try:
                with tools.context():
                    return sample_ids(
                        tools.model,
                        tools.tokenizer,
                        prompts,
                        max_new_tokens=self.args.anchor_tokens,
                        batch_size=RESPONSES_AT_A_TIME,
                        seed=(self.args.seed + step) % 2**32,
                    )
            except (
                AttributeError,
                NotImplementedError,
                RuntimeError,
                TypeError,
                ValueError,
                IndexError,
            ) as error:
                raise ModelError(first_lines(error)) from error

        return ranks.from_first(draw, self.args)

    def _guarded(self) -> Any:
        """Returns what the live reference says of a few examples now, or None without one of its own."""
        if self._probe is None:
            return None
        return self._instruments.live_reference(self._probe.examples[:GUARDED])

    def _set_intervals(self, state: TrainerState) -> None:
        """Sets how often likelihood and gradients are measured, in optimizer steps, by what they cost.

        A response of the anchor set costs half of a pair.
        """
        step = STEP_COST * self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        anchors = len(self._anchors.responses) if self._anchors else 0
        likelihood = (len(self._probe.examples) if self._probe else 0) + anchors / 2
        likelihood *= LIKELIHOOD_COST
        gradients = GRADIENT_COST * self.args.gradient_size
        logging_steps = max(1, int(state.logging_steps or 1))
        self.probe_steps = self.args.probe_steps or _interval(likelihood / step, logging_steps)
        self.gradient_steps = self.args.gradient_steps or _interval(gradients / step, logging_steps)

    # ---- measurements --------------------------------------------------------------------------------------------

    def _measure(self, step: int, *, likelihood: bool, gradients: bool) -> dict[str, float]:
        if self._probe is None:
            return {}
        found: dict[str, float] = {}
        if likelihood:
            found |= self._likelihood(self._probe) | self._on_anchors() | _memory(self._instruments.device)
        if gradients and self.args.gradient_size and self._subject.without_gradients is None:
            found |= self._gradients(self._probe.examples[: self.args.gradient_size], step)
        return found

    def _likelihood(self, probe: ProbeSet) -> dict[str, float]:
        now, spread = self._instruments.log_probs(probe.examples)
        entropy, log_p_max = spread.means()
        values = probe.values(now)
        found = {"probe/n": float(len(probe.examples)), **values.metrics()}
        found |= {"probe/entropy": entropy, "probe/p_max": log_p_max}
        rejected = values.rejected
        if len(rejected):
            found["gradients/log_inverse_policy"] = float(-now[rejected].mean())
            found["gradients/log_inverse_reference"] = float(-values.reference[rejected].mean())
        if self._guard is not None:
            moved = self._guarded() - self._guard
            found["reference/moved"] = float(np.nanmax(np.abs(moved))) if len(moved) else math.nan
        return without_nan(found)

    def _on_anchors(self) -> dict[str, float]:
        if self._anchors is None:
            return {}
        now, spread = self._instruments.log_probs(self._anchors.examples)
        return without_nan(
            {**forward_kl(np.array(self._anchors.start), now), "anchor/entropy": spread.means()[0]}
        )

    def _gradients(self, examples: Sequence[PreferenceExample], step: int) -> dict[str, float]:
        """Measures the two sides of the gradient on these examples together, and on each pair of them alone."""
        found = self._instruments.balance(examples).metrics()
        pairs = [example for example in examples if {Role.CHOSEN, Role.REJECTED} <= set(example.roles)]
        alone = [self._instruments.balance([pair]) for pair in pairs]
        if alone:
            falls = [each.chosen_falls for each in alone]
            found |= {"forecast/chosen_falls": float(np.mean(falls)), "forecast/n": float(len(falls))}
            rows = [
                {
                    "row_id": pair.row_id,
                    "chosen_norm": each.chosen,
                    "rejected_norm": each.rejected,
                    "cosine": each.cosine,
                    "weight_chosen": each.weight_chosen,
                    "weight_rejected": each.weight_rejected,
                    "falls": each.chosen_falls,
                }
                for pair, each in zip(pairs, alone, strict=True)
            ]
            if self._is_main:
                self._files.write(partial(self._forecast.append, {"step": step, "rows": rows}))
        return found

    def _sample(self, step: int) -> dict[str, float]:
        """Samples responses to the anchor set's prompts from the policy as it is now."""
        if self._anchors is None:
            return {}
        try:
            drawn = self._drawn(self._anchors.prompts, step)
        except InfoPOError as error:  # a policy that is broken gives no samples, and training says so better
            if self._is_main:
                logger.warning("step %d: no responses could be sampled: %s", step, error)
            return {}
        responses, finished = [ids for ids, _ in drawn], [end for _, end in drawn]
        self._write(step, responses, finished)
        return self._about(responses, finished) | self._reverse_kl(responses)

    def _about(self, responses: Sequence[Sequence[int]], finished: Sequence[bool]) -> dict[str, float]:
        assert self._anchors is not None
        return without_nan(
            {
                "length/sampled": float(np.mean([len(ids) for ids in responses])),
                "length/anchor": self._anchors.mean_length,
                "generations/finished": float(np.mean(finished)),
                "generations/distinct_2": distinct_n(responses),
            }
        )

    def _reverse_kl(self, responses: list[list[int]]) -> dict[str, float]:
        """Returns KL(π_θ ‖ π_ref) on these samples of π_θ, if a reference runs beside the policy."""
        assert self._anchors is not None
        examples = replace(self._anchors, responses=responses).examples
        examples = [example for example in examples if example.chosen_ids[0]]
        reference = self._instruments.live_reference(examples) if examples else None
        if reference is None:
            return {}
        mean, half_width = mean_and_half_width(self._instruments.log_probs(examples)[0] - reference)
        return without_nan({"kl/reverse": mean, "kl/reverse_se": half_width / Z_95})

    def _write(self, step: int, responses: Sequence[Sequence[int]], finished: Sequence[bool]) -> None:
        assert self._anchors is not None
        if not self._is_main:
            return
        decode = self._instruments.tokenizer.decode
        rows = [
            {
                "step": step,
                "index": index,
                "row_id": self._anchors.row_ids[index],
                "prompt": decode(self._anchors.prompts[index], skip_special_tokens=False),
                "response": decode(responses[index], skip_special_tokens=True),
                "tokens": len(responses[index]),
                "finished": finished[index],
                "mark": None,
            }
            for index in range(min(SHOWN_GENERATIONS, len(responses)))
        ]
        self._files.write(partial(self._generations.append, *rows))


def _interval(steps: float, logging_steps: int) -> int:
    """Returns the fewest optimizer steps, a multiple of `logging_steps`, of which these are a share of `BUDGET`.

    Example:
        >>> _interval(0.5, logging_steps=10)  # half a step in 40 is 1.25 %
        40
    """
    return max(1, math.ceil(steps / BUDGET / logging_steps)) * logging_steps


def _memory(device: torch.device) -> dict[str, float]:
    """Returns the peak memory of the accelerator, or of the process on a CPU (GiB)."""
    if device.type == "cuda":
        return {"memory/peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    if sys.platform == "win32":  # it has no such count
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
