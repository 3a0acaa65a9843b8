"""Region-of-interest heads whose box predictors have harmonised losses."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from torch import nn

from .fast_rcnn import GHMFastRCNNOutputLayers


@ROI_HEADS_REGISTRY.register()
class GHMROIHeads(StandardROIHeads):
    """:class:`StandardROIHeads` with :class:`GHMFastRCNNOutputLayers` as box predictor.

    The losses of masks and keypoints are Detectron2's.
    """

    # TorchScript does not inherit these annotations of StandardROIHeads; without them it would
    # compile heads that do not exist.
    mask_on: torch.jit.Final[bool]
    keypoint_on: torch.jit.Final[bool]

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = _harmonized(cfg, ret["box_head"], ret["box_predictor"])
        return ret


@ROI_HEADS_REGISTRY.register()
class GHMCascadeROIHeads(CascadeROIHeads):
    """:class:`CascadeROIHeads` whose stages each have a :class:`GHMFastRCNNOutputLayers`.

    Every stage has its own losses and running counts, because the boxes that it sees, and which of
    them count as objects, differ from those of the stage before.
    """

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ret = super()._init_box_head(cfg, input_shape)
        stages = zip(ret["box_heads"], ret["box_predictors"], strict=True)
        ret["box_predictors"] = [_harmonized(cfg, *stage) for stage in stages]
        return ret


def _harmonized(
    cfg: CfgNode, box_head: nn.Module, stock: FastRCNNOutputLayers
) -> GHMFastRCNNOutputLayers:
    """Our predictor with the random weights of Detectron2's: a seed gives the same detector."""
    with torch.random.fork_rng(devices=[]):
        predictor = GHMFastRCNNOutputLayers(
            cfg, box_head.output_shape, box2box_transform=stock.box2box_transform
        )
    # Not the biases: they start as constants, that of the classes possibly at a prior.
    predictor.cls_score.weight = stock.cls_score.weight
    predictor.bbox_pred.weight = stock.bbox_pred.weight
    return predictor
