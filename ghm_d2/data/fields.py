"""Single values of an annotation file, as labelling tools write them: what each stands for."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_LARGEST = 2.0**53  # above it, floating point does not tell neighbouring whole numbers apart


def number(value: Any) -> float | int | None:
    """A finite number, also one that is written as text; None for everything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
        value = int(value) if math.isfinite(value) and value == int(value) else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    # JSON allows integers of any length; one too large for a float would raise OverflowError.
    return value if -_LARGEST <= value <= _LARGEST else None


def numbers(values: Any, length: int | None = None) -> list[float] | None:
    """A list of finite numbers; None where one is not a number or the length differs.

    The list itself comes back where nothing had to be changed.
    """
    if not isinstance(values, list) or (length is not None and len(values) != length):
        return None
    if all(type(v) is float or type(v) is int for v in values) and all(
        -_LARGEST <= v <= _LARGEST for v in values
    ):
        return values
    found = [number(v) for v in values]
    return None if any(v is None for v in found) else found


def identity(value: Any) -> int | str | None:
    """What an id stands for: 7 for 7, 7.0, "7" and "007" alike; None where it is no id."""
    if isinstance(value, str):
        text = value.strip()
        try:
            return int(text) if text.isascii() and text.lstrip("+-").isdigit() else text
        except ValueError:  # thousands of digits
            return text
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        return value
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else str(value)


_FLAGS = {"": 0, "0": 0, "false": 0, "no": 0, "none": 0, "null": 0, "1": 1, "true": 1, "yes": 1}


def flag(value: Any) -> int | None:
    """0 or 1, however it is written (null is 0); None where it is neither."""
    if value is None:
        return 0
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _FLAGS:
            return _FLAGS[text]
        value = number(text)
    if isinstance(value, int | float) and value in (0, 1):
        return int(value)
    return None


def polygons(value: Any) -> list[list[float]]:
    """The usable polygons of a segmentation: lists x, y, x, y, ... of three points or more.

    One polygon may stand without the list around it, as VIA writes it, and as a list of points.
    """
    if not isinstance(value, list) or not value:
        return []
    if not isinstance(value[0], list):
        value = [value]
    elif len(value) >= 3 and all(isinstance(p, list) and len(p) == 2 for p in value):
        value = [[v for point in value for v in point]]
    found = []
    for polygon in value:
        if isinstance(polygon, list) and polygon and isinstance(polygon[0], list):
            good = all(isinstance(p, list) and len(p) == 2 for p in polygon)
            polygon = [v for point in polygon for v in point] if good else None
        points = numbers(polygon)
        if points is not None and len(points) >= 6 and len(points) % 2 == 0:
            found.append(points)
    return found


def polygon_area(found: Sequence[Sequence[float]]) -> float:
    """The sum of the areas of polygons, in square pixels."""
    total = 0.0
    for polygon in found:
        x, y = np.reshape(np.asarray(polygon, dtype=float), (-1, 2)).T
        total += abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
    return total


def polygon_box(found: Sequence[Sequence[float]]) -> list[float]:
    """x, y, width, height of the box around polygons, at least one."""
    points = np.concatenate([np.reshape(np.asarray(p, dtype=float), (-1, 2)) for p in found])
    low, high = points.min(0), points.max(0)
    return [float(v) for v in (*low, *(high - low))]


def rle_area(value: Any, height: int, width: int) -> int | None:
    """The pixels of a mask in COCO's run-length encoding; None where it is none of this size.

    The sum of the runs is checked because pycocotools would decode runs that end too early with
    uninitialized memory for the rest.
    """
    if not isinstance(value, dict) or numbers(value.get("size"), 2) != [height, width]:
        return None
    runs = value.get("counts")
    if isinstance(runs, str):
        runs = _decompress(runs)
    runs = numbers(runs)
    if runs is None or sum(runs) != height * width or any(v < 0 or v != int(v) for v in runs):
        return None
    return int(sum(runs[1::2]))


def _decompress(text: str) -> list[int] | None:
    """The runs of COCO's text form.

    Each character, minus 48, holds five bits of a run, lowest first; its sixth bit says that the
    run continues in the next character. The fifth bit of the last character is the sign. From the
    fourth run on, the value is the difference to the run two places before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return None if shift else runs
