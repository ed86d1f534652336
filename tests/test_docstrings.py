"""Examples in docstrings run, and what a reader looks up first has one."""

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import infopo
from infopo import estimators
from infopo.data.examples import ExampleDataset
from infopo.data.sampling import LengthGroupedEpochs, PaddedSampler
from infopo.lab import problems
from infopo.lab.evaluation import wilson_interval
from infopo.logps import wrappers
from infopo.logps.layout import ForestLayout
from infopo.losses import catalog, common, registry
from infopo.losses.registry import FUNCTIONS

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(infopo.__path__, "infopo.") if "__main__" not in m.name
)


def public_functions(module: ModuleType) -> list[object]:
    functions = [
        f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__
    ]
    return [f for f in functions if not f.__name__.startswith("_")]


SHOWN_MODULES = (estimators, common, catalog, registry, problems, wrappers)
"""Modules whose public functions all have an example."""

SHOWN = [
    *FUNCTIONS.values(),
    *(function for module in SHOWN_MODULES for function in public_functions(module)),
    ExampleDataset,
    ForestLayout,
    LengthGroupedEpochs,
    PaddedSampler,
    wilson_interval,
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not results.failed, (
        f"{results.failed} of {results.attempted} examples failed; they are printed above"
    )


@pytest.mark.parametrize("shown", SHOWN, ids=lambda f: f.__name__)
def test_what_a_reader_looks_up_first_has_an_example(shown: object):
    assert ">>>" in (inspect.getdoc(shown) or "")
