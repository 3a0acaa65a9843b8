"""Training from Python configs (Detectron2's LazyConfig): what lazy_train_net.py does."""

from .run import main

__all__ = ["main"]
