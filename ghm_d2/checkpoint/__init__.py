"""Checkpoints of other software: opened without running what they hold, and converted."""

from .checkpointer import RestrictedCheckpointer, load_trained_weights
from .opening import load_file

__all__ = ["RestrictedCheckpointer", "load_file", "load_trained_weights"]
