"""What every test runs under: no network, one thread, fixed seeds, and array shapes checked at every call."""

import gc
import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

# Before anything imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Nor does a test write to its user's cache. Subprocesses inherit it; nothing is made until it is used.
CACHE = Path(tempfile.gettempdir()) / f"infopo-tests-{os.getpid()}"
os.environ["INFOPO_CACHE"] = str(CACHE)

import jaxtyping  # noqa: E402

import shape_checker  # noqa: E402

# Not for workers of `multiprocessing` and subprocesses: they import infopo as users do.
SHAPES_CHECKED = jaxtyping.install_import_hook("infopo", "shape_checker.checked")
jaxtyping.jaxtyped = shape_checker.checked  # which the hook writes above every function, and which costs more

import numpy as np  # noqa: E402 - the environment and the import hook come first
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

settings.register_profile(
    "gate", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gate")

# Tests are spread over processes; threads within each would only fight over the same cores.
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The garbage collector leaves out what is imported: half a million objects that every full pass went through."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in a test whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds reference log-probs that another has stored."""
    monkeypatch.setenv(
        "INFOPO_CACHE", str(CACHE / hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16])
    )


@pytest.fixture(autouse=True, scope="session")
def _cache_removed() -> Iterator[None]:
    yield
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _default_dtype_kept() -> Iterator[None]:
    """A test that changes torch's default dtype changes it for itself only."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real public data beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real data beside this checkout (expected ../shared/data)")
    return SHARED_DATA
