"""The loss of a step, and of an evaluation set, with its step statistics and metrics. Knows no trainer.

A trainer passes models and batches. Of each piece of a batch, `RunLoss` computes log-probs and loss terms. `StepLoss`
divides the terms by the counts of the whole optimizer step, and `EvaluationLoss` by those of the whole set.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from infopo import run_state
from infopo.data.packing import select
from infopo.diagnostics import ratio_tail
from infopo.errors import NonFiniteLossError
from infopo.finite import FiniteWatch
from infopo.logps import agreement, router
from infopo.logps.forward import response_logps
from infopo.losses.catalog import row_of
from infopo.losses.coupling import Averages, StepCoupling, collected
from infopo.losses.registry import loss_function, step_statistic
from infopo.metrics import (
    MetricRule,
    MetricSums,
    non_finite_rows,
    preference_metrics,
    reference_is_finite,
)
from infopo.records import PER, LossTerms, PackedBatch, ResponseLogps, Role
from infopo.reference import Reference


@dataclass(frozen=True)
class Piece:
    """A piece of a device batch after its forward pass.

    Attributes:
        batch: The piece.
        logps: Log-probs of its responses.
        aux: The load-balancing loss of the model's experts, or None.
        share: The part of the device batch's tokens, as rows, that it has.
    """

    batch: PackedBatch
    logps: ResponseLogps
    aux: Tensor | None
    share: float


class RunLoss:
    """The loss of a run, of which there is one.

    Args:
        mixture: The objectives, each as (name, parameters, weight).
        device: Device of the policy.
        gather: Concatenates a tensor over ranks.
        world_size: Number of ranks.
        router_coef: Factor of the load-balancing loss of experts, or 0.
    """

    def __init__(
        self,
        mixture: Sequence[tuple[str, Mapping[str, Any], float]],
        device: torch.device,
        gather: Callable[[Tensor], Tensor],
        world_size: int,
        router_coef: float,
    ) -> None:
        self._functions = [(loss_function(name, params), weight) for name, params, weight in mixture]
        self._measures_agreement = any(row_of(name).agreement for name, _, _ in mixture)
        self.metric_rule = MetricRule.of(mixture)
        self.coupling = StepCoupling([step_statistic(n, p) for n, p, _ in mixture], device, gather)
        self.device = device
        self.gather = gather
        self.world_size = world_size
        self.router_coef = router_coef

    def piece(self, model: nn.Module, batch: PackedBatch, reference: Reference, share: float) -> Piece:
        """Returns a piece after its forward pass, or passes if the reference runs beside the policy."""
        wanted = self._measures_agreement
        with router.aux_losses(self.router_coef != 0) as found, agreement.measured(wanted) as agreements:
            policy = response_logps(model, batch)
        logps = batch.with_logps(policy, reference(batch))
        if agreements:
            logps = replace(logps, agreement=agreements[0] / logps.length)
        return Piece(batch, logps, router.mean(found), share)

    def terms(self, logps: ResponseLogps, statistics: Sequence[Tensor | None]) -> LossTerms:
        """Returns the terms of all objectives with their weights, given each objective's step statistic."""
        return [
            replace(term, values=weight * term.values)
            for (function, weight), value in zip(self._functions, statistics, strict=True)
            for term in function(replace(logps, statistic=value))
        ]

    def slopes(self, logps: Sequence[ResponseLogps], counts: Tensor) -> list[Tensor]:
        """Returns ∂L/∂log π_θ(y) of each response, for the loss L of a set in pieces, without the load-balancing loss.

        Step statistics are those of the set itself, also where training uses a moving average.

        Args:
            logps: Log-probs of the pieces.
            counts: Counts of the set (order: `PER`).
        """
        statistics, _ = self.coupling.over(logps)
        counts = counts.clamp(min=1)
        found: list[Tensor] = []
        for piece in logps:
            with torch.enable_grad():
                policy = piece.policy.detach().requires_grad_()
                terms = self.terms(replace(piece, policy=policy), statistics)
                loss = sum(
                    (term.values.sum() / counts[PER.index(term.per)] for term in terms), policy.sum() * 0
                )
            found += torch.autograd.grad(loss, [policy])
        return found

    def add_metrics(self, sums: MetricSums, piece: Piece, sides: frozenset[str]) -> None:
        """Adds what is logged of a piece, of which the reference of these sides is known."""
        sums.add(*preference_metrics(piece.logps, self.metric_rule, sides))
        if piece.aux is not None:
            sums.add({"aux_loss": (piece.aux.detach() * piece.share, piece.share)})


class RatioTail:
    """The log-ratios of rejected responses since the last record, on their device until they are reduced.

    Args:
        rule: Rule by which the loss makes a weight of a log-ratio.
        gather: Concatenates a tensor over ranks.
    """

    def __init__(self, rule: MetricRule, gather: Callable[[Tensor], Tensor]) -> None:
        self._rule = rule
        self._gather = gather
        self._seen: list[Tensor] = []

    def add(self, logps: ResponseLogps) -> None:
        """Adds the rejected responses of a batch."""
        log_ratio = (logps.policy.detach() - logps.reference)[logps.rejected]
        length = logps.length[logps.rejected] if self._rule.length_normalized else 1
        self._seen.append(torch.stack([log_ratio, self._rule.beta * log_ratio / length]))

    def reduce(self) -> dict[str, float]:
        """Returns the metrics of all ranks, each of which must call this, and forgets the responses."""
        if not self._seen:
            return {}
        of_ranks, _ = collected(torch.cat(self._seen, dim=1).unbind(), self._gather)
        self._seen.clear()
        log_ratios, critics = of_ranks.transpose(0, 1).flatten(1).double().cpu().numpy()
        return ratio_tail(log_ratios, critics if self._rule.has_ratio else None, self._rule.cap)


class StepLoss:
    """The loss of optimizer steps, one after the other.

    Args:
        run: The loss of the run.
        reference: Gives the reference log-probs of a batch.

    Attributes:
        share: The part of its device batch's tokens that the piece has which `pieces` has yielded last.
    """

    def __init__(self, run: RunLoss, reference: Reference) -> None:
        self._run = run
        self._reference = reference
        self.start()

    def start(self, averages: Sequence[Averages] | None = None) -> None:
        """Starts a run, with the moving averages of a checkpoint if it is resumed from one."""
        self._run.coupling.reset(averages)
        self._sums = MetricSums()
        self._tail = RatioTail(self._run.metric_rule, self._run.gather)
        self._finite = FiniteWatch()
        self._seen: list[tuple[Piece, LossTerms]] = []
        self.share = 1.0

    def look_ahead(
        self,
        model: nn.Module,
        batches: Sequence[Sequence[PackedBatch]],
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Computes the step statistics of the objectives before a step's first gradient, by a pass without gradient.

        Only responses that enter the statistics are run. Dropout is off, because a statistic is one of the policy
        itself.

        Args:
            model: The policy as it is distributed.
            batches: The device batches of the step, in pieces. There are none except before its first gradient.
            context: Context of the forward pass.
        """
        roles = self._run.coupling.roles
        if not batches or not roles:
            return
        was_training = model.training
        model.eval()
        with torch.no_grad(), context():
            parts = (_only(piece.to(self._run.device), roles) for pieces in batches for piece in pieces)
            seen = [self._run.piece(model, part, self._reference, share=1.0).logps for part in parts]
        model.train(was_training)
        self._sums.add(self._run.coupling.advance(seen))

    def pieces(self, batches: Sequence[PackedBatch]) -> Iterator[tuple[PackedBatch, bool]]:
        """Yields the pieces of a device batch that have a gradient, and whether each is the last."""
        if Role.KL in self._run.coupling.roles:  # their part is done: the KL term has no gradient
            batches = [_only(batch, {Role.CHOSEN, Role.REJECTED}) for batch in batches]
        for number, (batch, self.share) in enumerate(_with_shares(batches)):
            yield batch, number == len(batches) - 1

    def of_piece(
        self, model: nn.Module, batch: PackedBatch, counts: Tensor | None, router_weight: float
    ) -> Tensor:
        """Returns what a piece adds to the loss of the optimizer step: Σ_terms Σ values / count.

        It is multiplied by the number of ranks, because their gradients are averaged.

        Args:
            model: The policy as it is distributed.
            batch: The piece that `pieces` has yielded last.
            counts: Counts of the whole optimizer step (order: `PER`), or None for those of the piece.
            router_weight: Weight of the piece's load-balancing loss. It is a mean over device batches and ranks, as in
                TRL.
        """
        piece = self._run.piece(model, batch, self._reference, self.share)
        policy = piece.logps.policy
        terms = self._run.terms(piece.logps, self._run.coupling.values)
        self._run.add_metrics(self._sums, piece, self._reference.sides)
        if "rejected" in self._reference.sides:
            self._tail.add(piece.logps)
        detached = [replace(term, values=term.values.detach()) for term in terms]
        logps = replace(piece.logps, policy=policy.detach())
        self._seen.append((replace(piece, logps=logps, aux=None), detached))
        counts = (batch.counts if counts is None else counts).to(policy.dtype).clamp(min=1)
        loss = sum((term.values.sum() / counts[PER.index(term.per)] for term in terms), policy.sum() * 0)
        loss = loss * self._run.world_size
        if piece.aux is not None:
            loss = loss + self._run.router_coef * router_weight * piece.aux
        self._finite.note([loss, *(term.values.sum() for term in detached)])
        return loss

    def refuse_non_finite(self, step: int, output_dir: str) -> None:
        """Refuses an optimizer step before it is taken.

        Raises:
            NonFiniteLossError: Its loss is NaN or infinite.
        """
        seen, self._seen = self._seen, []
        if self._finite.answer():
            return
        rows = [row for piece, terms in seen for row in non_finite_rows(piece.batch, piece.logps, terms)]
        remedy = (
            "A lower learning_rate, which holds from there on, or bf16 in place of fp16, is the usual remedy"
        )
        if not all(reference_is_finite(piece.logps, self._reference.sides) for piece, _ in seen):
            remedy = (
                "The reference's log-probs are not finite: NaN or inf in its weights, or too low a precision"
            )
        raise NonFiniteLossError(
            f"step {step}: the loss is not finite; rows: {', '.join(rows) or 'unknown'}. "
            f"No update was made. {run_state.kept(output_dir)}. {remedy}."
        )

    def metrics(self) -> dict[str, float]:
        """Returns the metrics since the last call, over all ranks, each of which must call this."""
        return self._sums.reduce(self._run.gather) | self._tail.reduce()


class EvaluationLoss:
    """Loss and metrics of one evaluation set, with each example once, whatever the batches and ranks.

    Step statistics are computed over the whole set, so that MINE equals DV here.

    Args:
        run: The loss of the run.
        reference: Gives the reference log-probs of a batch.
    """

    def __init__(self, run: RunLoss, reference: Reference) -> None:
        self._run = run
        self._reference = reference
        self._sums = MetricSums()
        self._seen: list[tuple[Tensor, ResponseLogps]] = []

    def add(self, model: nn.Module, batches: Sequence[PackedBatch]) -> None:
        """Runs the pieces of a device batch."""
        for batch, share in _with_shares(batches):
            piece = self._run.piece(model, batch, self._reference, share)
            self._run.add_metrics(self._sums, piece, self._reference.sides)
            self._seen.append((batch.counts, piece.logps))

    def metrics(self) -> dict[str, float]:
        """Returns `loss` and the metrics of the set, over all ranks, each of which must call this."""
        statistics, of_set = self._run.coupling.over([logps for _, logps in self._seen])
        self._sums.add(of_set)
        losses = MetricSums()
        for numbers, logps in self._seen:
            counts = numbers.tolist()
            for index, term in enumerate(self._run.terms(logps, statistics)):
                losses.add({f"{index}": (term.values.sum(), int(counts[PER.index(term.per)]))})
        metrics = {"loss": sum(losses.reduce(self._run.gather).values())}
        metrics |= self._sums.reduce(self._run.gather)
        metrics["loss"] += self._run.router_coef * metrics.get("aux_loss", 0.0)
        return metrics


def _with_shares(batches: Sequence[PackedBatch]) -> Iterator[tuple[PackedBatch, float]]:
    """Yields the pieces of a device batch with the part of its tokens that each has."""
    tokens = [batch.row_tokens() for batch in batches]
    for batch, own in zip(batches, tokens, strict=True):
        yield batch, own / max(1, sum(tokens))


def _only(batch: PackedBatch, roles: Collection[Role]) -> PackedBatch:
    """Returns the batch with its responses of these roles only."""
    return select(batch, [i for i, role in enumerate(batch.roles) if role in roles])
