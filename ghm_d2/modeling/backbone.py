"""The FPN of mmdetection's RetinaNet, for its converted weights."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import (
    FPN,
    LastLevelP6P7,
    build_retinanet_resnet_fpn_backbone,
)
from torch import Tensor

__all__ = ["LinearP6P7", "build_mmdet_retinanet_resnet_fpn_backbone"]


class LinearP6P7(LastLevelP6P7):
    """P6 and P7 from C5 without Detectron2's ReLU between them."""

    def forward(self, c5: Tensor) -> list[Tensor]:
        """
        Args:
            c5: (N, C, H, W).

        Returns:
            P6 and P7, each of half the size of the one before, rounded up.
        """
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]


@BACKBONE_REGISTRY.register()
def build_mmdet_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet and FPN for RetinaNet, with :class:`LinearP6P7` on top."""
    backbone = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    top = backbone.top_block
    backbone.top_block = LinearP6P7(top.p6.in_channels, top.p6.out_channels)
    return backbone
