"""One trial, the same for architectures and adapters: two steps of the trainer with its default settings."""

import contextlib
import io
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack, select
from infopo.errors import InfoPOError
from infopo.lab.tokenizer import build_tokenizer
from infopo.logps.forward import response_logps
from infopo.records import PackedBatch, PreferenceExample
from infopo.trainer import InfoPOTrainer

AGREE = 1e-3
"""Nats: two ways to the log-prob of a response, in float32."""

TOKENIZER = build_tokenizer()


@dataclass(frozen=True)
class Row:
    """A row of the page.

    Attributes:
        name: What was tried.
        result: `trained` (`read`), `refused`, `not tried`; or `fault`.
        note: How it was trained, or why not.
    """

    name: str
    result: str
    note: str


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def _example(prompt: str, chosen: list[str], rejected: list[str]) -> PreferenceExample:
    return PreferenceExample(ids(prompt), [ids(t) for t in chosen], [ids(t) for t in rejected], "a row")


# Rows of unequal lengths, the first with a response of one token; several responses that begin alike; and more tokens
# than the windows of `tiny.SIZES` hold.
EXAMPLES = [
    _example("2+2?", ["4"], ["It is 5, I think."]),
    _example(
        "A long question, longer than windows?", ["Yes: so it is", "Yes: so", "Surely"], ["Yes: no", "No"]
    ),
    _example("Why?", ["Because it must be, and was before."], ["No."]),
    _example("A colour?", ["red"], ["a colour is seven"]),
]
BATCH = pack(EXAMPLES)
ALONE = [select(BATCH, [response]) for response in range(BATCH.num_responses)]

Load = Callable[[str], nn.Module]


def train(name: str, model: nn.Module, load: Load, **given: Any) -> Row:
    """What becomes of a model that is trained for two steps.

    Args:
        name: Of the row.
        model: The policy, as a user hands it over.
        load: Reads what was saved.
        given: Further arguments of the trainer; `settings` are those of its `InfoPOConfig`.
    """
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            return Row(name, *_train(model, load, folder, given))
    except InfoPOError as error:
        return Row(name, "refused", first_sentence(error))
    except Exception as error:  # a raw error is what the page is to show
        return Row(name, "fault", f"{type(error).__name__}: {first_sentence(error)}")


def _train(model: nn.Module, load: Load, folder: str, given: dict[str, Any]) -> tuple[str, str]:
    args = InfoPOConfig(
        output_dir=folder, max_steps=2, per_device_train_batch_size=2, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, reference_store="off", **given.pop("settings", {}),
    )  # fmt: skip
    data = ExampleDataset.from_examples(EXAMPLES)
    trainer = InfoPOTrainer(model, args=args, train_dataset=data, processing_class=TOKENIZER, **given)
    policy = trainer.model.eval()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    trainer.train()
    first = next(record for record in trainer.state.log_history if "loss" in record)
    trainer.save_model(folder)
    trained = logps_alone(trainer.model.eval())
    again = logps_alone(load(folder).eval())
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:  # an adapter that is 0 at first hides what is wrong with it
                parameter.add_(0.1 * torch.randn_like(parameter))
        together = response_logps(policy, BATCH)
    faults = {
        "log-probs of a batch are not those of its rows alone": apart(together, logps_alone(policy)),
        "the ratio of policy and reference is not 1 at step 0": not all(
            abs(first[key] - 1) < AGREE for key in ("ratio/mean", "ratio/max")
        ),
        "no weight changes": all(torch.equal(before[k], v) for k, v in policy.state_dict().items()),
        "the saved model is another than the trained one": apart(again, trained),
    }
    wrong = [fault for fault, holds in faults.items() if holds]
    return ("fault", ", ".join(wrong)) if wrong else ("trained", trainer.logps_in_words)


def logps_alone(model: nn.Module) -> torch.Tensor:
    """log π(y|x) of each response, by one forward pass of the model itself for each, without batch or padding."""
    values = []
    for batch in ALONE:
        tokens, scored = _row(batch)
        with torch.no_grad():
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, -len(tokens) :]
        table = logits.double().log_softmax(1)[-scored - 1 : -1]
        values.append(table.gather(1, tokens[-scored:, None]).sum())
    return torch.stack(values)


def _row(batch: PackedBatch) -> tuple[torch.Tensor, int]:
    """Tokens of prompt and response, and how many are the response's."""
    path = batch.path(0)
    spans = [range(batch.segment_start[s], batch.segment_start[s + 1]) for s in path]
    scored = sum(len(span) for s, span in zip(path, spans, strict=True) if batch.segment_scored[s])
    return batch.input_ids[[i for span in spans for i in span]], scored


def apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not bool(((a - b).abs() < AGREE).all())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def first_sentence(error: Exception) -> str:
    """Of an error's message, without what differs between machines: folders, and measured numbers."""
    text = re.split(r"\.? *\n|\. (?=[A-Z])", str(error).strip())[0].removesuffix(".")
    text = re.sub(re.escape(tempfile.gettempdir()) + r"/tmp\w+(/?)", lambda m: "" if m[1] else "FOLDER", text)
    return re.sub(r"\d[\d.]*(e[+-]\d+)? nats", "… nats", text)
