"""Backbones: any torchvision classification network below an FPN, and mmdetection's FPN."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import (
    LastLevelMaxPool,
    LastLevelP6P7,
    build_retinanet_resnet_fpn_backbone,
)
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from ghm_d2.errors import UserError, similar_names

__all__ = [
    "LinearP6P7",
    "TorchvisionBackbone",
    "build_mmdet_retinanet_resnet_fpn_backbone",
    "build_retinanet_torchvision_fpn_backbone",
    "build_torchvision_fpn_backbone",
]

NORMS = ("FrozenBN", "BN", "SyncBN")

_PROBE = 128  # side of the image that strides are measured on: 32 times 4


class TorchvisionBackbone(Backbone):
    """Feature maps of a torchvision classification network, without its classifier.

    The network keeps torchvision's parameter names, so a state dict of torchvision's loads as
    `MODEL.WEIGHTS "FILE.pth?matching_heuristics=True"`. It expects torchvision's input: RGB,
    `PIXEL_MEAN` [123.675, 116.28, 103.53] and `PIXEL_STD` [58.395, 57.12, 57.375].
    """

    def __init__(
        self, name: str, out_features: Sequence[str], *, norm: str = "FrozenBN", freeze_at: str = ""
    ) -> None:
        """
        Args:
            name: of a classification network, as in `torchvision.models.list_models`.
            out_features: graph nodes that give the feature maps, high to low resolution; a module's
                name stands for its last node. They are found by
                `torchvision.models.feature_extraction.get_graph_node_names`.
            norm: what becomes of the network's batch norm: "FrozenBN" fixes statistics and affine
                parameters, "BN" leaves it as it is, "SyncBN" pools it over all processes.
            freeze_at: graph node up to which no parameter is trained; "": all are trained.

        Raises:
            ValueError: a name is unknown, or a node gives no feature map.
        """
        super().__init__()
        known = models.list_models(module=models)
        if name not in known:
            raise ValueError(
                f"name must be one of torchvision's, got {name!r}{similar_names(name, known)}"
            )
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        network = models.get_model(name, weights=None)
        nodes = get_graph_node_names(network, suppress_diff_warning=True)[0]
        modules = [".".join(n.split(".")[:i]) for n in nodes for i in range(1, n.count(".") + 2)]
        asked = [("out_features", node) for node in out_features]
        for argument, node in [*asked, *[("freeze_at", freeze_at)] * bool(freeze_at)]:
            if node not in modules:
                raise ValueError(
                    f"{argument} must be nodes of {name}, got {node!r}"
                    f"{similar_names(node, modules)}"
                )
        if freeze_at:
            # It has the layers up to that node alone, and shares their parameters with the network.
            for parameter in _extractor(network, [freeze_at]).parameters():
                parameter.requires_grad_(False)
        body = _extractor(network, out_features)
        # After the tracing, which would not get through FrozenBatchNorm2d's conditions.
        if norm == "FrozenBN":
            body = FrozenBatchNorm2d.convert_frozen_batchnorm(body)
        elif norm == "SyncBN":
            body = nn.SyncBatchNorm.convert_sync_batchnorm(body)
        self.body = body
        self._out_features = list(out_features)
        self._out_feature_channels, self._out_feature_strides = _measure(body, name)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: (N, 3, H, W), H and W multiples of the largest stride.

        Returns:
            Node name to feature map (N, channels, H / stride, W / stride).
        """
        return self.body(x)


def _extractor(network: nn.Module, nodes: Sequence[str]) -> nn.Module:
    return create_feature_extractor(network, list(nodes), suppress_diff_warning=True)


@torch.no_grad()
def _measure(body: nn.Module, name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Channels and stride of each feature map, by a dry run."""
    body.eval()
    try:
        maps = body(torch.zeros(1, 3, _PROBE, _PROBE))
    except (AssertionError, RuntimeError) as error:  # vision transformers of a fixed image size
        raise ValueError(
            f"name must be a network for images of any size, {name} is not "
            f"({' '.join(str(error).split())})"
        ) from None
    body.train()
    channels, strides = {}, {}
    for node, x in maps.items():
        square = isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == x.shape[3]
        if not square or _PROBE % x.shape[2]:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"out_features must be feature maps (N, C, H / stride, W / stride), but {node} of "
                f"{name} gives {got} for an image of {_PROBE} x {_PROBE}"
            )
        channels[node], strides[node] = x.shape[1], _PROBE // x.shape[2]
    if any(b != 2 * a for a, b in pairwise(strides.values())):
        raise ValueError(f"out_features must double the stride from one to the next, got {strides}")
    return channels, strides


def _bottom_up(cfg: CfgNode, input_shape: ShapeSpec) -> TorchvisionBackbone:
    if input_shape.channels != 3:
        raise UserError(
            f"MODEL.PIXEL_MEAN must have 3 entries with a torchvision backbone, "
            f"got {input_shape.channels}"
        )
    node = cfg.MODEL.GHM.TORCHVISION
    try:
        return TorchvisionBackbone(
            node.NAME, cfg.MODEL.FPN.IN_FEATURES, norm=node.NORM, freeze_at=node.FREEZE_AT
        )
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        key = "FPN.IN_FEATURES" if name == "out_features" else f"GHM.TORCHVISION.{name.upper()}"
        raise UserError(f"MODEL.{key} {rest}") from None


def _fpn(cfg: CfgNode, bottom_up: TorchvisionBackbone, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN with one more level by pooling, for Faster R-CNN: p2 to p6 from strides 4 to 32.

    Args:
        cfg: a config; `MODEL.GHM.TORCHVISION` names the network, `MODEL.FPN.IN_FEATURES` its
            graph nodes.
        input_shape: of the image; 3 channels.

    Raises:
        UserError: a key names what the network does not have; the message names the key.
    """
    return _fpn(cfg, _bottom_up(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN with two more levels by convolution, for RetinaNet: p3 to p7 from strides 8 to 32.

    P6 comes from the last of `MODEL.FPN.IN_FEATURES`, as Detectron2's from res5. Arguments and
    errors as of :func:`build_torchvision_fpn_backbone`.
    """
    bottom_up = _bottom_up(cfg, input_shape)
    last = cfg.MODEL.FPN.IN_FEATURES[-1]
    channels = bottom_up.output_shape()[last].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS, last))


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
