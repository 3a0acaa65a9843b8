"""Backbones: any torchvision classification network below an FPN, and mmdetection's FPN."""

import copy
import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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

from .feature_cache import cache_for

NORMS = ("FrozenBN", "BN", "SyncBN")

_PROBE = (256, 384)  # height and width of the image that strides are measured on
_ONE_SIZE = ("vit_", "maxvit")  # networks whose attention has the size of one image built in


class _Map(NamedTuple):
    """A feature map of the network."""

    name: str
    channels: int
    stride: int
    channels_last: bool  # (N, H, W, C)
    unpadded: bool  # fewer cells than H / stride and W / stride


class TorchvisionBackbone(Backbone):
    """Feature maps of a torchvision classification network, without its classifier.

    The network keeps torchvision's parameter names, so a state dict of torchvision's loads as
    `MODEL.WEIGHTS "FILE.pth?matching_heuristics=True"`. It expects torchvision's input: RGB,
    `PIXEL_MEAN` [123.675, 116.28, 103.53] and `PIXEL_STD` [58.395, 57.12, 57.375].
    """

    def __init__(
        self,
        name: str,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        *,
        norm: str = "FrozenBN",
        freeze_at: str = "",
        cache_mb: int = 0,
    ) -> None:
        """
        Args:
            name: a classification network of `torchvision.models.list_models`, except for
                vision transformers (ViT, MaxViT), which take images of one size alone.
            out_features: the feature maps, high to low resolution, by Detectron2's names: "res2",
                "res3", "res4", "res5" are the network's last maps of strides 4, 8, 16 and 32. Or
                graph nodes, as `torchvision.models.feature_extraction.get_graph_node_names` lists
                them; a module's name stands for its last node.
            norm: what becomes of the network's batch norm: "FrozenBN" fixes statistics and affine
                parameters, "BN" leaves it as it is, "SyncBN" pools it over all processes. Other
                norms stay as they are.
            freeze_at: a name as in `out_features`: no parameter up to it is trained; "": all are.
            cache_mb: memory (10^6 bytes) for the feature maps of images, so that an image that
                comes back costs nothing; 0: none. It is in use from the first call of `train`, in
                evaluations as well. The network must be frozen as a whole, and is in
                eval mode throughout: one that drops blocks at random in training drops none.

        Raises:
            ValueError: a name is unknown, or a node gives no feature map; `cache_mb` is negative,
                or something of the network is trained.
        """
        super().__init__()
        known = models.list_models(module=models)
        if name not in known:
            raise ValueError(
                f"name must be one of torchvision's, got {name!r}{similar_names(name, known)}"
            )
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        if name.startswith(_ONE_SIZE):
            raise ValueError(
                f"name must be a network for images of any size, and {name} takes one size alone, "
                "which its attention is built for: a Swin or ConvNeXt of that size is the nearest"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of GoogLeNet's initialisation
            network = models.get_model(name, weights=None)
        stages = _stages(network)
        nodes = {x: _node(network, stages, "out_features", x) for x in out_features}
        if len({*nodes.values()}) < len(out_features):
            raise ValueError(f"out_features must be maps of their own, got {list(out_features)}")
        if freeze_at:
            # The extractor has only the layers up to that node, and the network's own parameters.
            last = _node(network, stages, "freeze_at", freeze_at)
            for parameter in _extractor(network, [last]).parameters():
                parameter.requires_grad_(False)
        body = _extractor(network, {node: feature for feature, node in nodes.items()})
        self._maps = _measure(body, name)
        # After the tracing, which would not get through FrozenBatchNorm2d's conditions.
        if norm == "FrozenBN":
            body = FrozenBatchNorm2d.convert_frozen_batchnorm(body)
        elif norm == "SyncBN":
            body = nn.SyncBatchNorm.convert_sync_batchnorm(body)
        self.body = body
        self._cache, self._trains = cache_for(body, cache_mb), False
        if self._cache:
            body.eval()
        self._out_features = list(out_features)
        self._out_feature_channels = {x.name: x.channels for x in self._maps}
        self._out_feature_strides = {x.name: x.stride for x in self._maps}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: (N, 3, H, W), H and W multiples of the largest stride.

        Returns:
            Name to feature map (N, channels, H / stride, W / stride). Those of networks that do not
            pad (AlexNet, SqueezeNet, Inception v3) have fewer cells: their outermost are repeated
            on all sides alike, so that the others lie where they are in the image.
        """
        features = (
            self._cache(self.body, x) if self._cache is not None and self._trains else self.body(x)
        )
        for name, _, stride, channels_last, unpadded in self._maps:
            if channels_last:
                features[name] = features[name].permute(0, 3, 1, 2)
            if unpadded:
                height, width = features[name].shape[2:]
                down, right = x.shape[2] // stride - height, x.shape[3] // stride - width
                edges = (right // 2, right - right // 2, down // 2, down - down // 2)
                features[name] = F.pad(features[name], edges, mode="replicate")
        return features

    def train(self, mode: bool = True) -> "TorchvisionBackbone":
        """As of any module, but a network whose maps are kept stays in eval mode."""
        super().train(mode)
        # A model that never trains sees most images once: maps would fill the memory for nothing.
        self._trains |= mode
        if self._cache:
            self.body.eval()
        return self


def _extractor(network: nn.Module, nodes: Sequence[str] | dict[str, str]) -> nn.Module:
    return create_feature_extractor(network, nodes, suppress_diff_warning=True)


def _map(name: str, x: Any) -> _Map | None:
    """Describes `x` as a feature map of a _PROBE image; None: it is not one."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return None
    for last, channels, sides in (
        (False, x.shape[1], x.shape[2:]),
        (True, x.shape[3], x.shape[1:3]),
    ):
        if not min(sides):
            continue
        down, right = (round(math.log2(n / m)) for n, m in zip(_PROBE, sides, strict=True))
        whole = tuple(n >> max(down, 0) for n in _PROBE)
        if down == right >= 0 and all(m <= n for m, n in zip(sides, whole, strict=True)):
            return _Map(name, channels, 2**down, last, tuple(sides) != whole)
    return None


@torch.no_grad()
def _run(network: nn.Module) -> Any:
    """Its outputs for an image of _PROBE pixels, without numbers: shapes alone cost nothing."""
    return network.eval()(torch.zeros(1, 3, *_PROBE, device="meta"))


def _stages(network: nn.Module) -> dict[int, str]:
    """For each stride, the module that ends it: the last of the least deeply nested ones."""
    ends: dict[int, str] = {}
    shapes = copy.deepcopy(network).to("meta")

    def note(name: str, output: Any) -> None:
        found = _map(name, output) if name else None
        if found and name.count(".") <= ends.get(found.stride, name).count("."):
            ends[found.stride] = name

    for name, module in shapes.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
    _run(shapes)
    return ends


def _node(network: nn.Module, stages: dict[int, str], argument: str, name: str) -> str:
    """The node that `name` stands for."""
    names = {f"res{stride.bit_length() - 1}": node for stride, node in sorted(stages.items())}
    if name in names:
        return names[name]
    nodes = get_graph_node_names(network, suppress_diff_warning=True)[0]
    modules = [".".join(n.split(".")[:i]) for n in nodes for i in range(1, n.count(".") + 2)]
    if name not in modules:
        usable = ", ".join(f"{stage} ({node})" for stage, node in names.items())
        raise ValueError(
            f"{argument} must be of the network's {usable}, or nodes of its graph, got {name!r}"
            f"{similar_names(name, modules)}"
        )
    return name


def _measure(body: nn.Module, name: str) -> list[_Map]:
    """Channels and stride of each feature map."""
    maps = []
    for node, x in _run(copy.deepcopy(body).to("meta")).items():
        found = _map(node, x)
        if found is None:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"out_features must be feature maps (N, C, H / stride, W / stride), but {node} of "
                f"{name} gives {got} for an image of {_PROBE[0]} x {_PROBE[1]}"
            )
        maps.append(found)
    strides = {x.name: x.stride for x in maps}
    if any(b != 2 * a for a, b in pairwise(strides.values())):
        raise ValueError(f"out_features must double the stride from one to the next, got {strides}")
    return maps


def _bottom_up(cfg: CfgNode, input_shape: ShapeSpec) -> TorchvisionBackbone:
    if input_shape.channels != 3:
        raise UserError(
            f"MODEL.PIXEL_MEAN must have 3 entries with a torchvision backbone, "
            f"got {input_shape.channels}"
        )
    node = cfg.MODEL.GHM.TORCHVISION
    try:
        return TorchvisionBackbone(
            node.NAME,
            cfg.MODEL.FPN.IN_FEATURES,
            norm=node.NORM,
            freeze_at=node.FREEZE_AT,
            cache_mb=node.CACHE_MB,
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
            feature maps, as `out_features` of :class:`TorchvisionBackbone`.
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
