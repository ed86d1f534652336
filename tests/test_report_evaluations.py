"""The report's section on evaluations: figures, paired comparisons, items side by side."""

import json

from infopo.report import page, plain
from infopo.report.document import read_report
from run_files import write_run
from test_compare import RIGHT_A, RIGHT_B, write


def runs(tmp_path, *rights, **about):
    folders = []
    for name, right in zip("abc", rights):
        folders.append(write_run(tmp_path / name))
        if right is not None:
            write(folders[-1] / "evaluation", right, prompt="<b>question</b> {}", **about)
    return folders


def test_runs_are_compared_in_pairs_with_the_first(tmp_path):
    found = read_report(runs(tmp_path, RIGHT_A, RIGHT_B, RIGHT_A))
    evaluations = found.evaluations
    assert [(task, rule) for task, rule, _ in evaluations.rows] == [("sums", "exact"), ("sums", "loose")]
    assert [each.value for each in evaluations.rows[0][2]] == [0.8, 0.3, 0.8]
    assert evaluations.comparisons[0].startswith(
        "sums: 80.0% of items are right with a, 30.0% with b; the difference may be chance (p = 0.250). "
        "a wins 6 items, loses 1 and ties 3; 10 items show"
    )
    assert len(evaluations.comparisons) == 2
    assert [(each.item, each.first_is_right) for each in evaluations.differing] == [
        *((f"sums/{i}", True) for i in range(2, 7)), ("sums/8", False),
    ]  # fmt: skip


def test_every_format_has_them_and_texts_are_escaped(tmp_path):
    found = read_report(runs(tmp_path, RIGHT_A, RIGHT_B))
    html = page.to_html(found)
    assert '<section id="evaluation">' in html
    assert "&lt;b&gt;question&lt;/b&gt; 2" in html
    assert "<b>question" not in html
    assert "80.0% of items are right with a, 30.0% with b" in html
    markdown = plain.to_markdown(found)
    assert "### Evaluation" in markdown
    assert "| sums | exact | 0.800 \\[0.490, 0.943\\] | 0.300 \\[" in markdown
    tree = json.loads(plain.to_json_text(found))
    assert tree["evaluations"]["rows"][0][2][1]["value"] == 0.3


def test_runs_that_were_not_evaluated_have_no_section(tmp_path):
    found = read_report(runs(tmp_path, None, None))
    assert found.evaluations.rows == found.evaluations.notes == []
    assert 'id="evaluation"' not in page.to_html(found)
    assert "### Evaluation" not in plain.to_markdown(found)
    one = read_report(runs(tmp_path / "one", RIGHT_A, None))
    assert one.evaluations.rows[0][2][1] is None
    assert one.evaluations.comparisons == []


def test_what_cannot_be_compared_or_read_is_a_note(tmp_path):
    """The report of a run is not lost because of its evaluation."""
    a, b, c = runs(tmp_path, RIGHT_A, RIGHT_B, RIGHT_B)
    write(b / "evaluation", RIGHT_B, prompt="Something else {}", data={"sha256": "e" * 64})
    (c / "evaluation" / "items.jsonl").write_text("[]\n")
    found = read_report([a, b, c]).evaluations
    assert len(found.notes) == 2
    assert "items.jsonl:1: is no marked response" in found.notes[0]
    assert "b is not compared: b: 10 items of sums ask something else than in a" in found.notes[1]
    assert found.comparisons == found.differing == []


def test_an_evaluation_during_training_counts_if_there_is_no_later_one(tmp_path):
    run = write_run(tmp_path / "run")
    order = (("tasks/step-9", "x"), ("tasks/step-10", "xx"), ("tasks/final", "xxx"), ("evaluation", "xxxx"))
    for folder, right in order:
        write(run / folder, [i < len(right) for i in range(4)])
        ((_, _, (estimate,)), *_) = read_report([run]).evaluations.rows
        assert estimate.value == len(right) / 4
