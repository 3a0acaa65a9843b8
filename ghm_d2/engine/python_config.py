"""Python configs: loading, KEY=VALUE overrides, and the parts that they describe."""

import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import LazyConfig
from detectron2.data import DatasetMapper
from detectron2.data.transforms import RandomFlip
from detectron2.utils.registry import locate
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ghm_d2.data.annotations import Uses
from ghm_d2.errors import UserError, similar_names

__all__ = ["load_config", "random_flip", "read_uses", "target_of"]

_NODES = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


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
    except Exception as error:  # it is a program: anything may happen
        raise UserError(f"{file} cannot be run ({_where(error)}{_describe(error)}).") from error
    if missing := [name for name in _NODES if name not in cfg]:
        raise UserError(
            f"{file} lacks {', '.join(missing)}: a Python config of a training has "
            f"{', '.join(_NODES)}."
        )
    for override in overrides:
        _override(cfg, override)
    return cfg


def read_uses(cfg: DictConfig) -> Uses:
    """What Detectron2's mapper, or everything that another one, may take of annotations."""
    mapper = _dataset_mapper(cfg)
    if mapper is None:
        return Uses()
    masks = mapper.get("instance_mask_format", "polygon") if mapper.get("use_instance_mask") else ""
    return Uses(masks, bool(mapper.get("use_keypoint")))


def random_flip(cfg: DictConfig) -> bool:
    """Whether Detectron2's mapper mirrors training images from left to right at random."""
    flips = [
        node
        for node in (_dataset_mapper(cfg) or {}).get("augmentations", ())
        if isinstance(node, DictConfig) and target_of(node) is RandomFlip
    ]
    return any(flip.get("horizontal", True) and flip.get("prob", 0.5) for flip in flips)


def _dataset_mapper(cfg: DictConfig) -> DictConfig | None:
    """The training's mapper, where it is Detectron2's."""
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper")
    known = isinstance(mapper, DictConfig) and "_target_" in mapper
    return mapper if known and target_of(mapper) is DatasetMapper else None


def target_of(node: DictConfig) -> Any:
    """What a call in a Python config calls."""
    target = node["_target_"]
    return locate(target) if isinstance(target, str) else target


def _where(error: Exception) -> str:
    """ "FILE, line N: " of the last line that ran in a config; LazyConfig compiles them by name."""
    frames = [
        x for x in traceback.extract_tb(error.__traceback__) if "detectron2" not in x.filename
    ]
    outside = [x for x in frames[1:] if x.filename.endswith(".py")]
    return f"{outside[-1].filename}, line {outside[-1].lineno}: " if outside else ""


def _describe(error: Exception) -> str:
    """Type and message on one line, and those of the error behind it."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{text}; {_describe(error.__cause__)}" if error.__cause__ else text


def _override(cfg: DictConfig, text: str) -> None:
    key, separator, _ = text.partition("=")
    if not separator or not key:
        raise UserError(f"{text} is not of the form KEY=VALUE, as in train.max_iter=1000.")
    before = _known(cfg, key)
    try:
        LazyConfig.apply_overrides(cfg, [text])
    except (HydraException, OmegaConfBaseException, KeyError, NotImplementedError) as error:
        raise UserError(
            f"{text} cannot be understood ({_describe(error)}); quote what the shell or YAML would "
            "take for something else."
        ) from error
    after = OmegaConf.select(cfg, key)
    if isinstance(before, int | float) and after is not None and not _same_kind(before, after):
        raise UserError(
            f"{key} is of type {type(before).__name__}, as in {before!r}: "
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
