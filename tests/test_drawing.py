"""Laws of drawing: what a sample is follows from its seed, and samples follow the model's law."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from infopo.errors import ConfigError
from infopo.evaluation.drawing import Drawn, Request, draw
from infopo.evaluation.law import Law
from infopo.lab import policy_path

QUESTIONS = ["7+5=?", "12+5-3*2=?", "34+57*2-81=?", "3*9+4=?", "84-7*9=?"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(policy_path())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    # In float64, two batches differ by less than what a boundary of the distribution function is ever missed by.
    return AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float64)


def prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


def drawn(
    model: PreTrainedModel, tokenizer: Tokenizer, requests: Sequence[Request], law: Law, batch_size: int = 512
) -> list[Drawn]:
    ends = [tokenizer.eos_token_id]
    found = dict(draw(model, tokenizer, requests, law, ends=ends, batch_size=batch_size))
    return [found[index] for index in range(len(requests))]


@pytest.fixture(scope="module")
def requests_of_all(tokenizer: Tokenizer) -> list[Request]:
    return [Request(prompt(tokenizer, text), seed) for text in QUESTIONS for seed in range(6)]


@pytest.mark.parametrize("law", [Law(40), Law(40, 1.0), Law(40, 1.3, top_p=0.8)])
def test_batch_size_and_order_change_nothing(
    model: PreTrainedModel, tokenizer: Tokenizer, requests_of_all: list[Request], law: Law
) -> None:
    expected = drawn(model, tokenizer, requests_of_all, law)
    for batch_size in (1, 7):
        backwards = drawn(model, tokenizer, requests_of_all[::-1], law, batch_size)[::-1]
        for one, other in zip(expected, backwards, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logp == pytest.approx(other.logp)
    assert len({each.text for each in expected}) > len(QUESTIONS) or law.temperature == 0


@pytest.mark.parametrize(
    "law", [pytest.param(Law(1, 1.0), marks=pytest.mark.long), Law(1, 3.0), Law(1, 3.0, top_p=0.9)]
)
def test_first_tokens_follow_the_law(model: PreTrainedModel, tokenizer: Tokenizer, law: Law) -> None:
    # A place where the model hesitates.
    begun = tokenizer("34+57=91\n91*2=182\n182-81=", add_special_tokens=False)["input_ids"]
    ids, n = [*prompt(tokenizer, "34+57*2-81=?"), *begun], 1500
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    masses = torch.softmax(logits / law.temperature, -1)
    order = masses.argsort(descending=True)
    before = masses[order].cumsum(0) - masses[order]
    masses[order[before >= law.top_p]] = 0
    masses /= masses.sum()
    counts = Counter(
        each.token_ids[0] for each in drawn(model, tokenizer, [Request(ids, seed) for seed in range(n)], law)
    )
    assert all(masses[token] > 0 for token in counts)
    common = [token for token in range(len(masses)) if n * masses[token] >= 5]
    assert len(common) > 1
    observed = [counts[token] for token in common]
    expected = [n * float(masses[token]) for token in common]
    rest = n - sum(expected)
    if rest > 1:
        observed, expected = [*observed, n - sum(observed)], [*expected, rest]
    expected = [value * sum(observed) / sum(expected) for value in expected]
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_logp_is_that_of_the_drawn_tokens_under_the_models_own_law(
    model: PreTrainedModel, tokenizer: Tokenizer, requests_of_all: list[Request]
) -> None:
    found = drawn(model, tokenizer, requests_of_all, Law(40, 1.5, top_p=0.9))
    for request, response in zip(requests_of_all, found, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *response.token_ids]])
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        places = range(len(request.prompt_ids), ids.shape[1])
        by_hand = sum(float(logps[place - 1, ids[0, place]]) for place in places)
        assert response.logp == pytest.approx(by_hand, abs=1e-4)  # `generate` hands float32 logits on
        assert response.tokens == len(response.token_ids)
        assert response.finished == (response.token_ids[-1] == tokenizer.eos_token_id)


def test_settings_that_a_model_ships_and_the_global_random_state_have_no_part(
    model: PreTrainedModel, tokenizer: Tokenizer, requests_of_all: list[Request]
) -> None:
    expected = drawn(model, tokenizer, requests_of_all, Law(40, 1.0))
    shipped = model.generation_config
    torch.manual_seed(7)
    state = torch.get_rng_state()
    try:
        model.generation_config = GenerationConfig(
            repetition_penalty=5.0, top_k=1, do_sample=True, min_new_tokens=9
        )
        model.train()
        assert drawn(model, tokenizer, requests_of_all, Law(40, 1.0)) == expected
        assert model.training
    finally:
        model.generation_config = shipped
        model.eval()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stop_text_ends_a_response_and_is_no_part_of_it(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    requests = [Request(prompt(tokenizer, text), 0) for text in QUESTIONS]
    whole = drawn(model, tokenizer, requests, Law(40))
    stopped = drawn(model, tokenizer, requests, Law(40, stop=("\nAnswer:", "never")))
    for one, other in zip(whole, stopped, strict=True):
        assert other.text == one.text.split("\nAnswer:")[0]
        assert other.finished
        assert other.tokens < one.tokens
        assert other.token_ids == one.token_ids[: other.tokens]
        assert "Answer:" in tokenizer.decode(other.token_ids)


def test_a_response_that_was_cut_off_is_not_finished(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    (found,) = drawn(model, tokenizer, [Request(prompt(tokenizer, QUESTIONS[2]), 0)], Law(3))
    assert (found.tokens, found.finished) == (3, False)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_what_is_no_law_is_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Law(**{"max_new_tokens": 5, **settings})  # type: ignore[arg-type]


def test_a_model_with_adapters_answers_with_them_and_keeps_the_settings_beneath(tokenizer: Tokenizer) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float64)
    base.generation_config = GenerationConfig(repetition_penalty=5.0, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    requests = [Request(prompt(tokenizer, text), 0) for text in QUESTIONS]
    found = drawn(adapted, tokenizer, requests, Law(20))
    assert base.generation_config.repetition_penalty == 5.0
    with adapted.disable_adapter():
        assert drawn(adapted, tokenizer, requests, Law(20)) != found
    merged = drawn(adapted.merge_and_unload(), tokenizer, requests, Law(20))
    assert [each.token_ids for each in merged] == [each.token_ids for each in found]
