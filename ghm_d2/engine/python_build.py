"""The parts of a training that a Python config describes, built one by one."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.evaluation import DatasetEvaluator
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from ghm_d2.data import workers
from ghm_d2.data.anchor_check import log_anchor_fit
from ghm_d2.data.augmentation import build_augmentations
from ghm_d2.data.keypoints import convert_incomplete
from ghm_d2.data.loader import build_train_loader_from_parts
from ghm_d2.data.readable import ReadableMapper
from ghm_d2.errors import building

from .clipping import clip_gradients
from .evaluation import AllThresholdsCOCOEvaluator
from .python_config import read_anchors, read_uses, target_of
from .settings import detections_per_image, read_settings
from .validation import add_ground_truth


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
    """The config's loader, over readable images; it can resume from any batch."""
    node = cfg.dataloader.train
    if target_of(node) is not build_detection_train_loader:
        return _build(node, "dataloader.train")  # the user's own loader is built as described
    parts = _parts(node, "dataloader.train", but=("sampler", "mapper"))
    parts["mapper"] = ReadableMapper(build_train_mapper(cfg), is_train=True)
    if isinstance(parts["dataset"], list):
        log_anchor_fit(read_anchors(cfg), parts["dataset"])

    def build_sampler() -> Any:
        if sampler := _build(node.get("sampler"), "dataloader.train.sampler"):
            return sampler
        listed = isinstance(parts["dataset"], list)
        return TrainingSampler(len(parts["dataset"])) if listed else None

    return _call(lambda: build_train_loader_from_parts(parts, build_sampler), "dataloader.train")


def build_train_mapper(cfg: DictConfig) -> Any:
    """The mapper; its augmentations may be strings too, as in a YAML config."""
    node = cfg.dataloader.train.mapper
    key, given = "dataloader.train.mapper", node.get("augmentations") or ()
    if not any(isinstance(item, str) for item in given):
        return _build(node, key)
    key, parts = f"{key}.augmentations", _parts(node, key, but=("augmentations",))
    built = [build_augmentations(x, key) if isinstance(x, str) else [_build(x, key)] for x in given]
    parts["augmentations"] = [augmentation for some in built for augmentation in some]
    return _call(lambda: target_of(node)(**parts), "dataloader.train.mapper")


def build_test_loader(cfg: DictConfig, name: str) -> Iterable[list[dict]]:
    """The config's loader for one data set, over images that can be read."""
    node = _for_data_set(cfg, name).test
    parts = _parts(node, "dataloader.test")
    if parts.get("mapper") is not None:
        if read_settings(cfg).validation_loss:
            parts["mapper"] = add_ground_truth(parts["mapper"], cfg)
        parts["mapper"] = ReadableMapper(parts["mapper"], is_train=False)
    loader = _call(lambda: target_of(node)(**parts), "dataloader.test")
    return workers.watch(loader) if isinstance(loader, DataLoader) else loader


def build_test_mapper(cfg: DictConfig) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """From a dataset dict to what the model takes in a test."""
    return _build(cfg.dataloader.test.mapper, "dataloader.test.mapper")


def build_evaluator(cfg: DictConfig, name: str, folder: str) -> DatasetEvaluator:
    """The config's evaluator for one data set; its files go to `folder`."""
    node = _for_data_set(cfg, name).evaluator
    if "output_dir" in node:
        node.output_dir = folder
    if target_of(node) is AllThresholdsCOCOEvaluator and "max_dets_per_image" not in node:
        node.max_dets_per_image = detections_per_image(cfg)[1]
    if read_uses(cfg).keypoints and OmegaConf.select(cfg, "model.roi_heads.keypoint_head"):
        convert_incomplete(MetadataCatalog.get(name))
    return _build(node, "dataloader.evaluator")


def _for_data_set(cfg: DictConfig, name: str) -> DictConfig:
    loader = copy.deepcopy(cfg.dataloader)
    loader._set_parent(cfg)  # its interpolations reach into the rest of the config
    loader.test.dataset.names = name
    return loader


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
    with building(key):
        return build()
