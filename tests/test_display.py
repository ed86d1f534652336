"""Examples as a person reads them: data cannot move a terminal's cursor, and what is scored stands out."""

import re
from dataclasses import replace

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infopo.data.display import display, pieces_of
from infopo.lab.tokenizer import build_tokenizer
from infopo.records import PreferenceExample

TOKENIZER = build_tokenizer()


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return found


PAIR = PreferenceExample(ids("<|user|>1+1=?<|end|>"), [ids("1+1=2<|end|>")], [ids("3<|end|>")], "a.jsonl:1")


def test_each_side_has_its_tokens_and_special_tokens_are_visible():
    assert display(PAIR, TOKENIZER).splitlines() == [
        "a.jsonl:1",
        "  prompt        7  <|user|>1+1=?<|end|>",
        "  chosen        6  1+1=2<|end|>",
        "  rejected      2  3<|end|>",
    ]


def test_masked_text_is_dim_and_scored_text_is_plain():
    with_context = replace(PAIR, context=(((1, 3),), ()))
    prompt, chosen, rejected = display(with_context, TOKENIZER, color=True).splitlines()[1:]
    assert chosen.endswith("1\x1b[2m+\x1b[0m\x1b[2m1\x1b[0m=2\x1b[36m<|end|>\x1b[0m")
    assert "\x1b[2m?\x1b[0m" in prompt
    assert "\x1b[2m" not in rejected
    plain = display(with_context, TOKENIZER)
    assert "  1⟪+1⟫=2<|end|>" in plain
    assert "\x1b" not in plain
    assert (
        re.sub(r"\x1b\[\d*m", "", "\n".join((prompt, chosen, rejected)))
        == plain.replace("⟪", "").replace("⟫", "").partition("\n")[2]
    )


def of_bytes() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, so that any text of a hostile data set can be written."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = of_bytes()


def hostile(text: str, *, color: bool = False) -> str:
    example = PreferenceExample([0], [BYTES(text)["input_ids"]], [[0]], "a:1\x1b]0;b\x07")
    return display(example, BYTES, color=color)


def test_control_characters_are_escapes_and_line_breaks_are_both():
    text = "".join(map(chr, [*range(32), *range(127, 160), 0x202E, 0x2028, 0x200B])) + "\n\\nabla x\n"
    written = hostile(text)
    assert all(c.isprintable() or c == "\n" for c in written)
    lines = written.split("\n")
    assert lines[0] == "a:1\\x1b]0;b\\x07"
    # A backslash of the text is no line break, and a line break at the end leaves no empty line.
    assert lines[-2] == " " * 19 + r"\nabla x\n"
    assert len(lines) == 6
    colored = hostile(text, color=True)
    assert set(re.findall("\x1b[^m]*m", colored)) <= {"\x1b[2m", "\x1b[36m", "\x1b[0m"}


def test_a_long_text_shows_its_ends_and_says_what_is_left_out():
    written = hostile("a" * 5000 + "b" * 5000)
    assert " [... 6000 characters left out ...] " in written
    assert len(max(re.findall("b+", written), key=len)) == 2000


def test_a_character_of_several_tokens_is_one_piece():
    pieces = list(pieces_of(BYTES("éa漢")["input_ids"], [], BYTES))
    assert [piece.text for piece in pieces] == ["é", "a", "漢"]
