"""Our losses against TRL's own code, run by TRL's own trainers on a tiny random Llama.

TRL 1.16 has no free loss functions: they are branches of `DPOTrainer._compute_loss`, and of
`CPOTrainer.cpo_loss` for SimPO. So real trainers compute loss and gradient on a batch that they collated
themselves; on our side plain transformers scores each response alone and unpadded, and `objectives` does the
rest.

Tolerance 1e-5, of the loss and of the largest gradient: the two sides run the same float32 model in different
orders of summation (padded against unpadded rows, fused tiles against whole logits), which moves log-probs of
up to 40 nats by some 1e-7 of their size. Measured: 1.1e-6 at most for losses, 1.6e-6 for gradients.

Differences that are not parity, found in TRL 1.16:

- `sigmoid` ignores `label_smoothing`. Conservative DPO (ours) is in TRL's `aot`, which sorts policy and
  reference margins over the batch before subtracting: on a batch of one pair nothing is sorted and the
  formulas agree.
- `exo_pair` is infinite at its default, label smoothing 0.
- ORPO's likelihood term runs over prompt and response, ours over the response.
- CPO's hinge has no reference: it is our `slic`.
- `ipo` has the length-normalised form only.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from infopo.data.examples import ExampleDataset
from infopo.losses.registry import loss_function
from infopo.records import LossTerm, PreferenceExample, ResponseLogps, Role

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of libraries under comparison are not ours

ROWS = [
    {"prompt": "add one two", "chosen": " three", "rejected": " one one two two"},
    {"prompt": "one", "chosen": " two three four five six", "rejected": " six"},
    {"prompt": "five six add one", "chosen": " four four three", "rejected": " two one"},
    {"prompt": "three add", "chosen": " five", "rejected": " five five five five five five"},
]
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "add", "one", "two", "three", "four", "five", "six"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """Random weights large enough that two seeds differ by several nats per response."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


POLICY, REFERENCE = tiny_llama(0), tiny_llama(7)
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": len(ROWS),
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    return DPOTrainer(
        model=copy.deepcopy(POLICY),
        ref_model=copy.deepcopy(REFERENCE),
        args=DPOConfig(output_dir=str(tmp_path_factory.mktemp("dpo")), **COMMON),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
    )


def test_wpo_is_trls_dpo_with_use_weighting(tmp_path: Path) -> None:
    trainer = DPOTrainer(
        model=copy.deepcopy(POLICY),
        ref_model=copy.deepcopy(REFERENCE),
        args=DPOConfig(output_dir=str(tmp_path), use_weighting=True, **COMMON),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = run_trl(trainer, batch, ["sigmoid"], 0.5)
    logps, policy = our_logps(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    rows = zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
    means = []
    for ids, mask, scored in rows:
        log_p = policy(input_ids=ids[mask == 1][None]).logits[0].log_softmax(-1)[:-1].double()
        of_token = log_p.gather(1, ids[mask == 1][1:, None])[:, 0] - (2 * log_p).logsumexp(1)
        means.append(of_token[scored[mask == 1][1:].bool()].mean().detach())
    logps = replace(logps, agreement=torch.stack(means))
    ours = step_loss(loss_function("wpo", {"beta": 0.5})(logps), logps)
    assert_same_loss_and_gradient(theirs, trainer.model, ours, policy)


def plain_logps(model: LlamaForCausalLM, ids: list[int], scored: list[bool]) -> Tensor:
    """log π of the scored tokens of one unpadded row, by the definition."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    per_token = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return per_token[torch.tensor(scored[1:])].double().sum()


def our_logps(
    input_ids: Tensor, attention_mask: Tensor, scored: Tensor
) -> tuple[ResponseLogps, LlamaForCausalLM]:
    """`ResponseLogps` of a batch [all chosen, all rejected], and the policy to differentiate by."""
    policy = copy.deepcopy(POLICY)
    rows = [
        (ids[mask == 1].tolist(), score[mask == 1].bool().tolist())
        for ids, mask, score in zip(input_ids, attention_mask, scored, strict=True)
    ]
    pairs = len(rows) // 2
    with torch.no_grad():
        reference = torch.stack([plain_logps(REFERENCE, *row) for row in rows])
    logps = ResponseLogps.of(
        policy=torch.stack([plain_logps(policy, *row) for row in rows]),
        reference=reference,
        length=torch.tensor([sum(score) for _, score in rows]),
        role=torch.tensor([Role.CHOSEN] * pairs + [Role.REJECTED] * pairs),
        example=torch.arange(pairs).repeat(2),
    )
    return logps, policy


def step_loss(terms: list[LossTerm], logps: ResponseLogps) -> Tensor:
    count = {
        "pair": len(logps.pairs),
        "chosen": len(logps.chosen),
        "rejected": len(logps.rejected),
        "response": len(logps.chosen) + len(logps.rejected),
        "token": int(logps.length[logps.chosen].sum()),
    }
    return torch.stack([term.values.sum() / count[term.per] for term in terms]).sum()


def gradients(loss: Tensor, model: torch.nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def assert_same_loss_and_gradient(
    theirs: Tensor, their_model: torch.nn.Module, ours: Tensor, our_model: torch.nn.Module
) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    our_gradient, their_gradient = gradients(ours, our_model), gradients(theirs, their_model)
    assert their_gradient.abs().max() > 0
    torch.testing.assert_close(
        our_gradient, their_gradient, rtol=0, atol=1e-5 * float(their_gradient.abs().max())
    )


def run_trl(
    trainer: DPOTrainer, batch: Mapping[str, Tensor], loss_types: list[str], beta: float, **settings: Any
) -> Tensor:
    """TRL's loss of a batch; the trainer keeps its settings in attributes, which its loss reads."""
    for name, value in {
        "loss_types": loss_types,
        "beta": beta,
        "loss_weights": [1.0] * len(loss_types),
        "label_smoothing": 0.0,
        **settings,
    }.items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)
    loss: Tensor = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    return loss


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(
    ("loss_types", "loss_weights", "name", "parameters"),
    [
        (["sigmoid"], [1.0], "dpo", {}),
        (["sigmoid", "sft"], [1.0, 0.3], "dpo", {"nll_weight": 0.3}),
        (["ipo"], [1.0], "ipo", {}),
        (["hinge"], [1.0], "hinge", {}),
        (["sft"], [1.0], "sft", {"token_mean": True}),
        (["nca_pair"], [1.0], "nca", {}),
        (["bco_pair"], [1.0], "js", {}),
        (["apo_zero"], [1.0], "apo_zero", {}),
        (["apo_down"], [1.0], "apo_down", {}),
        (["sppo_hard"], [1.0], "sppo_hard", {}),
        (["aot"], [1.0], "aot", {}),
        (["aot_unpaired"], [1.0], "aot_unpaired", {}),
        (["discopop"], [1.0], "discopop", {"cap": 1e3}),
        (["sigmoid_norm"], [1.0], "dpo", {"length_normalized": True}),
    ],
    ids=[
        "sigmoid",
        "sigmoid+sft",
        "ipo",
        "hinge",
        "sft",
        "nca_pair",
        "bco_pair",
        "apo_zero",
        "apo_down",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "discopop",
        "sigmoid_norm",
    ],
)
def test_loss_and_gradient_are_those_of_trls_dpo_trainer(
    dpo_trainer: DPOTrainer,
    beta: float,
    loss_types: list[str],
    loss_weights: list[float],
    name: str,
    parameters: dict[str, Any],
) -> None:
    batch = next(iter(dpo_trainer.get_train_dataloader()))
    theirs = run_trl(dpo_trainer, batch, loss_types, beta, loss_weights=loss_weights)
    logps, policy = our_logps(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    if name != "sft":
        parameters = {**parameters, "beta": beta}
    ours = step_loss(loss_function(name, parameters)(logps), logps)
    assert_same_loss_and_gradient(theirs, dpo_trainer.model, ours, policy)


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_label_smoothing_is_that_of_trls_aot_on_a_single_pair(dpo_trainer: DPOTrainer, row: int) -> None:
    """TRL's `sigmoid` ignores label smoothing, its `aot` has the conservative form (module docstring)."""
    batch = dpo_trainer.data_collator([dpo_trainer.train_dataset[row]])
    theirs = run_trl(dpo_trainer, batch, ["aot"], beta=0.5, label_smoothing=0.2)
    logps, policy = our_logps(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    ours = step_loss(loss_function("dpo", {"beta": 0.5, "label_smoothing": 0.2})(logps), logps)
    assert_same_loss_and_gradient(theirs, dpo_trainer.model, ours, policy)


def assert_same_as_pairwise_trainer(trainer: CPOTrainer, name: str, parameters: dict[str, Any]) -> None:
    batch = next(iter(trainer.get_train_dataloader()))
    theirs, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    both = trainer.concatenated_inputs(batch, padding_value=trainer.pad_token_id)
    logps, policy = our_logps(
        both["concatenated_input_ids"],
        both["concatenated_attention_mask"],
        both["concatenated_labels"] != -100,
    )
    ours = step_loss(loss_function(name, parameters)(logps), logps)
    assert_same_loss_and_gradient(theirs, trainer.model, ours, policy)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(("loss_type", "name"), [("robust", "robust_dpo"), ("exo_pair", "exo")])
def test_losses_under_label_noise_are_those_of_trls_dpo_trainer(
    dpo_trainer: DPOTrainer, beta: float, loss_type: str, name: str
) -> None:
    batch = next(iter(dpo_trainer.get_train_dataloader()))
    theirs = run_trl(dpo_trainer, batch, [loss_type], beta, label_smoothing=0.15)
    logps, policy = our_logps(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    ours = step_loss(loss_function(name, {"beta": beta, "label_smoothing": 0.15})(logps), logps)
    assert_same_loss_and_gradient(theirs, dpo_trainer.model, ours, policy)


@pytest.mark.parametrize(
    ("theirs_named", "parameters"),
    [
        ({"f_divergence_type": "forward_kl"}, {"divergence": "forward_kl"}),
        ({"f_divergence_type": "js_divergence"}, {"divergence": "js"}),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
            {"divergence": "alpha", "alpha": 0.3},
        ),
    ],
    ids=["forward_kl", "js", "alpha"],
)
def test_f_dpo_is_trls_sigmoid_under_another_divergence(
    dpo_trainer: DPOTrainer, theirs_named: dict[str, Any], parameters: dict[str, Any]
) -> None:
    """TRL's α is the exponent of t^(α-1): 1 - α here."""
    batch = next(iter(dpo_trainer.get_train_dataloader()))
    before = {name: getattr(dpo_trainer, name) for name in theirs_named}
    try:
        theirs = run_trl(dpo_trainer, batch, ["sigmoid"], 0.1, **theirs_named)
    finally:
        for setting, value in before.items():
            setattr(dpo_trainer, setting, value)
    logps, policy = our_logps(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    ours = step_loss(loss_function("fdpo", {"beta": 0.1, **parameters})(logps), logps)
    assert_same_loss_and_gradient(theirs, dpo_trainer.model, ours, policy)


@pytest.mark.parametrize(
    ("settings", "name", "parameters"),
    [
        ({"loss_type": "sigmoid", "cpo_alpha": 1.0, "beta": 0.3}, "cpo", {"beta": 0.3}),
        (
            {"loss_type": "sigmoid", "cpo_alpha": 0.4, "beta": 0.3, "label_smoothing": 0.1},
            "cpo",
            {"beta": 0.3, "nll_weight": 0.4, "label_smoothing": 0.1},
        ),
        (
            {"loss_type": "hinge", "cpo_alpha": 0.5, "beta": 0.2},
            "slic",
            {"beta": 0.2, "nll_weight": 0.5},
        ),
    ],
    ids=["cpo", "cpo-smoothed", "slic"],
)
def test_reference_free_losses_are_those_of_trls_cpo_trainer(
    tmp_path: Path, settings: dict[str, Any], name: str, parameters: dict[str, Any]
) -> None:
    trainer = CPOTrainer(
        model=copy.deepcopy(POLICY),
        args=CPOConfig(output_dir=str(tmp_path), max_length=32, **settings, **COMMON),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
    )
    assert_same_as_pairwise_trainer(trainer, name, parameters)


def test_orpo_is_trls_but_for_the_prompts_likelihood(tmp_path: Path) -> None:
    """The odds-ratio term is TRL's, value and gradient; its likelihood also counts the prompt's tokens."""
    trainer = ORPOTrainer(
        model=copy.deepcopy(POLICY),
        args=ORPOConfig(output_dir=str(tmp_path), beta=0.2, max_length=32, **COMMON),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    chosen, rejected, *_, whole_row_nll = trainer.concatenated_forward(trainer.model, batch)
    odds, *_ = trainer.odds_ratio_loss(chosen, rejected)
    both = trainer.concatenated_inputs(batch, padding_value=0)
    logps, policy = our_logps(
        both["concatenated_input_ids"],
        both["concatenated_attention_mask"],
        both["concatenated_labels"] != -100,
    )
    preference, nll = loss_function("orpo", {"beta": 0.2})(logps)
    assert_same_loss_and_gradient(-odds.mean(), trainer.model, preference.values.mean(), policy)
    theirs, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    response_nll = float(nll.values.sum() / logps.length[logps.chosen].sum())
    assert theirs.item() == pytest.approx(whole_row_nll.item() - odds.mean().item(), rel=1e-5)
    assert abs(whole_row_nll.item() - response_nll) > 0.1


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("seeds", [(0, 7), (7, 0)], ids=["z > 0", "z = 0"])
def test_kto_is_that_of_trls_kto_trainer(tmp_path: Path, beta: float, seeds: tuple[int, int]) -> None:
    """A whole dataset a batch: TRL's rotation is then ours, and its z that of the step."""
    answers = [(row[side], side == "chosen") for row in ROWS for side in ("chosen", "rejected")]
    prompts = [f"{row['prompt']} {word}" for row in ROWS for word in ("one", "two")]
    rows = [
        {"prompt": prompt, "completion": text, "label": label}
        for prompt, (text, label) in zip(prompts, answers, strict=True)
    ]
    policy, reference = (tiny_llama(seed) for seed in seeds)
    trainer = KTOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=KTOConfig(
            output_dir=str(tmp_path),
            beta=beta,
            desirable_weight=1.5,
            undesirable_weight=0.5,
            **{**COMMON, "per_device_train_batch_size": len(rows)},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer._compute_loss(trainer.model, batch, return_outputs=False)

    def rows_of(prefix: str) -> list[tuple[list[int], list[bool]]]:
        names = (f"{prefix}input_ids", f"{prefix}attention_mask", f"{prefix}completion_mask")
        return [
            (ids[mask == 1].tolist(), score[mask == 1].bool().tolist())
            for ids, mask, score in zip(*(batch[name] for name in names), strict=True)
        ]

    matched, mismatched = rows_of(""), rows_of("KL_")
    roles = [Role.CHOSEN if label else Role.REJECTED for label in batch["label"]] + [Role.KL] * len(rows)
    both = [*matched, *mismatched]
    with torch.no_grad():
        reference_logps = torch.stack([plain_logps(reference, *row) for row in both])
    logps = ResponseLogps.of(
        policy=torch.stack([plain_logps(policy, *row) for row in both]),
        reference=reference_logps,
        length=torch.tensor([sum(score) for _, score in both]),
        role=torch.tensor(roles),
        example=torch.arange(len(rows)).repeat(2),
    )
    z = (logps.policy - logps.reference)[logps.role == Role.KL].mean()
    assert (z > 0.1) == (seeds == (0, 7))
    parameters = {"beta": beta, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    ours = step_loss(loss_function("kto", parameters)(logps), logps)
    assert_same_loss_and_gradient(theirs, trainer.model, ours, policy)
    # In the order of the dataset, which the loader shuffles, the couples are ours.
    in_order = [trainer.train_dataset[i] for i in range(len(rows))]
    data = ExampleDataset.from_examples(
        PreferenceExample(row["prompt_ids"], [row["completion_ids"]], [], "") for row in in_order
    )
    ours_mismatched = [list(example.kl_ids) for example in data.mismatched(None)]
    assert ours_mismatched == [[row["KL_completion_ids"]] for row in in_order]


@pytest.mark.parametrize(
    ("beta", "gamma", "alpha"), [(2.0, 0.5, 0.0), (10.0, 3.0, 0.0), (2.0, 0.5, 0.25), (2.0, 0.5, -0.5)]
)
def test_simpo_is_that_of_trls_cpo_trainer(tmp_path: Path, beta: float, gamma: float, alpha: float) -> None:
    """`loss_type="simpo"`, `cpo_alpha=0`: it subtracts γ/β before it multiplies by β, so its γ is ours."""
    trainer = CPOTrainer(
        model=copy.deepcopy(POLICY),
        args=CPOConfig(
            output_dir=str(tmp_path),
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=beta,
            simpo_gamma=gamma,
            alpha=alpha,
            max_length=32,
            **COMMON,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
    )
    assert_same_as_pairwise_trainer(trainer, "simpo", {"beta": beta, "gamma": gamma, "alpha": alpha})


def test_the_batch_tells_the_losses_apart(dpo_trainer: DPOTrainer) -> None:
    """Unequal lengths, log-ratios of several nats, both sides of hinge's kink."""
    batch = next(iter(dpo_trainer.get_train_dataloader()))
    logps, _ = our_logps(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    ratio = (logps.policy - logps.reference).detach()
    hinge = loss_function("hinge", {"beta": 1.0})(logps)[0].values
    assert len(logps.length.unique()) > 3
    assert ratio.abs().max() > 3
    assert (hinge == 0).any()
    assert (hinge > 0).any()
