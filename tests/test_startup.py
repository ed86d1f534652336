"""Policy and reference are the same function at step 0, whatever the architecture, or the run does not start."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DogeConfig, MixtralConfig, OPTConfig, Phi3Config, PhimoeConfig, TrainerCallback

from infopo import InfoPOConfig, InfoPOTrainer
from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack, select
from infopo.errors import ConfigError, LogpsError, ModelError, ReferenceMismatchError
from infopo.lab.tokenizer import build_tokenizer
from infopo.logps import rope
from infopo.logps.forward import path_of, prepare, response_logps
from infopo.logps.wrappers import adapter_moved
from infopo.models import check_fit, disable_dropout
from infopo.noise import in_training, random_modules
from infopo.records import PreferenceExample
from infopo.reference import is_exact, tolerance
from worlds import PLAIN_SGD, VOCABULARY, random_dataset, random_examples, tiny_llama, tiny_of

TOKENIZER = build_tokenizer()
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def trainer_of(
    folder: Path,
    model: Any,
    data: Any = None,
    ref_model: Any = None,
    peft_config: Any = None,
    **settings: Any,
) -> InfoPOTrainer:
    return InfoPOTrainer(
        model=model,
        ref_model=ref_model,
        peft_config=peft_config,
        args=InfoPOConfig(
            output_dir=str(folder), **{**PLAIN_SGD, "max_steps": 2, "bf16": False, "report_to": "none", **settings}
        ),
        train_dataset=random_dataset(8) if data is None else data,
        processing_class=TOKENIZER,
    )  # fmt: skip


def long_and_short(n: int, length: int) -> list[PreferenceExample]:
    """Examples of a few tokens, each second one with a prompt that makes its rows about `length` tokens long."""
    rng = random.Random(0)
    short = random_examples(n, seed=4)
    return [
        PreferenceExample(
            [rng.randrange(3, VOCABULARY) for _ in range(length)] if i % 2 else e.prompt_ids,
            e.chosen_ids, e.rejected_ids, e.row_id,
        )
        for i, e in enumerate(short)
    ]  # fmt: skip


# ---- noise ---------------------------------------------------------------------------------------------------------

NOISY = {
    "mixtral": MixtralConfig(**SIZE, num_local_experts=4, router_jitter_noise=0.3),
    "phimoe": PhimoeConfig(**SIZE, num_local_experts=4, router_jitter_noise=0.5, input_jitter_noise=0.1),
    "opt, layers left out": OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        layerdrop=0.5, dropout=0.5, attention_dropout=0.5, word_embed_proj_dim=32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NOISY)
def test_a_noisy_model_is_in_training_what_it_is_in_evaluation(
    tmp_path: Path, name: str, checkpointing: bool
) -> None:
    """Its function in evaluation stays: jitter of a router may act there, too."""
    batch = pack(random_examples(6, seed=2))
    model = tiny_of(copy.deepcopy(NOISY[name]))  # whose dropout is set to 0
    with torch.no_grad():
        expected = response_logps(model, batch)
        model.train()
        noisy = [response_logps(model, batch) for _ in range(8)]
    assert any(float((value - expected).abs().max()) > 1e-2 for value in noisy)
    trainer = trainer_of(
        tmp_path, model, reference_sides="both", activation_checkpointing=checkpointing, logging_steps=1
    )
    with torch.no_grad():
        assert torch.allclose(response_logps(trainer.model.eval(), batch), expected, atol=1e-4)
        with in_training(trainer.model, random_modules(trainer.model)):
            assert torch.allclose(response_logps(trainer.model, batch), expected, atol=1e-4)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-3)
    assert first["ratio/max"] == pytest.approx(1, abs=1e-3)


class Wobbles(torch.nn.Module):
    """Noise that no name and no code gives away: drawn by a generator that somebody else made."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.draw = random.Random(0).random

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(hidden)
        return hidden * (1 + 0.1 * self.draw()) if self.training else hidden


def test_noise_of_unknown_kind_is_refused_by_the_name_of_its_module(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = Wobbles(model.model.layers[1].mlp.up_proj)
    with pytest.raises(LogpsError, match=r"layers\.1\.mlp\.up_proj \(Wobbles\)"):
        trainer_of(tmp_path, model).train()


def test_noise_that_is_asked_for_is_left_on(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = Wobbles(model.model.layers[1].mlp.up_proj)
    trainer = trainer_of(tmp_path, model, disable_dropout=False, reference_sides="both", learning_rate=1e-30)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/rejected"] != pytest.approx(0, abs=1e-3)


def test_dropout_of_any_class_and_spelling_is_off() -> None:
    model = tiny_llama()
    model.model.extra = torch.nn.Sequential(torch.nn.Dropout2d(0.5), torch.nn.AlphaDropout(0.5))
    model.model.layers[0].drop_path_rate = 0.3
    model.config.resid_drop = 0.2
    disable_dropout(model)
    assert [layer.p for layer in model.model.extra] == [0.0, 0.0]
    assert model.model.layers[0].drop_path_rate == model.config.resid_drop == 0.0


# ---- step 0 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_wrong_reference_is_found_before_the_first_update_in_every_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, autocast: bool
) -> None:
    trainer = trainer_of(tmp_path, tiny_llama(dtype=dtype), bf16=autocast)
    trainer.train()
    trainer = trainer_of(tmp_path, tiny_llama(dtype=dtype), bf16=autocast)
    trainer.train_dataset = trainer.train_dataset.with_reference(trainer.train_dataset.reference - 2.0)
    with pytest.raises(ReferenceMismatchError, match="differ by 2"):
        trainer.train()


def test_one_tolerance_grows_with_the_tokens_and_with_the_noise_that_was_measured() -> None:
    assert tolerance(0, is_exact=True) == pytest.approx(5e-4)
    assert tolerance(400, is_exact=True) == pytest.approx(21 * 5e-4)
    assert tolerance(400, is_exact=False) == pytest.approx(2.1)
    assert tolerance(400, is_exact=False, noise=1e-9) == pytest.approx(21 * 0.02)
    assert tolerance(400, is_exact=False, noise=0.01) == pytest.approx(21 * 0.05)
    assert tolerance(400, is_exact=False, noise=9.0) == pytest.approx(2.1)


@pytest.fixture
def _products_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_products_as_before")
def test_products_that_the_user_made_faster_are_not_taken_for_exact() -> None:
    device = torch.device("cpu")
    assert is_exact(tiny_llama(), device)
    assert not is_exact(tiny_llama(dtype=torch.bfloat16), device)
    assert not is_exact(tiny_llama(), device, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    torch.set_float32_matmul_precision("medium")
    assert not is_exact(tiny_llama(), device)


# ---- rotary frequencies that depend on the row ---------------------------------------------------------------------

BOUNDARY = 24


def longrope(kind: str = "longrope") -> Any:
    parameters = {
        "rope_type": kind, "rope_theta": 1e4, "factor": 8.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
        "original_max_position_embeddings": BOUNDARY,
    }  # fmt: skip
    return Phi3Config(**SIZE, original_max_position_embeddings=BOUNDARY, rope_parameters=parameters)


@pytest.mark.parametrize("setting", ["auto", "naive"])
def test_rows_on_either_side_of_longropes_boundary_keep_their_log_probs_in_company(setting: str) -> None:
    model = tiny_of(longrope())
    prepare([model], setting)
    assert rope.boundary(model) == BOUNDARY
    batch = pack(long_and_short(6, 40))
    together = response_logps(model, batch)
    alone = torch.cat(
        [response_logps(model, select(batch, [r]), "naive") for r in range(batch.num_responses)]
    )
    assert torch.allclose(together, alone, atol=1e-4)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(together.sum(), parameters), torch.autograd.grad(alone.sum(), parameters)
    ):
        assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


def test_the_boundary_lies_between_the_rows_that_the_model_itself_tells_apart() -> None:
    """One example, whose chosen response ends at the boundary and whose rejected one ends behind it."""
    model = tiny_of(longrope())
    prompt = list(range(3, 3 + BOUNDARY - 4))
    batch = pack([PreferenceExample(prompt, [[5, 6, 7, 8]], [[9, 6, 7, 8, 10]], "row")])
    with torch.no_grad():
        together = response_logps(model, batch)
        alone = torch.cat([response_logps(model, select(batch, [r]), "naive") for r in range(2)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_a_run_with_rows_on_both_sides_has_no_rewards_before_it_learns(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, tiny_of(longrope()), ExampleDataset.from_examples(long_and_short(8, 40)), learning_rate=1e-30,
        per_device_train_batch_size=2, train_sampling_strategy="sequential", max_steps=4, logging_steps=1,
    )  # fmt: skip
    trainer.train()
    records = [r for r in trainer.state.log_history if "loss" in r]
    assert [r["rewards/rejected"] for r in records] == pytest.approx([0] * 4, abs=1e-3)


def test_virtual_tokens_count_towards_the_boundary() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert rope.boundary(peft.get_peft_model(tiny_of(longrope()), config)) == BOUNDARY - 3
    assert rope.boundary(tiny_llama()) is None


def test_rows_beyond_the_scale_of_dynamic_frequencies_are_refused() -> None:
    """There, frequencies depend on the longest row that the model has seen since it was loaded."""
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ModelError, match="at most 256 tokens"):
        check_fit(model, 257, 5)


# ---- rows as long as the data's longest ----------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["auto", "naive"])
def test_rows_of_an_attention_with_a_mask_of_its_own_are_neither_shared_nor_padded(
    tmp_path: Path, setting: str
) -> None:
    """Doge keeps the best keys of each query beyond its window, and padding decides which."""
    model = tiny_of(DogeConfig(**SIZE, keep_window_size=24))
    assert "DogeAttention is given a mask" in str(prepare([model], "auto")[1])
    prepare([model], setting)
    examples = long_and_short(4, 60)
    batch = pack(examples)
    with torch.no_grad():
        together = response_logps(model, batch)
        alone = torch.cat([response_logps(model, select(batch, [r]), "naive") for r in range(len(together))])
    assert torch.allclose(together, alone, atol=1e-4)
    trainer_of(tmp_path, model, ExampleDataset.from_examples(examples), logps_path=setting).train()


class LooksAtTheLongest(torch.nn.Module):
    """Beyond 100 tokens, a batch's rows are scaled by its width: fine for each row alone, and for short ones."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(hidden)
        return hidden * (1 + hidden.shape[1] / 1000) if hidden.shape[1] > 100 else hidden


def test_what_goes_wrong_on_rows_as_long_as_the_longest_only_is_found_before_the_first_step(
    tmp_path: Path,
) -> None:
    model = tiny_llama()
    model.model.norm = LooksAtTheLongest(model.model.norm)
    trainer_of(tmp_path, model, ExampleDataset.from_examples(long_and_short(4, 40))).train()
    with pytest.raises(
        LogpsError, match=r"beside a row of 1[0-9][0-9] tokens, as long as the data's longest"
    ):
        trainer_of(tmp_path, model, ExampleDataset.from_examples(long_and_short(4, 120))).train()


def test_the_longest_row_is_found_wherever_it_is() -> None:
    examples = random_examples(9, seed=1, chosen=(1, 2, 0), rejected=(1, 3))
    dataset = ExampleDataset.from_examples(examples)
    example, response = dataset.longest_response
    assert len(example.prompt_ids) + len(response) == dataset.longest_row
    assert response in [list(ids) for ids in example.response_ids]


class Paths(TrainerCallback):
    """Notes on which path each step of training and of evaluation ran."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.seen.append(path_of(model))

    on_prediction_step = on_step_end


def test_models_have_their_own_attention_after_training_and_after_evaluation(tmp_path: Path) -> None:
    data, paths, model, reference = random_dataset(8), Paths(), tiny_llama(), tiny_llama()
    trainer = InfoPOTrainer(
        model, reference, InfoPOConfig(str(tmp_path), reference="live", **PLAIN_SGD | {"max_steps": 2}),
        train_dataset=data, processing_class=build_tokenizer(), callbacks=[paths],
    )  # fmt: skip
    for run in (trainer.train, lambda: trainer.evaluate(random_dataset(4)), trainer.train):
        run()
        assert {m.config._attn_implementation for m in (model, reference)} == {"sdpa"}
        assert set(paths.seen) == {"forest"}
        paths.seen.clear()


def test_an_adapter_that_is_0_at_first_is_tested_as_it_will_be(tmp_path: Path) -> None:
    """LILY weighs its experts by a mean over all tokens of a batch, also those that come later."""
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "LilyConfig"):
        pytest.skip("this version of peft has no such adapter")
    lily = peft.LilyConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)
    model = peft.get_peft_model(tiny_llama(), lily)
    with pytest.raises(LogpsError, match="the log-prob of a"):
        trainer_of(tmp_path, model).train()


def test_testing_an_adapter_leaves_weights_and_random_numbers_as_they_were() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    with adapter_moved(model) as is_moved:
        assert is_moved
        changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(random_state)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("backend", "adapter"),
    [("aot_eager", None), ("eager", LoraConfig(r=2, target_modules=["q_proj"]))],
    ids=["all weights", "LoRA"],
)
def test_a_compiled_policy_trains_as_one_that_is_not(tmp_path: Path, backend: str, adapter: Any) -> None:
    def trained(**settings: Any) -> tuple[str, torch.Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = tiny_llama()
        if adapter is not None:
            model = get_peft_model(model, adapter)
        trainer = trainer_of(tmp_path, model, reference_store="off", save_strategy="no", **settings)
        trainer.train()
        return trainer.logps_in_words, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    _, expected = trained(logps_path="naive")
    path, values = trained(torch_compile=True, torch_compile_backend=backend)
    assert path == "each prompt once, without padding (the parts of its layers compiled)"
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)


class Seen(TrainerCallback):
    """Notes whether a module is compiled when a step is over."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.compiled: list[bool] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.compiled.append(self.module._compiled_call_impl is not None)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_trainers_of_one_process_compile_each_as_it_was_asked(tmp_path: Path, order: tuple[int, ...]) -> None:
    """accelerate keeps one setting for all. Settings of all are made first, and trainers after them."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    wanted = [compiled, compiled | {"logps_path": "naive"}, {}]
    arguments = [
        InfoPOConfig(str(tmp_path / str(n)), **PLAIN_SGD | {"max_steps": 1} | wanted[n]) for n in order
    ]
    trainers = [
        InfoPOTrainer(
            tiny_llama(), args=a, train_dataset=random_dataset(4), processing_class=build_tokenizer()
        )
        for a in arguments
    ]
    for number, trainer in zip(order, trainers, strict=True):
        layer, seen = trainer.model.model.layers[0], Seen(trainer.model.model.layers[0].mlp)
        trainer.add_callback(seen)
        trainer.train()
        whole = isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
        assert whole == (number == 1)
        assert seen.compiled == [number == 0]
        assert layer.mlp._compiled_call_impl is None


@pytest.mark.parametrize("name", ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_checkpointing_that_loses_the_gradient_of_the_experts_balance_is_refused(
    tmp_path: Path, name: str
) -> None:
    settings = {name: {"use_reentrant": True}}
    model = tiny_of(MixtralConfig(**SIZE, num_local_experts=4))
    with pytest.raises(
        ConfigError, match="use_reentrant=True leaves the load-balancing loss of experts without"
    ):
        trainer_of(tmp_path, model, router_aux_loss_coef=0.1, activation_checkpointing=True, **settings)
    trainer_of(tmp_path, model, router_aux_loss_coef=0.0, activation_checkpointing=True, **settings)
    trainer_of(tmp_path, model, router_aux_loss_coef=0.1, activation_checkpointing=False, **settings)
