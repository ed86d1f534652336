"""`infopo compare`: what is read, what is refused, what is said."""

import json
import math
from pathlib import Path

import pytest

from infopo.cli import main
from infopo.errors import ConfigError, DataError
from infopo.evaluation.contenders import read_contender
from infopo.evaluation.items import Mark
from infopo.evaluation.lab_task import lab_task
from infopo.evaluation.results import Response, gold_text, summary, write_evaluation
from infopo.lab.problems import solve
from infopo.paired import mcnemar
from infopo.workflows.compare import compare
from run_files import write_run

RIGHT_A = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
RIGHT_B = [1, 1, 0, 0, 0, 0, 0, 0, 1, 0]


def write(
    folder,
    right,
    *,
    task="sums",
    samples=1,
    rules=("exact", "loose"),
    prompt="question {}",
    gold=None,
    **about,
):
    """Writes an evaluation whose item i is right if `right[i]`. The second rule calls everything right."""
    responses = [
        Response(task, f"{task}/{i}", k, prompt.format(i), f"answer {i}", 3, True,
                 {rules[0]: Mark(bool(x), "1"), **{rule: Mark(True, "1") for rule in rules[1:]}},
                 gold(i) if gold else None)
        for i, x in enumerate(right) for k in range(samples)
    ]  # fmt: skip
    record = {
        "headline": rules[0],
        "items": len(right),
        "samples": samples,
        "data": {"source": "default", "sha256": "d" * 64},
        "rules": {rule: summary(responses, rule) for rule in rules},
        "prompting": "chat",
        **about,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_evaluation(folder, {"model": {"name": str(folder)}, "tasks": {task: record}}, responses)
    return str(folder)


def test_two_evaluations(tmp_path, capsys):
    """A alone is right on six items, B alone on one: McNemar's p is 2 (1 + 7) / 2^7 = 0.125."""
    a, b = write(tmp_path / "a", RIGHT_A), write(tmp_path / "b", RIGHT_B)
    assert main(["compare", a, b]) == 0
    text = capsys.readouterr().out
    assert f"| sums (exact) | {b} | 10 | 0.800 | 0.300 | +0.500 [" in text
    assert "| 0.125 | 6 / 1 |" in text
    assert (
        f"sums: 80.0% of items are right with A, 30.0% with {b}; the difference may be chance (p = 0.125)."
        in text
    )
    assert "A wins 6 items, loses 1 and ties 3; 10 items show a difference of" in text
    assert "- sums, A wins: sums/2, sums/3, sums/4, sums/5, sums/6 and 1 more" in text
    assert f"- sums, {b} wins: sums/8" in text
    assert "Holm" not in text


def test_json_has_every_item_and_number(tmp_path):
    a, b = write(tmp_path / "a", RIGHT_A), write(tmp_path / "b", RIGHT_B)
    out = tmp_path / "c.json"
    assert main(["compare", a, b, "--format", "json", "--output", str(out)]) == 0
    tree = json.loads(out.read_text())
    (row,) = tree["comparisons"]
    assert tree["schema_version"] == 1
    assert row["wins"] == [f"sums/{i}" for i in range(2, 8)]
    assert row["losses"] == ["sums/8"]
    assert row["found"]["p"] == mcnemar(6, 1)


def test_exchanging_the_two_exchanges_everything(tmp_path, capsys):
    a, b = write(tmp_path / "a", RIGHT_A), write(tmp_path / "b", RIGHT_B)
    (there,), (back,) = compare([a, b]), compare([b, a])
    assert (there.wins, there.losses) == (back.losses, back.wins)
    assert there.found.difference == -back.found.difference
    assert there.found.ci95 == pytest.approx((-back.found.ci95[1], -back.found.ci95[0]))
    assert there.found.p == back.found.p
    (same,) = compare([a, a])
    assert (same.found.difference, same.found.p, same.wins) == (0.0, 1.0, [])
    assert "no item tells them apart" not in capsys.readouterr().out


def test_several_contenders_and_tasks_are_adjusted_together(tmp_path, capsys):
    a, b, c = (
        write(tmp_path / name, right)
        for name, right in (("a", [1] * 12), ("b", [0] * 8 + [1] * 4), ("c", [1] * 12))
    )
    rows = compare([a, b, c])
    assert [row.other for row in rows] == [b, c]
    assert rows[0].found.p == mcnemar(8, 0)
    assert rows[0].p_holm == 2 * mcnemar(8, 0)
    text = capsys.readouterr().out
    assert "p-values are adjusted for 2 comparisons (Holm)." in text
    assert "A is better (p = 0.016)" in text


def test_items_that_only_one_has_are_counted(tmp_path, capsys):
    a, b = write(tmp_path / "a", RIGHT_A), write(tmp_path / "b", RIGHT_B[:7])
    (row,) = compare([a, b])
    assert (row.found.n, row.only_first, row.only_other) == (7, 3, 0)
    assert "sums: 3 items only A has; they are left out" in capsys.readouterr().out


def test_samples_of_an_item_are_one_observation(tmp_path, capsys):
    a, b = write(tmp_path / "a", RIGHT_A, samples=4), write(tmp_path / "b", RIGHT_B, samples=2)
    (row,) = compare([a, b])
    assert (row.found.n, row.found.wins, row.found.losses, row.found.test) == (10, 6, 1, "sign flips")
    text = capsys.readouterr().out
    assert "80.0% of samples are right with A" in text
    assert "sums: samples differs: 4 against 2" in text


def test_other_questions_of_the_same_name_are_refused(tmp_path):
    a = write(tmp_path / "a", RIGHT_A)
    b = write(tmp_path / "b", RIGHT_B, prompt="Another question {}", data={"sha256": "e" * 64})
    with pytest.raises(
        DataError, match=r"10 items of sums ask something else than in .*evaluate both on the same data"
    ):
        compare([a, b])


def test_the_same_data_in_other_words_is_named(tmp_path, capsys):
    """Worked examples and chat templates change what is asked of the same item."""
    a, b = (
        write(tmp_path / "a", RIGHT_A),
        write(tmp_path / "b", RIGHT_B, prompt="1+1=2. question {}", num_fewshot=1),
    )
    (row,) = compare([a, b])
    assert row.found.n == 10
    assert "sums: 10 items are put in other words" in capsys.readouterr().out


def test_figures_without_marks_are_left_out_and_named(tmp_path, capsys):
    """A perplexity of lm-evaluation-harness has no marks by item."""
    folders = [write(tmp_path / name, right) for name, right in (("a", RIGHT_A), ("b", RIGHT_B))]
    for folder in folders:
        path = tmp_path / folder / "eval.json"
        record = json.loads(path.read_text())
        record["tasks"]["wikitext"] = {"headline": "ppl", "rules": {"ppl": {"value": 9.0}}}
        record["tasks"]["nothing"] = {"headline": None, "rules": {}}
        path.write_text(json.dumps(record))
    assert [row.task for row in compare(folders)] == ["sums"]
    assert (
        "left out without marks by item: wikitext (rules: ppl); nothing (rules: none)"
        in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="has no task 'wikitext'; it has sums"):
        compare(folders, ["wikitext"])


def test_settings_that_differ_are_named(tmp_path, capsys):
    a = write(tmp_path / "a", RIGHT_A, law={"temperature": 0.0, "top_p": 1.0}, data={"sha256": "e" * 64})
    b = write(tmp_path / "b", RIGHT_B, law={"temperature": 1.0, "top_p": 1.0}, prompting="plain")
    compare([a, b])
    text = capsys.readouterr().out
    assert "sums: prompting differs: chat against plain" in text
    assert "sums: sampling differs: temperature 0.0 against 1.0" in text
    assert "sums: the data differ (another file, other answers or a limit)" in text
    assert "what 10 of them were graded against is not known" in text


def test_items_that_were_graded_against_other_answers_are_left_out(tmp_path, capsys):
    """B's answer key differs in items 2 to 7, the very ones that A wins."""
    a = write(tmp_path / "a", RIGHT_A, gold=gold_text)
    b = write(
        tmp_path / "b", RIGHT_B, gold=lambda i: gold_text(i + 50 * (2 <= i < 8)), data={"sha256": "e" * 64}
    )
    (row,) = compare([a, b])
    assert (row.found.n, row.found.wins, row.found.losses, row.only_first, row.only_other) == (4, 0, 1, 0, 0)
    text = capsys.readouterr().out
    assert (
        "sums: 6 items were graded against other answers, e.g. sums/2: 2 against 52; they are left out"
        in text
    )
    assert "data differ" not in text


def test_other_answers_throughout_are_refused(tmp_path, capsys):
    """The same responses, marked twice against different keys. Long golds are told apart by their hashes."""
    for name, size in (("short", 1), ("long", 500)):
        a = write(tmp_path / name / "a", [1] * 10, gold=lambda i, s=size: gold_text(s * f"a{i}"))
        b = write(
            tmp_path / name / "b",
            [0] * 10,
            gold=lambda i, s=size: gold_text(s * f"b{i}"),
            data={"sha256": "e" * 64},
        )
        for sources in ((a, b), (f"{a}/items.jsonl", f"{b}/items.jsonl")):
            assert main(["compare", *sources]) == 2
            error = capsys.readouterr().err
            assert "all 10 items of sums that" in error
            assert "were graded against other answers, e.g. sums/0: " in error
            assert ('"a0" against "b0"' if size == 1 else "sha256:") in error
            assert len(error) < 500


def test_a_limit_is_no_difference_of_the_data(tmp_path, capsys):
    a = write(tmp_path / "a", RIGHT_A, gold=gold_text)
    b = write(tmp_path / "b", RIGHT_B[:7], gold=gold_text, data={"sha256": "e" * 64})
    compare([a, b])
    text = capsys.readouterr().out
    assert "3 items only A has" in text
    assert "data differ" not in text


def test_what_a_task_grades_against_is_in_the_items_file(tmp_path):
    """A task marks the same responses against two files of data with the same questions."""
    responses = lines(
        tmp_path / "r.jsonl", [{"question": f"{i} + 1?", "response": f"#### {i + 1}"} for i in range(8)]
    )
    folders = []
    for shift in (0, 1):
        data = lines(
            tmp_path / f"gsm{shift}.jsonl",
            [{"question": f"{i} + 1?", "answer": f"So #### {i + 1 + shift * (i < 6)}"} for i in range(8)],
        )
        folders.append(str(tmp_path / f"e{shift}"))
        command = ["evaluate", "--tasks", "gsm8k", "--data", f"gsm8k={data}", "--responses", responses]
        assert main([*command, "--output", folders[-1]]) == 0
    (row,) = compare(folders)
    assert (row.found.n, row.found.wins) == (2, 0)
    assert "6 items were graded against other answers" in row.notes[0]


def test_older_files_without_golds_are_read(tmp_path):
    a, b = write(tmp_path / "a", RIGHT_A), write(tmp_path / "b", RIGHT_B, gold=gold_text)
    path = tmp_path / "a" / "items.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines(path, [{key: value for key, value in row.items() if key != "gold"} for row in rows])
    (row,) = compare([a, b])
    assert row.found.n == 10


@pytest.mark.parametrize(
    ("right", "wrong"), [("yes", "no"), ("TRUE", "False"), ("Pass", "fail"), (" correct", "incorrect")]
)
def test_scores_in_words(tmp_path, right, wrong):
    a = lines(tmp_path / "a.jsonl", [{"id": i, "correct": right if i < 6 else wrong} for i in range(8)])
    b = lines(tmp_path / "b.jsonl", [{"id": i, "correct": wrong} for i in range(8)])
    (row,) = compare([a, b])
    assert (row.found.mean_a, row.found.mean_b, row.found.test) == (0.75, 0.0, "mcnemar")


def test_rules(tmp_path):
    a, b = write(tmp_path / "a", RIGHT_A), write(tmp_path / "b", RIGHT_B, rules=("other", "loose"))
    with pytest.raises(
        ConfigError, match=r"marked by 'exact' and .* by 'other'; name one that both have: --rule loose"
    ):
        compare([a, b])
    (row,) = compare([a, b], rule="loose")
    assert row.found.mean_a == row.found.mean_b == 1.0
    with pytest.raises(ConfigError, match=r"no task has marks by rule 'strict': sums .rules: exact, loose"):
        compare([a, b], rule="strict")


def test_a_run_directory_has_its_evaluation(tmp_path):
    run = write_run(tmp_path / "run")
    write(run / "evaluation", RIGHT_A)
    assert read_contender(str(run)).tasks["sums"].scores["sums/0"] == [1.0]


def test_runs_without_an_evaluation_are_compared_by_marks_of_their_samples(tmp_path, capsys):
    """The marks of `write_run` depend on its seed. Prompts without a verifier have none."""
    a, b = write_run(tmp_path / "a", seed=0), write_run(tmp_path / "b", seed=1)
    (row,) = compare([str(a), str(b)])
    assert row.task == "generations"
    assert 0 < row.found.n <= 4
    text = capsys.readouterr().out
    assert "was not evaluated: marks of its last samples (generations.jsonl) are compared" in text
    assert "are too few to show any difference" in text
    (a / "generations.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"has no evaluation and no marked samples; run `infopo evaluate"):
        compare([str(a), str(b)])


def test_a_model_that_was_evaluated_here_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "infopo-eval" / "someone-model", RIGHT_A)
    assert read_contender("someone/model").tasks["sums"].scores["sums/8"] == [0.0]
    with pytest.raises(
        ConfigError, match=r"other/model: is no file or folder, and was not evaluated here; run `infopo"
    ):
        read_contender("other/model")


def test_files_of_an_evaluation_stand_for_it(tmp_path):
    folder = tmp_path / "a"
    write(folder, RIGHT_A)
    whole = read_contender(str(folder))
    for name in ("eval.json", "items.jsonl"):
        assert read_contender(str(folder / name)).tasks == whole.tasks
    alone = tmp_path / "items.jsonl"
    (folder / "items.jsonl").rename(alone)
    assert read_contender(str(alone)).tasks["sums"].scores == whole.tasks["sums"].scores
    assert read_contender(str(alone)).tasks["sums"].rule == "exact"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "eval.json").write_text('{"accuracy": 0.5}')
    with pytest.raises(ConfigError, match="has totals only, no scores by item"):
        read_contender(str(tmp_path / "old" / "eval.json"))


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"id": "x{}", "correct": True}, {"id": "x{}", "correct": False}),
        (
            {"task_id": "HumanEval/{}", "passed": True, "completion": "y"},
            {"task_id": "HumanEval/{}", "passed": False},
        ),
        ({"prompt": "question {}", "score": 1}, {"prompt": "question {}", "score": 0.0}),
    ],
)
def test_files_with_a_score_per_row(tmp_path, a, b):
    def rows(row, n=8):
        return [
            {key: value.format(i) if isinstance(value, str) else value for key, value in row.items()}
            for i in range(n)
        ]

    first, second = lines(tmp_path / "a.jsonl", rows(a)), lines(tmp_path / "b.jsonl", rows(b)[::-1])
    (row,) = compare([first, second])
    assert (row.found.n, row.found.wins, row.found.p) == (8, 8, mcnemar(8, 0))
    assert row.wins[0] == str(rows(a)[0][next(iter(a))])


def test_samples_of_lm_evaluation_harness(tmp_path):
    """There is a row per document and filter."""

    def rows(strict, flexible):
        return [
            {"doc_id": i, "doc": {}, "filter": name, "metrics": ["exact_match"], "exact_match": float(value)}
            for name, values in (("strict-match", strict), ("flexible-extract", flexible))
            for i, value in enumerate(values)
        ]

    a = lines(tmp_path / "samples_a.jsonl", rows([1, 1, 0], [1, 1, 1]))
    b = lines(tmp_path / "samples_b.jsonl", rows([0, 1, 0], [0, 0, 0]))
    (row,) = compare([a, b])
    assert (row.rule, row.found.n, row.wins) == ("exact_match,strict-match", 3, ["0"])
    (row,) = compare([a, b], rule="exact_match,flexible-extract")
    assert row.wins == ["0", "1", "2"]
    with pytest.raises(
        ConfigError, match="there is no rule 'f1'; there are exact_match,strict-match, exact_match,flex"
    ):
        compare([a, b], rule="f1")


def test_the_filter_none_is_one_of_several(tmp_path):
    """Rows of the other filter are other marks of the same responses, not further samples."""
    rows = [
        {"doc_id": i, "metrics": ["exact_match"], "exact_match": value, **named}
        for named, value in (({"filter": "none"}, 0.0), ({"filter": "flexible-extract"}, 1.0))
        for i in range(3)
    ]
    file = lines(tmp_path / "samples.jsonl", rows)
    for rule, score in ((None, 0.0), ("exact_match", 0.0), ("exact_match,flexible-extract", 1.0)):
        (found,) = read_contender(file, rule=rule).tasks.values()
        assert found.scores == {"0": [score], "1": [score], "2": [score]}
    assert found.rules == ["exact_match", "exact_match,flexible-extract"]


def test_targets_of_lm_evaluation_harness_are_compared(tmp_path):
    def rows(targets):
        return [
            {"doc_id": i, "metrics": ["acc"], "acc": 1.0, "target": target}
            for i, target in enumerate(targets)
        ]

    a, b = lines(tmp_path / "a.jsonl", rows([1, 2, 3])), lines(tmp_path / "b.jsonl", rows([1, "2", 4]))
    (row,) = compare([a, b])
    assert row.found.n == 2
    assert "1 items were graded against other answers, e.g. 2: " in row.notes[0]


def test_ratings_that_are_no_shares(tmp_path, capsys):
    a = lines(tmp_path / "a.jsonl", [{"id": i, "score": 7 + i % 3} for i in range(30)])
    b = lines(tmp_path / "b.jsonl", [{"id": i, "score": 5 + i % 2} for i in range(30)])
    (row,) = compare([a, b])
    assert row.found.test == "sign flips"
    assert "the mean score is 8.000 with A, 5.500 with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("a", "b", "n", "said", "unsaid"),
    [
        (0.75, 0.25, 30, "A is better (p = 1e-04). A wins 30 items, loses 0 and ties 0.", "tells them apart"),
        (0.5, 0.5, 30, "A wins 0 items, loses 0 and ties 30; no item tells them apart.", "is better"),
        (0.75, 0.25, 3, "loses 0 and ties 0; 3 items are too few to show any difference.", "is better"),
    ],
)
def test_equal_differences_tell_two_apart_unless_they_are_none(tmp_path, capsys, a, b, n, said, unsaid):
    files = [
        lines(tmp_path / f"{name}.jsonl", [{"id": i, "score": score} for i in range(n)])
        for name, score in (("a", a), ("b", b))
    ]
    compare(files)
    text = capsys.readouterr().out
    assert said in text
    assert unsaid not in text


def test_responses_are_graded_by_a_task(tmp_path):
    items = lab_task().load(None)[:20]
    right = [solve(item.gold).solution for item in items]
    a = lines(tmp_path / "a.jsonl", [{"id": item.id, "response": text} for item, text in zip(items, right)])
    b = lines(tmp_path / "b.jsonl", [{"id": item.id, "response": "no idea"} for item in items[:12]])
    (row,) = compare([a, b], ["lab"])
    assert (row.found.n, row.found.wins, row.only_first) == (12, 12, 8)
    with pytest.raises(ConfigError, match="has responses without scores; name what grades them with --tasks"):
        compare([a, b])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        (
            [{"id": 1, "text_of_nothing": 2}],
            "has neither scores .* nor responses .*the columns id, text_of_nothing",
        ),
        ([{"id": 1, "score": "high"}], r"a.jsonl:1: column 'score': expected a score, got 'high'"),
        ([{"id": 1, "score": 1}, {"score": 1}], r"a.jsonl:2: column 'id': expected the item, got nothing"),
        ([{"id": 1, "score": math.nan}], "expected a score, got nan"),
        ([{"id": 1, "score": math.inf}], "expected a score, got inf"),
        ([{"id": "elsewhere", "score": 1}], "has no item of results in common"),
        ([3], r"a.jsonl:1: expected an object with columns, got int"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, rows, message, capsys):
    a = lines(tmp_path / "a.jsonl", rows)
    b = lines(tmp_path / "b.jsonl", [{"id": "1", "score": 0}])
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        compare([b, a])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert main(["compare", b, a]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_arguments_are_judged(tmp_path):
    a = write(tmp_path / "a", RIGHT_A)
    with pytest.raises(ConfigError, match="expected two or more to compare"):
        compare([a])
    with pytest.raises(ConfigError, match="has no task 'gsm8k'; it has sums"):
        compare([a, a], ["gsm8k"])
    with pytest.raises(ConfigError, match="--output: there is no folder"):
        compare([a, a], output=tmp_path / "nowhere" / "c.md")
    with pytest.raises(ConfigError, match="have no task in common: sums against products"):
        compare([a, write(tmp_path / "b", RIGHT_B, task="products")])


def test_text_of_strangers_cannot_break_the_table(tmp_path, capsys):
    a = lines(tmp_path / "a|\x1b[31m.jsonl", [{"id": "x\x1b[2J|y\nz", "score": 1}])
    b = lines(tmp_path / "b.jsonl", [{"id": "x\x1b[2J|y\nz", "score": 0}])
    assert main(["compare", b, a]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    assert not any(line.startswith("z") for line in text.splitlines())


def test_a_file_that_is_compared_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in files:
        path.write_text('{"id": 1, "score": 1}\n')
    assert main(["compare", *map(str, files), "--output", str(files[1])]) == 2
    assert "is what is read" in capsys.readouterr().err
    assert files[1].read_text() == '{"id": 1, "score": 1}\n'
