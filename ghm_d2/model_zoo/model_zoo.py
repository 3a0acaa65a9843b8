"""The functions of Detectron2's `model_zoo`, for this project's models."""

from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from ghm_d2 import data, modeling  # noqa: F401  (they register what configs name)
from ghm_d2.checkpoint import RestrictedCheckpointer
from ghm_d2.config import add_ghm_config
from ghm_d2.config_files import config_names, find_config
from ghm_d2.errors import similar_names

from .zoo import (
    PACKAGED_INDEX,
    ZOO_VARIABLE,
    ZooError,
    config_file,
    fetch,
    newest,
    read_index,
    read_zoo,
    weights_file,
    zoo_location,
)


def get_config_file(config_path: str) -> str:
    """Returns the path to a config file of this project, or of a model in the zoo.

    Args:
        config_path: name relative to `configs/`, for example "ghm_retinanet_R_101.yaml".

    Raises:
        ZooError: neither `configs/` nor the zoo has it.
    """
    if file := find_config(config_path):
        return file
    if found := _in_zoo(config_path):
        return _trained_config(*found)
    raise ZooError(f"{config_path} is not available in the model zoo{_similar(config_path)}.")


def get_checkpoint_url(config_path: str) -> str:
    """Returns the path or URL of the weights trained with a config: the newest in `GHM_D2_ZOO`.

    A file in a folder has then been checked against its recorded SHA-256; a URL is checked when
    Detectron2's `PathManager` opens it, as `DetectionCheckpointer` does.

    Args:
        config_path: see :func:`get_config_file`.

    Raises:
        ZooError: there are no such weights, or the file is not the recorded one.
    """
    if found := _in_zoo(config_path):
        zoo, entry = found
        return fetch(zoo, weights_file(entry), entry["sha256"])
    raise ZooError(_why_not_available(config_path))


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """Returns the config of a model.

    Args:
        config_path: see :func:`get_config_file`.
        trained: True: the config that the newest model of this name in the zoo was trained with,
            the changes of its command line included; `MODEL.WEIGHTS` are the trained ones.
            False: the config file, whose `MODEL.WEIGHTS` a training starts from.

    Raises:
        ZooError: see :func:`get_config_file` and :func:`get_checkpoint_url`.
    """
    cfg = get_cfg()
    add_ghm_config(cfg)
    if not trained:
        cfg.merge_from_file(get_config_file(config_path), allow_unsafe=False)
        return cfg
    url = get_checkpoint_url(config_path)
    zoo, entry = _in_zoo(config_path)
    if entry.get("python"):
        raise ZooError(
            f"{config_path} was trained with a Python config, which can call anything and is not "
            "run here: build the model with Detectron2's LazyConfig, from get_config_file, and "
            "load the weights from get_checkpoint_url."
        )
    cfg.merge_from_file(_trained_config(zoo, entry), allow_unsafe=False)
    cfg.MODEL.WEIGHTS = url
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Returns a model, in training mode.

    Args:
        config_path: see :func:`get_config_file`.
        trained: see :func:`get_config`.
        device: replaces the device of the config; None: the config's, or "cpu" without a GPU.

    Raises:
        ZooError: see :func:`get_config`.
    """
    cfg = get_config(config_path, trained)
    if device or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = device or "cpu"
    model = build_model(cfg)
    RestrictedCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def _in_zoo(config_path: str) -> tuple[str, dict[str, Any]] | None:
    zoo = zoo_location()
    entry = newest(read_zoo(zoo)["models"], config_path.removesuffix(".yaml")) if zoo else None
    return (zoo, entry) if entry else None


def _trained_config(zoo: str, entry: dict[str, Any]) -> str:
    return PathManager.get_local_path(fetch(zoo, config_file(entry), entry["config_sha256"]))


def _why_not_available(config_path: str) -> str:
    packaged, name = read_index(PACKAGED_INDEX), config_path.removesuffix(".yaml")
    for model in packaged["published"]:
        if model["name"] == name:
            return (
                f"the weights of {config_path} are published by {model['publisher']} in another "
                f"format: download {model['url']}, convert it with ghm-d2 convert-mmdet "
                "CHECKPOINT OUTPUT, and give MODEL.WEIGHTS OUTPUT."
            )
    if newest(packaged["models"], name):
        return (
            f"the weights of {config_path} are not in the zoo: set {ZOO_VARIABLE} to the folder or "
            "URL of one that holds them."
        )
    if find_config(config_path):
        return (
            f"trained weights of {config_path} are not available: train with it, put the result "
            f"into a zoo with ghm-d2 export-zoo --run OUTPUT_DIR --zoo FOLDER, and set "
            f"{ZOO_VARIABLE} to that folder."
        )
    return f"trained weights of {config_path} are not available{_similar(config_path)}."


def _similar(config_path: str) -> str:
    names = config_names()
    if zoo := zoo_location():
        names += [f"{entry['name']}.yaml" for entry in read_zoo(zoo)["models"]]
    return similar_names(config_path, names)
