"""`infopo winrate --calibrate` compares a judge with the votes of people, and people with each other."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infopo.data.files import file_rows
from infopo.errors import ConfigError, DataError
from infopo.evaluation.judge import Judgements
from infopo.evaluation.winrate import Duel, calibration
from infopo.output import say
from infopo.preflight import check_writable
from infopo.provenance import environment
from infopo.runs import to_json, write_json_atomic
from infopo.workflows.ask_judge import JudgeSettings, refuse_arguments, refuse_without_verdicts, run_judge

FORMATS = ("markdown", "json")


def calibrate(
    votes: str,
    settings: JudgeSettings,
    *,
    limit: int | None = None,
    output: str | Path | None = None,
    format: str = "markdown",
) -> dict[str, Any]:
    """Compares a judge with the votes of people: agreement, Cohen's κ, and the agreement of people with each other.

    Args:
        votes: A file of PandaLM's test set: `instruction`, `input`, `response1`, `response2` and votes `annotator1`,
            `annotator2`, ... of 1, 2 or 0 (a tie).
        settings: Who judges, and how.
        limit: Largest number of pairs.
        output: Folder of the results, by default `infopo-winrate/calibration`.
        format: "markdown" or "json".

    Raises:
        ConfigError: A setting is wrong, nobody has agreed to the cost, or the judge decides no pair.
        DataError: A row has other columns.
        ServerError: The judge does not answer. What it has answered is kept.
    """
    refuse_arguments(format, FORMATS, limit)
    folder = Path(output) if output is not None else Path("infopo-winrate") / "calibration"
    check_writable(folder, "--output")
    duels, people = read_votes(votes)
    duels, people = duels[:limit], people[:limit]
    judge = settings.make()
    store = Judgements(folder)
    outcomes = run_judge(duels, store, judge, settings)
    refuse_without_verdicts(duels, outcomes, store, judge, settings)
    record = {
        "schema_version": 1,
        "votes": votes,
        "judge": {
            "name": judge.name,
            "version": judge.version,
            "template": settings.template,
            "url": settings.judge,
        },
        "result": calibration(people, outcomes),
        "environment": environment(seed=None),
    }
    write_json_atomic(folder / "calibration.json", record)
    if format == "json":
        sys.stdout.write(f"{to_json(record, indent=2)}\n")
    else:
        say(*calibration_lines(record), f"written: {folder / 'calibration.json'}")
    return record


def read_votes(path: str) -> tuple[list[Duel], list[list[str]]]:
    """Returns the pairs of a file with votes, and the votes of each."""
    if not Path(path).is_file():
        raise ConfigError(f"--calibrate: there is no file {path}")
    duels, people = [], []
    for number, row in file_rows(Path(path), path):
        row_id = f"{path}:{number}"
        if isinstance(row, DataError):
            raise row
        columns = row if isinstance(row, Mapping) else {}
        names = sorted(name for name in columns if re.fullmatch(r"annotator\d+", name))
        texts = [columns.get(name) for name in ("instruction", "response1", "response2")]
        votes = [{"0": "tie", "1": "1", "2": "2"}.get(str(columns[name])) for name in names]
        # The published file says true where a spreadsheet took "True" for a value.
        texts = [str(text) if isinstance(text, bool | int | float) else text for text in texts]
        if not all(isinstance(text, str) for text in texts) or len(votes) < 2 or None in votes:
            raise DataError(
                "expected instruction, response1, response2, and annotator1, annotator2, ... of 0, 1 or 2",
                row_id,
                "no votes",
            )
        prompt = "\n\n".join(part for part in (texts[0], columns.get("input")) if part)
        duels.append(Duel(row_id, prompt, str(texts[1]), str(texts[2])))
        people.append([str(vote) for vote in votes])
    if not duels:
        raise DataError("has no pairs", path, "no rows")
    return duels, people


def calibration_lines(record: Mapping[str, Any]) -> list[str]:
    """Returns a calibration as lines of Markdown."""
    r = record["result"]

    def percent(name: str) -> str:
        return "-" if r[name] is None else f"{r[name]:.1%}"

    rows = [
        ("agreement with the majority of people", f"{percent('agreement')} of {r['majority']}"),
        ("Cohen's κ", "-" if r["kappa"] is None else f"{r['kappa']:.3f}"),
        ("agreement where neither calls a tie", f"{percent('agreement_decided')} of {r['decided']}"),
        ("a person with the others (ceiling)", percent("ceiling")),
        ("the judge with the same others", percent("judge_on_ceiling")),
        ("ties of the judge / of people", f"{percent('tie_share_judge')} / {percent('tie_share_people')}"),
        ("asked / invalid / flips", f"{r['asked']} / {r['invalid']} / {r['flips']}"),
    ]
    return [
        f"judge: {record['judge']['name']}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {n} | {v} |" for n, v in rows),
        "",
    ]
