"""Detectron2's detectors with harmonised losses; importing this registers them."""

from ghm_d2.modeling.backbone import (
    TorchvisionBackbone,
    build_mmdet_retinanet_resnet_fpn_backbone,
)
from ghm_d2.modeling.build import build_losses, validate_ghm_config
from ghm_d2.modeling.dense import DenseLoss, groups_of_images
from ghm_d2.modeling.fast_rcnn import GHMFastRCNNOutputLayers
from ghm_d2.modeling.fcos import GHMFCOS
from ghm_d2.modeling.retinanet import GHMRetinaNet
from ghm_d2.modeling.roi_heads import GHMCascadeROIHeads, GHMROIHeads
from ghm_d2.modeling.rpn import GHMRPN

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
