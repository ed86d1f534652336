"""Rules that read numbers from responses: what models write, the traps of other rules, and agreement with lm-eval."""

import gzip
import json
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from infopo.evaluation.answers import NUMBER_RULES, numeric_marks, read_number
from infopo.evaluation.items import Answered, Item, Mark

SHARED = Path(__file__).parents[2] / "shared" / "data"


def numeric(response: str, gold: str = "18", *, finished: bool = True) -> Mark:
    return numeric_marks([Answered(Item("gsm8k/0", "How many?", gold), response, finished)])[0]


RIGHT = [
    # Markers.
    ("She sells 9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
    ("She sells 9 eggs for $2.\nA: 18", "18"),
    ("The answer is 18.", "18"),
    ("So the answer is: 18", "18"),
    ("Therefore, the final answer is $\\boxed{18}$.", "18"),
    ("Therefore, the answer (arabic numerals) is 18 dollars for 9 eggs.", "18"),
    ("**Answer:** 18", "18"),
    ("### Final Answer\n\nJanet makes **$18** every day.", "18"),
    ("**Final Answer**: $18.00 per day", "18"),
    ("ANSWER: 18\n\nExplanation: 16 - 3 - 4 = 9 eggs at $2 each.", "18"),
    ("<answer>18</answer>", "18"),
    ("<think>9 or 20?</think> The correct answer should be 18, since 16 - 3 - 4 = 9.", "18"),
    ("The answer to question 3 is 18.", "18"),
    ("\\[ 9 \\times 2 = \\boxed{18 \\text{ dollars}} \\]", "18"),
    ("\\boxed{x = 18}", "18"),
    ("\\boxed{9 \\times 2 = 18}", "18"),
    ("\\[\n\\boxed{\\$18}\n\\]", "18"),
    # The last marker, and equations behind one.
    ("#### 20\nWait, that is wrong.\n#### 18", "18"),
    ("#### 18\nI hope this answer is helpful!", "18"),
    ("The answer is 9 * 2 = 18.", "18"),
    ("The answer is $200 - $182 = $18. I hope this helps!", "18"),
    ("The answer is 9 eggs * $2 = $18 a day.", "18"),
    ("Answer: Janet sells 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = 18 dollars.", "18"),
    ("The answer is 18, because 9 * 2 = 18, and not 16 * 2 = 32.", "18"),
    # Headings that look like markers.
    ("#### Step 1: Count 3 eggs\n#### 2. Multiply\nShe makes 9 * 2 = 18 dollars.", "18"),
    # No marker.
    ("Janet makes $18.00.", "18"),
    ("She sells 9 eggs and makes 18 dollars.", "18"),
    ("18 eggs...", "18"),
    ("9 * 2 = 18 (see step 2)", "18"),
    ("9 * 2 = **18**.", "18"),
    ("so she makes 18 dollars, as step 2 shows", "18"),
    ("She makes 18 dollars.\n3. Done", "18"),
    ("There are 18 for the 2nd", "18"),
    ("The area is 18 m^2", "18"),
    ("The area is 18 m\u00b2", "18"),
    # Ways to write numbers.
    ("#### 18.0", "18"),
    ("#### 5.0", "5"),
    ("#### 18", "18.0"),
    ("The answer is 1,234.", "1234"),
    ("The answer is 1,234,567", "1234567"),
    ("#### 70000", "70,000"),
    ("The answer is $1{,}234$.", "1234"),
    ("The answer is 1\\,234", "1234"),
    ("The answer is 1\u202f234 metres", "1234"),
    ("The answer is \u22125", "-5"),
    ("The answer is -5.", "-5"),
    ("The answer is -$5", "-5"),
    ("The answer is $-5", "-5"),
    ("The answer is \u20135", "-5"),
    ("16\u22123 = 13", "13"),
    ("16 - 3", "3"),
    ("from 10\u201318", "18"),
    ("The answer is 50%.", "50"),
    ("The answer is 50\\%", "50"),
    ("The answer is 1/2", "0.5"),
    ("$\\frac{1}{2}$", "0.5"),
    ("\\boxed{\\dfrac{7}{14}}", "0.5"),
    ("The answer is 2 1/2 cups", "2.5"),
    ("The answer is 2\u00bd cups", "2.5"),
    ("The answer is .5", "0.5"),
    ("The answer is 1.5 \\times 10^6", "1500000"),
    ("The answer is 1.5e6", "1500000"),
    ("The answer is 4 million dollars", "4"),
    ("The answer is 4 million dollars", "4000000"),
    ("The answer is \u20ac18", "18"),
    ("The answer is Rs.18", "18"),
    ("The answer is 18 000 rupees", "18000"),
    ("The answer is 3 + 15 which equals 18.", "18"),
    ("It fell to -5 degrees", "-5"),
    ("He has -$5 left", "-5"),
    ("The answer is -\\frac{1}{2}", "-0.5"),
    ("2 \\frac{1}{2} hours", "2.5"),
    ("\u7b54\u6848\u662f18", "18"),
    ("16 people bet on horse #12.", "16"),
    ("The answer is 18kg", "18"),
    ("The answer is \uff11\uff18", "18"),
    ("The answer is about 18 hours", "18"),
    ("The answer is _____18_____.", "18"),
    ("The answer is 18 dollars/day", "18"),
    ("The answer is 18 - that is all.", "18"),
]


@pytest.mark.parametrize(("response", "gold"), RIGHT)
def test_numeric_reads_what_models_write(response: str, gold: str) -> None:
    assert numeric(response, gold).correct, numeric(response, gold)


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("The answer is 50%", "0.5"),
        ("The answer is 5", "-5"),
        ("The answer is \u22125", "5"),
        ("#### 18\n#### 20", "18"),
        ("The answer is 3:30", "3"),
        ("The answer is 18.5", "18"),
        ("The answer is 180", "18"),
        ("The answer is 1,8", "18"),
    ],
)
def test_numeric_refuses_what_is_another_number(response: str, gold: str) -> None:
    assert not numeric(response, gold).correct


def test_a_response_without_a_number_has_no_answer() -> None:
    for response in ("", "I do not know.", "#### many", "x2 and H2O", "1" * 5000, "1e999999999", "1/0"):
        assert numeric(response) == Mark(False, None, "no answer"), response[:20]


def test_a_response_that_was_cut_off_needs_a_marker_and_a_whole_number() -> None:
    assert numeric("She has 16 - 3 = 18 and then", finished=False) == Mark(False, None, "unfinished")
    assert numeric("The answer is 18", "18", finished=False) == Mark(False, None, "unfinished")
    assert numeric("#### 18\n\nQuestion: Tom has 3", finished=False).correct


@given(st.text(max_size=200))
def test_any_text_has_a_verdict(response: str) -> None:
    numeric(response)
    assert numeric(response + "\n#### 18").correct


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_every_way_to_write_a_number_reads_back(value: object) -> None:
    written = f"{value:,}"
    ways = (
        f"The answer is {written}.",
        f"#### ${written}",
        f"\\boxed{{{written.replace(',', '{,}')}}}",
        f"so {written} eggs",
    )
    for way in (*ways, ways[0].replace("-", "\u2212")):
        found = read_number(way)
        assert found is not None
        assert found.value == value, way


def test_loops_of_a_model_take_no_time() -> None:
    for piece in ("#### ", "answer is ", "(3 ", "\\boxed{", "1,"):
        numeric(piece * 5_000)


def test_the_solutions_of_gsm8k_are_right() -> None:
    path = SHARED / "gsm8k" / "test.jsonl.gz"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    answers = [Answered(Item("", "", row["answer"].split("#### ")[-1]), row["answer"]) for row in rows]
    for name, rule in NUMBER_RULES.items():
        assert all(mark.correct for mark in rule(answers)), name


PIECES = (
    "#### 18", "####18", "#### $18", "#### -18.", "#### 1,8", "18", "-18", "\u221218", "$18.00", "18.", "18 eggs...",
    "5.0", "..", ",", " = 18 (see step 2)", "The answer is 18", "\n", " ", "[invalid]", "#### ", "$", "1,234",
    "#### 1,234.", "\u0661\u0668", "**18**", "I\u0307",
)  # fmt: skip


def test_lm_eval_rules_agree_with_the_library(tmp_path: Path) -> None:
    """Outputs that the library grades itself, from its own definition of the task to its own samples."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    draw = random.Random(0)
    outputs = ["".join(draw.choices(PIECES, k=draw.randrange(6))) for _ in range(600)]
    golds = [draw.choice(["18", "-18", "1,234", "5", "18.", "70,000"]) for _ in outputs]
    data = tmp_path / "rows.jsonl"
    rows = [{"question": "How many?", "answer": f"It is 1.\n#### {gold}"} for gold in golds]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    official = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    local = {
        "include": str(official), "task": "gsm8k_local", "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": {"train": str(data), "test": str(data)}, "cache_dir": str(tmp_path)},
        "num_fewshot": 0,
    }  # fmt: skip
    (tmp_path / "gsm8k_local.yaml").write_text(yaml.safe_dump(local), encoding="utf-8")

    class Parrot(LM):
        def generate_until(self, requests: list) -> list[str]:  # type: ignore[type-arg]
            return outputs[: len(requests)]

        def loglikelihood(self, requests: list) -> list:  # type: ignore[type-arg]
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = lm_eval.simple_evaluate(
        Parrot(), tasks=["gsm8k_local"], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    answers = [Answered(Item("", "", gold), output) for gold, output in zip(golds, outputs, strict=True)]
    for ours, theirs in (("lm_eval_strict", "strict-match"), ("lm_eval_flexible", "flexible-extract")):
        samples = [sample for sample in result["samples"]["gsm8k_local"] if sample["filter"] == theirs]
        expected = [bool(s["exact_match"]) for s in sorted(samples, key=lambda sample: sample["doc_id"])]
        marks = NUMBER_RULES[ours](answers)
        different = [
            (o, g, m, e) for o, g, m, e in zip(outputs, golds, marks, expected, strict=True) if m.correct != e
        ]
        assert not different
        assert 10 < sum(expected) < 590
        assert result["results"]["gsm8k_local"][f"exact_match,{theirs}"] == sum(
            m.correct for m in marks
        ) / len(marks)
