"""TRL's DPOTrainer on token ids, as it is and at its best."""

import os
from types import MethodType
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from infopo.records import PreferenceExample

# Logits at a time. Smaller tiles were no faster.
TILE_ELEMENTS = 2**23


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer for a dataset that contains token ids already. TRL has no switch for it."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class CompactDPOTrainer(TokenizedDPOTrainer):
    """DPOTrainer whose head scores response positions only, in an efficient function, without metrics of logits.

    TRL does this itself on a GPU (`compact`, which needs Triton). Elsewhere its head scores every position, in several
    passes over each tile.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.device.type == "cpu":
            self.model.forward = MethodType(_compact_forward, self.model)


def dataset_of(pairs: list[PreferenceExample]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt_ids": [list(e.prompt_ids) for e in pairs],
            "chosen_ids": [list(e.chosen_ids[0]) for e in pairs],
            "rejected_ids": [list(e.rejected_ids[0]) for e in pairs],
        }
    )


def _compact_forward(
    self: Any, *, labels: Tensor, fused_lm_head: bool = True, **kwargs: Any
) -> FusedCausalLMOutput:
    hidden = self.model(**kwargs).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    mask = labels != -100
    scored = token_logps(hidden[mask], self.lm_head.weight, labels[mask])
    zeros = torch.zeros(mask.shape, dtype=scored.dtype, device=scored.device)
    log_probs = zeros.masked_scatter(mask, scored)
    return FusedCausalLMOutput(
        log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=torch.zeros_like(mask), label_mask=mask
    )


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns log softmax(hidden · weightᵀ)[target] of each position, without keeping logits."""
    return _TokenLogps.apply(hidden, weight, targets)


class _TokenLogps(torch.autograd.Function):
    """Computes tiles of positions and keeps the logsumexp only. The backward pass computes each tile again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logsumexp, logps = [], []
        for h, t in zip(*_tiles(weight, hidden, targets), strict=True):
            logits = h @ weight.T
            logsumexp.append(logits.logsumexp(1))
            logps.append(logits.gather(1, t[:, None])[:, 0] - logsumexp[-1])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(logsumexp))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        grad_hidden, grad_weight = [], torch.zeros_like(weight)
        for h, t, z, g in zip(*_tiles(weight, hidden, targets, logsumexp, grad), strict=True):
            # d log p_t / d logits = onehot(t) - softmax
            d = torch.addmm(-z[:, None], h, weight.T).exp_().mul_(-g[:, None])
            d.scatter_add_(1, t[:, None], g[:, None])
            grad_hidden.append(d @ weight)
            grad_weight.addmm_(d.T, h)
        return torch.cat(grad_hidden), grad_weight, None


def _tiles(weight: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    rows = max(1, TILE_ELEMENTS // weight.shape[0])
    return [tensor.split(rows) for tensor in tensors]
