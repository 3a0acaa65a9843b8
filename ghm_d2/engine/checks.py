"""Checks before anything is launched, so that many processes report a mistake once.

Everything here raises `UserError` with one sentence; what only looks odd is logged.
"""

import argparse
import importlib.util
import logging
import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager

from ghm_d2.checkpoint.checkpointer import newest_checkpoint
from ghm_d2.checkpoint.files import fetch
from ghm_d2.config import validate_ghm_config
from ghm_d2.data.keypoints import check_keypoints
from ghm_d2.data.registration import log_more_objects_than
from ghm_d2.engine.clipping import CLIP_TYPES
from ghm_d2.engine.processes import started_by_torchrun
from ghm_d2.engine.trainer import EVALUATOR_TYPES
from ghm_d2.errors import UserError, similar_names

__all__ = ["check_all", "check_inference"]

logger = logging.getLogger(__name__)

# Weights that configs name and nobody publishes in Detectron2's format: how to make them.
_WEIGHTS_HINTS = {
    "resnext101_32x4d-a5af3160": "ghm-d2 convert-torchvision "
    "https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth {path}",
    "mobilenet_v2": "ghm-d2 fetch-backbone mobilenet_v2 {path}",
    "retinanet_ghm_": "ghm-d2 convert-mmdet URL {path}, with the URL that stands in the "
    "config file",
}


def check_all(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check config, processes, data sets and weights against what is there.

    Weights behind a URL are fetched into Detectron2's cache here, before any process is launched.

    Raises:
        UserError: one sentence with the way out.
    """
    _check_config(cfg)
    _check_processes(cfg, args)
    _check_datasets(cfg, args)
    _check_weights(cfg, args)


def check_inference(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check what a trained detector needs to run on images: config and weights, no data set.

    Raises:
        UserError: one sentence with the way out.
    """
    _check_config(cfg)
    if "MODEL.WEIGHTS" not in args.opts[::2] and (what := _untrained(cfg.MODEL.WEIGHTS)):
        raise UserError(
            f"a trained detector is needed, but MODEL.WEIGHTS is {what}: give MODEL.WEIGHTS FILE."
        )
    if cfg.MODEL.WEIGHTS:
        _check_weights_file(cfg.MODEL.WEIGHTS)


def _check_config(cfg: CfgNode) -> None:
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


def _check_processes(cfg: CfgNode, args: argparse.Namespace) -> None:
    if args.num_gpus < 1 or args.num_machines < 1:
        raise UserError(
            "--num-gpus and --num-machines must be at least 1 (MODEL.DEVICE cpu uses no GPU)."
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank {args.machine_rank} is not in 0 .. {args.num_machines - 1}, "
            f"as --num-machines {args.num_machines} wants."
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("--num-machines above 1 needs --dist-url tcp://HOST:PORT of machine 0.")
    world = args.num_gpus * args.num_machines
    torchrun = started_by_torchrun()  # has a backend for either device, and its own checks
    if torch.cuda.is_available():
        if args.num_gpus > torch.cuda.device_count() and not torchrun:
            raise UserError(
                f"--num-gpus {args.num_gpus} is more than the {torch.cuda.device_count()} "
                "GPUs of this machine."
            )
        if world > 1 and cfg.MODEL.DEVICE == "cpu" and not torchrun:
            raise UserError(
                "MODEL.DEVICE cpu in several processes needs GPUs to be hidden: set "
                "CUDA_VISIBLE_DEVICES to an empty string."
            )
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % (cfg.SOLVER.REFERENCE_WORLD_SIZE or world):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} cannot be divided among "
            f"{cfg.SOLVER.REFERENCE_WORLD_SIZE or world} processes."
        )


def _check_datasets(cfg: CfgNode, args: argparse.Namespace) -> None:
    train = () if args.eval_only else tuple(cfg.DATASETS.TRAIN)
    test = tuple(cfg.DATASETS.TEST)
    if args.eval_only and not test:
        raise UserError(
            "--eval-only has nothing to evaluate on, DATASETS.TEST is empty: give --dataset or "
            "DATASETS.TEST \"('NAME',)\"."
        )
    if not args.eval_only and not train:
        raise UserError("DATASETS.TRAIN is empty: give --dataset or DATASETS.TRAIN \"('NAME',)\".")
    for name in dict.fromkeys(train + test):
        _check_dataset_files(name)
        _check_class_count(cfg, name)
    for name in train:
        _check_masks(cfg, name)
    if cfg.MODEL.KEYPOINT_ON:
        _check_keypoints(cfg, train, test)
    for name in test:
        _check_evaluator(name)
        log_more_objects_than(cfg.TEST.DETECTIONS_PER_IMAGE, name)
    _check_class_names(dict.fromkeys(train + test))
    if not test:
        logger.info("DATASETS.TEST is empty: no evaluation will run")


def _check_dataset_files(name: str) -> None:
    if name not in DatasetCatalog:
        raise UserError(
            f"there is no data set {name}{similar_names(name, list(DatasetCatalog))}: correct the "
            f"name, or register one with --dataset {name}=annotations.json,image_dir."
        )
    if name.startswith("ghm_synthetic_"):
        DatasetCatalog.get(name)  # is generated on first use: once, here
    metadata = MetadataCatalog.get(name)
    for field in ("json_file", "image_root", "dirname"):  # COCO and LVIS; the last one Pascal VOC
        path = metadata.get(field)
        if path is not None and not PathManager.exists(path):
            raise UserError(
                f"the data set {name} is not complete, {path} does not exist: put it there, set "
                "DETECTRON2_DATASETS to the folder that holds it, or train on your own data with "
                "--dataset."
            )


def _check_masks(cfg: CfgNode, name: str) -> None:
    without = MetadataCatalog.get(name).get("without_mask", 0)
    if cfg.MODEL.MASK_ON and without:
        raise UserError(
            f"MODEL.MASK_ON is True, but {without} objects of the data set {name} have no "
            "segmentation: annotate them, or give MODEL.MASK_ON False to train on boxes alone."
        )


def _check_keypoints(cfg: CfgNode, train: Sequence[str], test: Sequence[str]) -> None:
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    for name in dict.fromkeys((*train, *test)):
        mirrored = name in train and cfg.INPUT.RANDOM_FLIP == "horizontal"
        check_keypoints(name, MetadataCatalog.get(name), number, mirrored=mirrored)
    compared = [n for n in test if MetadataCatalog.get(n).get("num_keypoints", 0) is not None]
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17  # COCO's persons
    if compared and sigmas != number:
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS must hold a tolerance for each of the {number} keypoints, "
            f"of which it has {len(cfg.TEST.KEYPOINT_OKS_SIGMAS)}: give for example "
            f'TEST.KEYPOINT_OKS_SIGMAS "[{", ".join(["0.05"] * number)}]".'
        )


def _class_count_key(cfg: CfgNode) -> str | None:
    """The key that counts the classes of the final detections, or None where nothing does."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if "RetinaNet" in architecture:
        return "MODEL.RETINANET.NUM_CLASSES"
    return "MODEL.ROI_HEADS.NUM_CLASSES" if "RCNN" in architecture else None


def _check_class_count(cfg: CfgNode, name: str) -> None:
    key, classes = _class_count_key(cfg), MetadataCatalog.get(name).get("thing_classes")
    if key is None or classes is None:  # some loaders know the classes only after loading
        return
    node = cfg
    for part in key.split("."):
        node = node[part]
    if node != len(classes):
        raise UserError(
            f"the data set {name} has {len(classes)} classes but {key} is {node}: "
            f"give {key} {len(classes)}."
        )


def _check_class_names(names: Sequence[str]) -> None:
    known = {n: list(MetadataCatalog.get(n).get("thing_classes") or ()) for n in names}
    known = {name: classes for name, classes in known.items() if classes}
    first = next(iter(known), None)
    for name, classes in known.items():
        if classes != known[first]:
            raise UserError(
                f"the data sets {first} and {name} have different classes, or another order of "
                "them: DATASETS.TRAIN and DATASETS.TEST must agree."
            )


def _check_evaluator(name: str) -> None:
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind not in EVALUATOR_TYPES:
        raise UserError(
            f"the data set {name} cannot be evaluated: its evaluator_type is {kind!r}, not one of "
            f"{', '.join(EVALUATOR_TYPES)}."
        )
    if kind == "lvis" and importlib.util.find_spec("lvis") is None:
        raise UserError(f"evaluating {name} needs the package lvis: run pip install lvis.")


def _check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    weights = cfg.MODEL.WEIGHTS
    if args.resume:
        if newest_checkpoint(cfg.OUTPUT_DIR)[0] is not None:
            return  # MODEL.WEIGHTS will not be used
        logger.warning(
            "--resume: %s holds no checkpoint; starting from MODEL.WEIGHTS %r",
            cfg.OUTPUT_DIR,
            weights,
        )
    if args.eval_only and "MODEL.WEIGHTS" not in args.opts[::2] and (what := _untrained(weights)):
        raise UserError(
            f"--eval-only needs a trained detector, but MODEL.WEIGHTS is {what}: give "
            "MODEL.WEIGHTS FILE, or --resume for the last checkpoint in OUTPUT_DIR."
        )
    if weights:
        _check_weights_file(weights)


def _untrained(weights: str) -> str:
    """What weights are that no detector was trained to, or an empty string."""
    if not weights:
        return "empty"
    return "a pretrained backbone alone" if "ImageNetPretrained" in weights else ""


def _check_weights_file(weights: str) -> None:
    path = weights.partition("?")[0]  # Detectron2 takes "?matching_heuristics=True"
    try:
        fetch(path)
    except UserError as error:
        base = os.path.basename(path)
        hint = next((x for stem, x in _WEIGHTS_HINTS.items() if base.startswith(stem)), None)
        way_out = 'give MODEL.WEIGHTS another file, or "" to start from random weights'
        if hint:
            way_out = f"make it with {hint.format(path=path)}"
        raise UserError(f"MODEL.WEIGHTS {error}: {way_out}.") from error
