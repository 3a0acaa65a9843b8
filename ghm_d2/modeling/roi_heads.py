"""Region-of-interest heads whose box predictor has harmonised losses."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads

from .fast_rcnn import GHMFastRCNNOutputLayers

__all__ = ["GHMROIHeads"]


@ROI_HEADS_REGISTRY.register()
class GHMROIHeads(StandardROIHeads):
    """:class:`StandardROIHeads` with :class:`GHMFastRCNNOutputLayers` as box predictor."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = GHMFastRCNNOutputLayers(cfg, ret["box_head"].output_shape)
        return ret
