"""What a data set is made of: its classes, the sizes and shapes of its boxes, their number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from ghm_d2.errors import counted

_SMALL, _MEDIUM = 32, 96  # COCO's limits, square roots of areas in pixels
_RARE = 0.1  # a class is rare below this share of the mean number of boxes per class
_SHOWN = 30  # classes that are listed one by one


@dataclass(frozen=True)
class DataStatistics:
    """Figures of the boxes that training sees: neither crowds nor boxes without area.

    Attributes:
        name: the name of the data set.
        classes: class names.
        sides: (N, 2) float64, widths and heights in pixels.
        labels: (N,) int64, index of the class.
        images: (M, 2) int64, widths and heights of the images.
        per_image: (M,) int64, boxes in each image.
        crowds, empty: boxes that are left out, because they are crowd regions or have no area.
    """

    name: str
    classes: tuple[str, ...]
    sides: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    per_image: np.ndarray
    crowds: int
    empty: int

    @property
    def sizes(self) -> np.ndarray:
        """(N,) square roots of the areas in pixels."""
        return np.sqrt(self.sides.prod(1))

    @property
    def ratios(self) -> np.ndarray:
        """(N,) height / width."""
        return self.sides[:, 1] / self.sides[:, 0]

    @property
    def class_counts(self) -> np.ndarray:
        """(K,) boxes of each class."""
        return np.bincount(self.labels, minlength=len(self.classes))


def count_data(
    name: str, records: Sequence[dict[str, Any]], classes: Sequence[str]
) -> DataStatistics:
    """Collect the figures of a data set.

    Args:
        name: the name of the data set.
        records: Detectron2's dictionaries, at least one.
        classes: class names; an id beyond their number becomes the name of its class.
    """
    sides, labels, per_image, crowds, empty = [], [], [], 0, 0
    for record in records:
        before = len(sides)
        for annotation in record.get("annotations", ()):
            x0, y0, x1, y1 = BoxMode.convert(
                annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS
            )
            if annotation.get("iscrowd", 0):
                crowds += 1
            elif x1 <= x0 or y1 <= y0:
                empty += 1
            else:
                sides.append((x1 - x0, y1 - y0))
                labels.append(annotation["category_id"])
        per_image.append(len(sides) - before)
    numbered = [str(k) for k in range(len(classes), max(labels, default=-1) + 1)]
    return DataStatistics(
        name,
        (*classes, *numbered),
        np.array(sides, dtype=float).reshape(-1, 2),
        np.array(labels, dtype=np.int64),
        np.array([(record["width"], record["height"]) for record in records]),
        np.array(per_image),
        crowds,
        empty,
    )


def summary(data: DataStatistics) -> str:
    """The figures in words, some twenty lines."""
    number = len(data.sides)
    lines = [
        f"{data.name}: {counted(len(data.images), 'image')}, {counted(number, 'box')}, "
        f"{counted(len(data.classes), 'class')}",
        f"images: {_quantiles(data.images[:, 0])} wide, {_quantiles(data.images[:, 1])} high "
        "(smallest / median / largest, pixels)",
    ]
    if data.crowds or data.empty:
        lines.append(
            f"not counted below: {counted(data.crowds, 'crowd region')}, "
            f"{counted(data.empty, 'box')} without area"
        )
    if not number:
        return "\n".join([*lines, "there are no boxes"])
    small, large = (data.sizes < _SMALL).mean(), (data.sizes >= _MEDIUM).mean()
    lines += [
        f"boxes per image: {_quantiles(data.per_image)} (fewest / median / most), "
        f"{counted((data.per_image == 0).sum(), 'image')} without any",
        f"box size (square root of the area): {_quantiles(data.sizes)} pixels; "
        f"{small:.0%} small (< {_SMALL}), {1 - small - large:.0%} medium, "
        f"{large:.0%} large (>= {_MEDIUM})",
        "aspect ratio (height / width): "
        + " / ".join(f"{v:.2g}" for v in np.quantile(data.ratios, (0.05, 0.5, 0.95)))
        + " (5 % / median / 95 %)",
        *_imbalance(data),
        *_class_table(data),
    ]
    return "\n".join(lines)


def _quantiles(values: np.ndarray) -> str:
    return " / ".join(f"{v:.0f}" for v in np.quantile(values, (0, 0.5, 1)))


def _imbalance(data: DataStatistics) -> list[str]:
    counts = data.class_counts
    most, present = int(counts.argmax()), counts[counts > 0]
    lines = []
    if len(present) > 1:
        lines.append(
            f"imbalance: {data.classes[most]} has {counts[most] / counts.sum():.0%} of the boxes, "
            f"{counts[most] / present.min():.1f} times as many as the rarest class"
        )
    rare = np.flatnonzero((counts > 0) & (counts < _RARE * counts.mean()))
    if len(rare):
        names = ", ".join(data.classes[k] for k in rare[np.argsort(counts[rare])][:8])
        have = f"{counted(len(rare), 'class')} {'has' if len(rare) == 1 else 'have'}"
        lines.append(f"  {have} less than a tenth of the mean number: {names}")
    if absent := [data.classes[k] for k in np.flatnonzero(counts == 0)]:
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        have = f"{counted(len(absent), 'class')} {'has' if len(absent) == 1 else 'have'}"
        lines.append(f"  {have} no box: {', '.join(absent[:8])}{more}")
    return lines


def _class_table(data: DataStatistics) -> list[str]:
    counts = data.class_counts
    shown = [k for k in np.argsort(-counts, kind="stable") if counts[k]][:_SHOWN]
    width = max(5, *(len(data.classes[k]) for k in shown))
    lines = [f"{'class':<{width}}    boxes  share  median size  height / width"]
    for k in shown:
        own = data.labels == k
        lines.append(
            f"{data.classes[k]:<{width}}  {counts[k]:>7,}  {counts[k] / counts.sum():>5.1%}  "
            f"{np.median(data.sizes[own]):>11.0f}  {np.median(data.ratios[own]):>14.2f}"
        )
    if (left := int((counts > 0).sum()) - len(shown)) > 0:
        lines.append(f"... and {counted(left, 'rarer class')}")
    return lines
