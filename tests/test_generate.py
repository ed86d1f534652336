"""Laws of sampling, on the lab's shipped policy."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from infopo.data.encode import Encoder
from infopo.data.encode import prompt_ids as ids_of_prompt
from infopo.data.templates import ChatTemplate
from infopo.data.tokenization import Tokenization
from infopo.errors import DataError, ModelError, RecipeError, UnsupportedArgumentError
from infopo.generate import Sample, sample
from infopo.lab import policy_path
from infopo.records import Message, PreferenceRow, Text

# Prompts of 4 lengths, the longest neither first nor last.
QUESTIONS = ["7+5=?", "12+5-3*2=?", "34+57*2-81=?", "3*9+4=?", "84-7*9=?"]
CHATS: list[list[Message]] = [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(policy_path())


@pytest.fixture(scope="module")
def shared_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(policy_path())


@pytest.fixture
def model(shared_model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    shipped = shared_model.generation_config
    shared_model.eval()
    yield shared_model
    shared_model.generation_config = shipped
    shared_model.eval()


def greedy_by_hand(model: PreTrainedModel, prompt_ids: list[int], end: int, max_new_tokens: int) -> list[int]:
    """One token at a time, without padding, cache or `generate`."""
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
    return ids[len(prompt_ids) :]


def texts(samples: list[list[Sample]]) -> list[list[str]]:
    return [[response.text for response in of_prompt] for of_prompt in samples]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_greedy_samples_are_those_of_unpadded_decoding_in_input_order(
    model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int
) -> None:
    sampled = sample(model, tokenizer, CHATS, max_new_tokens=40, temperature=0, batch_size=batch_size, seed=0)
    for chat, (response,) in zip(CHATS, sampled, strict=True):
        prompt_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        expected = greedy_by_hand(model, prompt_ids, tokenizer.eos_token_id, max_new_tokens=40)
        assert list(response.token_ids) == expected
        assert response.text == tokenizer.decode(expected)
        assert response.finished


def test_samples_depend_on_the_seed_and_not_on_the_global_random_state(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    def draw(seed: int) -> list[list[Sample]]:
        return sample(
            model,
            tokenizer,
            CHATS,
            max_new_tokens=40,
            temperature=2.0,
            num_return_sequences=3,
            batch_size=8,
            seed=seed,
        )

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert draw(seed=5) == first
    assert draw(seed=6) != first
    assert [len(of_prompt) for of_prompt in first] == [3] * len(CHATS)


def next_token_probabilities(
    model: PreTrainedModel, tokenizer: Tokenizer, temperature: float
) -> torch.Tensor:
    prompt_ids = tokenizer.apply_chat_template(CHATS[1], add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt_ids])).logits[0, -1]
    return torch.softmax(logits / temperature, dim=-1)


def first_token_counts(
    model: PreTrainedModel, tokenizer: Tokenizer, temperature: float, top_p: float = 1.0, draws: int = 4000
) -> Counter[int]:
    """How often each token starts a response to `CHATS[1]`; an immediate end of turn counts as token -1."""
    (responses,) = sample(
        model,
        tokenizer,
        [CHATS[1]],
        max_new_tokens=1,
        temperature=temperature,
        num_return_sequences=draws,
        batch_size=draws,
        seed=0,
        top_p=top_p,
    )
    return Counter(response.token_ids[0] if response.token_ids else -1 for response in responses)


def total_variation(counts: Counter[int], probabilities: torch.Tensor) -> float:
    shares = torch.zeros_like(probabilities)
    for token, count in counts.items():
        shares[token] = count / counts.total()
    return float((shares - probabilities).abs().sum() / 2)


def test_tokens_are_drawn_from_the_softmax_at_the_given_temperature(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    """At temperature 5 hundreds of tokens share the mass: a left-over top_k = 50 would cut much of it."""
    probabilities = next_token_probabilities(model, tokenizer, temperature=5.0)
    assert probabilities.sort(descending=True).values[50:].sum() > 0.3
    probabilities[-1], probabilities[tokenizer.eos_token_id] = probabilities[tokenizer.eos_token_id], 0
    # E[total variation] <= sum_i sqrt(p_i / n) / 2 <= sqrt(262 / 4000) / 2 = 0.128.
    assert total_variation(first_token_counts(model, tokenizer, 5.0), probabilities) < 0.15


def test_top_p_draws_from_the_smallest_set_that_holds_the_mass(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    ordered = next_token_probabilities(model, tokenizer, temperature=5.0).sort(descending=True)
    size = int((ordered.values.cumsum(0) < 0.3).sum()) + 1
    assert size > 1
    nucleus = {-1 if token == tokenizer.eos_token_id else token for token in ordered.indices[:size].tolist()}
    assert set(first_token_counts(model, tokenizer, 5.0, top_p=0.3)) == nucleus


def test_the_models_shipped_sampling_settings_are_overruled(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    plain = first_token_counts(model, tokenizer, 5.0, draws=200)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        min_p=0.9,
        typical_p=0.1,
        epsilon_cutoff=0.5,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        do_sample=True,
    )
    assert first_token_counts(model, tokenizer, 5.0, draws=200) == plain


def test_a_response_ends_before_its_end_token_or_is_marked_unfinished(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    ((whole,),) = sample(model, tokenizer, CHATS[1:2], max_new_tokens=40, temperature=0, batch_size=1, seed=0)
    length = len(whole.token_ids)
    assert tokenizer.eos_token_id not in whole.token_ids

    def cut(max_new_tokens: int) -> Sample:
        return sample(
            model,
            tokenizer,
            CHATS[1:2],
            max_new_tokens=max_new_tokens,
            temperature=0,
            batch_size=1,
            seed=0,
        )[0][0]

    assert cut(length + 1) == whole
    assert cut(length) == Sample(whole.text, whole.token_ids, finished=False)
    assert cut(length - 2).token_ids == whole.token_ids[:-2]


def test_every_end_token_of_the_model_ends_a_response(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    ((whole,),) = sample(model, tokenizer, CHATS[1:2], max_new_tokens=40, temperature=0, batch_size=1, seed=0)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, newline])
    ((line,),) = sample(model, tokenizer, CHATS[1:2], max_new_tokens=40, temperature=0, batch_size=1, seed=0)
    assert line.text == whole.text.partition("\n")[0]
    assert line.finished


def encoded(tokenizer: Tokenizer, prompt: Text) -> list[int]:
    return ids_of_prompt(Tokenization(tokenizer), ChatTemplate(tokenizer), prompt, "prompt")


def test_special_tokens_are_added_exactly_once(tokenizer: Tokenizer) -> None:
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    seven = tokenizer("7", add_special_tokens=False)["input_ids"]
    assert encoded(tokenizer, "7") == [bos, *seven]
    assert encoded(tokenizer, "<|bos|>7") == [bos, *seven]
    assert encoded(tokenizer, "7<|end|>") == [bos, *seven, end]
    rendered = "<|bos|><|user|>7<|end|><|assistant|>"
    chat_ids = encoded(tokenizer, [{"role": "user", "content": "7"}])
    assert chat_ids == encoded(tokenizer, rendered)
    assert Counter(chat_ids)[bos] == 1


def test_an_end_token_that_the_tokenizer_appends_does_not_end_the_prompt() -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|end|>",
        special_tokens=[("<|bos|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)],
    )
    assert tokenizer("7")["input_ids"][-1] == tokenizer.eos_token_id
    assert encoded(tokenizer, "7")[-1] != tokenizer.eos_token_id


def test_each_submodule_keeps_its_training_mode(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    arguments = {"max_new_tokens": 2, "temperature": 0, "batch_size": 1, "seed": 0}
    sample(model, tokenizer, CHATS[:1], **arguments)
    assert [module.training for module in model.modules()] == modes


def test_no_prompts_give_no_samples(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    assert sample(model, tokenizer, [], max_new_tokens=2, temperature=0, batch_size=1, seed=0) == []


GOOD = {"max_new_tokens": 2, "temperature": 1.0, "batch_size": 1, "seed": 0}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"max_new_tokens": 0}, RecipeError, "max_new_tokens: expected at least 1, got 0"),
        ({"batch_size": 0}, RecipeError, "batch_size: expected at least 1"),
        ({"num_return_sequences": 0}, RecipeError, "num_return_sequences: expected at least 1"),
        ({"temperature": -1.0}, RecipeError, "temperature: expected"),
        ({"temperature": float("nan")}, RecipeError, "temperature: expected"),
        ({"top_p": 0.0}, RecipeError, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, RecipeError, "top_p: expected"),
        ({"top_p": 2.0, "batch_size": -1}, RecipeError, "2 problems"),
        (
            {"temperature": 0.0, "num_return_sequences": 2},
            UnsupportedArgumentError,
            "greedy decoding has one",
        ),
        ({"max_new_tokens": 509}, DataError, r"prompts\[0\]: 4 prompt tokens and 509 new tokens"),
        ({"prompts": ["7", ""], "bos": None}, DataError, r"prompts\[1\]: the prompt has no tokens"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    model: PreTrainedModel, bad: dict[str, object], error: type[Exception], message: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    if "bos" in bad:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    arguments = {"prompts": ["7+5"], **GOOD, **bad}
    arguments.pop("bos", None)
    with pytest.raises(error, match=message):
        sample(model, tokenizer, **arguments)


def test_a_chat_without_a_template_and_a_model_without_an_end_are_refused(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    tokenizer.chat_template = None
    with pytest.raises(UnsupportedArgumentError, match="needs a tokenizer with a chat template"):
        sample(model, tokenizer, CHATS, **GOOD)
    tokenizer.eos_token = None
    model.generation_config = GenerationConfig()
    with pytest.raises(ModelError, match="end-of-sequence token"):
        sample(model, tokenizer, ["7"], **GOOD)


def two_token_prefix() -> Tokenizer:
    """A tokenizer that begins texts with two tokens, as GLM's does with `[gMASK]<sop>`."""
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> <|bos|> $A",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|user|>", "<|bos|>")],
    )
    return tokenizer


TOOL = {"type": "function", "function": {"name": "3", "parameters": {}}}
TELLING = (
    "{{ bos_token }}{% if tools %}{{ tools[0].function.name }}{% endif %}{{ level }}"
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}"
)


@pytest.mark.parametrize("prefix", ["one", "two"])
@pytest.mark.parametrize("prompt", ["7", "<|bos|>7", "<|user|><|bos|>7", "7<|end|>", "chat"])
def test_the_prompt_that_generate_sees_is_the_one_that_was_trained_on(
    model: PreTrainedModel, prefix: str, prompt: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_path()) if prefix == "one" else two_token_prefix()
    tokenizer.chat_template = TELLING
    variables = {"level": "5+5"}
    if prompt == "chat":
        turns: Text = [{"role": "user", "content": "7"}]
        chosen, rejected = ([[{"role": "assistant", "content": text}]] for text in ("1", "2"))
        row = PreferenceRow(turns, list(chosen), list(rejected), "f:1", {}, [TOOL])
    else:
        turns, row = prompt, PreferenceRow(prompt, ["1"], ["2"], "f:1")
    trained = Encoder(tokenizer, chat_template_kwargs=variables).encode(row).example.prompt_ids
    assert trained.count(tokenizer.bos_token_id) == (2 if (prefix, prompt[:8]) == ("one", "<|user|>") else 1)
    with pytest.raises(DataError, match=f": {len(trained)} prompt tokens and"):
        sample(
            model,
            tokenizer,
            [turns],
            **GOOD | {"max_new_tokens": 10**6},
            tools=[TOOL],
            chat_template_kwargs=variables,
        )
    template = ChatTemplate(tokenizer, variables)
    assert ids_of_prompt(Tokenization(tokenizer), template, turns, "prompt", tools=row.tools) == trained
