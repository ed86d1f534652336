"""Measurements on the policy of a run: log-probs of given examples, norms of gradients, samples. They change nothing.

The policy has its modes, gradients and random numbers back afterwards. All ranks take part alike, because each forward
pass of a sharded model needs all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from infopo.diagnostics import Balance, SquaredNorm, Values, balance
from infopo.logps import spread
from infopo.logps.forward import response_logps
from infopo.logps.wrappers import base_of
from infopo.noise import evaluating, in_training
from infopo.records import PackedBatch, PreferenceExample, ResponseLogps, Role, to_device
from infopo.reference import LiveReference, Reference

Slopes = Callable[[Sequence[ResponseLogps], Tensor], list[Tensor]]
"""Log-probs of a set in pieces, and its counts -> ∂L/∂log π_θ of each response of each piece."""


@dataclass(frozen=True)
class Instruments:
    """What measuring needs of a run.

    Attributes:
        model: The policy as it is trained, without what copies it to several ranks.
        tokenizer: Its tokenizer.
        collate: Packs examples into pieces, in their order.
        context: Context of a forward pass, e.g. autocast.
        device: Device of the policy.
        batch_size: Number of examples that are collated at a time.
        quiet: Modules that draw random numbers in training, and are to draw none.
        reference: Gives the reference log-probs of a batch as training has them.
        responses: Runs the policy on a batch, and returns what the loss sees of it beside a reference.
        slopes: The derivative of the loss by log-probs.
        summed: Sums a tensor over ranks that hold parts of the gradient. The identity if each holds all of it.
        unsynchronised: Context of a backward pass whose gradients are not exchanged among ranks.
        loss_scale: Factor by which a loss is multiplied before its backward pass (float16).
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    collate: Callable[[Sequence[PreferenceExample]], list[PackedBatch]]
    context: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    batch_size: int
    quiet: Sequence[nn.Module]
    reference: Reference
    responses: Callable[[nn.Module, PackedBatch, Reference], ResponseLogps]
    slopes: Slopes
    summed: Callable[[Tensor], Tensor]
    unsynchronised: Callable[[], AbstractContextManager[Any]]
    loss_scale: Callable[[], float]

    def pieces(self, examples: Sequence[PreferenceExample]) -> Iterator[PackedBatch]:
        """Yields the examples in batches on the device."""
        for begin in range(0, len(examples), self.batch_size):
            for piece in self.collate(examples[begin : begin + self.batch_size]):
                yield piece.to(self.device)

    def log_probs(self, examples: Sequence[PreferenceExample]) -> tuple[Values, spread.Spread]:
        """Returns log π_θ of every response (nats), and how the policy spreads its probability where it is scored."""
        with torch.no_grad(), evaluating(self.model), self.context(), spread.measured() as found:
            parts = [response_logps(self.model, piece) for piece in self.pieces(examples)]
        return _on_host(parts), found

    def live_reference(self, examples: Sequence[PreferenceExample]) -> Values | None:
        """Returns log π_ref of every response (nats) by the model that runs beside the policy, or None without one."""
        if not isinstance(self.reference, LiveReference):
            return None
        live = LiveReference(self.reference.model, frozenset({"chosen", "rejected"}), self.reference.context)
        with torch.no_grad(), self.context():
            return _on_host([live(piece) for piece in self.pieces(examples)])

    def balance(self, examples: Sequence[PreferenceExample]) -> Balance:
        """Measures the gradients of the loss's two sides on a set of examples."""
        slopes, is_chosen = self._slopes(examples)
        return balance(slopes, is_chosen, self._squared_norm(examples))

    def along_a_step(
        self, examples: Sequence[PreferenceExample], together: Sequence[PreferenceExample]
    ) -> list[float]:
        """Returns how each example's first chosen response changes along a step on all of `together`.

        It is ⟨∇log π(y_w), -∇L⟩, where L is the loss on `together`: the change of log π(y_w) per unit of learning rate,
        by a small step of gradient descent. It keeps a second copy of the gradient, and takes one backward pass per
        example. Each process must hold the whole model.
        """
        slopes, _ = self._slopes(together)
        with self._gradient(together, [-slope for slope in slopes]):
            step = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        found = []
        for example in examples:
            with self._gradient([example], [1.0] + [0.0] * (len(example.response_ids) - 1)):
                parts = [(p.grad * grad).sum() for p, grad in step if p.grad is not None]
                found.append(float(torch.stack(parts).double().sum()) / self.loss_scale() ** 2)
        return found

    def hidden_sums(self, example: PreferenceExample) -> list[tuple[Values, int]] | None:
        """Returns, per response, the sum of the head's inputs that score its tokens, (width,), and their number.

        It is None for a model that does not call its output layer on all positions.
        """
        head = base_of(self.model).get_output_embeddings()
        if head is None:
            return None
        prompt, found = list(example.prompt_ids), list[tuple[Values, int]]()
        seen: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            with torch.no_grad(), evaluating(self.model), self.context():
                for ids in example.response_ids:
                    row = torch.tensor([[*prompt, *ids]], device=self.device)
                    self.model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
                    if len(seen) != 1 or seen[0].shape[:2] != row.shape:
                        return None
                    states = seen.pop()[0, len(prompt) - 1 : -1].double()
                    found.append((states.sum(0).cpu().numpy(), len(ids)))
        finally:
            handle.remove()
        return found

    def _slopes(self, examples: Sequence[PreferenceExample]) -> tuple[list[float], list[bool]]:
        seen, counts, roles = list[ResponseLogps](), list[Tensor](), list[int]()
        with torch.no_grad(), evaluating(self.model), self.context():
            for piece in self.pieces(examples):
                seen.append(self.responses(self.model, piece, self.reference))
                counts.append(piece.counts)
                roles += piece.roles
        slopes = self.slopes(seen, torch.stack(counts).sum(0))
        return _on_host(slopes).tolist(), [role == Role.CHOSEN for role in roles]

    def _squared_norm(self, examples: Sequence[PreferenceExample]) -> SquaredNorm:
        def squared_norm(coefficients: Sequence[float]) -> float:
            with self._gradient(examples, coefficients):
                return float(self.summed(_squares(self.model))) / self.loss_scale() ** 2

        return squared_norm

    @contextmanager
    def _gradient(
        self, examples: Sequence[PreferenceExample], coefficients: Sequence[float]
    ) -> Iterator[None]:
        """Within it, parameters have the gradient of Σ c_i log π(y_i), times the scale of the loss."""
        place = 0
        with in_training(self.model, self.quiet), self.unsynchronised():
            try:
                for piece in self.pieces(examples):
                    part = torch.tensor(
                        coefficients[place : place + piece.num_responses], dtype=torch.float64
                    )
                    [factors] = to_device([part], self.device)
                    place += piece.num_responses
                    with self.context():
                        logps = response_logps(self.model, piece)
                    ((logps * factors).sum() * self.loss_scale()).backward()
                yield
            finally:
                for parameter in self.model.parameters():
                    parameter.grad = None


def _squares(model: nn.Module) -> Tensor:
    """Returns the sum of squares of all gradients, of which a rank of a sharded model has its part."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
    device = next(model.parameters()).device
    squares = [
        torch.linalg.vector_norm(g, dtype=torch.float32).square().to(device) for g in local if g.numel()
    ]
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device)


def _on_host(parts: Sequence[Tensor]) -> Values:
    if not parts:
        return np.empty(0)
    values: Values = torch.cat(list(parts)).detach().double().cpu().numpy()
    return values
