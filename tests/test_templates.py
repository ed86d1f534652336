"""Chat templates: what ends a turn, what is missing, variables and dates, content in parts, and templates that hang."""

import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from infopo import InfoPOConfig
from infopo.build import build_arguments
from infopo.config import parse_recipe
from infopo.data import templates
from infopo.data.conversation import (
    EMPTY_BLOCK_DROPPED,
    PROMPT_NOT_WRITTEN,
    REASONING_DROPPED,
    WRITTEN_AS_DATA,
)
from infopo.data.counts import DataCounts
from infopo.data.encode import EncodedRow, Encoder, encode_rows
from infopo.data.endings import END_OF_TURN_APPENDED, END_OF_TURN_DOUBLED
from infopo.data.memory_limit import MemoryLimit
from infopo.data.survey import token_problem_lines
from infopo.data.templates import TODAY, ChatTemplate
from infopo.errors import DataError, ModelError, RecipeError
from infopo.intake import encoder_of
from infopo.lab import policy_path
from infopo.records import Message, PreferenceRow

SHIPPED = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}


def tokenizer_of(
    template: str, eos: str = "<|im_end|>", ordinary: tuple[str, ...] = ()
) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot|>"]})
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer


def said(text: str, **more: Any) -> list[Message]:
    return [{"role": "assistant", "content": text, **more}]


def row_of(
    chosen: list[Message], prompt: list[Message] | None = None, rejected: str = "No", **more: Any
) -> PreferenceRow:
    return PreferenceRow(
        prompt or [{"role": "user", "content": "Q"}], [chosen], [said(rejected)], "f:1", **more
    )


def chosen_text(
    tokenizer: PreTrainedTokenizerBase, row: PreferenceRow, **settings: Any
) -> tuple[str, EncodedRow]:
    encoded = Encoder(tokenizer, max_length=None, **settings).encode(row)
    return tokenizer.decode(encoded.example.chosen_ids[0]), encoded


def reason(tokenizer: PreTrainedTokenizerBase, row: PreferenceRow) -> str:
    with pytest.raises(DataError) as caught:
        Encoder(tokenizer).encode(row)
    assert len(str(caught.value)) < 500
    return caught.value.reason


# What ends a turn


@pytest.mark.parametrize(
    ("end", "eos", "expected"),
    [
        ("<|im_end|>\n", "<|im_end|>", "<|im_end|>\n"),
        ("<|im_end|>\n", "<|end|>", "<|im_end|>\n"),
        ("<|eot|>\n<|im_end|>", "<|im_end|>", "<|eot|>\n<|im_end|>"),
        ("<|eot|><|eot|>", "<|eot|>", "<|eot|><|eot|>"),
        ("</answer>", "<|im_end|>", "</answer>"),  # a token of its own, if not a special one
        ("", "<|im_end|>", "<|im_end|>"),
    ],
)
@pytest.mark.parametrize("last", ["", "</answer>", "</think>", "<|tag|>"])
def test_a_response_ends_as_the_template_ends_it_and_keeps_its_own_last_token(
    end: str, eos: str, expected: str, last: str
):
    template = (
        "{% for m in messages %}<|user|>{{ m.content }}" + end.replace("\n", "{{ '\n' }}") + "{% endfor %}"
    )
    template += "{% if add_generation_prompt %}<|user|>{% endif %}"
    tokenizer = tokenizer_of(template, eos, ("</answer>", "</think>", "<|tag|>"))
    text, encoded = chosen_text(tokenizer, row_of(said("Yes" + last)))
    doubled = last != "" and end.startswith(last)  # the data hold what the template adds
    assert text == f"Yes{'' if doubled else last}{expected}"
    assert encoded.notes[:1] == (
        (END_OF_TURN_DOUBLED,) if doubled else () if end else (END_OF_TURN_APPENDED,)
    )


@pytest.mark.parametrize("held", ["<|eot|>", "<|eot|>\n", "<|eot|>\n<|im_end|>", "<|eot|><|eot|>"])
def test_of_two_different_ends_what_the_data_hold_stands_once(held: str):
    template = "{% for m in messages %}<|user|>{{ m.content }}<|eot|>{{ '\n' }}<|im_end|>{% endfor %}"
    tokenizer = tokenizer_of(template + "{% if add_generation_prompt %}<|user|>{% endif %}")
    text, encoded = chosen_text(tokenizer, row_of(said("Yes" + held)))
    assert text == "Yes<|eot|>\n<|im_end|>"
    assert encoded.notes == (END_OF_TURN_DOUBLED,)


def test_a_text_keeps_another_token_before_its_eos():
    row = PreferenceRow("Q", ["Yes<|eot|>"], ["No<|im_end|>"], "f:1")
    text, encoded = chosen_text(tokenizer_of(CHATML), row)
    assert text == "Yes<|eot|><|im_end|>"
    assert encoded.notes == ()


@pytest.mark.parametrize("name", ["</tool_call>", "</think>"])
def test_tool_calls_keep_the_tag_that_ends_them(name: str):
    tokenizer = tokenizer_of(CHATML.replace("</tool_call>", name), ordinary=("<tool_call>", name))
    text, encoded = chosen_text(tokenizer, row_of(said("", tool_calls=[CALL])))
    assert text.endswith(f"}}{name}<|im_end|>\n")
    assert encoded.notes == ()


# What does not stand in its rendering


@pytest.mark.parametrize(
    "turn",
    [
        said("Yes", reasoning_content="Because of rain."),
        said("Yes", thinking="Because of rain."),
        said("", tool_calls=[CALL | {"function": {"name": "add", "arguments": {"b": "unseen"}}}]),
    ],
)
def test_content_that_the_template_does_not_write_refuses_the_row(turn: list[Message]):
    template = CHATML.replace("c.function | tojson", "c.function.name")
    assert reason(tokenizer_of(template), row_of(turn)) == "template drops content"


@pytest.mark.parametrize("to_json", ["tojson", "tojson(ensure_ascii=True)"])
def test_content_is_found_however_its_white_space_and_escapes_are_written(to_json: str):
    template = CHATML.replace("{{ m.content }}", "{{ m.content | trim | replace('\n', ' ') }}")
    template = template.replace("| tojson", f"| {to_json}")
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": 'é "x"\n\\'}}}
    tokenizer = tokenizer_of(template, ordinary=("é",))
    for turn in (said("  Yes,\n\nof course \n"), said("", tool_calls=[call])):
        chosen_text(tokenizer, row_of(turn))


DROPPING = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")


@pytest.mark.parametrize("opens", ["", "<think>\n", "<think>"])
def test_reasoning_that_the_template_takes_out_is_written_behind_the_generation_prompt(opens: str):
    template = DROPPING.replace("assistant\n{% endif", f"assistant\n{opens}{{% endif")
    tokenizer = tokenizer_of(template)
    text, encoded = chosen_text(tokenizer, row_of(said("<think>\nRain.\n</think>\n\nYes")))
    whole = tokenizer.decode(encoded.example.prompt_ids) + text
    assert whole.endswith("<|im_start|>assistant\n<think>\nRain.\n</think>\n\nYes<|im_end|>\n")
    assert WRITTEN_AS_DATA in encoded.notes


@pytest.mark.parametrize("opens", ["<think>\n", "<think>"])
@pytest.mark.parametrize(
    "said_so",
    ["<think>\nt\n</think>\n\nYes", "<think></think>Yes", "<think>\n\n</think>\n\nYes", "t\n</think>\n\nYes"],
)
def test_a_think_block_that_the_generation_prompt_opens_is_closed_as_the_data_close_it(
    opens: str, said_so: str
):
    """Even if the block is empty, stands without its opening tag, or holds a letter that the end of turn has too."""
    template = DROPPING.replace("assistant\n{% endif", f"assistant\n{opens}{{% endif")
    text, encoded = chosen_text(
        tokenizer_of(template.replace("<|im_end|>", "<|eot|>"), "<|eot|>"), row_of(said(said_so))
    )
    kept = said_so.removeprefix("<think>")
    assert text == (kept.lstrip() if opens.endswith("\n") else kept) + "<|eot|>\n"
    assert WRITTEN_AS_DATA in encoded.notes


EMPTY = [
    "<think>\n\n</think>\n\nYes",
    "<think></think>Yes",
    "</think>Yes",
    "<think>so</think>X<think></think>Yes",
]
KEEPS_THOUGHTS = CHATML.replace(
    "{{ m.content }}", "{{ m.content.replace('<think></think>', '').replace('<think>\n\n</think>\n\n', '') }}"
)


@pytest.mark.parametrize("template", [DROPPING, KEEPS_THOUGHTS])
@pytest.mark.parametrize("said_so", EMPTY)
def test_an_empty_think_block_that_the_template_takes_out_is_written(template: str, said_so: str):
    """With a generation prompt that opens none, also if the template drops only blocks that are empty."""
    tokenizer = tokenizer_of(template)
    text, encoded = chosen_text(tokenizer, row_of(said(said_so)))
    assert text == f"{said_so}<|im_end|>\n"
    kept = template is KEEPS_THOUGHTS and said_so.startswith("</think>")
    assert encoded.notes == (() if kept else (WRITTEN_AS_DATA,))
    turns = [*said(said_so), {"role": "user", "content": "More"}, *said(said_so)]
    text, encoded = chosen_text(tokenizer, row_of(turns))
    assert text.endswith(f"<|im_start|>assistant\n{said_so}<|im_end|>\n")


def test_an_empty_think_block_is_counted_where_it_cannot_be_written_and_left_where_it_has_other_tags():
    turn = said("<think></think>", tool_calls=[CALL])
    _, encoded = chosen_text(tokenizer_of(DROPPING), row_of(turn))
    assert encoded.notes == (EMPTY_BLOCK_DROPPED,)
    answered = [*turn, {"role": "tool", "content": "3"}, *said("Yes")]
    _, encoded = chosen_text(tokenizer_of(DROPPING), row_of(answered))
    assert EMPTY_BLOCK_DROPPED in encoded.notes
    tags = CHATML.replace("m.content", "m.content.replace('<think>', '(').replace('</think>', ')')")
    text, encoded = chosen_text(tokenizer_of(tags), row_of(said("<think></think>Yes")))
    assert (text, encoded.notes) == ("()Yes<|im_end|>\n", ())
    closed = DROPPING.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
    text, encoded = chosen_text(tokenizer_of(closed), row_of(said("<think>\n\n</think>\n\nYes")))
    assert text.strip() == "Yes<|im_end|>"
    assert WRITTEN_AS_DATA not in encoded.notes


@pytest.mark.parametrize("more", [{"reasoning_content": "t"}, {"thinking": "e"}, {"reasoning": "Yes"}])
def test_a_short_thought_is_not_found_in_the_words_around_it(more: dict[str, str]):
    row = row_of(said("Yes", **more))
    assert (
        reason(tokenizer_of(CHATML.replace("<|im_end|>", "<|eot|>"), "<|eot|>"), row)
        == "template drops content"
    )


def test_reasoning_behind_a_generation_prompt_that_says_there_is_none_is_refused():
    template = DROPPING.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
    row = row_of(said("<think>\nRain.\n</think>\n\nYes"))
    assert reason(tokenizer_of(template), row) == "template drops content"


def test_reasoning_of_an_earlier_turn_of_a_response_is_counted():
    turns = [*said("<think>Rain.</think>", tool_calls=[CALL]), {"role": "tool", "content": "3"}, *said("Yes")]
    _, encoded = chosen_text(tokenizer_of(DROPPING), row_of(turns))
    assert REASONING_DROPPED in encoded.notes


def test_a_system_prompt_and_tools_that_the_template_ignores_are_counted_and_the_first_named():
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    counts = DataCounts()
    encode_rows([row_of(said("Yes"), prompt)], Encoder(tokenizer_of(template)), counts)
    assert any(re.search(rf"1 x {PROMPT_NOT_WRITTEN} \(first: f:1\)", line) for line in counts.lines())


# Variables, dates, parts, roles


def test_variables_of_all_rows_come_after_those_of_a_row():
    tokenizer = tokenizer_of("{{ level }}" + CHATML)
    for own, level in (({}, "5"), ({"level": "7"}, "7")):
        _, encoded = chosen_text(
            tokenizer, row_of(said("Yes"), chat_template_kwargs=own), chat_template_kwargs={"level": "5"}
        )
        assert tokenizer.decode(encoded.example.prompt_ids).startswith(level)


RECIPE = "model: {name_or_path: lab:policy}\ndata: {path: lab:verified}\noutput_dir: out\n"


def test_a_recipe_and_the_configuration_take_variables_and_keep_them():
    recipe = parse_recipe(
        RECIPE, source="r.yaml", overrides=["data.chat_template_kwargs.level=5", "data.as_chat=true"]
    )
    arguments = build_arguments(recipe)
    assert (arguments.chat_template_kwargs, arguments.as_chat) == ({"level": 5}, True)
    encoder = encoder_of(recipe.data, tokenizer_of(CHATML))
    assert (encoder.template.variables, encoder.as_chat) == ({"level": 5}, True)
    assert InfoPOConfig(output_dir="x", chat_template_kwargs={"level": 5}).to_dict()[
        "chat_template_kwargs"
    ] == {"level": 5}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"tools": []}, "tools cannot be set"),
        ({"add_generation_prompt": True, "level": 3}, "add_generation_prompt cannot be set"),
        ({"strftime_now": "yesterday"}, f"expected a date like {TODAY}"),
        ({"level": {1, 2}}, "JSON"),
        ("level", "expected a dict"),
    ],
)
def test_variables_that_cannot_be_set_are_refused_at_once(variables: Any, message: str):
    with pytest.raises(RecipeError, match=message):
        InfoPOConfig(output_dir="x", chat_template_kwargs=variables)


@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
@pytest.mark.parametrize(("variables", "year"), [({}, TODAY[:4]), ({"strftime_now": "2031-02-03"}, "2031")])
def test_today_is_one_day(name: str, variables: dict[str, str], year: str):
    tokenizer = tokenizer_of((SHIPPED / f"{name}.jinja").read_text(encoding="utf-8"))
    counts = DataCounts()
    dataset = encode_rows([row_of(said("Yes"))], Encoder(tokenizer, chat_template_kwargs=variables), counts)
    assert year in tokenizer.decode(dataset[0].prompt_ids)
    assert ("today's date" in "".join(counts.lines())) == (variables == {})


def test_a_date_has_every_form():
    tokenizer = tokenizer_of(
        "{{ strftime_now('%A %a %d %B %b %m %y %Y %H:%M:%S %j') }}|{{ strftime_now('%-d') }}"
    )
    template = ChatTemplate(tokenizer, {"strftime_now": "2031-02-03"})
    assert (
        template.render([{"role": "user", "content": "Q"}], "f:1")
        == "Monday Mon 03 February Feb 02 31 2031 00:00:00 034|3"
    )


PARTS_ONLY = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
BOTH = CHATML.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
)


@pytest.mark.parametrize("template", [CHATML, PARTS_ONLY, BOTH])
@pytest.mark.parametrize("as_parts", [True, False])
@pytest.mark.parametrize("role", ["system", "developer", "ipython"])
def test_content_in_parts_is_written_as_text(template: str, as_parts: bool, role: str):
    def content(text: str) -> Any:
        return [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}] if as_parts else text

    prompt = [
        {"role": role, "content": content("Be brief.")},
        {"role": "user", "content": content("Question")},
    ]
    tokenizer = tokenizer_of(template)
    text, encoded = chosen_text(
        tokenizer, row_of([{"role": "assistant", "content": content("Yes.")}], prompt)
    )
    assert text == "Yes.<|im_end|>\n"
    whole = f"<|im_start|>{role}\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encoded.example.prompt_ids) == whole
    assert encoded.notes == ()


# Plain text for a chat model


def test_plain_text_for_a_chat_model_is_told_with_the_first_row_and_becomes_a_conversation_if_asked():
    row = PreferenceRow("The sky?", ["Blue."], ["Green."], "f:1")
    counts = DataCounts()
    encode_rows([row, row], Encoder(tokenizer_of(CHATML)), counts)
    (warning,) = (line for line in counts.lines() if "as_chat" in line)
    assert "The sky?" in warning
    assert "⟦" in warning
    as_chat = Encoder(tokenizer_of(CHATML), as_chat=True).encode(row)
    turns = row_of(said("Blue."), [{"role": "user", "content": "The sky?"}], "Green.")
    assert as_chat == Encoder(tokenizer_of(CHATML)).encode(turns)


# Templates that hang


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_template_that_loops_for_ever_is_a_named_error(
    num_proc: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(templates._time_limit, "seconds", 0.4)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = tokenizer_of("{% if messages[0].content == 'Q' %}" + endless + "{% endif %}" + CHATML)
    with pytest.raises(DataError, match=r"f:1: .* has not rendered it in 0\.4 seconds") as caught:
        encode_rows([row_of(said("Yes"))], Encoder(tokenizer), DataCounts(), num_proc=num_proc)
    assert caught.value.reason == "template takes too long"


DOUBLING = (
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the system does not tell what a process has"
)
@pytest.mark.parametrize("endless", ["{{ '%2000000000d' % 1 }}", DOUBLING])
def test_a_template_that_takes_memory_without_end_is_a_named_error(
    endless: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(templates._memory_limit, "bytes", 2**27)
    before = resource.getrlimit(resource.RLIMIT_AS)
    assert reason(tokenizer_of(endless + CHATML), row_of(said("Yes"))) == "template takes too much memory"
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_rendering_longer_than_any_row_is_a_named_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(templates, "_LONGEST", 1000)
    assert reason(tokenizer_of(CHATML), row_of(said("Yes" * 400))) == "template takes too much memory"


def test_a_power_is_refused_and_named_arguments_are_not():
    chosen_text(tokenizer_of("{{ dict(**{'a': 2}) | length }}" + CHATML), row_of(said("Yes")))
    for power in ("{{ 9 ** (9 ** 9) }}", "{% if 0 %}{{ x**y }}{% endif %}"):
        with pytest.raises(ModelError, match="computes a power"):
            Encoder(tokenizer_of(power + CHATML)).encode(row_of(said("Yes")))


def test_a_limit_of_memory_ends_with_the_last_of_the_threads_within_it_and_in_a_forked_process():
    limit = MemoryLimit(2**30)
    before = resource.getrlimit(resource.RLIMIT_AS)
    first, second = limit(), limit()
    for block in (first, second):
        block.__enter__()
    forked = os.fork()
    if not forked:
        os._exit(resource.getrlimit(resource.RLIMIT_AS) != before)
    assert os.waitpid(forked, 0)[1] == 0
    first.__exit__(None, None, None)
    lowered = resource.getrlimit(resource.RLIMIT_AS)
    second.__exit__(None, None, None)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    if Path("/proc/self/statm").exists():
        assert lowered != before


# What `infopo check` says


def test_a_turn_that_ends_in_a_line_break_is_in_place_and_another_eos_is_told():
    turns = [*said("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, *said("Yes")]
    rows = [row_of(said("Yes")), row_of(turns)]
    own, other = tokenizer_of(CHATML), tokenizer_of(CHATML, eos="<|end|>")
    sound = encode_rows(rows, Encoder(own), DataCounts())
    assert token_problem_lines(sound, own) == ["special tokens: none out of place"]
    _, line = token_problem_lines(encode_rows(rows, Encoder(other), DataCounts()), other)
    assert "2 examples: responses end with <|im_end|>, but the tokenizer's EOS is <|end|>" in line
    held = encode_rows([row_of(said("Yes<|im_end|>No"))], Encoder(own), DataCounts())
    assert "a special token within a response" in token_problem_lines(held, own)[1]


@pytest.mark.parametrize("name", ["gptoss", "phi3", "lfm2_2_5", "qwen3", "gemma3"])
def test_tokens_that_a_template_writes_itself_are_in_place(name: str):
    template = (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_of(template)
    special = sorted(set(re.findall(r"<\|?\w+\|?>", template)))
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, "<|im_end|>"]})
    dataset = encode_rows([row_of(said("Yes"))], Encoder(tokenizer), DataCounts())
    assert not any("within a response" in line for line in token_problem_lines(dataset, tokenizer))
