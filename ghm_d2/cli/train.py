"""`ghm-d2 train` is train_net.py."""

from ghm_d2.engine import main

__all__ = ["main"]
