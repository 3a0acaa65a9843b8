"""Python configs: loading, KEY=VALUE overrides, and the parts that they describe."""

import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode, LazyConfig
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.utils.registry import locate
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ghm_d2.data.anchor_check import AnchorSettings
from ghm_d2.data.anchors import Anchors, InputSize
from ghm_d2.data.annotations import Uses
from ghm_d2.errors import UserError, described, similar_names

from .settings import Config

NODES = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
_LOADERS = {"train": build_detection_train_loader, "test": build_detection_test_loader}


def load_config(file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Runs a Python config and changes what the overrides name.

    Args:
        file: a .py file; it is executed, so it can do anything that its author wants.
        overrides: "key=value" each. A key must exist, or be a new argument of a call.

    Returns:
        A config with `model`, `dataloader`, `optimizer`, `lr_multiplier` and `train`.

    Raises:
        UserError: the file or an override is wrong.
    """
    try:
        cfg = LazyConfig.load(file)
    except (Exception, SystemExit) as error:  # it is a program: anything may happen
        raise UserError(f"{file} cannot be run ({_where(error)}{described(error)}).") from error
    if missing := [name for name in NODES if name not in cfg]:
        raise UserError(
            f"{file} lacks {', '.join(missing)}: a Python config of a training has "
            f"{', '.join(NODES)}."
        )
    for override in overrides:
        _override(cfg, override)
    _check_parts(cfg, file)
    return cfg


def _check_parts(cfg: DictConfig, file: str) -> None:
    """
    Raises:
        UserError: a part that every training needs is null, or a value refers to one that does not
            exist.
    """
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{file} cannot be read ({described(error)}).") from error
    needed = [*NODES, "dataloader.train", "dataloader.test"]
    for split, build in _LOADERS.items():
        if target_of(OmegaConf.select(cfg, f"dataloader.{split}")) is build:
            needed += [f"dataloader.{split}.{part}" for part in ("dataset", "mapper")]
    for key in needed:
        if not isinstance(OmegaConf.select(cfg, key), DictConfig):
            raise UserError(f"{key} must hold keys of its own, got {OmegaConf.select(cfg, key)!r}.")


def read_uses(cfg: Config) -> Uses:
    """What the mapper of a config of either kind reads of annotations.

    In a Python config with a mapper other than Detectron2's that is everything.
    """
    if isinstance(cfg, CfgNode):
        return Uses.of(cfg)
    mapper = _dataset_mapper(cfg)
    if mapper is None:
        return Uses()
    masks = mapper.get("instance_mask_format", "polygon") if mapper.get("use_instance_mask") else ""
    return Uses(masks, bool(mapper.get("use_keypoint")))


def read_anchors(cfg: Config) -> AnchorSettings | None:
    """Anchor and resize settings of a config of either kind.

    None for a Python config, unless both are Detectron2's own classes; see also
    :meth:`~ghm_d2.data.anchor_check.AnchorSettings.of`.
    """
    if isinstance(cfg, CfgNode):
        return AnchorSettings.of(cfg)
    keys = ("model.anchor_generator", "model.proposal_generator.anchor_generator")
    key = next(
        (k for k in keys if target_of(OmegaConf.select(cfg, k)) is DefaultAnchorGenerator), ""
    )
    train, test = (resize_key(cfg, split) for split in ("train", "test"))
    if not key or not train:
        return None
    node, resize = OmegaConf.select(cfg, key), OmegaConf.select(cfg, train)
    shortest, is_range = resize.short_edge_length, resize.get("sample_style", "range") == "range"
    try:
        anchors = Anchors.of_levels(node.sizes, node.aspect_ratios, node.strides)
        shortest = [shortest] * 2 if isinstance(shortest, int) else list(shortest)
        size = InputSize.drawn_from(shortest, resize.get("max_size", sys.maxsize), is_range)
    except (OmegaConfBaseException, IndexError, TypeError, ValueError):
        return None  # the calls say what is wrong when they are made
    words = {"sizes": f'"{key}.sizes={{}}"', "ratios": f'"{key}.aspect_ratios={{}}"'}
    words["train"] = f'"{train}.short_edge_length={{}}" {train}.max_size={{}}'
    words["test"] = f"{test}.short_edge_length={{}} {test}.max_size={{}}" if test else ""
    return anchors and AnchorSettings(anchors, size, words, is_range)


def resize_key(cfg: DictConfig, split: str) -> str:
    """The key of the call that resizes images by their shorter side; "" without one."""
    key = f"dataloader.{split}.mapper.augmentations"
    steps = OmegaConf.select(cfg, key) or ()
    return next(
        (f"{key}.{i}" for i, step in enumerate(steps) if target_of(step) is ResizeShortestEdge), ""
    )


def random_flip(cfg: DictConfig) -> bool:
    """Whether Detectron2's mapper mirrors training images from left to right at random."""
    mapper = _dataset_mapper(cfg)
    steps = (() if mapper is None else mapper.get("augmentations")) or ()
    flips = [step for step in steps if target_of(step) is RandomFlip]
    return any(flip.get("horizontal", True) and flip.get("prob", 0.5) for flip in flips)


def _dataset_mapper(cfg: DictConfig) -> DictConfig | None:
    """The training's mapper, where it is Detectron2's."""
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper")
    return mapper if target_of(mapper) is DatasetMapper else None


def target_of(node: Any) -> Any:
    """What a call that a config describes calls; None where that does not exist."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    try:
        return locate(target) if isinstance(target, str) else target
    except ImportError:  # building the part reports it as a UserError
        return None


def _where(error: BaseException) -> str:
    """ "FILE, line N: " of the last line that ran in a config; LazyConfig compiles them by name."""
    frames = [
        x for x in traceback.extract_tb(error.__traceback__) if "detectron2" not in x.filename
    ]
    outside = [x for x in frames[1:] if x.filename.endswith(".py")]
    return f"{outside[-1].filename}, line {outside[-1].lineno}: " if outside else ""


def _override(cfg: DictConfig, text: str) -> None:
    key, separator, _ = text.partition("=")
    if not separator or not key:
        raise UserError(f"{text} is not of the form KEY=VALUE, as in train.max_iter=1000.")
    before = _known(cfg, key)
    try:
        LazyConfig.apply_overrides(cfg, [text])
    except (HydraException, OmegaConfBaseException, KeyError, NotImplementedError) as error:
        raise UserError(
            f"{text} cannot be understood ({described(error)}); quote what the shell or YAML would "
            "take for something else."
        ) from error
    after = OmegaConf.select(cfg, key)
    if isinstance(before, int | float) and after is not None and not _same_kind(before, after):
        raise UserError(
            f"{key} is of type {type(before).__name__}, as in {before!r}: "
            f"{text.partition('=')[2]} does not fit."
        )
    if isinstance(before, DictConfig) and not isinstance(after, DictConfig | None):
        raise UserError(
            f"{key} holds keys of its own, such as {key}.{next(iter(before), 'KEY')}: "
            f"{text.partition('=')[2]} does not fit."
        )


def _known(cfg: DictConfig, key: str) -> Any:
    """The value of a key before it is changed.

    Raises:
        UserError: there is no such key. LazyConfig would add it, and nobody would read it.
    """
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    found = False
    if isinstance(node, DictConfig):
        found = last in node or "_target_" in node  # an argument that the config leaves out
    elif isinstance(node, ListConfig):
        found = last.isdigit() and int(last) < len(node)
    if not found:
        raise UserError(f"unknown key {key}{_similar(cfg, key)}.")
    return OmegaConf.select(cfg, key)


def _same_kind(before: bool | int | float, after: Any) -> bool:
    if isinstance(before, bool) or isinstance(after, bool):
        return type(before) is type(after)
    return isinstance(after, int | float)


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in node:
        yield f"{prefix}{key}"
        if isinstance(value := node._get_node(key), DictConfig) and not value._is_none():
            yield from _keys(value, f"{prefix}{key}.")


def _similar(cfg: DictConfig, key: str) -> str:
    return similar_names(key, _keys(cfg), separator=".")
