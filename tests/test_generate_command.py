"""`infopo generate`: prompts of any file, answers through the store, and files that others read back."""

import json
from pathlib import Path
from typing import Any

import pytest

from infopo.cli import main
from infopo.errors import ConfigError, DataError
from infopo.evaluation.given import given_responses
from infopo.evaluation.items import Item
from infopo.evaluation.lab_task import lab_item
from infopo.evaluation.questions import prompts_in
from infopo.evaluation.settings import EvaluationSettings
from infopo.lab.problems import make_problems
from infopo.workflows.generate import generate
from servers import completion, serving


def settings(**changed: Any) -> EvaluationSettings:
    return EvaluationSettings(**{"tasks": ["generate"], "max_new_tokens": 30} | changed)


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


TURN = {"role": "user", "content": "1+1=?"}
ANSWER = {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "1+1=?"}, "1+1=?"),
        ({"prompt": "1+1=?", "chosen": "2", "rejected": "3"}, "1+1=?"),
        ({"prompt": [TURN]}, [TURN]),
        ({"messages": [TURN, ANSWER]}, [TURN]),
        ({"messages": [TURN, ANSWER, TURN]}, [TURN, ANSWER, TURN]),
        ({"prompt": json.dumps([TURN])}, [TURN]),
        ({"question": "1+1=?", "answer": "2"}, "1+1=?"),
        ({"instruction": "Add.", "input": "1, 1", "output": "2"}, "Add.\n1, 1"),
        ({"prompt": "1+1=?", "system": "Brief."}, [{"role": "system", "content": "Brief."}, TURN]),
        ({"chosen": [TURN, ANSWER], "rejected": [TURN, {**ANSWER, "content": "3"}]}, [TURN]),
    ],
)
def test_prompts_are_found_in_every_shape(tmp_path: Path, row: Any, prompt: Any) -> None:
    assert [item.prompt for item in prompts_in(written(tmp_path / "rows.jsonl", row))] == [prompt]


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffeins\r\n\r\n zwei ü\n".encode())
    items = prompts_in(str(tmp_path / "p.txt"))
    assert [(item.id.rpartition(":")[2], item.prompt) for item in items] == [("1", "eins"), ("3", " zwei ü")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "expected a column prompt or messages or"),
        ({"prompt": 3}, "expected text or messages, got 3"),
        ({"prompt": "a", "tools": [{"name": "f"}]}, "prompts with tools cannot be asked"),
        ({"messages": [ANSWER]}, "expected a turn before the assistant's"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path: Path, row: Any, said: str) -> None:
    path = written(tmp_path / "rows.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(DataError, match=said) as found:
        prompts_in(path)
    assert found.value.row_id == f"{path}:2"


def test_samples_are_kept_and_a_second_call_draws_nothing_and_ends_in_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "rows.jsonl", *({"prompt": f"{n}+2=?", "id": f"q{n}"} for n in range(5)))
    how = settings(num_samples=2)
    generate("lab:policy", how, file=path, output=tmp_path / "out.jsonl")
    first = (tmp_path / "out.jsonl").read_bytes()
    assert {(row["id"], row["sample"]) for row in read(tmp_path / "out.jsonl")} == {
        (f"q{n}", k) for n in range(5) for k in (0, 1)
    }
    store = tmp_path / "out.samples" / "samples.jsonl"
    lines = store.read_bytes().splitlines(keepends=True)
    store.write_bytes(b"".join(lines[:3]))  # as a kill leaves it
    generate("lab:policy", how, file=path, output=tmp_path / "out.jsonl")
    assert "10 responses, 3 of them from the store" in capsys.readouterr().out
    assert (tmp_path / "out.jsonl").read_bytes() == first


def test_what_is_written_is_read_back_without_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [lab_item(problem, number) for number, problem in enumerate(make_problems(4, 0, "preference"))]
    prompts = [item.prompt if number % 2 else item.gold for number, item in enumerate(items)]
    path = written(tmp_path / "rows.jsonl", *({"prompt": prompt} for prompt in prompts))
    generate("lab:policy", settings(), file=path, output=tmp_path / "out.jsonl")
    given, how = given_responses(tmp_path / "out.jsonl", "lab", items)
    assert how == "prompt"
    texts = [Item(item.id, item.gold, item.gold) for item in items]  # a task whose prompts are text
    assert [each.responses for each in given_responses(tmp_path / "out.jsonl", "lab", texts)[0]] == [
        each.responses for each in given
    ]
    assert [list(each.responses) for each in given] == [
        [row["response"]] for row in read(tmp_path / "out.jsonl")
    ]


def test_two_models_answer_side_by_side_and_into_files_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["generate", "lab:policy", "--prompt", "1+1=?", "--prompt", "2+2=?", "--against", "lab:policy"])
        == 0
    )
    out = capsys.readouterr().out
    assert out.count("[lab:policy]") == 4
    assert out.index("> 1+1=?") < out.index("> 2+2=?")
    output = tmp_path / "out.jsonl"
    generate("lab:policy", settings(), prompts=["1+1=?"], against="lab:policy", output=output)
    assert len(read(output)) == len(read(tmp_path / "out.against.jsonl")) == 1


def test_a_server_answers_and_another_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        serving(lambda body, number: completion("one")) as first,
        serving(lambda body, number: completion("two")) as second,
    ):
        arguments = ["--prompt", "1+1=?", "--system", "Brief.", "--output", str(tmp_path / "out.jsonl")]
        assert main(["generate", "--server", first.url, *arguments, "--against", second.url]) == 0
    assert [row["response"] for row in read(tmp_path / "out.jsonl")] == ["one"]
    [row] = read(tmp_path / "out.against.jsonl")
    assert (row["prompt"], row["system"], row["response"]) == ("1+1=?", "Brief.", "two")
    assert [turn["role"] for turn in first.bodies[0]["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lab:policy"], "expected --prompt TEXT or --prompts FILE"),
        (["--prompt", "a"], "expected a model, or --server URL"),
        (["lab:policy", "--prompt", "a", "--output", "out.csv"], "expected a .jsonl file"),
        (
            ["lab:policy", "--prompt", "a", "--system", "b", "--prompting", "plain"],
            "a system message needs a chat template",
        ),
        (["lab:policy", "--prompt", "a", "--system", "b"], "has the roles user and assistant, not system"),
        (["lab:policy", "--prompt", "a" * 600], "do not fit the model's context of 512"),
        (["lab:policy", "--prompts", "absent.jsonl"], "absent.jsonl: no such file"),
        (["lab:policy", "--prompts", "absent.txt"], "cannot be read as text"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_row_with_a_system_message_of_its_own_is_not_given_another(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {"prompt": "a", "system": "b"})
    with pytest.raises(DataError, match="has a system message of its own"):
        generate("lab:policy", settings(), file=path, system="c")
    with pytest.raises(ConfigError, match="expected"):
        generate("lab:policy", settings())


def test_a_file_of_the_users_is_not_written_over(tmp_path: Path) -> None:
    mine = written(tmp_path / "mine.jsonl", {"prompt": "1+1=?"})
    before = Path(mine).read_bytes()
    with pytest.raises(ConfigError, match="is what is read"):
        generate("lab:policy", settings(), file=mine, output=mine)
    with pytest.raises(ConfigError, match="was not written by this command"):
        generate("lab:policy", settings(), prompts=["1+1=?"], output=mine)
    assert Path(mine).read_bytes() == before
