"""The training script: command line, checks, trainer, summary."""

from ghm_d2.engine.run import main
from ghm_d2.engine.trainer import GHMTrainer

__all__ = ["GHMTrainer", "main"]
