"""Annotation noise on purpose: wrong classes, missing, moved and spurious boxes, all on record."""

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pycocotools import mask as mask_util

from ghm_d2.errors import UserError

KINDS = ("wrong class", "missing", "moved", "spurious")

_MOVED = (0.4, 0.7)  # IoU of a moved box with the true one: wrong for COCO, and still its object
_JITTER = 0.25  # standard deviation of the shift of each side, in widths and heights
_FREE = 0.1  # largest IoU of a spurious box with a true one, where the image has room for it
_TRIES = 256

Row = dict[str, Any]


def box_ious(boxes: ArrayLike, others: ArrayLike, crowd: Sequence[int] | None = None) -> np.ndarray:
    """IoU of (N, 4) with (M, 4) boxes, all of them x, y, width, height; (N, M) float64.

    Where `crowd` is 1, it is the share of the first box that lies in the other, as in COCO.
    """
    one, two = (np.asarray(x, float).reshape(-1, 4) for x in (boxes, others))
    found = mask_util.iou(one, two, [0] * len(two) if crowd is None else list(crowd))
    return np.asarray(found, float).reshape(len(one), len(two))


def corrupt_coco(
    content: Mapping[str, Any], shares: Mapping[str, float], seed: int, first_id: int = 1
) -> tuple[dict[str, Any], list[Row]]:
    """Copy COCO-format content with errors in it.

    Each object gets at most one kind of error. With one kind alone and the same seed, a larger
    share includes all errors of a smaller one. Crowd regions do not count as objects and stay as
    they are. The mask and keypoints of a moved box stay where they were.

    Args:
        content: the checked content of a file; is not changed.
        shares: of the objects, in [0, 1], by kind (see `KINDS`); spurious boxes come on top of
            them, the other kinds cannot be more than 1 together.
        seed: a different seed gives different errors.
        first_id: of the spurious boxes, or the one after the largest id where that is larger.

    Returns:
        The copy, and one entry for each error: `annotation_id`, `image_id`, `kind`, and `before`
        and `after`, the fields that have changed; None for an annotation that is not there. That of
        a moved box has its `iou` with the true one, that of a spurious box its largest with any
        true one.

    Raises:
        UserError: a share is out of range, there is no other class, or an image has no size.
    """
    _check(content, shares)
    rows = [dict(row) for row in content.get("annotations", ())]
    objects = [row for row in rows if not row.get("iscrowd")]
    chosen = _choose([row["id"] for row in objects], shares, seed)
    by_id = {row["id"]: row for row in objects}
    sizes = {row["id"]: (row.get("width"), row.get("height")) for row in content["images"]}
    changes: list[Row] = []

    def note(row: Row, kind: str, before: Row | None, after: Row | None, **more: float) -> None:
        where = {"annotation_id": row["id"], "image_id": row["image_id"], "kind": kind}
        changes.append({**where, "before": before, "after": after, **more})

    classes = sorted(row["id"] for row in content["categories"])
    for ident in chosen["wrong class"]:
        row = by_id[ident]
        others = [k for k in classes if k != row["category_id"]]
        new = others[int(_random(seed, "wrong class", ident).random() * len(others))]
        note(row, "wrong class", {"category_id": row["category_id"]}, {"category_id": new})
        row["category_id"] = new
    for ident in chosen["missing"]:
        note(by_id[ident], "missing", dict(by_id[ident]), None)
    for ident in chosen["moved"]:
        row = by_id[ident]
        box, iou = _move(row["bbox"], sizes[row["image_id"]], _random(seed, "moved", ident))
        new = {"bbox": box}
        if not row.get("segmentation"):
            new["area"] = box[2] * box[3]  # otherwise it is the mask's
        note(row, "moved", {name: row.get(name) for name in new}, new, iou=iou)
        row.update(new)
    gone = set(chosen["missing"])
    rows = [row for row in rows if row.get("iscrowd") or row["id"] not in gone]
    number = _rounded(shares.get("spurious", 0), len(objects))
    for row, iou in _spurious(content, number, seed, first_id):
        note(row, "spurious", None, dict(row), iou=iou)
        rows.append(row)
    return {**content, "annotations": rows}, changes


def check_shares(shares: Mapping[str, float]) -> None:
    """Raises UserError unless they are shares of `KINDS`, of one error for each object."""
    for kind, share in shares.items():
        if kind not in KINDS:
            raise UserError(f"there is no kind of error {kind!r}; there are {', '.join(KINDS)}.")
        if not 0 <= share <= 1:
            raise UserError(f"the share of {kind!r} must lie in [0, 1], got {share:g}.")
    whole = math.fsum(share for kind, share in shares.items() if kind != "spurious")
    if whole > 1 + 1e-9:
        raise UserError(
            f"the shares of wrong classes, missing and moved boxes add up to {whole:g}, but each "
            "object has one error at most: give shares that add up to at most 1."
        )


def _check(content: Mapping[str, Any], shares: Mapping[str, float]) -> None:
    check_shares(shares)
    if shares.get("wrong class") and len(content["categories"]) < 2:
        raise UserError(
            "there is only one class, so none is wrong: give no share of wrong classes."
        )
    if shares.get("moved") or shares.get("spurious"):
        for row in content["images"]:
            if not all(type(row.get(k)) is int and row[k] > 0 for k in ("width", "height")):
                raise UserError(
                    f"the image {row['file_name']} has no width and height, which limit the boxes: "
                    "give --image-dir, and they are read from the images."
                )


def _rounded(share: float, number: int) -> int:
    """The nearest whole number, a half upwards."""
    return math.floor(share * number + 0.5)


def _order(seed: int, kind: str, idents: Sequence[int]) -> list[int]:
    """By hash: the same on every Python, whatever the order in the file."""
    return sorted(
        idents, key=lambda ident: hashlib.sha256(f"{seed}:{kind}:{ident}".encode()).digest()
    )


def _random(seed: int, kind: str, ident: int) -> random.Random:
    """Its `random()` alone is the same on every Python."""
    return random.Random(f"{seed}:{kind}:{ident}")


def _choose(
    idents: Sequence[int], shares: Mapping[str, float], seed: int
) -> dict[str, Sequence[int]]:
    """The ids of the objects of each kind but the spurious ones, no id twice."""
    free, chosen = list(idents), {}
    for kind in KINDS[:3]:
        number = min(_rounded(shares.get(kind, 0), len(idents)), len(free))
        taken = _order(seed, kind, free)[:number]
        chosen[kind] = sorted(taken)
        free = [ident for ident in free if ident not in set(taken)]
    return chosen


def _boxes_by_image(rows: Sequence[Row]) -> dict[Any, np.ndarray]:
    boxes: dict[Any, list] = {}
    for row in rows:
        boxes.setdefault(row["image_id"], []).append(row["bbox"])
    return {image: np.asarray(found, float) for image, found in boxes.items()}


def _uniform(draw: random.Random, *shape: int) -> np.ndarray:
    return np.array([draw.random() for _ in range(math.prod(shape))]).reshape(shape)


def _move(
    box: Sequence[float], size: tuple[int, int], draw: random.Random
) -> tuple[list[float], float]:
    """Shifts each side at random; the first try within `_MOVED` counts, else the nearest to it."""
    x, y, w, h = box
    # Box-Muller: the output of `random.gauss` may change between Python versions.
    one, two = _uniform(draw, 2, _TRIES, 4)
    shifts = _JITTER * np.sqrt(-2 * np.log1p(-one)) * np.cos(2 * np.pi * two)
    sides = np.array([x, y, x + w, y + h]) + shifts * (w, h, w, h)
    sides = np.clip(sides, 0, np.array([*size, *size]))
    sides = np.round(sides, 2)  # as exact as annotation files are
    boxes = np.concatenate([sides[:, :2], sides[:, 2:] - sides[:, :2]], axis=1).round(2)
    usable = boxes[(boxes[:, 2:] > 0).all(axis=1)]
    if not len(usable):
        return [float(v) for v in box], 1.0
    iou = box_ious([box], usable)[0]
    best = int(np.argmin(np.maximum(np.maximum(_MOVED[0] - iou, iou - _MOVED[1]), 0)))
    return usable[best].tolist(), round(float(iou[best]), 4)


def _spurious(
    content: Mapping[str, Any], number: int, seed: int, first_id: int
) -> Iterator[tuple[Row, float]]:
    """Boxes with the sizes and classes of objects, where none is, as far as there is room."""
    annotations = content.get("annotations", ())
    first_id = max([first_id, *(row["id"] + 1 for row in annotations)])
    objects = sorted(
        (row for row in annotations if not row.get("iscrowd")), key=lambda row: row["id"]
    )
    true = _boxes_by_image(annotations)  # crowd regions too
    images = sorted(content["images"], key=lambda row: row["id"])
    masks = any(row.get("segmentation") for row in objects)
    for place in range(number):
        draw = _random(seed, "spurious", place)
        model = objects[int(draw.random() * len(objects))]
        image = images[int(draw.random() * len(images))]
        sides = np.minimum(model["bbox"][2:], (image["width"], image["height"]))
        room = np.array([image["width"], image["height"]]) - sides
        corners = np.floor(_uniform(draw, _TRIES, 2) * room)
        others = true.get(image["id"], np.zeros((0, 4)))
        boxes = np.concatenate([corners, np.broadcast_to(sides, corners.shape)], axis=1)
        overlaps = box_ious(boxes, others).max(axis=1, initial=0)
        best = int(np.argmax(overlaps <= _FREE))
        if overlaps[best] > _FREE:
            best = int(np.argmin(overlaps))
        x, y, w, h = map(float, (*corners[best], *sides))
        row = {
            "id": first_id + place,
            "image_id": image["id"],
            "category_id": model["category_id"],
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": 0,
        }
        if masks:  # a mask head leaves out what has none
            row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        yield row, round(float(overlaps[best]), 4)
