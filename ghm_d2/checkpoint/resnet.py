"""ResNet and ResNeXt in torchvision's layout, which mmdetection shares, and in Detectron2's."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ghm_d2.errors import UserError

from .rename import shape_of

# Depths that Detectron2 builds, by blocks of each stage and whether these are bottlenecks.
_DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
DETECTRON2_STAGES = ("res2", "res3", "res4", "res5")
_NORM = ("weight", "bias", "running_mean", "running_var")

# What torchvision normalises images with, for RGB in 0 .. 255.
IMAGENET_INPUT: dict[str, Any] = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
}


@dataclass(frozen=True)
class ResNetArchitecture:
    """What the tensors of a ResNet show of it; channels are counts."""

    blocks: tuple[int, ...]
    bottleneck: bool
    stem_channels: int
    res2_channels: int
    groups: int
    width_per_group: int

    def settings(self) -> dict[str, Any]:
        """The `MODEL.RESNETS` keys that make Detectron2 build this network."""
        return {
            "MODEL.RESNETS.DEPTH": _DEPTHS[self.blocks, self.bottleneck],
            "MODEL.RESNETS.STEM_OUT_CHANNELS": self.stem_channels,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": self.res2_channels,
            "MODEL.RESNETS.NUM_GROUPS": self.groups,
            "MODEL.RESNETS.WIDTH_PER_GROUP": self.width_per_group,
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
        }

    def names(self) -> dict[str, str]:
        """From torchvision's tensor names, in torchvision's order, to Detectron2's."""
        names = {"conv1.weight": "stem.conv1.weight"}
        names |= {f"bn1.{x}": f"stem.conv1.norm.{x}" for x in _NORM}
        for stage, count in enumerate(self.blocks, 1):
            for block in range(count):
                old, new = f"layer{stage}.{block}", f"res{stage + 1}.{block}"
                for conv in range(1, 4 if self.bottleneck else 3):
                    names[f"{old}.conv{conv}.weight"] = f"{new}.conv{conv}.weight"
                    names |= {f"{old}.bn{conv}.{x}": f"{new}.conv{conv}.norm.{x}" for x in _NORM}
                if block == 0 and (stage > 1 or self.stem_channels != self.res2_channels):
                    names[f"{old}.downsample.0.weight"] = f"{new}.shortcut.weight"
                    names |= {f"{old}.downsample.1.{x}": f"{new}.shortcut.norm.{x}" for x in _NORM}
        return names


def read_resnet(
    state: Mapping[str, Tensor],
    prefix: str = "",
    stem: str = "conv1.weight",
    stages: Sequence[str] = ("layer1", "layer2", "layer3", "layer4"),
) -> ResNetArchitecture:
    """Reads the architecture off the tensors; the shapes of most are not looked at here.

    Args:
        state: tensors by their names.
        prefix: what stands before the names of the backbone.
        stem: name of the first convolution, in torchvision's layout unless another is given.
        stages: names of the stages.

    Raises:
        UserError: it is no ResNet that Detectron2 builds; the message lacks the file's name.
    """
    pattern = rf"{re.escape(prefix)}({'|'.join(stages)})\.(\d+)\..*"
    indices = {x.groups() for name in state if (x := re.fullmatch(pattern, name))}
    if not indices:
        raise UserError(
            f"it has no tensors {prefix}{stages[0]} to {stages[-1]}, so its backbone is no ResNet."
        )
    blocks = tuple(sum(stage == x for x, _ in indices) for stage in stages)
    first = f"{prefix}{stages[0]}.0"
    bottleneck = f"{first}.conv3.weight" in state
    if (blocks, bottleneck) not in _DEPTHS:
        raise UserError(
            f"its backbone has {'-'.join(map(str, blocks))} "
            f"{'bottleneck' if bottleneck else 'basic'} blocks in {stages[0]} to {stages[-1]}, "
            "which is no ResNet of depth 18, 34, 50, 101 or 152."
        )
    channels, _, *kernel = shape_of(state, f"{prefix}{stem}", 4)
    if kernel != [7, 7]:
        raise UserError(
            f"its stem's convolution is {kernel[0]} x {kernel[1]} and Detectron2's is 7 x 7."
        )
    width, width_per_group = shape_of(state, f"{first}.conv2.weight", 4)[:2]
    if not bottleneck:
        width, width_per_group = 64, 64  # Detectron2's default, which basic blocks do not use
    return ResNetArchitecture(
        blocks=blocks,
        bottleneck=bottleneck,
        stem_channels=channels,
        res2_channels=shape_of(state, f"{first}.conv{3 if bottleneck else 2}.weight", 4)[0],
        groups=max(width // width_per_group, 1),
        width_per_group=width_per_group,
    )
