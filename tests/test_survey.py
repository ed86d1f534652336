"""What `infopo check` says about tokens, on data small enough to count by hand."""

import pytest
from transformers import PreTrainedTokenizerFast

from infopo.data.examples import ExampleDataset
from infopo.data.survey import duplicate_lines, length_lines, saving_lines, token_problem_lines
from infopo.lab.tokenizer import build_tokenizer
from infopo.records import PreferenceExample

A = PreferenceExample([1, 5, 6], [[7, 2]], [[8, 9, 10, 2]], "f:1")
B = PreferenceExample([1, 5, 6], [[7, 2], [9, 2]], [], "f:2")


def dataset(*examples: PreferenceExample) -> ExampleDataset:
    return ExampleDataset.from_examples(examples)


def test_quantiles_of_lengths():
    lines = [line.split() for line in length_lines(dataset(A, B))]
    assert lines == [
        ["n", "min", "median", "90", "%", "99", "%", "max"],
        ["tokens", "of", "examples", "2", "7", "7", "9", "9", "9"],
        ["tokens", "of", "prompts", "2", "3", "3", "3", "3", "3"],
        ["tokens", "of", "chosen", "3", "2", "2", "2", "2", "2"],
        ["tokens", "of", "rejected", "1", "4", "4", "4", "4", "4"],
    ]
    assert len(length_lines(dataset(B))) == 4  # no rejected responses, no line


def test_duplicates_are_examples_with_the_same_tokens_on_the_same_sides():
    swapped = PreferenceExample([1, 5, 6], A.rejected_ids, A.chosen_ids, "f:3")
    again = PreferenceExample(A.prompt_ids, A.chosen_ids, A.rejected_ids, "f:4")
    (line,) = duplicate_lines(dataset(A, B, swapped, again))
    assert line == "duplicates: 1 example (first: f:4); 3 prompts of examples before them"
    assert duplicate_lines(dataset(A))[0].startswith("duplicates: 0 examples; 0 prompts")


@pytest.mark.parametrize(("batch_size", "padded"), [(2, 4 * 7), (1, 2 * 7 + 2 * 5)])
def test_tokens_saved_are_those_of_padding_and_of_prompts_after_the_first(batch_size: int, padded: int):
    (line,) = saving_lines(dataset(A, B), batch_size)
    rows, shared = (3 + 2) + (3 + 4) + (3 + 2) + (3 + 2), (3 + 2 + 4) + (3 + 2 + 2)
    assert line == (
        f"tokens through the model, batches of {batch_size}: {padded} as padded rows; {rows} without padding "
        f"({1 - rows / padded:.0%} saved); {shared} with each prompt once ({1 - shared / padded:.0%} saved)"
    )


def lab() -> tuple[PreTrainedTokenizerFast, int, int, int]:
    tokenizer = build_tokenizer()
    return (
        tokenizer,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer("1", add_special_tokens=False)["input_ids"][0],
    )


def test_sound_examples_have_no_special_token_out_of_place():
    tokenizer, bos, eos, one = lab()
    sound = PreferenceExample([bos, one], [[one, eos]], [[one, one]], "f:1")
    assert token_problem_lines(dataset(sound), tokenizer) == ["special tokens: none out of place"]


def test_each_special_token_out_of_place_is_counted_and_shown():
    tokenizer, bos, eos, one = lab()
    pad = tokenizer.pad_token_id
    wrong = [
        PreferenceExample([bos, bos, one], [[one, eos]], [], "f:1"),
        PreferenceExample([bos, one], [[bos, one, eos]], [], "f:2"),
        PreferenceExample([bos, one], [[one, eos, one, eos]], [], "f:3"),
        PreferenceExample([bos, one], [[one, eos]], [[one, pad]], "f:4"),
        PreferenceExample([bos, bos, one], [[one, eos]], [], "f:5"),
    ]
    head, *lines = token_problem_lines(dataset(*wrong), tokenizer)
    assert head == "special tokens: "
    assert lines[0] == "  2 examples: BOS stands more than once in the prompt (first: f:1)"
    assert [line.split(": ", 1)[1].split(" (first")[0][:36] for line in lines[1:]] == [
        "BOS stands in a response",
        "a special token within a response: i",
        f"responses end with {tokenizer.pad_token}, but the "[:36],
    ]
    assert [line[-5:-1] for line in lines] == [" f:1", " f:2", " f:3", " f:4"]


def test_tokens_for_unknown_text_are_counted():
    tokenizer, bos, eos, one = lab()
    tokenizer.unk_token = "1"
    unknown = PreferenceExample([bos, one], [[one, eos]], [], "f:1")
    assert "unknown token" in token_problem_lines(dataset(unknown), tokenizer)[1]
