"""No column is dropped without a word: it is read under its own name or another, counted as ignored, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from infopo.config import parse_recipe, to_yaml
from infopo.data.counts import DataCounts
from infopo.data.sources import read_rows
from infopo.errors import DataError, RecipeError
from infopo.vocabulary import COLUMNS, check_columns
from test_sources import (
    ALPACA,
    CHAT_PAIR,
    CONVERSATIONAL,
    CONVERSATIONAL_IMPLICIT,
    SAMPLES,
    STANDARD,
    TEXT_PAIR,
    UNPAIRED_MESSAGES,
    assistant,
    read,
    user,
    write_array,
    write_arrow_file,
    write_arrow_stream,
    write_csv,
    write_lines,
    write_parquet,
)
from test_streaming import trainer_of

SYSTEM = {"role": "system", "content": "Be brief."}


def sources(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows as every kind of source that text fits into."""
    return {
        "jsonl": write_lines(folder / "rows.jsonl", rows),
        "jsonl.gz": write_lines(folder / "rows.jsonl.gz", rows),
        "json": write_array(folder / "rows.json", rows),
        "csv": write_csv(folder / "rows.csv", rows),
        "parquet": write_parquet(folder / "rows.parquet", rows),
        "arrow": write_arrow_file(folder / "rows.arrow", rows),
        "arrow stream": write_arrow_stream(folder / "stream.arrow", rows),
        "dataset": Dataset.from_list(rows),
        "stream": Dataset.from_list(rows).to_iterable_dataset(),
        "generator": IterableDataset.from_generator(lambda: iter(rows)),
        "transform": Dataset.from_list(rows).with_transform(lambda batch: batch),
        "list": rows,
    }


def parts(source: Any, **options: Any) -> list[tuple[Any, ...]]:
    return [(row.prompt, row.chosen, row.rejected) for row in read(source, **options)[0]]


# --- unknown columns: one message for all kinds of sources ---


def test_columns_of_no_shape_are_told_alike_by_every_source(tmp_path: Path):
    messages = {}
    for kind, source in sources(tmp_path, [{"question": "a", "yes": "b", "no": "c"}] * 2).items():
        with pytest.raises(DataError) as caught:
            read(source)
        messages[kind] = caught.value.problem
        assert "missing among question, yes, no" in caught.value.problem
        assert "data.columns" in caught.value.problem
        assert "`infopo docs data`" in caught.value.problem
    assert len(set(messages.values())) == 1, messages


def test_many_columns_do_not_make_a_long_message(tmp_path: Path):
    row = {f"column_{number:03}": "a" for number in range(300)} | {"x" * 3000: "b"}
    for source in (
        write_lines(tmp_path / "rows.jsonl", [row]),
        write_parquet(tmp_path / "rows.parquet", [row]),
    ):
        with pytest.raises(DataError, match=r"column_000, column_001.* and \d+ more") as caught:
            read(source)
        assert len(caught.value.problem) < 500


# --- a mapping ---


RENAMED = {"question": "The sky is", "good": " blue.", "bad": " green."}
MAPPING = {"prompt": "question", "chosen": "good", "rejected": "bad"}


def test_a_mapping_reads_the_same_rows_from_every_source(tmp_path: Path):
    for kind, source in sources(tmp_path, [RENAMED] * 3).items():
        rows, counts = read(source, columns=MAPPING)
        assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [TEXT_PAIR] * 3, kind
        assert any("prompt is 'question', chosen is 'good'" in line for line in counts.lines())
        assert not counts.ignored


@pytest.mark.parametrize("shape", SAMPLES)
def test_every_shape_can_be_read_under_other_names(tmp_path: Path, shape: str):
    row = SAMPLES[shape]
    mapping = {name: f"my {name}" for name in row if name in COLUMNS and not name.startswith("annotator")}
    renamed = {mapping.get(name, name): value for name, value in row.items()}
    expected = parts(write_lines(tmp_path / "rows.jsonl", [row]))
    assert parts(write_lines(tmp_path / "renamed.jsonl", [renamed]), columns=mapping) == expected
    assert parts(write_parquet(tmp_path / "renamed.parquet", [renamed]), columns=mapping) == expected


def test_names_may_be_swapped_and_nested(tmp_path: Path):
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    assert parts([STANDARD], columns=swapped) == [("The sky is", [" green."], [" blue."])]
    nested = {"data": {"ask": [user("What colour is the sky?")], "say": ["Blue.", "Green."]}}
    paths = {"prompt": "data.ask", "chosen": "data.say.0", "rejected": "data.say.1"}
    for source in ([nested], write_parquet(tmp_path / "rows.parquet", [nested])):
        assert parts(source, columns=paths) == [CHAT_PAIR]


def test_what_is_left_of_a_nested_column_is_counted():
    row = {"data": {"ask": "The sky is", "note": "n"}, "chosen": " blue.", "rejected": " green."}
    _, counts = read([row], columns={"prompt": "data.ask"})
    assert counts.ignored == {"data.note": 1}


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"prompt": "questoin"}, "expected a column 'questoin'; columns are: question, good, bad"),
        ({"prompt": "question", "chosen": "good", "rejected": "worse"}, "expected a column 'worse'"),
        (
            {"prompt": "question.text", "chosen": "good", "rejected": "bad"},
            "expected a column 'question.text'",
        ),
    ],
)
def test_a_mapped_column_that_is_not_there_is_refused(tmp_path: Path, columns: dict[str, str], match: str):
    for kind, source in sources(tmp_path, [RENAMED] * 2).items():
        if "." in columns["prompt"] and kind not in ("jsonl", "list"):
            continue
        with pytest.raises(DataError, match=match):
            read(source, columns=columns)


def test_an_optional_column_that_no_row_has_is_refused():
    with pytest.raises(DataError, match="no row has sytem; check the spelling"):
        read([ALPACA, ALPACA], columns={"system": "sytem", "instruction": "instruction"})


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"promt": "question"}, r"data\.columns\.promt: no shape reads .*did you mean 'prompt'"),
        ({"prompt": "a", "system": "a"}, "'a' is given for each of them"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(columns: dict[str, str], match: str):
    with pytest.raises(RecipeError, match=match):
        read([STANDARD], columns=columns)


def test_a_mapping_onto_a_column_that_is_there_is_refused(tmp_path: Path):
    row = STANDARD | {"question": "Which?"}
    for source in ([row], write_parquet(tmp_path / "rows.parquet", [row])):
        with pytest.raises(DataError, match="would take the place of a column of that name"):
            read(source, columns={"prompt": "question"})


def test_one_mapping_serves_sources_that_need_none():
    assert parts([STANDARD], columns=MAPPING) == [TEXT_PAIR]


def test_a_recipe_keeps_the_mapping_and_judges_it():
    text = "model: {name_or_path: m}\noutput_dir: o\ndata: {path: p, columns: {prompt: question, system: null}}\n"
    recipe = parse_recipe(text, source="r")
    assert recipe.data.columns == {"prompt": "question", "system": None}
    assert parse_recipe(to_yaml(recipe), source="r") == recipe
    overridden = parse_recipe(text, source="r", overrides=["data.columns.chosen=good"])
    assert overridden.data.columns == {"prompt": "question", "system": None, "chosen": "good"}
    for columns, match in (
        ("{promt: a}", r"data\.columns\.promt .*: no shape"),
        ("[a]", "expected a mapping of a"),
    ):
        with pytest.raises(RecipeError, match=match):
            parse_recipe(text, source="r", overrides=[f"data.columns={columns}"])


# --- columns that a shape does not read ---


def test_ignored_columns_are_counted_by_name(tmp_path: Path):
    rows = [
        STANDARD | {"score": 1, "source": "a", "note": None},
        STANDARD | {"score": 2, "source": "", "note": None},
    ]
    _, counts = read(write_lines(tmp_path / "rows.jsonl", rows))
    assert counts.ignored == {"score": 2, "source": 1}
    assert "  ignored columns: score (2 rows), source (1 row)" in counts.lines()
    for source in (write_parquet(tmp_path / "rows.parquet", rows), Dataset.from_list(rows)):
        assert read(source)[1].ignored["score"] == 2


@pytest.mark.parametrize("column", ["context", "query", "question", "input", "user_prompt", "instruction"])
def test_a_question_beside_text_answers_is_the_prompt(column: str):
    row = {
        column: "Name a colour.",
        "system": "Be brief.",
        "chosen": "A colour is blue.",
        "rejected": "A colour is 1.",
    }
    (got,) = parts([row])
    assert got[0] == [SYSTEM, user("Name a colour.")]


@pytest.mark.parametrize("column", ["user_turn", "text", "problem", "premise"])
def test_other_text_beside_text_answers_stops_the_run(tmp_path: Path, column: str):
    row = {column: "Name a colour.", "chosen": "A colour is blue.", "rejected": "A colour is a dog."}
    for kind, source in sources(tmp_path, [row]).items():
        with pytest.raises(DataError, match=rf"data\.columns: {{prompt: {column}}}"):
            read(source)
        assert parts(source, columns={"prompt": column})[0][0] == "Name a colour.", kind
        assert parts(source, columns={column: None})[0][0] == "A colour is"
        assert parts(source, shape="standard_implicit")[0][0] == "A colour is"


@pytest.mark.parametrize("column", ["dialog", "context_messages", "input", "conversation"])
@pytest.mark.parametrize("as_messages", [True, False])
def test_turns_beside_answers_stop_the_run(tmp_path: Path, column: str, as_messages: bool):
    """What the answers begin with alike is no prompt if somebody's turns stand beside them."""
    asked = [user("Name a colour.")]
    answers: list[Any] = ["A colour is blue.", "A colour is a dog."]
    if as_messages:
        answers = [[assistant("Well."), assistant(answer)] for answer in answers]
    row = {column: asked, "chosen": answers[0], "rejected": answers[1]}
    for kind, source in sources(tmp_path, [row]).items():
        assert parts(source, columns={"prompt": column})[0][0] == asked, kind
        if column == "input" and not as_messages:  # the instruction of text answers
            assert parts(source)[0][0] == asked, kind
            continue
        with pytest.raises(DataError, match=rf"data\.columns: {{prompt: {column}}}"):
            read(source)


def test_conversations_that_repeat_their_prompt_are_told_what_reads_them():
    row = {
        "prompt": [user("a")],
        "chosen": [user("a"), assistant("b")],
        "rejected": [user("a"), assistant("c")],
    }
    with pytest.raises(DataError, match=r"\{prompt: null\}"):
        read([row])
    assert parts([row], columns={"prompt": None}) == [([user("a")], [[assistant("b")]], [[assistant("c")]])]


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"instruction": "a", "completion": "b", "label": True}, {"prompt": "instruction"}),
        (
            {"prompt": "a", "completion": "b", "label": True} | {"system": "Be brief."},
            {"instruction": "prompt", "output": "completion"},
        ),
        (STANDARD | {"system": "Be brief."}, {"instruction": "prompt"}),
    ],
)
def test_the_mapping_that_an_error_names_reads_the_row(row: dict[str, Any], mapping: dict[str, str]):
    named = ", ".join(f"{target}: {source}" for target, source in mapping.items())
    with pytest.raises(DataError, match=f"{{{named}}}"):
        read([row])
    assert len(parts([row], columns=mapping)) == 1


def test_a_mapping_to_something_that_is_no_name_is_refused():
    (problem,) = check_columns({"chosen": ["rejected"]})
    assert problem.startswith("chosen: expected the name of a column, or null, got ['rejected']")


def test_what_says_something_about_a_row_is_no_prompt():
    row = {
        "id": "1",
        "model_a": "x",
        "source": "web",
        "score_chosen": "9",
        "chosen": "A a",
        "rejected": "A b",
    }
    assert parts([row]) == [("A", [" a"], [" b"])]
    assert set(read([row])[1].ignored) == {"id", "model_a", "source", "score_chosen"}


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (STANDARD | {"system": "Be brief."}, "system"),
        (STANDARD | {"input": "By day."}, "input"),
        (STANDARD | {"context": "By night."}, "context"),
        (STANDARD | {"history": [["Ready?", "Yes."]]}, "history"),
        (STANDARD | {"tools": [{"type": "function", "function": {"name": "look"}}]}, "tools"),
        (CONVERSATIONAL | {"history": [["Ready?", "Yes."]]}, "history"),
        (CONVERSATIONAL | {"instruction": "Answer in French."}, "instruction"),
        (ALPACA | {"context": "By night."}, "context"),
    ],
)
def test_a_column_of_the_conversation_that_has_no_place_is_refused(row: dict[str, Any], column: str):
    with pytest.raises(DataError, match=f"column '{column}' would be dropped") as caught:
        read([row])
    assert len(str(caught.value)) < 500
    assert len(parts([row], columns={column: None})) == 1


def test_a_column_whose_text_stands_in_the_prompt_is_no_loss():
    row = STANDARD | {
        "prompt": "Q: What colour?\nContext: by  day.\nA:",
        "question": "What colour?",
        "context": "by day.",
    }
    _, counts = read([row])
    assert not counts.ignored


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("row", [CONVERSATIONAL, CONVERSATIONAL_IMPLICIT, UNPAIRED_MESSAGES, ALPACA])
def test_a_system_column_begins_a_conversation(row: dict[str, Any], column: str):
    ((prompt, _, _),) = parts([row | {column: "Be brief."}])
    assert prompt[0] == SYSTEM
    developer = {"role": "developer", "content": "Be kind."}
    if row is CONVERSATIONAL:
        own, counts = read([row | {"system": "Be brief.", "prompt": [developer, *row["prompt"]]}])
        assert own[0].prompt[0] == developer
        assert counts.ignored == {"system": 1}


def test_a_text_prompt_with_a_system_column_can_be_read_as_a_conversation():
    row = STANDARD | {"system": "Be brief."}
    assert parts([row], columns={"instruction": "prompt"})[0][0] == [SYSTEM, user("The sky is")]


# --- conversations in text cells ---


TALK = [user("What is 1+1?"), assistant("It is 2.")]


@pytest.mark.parametrize("write", [json.dumps, str, lambda talk: json.dumps({"messages": talk})])
def test_text_of_a_conversation_is_read_as_one(tmp_path: Path, write: Any):
    other = [TALK[0], assistant("It's 3.\n")]
    row = {"chosen": write(TALK), "rejected": write(other)}
    for kind, source in sources(tmp_path, [row] * 2).items():
        assert parts(source) == [([TALK[0]], [[TALK[1]]], [[other[1]]])] * 2, kind


def test_text_of_a_prompt_or_of_turns_is_read_as_such():
    turn = json.dumps({"from": "gpt", "value": "It is 2."})
    row = {"conversations": str([{"from": "human", "value": "1+1?"}]), "chosen": turn, "rejected": "3"}
    assert parts([row]) == [([user("1+1?")], [[assistant("It is 2.")]], [[assistant("3")]])]
    texts = {side: [json.dumps(TALK[0]), json.dumps(assistant(side))] for side in ("chosen", "rejected")}
    assert parts([texts]) == [(TALK[:1], [[assistant("chosen")]], [[assistant("rejected")]])]
    row = {"prompt": str(tuple(TALK[:1])), "chosen": "2", "rejected": "3"}
    assert parts([row]) == [(TALK[:1], [[assistant("2")]], [[assistant("3")]])]
    row = {"prompt": json.dumps(TALK[:1]), "chosen": "2", "rejected": "3"}
    assert parts([row]) == [(TALK[:1], [[assistant("2")]], [[assistant("3")]])]


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3]", "['a', 'b']", "[]", "{}", '{"a": 1}', '[{"name": "Ann", "age": 3}]', "[citation needed]",
        '{"role": "manager", "content": "x"}', '{"from": "Ann", "value": 12}', "{'content': 3}", "[note] hello [end]",
        '[{"role": "manager", "content": "x"}]', "(a)", "{{user}}", '{"value": x}', "[{", "array([1, 2])",
    ],
)  # fmt: skip
def test_text_that_only_looks_like_a_list_stays_text(text: str):
    row = {"prompt": text, "chosen": text + "!", "rejected": f"{text}?"}
    assert parts([row]) == [(text, [text + "!"], [f"{text}?"])]
    assert parts([{"prompt": "p", "chosen": text, "rejected": "no"}]) == [("p", [text], ["no"])]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(TALK)[:60],  # cut by a spreadsheet
        "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]",  # an array of numpy
        "array([{'content': 'a', 'role': 'user'}], dtype=object)",
    ],
)
def test_text_of_a_conversation_that_cannot_be_read_is_refused(text: str):
    with pytest.raises(DataError, match="the text of a conversation that cannot be read") as caught:
        read([{"prompt": "p", "chosen": text, "rejected": "no"}])
    assert caught.value.reason == "conversation as text"


# --- content in parts, roles ---


def test_content_in_parts_is_text_and_other_parts_are_refused():
    def row(*parts: Any) -> dict[str, Any]:
        return CONVERSATIONAL | {"prompt": [{"role": "user", "content": list(parts)}]}

    a, b = {"type": "text", "text": "a"}, {"type": "input_text", "text": "b", "image_url": None}
    assert parts([row(a, b, "c")])[0][0] == [user("abc")]
    for bad in (
        {"type": "image"},
        {"type": "input_audio", "input_audio": {}},
        {"type": "text", "image": "x"},
    ):
        with pytest.raises(DataError) as caught:
            read([row(a, bad)])
        assert caught.value.reason == "images"


@pytest.mark.parametrize(("first", "tool"), [("developer", "tool"), ("system", "ipython")])
def test_the_roles_of_gpt_oss_and_of_llama_are_let_through(first: str, tool: str):
    call = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    answer = [call, {"role": tool, "content": "1"}, assistant("Blue.")]
    prompt = [{"role": first, "content": "Be brief."}, *CONVERSATIONAL["prompt"]]
    row = CONVERSATIONAL | {"prompt": prompt, "chosen": answer}
    assert parts([row]) == [(prompt, [answer], [CONVERSATIONAL["rejected"]])]


# --- nulls of columnar files ---


def calling(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    properties = {
        key: {"type": "string", "enum": ["x"]} if key == "a" else {"type": "string"} for key in arguments
    }
    function = {"name": name, "parameters": {"type": "object", "properties": properties}}
    return {
        "prompt": [user("Go")],
        "chosen": [
            {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
        ],
        "rejected": [assistant("no")],
        "tools": [{"type": "function", "function": function}],
        "chat_template_kwargs": {name: {"deep": [arguments]}},
    }


def test_columnar_sources_add_no_keys_to_tools_and_calls(tmp_path: Path):
    rows = [
        calling("add", {"a": "1", "b": "2"}),
        calling("weather", {"city": "Paris"}),
        calling("now", {"tz": "UTC"}),
    ]
    (tmp_path / "j").mkdir()
    expected = [
        (row.chosen, row.tools, row.chat_template_kwargs)
        for row in read(write_lines(tmp_path / "j" / "rows.jsonl", rows))[0]
    ]
    dataset = Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "saved"))
    for source in (
        write_parquet(tmp_path / "rows.parquet", rows),
        write_arrow_file(tmp_path / "rows.arrow", rows),
        write_arrow_stream(tmp_path / "stream.arrow", rows),
        dataset,
        dataset.to_iterable_dataset(),
        tmp_path / "saved",
    ):
        got, counts = read(source)
        assert [(row.chosen, row.tools, row.chat_template_kwargs) for row in got] == expected
        assert any("left out" in note and n == 3 for note, n in counts.notes.items())


def test_nulls_that_json_lines_hold_are_the_datas_own(tmp_path: Path):
    rows, counts = read(write_lines(tmp_path / "rows.jsonl", [calling("add", {"a": None})]))
    assert rows[0].chosen[0][0]["tool_calls"][0]["function"]["arguments"] == {"a": None}
    assert not counts.notes


# --- what a dataset does to its rows, and what is no dataset ---


def test_a_transform_is_applied_and_a_format_left_aside():
    dataset = Dataset.from_list([{"q": "raw"} | STANDARD])
    shaped = dataset.with_transform(lambda batch: {**batch, "prompt": [f"Q: {q}" for q in batch["q"]]})
    assert parts(shaped) == [("Q: raw", *TEXT_PAIR[1:])]
    dataset.set_transform(lambda batch: {k: v for k, v in batch.items() if k != "q"})
    assert parts(dataset) == [TEXT_PAIR]
    assert parts(dataset.with_format("numpy").remove_columns("q")) == [TEXT_PAIR]
    stream = (
        Dataset.from_list([STANDARD]).to_iterable_dataset().map(lambda row: {"prompt": row["prompt"] + "!"})
    )
    assert parts(stream.with_format("numpy")) == [("The sky is!", *TEXT_PAIR[1:])]

    def fails(batch: Any) -> Any:
        raise KeyError("nothing")

    with pytest.raises(DataError, match="the dataset's transform broke off"):
        read(dataset.with_transform(fails))


def test_lists_of_rows_are_read_and_other_objects_are_told_what_to_do():
    assert parts([STANDARD, STANDARD]) == [TEXT_PAIR] * 2
    with pytest.raises(RecipeError, match=r"got dict .*from_dict"):
        list(read_rows({"prompt": ["a"]}, DataCounts()))  # type: ignore[arg-type]


def test_the_trainer_maps_columns_of_training_evaluation_and_streams(tmp_path: Path):
    rows = [{"ask": f"{i}+1=", "good": f"{i + 1}", "bad": f"{i}"} for i in range(4)]
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    trainer = trainer_of(tmp_path, rows, columns=columns)
    trainer.train()
    own = Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}])
    assert len(trainer.train_dataset) == 4
    trainer_of(tmp_path, Dataset.from_list(rows).to_iterable_dataset(), columns=columns).train()
    trainer_of(tmp_path, own, columns=json.dumps(columns))
    with pytest.raises(RecipeError, match=r"columns\.promt: no shape reads"):
        trainer_of(tmp_path, rows, columns={"promt": "ask"})


def test_data_with_one_side_are_told_what_they_train(tmp_path: Path):
    rows = [{"prompt": "1+1=", "completion": "2", "label": True}]
    with pytest.raises(DataError, match=r"DPO compares pairs; data with one side train infopo, .*kto"):
        trainer_of(tmp_path, rows, loss_type=["sigmoid"])


def test_lists_in_text_cells_are_counted_and_read_if_their_shape_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "chosen": json.dumps(["a", "b"]), "rejected": json.dumps(["c"])},
            {"prompt": "A list, please", "chosen": '["x"]', "rejected": "x"}]  # fmt: skip
    path = write_csv(tmp_path / "rows.csv", rows)
    counts = DataCounts()
    assert [row.chosen for row in read_rows(path, counts)] == [['["a", "b"]'], ['["x"]']]
    (note,) = counts.notes
    assert "data.shape: lists" in note
    assert counts.notes[note] == 1
    (row,) = read_rows(write_csv(tmp_path / "one.csv", rows[:1]), DataCounts(), shape="lists")
    assert (row.chosen, row.rejected) == (["a", "b"], ["c"])
