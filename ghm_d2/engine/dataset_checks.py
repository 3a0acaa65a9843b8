"""Checks of the data sets of a run against its config, before anything is launched."""

import importlib.util
import logging
from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf

from ghm_d2.data.keypoints import KeypointKeys, check_keypoints
from ghm_d2.data.registration import log_more_objects_than
from ghm_d2.errors import UserError, similar_names

from .evaluation import EVALUATOR_TYPES
from .python_config import random_flip, read_uses
from .settings import (
    Config,
    class_counts,
    detections_per_image,
    key_of,
    pair,
    read_settings,
    typed,
    value_of,
)

logger = logging.getLogger(__name__)

_PYTHON_KEYS = KeypointKeys(
    "dataloader.train.mapper.use_keypoint is True",
    "give model.roi_heads.keypoint_in_features=null",
    "model.roi_heads.keypoint_head.num_keypoints",
    "=",
    "take RandomFlip out of dataloader.train.mapper.augmentations",
)


def check_datasets(cfg: Config, eval_only: bool) -> None:
    """Check that the data sets exist and fit the model.

    Args:
        cfg: of the run.
        eval_only: whether to skip the training sets.

    Raises:
        UserError: one sentence with the way out.
    """
    settings = read_settings(cfg)
    train = () if eval_only else settings.train
    test = settings.test
    names = "NAME" if not isinstance(cfg, CfgNode) else "\"('NAME',)\""
    for split, needed in (("test", eval_only), ("train", not eval_only)):
        if needed and not getattr(settings, split):
            nothing = "--eval-only has nothing to evaluate on, " if eval_only else ""
            raise UserError(
                f"{nothing}{key_of(cfg, split)} is empty: give --dataset or "
                f"{pair(cfg, split, names)}."
            )
    for name in dict.fromkeys(train + test):
        _check_dataset_files(name)
        _check_class_count(cfg, name)
    if train and not isinstance(cfg, CfgNode):
        _check_heads(cfg)
    for name in train:
        _check_masks(cfg, name)
    _check_keypoints(cfg, train, test)
    key, limit = detections_per_image(cfg)
    for name in test:
        _check_evaluator(cfg, name)
        if limit is not None:
            log_more_objects_than(limit, name, typed(cfg, key, ""))
    _check_class_names(cfg, dict.fromkeys(train + test))
    if not test:
        logger.info("%s is empty: no evaluation will run", key_of(cfg, "test"))


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


def _has_head(cfg: DictConfig, part: str) -> bool:
    """Whether a Python config has a mask or keypoint head that Detectron2 uses."""
    heads = value_of(cfg, "model.roi_heads") or {}
    return bool(heads.get(f"{part}_head")) and heads.get(f"{part}_in_features", "") is not None


def _check_heads(cfg: DictConfig) -> None:
    """Checks that the mapper reads what the heads are trained on."""
    uses = read_uses(cfg)  # of everything where the mapper is not Detectron2's
    for part, option, is_read in (
        ("mask", "use_instance_mask", uses.masks),
        ("keypoint", "use_keypoint", uses.keypoints),
    ):
        if _has_head(cfg, part) and not is_read:
            raise UserError(
                f"model.roi_heads.{part}_head is trained on annotations that the mapper leaves "
                f"out: give dataloader.train.mapper.{option}=True, or "
                f"model.roi_heads.{part}_in_features=null to train on boxes alone."
            )


def _check_masks(cfg: Config, name: str) -> None:
    without = MetadataCatalog.get(name).get("without_mask", 0)
    if isinstance(cfg, CfgNode):
        used, key, way_out = cfg.MODEL.MASK_ON, "MODEL.MASK_ON", "MODEL.MASK_ON False"
    else:
        used = read_uses(cfg).mask_head and _has_head(cfg, "mask")
        key = "dataloader.train.mapper.use_instance_mask"
        way_out = "model.roi_heads.mask_in_features=null"
    if used and without:
        raise UserError(
            f"{key} is True, but {without} objects of the data set {name} have no "
            f"segmentation: annotate them, or give {way_out} to train on boxes alone."
        )


def _check_keypoints(cfg: Config, train: Sequence[str], test: Sequence[str]) -> None:
    python = not isinstance(cfg, CfgNode)
    if python:
        number = OmegaConf.select(cfg, _PYTHON_KEYS.number)
        sigmas = OmegaConf.select(cfg, "dataloader.evaluator.kpt_oks_sigmas") or ()
        sigmas_key = "dataloader.evaluator.kpt_oks_sigmas"
        used = read_uses(cfg).keypoints and number is not None and _has_head(cfg, "keypoint")
        flipped = random_flip(cfg)
    else:
        number, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
        sigmas_key = "TEST.KEYPOINT_OKS_SIGMAS"
        used, flipped = cfg.MODEL.KEYPOINT_ON, cfg.INPUT.RANDOM_FLIP == "horizontal"
    if not used:
        return
    keys = _PYTHON_KEYS if python else KeypointKeys()
    for name in dict.fromkeys((*train, *test)):
        mirrored = name in train and flipped
        check_keypoints(name, MetadataCatalog.get(name), number, mirrored=mirrored, keys=keys)
    compared = [n for n in test if MetadataCatalog.get(n).get("num_keypoints", 0) is not None]
    if compared and (len(sigmas) or 17) != number:  # COCO's persons
        example = f'"[{", ".join(["0.05"] * number)}]"'
        raise UserError(
            f"{sigmas_key} must hold a tolerance for each of the {number} keypoints, of which it "
            f"has {len(sigmas)}: give for example {typed(cfg, sigmas_key, example)}."
        )


def _class_count_key(cfg: Config) -> str | None:
    """The key that counts the classes of the final detections, or None where nothing does."""
    known = class_counts(cfg)
    if not isinstance(cfg, CfgNode):
        return next(iter(known), None)
    architecture = cfg.MODEL.META_ARCHITECTURE
    part = "RETINANET" if "RetinaNet" in architecture else "ROI_HEADS"
    counted = "RetinaNet" in architecture or "RCNN" in architecture
    return f"MODEL.{part}.NUM_CLASSES" if counted else None


def _check_class_count(cfg: Config, name: str) -> None:
    full, classes = _class_count_key(cfg), MetadataCatalog.get(name).get("thing_classes")
    if full is None or classes is None:  # some loaders know the classes only after loading
        return
    count = class_counts(cfg)[full]
    if count != len(classes):
        raise UserError(
            f"the data set {name} has {len(classes)} classes but {full} is {count}: "
            f"give {typed(cfg, full, len(classes))}."
        )


def _check_class_names(cfg: Config, names: Iterable[str]) -> None:
    known = {n: list(MetadataCatalog.get(n).get("thing_classes") or ()) for n in names}
    known = {name: classes for name, classes in known.items() if classes}
    first = next(iter(known), None)
    for name, classes in known.items():
        if classes != known[first]:
            raise UserError(
                f"the data sets {first} and {name} have different classes, or another order of "
                f"them: {key_of(cfg, 'train')} and {key_of(cfg, 'test')} must agree."
            )


def _check_evaluator(cfg: Config, name: str) -> None:
    if not isinstance(cfg, CfgNode) and value_of(cfg, "dataloader.evaluator") is None:
        raise UserError(
            f"dataloader.evaluator is null, so {name} cannot be evaluated: describe one, or give "
            f"{pair(cfg, 'test', '[]')}."
        )
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind not in EVALUATOR_TYPES:
        raise UserError(
            f"the data set {name} cannot be evaluated: its evaluator_type is {kind!r}, not one of "
            f"{', '.join(EVALUATOR_TYPES)}."
        )
    if kind == "lvis" and importlib.util.find_spec("lvis") is None:
        raise UserError(f"evaluating {name} needs the package lvis: run pip install lvis.")
