"""The report: what it says of run directories of every kind, and that nothing in them gets past its escapes."""

import base64
import html
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopo.cli import main
from infopo.errors import ConfigError
from infopo.report import plots
from infopo.report.document import Report, read_report
from infopo.report.page import policy, to_html
from infopo.report.panels import ALL_POINTS, PANELS, points_per_series
from infopo.report.plain import to_json_text, to_markdown
from infopo.report.reading import read_runs
from infopo.report.thinning import thinned
from infopo.runs import RunDirectoryError
from run_files import FALLING, PROMPTS, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A healthy run, one whose chosen responses fall, and one that was killed."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / "infopo"),
        write_run(folder / "dpo", objective="dpo", beta=0.1, fall=1.0, seed=1, verdicts=(FALLING,)),
        write_run(folder / "sft", objective="sft", seed=2, finished=False),
    ]


@pytest.fixture(scope="module")
def report(runs: list[Path]) -> Report:
    return read_report(runs)


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return to_html(report)


# --- what it says ---


def test_headline_has_the_last_values_with_their_intervals(report: Report, runs: list[Path]):
    titles = [column.title for column in report.headline.columns]
    last = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()][-2]
    chosen = report.headline.rows[0][titles.index("Chosen")]
    assert chosen is not None
    assert chosen.value == last["probe/change/chosen"]
    assert chosen.high == pytest.approx(last["probe/change/chosen"] + last["probe/change/chosen_ci95"])
    kl = report.headline.rows[0][titles.index("Forward KL")]
    assert kl is not None
    assert kl.high == pytest.approx(0.5 + NormalDist().inv_cdf(0.975) * 0.02)
    accuracy = report.headline.rows[0][titles.index("Reward accuracy")]
    assert accuracy is not None
    assert (accuracy.value, accuracy.n) == (0.8, 64)
    assert report.headline.rows[2][titles.index("Accuracy")] is None  # it was killed before evaluation


def test_a_share_of_the_evaluation_has_the_interval_of_its_number_of_pairs(tmp_path: Path):
    record = {"eval_rewards/accuracies": 0.72, "eval_runtime": 0.4933, "eval_samples_per_second": 405.432}
    (tmp_path / "eval.json").write_text(json.dumps(record))
    report = read_report([tmp_path])
    estimate = report.headline.rows[0][0]
    assert estimate is not None
    assert estimate.n == 200
    assert (round(estimate.low, 3), round(estimate.high, 3)) == (0.654, 0.778)  # Wilson, by hand


def test_summaries_say_what_was_trained_on_what(report: Report):
    assert [run.method for run in report.runs] == ["InfoPO (β 1)", "DPO (β 0.1)", "SFT on chosen (β 1)"]
    assert {run.data for run in report.runs} == {"pairs.jsonl, 600 rows"}
    assert [run.state for run in report.runs] == ["finished", "finished", "stopped"]


def test_every_panel_has_a_metric_that_the_full_record_has(report: Report):
    assert [plot.panel.key for plot in report.plots] == [
        panel.key for panel in PANELS if panel.key != "throughput"
    ] or (report.left_out == [])
    assert len({panel.key for panel in PANELS}) == len(PANELS)


def test_panels_without_data_are_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n')
    report = read_report([tmp_path])
    assert [plot.panel.key for plot in report.plots] == ["loss"]
    assert len(report.left_out) == len(PANELS) - 1
    assert "No run has data for: Likelihood: change since the start;" in to_html(report)


def test_settings_that_differ_are_marked(report: Report):
    table = report.settings
    differing = [key for key, differs in zip(table.keys, table.differs, strict=True) if differs]
    assert differing == ["objective.name", "objective.beta", "output_dir"]


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path: Path):
    lines = ['{"step": 1, "loss": 0.7}', '{"step": 2, "loss": "NaN"}', '{"step": 3, "loss": 0.5}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    [series] = read_report([tmp_path]).plots[0].series
    assert (series.steps, series.not_finite) == ([1, 3], 1)
    assert "1 not finite" in to_html(read_report([tmp_path]))


def test_completions_compare_the_first_answer_with_the_last_of_each_run(report: Report):
    assert [prompt.text for prompt in report.completions.prompts] == list(PROMPTS)
    prompt = report.completions.prompts[0]
    assert [(answer.run, answer.step) for answer in prompt.answers] == [(0, 0), (0, 60), (1, 60), (2, 60)]
    assert prompt.answers[0].pieces == [("Answer 0, which is certain: 42.", False)]
    assert prompt.answers[2].pieces == [
        ("Answer 0, which is ", False), ("nearly ", True), ("certain: ", False), ("43", True), (".", False),
    ]  # fmt: skip


# --- thinning ---


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 100))
def test_thinning_keeps_the_extremes_and_both_ends(values: list[float], limit: int):
    kept = thinned(values, limit)
    assert len(kept) <= max(limit, 0)
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    shown = [values[index] for index in kept]
    assert (min(shown), max(shown)) == (min(values), max(values))


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=400))
def test_all_series_together_stay_within_the_budget(lengths: list[int]):
    limit = points_per_series(lengths)
    assert sum(min(limit, length) for length in lengths) <= ALL_POINTS or limit == 20


# --- runs of every kind ---


def test_a_run_without_the_command_line_has_the_metrics_of_its_last_checkpoint(tmp_path: Path):
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        history = [{"step": s, "loss": 1 / s, "logps/chosen": -s} for s in range(1, step + 1)]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    [run] = read_runs([tmp_path])
    assert run.step == 10
    assert run.notes == (
        "There is no metrics.jsonl, so the metrics are those of checkpoint-10/trainer_state.json.",
    )
    assert read_runs([tmp_path / "checkpoint-2"])[0].step == 2


def test_a_half_written_last_line_is_left_out_and_said(tmp_path: Path):
    write_run(tmp_path, finished=False)
    for name in ("metrics.jsonl", "generations.jsonl"):
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 99, "lo')
    [run] = read_report([tmp_path]).runs
    assert run.progress == "stopped, step 60 of 60"
    assert [note.split(" was ")[0] for note in run.notes] == [
        "The last line of metrics.jsonl", "The last line of generations.jsonl",
    ]  # fmt: skip


def test_a_run_that_has_not_begun_to_train_is_running_and_has_nothing_yet(tmp_path: Path):
    (tmp_path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    [run] = read_runs([tmp_path])
    assert (run.state, run.run.metrics, run.notes) == ("running", [], ("The run has not begun to train.",))
    assert "The run has not begun to train." in to_html(read_report([tmp_path]))


def test_a_curve_of_zeros_keeps_no_other_from_a_logarithmic_axis(tmp_path: Path):
    """As the push on rejected responses of a loss without any."""
    rows = [{"step": s, "gradients/chosen": 10.0**s, "gradients/rejected": 0.0} for s in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = {plot.panel.key: plot for plot in read_report([tmp_path]).plots}["gradients"]
    assert plots.can_be_log(found)
    low, high = plots.ranges(found)["log"]
    assert 1 < low < 10
    assert 1000 < high < 10_000
    zeros = replace(found, series=[each for each in found.series if not each.most])
    assert not plots.can_be_log(zeros)


def test_a_run_is_running_while_the_process_of_its_lock_lives(tmp_path: Path):
    write_run(tmp_path, finished=False)
    lock = tmp_path / ".lock"
    lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert read_runs([tmp_path])[0].state == "running"
    lock.write_text(
        f"process 4194305 on {socket.gethostname()}\n"
    )  # above the largest process number of Linux
    assert read_runs([tmp_path])[0].state == "stopped"
    lock.write_text("process 1 on another-machine\n")  # whose last record is of 2001
    assert read_runs([tmp_path])[0].state == "stopped"


def test_runs_of_equal_names_are_told_apart_by_their_folders(tmp_path: Path):
    paths = [write_run(tmp_path / seed / "dpo", steps=2) for seed in ("seed0", "seed1")]
    assert [run.name for run in read_runs([*paths, write_run(tmp_path / "sft", steps=2)])] == [
        "seed0/dpo",
        "seed1/dpo",
        "sft",
    ]


# --- bad input ---


def test_a_directory_given_twice_is_refused(runs: list[Path]):
    with pytest.raises(ConfigError, match=r"are the same directory; name each run once"):
        read_runs([runs[0], runs[0] / ".." / runs[0].name])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metrics.jsonl",
            '{"step": 1}\n{"step": \n{"step": 3}\n',
            r"metrics\.jsonl:2: is no JSON object with",
        ),
        ("generations.jsonl", '{"step": 1}\n[]\n', r"generations\.jsonl:2: is no JSON object with"),
        ("eval.json", "{", r"eval\.json: is not valid JSON"),
        ("verdicts.json", "[]", r"verdicts\.json: expected a JSON object, got list"),
        ("recipe.yaml", "a: [", r"recipe\.yaml: .*not valid YAML"),
        ("data.json", "\udcff", r"data\.json: cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str):
    write_run(tmp_path, steps=2)
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunDirectoryError, match=message):
        read_report([tmp_path])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "error: nothing: is no directory; expected the output_dir of a run"),
        (["file"], "error: file: is no directory"),
        (["empty"], "error: empty: is no run directory: it holds no recipe.yaml"),
        (["run", "--output", "no/r.html"], "error: --output: there is no folder no to write r.html to"),
        (["run", "--output", "empty"], "error: --output: empty is a folder; expected a file"),
        (["run", "--output", "run/metrics.jsonl"], "error: --output: run/metrics.jsonl is a file of the run"),
        (["run", "--watch", "--format", "json"], "error: --watch: expected --output FILE"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "run", steps=2)
    assert main(["report", *arguments]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "report.html").exists()


# --- formats ---


def test_the_command_writes_a_page_and_the_other_formats_go_to_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: list[Path]
):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out.startswith("report.html: ")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["report", *map(str, runs), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][1]["verdicts"][0]["name"] == "chosen falling"
    assert main(["report", *map(str, runs), "--format", "markdown"]) == 0
    assert "**dpo: chosen falling**" in capsys.readouterr().out


def test_json_has_every_point_that_is_drawn(report: Report):
    tree = json.loads(to_json_text(report))
    assert tree["schema_version"] == 1
    series = next(plot for plot in tree["plots"] if plot["key"] == "change")["series"]
    assert [(each["run"], each["line"], len(each["steps"])) for each in series] == [
        (run, line, 61) for run in range(3) for line in ("chosen", "rejected")
    ]


def test_markdown_tables_have_equal_rows_whatever_the_text_is(tmp_path: Path):
    text = to_markdown(
        read_report([write_run(tmp_path / "a|b\n*c*", steps=3), write_run(tmp_path / "<b>", steps=4)])
    )
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert tables
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    assert "<b>" not in text


# --- nothing gets past the escapes ---


class Elements(HTMLParser):
    """Collects the elements of a page, and the content of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", {}))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)


def elements(page: str) -> Elements:
    parser = Elements()
    parser.feed(page)
    return parser


HOSTILE = (
    "</script></pre></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'><!-- "
    "\x1b[31m\x07\u202e{{7*7}}"
)


def with_another(tree: Any, other: Any) -> Iterator[Any]:
    """Yields copies of a JSON tree, each with one value replaced."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            for changed in (other, *with_another(value, other)):
                copy = tree.copy()
                copy[key] = changed
                yield copy


def everything_hostile(tree: Any, name: str = "") -> Any:
    """Returns a JSON tree with every text replaced, and every key doubled by one that is."""
    if isinstance(tree, dict):
        kept = {key: everything_hostile(value, key) for key, value in tree.items()}
        return kept | {HOSTILE + key: everything_hostile(value, key) for key, value in tree.items() if name}
    if isinstance(tree, list):
        return [everything_hostile(value, name) for value in tree]
    return HOSTILE + tree if isinstance(tree, str) else tree


def check_nothing_slipped(page: str, clean: str) -> None:
    """Holds a page against that of runs without hostile text."""
    found, expected = elements(page), elements(clean)
    assert {tag for tag, _ in found.tags} == {tag for tag, _ in expected.tags}
    for _, attributes in found.tags:
        assert not any(name.startswith("on") or name == "src" for name in attributes)
    code = [text for attributes, text in found.scripts if attributes.get("type") != "application/json"]
    assert code == [
        text for attributes, text in expected.scripts if attributes.get("type") != "application/json"
    ]
    data = [text for attributes, text in found.scripts if attributes.get("type") == "application/json"]
    assert all("<" not in text and json.loads(text) for text in data)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert "49" not in re.findall(r"\{\{.*?\}\}", page)


def test_hostile_text_in_every_field_is_shown_and_changes_nothing(tmp_path: Path, page: str):
    name = "<script>alert(1)<" + "img src=x onerror=alert(2)>\x1b[31m"
    run = write_run(tmp_path / name, verdicts=(FALLING,))
    for path in run.iterdir():
        if path.suffix == ".json":
            path.write_text(
                json.dumps(everything_hostile(json.loads(path.read_text()), path.name)), encoding="utf-8"
            )
    lines = [
        everything_hostile(json.loads(line)) for line in (run / "generations.jsonl").read_text().splitlines()
    ]
    (run / "generations.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    recipe = {
        "model": {"name_or_path": HOSTILE},
        "data": {"path": HOSTILE},
        "objective": {"name": HOSTILE, HOSTILE: 1},
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    second = write_run(tmp_path / "other", verdicts=(FALLING,))
    found = to_html(read_report([run, second]), command=HOSTILE)
    check_nothing_slipped(found, page)
    assert html.escape("</script></pre></title><script>alert(1)").replace("&#x27;", "&#39;") in found
    assert r"\x1b[31m\x07\u202e" in found


@pytest.mark.long
@pytest.mark.parametrize("other", [HOSTILE, {"a": "b"}, 10**400], ids=["text", "object", "huge"])
@pytest.mark.parametrize(
    "name", ["environment.json", "eval.json", "data.json", "verdicts.json", "generations.jsonl"]
)
def test_another_value_in_any_place_breaks_nothing(tmp_path: Path, name: str, other: Any):
    run = write_run(tmp_path / "run", steps=3, verdicts=(FALLING,))
    original = (run / name).read_text().splitlines()[0] if name.endswith("l") else (run / name).read_text()
    for number, tree in enumerate(with_another(json.loads(original), other)):
        if name.endswith("l"):
            tree["step"] = 0  # without a whole number the line is refused by name
        (run / name).write_text(f"{json.dumps(tree)}\n", encoding="utf-8")
        report = read_report([run])
        to_markdown(report)
        to_json_text(report)
        if number % 25 == 0:
            assert "<script>alert(1)" not in to_html_without_library(report)


def to_html_without_library(report: Report) -> str:
    """Returns the page without its curves, which do not depend on these files and take most of the time."""
    from dataclasses import replace

    return to_html(replace(report, plots=[]))


def test_only_the_two_scripts_of_the_page_may_run(page: str):
    found = elements(page)
    code = [text for attributes, text in found.scripts if attributes.get("type") != "application/json"]
    assert len(code) == 2
    declared = next(
        a["content"]
        for tag, a in found.tags
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert declared == policy(code[::-1])
    assert "unsafe-eval" not in declared
    first = next(index for index, (tag, _) in enumerate(found.tags) if tag == "script")
    assert [tag for tag, _ in found.tags].index("meta") < first


def test_nothing_is_fetched_when_the_page_opens(page: str):
    tags = elements(page).tags
    assert not [tag for tag, _ in tags if tag in ("link", "img", "iframe", "object", "embed", "base")]
    assert all(
        value.startswith("#") for _, a in tags for name, value in a.items() if name == "href" and value
    )


def test_the_curves_of_the_page_are_those_of_the_report(page: str, report: Report):
    import numpy as np

    text = next(text for attributes, text in elements(page).scripts if attributes.get("id") == "curves")
    for plot in report.plots:
        for curve, series in zip(json.loads(text)[plot.panel.key]["curves"], plot.series, strict=True):
            assert np.frombuffer(base64.b64decode(curve["x"]), dtype="<i4").tolist() == series.steps
            np.testing.assert_allclose(
                np.frombuffer(base64.b64decode(curve["y"]), dtype="<f4"), series.values, rtol=1e-6
            )
