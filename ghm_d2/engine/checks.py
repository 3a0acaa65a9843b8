"""Checks before anything is launched, so that many processes report a mistake once.

Everything here raises `UserError` with one sentence; what only looks odd is logged.
"""

import logging
import os
import re
from collections.abc import Set

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from ghm_d2.checkpoint.files import fetch
from ghm_d2.errors import UserError, similar_names
from ghm_d2.modeling import validate_ghm_config
from ghm_d2.run_folder import RunFolder

from .clipping import CLIP_TYPES
from .dataset_checks import check_datasets
from .processes import Processes, started_by_torchrun
from .selection import check_selection
from .settings import Config, key_of, pair, read_settings
from .value_checks import check_values
from .writers import check_writers

logger = logging.getLogger(__name__)

_ONE = Processes()
# How to make the weights that configs name but nobody publishes in Detectron2's format.
_WEIGHTS_HINTS = {
    "resnext101_32x4d-a5af3160": "ghm-d2 convert-torchvision "
    "https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth {path}",
    "mobilenet_v2": "ghm-d2 fetch-backbone mobilenet_v2 {path}",
    "retinanet_ghm_": "ghm-d2 convert-mmdet URL {path}, with the URL that stands in the "
    "config file",
}


def check_all(
    cfg: Config,
    given: Set[str] = frozenset(),
    processes: Processes = _ONE,
    *,
    eval_only: bool = False,
    resume: bool = False,
) -> None:
    """Check config, processes, data sets and weights before anything is launched.

    Weights behind a URL are fetched into Detectron2's cache here, before any process is launched.

    Args:
        cfg: of the run.
        given: keys that the command line has given, in place of the config file.
        processes: of the job.
        eval_only: whether nothing will be trained.
        resume: whether the last checkpoint in the output folder comes before the weights.

    Raises:
        UserError: one sentence with the way out.
    """
    _check_config(cfg)
    _name_keys_without_effect(cfg, given)
    check_values(cfg, eval_only, processes.world_size)
    _check_processes(cfg, processes, eval_only)
    check_datasets(cfg, eval_only)
    if not eval_only:
        check_selection(cfg)
        check_writers(cfg)
    _check_weights(cfg, given, eval_only, resume)


def check_inference(cfg: Config, given: Set[str] = frozenset()) -> None:
    """Check what a trained detector needs to run on images: config and weights, no data set.

    Args:
        cfg: of the detector.
        given: as for :func:`check_all`.

    Raises:
        UserError: one sentence with the way out.
    """
    _check_config(cfg)
    weights, name = read_settings(cfg).weights, key_of(cfg, "weights")
    if name not in given and (what := _untrained(weights)):
        raise UserError(
            f"a trained detector is needed, but {name} is {what}: give "
            f"{pair(cfg, 'weights', 'FILE')}."
        )
    if weights:
        _check_weights_file(cfg, weights)


def _check_config(cfg: Config) -> None:
    if not isinstance(cfg, CfgNode):
        return  # its parts check their arguments when they are built
    try:
        validate_ghm_config(cfg)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture not in META_ARCH_REGISTRY:
        known = [name for name, _ in META_ARCH_REGISTRY]
        raise UserError(
            f"MODEL.META_ARCHITECTURE {architecture} is not registered"
            f"{similar_names(architecture, known)}."
        )
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE not in CLIP_TYPES:
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; allowed are "
            f"{', '.join(CLIP_TYPES)}."
        )
    if cfg.TEST.AUG.ENABLED:
        raise UserError("TEST.AUG.ENABLED True is not supported: train_net.py tests plain images.")
    if cfg.TEST.PRECISE_BN.ENABLED and read_settings(cfg).ema_decay:
        raise UserError(
            f"TEST.PRECISE_BN.ENABLED and {key_of(cfg, 'ema_decay')} exclude each other: the batch "
            "statistics would be those of weights that are not the average."
        )


def _name_keys_without_effect(cfg: Config, given: Set[str]) -> None:
    if not isinstance(cfg, CfgNode):
        return
    for key in sorted(given):
        loss, _, name = key.rpartition(".")
        if name != "ENABLED" and re.fullmatch(r"MODEL\.GHM\.\w+\.(CLS|REG)", loss):
            part, kind = loss.split(".")[2:]
            if not cfg.MODEL.GHM[part][kind].ENABLED:
                logger.warning("%s has no effect: %s.ENABLED is False.", key, loss)


def _check_processes(cfg: Config, processes: Processes, eval_only: bool) -> None:
    settings, here = read_settings(cfg), processes.num_gpus
    if here < 1 or processes.num_machines < 1:
        raise UserError(
            "--num-gpus and --num-machines must be at least 1 "
            f"({pair(cfg, 'device', 'cpu')} uses no GPU)."
        )
    if not 0 <= processes.machine_rank < processes.num_machines:
        raise UserError(
            f"--machine-rank must lie in [0, {processes.num_machines - 1}] with --num-machines "
            f"{processes.num_machines}, got {processes.machine_rank}."
        )
    if processes.num_machines > 1 and processes.dist_url == "auto":
        raise UserError("--num-machines above 1 needs --dist-url tcp://HOST:PORT of machine 0.")
    world = processes.world_size
    torchrun = started_by_torchrun()  # has a backend for either device, and its own checks
    if torch.cuda.is_available():
        if here > torch.cuda.device_count() and not torchrun:
            raise UserError(
                f"--num-gpus {here} is more than the {torch.cuda.device_count()} "
                "GPUs of this machine."
            )
        if world > 1 and settings.device == "cpu" and not torchrun:
            raise UserError(
                f"{pair(cfg, 'device', 'cpu')} in several processes needs GPUs to be hidden: set "
                "CUDA_VISIBLE_DEVICES to an empty string."
            )
    shares = settings.reference_world_size or world
    if eval_only:
        return
    images = f"{key_of(cfg, 'images_per_batch')} {settings.images_per_batch}"
    if settings.images_per_batch % shares:
        raise UserError(f"{images} cannot be divided among {shares} processes.")
    steps, each = settings.accumulation_steps, settings.images_per_batch // shares
    if each % steps:
        raise UserError(
            f"{key_of(cfg, 'accumulation_steps')} {steps} does not divide the {each} images that a "
            f"process has of {images}."
        )


def _check_weights(cfg: Config, given: Set[str], eval_only: bool, resume: bool) -> None:
    settings, name = read_settings(cfg), key_of(cfg, "weights")
    if resume:
        if RunFolder(settings.output_dir).last_checkpoint() is not None:
            return  # the weights will not be used
        logger.warning(
            "--resume: %s holds no checkpoint; starting from %s %r",
            settings.output_dir,
            name,
            settings.weights,
        )
    if eval_only and name not in given and (what := _untrained(settings.weights)):
        raise UserError(
            f"--eval-only needs a trained detector, but {name} is {what}: give "
            f"{pair(cfg, 'weights', 'FILE')}, or --resume for the last checkpoint in "
            f"{key_of(cfg, 'output_dir')}."
        )
    if settings.weights:
        _check_weights_file(cfg, settings.weights)


def _untrained(weights: str) -> str:
    """Says why `weights` are not those of a trained detector; an empty string if they may be."""
    if not weights:
        return "empty"
    return "a pretrained backbone alone" if "ImageNetPretrained" in weights else ""


def _check_weights_file(cfg: Config, weights: str) -> None:
    path = weights.partition("?")[0]  # Detectron2 takes "?matching_heuristics=True"
    try:
        fetch(path)
    except UserError as error:
        base = os.path.basename(path)
        hint = next((x for stem, x in _WEIGHTS_HINTS.items() if base.startswith(stem)), None)
        name = key_of(cfg, "weights")
        way_out = f'give {name} another file, or "" to start from random weights'
        if hint:
            way_out = f"make it with {hint.format(path=path)}"
        raise UserError(f"{name} {error}: {way_out}.") from error
