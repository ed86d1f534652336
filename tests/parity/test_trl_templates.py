"""The encoder against TRL, token by token, on every chat template that TRL ships; each difference has its reason here.

The table says what differs; everything that it does not name has TRL's tokens exactly. A difference that appears, and
one that disappears, fails the test.
"""

from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as templates
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.data_utils import _tokenize, common_prefix_length

from infopo.data.conversation import USERS_BETWEEN
from infopo.data.encode import EncodedRow, Encoder
from infopo.data.templates import TODAY
from infopo.errors import DataError
from infopo.records import Message, PreferenceRow

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))

_DEEPSEEK_TOOLS = [
    f"<｜tool▁{what}▁{side}｜>"
    for what in ("calls", "call", "outputs", "output")
    for side in ("begin", "end")
]
_QWEN = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_GEMMA_4 = ["<|turn>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"]

FAMILIES: dict[str, tuple[str, list[str], list[str]]] = {
    "cohere": (
        "<|END_OF_TURN_TOKEN|>",
        ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
         "<|START_RESPONSE|>", "<|END_RESPONSE|>"],
        [],
    ),
    "deepseek": (
        "<｜end▁of▁sentence｜>",
        ["<｜begin▁of▁sentence｜>"],
        ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁sep｜>", *_DEEPSEEK_TOOLS],
    ),
    "diffusion_gemma": ("<turn|>", ["<bos>", *_GEMMA_4, "<|tool_response>", "<tool_response|>", '<|"|>'], []),
    "gemma4": ("<turn|>", ["<bos>", *_GEMMA_4, "<|tool_response>", "<tool_response|>", '<|"|>'], []),
    "gemma": ("<eos>", ["<bos>", "<start_of_turn>", "<end_of_turn>"], []),
    "glm4": (
        "<|endoftext|>",
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
        [*_QWEN, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    ),
    "gptoss": ("<|return|>", ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|constrain|>"], []),
    "idefics3": ("<end_of_utterance>", ["<|begin_of_text|>"], []),
    "lfm2": (
        "<|im_end|>",
        ["<|startoftext|>", "<|im_start|>", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_list_start|>",
         "<|tool_list_end|>", "<|tool_response_start|>", "<|tool_response_end|>"],
        ["<think>", "</think>"],
    ),
    "llama3": (
        "<|eot_id|>",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"],
        [],
    ),
    "llava": ("<|im_end|>", ["<|im_start|>"], []),
    "muse": ("<|eot|>", ["<|start|>", "<|message|>", "<|eom|>"], []),
    "nemotron": ("<|im_end|>", ["<|im_start|>"], _QWEN),
    "phi3": ("<|endoftext|>", ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], []),
    "qwen": ("<|im_end|>", ["<|endoftext|>", "<|im_start|>"], _QWEN),
    "smolvlm": ("<end_of_utterance>", ["<|im_start|>"], []),
}  # fmt: skip
"""Family -> EOS, special tokens (BOS first, if it has one), and tokens that are added and not special."""

BOS = ("<BOS_TOKEN>", "<｜begin▁of▁sentence｜>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the family's special tokens."""
    eos, special, added = FAMILIES[family]
    alphabet = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(alphabet, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    bos = {"bos_token": special[0]} if special[0] in BOS else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=eos, additional_special_tokens=special, **bos
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return tokenizer


def said(text: str, **more: Any) -> list[Message]:
    return [{"role": "assistant", "content": text, **more}]


CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "x"},
                "b": {"type": "string", "description": "y"},
            },
            "required": ["a"],
        },
    },
}
USER: Message = {"role": "user", "content": "Q"}
ANSWER: Message = {"role": "tool", "name": "add", "content": "SECRET"}

CONVERSATIONS: dict[str, tuple[list[Message], list[Message], list[Message], list[Any] | None]] = {
    "plain": ([USER], said("good"), said("bad"), None),
    "system": ([{"role": "system", "content": "Be brief."}, USER], said("good"), said("bad"), None),
    "turns": ([USER, *said("A"), {"role": "user", "content": "R"}], said("good"), said("bad"), None),
    "inline": (
        [USER],
        said("<think>\nI see.\n</think>\n\ngood"),
        said("<think>\nHm.\n</think>\n\nbad"),
        None,
    ),
    "reasoning": (
        [USER],
        said("good", reasoning_content="I see."),
        said("bad", reasoning_content="Hm."),
        None,
    ),
    "call": ([USER], said("", tool_calls=CALL), said("bad"), [TOOL]),
    "tools": ([USER], [*said("", tool_calls=CALL), ANSWER, *said("good")], said("bad"), [TOOL]),
}

SAME = "TRL's tokens"
BOTH_REFUSE = "the template refuses it, for TRL too"
PROMPT_KEPT = "the prompt keeps its end, which TRL leaves out"
EOS_APPENDED = "the template ends no turn, and EOS is appended"
REASONING_KEPT = "reasoning that the template takes out is kept, and the prompt its end"
TAKEN = "the template reads content in parts only, and gets it so; TRL's rendering fails"
PARTS = "the template reads content in parts only, and gets it so; TRL trains on empty turns"
DROPS = "template drops content"
CLOSES = "generation prompt closes reasoning"
UNTELLABLE = "turns cannot be told apart"

TEXT = ("plain", "system", "turns")
DIFFERENCES: list[tuple[str, dict[str, str]]] = [
    (
        "cohere cohere_training cohere2 cohere2_training gemma3 gemma3_training",
        {"call": DROPS, "reasoning": DROPS, "tools": BOTH_REFUSE},
    ),
    (
        "gemma gemma_training",
        {"system": BOTH_REFUSE, "call": DROPS, "reasoning": DROPS, "tools": BOTH_REFUSE},
    ),
    (
        "deepseek_r1_distill",
        dict.fromkeys(TEXT, PROMPT_KEPT)
        | {"inline": REASONING_KEPT, "call": DROPS, "reasoning": DROPS, "tools": DROPS},
    ),
    (
        "deepseek_r1_distill_training",
        dict.fromkeys(TEXT, PROMPT_KEPT) | {"call": DROPS, "reasoning": DROPS, "tools": DROPS},
    ),
    (
        "deepseekv3",
        dict.fromkeys(TEXT, PROMPT_KEPT)
        | {"inline": REASONING_KEPT, "reasoning": DROPS, "call": BOTH_REFUSE, "tools": BOTH_REFUSE},
    ),
    (
        "deepseekv3_training",
        dict.fromkeys((*TEXT, "call", "tools"), PROMPT_KEPT) | {"inline": REASONING_KEPT, "reasoning": DROPS},
    ),
    (
        "gemma4 gemma4_v2 gemma4_v3 gemma4_v4 lfm2_v2 lfm2_v2_training llama3_1 llama3_2 qwen2_5 qwen2_5_training "
        "qwen3_instruct_2507 qwen3_instruct_2507_training qwen3_vl qwen3_vl_training",
        {"reasoning": DROPS},
    ),
    ("glm4moe", dict.fromkeys(CONVERSATIONS, EOS_APPENDED)),
    (
        "idefics3 idefics3_training smolvlm smolvlm_training",
        dict.fromkeys((*TEXT, "inline"), PARTS)
        | {"reasoning": DROPS, "call": BOTH_REFUSE, "tools": BOTH_REFUSE},
    ),
    (
        "llava_next llava_next_training",
        dict.fromkeys((*TEXT, "inline"), TAKEN) | dict.fromkeys(("reasoning", "call", "tools"), BOTH_REFUSE),
    ),
    (
        "lfm2 lfm2_training llama3 llama3_training qwen2_5_vl qwen2_5_vl_training",
        {"call": DROPS, "reasoning": DROPS, "tools": DROPS},
    ),
    (
        "nemotron_3_5_lightning nemotron_3_5_lightning_training nemotron_3_nano nemotron_3_nano_training "
        "nemotron_3_super nemotron_3_super_training nemotron_3_ultra nemotron_3_ultra_training",
        dict.fromkeys((*TEXT, "call", "tools"), PROMPT_KEPT),
    ),
    (
        "phi3 phi3_training phi3_5 phi3_5_training",
        {"call": DROPS, "reasoning": DROPS, "tools": UNTELLABLE},
    ),
    ("qwen3_5_nothink qwen3_5_nothink_training", {"inline": CLOSES, "reasoning": CLOSES}),
]
"""Templates, and what differs for each conversation; templates and conversations that are missing have TRL's tokens."""

EXPECTED = {name: difference for names, difference in DIFFERENCES for name in names.split()}

Ids = tuple[list[int], list[int], list[int]]


def by_trl(tokenizer: PreTrainedTokenizerFast, conversation: str) -> Ids | None:
    """As DPOTrainer's `tokenize_fn`; None: the template refuses the row."""
    prompt, chosen, rejected, tools = CONVERSATIONS[conversation]

    def tokens(turns: list[Message], **more: Any) -> list[int]:
        return list(_tokenize(tokenizer, turns, tools=tools, **more)["input_ids"])

    try:
        alone, *whole = (
            tokens(prompt, add_generation_prompt=True),
            tokens(prompt + chosen),
            tokens(prompt + rejected),
        )
    except Exception:  # whatever a template raises
        return None
    end = min(common_prefix_length(alone, ids) for ids in whole)
    return alone[:end], whole[0][end:], whole[1][end:]


def by_us(tokenizer: PreTrainedTokenizerFast, conversation: str) -> tuple[EncodedRow | None, str]:
    prompt, chosen, rejected, tools = CONVERSATIONS[conversation]
    row = PreferenceRow(prompt, [list(chosen)], [list(rejected)], "row", {}, tools)
    try:
        return Encoder(tokenizer, max_length=None).encode(row), ""
    except DataError as error:
        return None, error.reason


def difference(tokenizer: PreTrainedTokenizerFast, conversation: str) -> str:
    """What the encoder does otherwise than TRL, in the words above."""
    theirs, (encoded, reason) = by_trl(tokenizer, conversation), by_us(tokenizer, conversation)
    if encoded is None:
        return BOTH_REFUSE if theirs is None else reason
    if theirs is None:
        return TAKEN
    example = encoded.example
    ours = [example.prompt_ids, example.chosen_ids[0], example.rejected_ids[0]]
    if ours == list(theirs):
        return SAME
    kept = list(ours[0][: len(theirs[0])]) == theirs[0]
    eos = [tokenizer.eos_token_id]

    def same(more: list[int]) -> bool:
        return all(list(ids) == [*other, *more] for ids, other in zip(ours[1:], theirs[1:], strict=True))

    if ours[0] == theirs[0] and same(eos):
        return EOS_APPENDED
    if kept and same([]):
        return PROMPT_KEPT
    if kept and all(list(ids[-len(o) :]) == o for ids, o in zip(ours[1:], theirs[1:], strict=True)):
        return REASONING_KEPT
    texts = [tokenizer.decode(ids) for ids in ours[1:]]
    if all(
        word in text for word, text in zip(("good", "bad"), texts, strict=True)
    ) and "good" not in tokenizer.decode(theirs[1]):
        return PARTS
    return f"not explained: {[tokenizer.decode(ids) for ids in (*ours, *theirs)]}"


class Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "Clock":
        return cls.fromisoformat(TODAY)


def family_of(template: str) -> str:
    return next(family for family in FAMILIES if template.startswith(family))


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    monkeypatch.setattr(templates, "datetime", Clock)  # TRL's prompt is that of the day
    tokenizer = tokenizer_of(family_of(request.param))
    tokenizer.chat_template = (FOLDER / f"{request.param}.jinja").read_text(encoding="utf-8")
    return tokenizer


def test_the_table_names_templates_that_there_are():
    assert set(EXPECTED) <= set(TEMPLATES)
    assert len(TEMPLATES) >= 70


@pytest.mark.parametrize("tokenizer", TEMPLATES, indirect=True)
def test_every_template_gives_the_tokens_of_trl_but_for_the_differences_of_the_table(
    tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest
):
    expected = EXPECTED.get(request.node.callspec.params["tokenizer"], {})
    found = {conversation: difference(tokenizer, conversation) for conversation in CONVERSATIONS}
    assert found == dict.fromkeys(CONVERSATIONS, SAME) | expected


@pytest.mark.parametrize("within", ["a tool", "a user"])
@pytest.mark.parametrize("tokenizer", TEMPLATES, indirect=True)
def test_what_others_answer_is_context_and_what_the_policy_writes_is_scored(
    tokenizer: PreTrainedTokenizerFast, within: str, request: pytest.FixtureRequest
):
    if within == "a tool":
        encoded, _ = by_us(tokenizer, "tools")
        if encoded is None:
            return
    else:
        rounds = [*said("two"), {"role": "user", "content": "SECRET"}, *said("good")]
        row = PreferenceRow([USER], [rounds], [said("bad")], "row")
        encoder = Encoder(tokenizer, max_length=None)
        if request.node.callspec.params["tokenizer"] == "qwen3_5_nothink":
            # Its generation prompt closes the reasoning, and its earlier turns have none.
            with pytest.raises(DataError, match="closes it in a later turn only"):
                encoder.encode(row)
            return
        encoded = encoder.encode(row)
        assert USERS_BETWEEN in encoded.notes
    ids, (spans, none) = encoded.example.chosen_ids[0], encoded.example.spans
    context = "".join(tokenizer.decode(ids[begin:end]) for begin, end in spans)
    scored = tokenizer.decode([t for i, t in enumerate(ids) if not any(a <= i < b for a, b in spans)])
    assert "SECRET" in context
    assert "SECRET" not in scored
    assert all(word in scored and word not in context for word in ("two", "good"))
    assert none == ()
