"""The benchmark compares like with like: examples, FLOPs, the peer's head, and the record. Nothing here judges time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flops
import regimes
import shapes
import speed
from infopo.data.packing import pack
from infopo.logps import attention
from infopo.logps.forward import response_logps
from infopo.records import PreferenceExample

# Warnings of libraries under comparison are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 64
ROOT = Path(__file__).resolve().parents[1]
DRAWN = [name for name in regimes.REGIMES if name != "hh"]
JOB = {"model": "tiny", "vocabulary": VOCABULARY, "device": "cpu", "variant": "infopo"}


# ---- regimes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWN)
def test_a_regime_has_the_mean_lengths_that_it_states(name: str) -> None:
    regime = regimes.REGIMES[name]
    examples = regimes.draw(name, 2000, VOCABULARY)
    prompts = [len(e.prompt_ids) for e in examples]
    responses = [len(ids) for e in examples for ids in e.response_ids]
    # Standard error of a mean: below 1.3 %; the caps cut up to 9 % (responses of 512 at 640).
    assert np.mean(prompts) == pytest.approx(regime.prompt, rel=0.05)
    assert np.mean(responses) == pytest.approx(regime.response, rel=0.2 if name == "m" else 0.05)
    assert np.std(np.log(prompts)) == pytest.approx(regime.sigma, rel=0.1)
    assert max(prompts) <= regimes.LONGEST_PROMPT
    assert max(responses) <= regimes.LONGEST_RESPONSE


@pytest.mark.parametrize("name", DRAWN)
def test_every_process_draws_the_same_examples(name: str) -> None:
    examples = regimes.draw(name, 5, VOCABULARY)
    assert examples == regimes.draw(name, 5, VOCABULARY)
    assert examples != regimes.draw(name, 5, VOCABULARY, seed=1)
    tokens = [t for e in examples for ids in [e.prompt_ids, *e.response_ids] for t in ids]
    assert min(tokens) >= regimes.FIRST_ID
    assert max(tokens) < VOCABULARY


def test_regime_k_has_seven_rejected_responses_and_trl_gets_each_as_a_pair() -> None:
    [example] = regimes.draw("k", 1, VOCABULARY)
    assert (len(example.chosen_ids), len(example.rejected_ids)) == (1, 7)
    pairs = regimes.pairs_of(example)
    assert [p.rejected_ids[0] for p in pairs] == example.rejected_ids
    assert all((p.prompt_ids, p.chosen_ids) == (example.prompt_ids, example.chosen_ids) for p in pairs)


def test_in_regime_m_half_of_the_shorter_response_is_common_to_both() -> None:
    for example in regimes.draw("m", 20, VOCABULARY):
        chosen, rejected = example.response_ids
        half = min(len(chosen), len(rejected)) // 2
        assert chosen[:half] == rejected[:half]
        assert chosen[half:] != rejected[half:]


def test_real_lengths_are_those_of_the_file(shared_data: Path) -> None:
    path = shared_data / "hh_harmless" / "harmless-base-test.jsonl.gz"
    lengths = regimes.harmless_lengths(path)
    assert 2200 < len(lengths) <= 2312
    assert all(n >= 2 for row in lengths for n in row)
    drawn = regimes.draw("hh", len(lengths), VOCABULARY)
    assert sorted((len(e.prompt_ids), *map(len, e.response_ids)) for e in drawn) == sorted(lengths)


def test_without_the_file_the_regime_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no real data beside this checkout"):
        regimes.harmless_lengths(tmp_path / "absent.jsonl.gz")


def test_turns_are_a_step_to_warm_up_the_rounds_and_one_for_memory() -> None:
    turns = regimes.plan("ii", rounds=3, steps=2, batch=4, vocabulary=VOCABULARY)
    assert [len(turn) for turn in turns] == [1, 2, 2, 2, 2]
    assert {len(step) for turn in turns for step in turn} == {4}
    assert len({e.row_id for turn in turns for step in turn for e in step}) == 9 * 4


def test_grouping_by_length_keeps_the_examples_of_a_round_and_pads_less() -> None:
    turn = regimes.as_pairs(regimes.plan("i", rounds=1, steps=8, batch=4, vocabulary=VOCABULARY))[1]
    grouped = regimes.grouped(turn)

    def padded(t: regimes.Turn) -> int:
        return sum(flops.padded_work(step, responses_only=True).tokens for step in t)

    assert sorted(e.row_id for s in grouped for e in s) == sorted(e.row_id for s in turn for e in s)
    assert [len(step) for step in grouped] == [len(step) for step in turn]
    assert padded(grouped) < 0.8 * padded(turn)


# ---- FLOPs ----------------------------------------------------------------------------------------------------------

EXAMPLE = PreferenceExample([3, 4, 5], [[6, 7]], [[8]], "e")


def test_work_of_an_example_by_hand() -> None:
    # Prompt of 3: 1+2+3 pairs. Chosen of 2 behind 3: 4+5. Rejected of 1 behind 3: 4.
    assert flops.packed_work([EXAMPLE]) == flops.Work(tokens=6, attended=6 + 9 + 4, scored=3)
    # Two rows of 5, one of them padded by 1.
    assert flops.padded_work([EXAMPLE], responses_only=True) == flops.Work(10, 2 * 25, 3)
    assert flops.padded_work([EXAMPLE], responses_only=False) == flops.Work(10, 2 * 25, 8)
    assert flops.padded_work([EXAMPLE], True, unpadded=True) == flops.Work(10, 15 + 10, 3)


def addmm_flops(out: list[int], a: list[int], b: list[int], **_: object) -> int:
    return 2 * a[0] * a[1] * b[1]


IN_PLACE = {torch.ops.aten.addmm_: addmm_flops}  # torch counts the other form only


def test_flops_of_our_step_are_those_that_torch_counts() -> None:
    """Matrix products alone: attention's fused kernel on a CPU is not counted by torch."""
    examples = regimes.draw("k", 1, VOCABULARY) + regimes.draw("i", 2, VOCABULARY)
    model = shapes.build_model(JOB, seed=0)
    assert attention.enable(model) is None
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        response_logps(model, pack(examples)).sum().backward()
    work = flops.packed_work(examples)
    assert flops.our_head_matmuls(model.config, work) == 3
    expected = flops.step_flops(model.config, work, 3)
    # Rotary angles are a product too, of 8 a token: 1e-4 of a layer's.
    assert counter.get_total_flops() == pytest.approx(expected.linear + expected.head, rel=5e-4)


def test_flops_of_trls_step_are_those_that_torch_counts() -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from peer import _compact_forward

    pairs = regimes.draw("ii", 3, VOCABULARY)
    rows = [
        {"prompt_ids": e.prompt_ids, "chosen_ids": e.chosen_ids[0], "rejected_ids": e.rejected_ids[0]}
        for e in pairs
    ]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    model = shapes.build_model(JOB, seed=0)

    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter,
    ):
        _compact_forward(
            model, labels=labels, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).log_probs.sum().backward()
    work = flops.padded_work(pairs, responses_only=True)
    assert work.tokens == batch["input_ids"].numel()
    expected = flops.step_flops(model.config, work, flops.HEAD_MATMULS)
    # Written out, attention keeps its scores: 3 forward passes in place of 3.5.
    written_out = expected.attention * 3 / flops.ATTENTION_FORWARD_AND_BACKWARD
    assert counter.get_total_flops() == pytest.approx(expected.linear + expected.head + written_out, rel=5e-4)


def test_a_reference_in_the_loop_costs_a_forward_pass_more() -> None:
    config = shapes.model_config("a4k")
    work = flops.Work(tokens=1000, attended=10**6, scored=1000)
    alone, beside = (flops.step_flops(config, work, 4, with_reference=r) for r in (False, True))
    assert beside.linear / alone.linear == 4 / 3
    assert beside.attention / alone.attention == 4.5 / 3.5
    assert beside.head / alone.head == 5 / 4


def test_layer_weights_are_those_of_the_model() -> None:
    model = shapes.build_model(JOB, seed=0)
    linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert flops.layer_weights(model.config) == sum(m.weight.numel() for m in linear)


# ---- the peer's head ------------------------------------------------------------------------------------------------


def test_the_peers_head_is_log_softmax_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    import peer

    monkeypatch.setattr(peer, "TILE_ELEMENTS", 3 * 11)  # 3 rows: tiles of 3, 3 and 1
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (7,))
    expected = (hidden @ weight.T).log_softmax(1)[range(7), targets]
    torch.testing.assert_close(peer.token_logps(hidden, weight, targets), expected)
    assert torch.autograd.gradcheck(lambda h, w: peer.token_logps(h, w, targets), (hidden, weight))


# ---- the record -----------------------------------------------------------------------------------------------------


def test_a_ratio_is_taken_round_by_round() -> None:
    ratio = speed.ratios([2.0, 9.0, 8.0, 10.0, 6.0], [1.0, 3.0, 2.0, 2.0, 1.0])
    assert ratio["rounds"] == [2, 3, 4, 5, 6]
    assert (ratio["median"], ratio["quartiles"], ratio["range"]) == (4, [3, 5], [2, 6])


def test_variants_that_compute_another_loss_stop_the_run() -> None:
    ours = {"infopo": 0.7, "infopo_objective": 300.0}
    assert speed.loss_difference({**ours, "trl": 0.7001}, "cpu") == pytest.approx(1e-4)
    for wrong in (0.71, float("nan")):
        with pytest.raises(RuntimeError, match="do not compute the same loss"):
            speed.loss_difference({**ours, "trl": wrong}, "cpu")


def test_the_table_shows_what_was_measured_and_what_was_not() -> None:
    other = {"regime": "ii", "ratio_trl": speed.spread([4.0]), "flop_share": {"trl": 0.5}}
    other |= {"step_mib": {"infopo": 50.0}, "peak_memory_ratio": {"trl": None}}
    measured = {
        "regime": "i",
        "ratio_trl_best": speed.spread([1.0, 2.0, 3.0]),
        "flop_share": {"trl_best": 0.75},
        "step_mib": {"infopo": 100.0, "trl_best": 400.0},
        "peak_memory_ratio": {"trl_best": 0.25},
    }
    skipped = {"regime": "hh", "skipped": "no data"}
    _, rule, *rows = speed.table({"regimes": [measured, other, skipped]}).splitlines()
    assert rows[0] == "| i | - | 2.00 [1.50, 2.50] | - / 75% | 100 | 0.25 |"
    assert rows[1] == "| ii | 4.00 [4.00, 4.00] | - | 50% / - | 50 | - |"
    assert rows[2].startswith("| hh | no data |")
    assert {row.count("|") for row in rows} == {rule.count("|")}


def run(path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    small = ["--model", "tiny", "--rounds", "1", "--steps", "1", "--threads", "1", "--json", str(path)]
    assert speed.main([*arguments, *small]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def check_regime(regime: dict, variants: list[str]) -> None:
    assert 0 <= regime["loss_difference"] < 1e-4
    assert abs(regime["loss"] - np.log(2)) > 1e-3  # else any log-probs would have agreed
    assert set(regime["seconds"]) == set(regime["flops_a_second"]) == set(variants)
    for peer in set(variants) & set(speed.PEERS):
        assert regime[f"ratio_{peer}"]["rounds"] == [
            regime["seconds"][peer]["rounds"][0] / regime["seconds"]["infopo"]["rounds"][0]
        ]
        assert regime["flop_ratio"][peer] > 1
        assert regime["flop_share"][peer] == (regime[f"ratio_{peer}"]["median"] / regime["flop_ratio"][peer])
        if sys.platform == "linux" and regime["step_mib"]["infopo"] is not None:
            assert regime["step_mib"][peer] > 0
    assert regime["tokens"]["computed"]["infopo"] < regime["tokens"]["rows"]


@pytest.mark.parametrize("beside", [["--threads", "2"], ["--threads", "1", "--end-to-end"]])
def test_a_processors_seconds_are_those_of_one_thread_and_of_turns(
    beside: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        speed.parse(["--clock", "processor", "--json", "r.json", *beside])
    assert "--clock processor: is of turns on a CPU with --threads 1" in capsys.readouterr().err


@pytest.mark.long
def test_one_round_gives_a_record_of_the_documented_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(
        tmp_path / "r.json", monkeypatch, "--regimes", "k", "--variants", "infopo,trl_best", "--overhead",
        "--clock", "processor",
    )  # fmt: skip
    assert result["settings"]["clock"] == "processor"
    assert result["schema"] == 1
    assert set(result) == {
        "schema", "hardware", "versions", "commit", "command", "settings", "regimes", "overhead",
    }  # fmt: skip
    assert result["settings"]["allocator"] == speed.ALLOCATOR
    assert result["versions"]["trl"].startswith("1.16")
    [regime] = result["regimes"]
    check_regime(regime, ["infopo", "trl_best"])
    assert sum(regime["parts"]["infopo"].values()) == pytest.approx(1)
    assert speed.table(result) in capsys.readouterr().out


@pytest.mark.long
def test_every_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [*speed.VARIANTS, "infopo_objective"]
    result = run(
        tmp_path / "r.json", monkeypatch, "--regimes", "hh,m", "--variants", ",".join(variants),
        "--pairs-per-step", "1", "--overhead", "--reference", "--linearity",
        "--end-to-end", "--end-to-end-pairs", "3", "--end-to-end-rounds", "1",
    )  # fmt: skip
    assert [r["regime"] for r in result["regimes"]] == ["hh", "m"]
    for regime in result["regimes"]:
        if "skipped" not in regime:
            check_regime(regime, variants)
    assert result["reference_pass"]["largest_difference"] < 1e-2
    assert result["linearity"]["tokens"] == [n * 768 for n in speed.LINEARITY_COUNTS]
    assert set(result["end_to_end"]["seconds"]) == {"infopo", "trl", "trl_precomputed"}


# ---- generation -----------------------------------------------------------------------------------------------------


def test_both_ways_of_drawing_give_whole_responses_and_the_page_has_the_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import generation
    from infopo.models import LAB_POLICY, load_tokenizer

    monkeypatch.setattr(generation, "RESPONSE", 3)
    prompts = [[5] * generation.PROMPT] * 4
    # Both assert the number and the length of what they drew.
    found = generation.compared(generation.model_of(0), load_tokenizer(LAB_POLICY), prompts, 2, 1)
    assert found["rounds"] == 1

    folder = Path(generation.__file__).parent
    page = (folder / "README.md").read_text(encoding="utf-8")
    kept = json.loads((folder / "results" / "generation.json").read_text(encoding="utf-8"))
    for batch, result in kept["batches"].items():
        ratio, speed_of = result["ratio"], result["tokens_per_second"]
        row = f"| {batch} | {speed_of['infopo']:,.0f} | {speed_of['transformers']:,.0f} | {ratio['median']:.2f} "
        assert f"{row}[{ratio['min']:.2f}, {ratio['max']:.2f}] |" in page


# ---- on a GPU -------------------------------------------------------------------------------------------------------


PYTHON = """#!/bin/sh
echo "$@" >> "$CALLS"
for each; do case "$each" in *"$FAILS") exit 3;; esac; done
echo "| a row |"
"""
"""It runs nothing, and fails if an argument ends with a text."""


def run_on_a_gpu(part: str, folder: Path, fails: str) -> tuple[int, list[str]]:
    """Runs benchmarks/gpu.sh with such a Python, and returns its exit status and the files that it asked for."""
    folder.mkdir()
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "CALLS": str(folder / "calls"), "FAILS": fails}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), part, str(folder / "results")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    words = (folder / "calls").read_text().split()
    return run.returncode, [Path(word).name for word in words if word.endswith((".json", "test_gpu.py"))]


@pytest.mark.parametrize("part", ["first", "second"])
def test_a_run_on_a_gpu_that_fails_is_in_the_exit_status(part: str, tmp_path: Path) -> None:
    """The others run all the same."""
    status, names = run_on_a_gpu(part, tmp_path / "whole", "nothing")
    assert status == 0
    assert len(names) == len(set(names)) > 3
    for name in names:
        assert run_on_a_gpu(part, tmp_path / name, name) == (1, names)
