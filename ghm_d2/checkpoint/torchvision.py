"""ImageNet weights in torchvision's layout (ResNet, ResNeXt) for Detectron2's backbones."""

import logging
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import Tensor

from ghm_d2.errors import UserError

from .files import read_checkpoint, unwrap, write_checkpoint
from .rename import check_shapes, rename
from .resnet import IMAGENET_INPUT, ResNetArchitecture, read_resnet

logger = logging.getLogger(__name__)


def convert_torchvision(path: str, output: str) -> dict[str, Any]:
    """Converts a file of ImageNet weights; the classifier is left out.

    Args:
        path: file or URL of a state dict, bare or under "state_dict" or "model".
        output: what to write, .pkl or .pth; Detectron2 matches its names to any backbone.

    Returns:
        The config keys, such as "MODEL.RESNETS.DEPTH", that this backbone needs and their values.

    Raises:
        UserError: `path` is no such file, or `output` cannot be written.
    """
    checkpoint = read_checkpoint(path, output)
    try:
        state = unwrap(checkpoint, "state_dict", "model")
        architecture = read_resnet(state)
        model = _convert(state, architecture)
    except UserError as error:
        raise UserError(f"{path} cannot be converted: {error}") from error
    write_checkpoint(
        output, {"model": model, "__author__": "torchvision", "matching_heuristics": True}
    )
    return {"MODEL.WEIGHTS": output, **IMAGENET_INPUT, **architecture.settings()}


def _convert(state: dict[str, Tensor], architecture: ResNetArchitecture) -> dict[str, Tensor]:
    names = architecture.names()
    backbone = {
        name: x
        for name, x in state.items()
        if not name.startswith("fc.") and not name.endswith(".num_batches_tracked")
    }
    model = rename(backbone, names)
    check_shapes(model, _expected(architecture), names)
    left_out = [name for name in state if name.startswith("fc.")]
    if left_out:
        logger.warning("%d tensors of the classifier left out (fc)", len(left_out))
    return model


def _expected(architecture: ResNetArchitecture) -> dict[str, Tensor]:
    cfg = get_cfg()
    for key, value in architecture.settings().items():
        cfg.merge_from_list([key, value])
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    try:
        with torch.device("meta"):
            return build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
    except AssertionError as error:  # ResNet-18 and 34 need 64 channels in res2
        raise UserError(f"Detectron2 does not build this network ({error}).") from error
