"""The training script: command line, checks, trainer, summary.

A name is imported when it is first used: :func:`build_optimizer` does not need the trainer.
"""

from importlib import import_module
from typing import Any

__all__ = ["GHMTrainer", "build_optimizer", "main"]

_MODULES = {"GHMTrainer": "trainer", "build_optimizer": "clipping", "main": "run"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
