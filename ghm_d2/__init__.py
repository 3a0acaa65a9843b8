"""Gradient Harmonizing Mechanism (AAAI 2019) for Detectron2.

Importing this package imports neither torch nor Detectron2; the first use of its names does.
"""

from importlib import import_module
from typing import Any

from ghm_d2.errors import explains_missing_detectron2

__version__ = "0.1.0"
__all__ = ["add_ghm_config", "model_zoo"]


def __getattr__(name: str) -> Any:
    with explains_missing_detectron2():
        if name == "add_ghm_config":
            for room in ("data", "model_zoo", "modeling"):
                import_module(f"ghm_d2.{room}")  # which registers what configs name
            return import_module("ghm_d2.config").add_ghm_config
        if name == "model_zoo":
            return import_module("ghm_d2.model_zoo")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
