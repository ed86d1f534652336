"""A trainer of a tiny model on random rows, and its numbers computed by hand."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
)

from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.lab.tokenizer import build_tokenizer
from infopo.losses.registry import loss_function
from infopo.records import PreferenceExample, ResponseLogps, Role
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, random_examples, tiny_llama

SETTINGS: dict[str, Any] = {
    **PLAIN_SGD,
    "max_steps": 3,
    "reference_sides": "needed",
    "report_to": "none",
    "per_device_train_batch_size": 4,
}
TOKENIZER = build_tokenizer()
# Sums over at most 12 tokens in float32, in another order.
FLOAT32 = {"rel": 1e-4, "abs": 1e-4}

ROWS = [
    {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 11"},
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 22 or so"},
    {"prompt": "3 + 3 =", "chosen": " it is 6", "rejected": " 33"},
]


def trainer_of(
    folder: Path, train: Any = None, model: Any = None, callbacks: Any = None, **settings: Any
) -> InfoPOTrainer:
    """A trainer of a tiny model on random rows; `settings` are arguments of the trainer or of its configuration."""
    names = (
        "ref_model",
        "eval_dataset",
        "peft_config",
        "data_collator",
        "compute_metrics",
        "quantization_config",
    )
    arguments = {name: settings.pop(name) for name in names if name in settings}
    processing_class = settings.pop("processing_class", TOKENIZER)
    return InfoPOTrainer(
        model=tiny_llama() if model is None else model,
        args=InfoPOConfig(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=random_dataset(12) if train is None else train,
        processing_class=processing_class,
        callbacks=callbacks,
        **arguments,
    )


def step_records(trainer: InfoPOTrainer) -> list[dict[str, float]]:
    return [record for record in trainer.state.log_history if "loss" in record]


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def hand_logps(
    policy: PreTrainedModel, reference: PreTrainedModel, examples: list[PreferenceExample]
) -> ResponseLogps:
    """Log-probs by the definition, each response alone and unpadded."""

    def logp(model: PreTrainedModel, prompt: Any, response: Any) -> float:
        ids = torch.tensor([[*prompt, *response]])
        rows = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return float(rows.gather(1, torch.tensor(list(response))[:, None]).double().sum())

    columns: tuple[list, ...] = ([], [], [], [], [])
    with torch.no_grad():
        for index, example in enumerate(examples):
            sides = [(Role.CHOSEN, r) for r in example.chosen_ids] + [
                (Role.REJECTED, r) for r in example.rejected_ids
            ]
            for role, response in sides:
                values = (
                    logp(policy, example.prompt_ids, response),
                    logp(reference, example.prompt_ids, response),
                    len(response),
                    int(role),
                    index,
                )
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
    floats = [torch.tensor(c, dtype=torch.float64) for c in columns[:2]]
    return ResponseLogps.of(*floats, *(torch.tensor(c) for c in columns[2:]))


def hand_metrics(logps: ResponseLogps, beta: float, cap: float) -> dict[str, float]:
    """Every metric, response by response in plain Python."""
    rows = [
        {
            "logp": float(p),
            "log_ratio": float(p - r),
            "reward": beta * float(p - r),
            "role": int(role),
            "example": int(e),
        }
        for p, r, role, e in zip(logps.policy, logps.reference, logps.role, logps.example, strict=True)
    ]
    chosen = [r for r in rows if r["role"] == Role.CHOSEN]
    rejected = [r for r in rows if r["role"] == Role.REJECTED]
    pairs = [(c, r) for c in chosen for r in rejected if c["example"] == r["example"]]
    margins = [c["reward"] - r["reward"] for c, r in pairs]
    of_policy = [c["logp"] - r["logp"] for c, r in pairs]
    ratios = [math.exp(min(r["reward"], cap)) for r in rejected]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "logps/chosen": mean([r["logp"] for r in chosen]),
        "logps/rejected": mean([r["logp"] for r in rejected]),
        "logps/margins": mean(of_policy),
        "logps/accuracies": mean([float(m > 0) for m in of_policy]),
        "logratios/chosen": mean([r["log_ratio"] for r in chosen]),
        "logratios/rejected": mean([r["log_ratio"] for r in rejected]),
        "rewards/chosen": mean([r["reward"] for r in chosen]),
        "rewards/rejected": mean([r["reward"] for r in rejected]),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean([float(m > 0) for m in margins]),
        "ratio/mean": mean(ratios),
        "ratio/max": max(ratios),
        "ratio/capped": mean([float(r["reward"] > cap) for r in rejected]),
    }


def hand_loss(logps: ResponseLogps, name: str, parameters: dict[str, Any]) -> float:
    return sum(float(term.values.mean()) for term in loss_function(name, parameters)(logps))


def marked_rows(n: int) -> ExampleDataset:
    """Random rows; the third alone holds token 60, in its prompt."""
    rows = [
        PreferenceExample(
            [t % 60 or 1 for t in e.prompt_ids],
            [[t % 60 or 1 for t in r] for r in e.chosen_ids],
            [[t % 60 or 1 for t in r] for r in e.rejected_ids],
            e.row_id,
        )
        for e in random_examples(n)
    ]
    marked = PreferenceExample([60], rows[2].chosen_ids, rows[2].rejected_ids, rows[2].row_id)
    return ExampleDataset.from_examples([*rows[:2], marked, *rows[3:]])
