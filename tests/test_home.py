"""A path may begin with `~`, wherever one is named: what a check finds, the run finds too."""

from pathlib import Path

import pytest

from infopo.cli import main
from infopo.config import parse_recipe
from infopo.lab import policy_path
from infopo.models import load_policy, load_tokenizer, resolve_name
from infopo.preflight import model_problem
from infopo.workflows.evaluate import model_in


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with the lab's policy in `m`, and another folder to work in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "m").symlink_to(policy_path())
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_a_model_is_loaded_if_it_passes_the_check(home: Path) -> None:
    assert model_problem("~/m") is None
    assert resolve_name("~/m") == model_in("~/m") == str(home / "m")
    assert load_tokenizer("~/m").vocab_size
    assert next(load_policy("~/m").parameters()).numel()


def test_every_path_of_a_recipe_may_begin_with_it(home: Path) -> None:
    """Libraries differ in what they make of it, so that none of them sees it."""
    text = """
    model: ~/m
    data: {path: [~/a.jsonl, b.jsonl], eval_path: ~/c.jsonl}
    reference: {source: ~/r, store: ~/store}
    evaluate: {tasks: [gsm8k], data: {gsm8k: ~/g.jsonl}}
    train: {eval_strategy: epoch}
    output_dir: ~/out
    """
    recipe = parse_recipe(text, source="r.yaml", overrides=["train.resume_from_checkpoint=~/checkpoint-1"])
    assert recipe.model.name_or_path == f"{home}/m"
    assert (recipe.data.path, recipe.data.eval_path) == ([f"{home}/a.jsonl", "b.jsonl"], f"{home}/c.jsonl")
    assert (recipe.reference.source, recipe.reference.store) == (f"{home}/r", f"{home}/store")
    assert recipe.evaluate.data == {"gsm8k": f"{home}/g.jsonl"}
    assert recipe.output_dir == f"{home}/out"
    assert recipe.train["resume_from_checkpoint"] == f"{home}/checkpoint-1"


def test_sources_with_weights_are_paths_and_other_texts_are_none(home: Path) -> None:
    text = """
    model: lab:policy
    data: {path: {~/a.jsonl: 0.5, b.jsonl: 0.5}, chat_template_kwargs: {mark: "~"}}
    output_dir: out
    """
    recipe = parse_recipe(text, source="r.yaml")
    assert recipe.data.path == {f"{home}/a.jsonl": 0.5, "b.jsonl": 0.5}
    assert recipe.data.chat_template_kwargs == {"mark": "~"}


def test_every_path_of_a_command_may_begin_with_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "rows.jsonl").write_text('{"item": "gsm8k/0", "response": "#### 7"}\n')
    (home / "data.jsonl").write_text('{"question": "3+4?", "answer": "#### 7"}\n')
    given = ["--responses=~/rows.jsonl", "--tasks=gsm8k", "--data=gsm8k=~/data.jsonl", "--output=~/out"]
    assert main(["evaluate", *given]) == 0
    assert (home / "out" / "eval.json").is_file()
    assert main(["generate", "~/m", "--prompt=~/m", "--max-new-tokens=2"]) == 0
    assert "> ~/m" in capsys.readouterr().out, "a prompt is no path"
    assert not list(Path.cwd().glob("~*"))
