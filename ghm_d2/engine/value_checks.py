"""Checks of values that Detectron2 would fail at, or silently train nonsense with."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from PIL import Image

from ghm_d2.errors import UserError, reason

from .python_config import resize_key
from .settings import Config, detections_per_image, key_of, read_settings, value_of

logger = logging.getLogger(__name__)

_SEEDS = 2**32  # NumPy takes no seed from here on
# What Detectron2's mapper converts images to besides the modes of PIL.
_FORMATS = ("BGR", "YUV-BT.601")


def check_values(cfg: Config, eval_only: bool, world_size: int) -> None:
    """Checks numbers, names of image formats, and the device.

    Args:
        cfg: of the run.
        eval_only: whether to skip what is for training alone.
        world_size: processes of the job, each of which has a seed of its own.

    Raises:
        UserError: one of them is not allowed.
    """
    _check_counts(cfg, eval_only)
    _check_device(cfg)
    settings = read_settings(cfg)
    if settings.seed > _SEEDS - world_size:
        raise UserError(
            f"{key_of(cfg, 'seed')} must be at most {_SEEDS - world_size}, got {settings.seed}."
        )
    if len(set(settings.test)) < len(settings.test):
        raise UserError(f"{key_of(cfg, 'test')} names a data set twice: {settings.test}.")
    for key, value, allowed, fits in _rules(cfg, eval_only):
        if not _all_fit(value, fits):
            raise UserError(f"{key} must be {allowed}, got {value}.")
    if not eval_only:
        _check_training(cfg)


def _check_counts(cfg: Config, eval_only: bool) -> None:
    settings = read_settings(cfg)
    least = {"test_workers": 0}
    if not eval_only:
        least |= dict.fromkeys(("max_iter", "checkpoint_period", "images_per_batch"), 1)
        least |= {"log_period": 1, "eval_period": 0, "statistics_period": 0, "train_workers": 0}
        least |= {"patience": 0, "accumulation_steps": 1}
        if settings.checkpoints_kept is not None:
            least["checkpoints_kept"] = 1
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value is None or value < smallest:
            raise UserError(f"{key_of(cfg, name)} must be at least {smallest}, got {value}.")
    if not 0 <= settings.ema_decay < 1:
        raise UserError(
            f"{key_of(cfg, 'ema_decay')} must be at least 0 and less than 1, got "
            f"{settings.ema_decay}."
        )


def _check_device(cfg: Config) -> None:
    name = read_settings(cfg).device
    try:
        device = torch.device(name)
        if device.type != "cuda":  # initialising CUDA here would take memory from the processes
            torch.zeros(1, device=device).item()
        elif (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs, counted from 0")
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"{key_of(cfg, 'device')} {name!r} cannot be used ({reason(error)}): give cuda or cpu."
        ) from error


def _rules(cfg: Config, eval_only: bool) -> Iterator[tuple[str, Any, str, Callable[[Any], bool]]]:
    """Keys, their values, and what these must be, of the keys that the config has."""
    python = not isinstance(cfg, CfgNode)
    detections, _ = detections_per_image(cfg)
    at_least_1, above_0 = ("at least 1", lambda x: x >= 1), ("above 0", lambda x: x > 0)
    rules = [
        (detections, detections, *at_least_1),
        ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", "model.test_topk_candidates", *at_least_1),
    ]
    formats = f"{', '.join(_FORMATS)} or a mode of PIL such as RGB", _is_format
    for split in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        node = f"dataloader.{split.lower()}.mapper"
        resize = resize_key(cfg, split.lower()) if python else ""
        sides = "in pixels, 0 for those of the image", lambda x: x >= 0
        rules += [
            ("INPUT.FORMAT", f"{node}.image_format", *formats),
            (f"INPUT.MIN_SIZE_{split}", f"{resize}.short_edge_length", *sides),
            (f"INPUT.MAX_SIZE_{split}", f"{resize}.max_size", *at_least_1),
        ]
    if not eval_only and (python or cfg.SOLVER.CLIP_GRADIENTS.ENABLED):
        for yaml, name in (("CLIP_VALUE", "max_norm"), ("NORM_TYPE", "norm_type")):
            keys = f"SOLVER.CLIP_GRADIENTS.{yaml}", f"train.clip_gradients.{name}"
            rules.append((*keys, *above_0))
    if not eval_only and not python and cfg.TEST.PRECISE_BN.ENABLED:
        rules.append(("TEST.PRECISE_BN.NUM_ITER", "", *at_least_1))
    for *keys, allowed, fits in rules:
        if (value := value_of(cfg, keys[python])) is not None:
            yield keys[python], value, allowed, fits


def _is_format(value: Any) -> bool:
    return value in (*_FORMATS, *Image.MODES)


def _all_fit(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether a value, or each of a list of at least one, is right; no other type is."""
    try:
        return bool(value) and all(map(fits, value)) if _is_list(value) else fits(value)
    except TypeError:  # a comparison with text
        return False


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _check_training(cfg: Config) -> None:
    """The learning rate, its schedule, and the rest of what the optimizer is told."""
    python = not isinstance(cfg, CfgNode)
    parts = ("optimizer.lr", "optimizer.params", "lr_multiplier") if python else ("SOLVER",)
    for key, value in (x for part in parts for x in _numbers(value_of(cfg, part), part)):
        # With a negative rate, decay or factor, training goes away from the minimum.
        is_norm = key == "SOLVER.CLIP_GRADIENTS.NORM_TYPE"  # infinity is one
        if not is_norm and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{key} must be finite and at least 0, got {value}.")
    steps = "lr_multiplier.scheduler.milestones" if python else "SOLVER.STEPS"
    at = value_of(cfg, steps) or ()
    if not _is_list(at) or not _all_fit([0, *at], lambda x: x >= 0) or list(at) != sorted(set(at)):
        raise UserError(f"{steps} must be iterations, each larger than the one before, got {at}.")
    _check_warmup(cfg)


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}")
    elif _is_list(value):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, int | float):
        yield key, value


def _check_warmup(cfg: Config) -> None:
    settings, python = read_settings(cfg), not isinstance(cfg, CfgNode)
    warmup = settings.warmup or 0
    if python and warmup > 1:
        raise UserError(
            f"{key_of(cfg, 'warmup')} must be in 0 .. 1, a share of the training, got {warmup}."
        )
    if not python and warmup > settings.max_iter:
        logger.warning(
            "the warm-up is longer than the training (%s %s, %s %s): the learning rate never "
            "reaches its value",
            key_of(cfg, "warmup"),
            warmup,
            key_of(cfg, "max_iter"),
            settings.max_iter,
        )
