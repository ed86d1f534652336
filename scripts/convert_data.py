"""Writes published data as preference rows, for `data.path` of a recipe; docs/data.md says which may train what.

python scripts/convert_data.py mbpp FOLDER_OR_FILES... OUT.jsonl [--as lists|pairs] [--tasks 11-260]
python scripts/convert_data.py squality FILE OUT.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

from infopo.errors import InfoPOError
from published_data import MBPP_TEST_TASKS, Converted, mbpp_rows, squality_rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("mbpp", "squality"))
    parser.add_argument("source", nargs="+", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--as", dest="form", choices=("lists", "pairs"), default="lists")
    parser.add_argument(
        "--tasks", type=_tasks, default=MBPP_TEST_TASKS, help="first and last task id, e.g. 11-260"
    )
    arguments = parser.parse_args()
    try:
        converted = _convert(arguments)
    except InfoPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in converted.rows), encoding="utf-8")
    print(*converted.lines(), sep="\n")
    return 0


def _convert(arguments: argparse.Namespace) -> Converted:
    if arguments.kind == "squality":
        return squality_rows(arguments.source[0])
    files = [
        file
        for source in arguments.source
        for file in (sorted(source.glob("mbpp_seed_*.jsonl*")) if source.is_dir() else [source])
    ]
    return mbpp_rows(files, arguments.form, arguments.tasks)


def _tasks(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


if __name__ == "__main__":
    sys.exit(main())
