"""The chunked head: log softmax of the whole logits, in values and gradients, without ever holding them."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    PreTrainedModel,
    ProphetNetConfig,
    RecurrentGemmaConfig,
)

from infopo.data.packing import pack, select
from infopo.errors import LogpsError
from infopo.logps import agreement, attention, lm_head
from infopo.logps.forward import path_of, prepare, response_logps, self_test
from infopo.logps.lm_head import LogitMap, token_logps
from infopo.models import disable_dropout
from infopo.records import PackedBatch, PreferenceExample
from worlds import random_examples, tiny_llama, tiny_of

MAPS = {
    "as they are": LogitMap(),
    "scaled": LogitMap(scale=0.3),
    "capped": LogitMap(softcap=2.0),
    "both": LogitMap(scale=3.0, softcap=2.0),
}


@pytest.fixture(params=MAPS)
def logit_map(request: pytest.FixtureRequest) -> LogitMap:
    return MAPS[request.param]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in both directions, some of them kept and some computed again, and none that fits evenly."""
    monkeypatch.setitem(lm_head.TILE_LOGITS, "cpu", 15)
    monkeypatch.setitem(lm_head.TILE_COLUMNS, "cpu", 5)
    monkeypatch.setitem(lm_head.KEPT_LOGITS, "cpu", 40)


def tensors(
    dtype: torch.dtype, scored: int = 7, width: int = 4, vocabulary: int = 13
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((scored, width), (vocabulary, width), (vocabulary,))
    )
    return hidden, weight, bias, torch.randint(vocabulary, (scored,), generator=generator)


def whole(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor, logit_map: LogitMap
) -> torch.Tensor:
    logits = logit_map.scale * (hidden @ weight.T + bias)
    if logit_map.softcap is not None:
        logits = logit_map.softcap * torch.tanh(logits / logit_map.softcap)
    return logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


@pytest.mark.usefixtures("small_tiles")
def test_the_agreement_beside_log_probs_is_that_of_the_whole_logits(logit_map: LogitMap) -> None:
    hidden, weight, bias, targets = tensors(torch.float64)
    plain = token_logps(hidden, weight, bias, targets, logit_map)
    with agreement.measured(True):
        both = token_logps(hidden, weight, bias, targets, logit_map)
    every = torch.stack(
        [whole(hidden, weight, bias, torch.full_like(targets, v), logit_map) for v in range(len(weight))]
    )
    torch.testing.assert_close(both[:, 0], plain, rtol=0, atol=0)
    torch.testing.assert_close(both[:, 1], plain - every.exp().square().sum(0).log())
    grads = [torch.autograd.grad(out.sum(), (hidden, weight, bias)) for out in (plain, both)]
    for of_plain, of_both in zip(*grads, strict=True):
        torch.testing.assert_close(of_both, of_plain, rtol=0, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_values_and_gradients_are_those_of_the_whole_logits(logit_map: LogitMap) -> None:
    hidden, weight, bias, targets = tensors(torch.float64)
    torch.testing.assert_close(
        token_logps(hidden, weight, bias, targets, logit_map), whole(hidden, weight, bias, targets, logit_map)
    )
    torch.autograd.gradcheck(lambda h, w, b: token_logps(h, w, b, targets, logit_map), (hidden, weight, bias))


@pytest.mark.usefixtures("small_tiles")
def test_a_frozen_part_costs_and_gets_no_gradient() -> None:
    hidden, weight, bias, targets = tensors(torch.float64)
    token_logps(hidden, weight.detach(), None, targets).sum().backward()
    assert hidden.grad is not None
    hidden.grad = None
    token_logps(hidden.detach(), weight, bias.detach(), targets).sum().backward()
    assert hidden.grad is None
    assert bias.grad is None
    assert weight.grad is not None


@pytest.mark.usefixtures("small_tiles")
def test_a_second_backward_pass_gives_the_gradients_of_the_first() -> None:
    """The first writes over the logits that were kept."""
    hidden, weight, bias, targets = tensors(torch.float64)
    loss = token_logps(hidden, weight, bias, targets).square().sum()
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(a, b)


def test_halves_are_multiplied_as_halves_and_summed_in_float32() -> None:
    hidden, weight, bias, targets = tensors(torch.bfloat16, scored=40, width=64, vocabulary=97)
    got = token_logps(hidden, weight, bias, targets)
    expected = whole(*(t.detach().float() for t in (hidden, weight, bias)), targets, LogitMap())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # bfloat16 logits would be off by 1e-1 here
    got.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_the_gradient_of_half_weights_does_not_depend_on_the_number_of_tiles(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """A sum over 32 tiles in bfloat16 would be off by ten times as much as one product is."""
    hidden, weight, _, targets = tensors(torch.bfloat16, scored=128, width=64, vocabulary=97)
    monkeypatch.setitem(lm_head.TILE_LOGITS, "cpu", 97 * (128 // rows))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    bias = torch.zeros(97, dtype=torch.float64)
    expected = torch.autograd.grad(whole(*exact, bias, targets, LogitMap()).sum(), exact)
    got = torch.autograd.grad(token_logps(hidden, weight, None, targets).sum(), (hidden, weight))
    for ours, exactly in zip(got, expected, strict=True):
        assert (ours.double() - exactly).norm() / exactly.norm() < 4e-3  # rounding to bfloat16 alone: 2e-3


def test_no_scored_token_gives_a_gradient_of_zero() -> None:
    hidden, weight, _, targets = tensors(torch.bfloat16, scored=0)
    token_logps(hidden, weight, None, targets).sum().backward()
    assert weight.grad.abs().max() == 0


def test_under_autocast_the_product_has_its_precision() -> None:
    hidden, weight, bias, targets = tensors(torch.float32, scored=40, width=64, vocabulary=97)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logps(hidden, weight, bias, targets)
    rounded = (hidden.detach().bfloat16().float(), weight.detach().bfloat16().float(), bias.detach())
    torch.testing.assert_close(got, whole(*rounded, targets, LogitMap()), rtol=0, atol=1e-4)
    got.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    """The most elements that any tensor has which is made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("scored", [1000, 4000])
def test_memory_does_not_grow_with_vocabulary_times_tokens(
    monkeypatch: pytest.MonkeyPatch, scored: int
) -> None:
    monkeypatch.setitem(lm_head.TILE_LOGITS, "cpu", 2**14)
    monkeypatch.setitem(lm_head.KEPT_LOGITS, "cpu", 2**16)
    hidden, weight, bias, targets = tensors(torch.float32, scored=scored, width=4, vocabulary=5000)
    with Largest() as largest:
        token_logps(hidden, weight, bias, targets).sum().backward()
    assert largest.numel <= max(2**14, weight.numel(), hidden.numel())


def test_logits_are_kept_up_to_a_bound_and_only_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lm_head.TILE_LOGITS, "cpu", 2**14)
    monkeypatch.setitem(lm_head.KEPT_LOGITS, "cpu", 2**16)
    hidden, weight, bias, targets = tensors(torch.float32, scored=1000, width=4, vocabulary=5000)
    kept = token_logps(hidden, weight, bias, targets).grad_fn.kept.values()  # type: ignore[union-attr]
    assert 2**15 < sum(logits.numel() for logits in kept) <= 2**16
    with torch.no_grad():
        assert token_logps(hidden, weight, bias, targets).grad_fn is None


# ---- inside models -----------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS: dict[str, Callable[[], PreTrainedModel]] = {
    "plain": tiny_llama,
    "tied": lambda: tiny_of(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "capped": lambda: tiny_of(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=1.5)),
    "multiplied": lambda: tiny_of(CohereConfig(**SMALL, logit_scale=0.25)),
    "divided": lambda: tiny_of(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "with a bias, attention not exchangeable": lambda: tiny_of(
        GPTJConfig(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, resid_pdrop=0.0,
                   embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3)
    ),
}  # fmt: skip
EXAMPLES = random_examples(5, chosen=(1, 0, 2), rejected=(1, 2))


def results(model: torch.nn.Module, batch: PackedBatch, path: str | None) -> list[torch.Tensor]:
    model.zero_grad()
    values = response_logps(model, batch, path)
    (values * torch.linspace(-1, 2, batch.num_responses, dtype=values.dtype)).sum().backward()
    return [values.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("path", ["padded", "forest"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_agrees_with_the_naive_path(head: str, path: str) -> None:
    model = HEADS[head]()
    if "bias" in head:
        torch.nn.init.normal_(model.lm_head.bias)
    disable_dropout(model)
    if path == "forest" and (reason := attention.enable(model)):
        assert "exchange" in reason
        return
    assert path_of(model) == path
    ours, expected = results(model, pack(EXAMPLES), None), results(model, pack(EXAMPLES), "naive")
    largest = max(float(g.abs().max()) for g in expected[1:])
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=1e-4)
    for a, b in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * largest)


FOUND_OUT: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "divides by the setting": (HEADS["divided"], "forest"),
    "caps under the usual name": (HEADS["capped"], "forest"),
    "multiplies by the setting that others divide by": (
        lambda: tiny_of(HyperCLOVAXConfig(**SMALL, logits_scaling=0.25)), "forest",
    ),
    "a factor under a name of its own": (
        lambda: tiny_of(FalconH1Config(**SMALL, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4,
                                       mamba_d_head=8, mamba_d_state=8)), "padded",
    ),
    "a cap under a name of its own": (
        lambda: tiny_of(RecurrentGemmaConfig(**SMALL, lru_width=32, attention_window_size=8, logits_soft_cap=1.5,
                                             block_types=["recurrent", "attention"])), "padded",
    ),
    "several streams through one head": (
        lambda: tiny_of(ProphetNetConfig(vocab_size=61, hidden_size=32, num_decoder_layers=2, decoder_ffn_dim=48,
                                         num_decoder_attention_heads=4, add_cross_attention=False)), "naive",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", FOUND_OUT)
def test_what_a_model_does_to_its_logits_is_found_out_and_not_read_off_names(model: str) -> None:
    make, path = FOUND_OUT[model]
    policy = make()
    disable_dropout(policy)
    assert prepare([policy], "auto")[0] == path
    batch = pack(EXAMPLES)
    ours, expected = results(policy, batch, None), results(policy, batch, "naive")
    assert float(ours[0].abs().max()) > 1
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=1e-4)
    largest = max(float(g.abs().max()) for g in expected[1:])
    for a, b in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * largest)


def test_logits_that_no_factor_and_no_cap_explain_are_taken_whole() -> None:
    model = tiny_llama()
    model.register_forward_hook(lambda model, args, output: setattr(output, "logits", output.logits.sin()))
    assert prepare([model], "auto") == ("forest", None)
    assert lm_head.plain_head(model) is None
    torch.testing.assert_close(
        response_logps(model, pack(EXAMPLES)),
        response_logps(model, pack(EXAMPLES), "naive"),
        rtol=0,
        atol=1e-4,
    )


def test_a_head_with_an_adapter_gives_its_logits() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(), config).eval()
    assert path_of(model) == "naive"
    expected = results(model, pack(EXAMPLES), "naive")
    assert prepare([model], "auto") == ("forest", None)
    for a, b in zip(results(model, pack(EXAMPLES), None), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


class Louder(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("how", ["another class", "another forward"])
def test_a_head_that_is_more_than_a_linear_layer_is_left_alone(how: str) -> None:
    model = tiny_llama()
    if how == "another class":
        model.lm_head.__class__ = Louder
    else:  # as offloading does
        plain = model.lm_head.forward
        model.lm_head.forward = lambda hidden: 2 * plain(hidden)
    assert path_of(model) == "naive"


@pytest.mark.parametrize("path", ["padded", "forest"])
def test_inside_a_model_too_no_tensor_has_the_size_of_its_logits(path: str) -> None:
    model = tiny_of(LlamaConfig(**SMALL | {"vocab_size": 3000}))
    batch = pack([PreferenceExample(list(range(3, 43)), [[5, 6], [7, 8, 9]], [], "row")])
    assert attention.enable(model) is None
    with Largest() as largest:
        response_logps(model, batch, path).sum().backward()
    assert largest.numel <= 3000 * 32  # the embeddings
    with Largest() as largest:
        response_logps(model, batch, "naive")
    assert largest.numel >= 2 * 43 * 3000  # and so would have been found


def test_no_hook_stays_behind_even_when_the_model_fails() -> None:
    model = tiny_llama()
    batch = pack(EXAMPLES)
    response_logps(model, batch, "padded")
    with pytest.raises(IndexError):
        response_logps(model, replace(batch, input_ids=batch.input_ids + 1000), "padded")
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks
    assert model(batch.input_ids[None]).logits.shape[-1] == 61


class Doubled(torch.nn.Module):
    """Does to its logits what no setting tells."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()
        self.config = self.inner.config

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.inner.lm_head

    def forward(self, **kwargs: torch.Tensor) -> object:
        output = self.inner(**kwargs)
        output.logits = output.logits * 2
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_changes_its_logits_in_a_way_of_its_own_is_found_out(dtype: torch.dtype) -> None:
    model, batch = Doubled().to(dtype), pack(EXAMPLES)
    alone = [select(batch, [r]) for r in range(batch.num_responses)]
    with pytest.raises(LogpsError, match=r"Doubled: .*set logps_path to 'naive'"):
        self_test(model, batch, alone, exact=dtype == torch.float32, path="padded")
    self_test(model, batch, alone, exact=dtype == torch.float32, path="naive")


def test_a_setting_of_naive_touches_nothing_and_auto_takes_it_back() -> None:
    model, other = tiny_llama(), tiny_of(HEADS["with a bias, attention not exchangeable"]().config)
    assert prepare([model], "naive") == ("naive", "logps_path is 'naive'")
    assert path_of(model) == "naive"
    assert prepare([model], "auto") == ("forest", None)
    path, reason = prepare([model, other], "auto")
    assert path == path_of(model) == path_of(other) == "padded"
    assert reason == "its attention cannot be exchanged"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_has_the_log_probs_and_gradients_of_the_naive_path(backend: str) -> None:
    """The naive path runs first, whose graphs would know of no hooks."""
    torch._dynamo.reset()
    model = tiny_llama()
    model.model._supports_attention_backend = model._supports_attention_backend = False
    assert prepare([model], "auto", is_compiled=True) == ("padded", "its attention cannot be exchanged")
    compiled = torch.compile(model, backend=backend)
    for examples in (EXAMPLES[:1], EXAMPLES, EXAMPLES[1:]):
        batch = pack(examples)
        results = []
        for each, path in ((model, "naive"), (compiled, "naive"), (compiled, "padded")):
            model.zero_grad()
            values = response_logps(each, batch, path)
            (values * torch.arange(1, len(values) + 1)).sum().backward()
            results.append([values.detach(), *(p.grad.clone() for p in model.parameters())])
        for result in results[1:]:
            for ours, expected in zip(result, results[0], strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("FSDP2", "llama"),
        ("FSDP2 reshard", "gpt2"),
        ("FSDP2 reshard padded", "llama"),
        ("FSDP2 tail", "gemma2, soft cap"),
        ("FSDP2 tail LoRA", "llama"),
        ("FSDP1", "llama"),
    ],
)
def test_sharded_models_give_the_same(kind: str, family: str) -> None:
    """Two processes with half of each weight: the head is gathered for the forward pass, and again for the other."""
    script = Path(__file__).with_name("two_ranks_fsdp.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, str(script), kind, family], check=True, timeout=300)
