"""The tensors of mmdetection's RetinaNet and what they are in Detectron2's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghm_d2.errors import UserError

from .mmdet_settings import MmdetSettings
from .rename import shape_of
from .resnet import ResNetArchitecture, read_resnet

# Detectron2's predictors, whose channels are grouped by anchor.
PREDICTORS = ("head.cls_score", "head.bbox_pred")
# The two losses in mmdetection, and those of the first group of images in this project.
LOSSES = {"bbox_head.loss_cls": "ghm_c.0", "bbox_head.loss_bbox": "ghm_r.0"}


@dataclass(frozen=True)
class RetinaNetArchitecture:
    """What the tensors show of a RetinaNet, and the settings that they do not show."""

    resnet: ResNetArchitecture
    fpn_channels: int
    num_convs: int
    num_classes: int
    num_anchors: int
    cls_bins: int | None  # None: the loss has no buffers
    reg_bins: int | None
    settings: MmdetSettings

    def config(self) -> dict[str, Any]:
        """The config keys of the matching detector, without MODEL.WEIGHTS and DATASETS."""
        config = {
            "MODEL.META_ARCHITECTURE": "GHMRetinaNet",
            **self.resnet.settings(),
            "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
            "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
            "MODEL.FPN.OUT_CHANNELS": self.fpn_channels,
            "MODEL.ANCHOR_GENERATOR.SIZES": self.settings.sizes,
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [self.settings.ratios],
            "MODEL.RETINANET.NUM_CLASSES": self.num_classes,
            "MODEL.RETINANET.NUM_CONVS": self.num_convs,
            "MODEL.GHM.CLIP_BEFORE_NMS": True,
            **self.settings.config,
        }
        bins = self.cls_bins, self.reg_bins
        for part, count, harmonised in zip(
            ("CLS", "REG"), bins, self.settings.harmonised, strict=True
        ):
            if count is not None:
                config[f"MODEL.GHM.RETINANET.{part}.BINS"] = count
            elif not harmonised:
                config[f"MODEL.GHM.RETINANET.{part}.ENABLED"] = False
        return config


def read_retinanet(state: Mapping[str, Tensor], settings: MmdetSettings) -> RetinaNetArchitecture:
    """Reads the architecture off mmdetection's tensors.

    Raises:
        UserError: it is not a RetinaNet, or one that Detectron2 does not build.
    """
    _refuse_others(state)
    refuse_norms(state)
    num_anchors = len(settings.ratios) * len(settings.sizes[0])
    deltas = shape_of(state, "bbox_head.retina_reg.weight", 4)[0]
    logits = shape_of(state, "bbox_head.retina_cls.weight", 4)[0]
    if deltas != 4 * num_anchors or logits % num_anchors:
        raise UserError(
            f"its head predicts {deltas} deltas and {logits} logits at each place, which do not "
            f"fit {num_anchors} anchors ({len(settings.ratios)} ratios of "
            f"{len(settings.sizes[0])} sizes)."
        )
    bins = {
        loss: shape_of(state, f"{loss}.acc_sum", 1)[0] if f"{loss}.acc_sum" in state else None
        for loss in LOSSES
    }
    return RetinaNetArchitecture(
        resnet=read_resnet(state, "backbone."),
        fpn_channels=shape_of(state, "neck.lateral_convs.0.conv.weight", 4)[0],
        num_convs=count_layers(state, "bbox_head.cls_convs"),
        num_classes=logits // num_anchors,
        num_anchors=num_anchors,
        cls_bins=bins["bbox_head.loss_cls"],
        reg_bins=bins["bbox_head.loss_bbox"],
        settings=settings,
    )


# Norms that RetinaNet has by default in neither project: tensor names, and the setting of each.
_NORMS = (
    (r"backbone\.fpn_\w+\.norm\..*", "MODEL.FPN.NORM"),
    (r"head\.(cls|bbox)_subnet\.\d+\.norm\..*", "MODEL.RETINANET.NORM"),
    (r"neck\..*\.(bn|gn|ln|in|norm)\d*\..*", "norm_cfg of its neck"),
    (r"bbox_head\..*\.(bn|gn|ln|in|norm)\d*\..*", "norm_cfg of its bbox_head"),
    (r"backbone\.gn1\..*", "norm_cfg of its backbone"),
)


def refuse_norms(state: Mapping[str, Tensor]) -> None:
    """Refuses norms that cannot be converted, and names the setting that adds them.

    Raises:
        UserError: the FPN or the head has norms, or the ResNet has other than batch norms.
    """
    causes = [(x, key) for pattern, key in _NORMS for x in state if re.fullmatch(pattern, x)]
    # In Detectron2's head, norms and convolutions share one numbering: the single dimension of
    # their weights tells norms apart.
    subnets = [x for x in state if re.fullmatch(r"head\.(cls|bbox)_subnet\..*weight", x)]
    causes += [(x, "MODEL.RETINANET.NORM") for x in subnets if state[x].dim() == 1]
    stem = [x for x in state if x.startswith("backbone.bottom_up.stem.")]
    if stem and not any(x.endswith("running_mean") for x in state):
        causes.append((stem[0], "MODEL.RESNETS.NORM"))
    if causes:
        raise UserError(
            f"it has norms ({causes[0][1]}; the tensor {causes[0][0]}) that cannot be converted: "
            "only batch norms in the backbone can."
        )


def _refuse_others(state: Mapping[str, Tensor]) -> None:
    parts = sorted({name.partition(".")[0] for name in state})
    if {"rpn_head", "roi_head"} & set(parts):
        raise UserError("it is a two-stage detector (rpn_head, roi_head) and not a RetinaNet.")
    if not {"backbone", "neck", "bbox_head"} <= set(parts):
        raise UserError(
            "it is not a RetinaNet of mmdetection, which has a backbone, a neck and a bbox_head, "
            f"but holds {', '.join(parts[:6]) or 'nothing'}."
        )
    if not any(name.startswith(("bbox_head.retina_cls", "bbox_head.retina_reg")) for name in state):
        layers = sorted({name.split(".")[1] for name in state if name.startswith("bbox_head.")})
        raise UserError(
            "its bbox_head is not a RetinaNet's, which has retina_cls and retina_reg, but has "
            f"{', '.join(layers[:6])}."
        )


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of different indices right after `prefix`."""
    pattern = rf"{re.escape(prefix)}\.(\d+)\..*"
    return len({x[1] for name in state if (x := re.fullmatch(pattern, name))})


def tensor_names(
    resnet: ResNetArchitecture, num_convs: int, with_cls: bool, with_reg: bool
) -> dict[str, str]:
    """From mmdetection's tensor names to Detectron2's; `with_*`: include that loss's counts."""
    names = {f"backbone.{a}": f"backbone.bottom_up.{b}" for a, b in resnet.names().items()}
    pairs = [(f"neck.lateral_convs.{i}.conv", f"backbone.fpn_lateral{i + 3}") for i in range(3)]
    pairs += [(f"neck.fpn_convs.{i}.conv", f"backbone.fpn_output{i + 3}") for i in range(3)]
    pairs += [(f"neck.fpn_convs.{i}.conv", f"backbone.top_block.p{i + 3}") for i in (3, 4)]
    for old, new in (("cls_convs", "cls_subnet"), ("reg_convs", "bbox_subnet")):
        # Detectron2's subnets have a ReLU after each convolution.
        pairs += [(f"bbox_head.{old}.{i}.conv", f"head.{new}.{2 * i}") for i in range(num_convs)]
    pairs += zip(("bbox_head.retina_cls", "bbox_head.retina_reg"), PREDICTORS, strict=True)
    names |= {f"{old}.{x}": f"{new}.{x}" for old, new in pairs for x in ("weight", "bias")}
    for (old, new), wanted in zip(LOSSES.items(), (with_cls, with_reg), strict=True):
        if wanted:
            names[f"{old}.acc_sum"] = f"{new}.acc_sum"
    return names


def reorder_anchors(model: Mapping[str, Tensor], outer: int, inner: int) -> dict[str, Tensor]:
    """Swaps the two nested loops over the anchors in the predictors' output channels.

    mmdetection has ratios outside and sizes inside, Detectron2 the reverse.

    Args:
        model: tensors by Detectron2's names.
        outer: length of the loop that is outside now.
        inner: length of the loop that is inside now.
    """
    model = dict(model)
    for layer in PREDICTORS:
        for part in ("weight", "bias"):
            x = model[f"{layer}.{part}"]
            swapped = x.unflatten(0, (outer, inner, -1)).transpose(0, 1)
            model[f"{layer}.{part}"] = swapped.reshape(x.shape).contiguous()
    return model


def edges(loss: str, bins: int) -> Tensor:
    """mmdetection's buffer of region borders, float32 (bins + 1,); `loss` is a key of `LOSSES`."""
    borders = torch.arange(bins + 1).float() / bins
    # GHM-C's last region includes a gradient norm of 1, and GHM-R's has no upper border.
    borders[-1] = borders[-1] + 1e-6 if loss == "bbox_head.loss_cls" else 1e3
    return borders
