"""Shared prefixes: log-probs and gradients of the naive path, on every family; a model that cannot share says why."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BloomConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from families import (
    EXAMPLES,
    FAMILIES,
    NO_GROUPS,
    SMALL,
    assert_agree,
    assert_same_gradients,
    prepared,
    results,
)
from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack, select
from infopo.errors import LogpsError
from infopo.lab.tokenizer import build_tokenizer
from infopo.logps import attention, flash, kernels
from infopo.logps.forward import path_of, prepare, response_logps, self_test
from infopo.logps.layout import ForestLayout
from infopo.logps.registration import forest_attention, replacement_name
from infopo.logps.wrappers import base_of
from infopo.models import disable_dropout
from infopo.records import PreferenceExample
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, random_examples, tiny_llama, tiny_of


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return prepared(request.param)


def test_values_and_gradients_are_those_of_the_naive_path(model: torch.nn.Module) -> None:
    assert_agree(model, pack(EXAMPLES))


class NothingIsRead(TorchDispatchMode):
    """Refuses what reads a value of a tensor, for which the host would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "family", ["llama", "mistral, sliding window", "gemma2, soft cap", "gemma3", "gpt-neox"]
)
def test_forward_and_backward_pass_wait_for_no_value(family: str) -> None:
    model, batch = tiny_of(FAMILIES[family]), pack(EXAMPLES)
    disable_dropout(model)
    assert attention.enable(model) is None
    with NothingIsRead():
        response_logps(model, batch).sum().backward()


def test_changing_a_token_of_one_response_moves_no_other(model: torch.nn.Module) -> None:
    base = pack(EXAMPLES)
    with torch.no_grad():
        before = response_logps(model, base)
        for victim in range(base.num_responses):
            tokens = base.input_ids.clone()
            first = base.segment_start[base.leaf[victim]]  # of what is its own
            tokens[first] = tokens[first] % 60 + 1
            moved = (response_logps(model, replace(base, input_ids=tokens)) - before).abs()
            assert moved[victim] > 1e-4
            moved[victim] = 0
            assert moved.max() < 2e-5


def test_padded_rows_and_generation_are_as_before(model: torch.nn.Module) -> None:
    """Left padding is what a mask that got lost would break."""
    rows = torch.tensor([[0, 0, 0, 5, 6, 7], [8, 9, 10, 11, 12, 13]])
    inputs = {"input_ids": rows, "attention_mask": (rows > 0).long()}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_forest = model.generate(**inputs, **settings), model(**inputs).logits[:, -1]
    attention.disable(model)
    assert path_of(model) == "padded"
    assert torch.equal(with_forest[0], model.generate(**inputs, **settings))
    torch.testing.assert_close(with_forest[1], model(**inputs).logits[:, -1], rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2, soft cap", "mistral, sliding window"])
def test_recomputed_activations_give_the_same_gradients(family: str, reentrant: bool) -> None:
    model = tiny_of(FAMILIES[family])
    assert attention.enable(model) is None
    _, expected = results(model, pack(EXAMPLES), "naive")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, gradients = results(model, pack(EXAMPLES), "forest")
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt-neox"])
def test_adapters_get_the_same_gradients(family: str) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_of(FAMILIES[family]), lora)
    disable_dropout(model)
    assert attention.enable(model) is None
    assert path_of(model) == "forest"
    assert_agree(model, pack(EXAMPLES))


def test_the_model_within_an_adapter_is_itself() -> None:
    """PEFT sets attributes of its wrapper on it, too."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    base = tiny_llama()
    adapted = peft.get_peft_model(base, lora)
    assert hasattr(base, "peft_config")
    assert base_of(adapted) is base_of(base) is base


def test_responses_in_any_order_keep_their_log_probs() -> None:
    model, batch = tiny_llama(), pack(EXAMPLES)
    assert attention.enable(model) is None
    order = list(range(batch.num_responses))[::-1]
    with torch.no_grad():
        torch.testing.assert_close(
            response_logps(model, select(batch, order)),
            response_logps(model, batch)[order],
            rtol=0,
            atol=2e-5,
        )


class AllLogits(LlamaForCausalLM):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **kwargs)


def prompt_tuned() -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        tiny_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )


@pytest.mark.parametrize(("make", "reason"), [
    (lambda: tiny_of(BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)), "exchanged|its attention is"),
    (lambda: tiny_of(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"])), "layers of type conv"),
    (lambda: tiny_of(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4)), "it has dropout"),
    (lambda: tiny_of(LlamaConfig(**SMALL, attention_dropout=0.1)), "it has dropout"),
    (prompt_tuned, "virtual tokens"),
    (lambda: tiny_of(BertConfig(**NO_GROUPS, is_decoder=False)), "not causal"),
    (lambda: AllLogits(LlamaConfig(**SMALL)), "logits of all positions"),
    (lambda: torch.nn.Linear(2, 2), "not a model of transformers"),
], ids=["interface", "convolutions", "dropout modules", "attention dropout", "prompt tuning", "both ways", "all logits",
        "no model"])  # fmt: skip
def test_a_model_that_cannot_share_says_why_and_stays_as_it_was(make: Any, reason: str) -> None:
    model = make()
    before = attention.implementation_of(model)
    given = attention.enable(model)
    assert given is not None
    assert re.search(reason, given)
    assert attention.implementation_of(model) == before
    assert path_of(model) != "forest"


def test_an_attention_keyword_that_is_not_honoured_is_refused_not_swallowed() -> None:
    q = torch.randn(1, 2, 3, 4)
    layout = ForestLayout([0, 3], [-1])
    forest_attention(torch.nn.Identity(), q, q, q, layout, position_ids=torch.arange(3))
    with pytest.raises(LogpsError, match="chunk_size"):
        forest_attention(torch.nn.Identity(), q, q, q, layout, chunk_size=2)
    with pytest.raises(LogpsError, match="dropout"):
        forest_attention(torch.nn.Identity(), q, q, q, layout, dropout=0.1)


def test_a_model_that_loses_the_layout_on_its_way_takes_padded_rows() -> None:
    """Its layers would attend to every token before them, whoever's it is. One layer, tried on no data, says so."""
    model = tiny_of(NemotronConfig(**SMALL))
    random_state = torch.get_rng_state()
    assert prepare([model], "auto") == (
        "padded",
        "NemotronAttention is not given the layout of its batch, because its model does not pass unknown keywords on",
    )
    assert torch.get_rng_state().equal(random_state)
    torch.testing.assert_close(
        response_logps(model, pack(EXAMPLES)),
        response_logps(model, pack(EXAMPLES), "naive"),
        atol=1e-4, rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [None, False])
def test_an_adapter_that_acts_from_certain_tokens_on_takes_padded_rows(
    tmp_path: Path, checkpointing: bool | None
) -> None:
    """aLoRA looks for its tokens in a row. It is 0 at first, so that no comparison finds it out in a shared row."""
    peft = pytest.importorskip("peft")
    examples = [replace(example, prompt_ids=[5, *example.prompt_ids]) for example in EXAMPLES]
    adapter = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"
    )
    trainer = InfoPOTrainer(
        tiny_llama(), peft_config=adapter, train_dataset=ExampleDataset.from_examples(examples),
        processing_class=build_tokenizer(),
        args=InfoPOConfig(str(tmp_path), max_steps=2, **PLAIN_SGD | {"learning_rate": 1.0, "optim": "adamw_torch",
                                                                     "activation_checkpointing": checkpointing}),
    )  # fmt: skip
    assert "acts from certain tokens of a row on" in trainer.logps_in_words
    trainer.train()
    model, batch = trainer.model.eval(), pack(examples)
    ours, expected = response_logps(model, batch), response_logps(model, batch, "naive")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(response_logps(model, batch, "naive"), expected, atol=0.1)


def test_a_model_that_cannot_be_tried_and_loses_the_layout_is_refused_by_name() -> None:
    class NeedsMore(NemotronForCausalLM):
        def __init__(self, config: NemotronConfig, more: int) -> None:
            super().__init__(config)

    model = NeedsMore(NemotronConfig(**SMALL), 1)
    assert attention.enable(model) is None
    with pytest.raises(
        LogpsError, match=r"NemotronAttention is not given the layout .* set logps_path to 'naive'"
    ):
        response_logps(model, pack(EXAMPLES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_test_finds_a_path_that_disagrees(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """What an architecture does with position ids is its own: this one does not look at them."""
    model, batch = tiny_llama(dtype=dtype), pack(EXAMPLES)
    exact = dtype == torch.float32
    assert attention.enable(model) is None
    alone = [select(batch, [r]) for r in range(batch.num_responses)]
    assert self_test(model, batch, alone, exact=exact) < (1e-4 if exact else 1.0)
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda **kwargs: forward(**{k: v * 0 if k == "position_ids" else v for k, v in kwargs.items()}),
    )
    with pytest.raises(LogpsError, match=r"LlamaForCausalLM: .*set logps_path to 'naive'"):
        self_test(model, batch, alone, exact=exact)


def trained(tmp_path: Path, **settings: Any) -> list[torch.Tensor]:
    model = tiny_llama()
    args = InfoPOConfig(output_dir=str(tmp_path), **{**PLAIN_SGD, "max_steps": 3, **settings})
    data = random_dataset(12, chosen=(1, 2), rejected=(1, 3))
    InfoPOTrainer(model=model, args=args, train_dataset=data, processing_class=build_tokenizer()).train()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("settings", [
    {},
    {"activation_checkpointing": True},
    {"reference": "live"},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
], ids=["plain", "checkpointing", "live reference", "accumulation"])  # fmt: skip
def test_both_paths_train_to_the_same_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    caplog.set_level("INFO", "infopo")
    ours = trained(tmp_path, **{"per_device_train_batch_size": 4, **settings})
    assert "log-probs: each prompt once, without padding" in caplog.text
    naive = trained(tmp_path, logps_path="naive", **{"per_device_train_batch_size": 4, **settings})
    assert (
        "log-probs: one padded row per response, logits of every position (logps_path is 'naive')"
        in caplog.text
    )
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_a_saved_model_does_not_name_an_attention_that_only_this_package_knows(tmp_path: Path) -> None:
    model = tiny_llama()
    assert attention.enable(model) is None
    model.save_pretrained(tmp_path)
    assert "infopo" not in (tmp_path / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["llama", "gemma2, soft cap", "gpt-oss, sinks"])
@pytest.mark.parametrize("length", [64, 400])
def test_the_self_test_takes_rounding_of_long_responses_for_what_it_is(family: str, length: int) -> None:
    """In half precision a response's log-prob moves with the order of sums, and padding does not show by how much."""
    model = prepared(family).to(torch.bfloat16)
    prompt, response = [5 + i % 50 for i in range(200)], [7 + i % 40 for i in range(length)]
    batch = pack([PreferenceExample(prompt, [response], [response[1:], response[:9]], "long")])
    alone = [select(batch, [r]) for r in range(batch.num_responses)]
    self_test(model, batch, alone, exact=False)


FORESTS = {
    "pairs": pack(random_examples(5, chosen=(1, 1), rejected=(1, 2))),
    "lists and a tree": pack(EXAMPLES),
    "long": pack([
        PreferenceExample([5] * n, [[7] * 90 + [8] * a, [7] * 90 + [9]], [[9] * b, [9] * b + [4], [3]], "long")
        for n, a, b in ((300, 1, 200), (128, 128, 128), (1, 500, 3), (257, 40, 129))
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORESTS)
def test_each_run_is_given_the_keys_that_it_sees_and_each_token_all_its_gradients(name: str) -> None:
    batch = FORESTS[name]
    layout = ForestLayout(batch.segment_start, batch.segment_parent)
    index = layout.key_index()
    begins = [0, *itertools.accumulate(layout.sizes)]
    expected = []
    for run, context in enumerate(layout.context):
        for other, tokens in context:
            expected += range(begins[other], begins[other] + tokens)
        expected += range(begins[run], begins[run + 1])
    assert index.source.tolist() == expected
    assert index.ends_of_keys.tolist() == [
        0, *itertools.accumulate(layout.keys_of(run) for run in range(len(layout.sizes)))
    ]  # fmt: skip
    tokens = torch.randn(len(batch.input_ids), 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(expected), 2, 3, dtype=torch.float64)
    (flash._SeenByRuns.apply(tokens, index) * weight).sum().backward()
    torch.testing.assert_close(
        tokens.grad, torch.zeros_like(tokens).index_add(0, index.source, weight).detach()
    )


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 700])
@pytest.mark.parametrize("name", FORESTS)
def test_blocks_listed_from_the_runs_are_those_of_the_predicate(name: str, window: int | None) -> None:
    """Peer: torch's own listing, which asks for every pair of tokens."""
    batch = FORESTS[name]
    layout = ForestLayout(batch.segment_start, batch.segment_parent)
    partial, full = layout.blocks(window)
    ours = layout.block_mask(window, torch.device("cpu"))
    size = len(batch.input_ids)
    seen = kernels.flex.create_mask(ours.mask_mod, None, None, size, size, "cpu")[0, 0]
    assert seen.diagonal().all()
    count = len(partial)
    padded = F.pad(seen, (0, count * 128 - size, 0, count * 128 - size))
    blocks = padded.reshape(count, 128, count, 128).permute(0, 2, 1, 3).flatten(2)
    some, all_ = blocks.any(2).numpy(), blocks.all(2).numpy()
    assert ((partial | full) == some).all()
    assert not (full & ~all_).any()
    assert not (partial & full).any()
    if name == "long" and window is None:
        assert (
            full == all_
        ).mean() > 0.95  # a block that is seen as a whole is cheaper, so nearly all should be listed
    dense = ours.to_dense()[0, 0].bool().numpy()
    assert (dense == some).all()


@pytest.mark.parametrize(
    "original", ["flash_attention_2", "flash_attention_3", "kernels-community/vllm-flash-attn3"]
)
def test_a_model_loaded_with_flash_attention_shares_prompts_and_has_it_back(
    monkeypatch: pytest.MonkeyPatch, original: str
) -> None:
    """No flash attention runs on a CPU: what is tested is the name that shared prefixes go by, and what goes past."""
    model, batch = tiny_llama(), pack(EXAMPLES)
    expected = response_logps(model, batch, "naive")
    seen = []

    def flash(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(module.config._attn_implementation)  # what transformers chooses its kernel by
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, original, flash)
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, original, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    monkeypatch.setattr(
        type(model), "_check_and_adjust_attn_implementation", lambda self, name, **kwargs: name
    )
    model.set_attn_implementation(original)
    assert attention.enable(model) is None
    assert path_of(model) == "forest"
    assert attention.implementation_of(model) == original
    torch.testing.assert_close(response_logps(model, batch), expected, rtol=0, atol=1e-4)
    assert seen == []
    torch.testing.assert_close(response_logps(model, batch, "padded"), expected, rtol=0, atol=1e-4)
    assert set(seen) == {original}
    assert attention.is_enabled(model)
    attention.disable(model)
    assert model.config._attn_implementation == original


def test_an_attention_of_unknown_kind_is_not_replaced() -> None:
    """It may compute something else."""
    assert replacement_name("my_attention") is None
    assert replacement_name("flex_attention") is None
    assert replacement_name("paged|sdpa") is None
