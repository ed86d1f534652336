"""`docs/tried.md` says what comes of each architecture, adapter and shape of data, and each row comes out so again."""

import pytest

from tried import architectures, page

WRITTEN = page.written()
NAMES = page.all_names()
TRAINED = [n for n in NAMES if n[0] in ("Architectures", "Adapters")]


def test_the_page_has_a_row_for_everything_that_the_libraries_know() -> None:
    """A new architecture, adapter or shape stands here without a row until `make tried` has run."""
    assert sorted(WRITTEN) == sorted(page.key(*name) for name in NAMES)


def test_nothing_on_the_page_is_a_fault() -> None:
    assert [line for line in WRITTEN.values() if line.split(" | ")[1] == "fault"] == []


def test_at_least_seventy_architectures_train() -> None:
    lines = [WRITTEN[page.key("Architectures", name)] for name in architectures.KINDS]
    assert sum(line.split(" | ")[1] == "trained" for line in lines) >= 70


def held(section: str, name: str) -> None:
    assert page.line(page.make(section, name)) == WRITTEN[page.key(section, name)], (
        "`make tried` writes the page anew"
    )


@pytest.mark.soak
@pytest.mark.parametrize(("section", "name"), TRAINED)
def test_training_comes_out_as_the_page_says(section: str, name: str) -> None:
    held(section, name)


@pytest.mark.long
@pytest.mark.parametrize(("section", "name"), TRAINED[::7])
def test_every_seventh_training_comes_out_as_the_page_says(section: str, name: str) -> None:
    """About a minute of the long tier; `make soak` makes them all."""
    held(section, name)


@pytest.mark.parametrize(("section", "name"), [n for n in NAMES if n[0] in ("Chat templates", "Data")])
def test_data_are_read_as_the_page_says(section: str, name: str) -> None:
    held(section, name)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba", "bert"])
def test_a_sample_of_architectures_comes_out_as_the_page_says(name: str) -> None:
    held("Architectures", name)
