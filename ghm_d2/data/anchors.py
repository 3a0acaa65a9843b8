"""Whether the anchors fit the boxes of the training data, and which anchors would.

A box trains the anchors with which its IoU is high enough. If there is none, it trains at best the
single best anchor, and with small objects or a small network input the detector finds nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

ENOUGH_IOU = 0.5
_GOOD_SHARE = 0.8  # of the boxes: a suggestion that reaches it is not improved any further
_STEPS = sorted(range(-12, 13), key=abs)  # of a third of an octave, the smallest change first
_ENLARGEMENTS = (1, 1.5, 2, 3, 4)
_WORTH_IT = 0.05  # of the boxes: what other ratios or a larger input must win
_MOST_BOXES = 1000  # for the search


@dataclass(frozen=True)
class Anchors:
    """The anchors of a detector, level by level.

    Attributes:
        sizes: for each level, the square roots of the anchors' areas, in pixels of the input.
        ratios: for each level, height / width.
        strides: for each level, the distance of neighbouring anchors in pixels of the input; 0
            where it is not known.
    """

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[tuple[float, ...], ...]
    strides: tuple[int, ...]

    @classmethod
    def of_levels(
        cls, sizes: Sequence[Any], ratios: Sequence[Any], strides: Sequence[int]
    ) -> "Anchors | None":
        """From the arguments of Detectron2's generator, where one list stands for all levels.

        Returns:
            None where neither one list nor one a level is given.
        """

        def levels(lists: Sequence[Any]) -> tuple[tuple[float, ...], ...]:
            lists = [lists] if isinstance(lists[0], int | float) else list(lists)
            lists = lists * len(strides) if len(lists) == 1 else lists
            return tuple(tuple(map(float, level)) for level in lists)

        found = cls(levels(sizes), levels(ratios), tuple(strides))
        return found if len(found.sizes) == len(found.ratios) == len(strides) else None

    def shapes(self) -> np.ndarray:
        """(A, 3): width, height and stride of each anchor."""
        levels = zip(self.sizes, self.ratios, self.strides, strict=True)
        return np.array(
            [
                (size / math.sqrt(ratio), size * math.sqrt(ratio), stride)
                for sizes, ratios, stride in levels
                for size in sizes
                for ratio in ratios
            ]
        )

    def scaled(self, factor: float) -> "Anchors":
        """The same with all sizes times `factor`, rounded as one would write them into a config."""
        sizes = tuple(tuple(_round(size * factor) for size in level) for level in self.sizes)
        return replace(self, sizes=sizes)

    def in_octaves(self) -> "Anchors":
        """The same number per level, evenly spaced in octaves; each level doubles the last."""
        first = self.sizes[0][0]
        sizes = tuple(
            tuple(first * 2 ** (level + k / len(own)) for k in range(len(own)))
            for level, own in enumerate(self.sizes)
        )
        return replace(self, sizes=sizes)


@dataclass(frozen=True)
class InputSize:
    """How images are resized: the shorter side to one of `shortest`, the longer to `longest`.

    Attributes:
        shortest: in pixels; boxes are resized with one of them after the other. (0,): no resize.
        longest: pixels.
    """

    shortest: tuple[int, ...]
    longest: int

    @classmethod
    def drawn_from(cls, shortest: Sequence[int], longest: int, is_range: bool) -> "InputSize":
        """From the settings of Detectron2's resize; of a range, three sizes are taken."""
        first, last = shortest[0], shortest[-1]
        return cls((first, (first + last) // 2, last) if is_range else tuple(shortest), longest)

    def resize(self, boxes: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Widths and heights of boxes in the resized images.

        Args:
            boxes: (N, 2) widths and heights.
            images: (N, 2), those of the image of each box.

        Returns:
            (N, 2), float64.
        """
        if not all(self.shortest):
            return boxes.astype(float)
        shortest = np.resize(np.array(self.shortest, dtype=float), len(boxes))
        scale = np.minimum(shortest / images.min(1), self.longest / images.max(1))
        return boxes * scale[:, None]

    def enlarged(self, factor: float) -> "InputSize":
        """Both sides times `factor`."""
        shortest = tuple(round(side * factor) for side in self.shortest)
        return InputSize(shortest, round(self.longest * factor))


@dataclass(frozen=True)
class Suggestion:
    """Anchors, and an input size, that fit better.

    Attributes:
        anchors, input_size: as the arguments of :func:`suggest`, with other values.
        share: of the boxes with an anchor of IoU 0.5 or more, computed with these very values.
    """

    anchors: Anchors
    input_size: InputSize
    share: float


def best_shape_iou(boxes: np.ndarray, anchors: Anchors) -> np.ndarray:
    """IoU of each box with the anchor that fits it best.

    The centre of a box lies up to half a stride from that of the nearest anchor in each direction,
    a quarter on average, which is what is assumed here: so an anchor with the shape of the box
    itself need not reach IoU 1.

    Args:
        boxes: (N, 2) widths and heights in pixels of the network's input, above 0.
        anchors: at least one.

    Returns:
        (N,) float64 in [0, 1].
    """
    width, height = boxes.T.astype(float)
    anchor_width, anchor_height, stride = anchors.shapes().T[:, :, None]
    overlap = _overlap(width, anchor_width, stride) * _overlap(height, anchor_height, stride)
    return (overlap / (width * height + anchor_width * anchor_height - overlap)).max(0)


def _overlap(side: np.ndarray, anchor: np.ndarray, stride: np.ndarray) -> np.ndarray:
    shifted = (side + anchor) / 2 - stride / 4
    return np.maximum(np.minimum(np.minimum(side, anchor), shifted), 0)


def suggest(
    boxes: np.ndarray, images: np.ndarray, anchors: Anchors, input_size: InputSize
) -> Suggestion | None:
    """Look for anchors that fit most boxes, changing as little as possible.

    Tried in this order: all sizes times one factor; sizes that double from level to level; both
    with the aspect ratios of the data; all of that with a larger input. The first that fits 80 % of
    the boxes is taken, else the best.

    Args:
        boxes: (N, 2) widths and heights in pixels of the original images, above 0.
        images: (N, 2), those of the image of each box.
        anchors: those of the config.
        input_size: that of the config.

    Returns:
        None where nothing that was tried fits most of the boxes.
    """
    every = -(-len(boxes) // _MOST_BOXES)
    few, their_images = boxes[::every], images[::every]
    typical = tuple(_typical_ratios(few) for _ in anchors.ratios)
    kinds = [anchors]
    if not np.allclose(anchors.in_octaves().shapes(), anchors.shapes()):
        kinds.append(anchors.in_octaves())
    kinds += [replace(kind, ratios=typical) for kind in kinds]
    best = None
    for enlargement in _ENLARGEMENTS if all(input_size.shortest) else (1,):
        larger = input_size.enlarged(enlargement)
        resized = larger.resize(few, their_images)
        for kind in kinds:
            tried = [kind.scaled(2 ** (k / 3)) for k in _STEPS]
            shares = [_share(resized, scaled) for scaled in tried]
            if best is None or best.share < _GOOD_SHARE and max(shares) > best.share + _WORTH_IT:
                first = shares.index(max(shares))
                best = Suggestion(tried[first], larger, shares[first])
        if best.share >= _GOOD_SHARE:
            break
    exact = _share(best.input_size.resize(boxes, images), best.anchors)
    return replace(best, share=exact) if exact > 0.5 else None


def _share(boxes: np.ndarray, anchors: Anchors) -> float:
    return float((best_shape_iou(boxes, anchors) >= ENOUGH_IOU).mean())


def _typical_ratios(boxes: np.ndarray) -> tuple[float, ...]:
    """The quantiles 1/6, 1/2 and 5/6 of height / width, to two digits, without repeats."""
    ratios = np.quantile(boxes[:, 1] / boxes[:, 0], (1 / 6, 1 / 2, 5 / 6))
    return tuple(dict.fromkeys(float(f"{ratio:.2g}") for ratio in ratios))


def _round(size: float) -> float:
    """To three digits, whole pixels from 10 on."""
    return round(size) if size >= 10 else round(size, 1)
