"""Detectron2's checkpointer behind the restricted unpickler."""

from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer

from ghm_d2.errors import UserError

from .unpickler import load_file

__all__ = ["RestrictedCheckpointer"]

_WAY_OUT = (
    "where it comes from torchvision or mmdetection, convert it with tools/convert_torchvision.py "
    "or tools/convert_mmdet.py."
)


def _mapping(data: Any, file: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise UserError(f"{file} holds a {kind} instead of tensors by their names: {_WAY_OUT}")
    return data


def _check_tensors(model: dict[str, Any], file: str) -> None:
    for name, value in model.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor | np.ndarray)):
            raise UserError(
                f"{file} holds {name} ({type(value).__name__}) among the tensors of the model: "
                f"{_WAY_OUT}"
            )


class _RestrictedTorchLoad(Checkpointer):
    """Stands behind DetectionCheckpointer, which leaves everything but .pkl and .pyth to it."""

    trusted = False  # whether files may run code; an instance sets it

    def _load_file(self, f: str) -> dict[str, Any]:
        return _mapping(load_file(f, trusted=self.trusted), f)


class RestrictedCheckpointer(DetectionCheckpointer, _RestrictedTorchLoad):
    """`DetectionCheckpointer` that refuses files with code, and weights that fit nowhere.

    It takes what Detectron2's takes: Detectron2's and Detectron1's .pkl, pycls' .pyth, and .pth.
    A file that is refused raises :class:`~ghm_d2.errors.UserError`.
    """

    _filename = "the checkpoint"  # for messages
    _resumes = False

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Detectron2's; with the state of a training, all of its tensors must fit."""
        self._resumes = checkpointables is None and bool(self.checkpointables)
        return super().load(path, checkpointables)

    def _load_file(self, filename: str) -> dict[str, Any]:
        self._filename = filename
        if filename.endswith(".pkl"):
            data = _mapping(load_file(filename, trusted=self.trusted), filename)
            if "model" in data and "__author__" in data:
                return data
            # Caffe2 and Detectron1: detectors have "blobs", ImageNet models do not.
            blobs = _mapping(data.get("blobs", data), filename)
            model = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
            return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}
        if filename.endswith(".pyth"):
            data = _mapping(load_file(filename, trusted=self.trusted), filename)
            state = _mapping(data.get("model_state"), filename)
            model = {k: v for k, v in state.items() if not str(k).endswith("num_batches_tracked")}
            return {"model": model, "__author__": "pycls", "matching_heuristics": True}
        return super()._load_file(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        _check_tensors(_mapping(checkpoint["model"], self._filename), self._filename)
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        # Parameters alone: norms fill in some of their missing buffers.
        parameters = {name for name, _ in self.model.named_parameters()}
        if not incompatible.incorrect_shapes and parameters <= set(incompatible.missing_keys):
            raise UserError(
                f"none of the tensors of {self._filename} has a name of this model: {_WAY_OUT}"
            )
        if self._resumes and (wrong := incompatible.incorrect_shapes):
            name, found, expected = wrong[0]
            raise UserError(
                f"{self._filename} is not of this model: {name} has the shape {found} instead of "
                f"{expected} ({len(wrong)} such tensors): resume with the config, and the number "
                f"of classes, of the training, or start anew with MODEL.WEIGHTS {self._filename}."
            )
        super()._log_incompatible_keys(incompatible)
