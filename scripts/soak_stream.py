"""Streams synthetic rows as training does, without a model, and says whether memory stays flat.

python scripts/soak_stream.py --rows 10000000 [--out result.json]

It exits with 1 if the process grew by more than --allowed-mib between a tenth of the rows and all of them.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import psutil
from datasets import IterableDataset

from infopo.data.counts import DataCounts
from infopo.data.encode import Encoder
from infopo.data.packing import PreferenceCollator
from infopo.data.sources import read_rows
from infopo.data.streaming import ExampleStream
from infopo.lab.tokenizer import build_tokenizer

BATCH = 32
BAD_EVERY = 1000
"""One of so many rows is empty on one side, because rows that are skipped must not stay in memory either."""


def rows() -> Iterator[dict[str, str]]:
    """Yields sums, without an end."""
    number = 0
    while True:
        rejected = "" if number % BAD_EVERY == BAD_EVERY - 1 else f"{number + 2}"
        yield {"prompt": f"{number}+1=", "chosen": f"{number + 1}", "rejected": rejected}
        number += 1


def soak(total: int) -> dict[str, object]:
    """Streams `total` rows, and measures the resident memory of this process twenty times on the way (MiB)."""
    source = IterableDataset.from_generator(rows)
    counts = DataCounts(on_bad_row="skip", source="synthetic")
    stream = ExampleStream(lambda c: read_rows(source, c), Encoder(build_tokenizer()), counts)
    examples, collate = iter(stream), PreferenceCollator()
    process, every = psutil.Process(), max(1, total // 20)
    memory, tokens, start = [], 0, time.perf_counter()
    while counts.rows < total:
        for batch in collate(list(islice(examples, BATCH))):
            tokens += len(batch.input_ids)
        if counts.rows >= every * (len(memory) + 1):
            memory.append(round(process.memory_info().rss / 2**20, 1))
            print(f"{counts.rows} rows, {memory[-1]} MiB", flush=True)
    return {
        "rows": counts.rows,
        "used": counts.used,
        "skipped": dict(counts.skipped),
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "memory_mib": memory,
        "growth_mib": round(max(memory) - memory[1], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--allowed-mib", type=float, default=32)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = soak(arguments.rows)
    text = json.dumps(result)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0 if float(str(result["growth_mib"])) <= arguments.allowed_mib else 1


if __name__ == "__main__":
    sys.exit(main())
