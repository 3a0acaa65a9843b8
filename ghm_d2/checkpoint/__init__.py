"""Checkpoints of other software: opened without running what they hold, and converted."""

from .checkpointer import RestrictedCheckpointer
from .opening import load_file
from .trained_weights import load_trained_weights

__all__ = ["RestrictedCheckpointer", "load_file", "load_trained_weights"]
