"""Files of other software: networks as random tensors, by their own conventions, and code."""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def _norm(name: str, channels: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.rand(channels) + 0.5,
        f"{name}.bias": torch.randn(channels) * 0.1,
        f"{name}.running_mean": torch.randn(channels) * 0.1,
        f"{name}.running_var": torch.rand(channels) + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(channels),
    }


def _conv(name: str, out: int, into: int, kernel: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.randn(out, into, kernel, kernel) * 0.1}


def torchvision_resnet(
    depth: int = 50, stem: int = 4, planes: int = 4, groups: int = 1, width: int | None = None
) -> dict[str, Tensor]:
    """A bottleneck ResNet without classifier.

    Args:
        depth: 50 or 101.
        stem: channels after the first convolution.
        planes: a quarter of layer1's output channels.
        groups: groups of the 3 x 3 convolutions.
        width: channels of a group in layer1; None: as many as `planes` in one group.
    """
    state = {**_conv("conv1", stem, 3, 7), **_norm("bn1", stem)}
    into, width = stem, groups * (width or planes)
    for stage, count in enumerate(BLOCKS[depth], 1):
        out = 4 * planes
        for block in range(count):
            name = f"layer{stage}.{block}"
            state |= {**_conv(f"{name}.conv1", width, into, 1), **_norm(f"{name}.bn1", width)}
            state |= _conv(f"{name}.conv2", width, width // groups, 3)
            state |= {**_norm(f"{name}.bn2", width), **_conv(f"{name}.conv3", out, width, 1)}
            state |= _norm(f"{name}.bn3", out)
            if block == 0:
                state |= _conv(f"{name}.downsample.0", out, into, 1)
                state |= _norm(f"{name}.downsample.1", out)
            into = out
        planes, width = 2 * planes, 2 * width
    return state


def _layer(name: str, out: int, into: int, kernel: int) -> dict[str, Tensor]:
    return {**_conv(name, out, into, kernel), f"{name}.bias": torch.randn(out) * 0.1}


def mmdet_retinanet(
    *, fpn: int = 8, convs: int = 2, classes: int = 3, anchors: int = 9, bins=(30, 10), **resnet
) -> dict[str, Tensor]:
    """The state dict of mmdetection's RetinaNet; `bins` None: losses without buffers."""
    planes = resnet.get("planes", 4)
    backbone = torchvision_resnet(**resnet)
    state = {f"backbone.{name}": x for name, x in backbone.items()}
    for i in range(3):
        state |= _layer(f"neck.lateral_convs.{i}.conv", fpn, planes * 8 * 2**i, 1)
    for i in range(5):
        state |= _layer(f"neck.fpn_convs.{i}.conv", fpn, planes * 32 if i == 3 else fpn, 3)
    for loss, count, last in zip(("cls", "bbox"), bins or (), (1 + 1e-6, 1e3), strict=False):
        edges = torch.arange(count + 1) / count
        edges[-1] = last
        state[f"bbox_head.loss_{loss}.edges"] = edges
        state[f"bbox_head.loss_{loss}.acc_sum"] = torch.rand(count) * 1000
    for part in ("cls", "reg"):
        for i in range(convs):
            state |= _layer(f"bbox_head.{part}_convs.{i}.conv", fpn, fpn, 3)
    state |= _layer("bbox_head.retina_cls", anchors * classes, fpn, 3)
    return state | _layer("bbox_head.retina_reg", anchors * 4, fpn, 3)


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call
