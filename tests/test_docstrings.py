"""Examples in docstrings run, and what a reader looks up first has one."""

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import infopo
from infopo import estimators
from infopo.losses import common
from infopo.losses.registry import FUNCTIONS

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(infopo.__path__, "infopo.") if "__main__" not in m.name
)
SHOWN = [*FUNCTIONS.values(), *(f for f in vars(common).values() if inspect.isfunction(f))]


def public_functions(module: ModuleType) -> list[object]:
    functions = [
        f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__
    ]
    return [f for f in functions if not f.__name__.startswith("_")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not results.failed, (
        f"{results.failed} of {results.attempted} examples failed; they are printed above"
    )


@pytest.mark.parametrize("function", [*SHOWN, *public_functions(estimators)], ids=lambda f: f.__name__)
def test_every_loss_and_estimator_has_an_example(function: object):
    assert ">>>" in (inspect.getdoc(function) or "")
