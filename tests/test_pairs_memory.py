"""`infopo pairs` streams: four times the prompts take no more memory, sampled or paired again from a file."""

import pytest

import pairs_memory

MOST = 8.0
"""MiB that the larger run may take more: allocators keep what they have freed. Its text alone is 20 MiB more."""


@pytest.mark.long
@pytest.mark.parametrize(("kind", "count"), [("pair", 400), ("sample", 300)])
def test_four_times_the_prompts_take_no_more_memory(kind: str, count: int) -> None:
    few, many = (pairs_memory.measure(kind, n) for n in (count, 4 * count))
    growth = (many["peak_mib"] - many["before_mib"]) - (few["peak_mib"] - few["before_mib"])
    assert growth < MOST, (few, many)
