"""mmdetection's config of a converted RetinaNet, derived from Detectron2's."""

import math
import pprint
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from ghm_d2.errors import UserError

from .mmdet_network import RetinaNetArchitecture
from .mmdet_settings import BACKBONES, STRIDES, MmdetSettings, read_settings

# The only values that mmdetection's RetinaNet can have; its config can express all other keys.
_EXPRESSIBLE: dict[str, Sequence[Any]] = {
    "MODEL.META_ARCHITECTURE": ("GHMRetinaNet", "RetinaNet"),
    "MODEL.BACKBONE.NAME": BACKBONES,
    "MODEL.RESNETS.NORM": ("BN", "FrozenBN", "SyncBN", "nnSyncBN", "naiveSyncBN"),
    "MODEL.RESNETS.RES5_DILATION": (1,),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False] * 4,),
    "MODEL.FPN.NORM": ("",),
    "MODEL.FPN.FUSE_TYPE": ("sum",),
    "MODEL.FPN.IN_FEATURES": (["res3", "res4", "res5"],),
    "MODEL.RETINANET.NORM": ("",),
    "MODEL.RETINANET.IN_FEATURES": (["p3", "p4", "p5", "p6", "p7"],),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
}


def get(cfg: CfgNode, key: str) -> Any:
    """The value of a key such as "MODEL.FPN.NORM"."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def settings_of(cfg: CfgNode) -> MmdetSettings:
    """What mmdetection's config must say for a detector of Detectron2.

    Raises:
        UserError: mmdetection cannot express it; the message names the key.
    """
    for key, allowed in _EXPRESSIBLE.items():
        if get(cfg, key) not in allowed:
            raise UserError(
                f"the config has {key} = {get(cfg, key)!r}, and only "
                f"{' or '.join(map(repr, allowed))} can be converted."
            )
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    sizes, ratios = (
        _of_each_level(getattr(anchors, name), name) for name in ("SIZES", "ASPECT_RATIOS")
    )
    scales = [[x / stride for x in level] for level, stride in zip(sizes, STRIDES, strict=True)]
    if any(x != scales[0] for x in scales):
        raise UserError(
            f"the config has MODEL.ANCHOR_GENERATOR.SIZES = {anchors.SIZES!r}, and only sizes that "
            f"are the same multiples of the strides {STRIDES} at each level can be converted."
        )
    if any(x != ratios[0] for x in ratios):
        raise UserError(
            f"the config has MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = {anchors.ASPECT_RATIOS!r}, and "
            "only the same at each level can be converted."
        )
    parts = cfg.MODEL.GHM.RETINANET
    harmonised = cfg.MODEL.META_ARCHITECTURE == "GHMRetinaNet"
    if harmonised and parts.REG.ENABLED and parts.REG.MU == "auto":
        raise UserError(
            "the config has MODEL.GHM.RETINANET.REG.MU = 'auto', and only a number can be "
            "converted."
        )
    return MmdetSettings(
        ratios=ratios[0],
        sizes=sizes,
        harmonised=(harmonised and parts.CLS.ENABLED, harmonised and parts.REG.ENABLED),
        config={key: get(cfg, key) for key in read_settings(None).config},
    )


def _of_each_level(values: Any, name: str) -> list[list[float]]:
    """One list per level, from Detectron2's lists per level or single list for all levels."""
    levels = values if isinstance(values[0], list | tuple) else [values]
    levels = list(levels) * len(STRIDES) if len(levels) == 1 else levels
    if len(levels) != len(STRIDES):
        raise UserError(f"the config has MODEL.ANCHOR_GENERATOR.{name} of {len(levels)} levels.")
    return [[float(x) for x in level] for level in levels]


def config_text(architecture: RetinaNetArchitecture, cfg: CfgNode) -> str:
    """A Python config that mmdetection 3 loads.

    Args:
        architecture: the network to describe, with its settings.
        cfg: supplies what only training uses, and the size of test images.

    Raises:
        UserError: mmdetection's ResNet cannot have these widths.
    """
    model = {
        "type": "RetinaNet",
        "data_preprocessor": _preprocessor(architecture.settings),
        "backbone": {**_backbone(architecture), "frozen_stages": cfg.MODEL.BACKBONE.FREEZE_AT - 1},
        "neck": _neck(architecture),
        "bbox_head": {**_head(architecture), **_losses(architecture, cfg)},
        "train_cfg": _train(cfg),
        "test_cfg": _test(architecture.settings),
    }
    size = cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST
    resize = [{"type": "Resize", "scale": size, "keep_ratio": True}] if size[1] else []
    meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    pipeline = [
        {"type": "LoadImageFromFile"},
        *resize,
        {"type": "PackDetInputs", "meta_keys": meta},
    ]
    variables = {
        "default_scope": "mmdet",
        "model": model,
        "test_pipeline": pipeline,
        "test_dataloader": {"dataset": {"pipeline": pipeline}},
    }
    lines = [f"{k} = {pprint.pformat(v, sort_dicts=False)}\n" for k, v in variables.items()]
    return "# Written by ghm-d2 convert-mmdet --reverse.\n" + "".join(lines)


def _preprocessor(settings: MmdetSettings) -> dict[str, Any]:
    return {
        "type": "DetDataPreprocessor",
        "mean": [float(x) for x in settings.config["MODEL.PIXEL_MEAN"]],
        "std": [float(x) for x in settings.config["MODEL.PIXEL_STD"]],
        "bgr_to_rgb": settings.config["INPUT.FORMAT"] == "RGB",
        "pad_size_divisor": 32,
    }


def _backbone(architecture: RetinaNetArchitecture) -> dict[str, Any]:
    resnet, config = architecture.resnet, architecture.settings.config
    base = resnet.res2_channels // (4 if resnet.bottleneck else 1)
    found = {
        "type": "ResNeXt" if resnet.groups > 1 else "ResNet",
        "depth": resnet.settings()["MODEL.RESNETS.DEPTH"],
        "num_stages": 4,
        "out_indices": (0, 1, 2, 3),
        "stem_channels": resnet.stem_channels,
        "base_channels": base,
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "norm_eval": True,
        "style": "caffe" if config["MODEL.RESNETS.STRIDE_IN_1X1"] else "pytorch",
    }
    width = resnet.width_per_group
    if resnet.groups > 1:
        found |= {"groups": resnet.groups, "base_width": width}
        fits = all(math.floor(base * 2**i * (width / base)) == width * 2**i for i in range(4))
    else:
        fits = width == base
    if resnet.bottleneck and (resnet.res2_channels % 4 or not fits):
        raise UserError(
            f"its res2 has {resnet.res2_channels} channels and MODEL.RESNETS.WIDTH_PER_GROUP is "
            f"{width}, which mmdetection's ResNet, with a quarter of the channels, cannot have."
        )
    return found


def _neck(architecture: RetinaNetArchitecture) -> dict[str, Any]:
    return {
        "type": "FPN",
        "in_channels": [architecture.resnet.res2_channels * 2**i for i in range(4)],
        "out_channels": architecture.fpn_channels,
        "start_level": 1,
        "add_extra_convs": "on_input",
        "relu_before_extra_convs": architecture.settings.config["MODEL.BACKBONE.NAME"]
        == BACKBONES[True],
        "num_outs": 5,
    }


def _head(architecture: RetinaNetArchitecture) -> dict[str, Any]:
    settings = architecture.settings
    return {
        "type": "RetinaHead",
        "num_classes": architecture.num_classes,
        "in_channels": architecture.fpn_channels,
        "feat_channels": architecture.fpn_channels,
        "stacked_convs": architecture.num_convs,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "scales": [x / STRIDES[0] for x in settings.sizes[0]],
            "ratios": settings.ratios,
            "strides": [int(x) for x in STRIDES],
            "center_offset": settings.config["MODEL.ANCHOR_GENERATOR.OFFSET"],
        },
        "bbox_coder": {
            "type": "DeltaXYWHBBoxCoder",
            "target_means": [0.0] * 4,
            "target_stds": [1 / x for x in settings.config["MODEL.RETINANET.BBOX_REG_WEIGHTS"]],
        },
    }


def _losses(architecture: RetinaNetArchitecture, cfg: CfgNode) -> dict[str, Any]:
    keys, parts = cfg.MODEL.RETINANET, cfg.MODEL.GHM.RETINANET
    classes, boxes = architecture.settings.harmonised
    losses: dict[str, Any] = {
        "loss_cls": {
            "type": "FocalLoss",
            "use_sigmoid": True,
            "gamma": keys.FOCAL_LOSS_GAMMA,
            "alpha": keys.FOCAL_LOSS_ALPHA,
        },
        "loss_bbox": {"type": "SmoothL1Loss", "beta": keys.SMOOTH_L1_LOSS_BETA},
    }
    if not keys.SMOOTH_L1_LOSS_BETA:
        losses["loss_bbox"] = {"type": "L1Loss"}
    if classes:
        losses["loss_cls"] = {
            "type": "GHMC",
            "use_sigmoid": True,
            "bins": architecture.cls_bins or parts.CLS.BINS,
            "momentum": parts.CLS.MOMENTUM,
            "loss_weight": parts.CLS.LOSS_WEIGHT,
        }
    if boxes:
        losses["loss_bbox"] = {
            "type": "GHMR",
            "mu": parts.REG.MU,
            "bins": architecture.reg_bins or parts.REG.BINS,
            "momentum": parts.REG.MOMENTUM,
            "loss_weight": parts.REG.LOSS_WEIGHT,
        }
    return losses


def _train(cfg: CfgNode) -> dict[str, Any]:
    thresholds = cfg.MODEL.RETINANET.IOU_THRESHOLDS
    return {
        "assigner": {
            "type": "MaxIoUAssigner",
            "pos_iou_thr": thresholds[-1],
            "neg_iou_thr": thresholds[0],
            "min_pos_iou": 0,
            "ignore_iof_thr": -1,
        },
        "allowed_border": -1,
        "pos_weight": -1,
        "debug": False,
    }


def _test(settings: MmdetSettings) -> dict[str, Any]:
    config = settings.config
    return {
        "nms_pre": config["MODEL.RETINANET.TOPK_CANDIDATES_TEST"],
        "min_bbox_size": 0,
        "score_thr": config["MODEL.RETINANET.SCORE_THRESH_TEST"],
        "nms": {"type": "nms", "iou_threshold": config["MODEL.RETINANET.NMS_THRESH_TEST"]},
        "max_per_img": config["TEST.DETECTIONS_PER_IMAGE"],
    }
