"""The lab's tokenizer, the shipped SFT policy, and its accuracy."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from infopo.errors import RecipeError
from infopo.generate import sample
from infopo.lab import make_problems, policy_path, verify
from infopo.lab.evaluation import MAX_NEW_TOKENS, AccuracyResult, accuracy, as_prompt, wilson_interval
from infopo.lab.problems import ANSWER_PREFIX
from infopo.lab.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(policy_path())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(policy_path())


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "12+5=17\nAnswer: 17",
        "Answer: Answer:  7 ",
        "é ١ 日本 🙂\t\r\n\x00",
        "don 't , he .",
        "<|x|>",
    ],
)
def test_every_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_conversation_renders_as_its_turns_and_starts_with_its_prompt(tokenizer: Tokenizer) -> None:
    prompt = [{"role": "user", "content": "7+5=?"}]
    conversation = [*prompt, {"role": "assistant", "content": "7+5=12\nAnswer: 12"}]
    rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|bos|><|user|>7+5=?<|end|><|assistant|>"
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert whole == rendered + "7+5=12\nAnswer: 12<|end|>"
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    whole_ids = tokenizer.apply_chat_template(conversation)["input_ids"]
    # bos, user, 7 + 5 = ?, end, assistant; then 6 characters, the newline, "Answer: ", 1 2, end.
    assert (len(prompt_ids), len(whole_ids)) == (9, 9 + 11)
    assert whole_ids[:9] == prompt_ids
    assert whole_ids[-1] == tokenizer.eos_token_id


def test_special_tokens_have_their_roles(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|bos|>",
        "<|end|>",
        "<|pad|>",
    )
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert len(tokenizer(ANSWER_PREFIX, add_special_tokens=False)["input_ids"]) == 1


def test_a_role_that_the_chat_lacks_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(Exception, match="roles user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "be brief"}], tokenize=False)


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds(tokenizer: Tokenizer) -> None:
    built = build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    assert tokenizer.backend_tokenizer.to_str() == built.backend_tokenizer.to_str()


def test_the_shipped_policy_is_small_and_matches_its_tokenizer(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    assert model.config.model_type == "llama"
    assert model.dtype == torch.float32
    assert 200_000 <= model.num_parameters() <= 400_000
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert sum(file.stat().st_size for file in policy_path().iterdir()) < 2_000_000


def test_prompts_and_solutions_are_short(tokenizer: Tokenizer) -> None:
    problems = make_problems(2000, 0, "sft")
    prompts = [tokenizer.apply_chat_template(as_prompt(problem))["input_ids"] for problem in problems]
    solutions = [
        tokenizer(problem.solution, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for problem in problems
    ]
    assert max(map(len, prompts)) <= 20
    assert max(map(len, solutions)) < MAX_NEW_TOKENS <= 45


def test_the_shipped_policy_leaves_preference_training_something_to_do(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    result = accuracy(model, tokenizer, make_problems(500, 0, "evaluation"))
    assert result.n == 500
    assert 0.6 <= result.accuracy <= 0.85


def test_accuracy_counts_the_finished_greedy_responses_that_are_verified(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    problems = make_problems(60, 1, "evaluation")
    responses = [
        sample(
            model,
            tokenizer,
            [as_prompt(problem)],
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=0,
            batch_size=1,
            seed=0,
        )[0][0]
        for problem in problems
    ]
    right = [verify(problem, response.text) for problem, response in zip(problems, responses, strict=True)]
    assert 0 < sum(right) < 60
    result = accuracy(model, tokenizer, problems, batch_size=7)
    assert (result.correct, result.n, result.accuracy) == (sum(right), 60, sum(right) / 60)
    assert result.ci95 == wilson_interval(sum(right), 60)


def test_accuracy_of_no_problems_is_refused(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    with pytest.raises(RecipeError, match="expected at least one"):
        accuracy(model, tokenizer, [])


def test_wilson_interval_by_hand() -> None:
    """z² = 3.841459.

    5 of 10: spread z²/n = 0.3841459, half-width 1.959964 sqrt(0.25/10 + 0.3841459/40) / 1.3841459 = 0.263407.
    0 of 10: centre and half-width are both 0.3841459/2 / 1.3841459, so the interval is [0, 0.277533].
    """
    assert wilson_interval(5, 10) == pytest.approx((0.5 - 0.263407, 0.5 + 0.263407), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.277533), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.277533, 1), abs=1e-6)
    assert wilson_interval(0, 10)[0] == 0


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_interval_of_no_proportion_is_refused(correct: int, n: int) -> None:
    with pytest.raises(RecipeError, match="0 <= correct <= n"):
        wilson_interval(correct, n)


def test_a_result_prints_its_uncertainty() -> None:
    result = AccuracyResult(3, 4, 0.75, (0.301, 0.954))
    assert str(result) == "0.750 (3 of 4, 95 % interval 0.301 to 0.954)"
