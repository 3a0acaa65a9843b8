"""The anchors of a config against the boxes that it trains on, as a line of the log."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode

from .anchors import ENOUGH_IOU, Anchors, InputSize, best_shape_iou, suggest
from .augmentation import sets_size

logger = logging.getLogger(__name__)

_MOST_BOXES = 20_000
_WORDS = {
    "sizes": 'MODEL.ANCHOR_GENERATOR.SIZES "{}"',
    "ratios": 'MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS "{}"',
    "train": 'INPUT.MIN_SIZE_TRAIN "{}" INPUT.MAX_SIZE_TRAIN {}',
    "test": "INPUT.MIN_SIZE_TEST {} INPUT.MAX_SIZE_TEST {}",
}


@dataclass(frozen=True)
class AnchorSettings:
    """What a config says of anchors and of the resize, and what its user types to change that.

    Attributes:
        anchors: of RetinaNet or the RPN.
        input_size: that of the training images.
        words: for "sizes", "ratios", "train" and "test" input, a format string of the values.
        is_range: whether the shorter side is drawn from a range.
    """

    anchors: Anchors
    input_size: InputSize
    words: Mapping[str, str]
    is_range: bool = False

    @classmethod
    def of(cls, cfg: CfgNode) -> "AnchorSettings | None":
        """The settings of a Detectron2 config.

        None without axis-aligned anchors, and where `MODEL.GHM.AUGMENTATIONS` sets the size of
        images.
        """
        anchors, is_range = configured_anchors(cfg), cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
        if anchors is None or sets_size(cfg):
            return None
        size = InputSize.drawn_from(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, is_range)
        return cls(anchors, size, _WORDS, is_range)


def log_anchor_fit(settings: AnchorSettings | None, records: Sequence[dict[str, Any]]) -> None:
    """Log how many boxes have an anchor that fits; a warning with a way out where most have none.

    Args:
        settings: of the training.
        records: Detectron2's dictionaries of the images that are trained on.
    """
    text, fits = anchor_report(settings, records)
    if text:
        logger.log(logging.INFO if fits else logging.WARNING, "%s", text)


def anchor_report(
    settings: AnchorSettings | None, records: Sequence[dict[str, Any]]
) -> tuple[str, bool]:
    """How well the anchors fit, in words.

    Args:
        settings: of the training; None where the detector has no axis-aligned anchors.
        records: Detectron2's dictionaries of the images that are trained on; of many boxes, those
            of every k-th image are looked at.

    Returns:
        The text, empty without anchors or without a box, and whether most boxes have an anchor with
        IoU 0.5 or more.
    """
    boxes, images, every = _box_sizes(records)
    if settings is None or not len(boxes):
        return "", True
    iou = best_shape_iou(settings.input_size.resize(boxes, images), settings.anchors)
    share = float((iou >= ENOUGH_IOU).mean())
    text = (
        f"{share:.0%} of {len(boxes):,} boxes{f' (1 image in {every})' if every > 1 else ''} have "
        f"an anchor with IoU >= {ENOUGH_IOU} by shape, after the resize of the training images"
    )
    if share > 0.5:
        return text, True
    return (
        f"Most boxes have no anchor that fits: only {text}. {_way_out(settings, boxes, images)}",
        False,
    )


def _way_out(settings: AnchorSettings, boxes: np.ndarray, images: np.ndarray) -> str:
    anchors, size = settings.anchors, settings.input_size
    found = suggest(boxes, images, anchors, size)
    if found is None:
        typical = np.median(size.resize(boxes, images), axis=0)
        return (
            f"A typical box then has {typical[0]:.0f} x {typical[1]:.0f} pixels, and neither other "
            "anchor sizes and ratios nor an input of four times the size would fit most boxes: "
            "look at them with ghm-d2 look."
        )
    words = []
    if found.anchors.sizes != anchors.sizes:
        words.append(settings.words["sizes"].format(_lists(found.anchors.sizes)))
    if found.anchors.ratios != anchors.ratios:
        words.append(settings.words["ratios"].format(_lists(found.anchors.ratios[:1])))
    if found.input_size != size:
        shortest, longest = list(found.input_size.shortest), found.input_size.longest
        if settings.is_range:
            shortest = [shortest[0], shortest[-1]]
        words.append(settings.words["train"].format(shortest, longest))
        words.append(settings.words["test"].format(max(shortest), longest))
    return f"With these settings it would be {found.share:.0%}: {' '.join(words)}"


def _lists(levels: Sequence[Sequence[float]]) -> str:
    rows = (", ".join(f"{value:.4g}" for value in level) for level in levels)
    return f"[{', '.join(f'[{row}]' for row in rows)}]"


def configured_anchors(cfg: CfgNode) -> Anchors | None:
    """The anchors of RetinaNet or the RPN; None without any, or with rotated ones.

    Strides are read off Detectron2's names of features: p3 and res3 have stride 8.
    """
    node = cfg.MODEL.ANCHOR_GENERATOR
    if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE:
        features = cfg.MODEL.RETINANET.IN_FEATURES
    elif cfg.MODEL.PROPOSAL_GENERATOR.NAME.endswith("RPN"):
        features = cfg.MODEL.RPN.IN_FEATURES
    else:
        return None
    if node.NAME != "DefaultAnchorGenerator":
        return None
    matches = (re.fullmatch(r"(?:p|res)(\d)", name) for name in features)
    strides = tuple(2 ** int(match[1]) if match else 0 for match in matches)
    return Anchors.of_levels(node.SIZES, node.ASPECT_RATIOS, strides)


def _box_sizes(records: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, int]:
    """Widths and heights of boxes (N, 2), those of their images (N, 2), and the step in images."""
    records = [r for r in records if "width" in r and "height" in r]  # a loader may leave them out
    total = sum(len(record.get("annotations", ())) for record in records)
    every = -(-total // _MOST_BOXES) or 1
    boxes, images = [], []
    for record in records[::every]:
        for annotation in record.get("annotations", ()):
            mode = annotation["bbox_mode"]
            if mode == BoxMode.XYWH_ABS:
                sides = annotation["bbox"][2:]
            elif mode == BoxMode.XYXY_ABS:
                x0, y0, x1, y1 = annotation["bbox"]
                sides = (x1 - x0, y1 - y0)
            else:
                continue  # rotated
            if not annotation.get("iscrowd", 0) and min(sides) > 0:
                boxes.append(sides)
                images.append((record["width"], record["height"]))
    return (
        np.array(boxes, dtype=float).reshape(-1, 2),
        np.array(images, float).reshape(-1, 2),
        every,
    )
