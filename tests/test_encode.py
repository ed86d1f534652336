"""Token ids: as TRL's in the ordinary cases; one BOS, one end of turn and a whole prompt in all of them."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from infopo.data.conversation import MERGED_TOKENS, NOT_A_PREFIX
from infopo.data.counts import DataCounts
from infopo.data.encode import END_OF_TURN_LOST, PROMPT_CUT, RESPONSE_CUT, EncodedRow, Encoder, encode_rows
from infopo.data.endings import END_OF_TURN_APPENDED, END_OF_TURN_DOUBLED
from infopo.data.sources import read_rows
from infopo.data.survey import render
from infopo.errors import DataError, ModelError, RecipeError
from infopo.records import PreferenceExample, PreferenceRow

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = ROOT / "tests" / "fixtures" / "hh" / "harmless-24.jsonl"

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>"]
PAD, BOS, EOS, IM_START, IM_END, THINK = range(len(SPECIAL))

_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_TOOLS = "{% if tools %}tools: {{ tools | length }}\n{% endif %}{% if shout %}LOUD\n{% endif %}"
CHATML = "<s>" + _TOOLS + _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
REWRITING = "<s>{{ messages | length }} turns\n" + CHATML.removeprefix("<s>")
_LINES = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PLAIN = _LINES + "{% if add_generation_prompt %}assistant:{% endif %}"
# A conversation that ends with EOS: rendered without generation prompt, its prompt ends with EOS too.
CLOSING = _LINES + "{% if add_generation_prompt %}assistant:{% else %}</s>{% endif %}"
MERGING = PLAIN.replace("assistant:{% endif %}", "assistant: {% endif %}")
TRIMMING = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
REFUSING = "{{ raise_exception('no chat today') }}"


def tokenizer_of(
    template: str | None = CHATML, *, bos: bool = True, appends_eos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that has learned a few words."""
    tokenizer = _trained()
    if bos or appends_eos:
        pieces = [*(["<s>"] if bos else []), "$A", *(["</s>"] if appends_eos else [])]
        ids = [("<s>", BOS), ("</s>", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(pieces), special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["The sky is blue.\n\nThe sky is green.\n"] * 3, trainer)
    return tokenizer


@cache
def encoder_of(template: str | None = CHATML, max_length: int | None = None, **options: Any) -> Encoder:
    return Encoder(tokenizer_of(template, **options), max_length=max_length)


def text_row(prompt: str, chosen: str = " blue.", rejected: str = " green.") -> PreferenceRow:
    return PreferenceRow(prompt, [chosen], [rejected], "f:1")


def chat_row(
    prompt: str = "The sky?", chosen: str = "blue.", rejected: str = "green.", **more: Any
) -> PreferenceRow:
    turns = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    return PreferenceRow(
        turns("user", prompt), [turns("assistant", chosen)], [turns("assistant", rejected)], "f:1", **more
    )


def refusal(encoder: Encoder, row: PreferenceRow) -> str:
    with pytest.raises(DataError, match=r"^f:1: ") as caught:
        encoder.encode(row)
    return caught.value.reason


def sequences(example: PreferenceExample) -> list[list[int]]:
    return [[*example.prompt_ids, *ids] for ids in example.response_ids]


# Parity with TRL


def trl_ids(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], tmp_path: Path) -> list[Any]:
    """What TRL's own preprocessing makes of the rows; of its trainer it looks at the tokenizer only."""
    arguments = DPOConfig(output_dir=str(tmp_path), max_length=None, bf16=False, report_to="none")
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    prepared = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, arguments, "train")
    return [(row["prompt_ids"], [row["chosen_ids"]], [row["rejected_ids"]]) for row in prepared]


def our_ids(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[Any]:
    counts = DataCounts()
    dataset = encode_rows(
        read_rows(Dataset.from_list(rows), counts), Encoder(tokenizer, max_length=None), counts
    )
    assert not counts.notes
    return [(example.prompt_ids, example.chosen_ids, example.rejected_ids) for example in dataset]


TEXTS = [
    ("The sky is", " blue.", " green."),
    ("Is é ok?\n", "Ja, ünd\n", "nein</s>"),
    ("1 + 1 =", " 2", " 3\n\n"),
]


@pytest.mark.parametrize("bos", [True, False])
def test_text_is_encoded_as_by_trl(tmp_path: Path, bos: bool):
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in TEXTS]
    tokenizer = tokenizer_of(bos=bos)
    assert our_ids(tokenizer, rows) == trl_ids(tokenizer, rows, tmp_path)


def test_text_with_an_implicit_prompt_is_encoded_as_by_trl(tmp_path: Path):
    rows = [{"chosen": p + c, "rejected": p + r} for p, c, r in TEXTS]
    tokenizer = tokenizer_of()
    assert our_ids(tokenizer, rows) == trl_ids(tokenizer, rows, tmp_path)


@pytest.mark.parametrize("template", [CHATML, CLOSING])
@pytest.mark.parametrize("implicit", [True, False])
def test_conversations_are_encoded_as_by_trl(tmp_path: Path, template: str, implicit: bool):
    rows = []
    for row in read_rows(FIXTURE, DataCounts(on_bad_row="skip")):
        prompt = row.prompt if not implicit else []
        context = row.prompt if implicit else []
        columns = {
            "prompt": prompt,
            "chosen": [*context, *row.chosen[0]],
            "rejected": [*context, *row.rejected[0]],
        }
        rows.append({name: value for name, value in columns.items() if value})
    tokenizer = tokenizer_of(template)
    assert len(rows) == 22
    assert our_ids(tokenizer, rows) == trl_ids(tokenizer, rows, tmp_path)


def test_tools_and_template_arguments_reach_the_template_as_in_trl(tmp_path: Path):
    row = chat_row()
    more = {"tools": '[{"type": "function"}]', "chat_template_kwargs": {"shout": True}}
    rows = [{"prompt": row.prompt, "chosen": row.chosen[0], "rejected": row.rejected[0], **more}]
    tokenizer = tokenizer_of()
    ours = our_ids(tokenizer, rows)
    assert ours == trl_ids(tokenizer, rows, tmp_path)
    assert tokenizer.decode(ours[0][0]).startswith("<s>tools: 1\nLOUD\n<|im_start|>user\n")


# Laws that hold for every text

words = st.text(st.sampled_from("The sky is blue.\n é漢<s>"), min_size=1, max_size=12)


@given(words, words, words, st.booleans(), st.booleans())
def test_text_decodes_to_prompt_response_and_eos(
    prompt: str, chosen: str, rejected: str, bos: bool, appends_eos: bool
):
    assume(
        chosen.strip() and rejected.strip() and chosen != rejected and "<s>" not in prompt + chosen + rejected
    )
    encoder = encoder_of(bos=bos, appends_eos=appends_eos)
    example = encoder.encode(text_row(prompt, chosen, rejected)).example
    begin = "<s>" if bos else ""
    assert encoder.tokenizer.decode(example.prompt_ids) == begin + prompt
    texts = [encoder.tokenizer.decode(ids) for ids in sequences(example)]
    assert texts == [f"{begin}{prompt}{response}</s>" for response in (chosen, rejected)]
    for ids in sequences(example):
        assert ids.count(BOS) == int(bos)
        assert ids.count(EOS) == 1


@given(words, words, words, st.sampled_from([CHATML, THINKING, PLAIN, MERGING]))
def test_a_conversations_prompt_is_what_generate_sees_and_its_responses_end(
    prompt: str, chosen: str, rejected: str, template: str
):
    assume(chosen.strip() and rejected.strip() and chosen != rejected)
    encoder = encoder_of(template)
    row = chat_row(prompt, chosen, rejected)
    example = encoder.encode(row).example
    seen = encoder.tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True)["input_ids"]
    assert example.prompt_ids == seen
    for text, ids in zip((chosen, rejected), example.response_ids, strict=True):
        ends = [token for token in ids if token in (EOS, IM_END)]
        assert len(ends) == 1
        content = encoder.tokenizer.decode(ids[: ids.index(ends[0])])
        assert content.strip() == text.strip()
        assert not encoder.tokenizer.decode(ids[ids.index(ends[0]) + 1 :]).strip()


@given(words, words, words, st.integers(2, 40), st.integers(1, 30) | st.none(), st.booleans())
def test_truncation_keeps_the_end_of_the_prompt_and_the_start_of_the_response(
    prompt: str, chosen: str, rejected: str, max_length: int, max_prompt_length: int | None, bos: bool
):
    assume(chosen.strip() and rejected.strip() and chosen != rejected)
    assume(max_prompt_length is None or max_prompt_length < max_length)
    whole = encoder_of(bos=bos)
    row = text_row(prompt, chosen, rejected)
    full = whole.encode(row).example
    encoder = Encoder(whole.tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
    try:
        example = encoder.encode(row).example
    except DataError as error:
        refused = error.reason
    else:
        refused = None
    if refused:
        assert refused in ("prompt too long", "chosen = rejected after truncation")
        return
    kept = len(example.prompt_ids) - int(bos)
    assert len(example.prompt_ids) == min(len(full.prompt_ids), max_prompt_length or len(full.prompt_ids))
    assert example.prompt_ids[:1] == full.prompt_ids[:1] or not bos
    assert example.prompt_ids[int(bos) :] == full.prompt_ids[len(full.prompt_ids) - kept :]
    for ids, whole_ids in zip(example.response_ids, full.response_ids, strict=True):
        assert ids == whole_ids[: max_length - len(example.prompt_ids)]
        assert ids


# Golden cases


def test_a_text_that_begins_with_bos_gets_no_second_one():
    example = encoder_of().encode(text_row("<s>The sky is")).example
    assert example == encoder_of().encode(text_row("The sky is")).example


def test_an_eos_that_the_tokenizer_appends_ends_responses_only():
    plain, appending = (
        encoder_of(appends_eos=flag).encode(text_row("The sky is")).example for flag in (False, True)
    )
    assert appending == plain
    assert [ids.count(EOS) for ids in sequences(appending)] == [1, 1]


def test_tokens_that_merge_across_the_boundary_leave_the_prompt_whole():
    encoder = encoder_of()
    encoded = encoder.encode(text_row("The sky is ", "blue.", "(green.)"))
    assert encoded.notes == (MERGED_TOKENS,)
    assert encoder.tokenizer.decode(encoded.example.prompt_ids) == "<s>The sky is "
    assert encoder.tokenizer.decode(encoded.example.chosen_ids[0]) == "blue.</s>"


def test_tokens_that_merge_into_a_generation_prompt_leave_it_whole():
    encoder = encoder_of(MERGING)
    encoded = encoder.encode(chat_row())
    assert encoded.notes == (MERGED_TOKENS, END_OF_TURN_APPENDED) * 2
    assert encoder.tokenizer.decode(encoded.example.prompt_ids) == "<s>user: The sky?\nassistant: "
    assert encoder.tokenizer.decode(encoded.example.chosen_ids[0]) == "blue.\n</s>"


def test_a_generation_prompt_that_the_conversation_lacks_stays_in_the_prompt():
    encoder = encoder_of(THINKING)
    encoded = encoder.encode(chat_row())
    assert encoded.notes == (NOT_A_PREFIX, NOT_A_PREFIX)
    decode = encoder.tokenizer.decode
    assert (
        decode(encoded.example.prompt_ids)
        == "<s><|im_start|>user\nThe sky?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert decode(encoded.example.chosen_ids[0]) == "blue.<|im_end|>\n"


def test_only_what_the_generation_prompt_shares_with_the_prompts_own_turns_must_stay():
    """Rendered alone, the prompt ends with EOS here; what `generate()` sees has none to lose."""
    encoder = encoder_of(_LINES + "{{ '<think>' if add_generation_prompt else '</s>' }}")
    encoded = encoder.encode(chat_row())
    assert encoded.notes == (NOT_A_PREFIX, NOT_A_PREFIX)
    assert encoder.tokenizer.decode(encoded.example.prompt_ids) == "<s>user: The sky?\n<think>"
    assert encoder.tokenizer.decode(encoded.example.chosen_ids[0]) == "assistant: blue.\n</s>"


def test_a_template_that_rewrites_the_prompt_is_refused():
    assert refusal(encoder_of(REWRITING), chat_row()) == "template rewrites the prompt"


def test_a_template_without_an_end_of_turn_gets_one():
    encoded = encoder_of(PLAIN).encode(chat_row())
    assert encoded.notes == (END_OF_TURN_APPENDED, END_OF_TURN_APPENDED)
    assert encoder_of(PLAIN).tokenizer.decode(encoded.example.rejected_ids[0]) == " green.\n</s>"


def test_an_end_of_turn_need_not_be_called_special():
    """Some tokenizers add it as an ordinary token; the template shows what it is."""
    tokenizer = tokenizer_of(CHATML.replace("<|im_end|>", "<end_of_turn>"))
    tokenizer.add_tokens(["<end_of_turn>"])
    assert Encoder(tokenizer).encode(chat_row()).notes == ()


def test_many_responses_share_one_prompt():
    row = PreferenceRow("The sky is", [" blue.", " b"], [" green.", " g", " s"], "f:1")
    example = encoder_of().encode(row).example
    assert [len(example.chosen_ids), len(example.rejected_ids)] == [2, 3]
    singles = encoder_of().encode(text_row("The sky is", " b", " s")).example
    assert (singles.chosen_ids[0], singles.rejected_ids[0]) == (
        example.chosen_ids[1],
        example.rejected_ids[2],
    )


def test_a_cut_is_noted_once_a_response_and_once_a_prompt():
    tokenizer = encoder_of().tokenizer
    row = chat_row("The sky?", "blue blue blue.", "green.")
    full = encoder_of().encode(row).example
    rejected_fits = len(full.prompt_ids) + len(full.rejected_ids[0])
    assert Encoder(tokenizer, max_length=rejected_fits).encode(row).notes == (RESPONSE_CUT, END_OF_TURN_LOST)
    chosen_fits = len(full.prompt_ids) + len(full.chosen_ids[0])
    assert Encoder(tokenizer, max_length=chosen_fits).encode(row).notes == ()
    # Only the line break after the end of turn goes.
    assert Encoder(tokenizer, max_length=chosen_fits - 1).encode(row).notes == (RESPONSE_CUT,)
    shorter = Encoder(tokenizer, max_length=chosen_fits, max_prompt_length=len(full.prompt_ids) - 1).encode(
        row
    )
    assert shorter.notes == (PROMPT_CUT,)
    assert shorter.example.prompt_ids == [BOS, *full.prompt_ids[2:]]


def test_rows_that_truncation_spoils_are_refused():
    tokenizer = encoder_of().tokenizer
    row = text_row("The sky is", " blue and green.", " blue and blue.")
    full = encoder_of().encode(row).example
    room = len(full.prompt_ids)
    assert refusal(Encoder(tokenizer, max_length=room), row) == "prompt too long"
    assert refusal(Encoder(tokenizer, max_length=room + 1), row) == "chosen = rejected after truncation"


def test_rows_that_tokenization_spoils_are_refused():
    assert refusal(encoder_of(TRIMMING), chat_row(chosen="blue", rejected="blue ")) == "chosen = rejected"
    assert refusal(encoder_of(TRIMMING), chat_row(chosen=" ")) == "empty chosen"
    assert refusal(encoder_of(), text_row("The sky is", rejected="")) == "empty rejected"
    assert refusal(encoder_of(), text_row("The sky is", rejected="</s>")) == "empty rejected"
    assert refusal(encoder_of(), text_row("The sky is \ud83d")) == "not tokenizable"
    assert refusal(encoder_of(bos=False), text_row("")) == "empty prompt"
    assert encoder_of().encode(text_row("")).example.prompt_ids == [BOS]


def test_templates_that_fail_and_arguments_that_are_ours_are_refused():
    assert refusal(encoder_of(REFUSING), chat_row()) == "template refuses the row"
    row = chat_row(chat_template_kwargs={"add_generation_prompt": False})
    assert refusal(encoder_of(), row) == "reserved template argument"
    assert refusal(encoder_of(), PreferenceRow("a", [[]], ["b"], "f:1")) == "wrong type"
    assert refusal(encoder_of(), PreferenceRow(chat_row().prompt, ["a"], ["b"], "f:1")) == "wrong type"


def test_tokenizers_that_cannot_serve_are_refused_with_what_to_do():
    with pytest.raises(ModelError, match=r"no chat template.*set tokenizer\.chat_template"):
        encoder_of(None).encode(chat_row())
    with pytest.raises(ModelError, match="not valid"):
        encoder_of("{% for %}").encode(chat_row())
    without_eos = tokenizer_of()
    without_eos.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        Encoder(without_eos)


def test_impossible_lengths_are_refused_all_at_once():
    with pytest.raises(RecipeError) as caught:
        Encoder(tokenizer_of(), max_length=1, max_prompt_length=0)
    assert len(caught.value.problems) == 2
    with pytest.raises(
        RecipeError,
        match=r"^max_prompt_length: 8 leaves no room for a response within max_length \(8 tokens\)$",
    ):
        Encoder(tokenizer_of(), max_length=8, max_prompt_length=8)


# Many rows


def numbered_rows(n: int) -> list[PreferenceRow]:
    return [PreferenceRow(f"The sky {i} is", [f" blue {i}."], [" green."], f"f:{i}") for i in range(n)]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_rows_keep_their_order_and_the_ledger_adds_up(num_proc: int | None):
    rows = numbered_rows(300)
    rows[7] = text_row("The sky is", chosen=" ")
    rows[200] = text_row("sky " * 100)
    counts = DataCounts(on_bad_row="skip", source="f")
    dataset = encode_rows(rows, Encoder(tokenizer_of(), max_length=11), counts, num_proc=num_proc)
    assert dataset.row_ids == [row.row_id for i, row in enumerate(rows) if i not in (7, 200)]
    assert counts.used == 298
    assert counts.skipped == {"empty chosen": 1, "prompt too long": 1}
    assert counts.notes[RESPONSE_CUT] == counts.notes[END_OF_TURN_LOST] > 0
    encoder = Encoder(tokenizer_of(), max_length=11)
    assert list(dataset) == [encoder.encode(row).example for i, row in enumerate(rows) if i not in (7, 200)]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_errors_keep_their_class(num_proc: int | None):
    bad_row = [*numbered_rows(100), text_row("The sky is", chosen="")]
    with pytest.raises(DataError, match="f:1: expected a chosen response"):
        encode_rows(bad_row, encoder_of(), DataCounts(), num_proc=num_proc)
    with pytest.raises(ModelError, match="no chat template"):
        encode_rows([chat_row()] * 100, encoder_of(None), DataCounts(), num_proc=num_proc)


def test_a_dataset_without_a_usable_row_is_refused_by_name():
    counts = DataCounts(on_bad_row="skip", source="pairs.jsonl")
    with pytest.raises(DataError, match=r"pairs\.jsonl: no row can be used: 2 x empty chosen"):
        encode_rows([text_row("a", chosen="")] * 2, encoder_of(), counts)
    with pytest.raises(DataError, match="there are none"):
        encode_rows([], encoder_of(), DataCounts())


def test_rows_encoded_together_are_those_encoded_one_by_one():
    tool = [{"role": "tool", "content": "3"}]
    rows = [
        chat_row(),
        chat_row(chosen="<think>so</think>blue."),
        text_row("The sky is"),
        text_row("", " "),
        text_row("half a pair \ud800"),
        chat_row(chosen=""),
        chat_row(chosen="\ud800"),
        PreferenceRow("The sky?", [[{"role": "assistant", "content": "1"}]], ["2"], "f:2"),
        PreferenceRow(
            chat_row().prompt,
            [[{"role": "assistant", "content": "1"}, *tool, {"role": "assistant", "content": "2"}]],
            [[{"role": "assistant", "content": "4"}]],
            "f:3",
        ),
        chat_row(),
    ]
    for encoder in (
        encoder_of(),
        encoder_of(THINKING),
        encoder_of(MERGING),
        encoder_of(None),
        encoder_of(max_length=9),
    ):
        together: list[Any] = []
        alone: list[Any] = []
        for row in rows:
            if encoder.tokenizer.chat_template is None and not isinstance(row.prompt, str):
                continue
            together.append(row)
            try:
                alone.append(encoder.encode(row))
            except DataError as error:
                alone.append(str(error))
        results = encoder.encode_all(together)
        assert [str(each) if isinstance(each, DataError) else each for each in results] == alone


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_row_that_cannot_be_encoded_comes_before_a_later_one_that_cannot_be_read(num_proc: int | None):
    def rows() -> Iterator[PreferenceRow]:
        yield from [chat_row()] * 70
        yield chat_row(chosen="blue.", rejected="blue.")
        raise DataError("cannot be read", "f:72", "unreadable")

    with pytest.raises(DataError, match="expected different responses"):
        encode_rows(rows(), encoder_of(), DataCounts(), num_proc=num_proc)
    counts = DataCounts(on_bad_row="skip")
    with pytest.raises(DataError, match="cannot be read"):
        encode_rows(rows(), encoder_of(), counts, num_proc=num_proc)
    assert counts.used == 70


def test_encoders_and_results_travel_between_processes():
    encoder = pickle.loads(pickle.dumps(encoder_of()))
    encoded: EncodedRow = pickle.loads(pickle.dumps(encoder.encode(chat_row())))
    assert encoded == encoder_of().encode(chat_row())


def test_rendering_shows_what_is_scored_token_by_token():
    encoder = encoder_of()
    example = encoder.encode(chat_row("The é?\x1b[2J", "blue.", "漢")).example
    assert render(example, encoder.tokenizer).split("\n") == [
        "f:1",
        f"  prompt    {len(example.prompt_ids):>5}  "
        r"<s><|im_start|>user\nThe é?\x1b[2J<|im_end|>\n<|im_start|>assistant\n",
        r"  chosen        5  ⟦bl⟧⟦ue⟧⟦.⟧⟦<|im_end|>⟧⟦\n⟧",
        r"  rejected      5  ⟦漢⟧⟦<|im_end|>⟧⟦\n⟧",
    ]


def test_the_hh_script_makes_a_tokenizer_and_model_that_encode_the_data(tmp_path: Path):
    script = [sys.executable, str(ROOT / "scripts" / "hh_tokenizer.py"), str(FIXTURE), str(tmp_path)]
    subprocess.run([*script, "--vocab-size", "400"], check=True, capture_output=True)
    assert (tmp_path / "model.safetensors").is_file()
    counts = DataCounts(on_bad_row="skip")
    dataset = encode_rows(
        read_rows(FIXTURE, counts), Encoder(AutoTokenizer.from_pretrained(tmp_path)), counts
    )
    assert (len(dataset), counts.used, counts.rows) == (22, 22, 24)
    assert counts.notes == {}


def test_a_response_that_begins_like_the_generation_prompt_loses_nothing():
    """The generation prompt ends in `<think>`, which the conversation lacks; the response begins alike."""
    encoder = encoder_of(THINKING)
    example = encoder.encode(chat_row(chosen="<table>", rejected="<b>")).example
    texts = [encoder.tokenizer.decode(ids) for ids in example.response_ids]
    assert texts == ["<table><|im_end|>\n", "<b><|im_end|>\n"]


@pytest.mark.parametrize("text", ["blue.<|im_end|>", "blue.<|im_end|>\n", "blue.<|im_end|>\n<|im_end|>"])
def test_an_end_of_turn_that_the_data_hold_as_text_stands_once(text: str):
    encoder = encoder_of(CHATML)
    assert (
        encoder.encode(chat_row(chosen=text)).example.chosen_ids
        == encoder.encode(chat_row()).example.chosen_ids
    )
    assert encoder.encode(chat_row(chosen=text)).notes == (END_OF_TURN_DOUBLED,)
    plain = encoder_of().encode(text_row("The sky is", " blue.</s>\n"))
    assert plain.example.chosen_ids[0].count(EOS) == 1


def test_a_response_of_nothing_but_an_end_of_turn_is_empty():
    assert refusal(encoder_of(CHATML), chat_row(chosen="<|im_end|>")) == "empty chosen"
