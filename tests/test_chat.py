"""Talking with models: what is streamed is what `infopo generate` draws, and nothing that goes wrong ends the talk."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infopo.cli import main
from infopo.evaluation.drawing import Request, draw
from infopo.evaluation.law import Law
from infopo.evaluation.settings import EvaluationSettings
from infopo.evaluation.streaming import _Pieces, stream
from infopo.lab import policy_path
from infopo.workflows import chat as workflow
from infopo.workflows.chat import Talk
from infopo.workflows.generate import generate
from worlds import interruptible

LAW = Law(40, temperature=1.0)


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str]) -> Talk:
    sides = [workflow._side("lab:policy", None, LAW, seed, "auto") for seed in (0, 1)]
    return Talk(sides)


def test_pieces_are_the_response_and_tokens_those_of_the_same_seed() -> None:
    model, tokenizer = (each.from_pretrained(policy_path()) for each in (AutoModelForCausalLM, AutoTokenizer))
    model.eval()
    for seed in range(4):
        request, pieces = Request(tokenizer("12+5=?")["input_ids"], seed), list[str]()
        found = stream(model, tokenizer, request, LAW, ends=[2], on_text=pieces.append)
        [(_, alone)] = draw(model, tokenizer, [request], LAW, ends=[2], batch_size=1)
        assert found == alone
        assert "".join(pieces) == found.text


def test_half_a_character_is_not_shown() -> None:
    """Byte-level tokens of one character come one by one, and each alone decodes to a replacement mark."""

    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    ids = tokenizer("ä€")["input_ids"]
    assert len(ids) >= 5
    pieces: list[str] = []
    streamer = _Pieces(tokenizer, [2], pieces.append)
    for each in ([1, 1], *([token] for token in ids), [2]):
        streamer.put(torch.tensor(each))
    assert pieces == ["ä", "€"]


def test_an_answer_is_that_of_generate_to_the_same_messages(
    talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = EvaluationSettings(tasks=["generate"], temperature=1.0, max_new_tokens=40, seed=1)
    [[sample]] = generate("lab:policy", settings, prompts=["12+5=?"])
    talk.take("12+5=?")
    assert talk.sides[1].history[-1] == {"role": "assistant", "content": sample.text}


def test_histories_are_kept_apart_and_saved(
    talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in ("7*8-6+4=?", "", "and 3+4=?"):
        assert talk.take(line)
    answers = [[turn["content"] for turn in side.history[1::2]] for side in talk.sides]
    assert answers[0] != answers[1]
    talk.take(f"/save {tmp_path / 'talk.jsonl'}")
    lines = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["messages"] for line in lines] == [side.history for side in talk.sides]
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    talk.take(f"/save {tmp_path / 'mine.txt'}")
    assert "is there already" in capsys.readouterr().out
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "mine"
    talk.take("/reset")
    assert [side.history for side in talk.sides] == [[], []]
    assert not talk.take("/quit")


def test_what_a_model_cannot_do_is_told_and_the_talk_goes_on(
    talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, said in (
        ("/nonsense", "no command /nonsense"),
        ("/system Be brief.", "the lab chat has the roles user and assistant, not system"),
        ("/save", "expected the name of a file"),
        (f"{'9+' * 300}1=?", "lab:policy reads at most 512 tokens, and the conversation has"),
        (f"{'9+' * 235}1=?", "cut off: the context of lab:policy is full"),
    ):
        assert talk.take(line)
        assert said in capsys.readouterr().out, line
    talk.take("/reset")
    assert talk.take("1+1=?")
    assert len(talk.sides[0].history) == 2


def test_control_characters_of_a_model_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    workflow._print_piece("\x1b[31mred\nline")
    assert capsys.readouterr().out == "\\x1b[31mred\nline"


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    talk: Talk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(workflow, "_print_piece", show)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert talk.take("7*8-6+4=?")
    finally:
        signal.signal(signal.SIGINT, before)
    assert "[stopped]" in capsys.readouterr().out
    first, second = (side.history[-1]["content"] for side in talk.sides)
    assert first == "".join(shown[:3])
    assert second.startswith(tuple("0123456789"))


def test_a_model_without_template_continues_each_message_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoModelForCausalLM.from_pretrained(policy_path()).save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+1=?\n1+1=?\n/system no\n"))
    assert main(["chat", str(tmp_path / "base"), "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "no chat template, so each message is continued as plain text, on its own" in out
    assert "continues plain text, which has none" in out
    first, second = out.split("> 1+1=?\n")[1:]
    assert first.splitlines()[0] == second.splitlines()[0], "what came before changes nothing"


def test_a_script_talks_through_a_pipe(tmp_path: Path) -> None:
    with interruptible():
        done = subprocess.run(
            [sys.executable, "-m", "infopo", "chat", "lab:policy", "--against", "lab:policy"],
            input="12+5=?\n/save talk.jsonl\n", capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("[lab:policy]\n") == 2
    assert "> 12+5=?\n" in done.stdout
    assert len((tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()) == 2
