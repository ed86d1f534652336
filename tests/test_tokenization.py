"""Tokens of prompt and response decode to the text of both, whatever kind of tokenizer writes them."""

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from infopo.data.conversation import MERGED_TOKENS
from infopo.data.encode import UNKNOWN_TEXT, Encoder
from infopo.data.tokenization import Tokenization
from infopo.errors import DataError
from infopo.records import PreferenceRow

SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = 'The skyisblue.()"\n é漢'
CORPUS = ["The sky is blue. (The sky)", 'The "sky" is\n\nblue  blue.', '("sky")("blue")\n  é漢 The'] * 4


def bpe(**options: object) -> Tokenizer:
    return Tokenizer(models.BPE(unk_token="<unk>", **options))


def byte_level(*, add_prefix_space: bool) -> Tokenizer:
    core = bpe()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    core.decoder = decoders.ByteLevel()
    return core


def metaspace(scheme: str, *, split: bool, unigram: bool = False) -> Tokenizer:
    core = Tokenizer(models.Unigram()) if unigram else bpe()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    return core


def llama_2() -> Tokenizer:
    """The space before a text is put there by a normalizer, and again behind each special token."""
    core = bpe(fuse_unk=True)
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return core


def albert() -> Tokenizer:
    """Loses text: case, and all but one of several spaces."""
    core = metaspace("always", split=True, unigram=True)
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("  ", " ")])
    return core


def word_piece() -> Tokenizer:
    """Loses white space."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    return core


LOSSLESS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": lambda: byte_level(add_prefix_space=False),
    "byte-level BPE with a space first": lambda: byte_level(add_prefix_space=True),
    "Metaspace, always": lambda: metaspace("always", split=True),
    "Metaspace, first": lambda: metaspace("first", split=False),
    "Metaspace, never": lambda: metaspace("never", split=False),
    "Unigram, always": lambda: metaspace("always", split=True, unigram=True),
    "Unigram, first": lambda: metaspace("first", split=False, unigram=True),
    "Llama 2": llama_2,
}
LOSSY: dict[str, Callable[[], Tokenizer]] = {"ALBERT": albert, "WordPiece": word_piece}
KINDS = LOSSLESS | LOSSY


@cache
def tokenizer_of(kind: str, bos: bool) -> PreTrainedTokenizerFast:
    core = KINDS[kind]()
    options = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": 320 if "byte" in kind else 70}
    alphabet = [*LETTERS, *"▁0123456789=xaeZ|:"]
    if isinstance(core.model, models.Unigram):
        trainer = trainers.UnigramTrainer(unk_token="<unk>", initial_alphabet=alphabet, **options)
    elif isinstance(core.model, models.WordPiece):
        trainer = trainers.WordPieceTrainer(initial_alphabet=alphabet, **options)
    else:
        letters = pre_tokenizers.ByteLevel.alphabet() if "byte" in kind else alphabet
        trainer = trainers.BpeTrainer(initial_alphabet=letters, **options)
    core.train_from_iterator(CORPUS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


texts = st.text(st.sampled_from(LETTERS), min_size=1, max_size=10)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=25)
@given(prompt=texts, chosen=texts, rejected=texts)
def test_prompt_and_response_decode_to_their_text(
    kind: str, bos: bool, prompt: str, chosen: str, rejected: str
):
    assume(chosen.strip() and rejected.strip() and chosen != rejected and prompt.strip())
    tokenizer = tokenizer_of(kind, bos)
    example = (
        Encoder(tokenizer, max_length=None).encode(PreferenceRow(prompt, [chosen], [rejected], "f:1")).example
    )
    tokens = Tokenization(tokenizer)
    for text, ids in zip((chosen, rejected), example.response_ids, strict=True):
        whole = tokens.text(f"{prompt}{text}</s>", "f:1")
        assert tokens.decode([*example.prompt_ids, *ids]) == tokens.decode(whole)
        assert tokens.decode(whole[int(bos) :]).strip() == f"{prompt}{text}</s>".strip()
    assert example.prompt_ids == tokens.text(prompt, "f:1")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", LOSSY)
@settings(max_examples=25)
@given(prompt=texts, chosen=texts, rejected=texts)
def test_a_tokenizer_that_loses_text_gets_none_added(
    kind: str, bos: bool, prompt: str, chosen: str, rejected: str
):
    assume(chosen.strip() and rejected.strip() and prompt.strip())
    tokenizer = tokenizer_of(kind, bos)
    encoder, row = Encoder(tokenizer, max_length=None), PreferenceRow(prompt, [chosen], [rejected], "f:1")
    try:
        encoded = encoder.encode(row)
    except DataError as error:  # what differs is lost, or a word of the prompt with the response is unknown
        assume(error.reason not in ("chosen = rejected", "empty chosen", "empty rejected"))
        raise
    tokens = Tokenization(tokenizer)
    for text, ids in zip((chosen, rejected), encoded.example.response_ids, strict=True):
        decoded = tokens.decode([*encoded.example.prompt_ids, *ids])
        whole = tokens.decode(tokens.text(f"{prompt}{text}</s>", "f:1"))
        assert "".join(decoded.split()) == "".join(whole.split()) or "<unk>" in whole
        if not encoded.notes:
            assert decoded == whole


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_merge_leave_the_prompt_whole_and_add_no_space(kind: str):
    tokenizer = tokenizer_of(kind, True)
    tokens = Tokenization(tokenizer)
    whole = tokens.text("The sky", "f:1")
    merged = [
        n
        for n in range(1, 7)
        if tokens.text("The sky"[:n], "f:1") != whole[: len(tokens.text("The sky"[:n], "f:1"))]
    ]
    assert merged, "this tokenizer merges nothing, so it tests nothing"
    for end in merged:
        prompt, chosen = "The sky"[:end], "The sky"[end:]
        encoded = Encoder(tokenizer).encode(PreferenceRow(prompt, [chosen], ["é"], "f:1"))
        assert MERGED_TOKENS in encoded.notes
        ids = [*encoded.example.prompt_ids, *encoded.example.chosen_ids[0]]
        assert tokens.decode(ids) == tokens.decode([*whole, tokenizer.eos_token_id])


@pytest.mark.parametrize("prompt", ["The", "</s>", "<s>The", "[gMASK]<s>The"])
def test_a_prefix_of_two_tokens_stands_once(prompt: str):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_of("byte-level BPE", False).backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["[gMASK]"],
    )
    mask = tokenizer.convert_tokens_to_ids("[gMASK]")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <s> $A", special_tokens=[("[gMASK]", mask), ("<s>", tokenizer.bos_token_id)]
    )
    ids = Tokenization(tokenizer).text(prompt, "f:1")
    assert ids[:2] == [mask, tokenizer.bos_token_id]
    assert [ids.count(token) for token in ids[:2]] == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_has_become_the_unknown_token_is_counted(kind: str):
    encoder = Encoder(tokenizer_of(kind, True))
    known = encoder.encode(PreferenceRow("The sky", ["is blue"], ["is"], "f:1")).notes
    unknown = encoder.encode(PreferenceRow("The ж.", ["is ж"], ["is"], "f:1")).notes
    assert UNKNOWN_TEXT not in known
    assert unknown.count(UNKNOWN_TEXT) == (0 if "byte" in kind else 2)


def test_an_unknown_token_that_is_the_end_of_text_counts_nothing():
    tokenizer = tokenizer_of("byte-level BPE", False)
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="</s>", eos_token="</s>"
    )
    assert Encoder(own).encode(PreferenceRow("The sky", ["is"], ["blue"], "f:1")).notes == ()
