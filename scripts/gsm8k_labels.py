"""Marks the model solutions published with GSM8K, and counts where the rule `numeric` and their labels differ.

The file is grade_school_math/data/example_model_solutions.jsonl of https://github.com/openai/grade-school-math:

    python scripts/gsm8k_labels.py example_model_solutions.jsonl --json benchmarks/results/gsm8k-labels.json
"""

import argparse
import hashlib
import json
from pathlib import Path

from infopo.evaluation.answers import NUMBER_RULES
from infopo.evaluation.items import Answered, Item
from infopo.provenance import environment
from infopo.runs import write_json_atomic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--json", help="where the result goes")
    arguments = parser.parse_args()
    content = Path(arguments.file).read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    found = {}
    for model in (key for key, value in rows[0].items() if isinstance(value, dict)):
        answers = [
            Answered(
                Item(f"gsm8k/{n}", row["question"], row["ground_truth"].rpartition("A: ")[2]),
                row[model]["solution"],
            )
            for n, row in enumerate(rows)
        ]
        labels = [row[model]["is_correct"] for row in rows]
        marks = {name: [mark.correct for mark in rule(answers)] for name, rule in NUMBER_RULES.items()}
        found[model] = {
            "n": len(rows),
            "published": sum(labels),
            **{name: sum(each) for name, each in marks.items()},
            "numeric_differs_on": [
                answer.item.id
                for answer, mark, label in zip(answers, marks["numeric"], labels)
                if mark != label
            ],
        }
        print(f"{model}: {found[model]}")
    if arguments.json:
        about = {"file": Path(arguments.file).name, "sha256": hashlib.sha256(content).hexdigest()}
        write_json_atomic(
            arguments.json, {"source": about, "models": found, "environment": environment(seed=None)}
        )


if __name__ == "__main__":
    main()
