"""Log-probs of responses: the definition, isolation, first tokens, and that batching changes nothing (rules 3, 4)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, GPT2Config, MistralConfig, MixtralConfig

from infopo import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.data.packing import PreferenceCollator, pack, select
from infopo.errors import LogpsError
from infopo.logps import agreement, attention, lm_head, naive, router
from infopo.logps.forward import PATHS, PLANS, padding_noise, response_logps, self_test
from infopo.models import disable_dropout
from infopo.records import EMPTY_EXAMPLE, PreferenceExample
from infopo.startup import check_log_probs
from worlds import random_examples, tiny_llama, tiny_of, with_context

# Sums over at most 12 tokens in float32, whose logits carry rounding of about 1e-6 each.
FLOAT32 = {"rtol": 0.0, "atol": 2e-5}
FLOAT64 = {"rtol": 0.0, "atol": 1e-6}  # RMSNorm and rotary embeddings stay float32 in a float64 model

PLAIN = random_examples(6, chosen=(1, 0, 2), rejected=(1, 2))
# One row twice, with and without context: the same tokens, of which others are scored.
EXAMPLES = [*PLAIN, *map(with_context, random_examples(3, seed=1, rejected=(2,))), with_context(PLAIN[0])]


@pytest.fixture(params=sorted(PATHS))
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ready(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """The model, prepared for the path."""
    if path == "forest":
        disable_dropout(model)
        assert attention.enable(model) is None
    return model


def definition(
    model: torch.nn.Module, example: PreferenceExample, squared: bool = False
) -> list[torch.Tensor]:
    """Σ_t log softmax(logits before t)[y_t], one unpadded sequence at a time, straight from the textbook.

    If `squared`, it is Σ_t log Σ_v softmax(logits before t)[v]².
    """
    values = []
    for response, context in zip(example.response_ids, example.spans, strict=True):
        tokens = torch.tensor([[*example.prompt_ids, *response]])
        logps = model(input_ids=tokens).logits[0].log_softmax(-1)
        first = len(example.prompt_ids)
        unscored = {first + t for begin, end in context for t in range(begin, end)}
        scored = [t for t in range(first, tokens.shape[1]) if t not in unscored]
        of_token = (
            logps.exp().square().sum(1).log() if squared else logps[:-1].gather(1, tokens[0, 1:, None])[:, 0]
        )
        values.append(sum(of_token[t - 1].double() for t in scored))
    return values


def test_log_probs_are_the_sums_of_the_textbook(path: str) -> None:
    model = ready(tiny_llama(), path)
    with torch.no_grad():
        expected = torch.stack([v for e in EXAMPLES for v in definition(model, e)])
        torch.testing.assert_close(response_logps(model, pack(EXAMPLES), path), expected, **FLOAT32)


def test_the_agreement_of_a_response_is_that_of_the_textbook_and_changes_no_log_prob(path: str) -> None:
    """Σ_t log π(y_t) - log Σ_v π(v)², with context left out."""
    model = ready(tiny_llama(), path)
    with torch.no_grad():
        plain = response_logps(model, pack(EXAMPLES), path)
        with agreement.measured(True) as found:
            torch.testing.assert_close(response_logps(model, pack(EXAMPLES), path), plain, rtol=0, atol=0)
        squares = [s for e in EXAMPLES for s in definition(model, e, squared=True)]
    torch.testing.assert_close(found[0], plain - torch.stack(squares), **FLOAT32)
    with agreement.measured(True) as of_nothing:
        none = response_logps(model, pack([EMPTY_EXAMPLE]), path)
    assert none.shape == of_nothing[0].shape == (0,)
    none.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("config", [
    GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
    MistralConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, sliding_window=4, initializer_range=0.3),
], ids=["absolute positions", "sliding window"])  # fmt: skip
def test_log_probs_are_the_sums_of_the_textbook_on_other_architectures(path: str, config: object) -> None:
    model = ready(tiny_of(config), path)
    with torch.no_grad():
        expected = torch.stack([v for e in EXAMPLES for v in definition(model, e)])
        torch.testing.assert_close(response_logps(model, pack(EXAMPLES), path), expected, **FLOAT32)


def test_context_within_a_response_is_read_and_not_scored(path: str) -> None:
    """Its tokens move the log-prob of what follows them; the length is that of scored tokens."""
    model = ready(tiny_llama(), path)
    example = PreferenceExample([5, 6], [[7, 8, 9, 10]], [[7, 8, 9, 10]], "f:1", context=[[(1, 3)], []])
    other = replace(example, chosen_ids=[[7, 11, 12, 10]])
    with torch.no_grad():
        masked, whole = response_logps(model, pack([example]), path)
        changed, _ = response_logps(model, pack([other]), path)
    assert pack([example]).length.tolist() == [2, 4]
    assert abs(float(masked - whole)) > 1e-2
    assert abs(float(masked - changed)) > 1e-4


def test_gradients_are_those_of_the_textbook(path: str) -> None:
    model = ready(tiny_llama(dtype=torch.float64), path)
    weights = torch.linspace(-1, 2, pack(EXAMPLES).num_responses, dtype=torch.float64)
    (response_logps(model, pack(EXAMPLES), path) * weights).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (torch.stack([v for e in EXAMPLES for v in definition(model, e)]) * weights).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for ours, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=0, atol=1e-6 * largest)


def test_changing_any_token_of_one_response_moves_no_other(path: str) -> None:
    model, base = ready(tiny_llama(), path), pack(EXAMPLES)
    with torch.no_grad():
        before = response_logps(model, base, path)
        for victim in range(base.num_responses):
            segment = base.leaf[victim]
            for position in range(base.segment_start[segment], base.segment_start[segment + 1]):
                tokens = base.input_ids.clone()
                tokens[position] = tokens[position] % 60 + 1
                moved = (response_logps(model, replace(base, input_ids=tokens), path) - before).abs()
                assert moved[victim] > 1e-3
                moved[victim] = 0
                assert moved.max() < FLOAT32["atol"]


def test_the_first_token_of_every_response_is_scored(path: str) -> None:
    """One-token responses read the logits at the prompt's end: over the whole vocabulary, Σ p = 1."""
    model = ready(tiny_llama(), path)
    example = PreferenceExample([5, 6, 7], [[t] for t in range(61)], [], "r")
    with torch.no_grad():
        logps = response_logps(model, pack([example]), path)
    torch.testing.assert_close(logps.exp().sum(), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-6)


def test_order_and_split_of_a_batch_change_nothing(path: str) -> None:
    model = ready(tiny_llama(), path)
    with torch.no_grad():
        together = response_logps(model, pack(EXAMPLES), path)
        apart = torch.cat([response_logps(model, pack([e]), path) for e in EXAMPLES])
        reversed_ = torch.cat([response_logps(model, pack([e]), path) for e in EXAMPLES[::-1]])
        shuffled = response_logps(model, pack(EXAMPLES[::-1]), path)
    torch.testing.assert_close(together, apart, **FLOAT32)
    torch.testing.assert_close(shuffled, reversed_, **FLOAT32)


def test_sums_are_float64_and_logits_float32_at_least(path: str) -> None:
    half = ready(tiny_llama(dtype=torch.bfloat16), path)
    logps = response_logps(half, pack(EXAMPLES), path)
    assert logps.dtype == torch.float64
    # A bfloat16 log-softmax would leave values on its grid of 8 significant bits.
    assert any(float(v) != float(v.to(torch.bfloat16)) for v in logps[:3].detach())


def test_a_batch_without_responses_still_reaches_every_parameter_with_a_zero_gradient(path: str) -> None:
    model = ready(tiny_llama(), path)
    [batch] = PreferenceCollator(plan=PLANS.get(path))([EMPTY_EXAMPLE])  # as a rank without rows has it
    logps = response_logps(model, batch.to("cpu"), path)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())


def alone(examples: list[PreferenceExample]) -> list:
    batch = pack(examples)
    return [select(batch, [r]) for r in range(batch.num_responses)]


def test_the_self_test_accepts_a_sound_model_and_measures_its_noise(path: str) -> None:
    assert self_test(ready(tiny_llama(), path), pack(EXAMPLES), alone(EXAMPLES), exact=True, path=path) < 1e-4


class LooksAtNeighbours(torch.nn.Module):
    """A model whose logits depend on the other rows of its batch, as capacity-limited experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()

    def forward(self, **kwargs: torch.Tensor) -> object:
        output = self.inner(**kwargs)
        output.logits = output.logits * (1 + 0.01 * output.logits.shape[0])
        return output


def test_the_self_test_refuses_a_model_that_looks_at_its_neighbours_by_name() -> None:
    with pytest.raises(LogpsError, match=r"LooksAtNeighbours: .* nats with"):
        self_test(LooksAtNeighbours(), pack(EXAMPLES), alone(EXAMPLES), exact=True)


def test_half_precision_is_measured_not_refused(path: str) -> None:
    model = ready(tiny_llama(dtype=torch.bfloat16), path)
    noise = padding_noise(model, pack(EXAMPLES), alone(EXAMPLES), path)
    assert self_test(model, pack(EXAMPLES), alone(EXAMPLES), exact=False, path=path) == noise


def sees_ahead() -> torch.nn.Module:
    return tiny_of(
        BertConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            is_decoder=False, initializer_range=0.5,
        )
    )  # fmt: skip


def test_the_self_test_refuses_a_model_that_sees_ahead_by_name() -> None:
    for exact in (True, False):
        with pytest.raises(LogpsError, match=r"BertLMHeadModel: .* with the tokens after it"):
            self_test(sees_ahead(), pack(EXAMPLES), alone(EXAMPLES), exact=exact)


def test_the_self_test_is_as_sharp_when_the_first_row_has_a_response_of_one_token() -> None:
    """Such a response has no token before its last, which is changed to see who looks ahead."""
    dataset = ExampleDataset.from_examples([PreferenceExample([5], [[7]], [[8]], "short"), *EXAMPLES])
    args = InfoPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    with pytest.raises(LogpsError, match=r"BertLMHeadModel: .* with the tokens after it"):
        check_log_probs(sees_ahead(), dataset, args, exact=True, quiet=[])


def test_virtual_tokens_of_prompt_tuning_shift_nothing() -> None:
    """Virtual tokens whose embeddings are those of real ones give the log-probs of the prompt with these before it."""
    peft = pytest.importorskip("peft")
    prefix = [7, 8, 9]
    longer = [replace(e, prompt_ids=[*prefix, *e.prompt_ids]) for e in EXAMPLES]
    model = tiny_llama()
    with torch.no_grad():
        expected = response_logps(model, pack(longer))
        embeddings = model.get_input_embeddings().weight[prefix].clone()
        settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": len(prefix)}
        tuned = peft.get_peft_model(model, peft.PromptTuningConfig(**settings)).eval()
        tuned.prompt_encoder["default"].embedding.weight.copy_(embeddings)
        torch.testing.assert_close(response_logps(tuned, pack(EXAMPLES)), expected, **FLOAT32)


class NothingIsCopied(TorchDispatchMode):
    """Refuses operations on tensors of the host. Those of a model on another device are copies, for which it waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        assert all(t.device.type == "meta" for t in tensors), func
        return result


def test_a_padded_batch_with_its_plan_copies_nothing_to_the_device_within_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head is a plain one, because ours asks for autocast, which a meta device does not know.

    With `sdpa`, transformers itself looks at the mask.
    """

    def head(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, targets: torch.Tensor, *_: Any) -> Any:
        return naive.logps_from(hidden @ weight.T, targets)

    monkeypatch.setattr(lm_head, "token_logps", head)
    model = tiny_llama(attn_implementation="eager").to("meta")
    [batch] = PreferenceCollator(plan=PLANS["padded"])(EXAMPLES)
    batch = batch.to("meta")
    with NothingIsCopied():
        response_logps(model, batch, "padded").sum().backward()


def test_how_often_a_token_counts_is_known_before_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_of(MixtralConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, num_local_experts=4))  # fmt: skip
    ready(model, "forest")
    [batch] = PreferenceCollator(shared=True, plan=PLANS["forest"])(EXAMPLES)
    monkeypatch.setattr(router, "multiplicity", None)
    with router.aux_losses(True) as found:
        response_logps(model, batch)
    monkeypatch.undo()
    with router.aux_losses(True) as expected:
        response_logps(model, pack(EXAMPLES), "naive")
    torch.testing.assert_close(router.mean(found), router.mean(expected), rtol=1e-4, atol=1e-5)
