"""A tiny training by a YAML and by a Python config, for tests that run once through each."""

import json
from pathlib import Path
from typing import Any

from tests.tiny import (
    PYTHON_CONFIG,
    PYTHON_HEADS,
    PYTHON_RCNN,
    RCNN,
    RETINANET,
    TINY_HEADS,
    tiny_pairs,
)

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
    "train_names": ("DATASETS.TRAIN", "dataloader.train.dataset.names"),
    "test_names": ("DATASETS.TEST", "dataloader.test.dataset.names"),
    "device": ("MODEL.DEVICE", "train.device"),
    "steps": ("SOLVER.STEPS", "lr_multiplier.scheduler.milestones"),
    "warmup_factor": ("SOLVER.WARMUP_FACTOR", "lr_multiplier.warmup_factor"),
    "warmup_method": ("SOLVER.WARMUP_METHOD", "lr_multiplier.warmup_method"),
    "clip": ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "train.clip_gradients.max_norm"),
    "clip_norm": ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "train.clip_gradients.norm_type"),
    "largest_size": (
        "INPUT.MAX_SIZE_TRAIN",
        "dataloader.train.mapper.augmentations.0.max_size",
    ),
    "style": (
        "INPUT.MIN_SIZE_TRAIN_SAMPLING",
        "dataloader.train.mapper.augmentations.0.sample_style",
    ),
    "format": ("INPUT.FORMAT", "dataloader.train.mapper.image_format"),
    "detections": ("TEST.DETECTIONS_PER_IMAGE", "model.max_detections_per_image"),
    "topk": ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", "model.test_topk_candidates"),
    "norm": ("MODEL.FPN.NORM", "model.backbone.norm"),
    "offset": ("MODEL.ANCHOR_GENERATOR.OFFSET", "model.anchor_generator.offset"),
    "prior": ("MODEL.RETINANET.PRIOR_PROB", "model.head.prior_prob"),
    "channels": ("MODEL.FPN.OUT_CHANNELS", "model.backbone.out_channels"),
    "classes": ("MODEL.RETINANET.NUM_CLASSES", "model.num_classes"),
    "score": ("MODEL.RETINANET.SCORE_THRESH_TEST", "model.test_score_thresh"),
    "writers": ("MODEL.GHM.TRAINING.WRITERS", "train.writers"),
}
KINDS = ("yaml", "python")


class Kind:
    """The command line of one kind of config, of a RetinaNet or of an R-CNN with some heads."""

    def __init__(self, name: str, folder: Path, heads: str = "") -> None:
        """
        Args:
            name: one of `KINDS`.
            folder: for the Python config.
            heads: "boxes", "masks" or "keypoints" of an R-CNN; "": a RetinaNet.
        """
        self.name, self.python = name, name == "python"
        self.file = RCNN if heads else RETINANET
        self._more = TINY_HEADS.get(heads, {})
        if self.python:
            self.file = str(folder / (f"tiny_{heads}.py" if heads else "tiny.py"))
            text = PYTHON_RCNN + PYTHON_HEADS[heads] if heads else PYTHON_CONFIG
            Path(self.file).write_text(text)

    def key(self, name: str) -> str:
        return _KEYS[name][self.python]

    def words(self, **values: Any) -> list[str]:
        """The words that change the config."""
        pairs = [(self.key(name), str(value)) for name, value in values.items()]
        if self.python:
            return [f"{key}={value}" for key, value in pairs]
        return [word for pair in pairs for word in pair]

    def names(self, *names: str) -> str:
        """A value that lists data sets."""
        quoted = ",".join(f"'{name}'" for name in names)
        return f"[{quoted}]" if self.python else f"({quoted},)" if names else "()"

    def overrides(self, **values: Any) -> list[str]:
        """The words that make the detector tiny, and those that change the config."""
        return [*([] if self.python else tiny_pairs(**self._more)), *self.words(**values)]

    def argv(self, *words: Any, **values: Any) -> list[str]:
        """A whole command line."""
        base = self.overrides()
        return ["--config-file", self.file, *base, *map(str, words), *self.words(**values)]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
