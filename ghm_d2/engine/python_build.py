"""The parts of a training that a Python config describes, built one by one."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader

from ghm_d2.data import workers
from ghm_d2.data.augmentation import build_augmentations
from ghm_d2.data.loader import build_train_loader_from_parts
from ghm_d2.data.readable import ReadableMapper
from ghm_d2.errors import UserError

from .clipping import clip_gradients

__all__ = [
    "build_evaluator",
    "build_lr_scheduler",
    "build_model",
    "build_optimizer",
    "build_test_loader",
    "build_test_mapper",
    "build_train_loader",
]


def build_model(cfg: DictConfig) -> nn.Module:
    """The model, on `train.device`."""
    return _build(cfg.model, "model").to(cfg.train.device)


def build_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, clipping as `train.clip_gradients` says."""
    node = copy.deepcopy(cfg.optimizer)
    node.params.model = model
    optimizer = _build(node, "optimizer")
    if clip := cfg.train.get("clip_gradients"):
        clip_gradients(optimizer, clip.max_norm, clip.norm_type)
    return optimizer


def build_lr_scheduler(cfg: DictConfig) -> Any:
    """The multiplier of the learning rate, which Detectron2's hook turns into a scheduler."""
    return _build(cfg.lr_multiplier, "lr_multiplier")


def build_train_loader(cfg: DictConfig) -> Iterable[list[dict]]:
    """The config's loader, over images that can be read, and able to go on from any batch."""
    node = cfg.dataloader.train
    if _target(node) is not build_detection_train_loader:
        return _build(node, "dataloader.train")  # one of the user's own, as it is described
    parts = _parts(node, "dataloader.train", but=("sampler", "mapper"))
    parts["mapper"] = ReadableMapper(_train_mapper(node.mapper), is_train=True)

    def build_sampler() -> Any:
        if sampler := _build(node.get("sampler"), "dataloader.train.sampler"):
            return sampler
        listed = isinstance(parts["dataset"], list)
        return TrainingSampler(len(parts["dataset"])) if listed else None

    return build_train_loader_from_parts(parts, build_sampler)


def _train_mapper(node: DictConfig) -> Any:
    """The mapper; its augmentations may be texts too, as in a YAML config."""
    key, given = "dataloader.train.mapper", node.get("augmentations") or ()
    if not any(isinstance(item, str) for item in given):
        return _build(node, key)
    key, parts = f"{key}.augmentations", _parts(node, key, but=("augmentations",))
    built = [build_augmentations(x, key) if isinstance(x, str) else [_build(x, key)] for x in given]
    parts["augmentations"] = [augmentation for some in built for augmentation in some]
    return _call(lambda: _target(node)(**parts), "dataloader.train.mapper")


def build_test_loader(cfg: DictConfig, name: str) -> Iterable[list[dict]]:
    """The config's loader for one data set, over images that can be read."""
    node = _for_data_set(cfg, name).test
    parts = _parts(node, "dataloader.test")
    if parts.get("mapper") is not None:
        parts["mapper"] = ReadableMapper(parts["mapper"], is_train=False)
    loader = _call(lambda: _target(node)(**parts), "dataloader.test")
    return workers.watch(loader) if isinstance(loader, DataLoader) else loader


def build_test_mapper(cfg: DictConfig) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """From a dataset dict to what the model takes in a test."""
    return _build(cfg.dataloader.test.mapper, "dataloader.test.mapper")


def build_evaluator(cfg: DictConfig, name: str, folder: str) -> DatasetEvaluator:
    """The config's evaluator for one data set; its files go to `folder`."""
    node = _for_data_set(cfg, name).evaluator
    if "output_dir" in node:
        node.output_dir = folder
    return _build(node, "dataloader.evaluator")


def _for_data_set(cfg: DictConfig, name: str) -> DictConfig:
    loader = copy.deepcopy(cfg.dataloader)
    loader._set_parent(cfg)  # its interpolations reach into the rest of the config
    loader.test.dataset.names = name
    return loader


def _target(node: DictConfig) -> Any:
    target = node["_target_"]
    return locate(target) if isinstance(target, str) else target


def _parts(node: DictConfig, key: str, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments of a call, each built."""
    names = [name for name in node if name != "_target_" and name not in but]
    return {name: _build(node[name], f"{key}.{name}") for name in names}


def _build(node: Any, key: str) -> Any:
    return _call(lambda: instantiate(node), key)


def _call(build: Callable[[], Any], key: str) -> Any:
    """
    Raises:
        UserError: a call that a config describes was refused, such as for an argument that does not
            exist or fit.
    """
    try:
        return build()
    except UserError:
        raise
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        message = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{key} cannot be built: {message}.") from error
