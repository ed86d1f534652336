"""What a trainer says of itself: objective, reference, store and path of log-probs, as attributes and in words."""

import logging
from typing import Any

from torch import nn

from infopo import late_failures
from infopo.arguments import InfoPOConfig
from infopo.data.counts import DataCounts
from infopo.intake import Intake
from infopo.losses.mixture import mixture_in_words
from infopo.metrics import absent_in_training
from infopo.output import get_logger, shown
from infopo.reference import reference_sides
from infopo.reference_setup import ReferenceBuilder, ReferenceSetup
from infopo.reference_store import ReferenceStore
from infopo.saving import SavingTrainer
from infopo.step_loss import RunLoss

logger = get_logger(__name__)


class DescribedTrainer(SavingTrainer):
    """A trainer that has been set up, and can be asked for what.

    Attributes:
        mixture: The objectives, each as (name, parameters, weight).
        logps_in_words: Description of the path on which log-probs are computed.
    """

    args: InfoPOConfig
    mixture: list[tuple[str, dict[str, Any], float]]
    logps_in_words: str
    _intake: Intake
    _setup: ReferenceSetup
    _references: ReferenceBuilder
    _loss: RunLoss

    def description(self) -> list[str]:
        """Returns what was set up, in lines: objective, reference, store, path of log-probs, dropout, absent metrics.

        The constructor logs them, and the command line prints them.
        """
        sides = " and ".join(sorted(self.reference_sides)) or "no"
        lines = [
            f"objective: {self.objective_in_words()}",
            f"reference: {self.reference_in_words}, for {sides} responses",
        ]
        if self.reference_store is not None:
            lines.append(f"reference store: {self.reference_store.in_words()}")
        lines.append(f"log-probs: {self.logps_in_words}")
        lines.append(self._dropout_in_words())
        lines.append(absent_in_training(self._loss.metric_rule, self.reference_sides) or "")
        return [shown(line) for line in lines if line]

    def _dropout_in_words(self) -> str:
        if not self.args.disable_dropout:
            return ""
        return late_failures.dropout_in_words(self.model, is_fresh=self._references.adapter_is_fresh)

    def _log_description(self) -> None:
        if self.is_world_process_zero():
            is_changed = not self._references.adapter_is_fresh
            for line in self.description():
                is_warning = is_changed and line.startswith("dropout: ")
                logger.log(logging.WARNING if is_warning else logging.INFO, line)

    @property
    def data_counts(self) -> dict[str, DataCounts]:
        """What happened to the rows of each dataset: `train`, and `eval` or the name of the evaluation set."""
        return self._intake.counts

    def objective_in_words(self) -> str:
        """Returns name and parameters of the loss, e.g. `InfoPO (beta=1.0, length_normalized=False, cap=5.0)`."""
        return mixture_in_words(self.mixture)

    @property
    def reference_sides(self) -> frozenset[str]:
        """Sides whose reference log-probs are computed for training."""
        return reference_sides(self.mixture, self.args.reference_sides, "train")

    @property
    def eval_reference_sides(self) -> frozenset[str]:
        """Sides whose reference log-probs are computed for evaluation."""
        return reference_sides(self.mixture, self.args.reference_sides, "eval")

    @property
    def policy_hash(self) -> str:
        """Hash of the policy's weights before training."""
        return self._setup.policy_hash

    @property
    def base_hash(self) -> str:
        """Hash of the weights beneath the policy's adapter before training, or of all if it has none."""
        return self._setup.base_hash

    @property
    def reference_hash(self) -> str | None:
        """Hash of the reference's weights, or None if nothing needs a reference."""
        return self._setup.hash

    @property
    def reference_in_words(self) -> str:
        """Description of the reference."""
        return self._setup.description

    @property
    def reference_store(self) -> ReferenceStore | None:
        """The store of precomputed reference log-probs, or None if there is none."""
        return self._setup.store

    @property
    def ref_model(self) -> nn.Module | None:
        """The model that runs beside the policy as its reference, or None."""
        return self._setup.model
