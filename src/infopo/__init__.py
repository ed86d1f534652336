"""InfoPO: align language models with preference data by maximising a mutual-information bound.

`import infopo` is cheap: what needs torch is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infopo.arguments import InfoPOConfig
    from infopo.losses.declaration import objective
    from infopo.losses.judgement import check_loss
    from infopo.records import LossTerm, ResponseLogps
    from infopo.trainer import InfoPOTrainer

__version__ = "0.1.0"

_HOME = {
    "InfoPOConfig": "infopo.arguments",
    "InfoPOTrainer": "infopo.trainer",
    "LossTerm": "infopo.records",
    "ResponseLogps": "infopo.records",
    "check_loss": "infopo.losses.judgement",
    "objective": "infopo.losses.declaration",
}

__all__ = [
    "InfoPOConfig",
    "InfoPOTrainer",
    "LossTerm",
    "ResponseLogps",
    "__version__",
    "check_loss",
    "objective",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'infopo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
