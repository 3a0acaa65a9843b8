"""A batch that stopped a training, saved with all that its forward pass read."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import (
    BitMasks,
    Boxes,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
)
from omegaconf import OmegaConf
from torch import Tensor, nn

from ghm_d2 import modeling  # noqa: F401  (it registers what configs name)
from ghm_d2.checkpoint import load_file
from ghm_d2.checkpoint.files import write_checkpoint
from ghm_d2.config import add_ghm_config
from ghm_d2.errors import UserError, shown
from ghm_d2.files import file_to_blame
from ghm_d2.run_parts import parse_settings

from . import python_build
from .forward_state import ForwardState
from .settings import Config, change

logger = logging.getLogger(__name__)

_FORMAT = "ghm_d2 replay 1"
_PRECISIONS = (None, "float16", "bfloat16")
_TENSOR_TYPES = {cls.__name__: cls for cls in (Boxes, RotatedBoxes, BitMasks, Keypoints)}


@dataclass(frozen=True)
class Replay:
    """What :func:`save_replay` saved.

    Attributes:
        config: of the training, as text.
        python: whether `config` is a Python config, which names the classes to build.
        batch: the inputs of the model.
        weights: state of the model before the step.
        state: the rest of what the forward pass read.
        iteration: number of the step, from 0.
        message: what the training said.
        precision: dtype of mixed precision, such as "float16"; None without it.
    """

    config: str
    python: bool
    batch: list[dict[str, Any]]
    weights: dict[str, Tensor]
    state: ForwardState
    iteration: int
    message: str
    precision: str | None

    def load_config(self, trusted: bool = False) -> Config:
        """The config.

        Args:
            trusted: whether a Python config may run code; building its model always does.

        Raises:
            UserError: it is an untrusted Python config, or has keys unknown to this version.
        """
        if not self.python:
            cfg = get_cfg()
            add_ghm_config(cfg)
            with file_to_blame("its config", "is damaged or of another version"):
                cfg.merge_from_other_cfg(CfgNode(dict(parse_settings(self.config).tree)))
            return cfg
        if not trusted:
            raise UserError(
                "the batch is of a training with a Python config, which can run any code: give "
                "--trust-checkpoint if you trust the author of the file."
            )
        return OmegaConf.create(yaml.unsafe_load(self.config), flags={"allow_objects": True})

    def build(self, device: str | None = None, trusted: bool = False) -> nn.Module:
        """The model in training mode, as it stood before the forward pass.

        Args:
            device: where it is built; None: on the device of the training.
            trusted: as for :meth:`load_config`.

        Raises:
            ValueError: a YAML config describes another model than the weights are of.
        """
        cfg = self.load_config(trusted)
        if device:
            change(cfg, "device", device)
        if isinstance(cfg, CfgNode):
            self._check_shapes(cfg.clone())
            model = build_model(cfg)
        else:
            model = python_build.build_model(cfg)
        model.load_state_dict(self.weights)
        return model.train()

    def _check_shapes(self, cfg: CfgNode) -> None:
        # A damaged config may describe a huge model, which takes no memory on "meta".
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            expected = {name: x.shape for name, x in build_model(cfg).state_dict().items()}
        if expected != {name: x.shape for name, x in self.weights.items()}:
            raise ValueError("its config and its weights are of different models")


def save_replay(path: str | os.PathLike, replay: Replay) -> None:
    """Saves `replay` as plain containers and tensors, so that loading it runs no code.

    Raises:
        UserError: the file cannot be written.
    """
    content = {
        "format": _FORMAT,
        "config": replay.config,
        "python": replay.python,
        "batch": _plain(replay.batch),
        "weights": dict(replay.weights),
        "buffers": replay.state.buffers,
        "normalizer": replay.state.normalizer,
        "rng": replay.state.rng,
        "iteration": replay.iteration,
        "message": replay.message,
        "precision": replay.precision,
    }
    write_checkpoint(os.fspath(path), content)


def load_replay(path: str | os.PathLike) -> Replay:
    """Loads what :func:`save_replay` saved, by the restricted unpickler.

    Raises:
        UserError: it is another file, or a damaged one.
    """
    content = load_file(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UserError(
            f"{os.fspath(path)} is not a batch that a training saved when it stopped: give a file "
            "OUTPUT_DIR/not_finite/*.pth."
        )
    with file_to_blame(path, "is damaged"):
        iteration, precision = content["iteration"], content["precision"]
        python = content.get("python", False)
        if not (type(iteration) is int and precision in _PRECISIONS and isinstance(python, bool)):
            raise ValueError("its iteration, precision or kind of config is invalid")
        return Replay(
            config=str(content["config"]),
            python=python,
            batch=[dict(_restored(image)) for image in content["batch"]],
            weights=_tensors(content["weights"]),
            state=ForwardState(
                _tensors(content["buffers"]), content["normalizer"], _tensors(content["rng"])
            ),
            iteration=iteration,
            message=shown(content["message"], 4000),
            precision=precision,
        )


def _tensors(value: Any) -> dict[str, Tensor]:
    if not all(isinstance(x, Tensor) for x in value.values()):
        raise ValueError("something else among its tensors")
    return dict(value)


def _plain(value: Any) -> Any:
    """`value` as containers, numbers, text, arrays and tensors."""
    if isinstance(value, Instances):
        fields = {name: _plain(x) for name, x in value.get_fields().items()}
        return {"type": "Instances", "size": list(value.image_size), "fields": fields}
    if isinstance(value, PolygonMasks):
        return {"type": "PolygonMasks", "polygons": value.polygons}
    if (name := type(value).__name__) in _TENSOR_TYPES:
        return {"type": name, "tensor": value.tensor.cpu()}
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    logger.warning("a %s in the batch cannot be saved and is left out", type(value).__name__)
    return None


def _restored(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_restored(x) for x in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if kind == "Instances":
        return Instances(
            tuple(value["size"]), **{name: _restored(x) for name, x in value["fields"].items()}
        )
    if kind == "PolygonMasks":
        return PolygonMasks(value["polygons"])
    if kind in _TENSOR_TYPES:
        return _TENSOR_TYPES[kind](value["tensor"])
    return {name: _restored(x) for name, x in value.items()}
