"""A tiny training by a YAML and by a Python config, for tests that run once through each."""

import json
from pathlib import Path
from typing import Any

from tests.tiny import PYTHON_CONFIG, RETINANET, tiny_pairs

# By the name that the tests use: the key in YAML, and that in Python.
_KEYS = {
    "output": ("OUTPUT_DIR", "train.output_dir"),
    "max_iter": ("SOLVER.MAX_ITER", "train.max_iter"),
    "period": ("SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period"),
    "eval_period": ("TEST.EVAL_PERIOD", "train.eval_period"),
    "weights": ("MODEL.WEIGHTS", "train.init_checkpoint"),
    "workers": ("DATALOADER.NUM_WORKERS", "dataloader.train.num_workers"),
    "test_workers": ("DATALOADER.NUM_WORKERS", "dataloader.test.num_workers"),
    "images": ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size"),
    "train_size": (
        "INPUT.MIN_SIZE_TRAIN",
        "dataloader.train.mapper.augmentations.0.short_edge_length",
    ),
    "lr": ("SOLVER.BASE_LR", "optimizer.lr"),
    "expected": ("TEST.EXPECTED_RESULTS", "train.expected_results"),
    "warmup": ("SOLVER.WARMUP_ITERS", "lr_multiplier.warmup_length"),
    "seed": ("SEED", "train.seed"),
    "metric": ("MODEL.GHM.TRAINING.VAL_METRIC", "train.val_metric"),
    "save_best": ("MODEL.GHM.TRAINING.SAVE_BEST", "train.save_best"),
    "patience": ("MODEL.GHM.TRAINING.PATIENCE", "train.patience"),
    "validation_loss": ("MODEL.GHM.TRAINING.VALIDATION_LOSS", "train.validation_loss"),
    "ema": ("MODEL.GHM.TRAINING.EMA_DECAY", "train.ema_decay"),
    "parts": ("MODEL.GHM.TRAINING.ACCUMULATION_STEPS", "train.accumulation_steps"),
    "writers": ("MODEL.GHM.TRAINING.WRITERS", "train.writers"),
}
KINDS = ("yaml", "python")


class Kind:
    """The command line of one kind of config."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.python = name, name == "python"
        self.file = RETINANET
        if self.python:
            self.file = str(folder / "tiny.py")
            Path(self.file).write_text(PYTHON_CONFIG)

    def key(self, name: str) -> str:
        return _KEYS[name][self.python]

    def words(self, **values: Any) -> list[str]:
        """The words that change the config."""
        pairs = [(self.key(name), str(value)) for name, value in values.items()]
        if self.python:
            return [f"{key}={value}" for key, value in pairs]
        return [word for pair in pairs for word in pair]

    def argv(self, *words: Any, **values: Any) -> list[str]:
        """A whole command line."""
        base = [] if self.python else tiny_pairs()
        return ["--config-file", self.file, *base, *map(str, words), *self.words(**values)]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
