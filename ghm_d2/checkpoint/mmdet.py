"""RetinaNets with GHM or focal loss from mmdetection to Detectron2 and back."""

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import Tensor

from ghm_d2.config import add_ghm_config
from ghm_d2.errors import UserError
from ghm_d2.files import read_text, write_text

from .files import read_checkpoint, unwrap, write_checkpoint, write_config
from .mmdet_config import config_text, get, settings_of
from .mmdet_network import (
    LOSSES,
    PREDICTORS,
    RetinaNetArchitecture,
    count_layers,
    edges,
    read_retinanet,
    refuse_norms,
    reorder_anchors,
    tensor_names,
)
from .mmdet_settings import MmdetSettings, read_settings
from .origin import read_origin
from .rename import check_shapes, rename
from .resnet import DETECTRON2_STAGES, read_resnet

logger = logging.getLogger(__name__)

# Key of the buffers that Detectron2's modules lack, kept so that a file can be converted back: the
# norms' counters of batches and the losses' region borders, under mmdetection's names.
_BUFFERS = "mmdet_buffers"
# Keys beside the weights in the files of Detectron2's model zoo.
_ZOO = ("__author__", "matching_heuristics")


def convert_from_mmdet(path: str, output: str, cfg: CfgNode | None = None) -> str | None:
    """Converts a RetinaNet of mmdetection to a checkpoint that Detectron2 loads.

    Args:
        path: file or URL, as mmdetection 1 to 3 write it.
        output: what to write, .pth or .pkl.
        cfg: the config that `output` is meant for, which is compared with the network; None: the
            matching config is written beside `output`, its name ending in .yaml.

    Returns:
        The config file that was written, or None.

    Raises:
        UserError: `path` is not such a file, `cfg` does not fit, or nothing can be written.
    """
    config_file = f"{os.path.splitext(output)[0]}.yaml"
    if cfg is None and os.path.exists(config_file):
        raise UserError(
            f"{config_file} exists already: give it as --config-file, or choose another output."
        )
    checkpoint = read_checkpoint(path, output)
    try:
        settings = read_settings(checkpoint.get("meta"))
        state = unwrap(checkpoint, "state_dict", used=["meta"])
        architecture = read_retinanet(state, settings)
        converted = _to_detectron2(state, architecture)
        if cfg is not None:
            _check_config(cfg, architecture.config())
    except UserError as error:
        raise UserError(f"{path} cannot be converted: {error}") from error
    write_checkpoint(output, converted)
    if cfg is not None:
        return None
    source = os.path.basename(path)
    config = {"MODEL.WEIGHTS": output, **architecture.config(), "VERSION": 2}
    if architecture.num_classes == 80:
        config["DATASETS.TEST"] = ["coco_2017_val"]
    write_config(config_file, config, f"For evaluating {source}, converted from mmdetection.")
    return config_file


def convert_to_mmdet(path: str, output: str, cfg: CfgNode | None = None) -> str:
    """Converts a RetinaNet checkpoint of Detectron2 to one that mmdetection loads, with its config.

    Args:
        path: file or URL; its norms may be trained or frozen.
        output: what to write, .pth.
        cfg: the config that the weights were trained with; None: mmdetection's settings, as in
            `configs/mmdet`.

    Returns:
        The config file of mmdetection that was written beside `output`, its name ending in .py.

    Raises:
        UserError: `path` is not such a file, `cfg` does not fit or cannot be expressed there, or
            nothing can be written.
    """
    if output.endswith(".pkl"):
        raise UserError(f"{output}: mmdetection loads no .pkl, so give a name that ends in .pth.")
    checkpoint = read_checkpoint(path, output)
    try:
        settings = read_settings(None) if cfg is None else settings_of(cfg)
        state = _without_constants(unwrap(checkpoint, "model", used=[_BUFFERS, *_ZOO]))
        kept = unwrap(checkpoint.get(_BUFFERS, {}))
        converted, architecture = _to_mmdet(state, kept, settings)
        if cfg is not None:
            _check_config(cfg, _of_the_weights(architecture))
        text = config_text(architecture, _defaults() if cfg is None else cfg)
    except UserError as error:
        raise UserError(f"{path} cannot be converted: {error}") from error
    config_file = f"{os.path.splitext(output)[0]}.py"
    if os.path.exists(config_file) and read_text(config_file) != text:
        raise UserError(f"{config_file} exists already: choose another output.")
    if cfg is not None and not cfg.MODEL.GHM.CLIP_BEFORE_NMS:
        logger.warning("mmdetection clips boxes to the image before NMS, and this config after it")
    meta: dict[str, Any] = {"cfg": text}
    if classes := read_origin(checkpoint).classes:
        meta["dataset_meta"] = {"classes": classes}
    write_checkpoint(output, {"meta": meta, "state_dict": converted})
    write_text(config_file, text)
    return config_file


def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_ghm_config(cfg)
    return cfg


def _to_detectron2(
    state: Mapping[str, Tensor], architecture: RetinaNetArchitecture
) -> dict[str, Any]:
    names = tensor_names(
        architecture.resnet,
        architecture.num_convs,
        architecture.cls_bins is not None,
        architecture.reg_bins is not None,
    )
    buffers = _take_buffers(state, names)
    model = rename({name: x for name, x in state.items() if name not in buffers}, names)
    check_shapes(model, _expected(architecture), names)
    ratios, sizes = len(architecture.settings.ratios), len(architecture.settings.sizes[0])
    model = reorder_anchors(model, outer=ratios, inner=sizes)
    return {"model": model, "__author__": "mmdetection", _BUFFERS: buffers}


def _take_buffers(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of mmdetection that have no place in Detectron2."""
    buffers = {}
    for name, x in state.items():
        module, _, part = name.rpartition(".")
        if part == "num_batches_tracked" and f"{module}.running_mean" in names:
            buffers[name] = x
        elif part == "edges" and module in LOSSES:
            # Checkpoints in half precision hold rounded borders.
            if x.dim() != 1 or not len(x) or not x.allclose(edges(module, len(x) - 1), atol=1e-3):
                raise UserError(f"the tensor {name} does not hold the borders of equal regions.")
            buffers[name] = x
    return buffers


def _own_buffers(converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers that Detectron2 lacks, with mmdetection's initial values."""
    buffers = {}
    for name, x in converted.items():
        module, _, part = name.rpartition(".")
        if part == "running_mean":
            buffers[f"{module}.num_batches_tracked"] = torch.tensor(0)
        elif part == "acc_sum":
            buffers[f"{module}.edges"] = edges(module, len(x))
    return buffers


def _expected(architecture: RetinaNetArchitecture) -> dict[str, Tensor]:
    """The tensors of the matching detector, on the meta device: shapes without memory."""
    cfg = _defaults()
    for key, value in architecture.config().items():
        cfg.merge_from_list([key, value])
    cfg.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            return build_model(cfg).state_dict()
    except AssertionError as error:  # ResNet-18 and 34 need 64 channels in res2
        raise UserError(f"Detectron2 does not build this network ({error}).") from error


def _check_config(cfg: CfgNode, config: Mapping[str, Any]) -> None:
    wrong = []
    for key, value in config.items():
        if not _same(found := get(cfg, key), value):
            wrong.append(f"{key} is {found!r} in the config and {value!r} in the checkpoint")
    if wrong:
        others = f" ({len(wrong)} such keys)" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}{others}.")


def _of_the_weights(architecture: RetinaNetArchitecture) -> dict[str, Any]:
    """The keys that the weights determine, without those that were read from the config itself."""
    config = architecture.config()
    left_out = ("MODEL.ANCHOR_GENERATOR.", "MODEL.META_ARCHITECTURE", "MODEL.GHM.CLIP_BEFORE_NMS")
    return {
        key: x
        for key, x in config.items()
        if not key.startswith(left_out) and not key.endswith(".ENABLED")
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _without_constants(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops what older Detectron2 saved although the config determines it."""
    constants = ("pixel_mean", "pixel_std", "anchor_generator.")
    return {name: x for name, x in state.items() if not name.startswith(constants)}


def _to_mmdet(
    state: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    settings: MmdetSettings,
) -> tuple[dict[str, Tensor], RetinaNetArchitecture]:
    if not any(name.startswith(PREDICTORS) for name in state):
        raise UserError(f"it is not a RetinaNet of Detectron2, which has {PREDICTORS[0]}.")
    refuse_norms(state)
    names = tensor_names(
        read_resnet(state, "backbone.bottom_up.", "stem.conv1.weight", DETECTRON2_STAGES),
        count_layers(state, "head.cls_subnet"),
        *(f"{loss}.acc_sum" in state for loss in LOSSES.values()),
    )
    back = {new: old for old, new in names.items()}
    counters = {f"{new.rpartition('.')[0]}.num_batches_tracked": old for new, old in back.items()}
    trained = {
        f"{old.rpartition('.')[0]}.num_batches_tracked": state[new]
        for new, old in counters.items()
        if new in state
    }
    weights = _without_groups({name: x for name, x in state.items() if name not in counters})
    architecture = read_retinanet(rename(weights, back), settings)
    check_shapes(weights, _expected(architecture), {name: name for name in back})
    ratios, sizes = len(settings.ratios), len(settings.sizes[0])
    converted = rename(reorder_anchors(weights, outer=sizes, inner=ratios), back)
    converted |= _own_buffers(converted) | _take_buffers(kept, names) | trained
    return converted, architecture


def _without_groups(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops the losses' buffers that mmdetection lacks: all but the first group's counts."""
    kept = {f"{loss}.acc_sum" for loss in LOSSES.values()}
    left_out = [x for x in state if x.startswith(("ghm_c.", "ghm_r.")) and x not in kept]
    if left_out:
        logger.warning(
            "%d buffers of the losses left out, which mmdetection has no place for: %s",
            len(left_out),
            ", ".join(left_out[:4]) + (" ..." if len(left_out) > 4 else ""),
        )
    return {name: x for name, x in state.items() if name not in left_out}
