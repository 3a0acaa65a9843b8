"""Splitting COCO-format data by image, the same way on every machine."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghm_d2.errors import UserError, cannot, counted


def choose(names: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Choose a fraction of names at random; their order does not matter.

    Args:
        names: at least two different ones.
        fraction: in (0, 1); at least one name is chosen and one is not.
        seed: a different seed gives a different choice.

    Raises:
        UserError: the fraction is out of range, or there are fewer than two names.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the fraction must lie between 0 and 1, got {fraction:g}.")
    unique = list(set(names))
    if len(unique) < 2:
        raise UserError(f"a split needs at least two images, got {len(unique)}.")
    number = min(max(round(fraction * len(unique)), 1), len(unique) - 1)
    return set(_ordered(unique, seed)[:number])


def _ordered(names: Sequence[str], seed: int) -> list[str]:
    """Sorted by a hash: the same on every Python, and new names do not reorder the others."""
    return sorted(
        names,
        key=lambda name: hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest(),
    )


def split_coco(
    content: Mapping[str, Any], fraction: float, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split COCO-format content into two by image; all other keys go into both.

    Args:
        content: the checked content of a file.
        fraction: share of the images in the second part, in (0, 1).
        seed: a different seed gives a different split.

    Returns:
        The rest and the chosen part. Images with the same file name stay together.

    Raises:
        UserError: as :func:`choose`.
    """
    return _parts(content, choose([row["file_name"] for row in content["images"]], fraction, seed))


def fold_coco(
    content: Mapping[str, Any], folds: int, seed: int
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Split COCO-format content in two, `folds` times, so that each image is held out once.

    Args:
        content: the checked content of a file.
        folds: at least 2, and not more than there are images.
        seed: a different seed gives different folds.

    Returns:
        For each fold the rest, and the part that is held out.

    Raises:
        UserError: the number of folds is out of range.
    """
    names = _ordered(list({row["file_name"] for row in content["images"]}), seed)
    if not 2 <= folds <= len(names):
        raise UserError(
            f"the number of folds must lie between 2 and the number of images, {len(names)}, got "
            f"{folds}."
        )
    return [_parts(content, set(names[fold::folds])) for fold in range(folds)]


def _parts(content: Mapping[str, Any], chosen: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    parts = []
    for inside in (False, True):
        images = [row for row in content["images"] if (row["file_name"] in chosen) == inside]
        ids = {row["id"] for row in images}
        annotations = [row for row in content["annotations"] if row["image_id"] in ids]
        parts.append({**content, "images": images, "annotations": annotations})
    return parts[0], parts[1]


def describe(name: str, content: Mapping[str, Any]) -> str:
    """One line: how many images, and how many objects of each class, the rarest ones last."""
    classes = {row["id"]: row["name"] for row in content["categories"]}
    counts = Counter(row["category_id"] for row in content["annotations"])
    ordered = sorted(classes, key=lambda number: -counts[number])
    shown = ", ".join(f"{classes[number]} {counts[number]:,}" for number in ordered[:12])
    more = f", and {counted(len(ordered) - 12, 'class')} more" if len(ordered) > 12 else ""
    none = sum(not counts[number] for number in classes)
    missing = f"; {none} of {len(classes)} classes have no object here" if none else ""
    return (
        f"{name}: {counted(len(content['images']), 'image')}, "
        f"{counted(len(content['annotations']), 'object')} ({shown}{more}){missing}"
    )


def write_coco(parts: Mapping[Path, Any]) -> None:
    """Write each content to its file and create its folder; nothing is overwritten.

    Raises:
        UserError: a file exists already, and none is written; or a file cannot be written.
    """
    for file in parts:
        if file.exists():
            raise UserError(f"{file} exists already: delete it, or name another output.")
    for file, content in parts.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content), encoding="utf-8")
        except OSError as error:
            raise cannot("written", file, error) from error
