"""Detectron2's detectors with harmonised losses; importing this registers them."""

from .backbone import (
    TorchvisionBackbone,
    build_mmdet_retinanet_resnet_fpn_backbone,
)
from .build import build_losses, validate_ghm_config
from .dense import DenseLoss, groups_of_images
from .fast_rcnn import GHMFastRCNNOutputLayers
from .fcos import GHMFCOS
from .retinanet import GHMRetinaNet
from .roi_heads import GHMCascadeROIHeads, GHMROIHeads
from .rpn import GHMRPN

__all__ = [
    "GHMFCOS",
    "GHMRPN",
    "DenseLoss",
    "GHMCascadeROIHeads",
    "GHMFastRCNNOutputLayers",
    "GHMROIHeads",
    "GHMRetinaNet",
    "TorchvisionBackbone",
    "build_losses",
    "build_mmdet_retinanet_resnet_fpn_backbone",
    "groups_of_images",
    "validate_ghm_config",
]
