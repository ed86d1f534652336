"""Examples in docstrings run, and what a reader looks up first has one."""

import doctest
import importlib
import inspect
import pkgutil
import re
from types import ModuleType

import pytest
from transformers import Trainer

import infopo
from infopo import estimators
from infopo.data.examples import ExampleDataset
from infopo.data.sampling import LengthGroupedEpochs, PaddedSampler
from infopo.lab import problems
from infopo.lab.evaluation import wilson_interval
from infopo.logps import wrappers
from infopo.logps.forward import response_logps
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
    *(getattr(infopo, name) for name in infopo.__all__ if name != "__version__"),
    response_logps,
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


def docstrings() -> list[str]:
    """Docstrings of the package, without their examples."""
    texts = []
    for name in MODULES:
        module = importlib.import_module(name)
        objects = [o for o in vars(module).values() if getattr(o, "__module__", "") == name]
        members = [m for o in objects if inspect.isclass(o) for m in vars(o).values()]
        texts += [
            o.__doc__
            for o in (module, *objects, *members)
            if isinstance(o, ModuleType | type) or inspect.isfunction(o)
        ]
    return [re.sub(r">>>.*", "", text) for text in texts if text]


def test_docstrings_have_few_semicolons():
    """At most 0.2 per 100 words, as in optax and httpx. What follows a semicolon often has no verb."""
    text = " ".join(docstrings())
    words = len(text.split())
    assert words > 20_000
    assert 100 * text.count(";") / words < 0.2


def test_every_override_says_what_it_replaces_and_what_it_leaves_out():
    ours = [cls for cls in infopo.InfoPOTrainer.__mro__ if cls.__module__.startswith("infopo.")]
    overrides = [
        (f"{cls.__name__}.{name}", name, method)
        for cls in ours
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and name != "__init__" and hasattr(Trainer, name)
    ]
    assert len(overrides) > 25
    silent = [where for where, _, m in overrides if "Overrides `Trainer`'s" not in (m.__doc__ or "")]
    replaced = [
        where
        for where, name, m in overrides
        if f"super().{name}" not in inspect.getsource(m) and "leaves out" not in (m.__doc__ or "")
    ]
    assert (silent, replaced) == ([], [])
