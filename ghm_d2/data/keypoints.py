"""Keypoints of `--dataset`: their names, which of them a mirror exchanges, what Detectron2 needs.

COCO's format lists the names of the keypoints in a category and no pairs; Detectron2 wants one list
for all classes, and for each of a pair the name of the other.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ghm_d2.errors import UserError

from .fields import numbers

logger = logging.getLogger(__name__)

_SIDE = re.compile(r"left|right|(?<![^\W_])[lr](?![^\W_])", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left", "l": "r", "r": "l"}


def mirrored_pairs(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs that a mirror exchanges: names that differ only in left and right, or L and R."""
    by_lower = {name.lower(): name for name in names}
    pairs = []
    for name in names:
        other = by_lower.get(_SIDE.sub(lambda side: _OTHER[side[0].lower()], name.lower()))
        if other is not None and other != name and (other, name) not in pairs:
            pairs.append((name, other))
    return tuple(pairs)


@dataclass(frozen=True)
class Keypoints:
    """What an annotation file holds of them.

    Attributes:
        names: in their order; empty where the categories list none.
        number: of an object; 0: no object has any, or `fault` says why none can be used.
        without: annotations without any, where others have some.
        labelled: objects with a keypoint that is labelled.
        incomplete: whether the keypoints of an annotation had to be changed for pycocotools.
        fault: a clause on why the file's keypoints cannot be trained on, or an empty string.
    """

    names: tuple[str, ...] = ()
    number: int = 0
    without: int = 0
    labelled: int = 0
    incomplete: bool = False
    fault: str = ""


def find_keypoints(content: Mapping[str, Any]) -> Keypoints:
    """The keypoints of an annotation file, whether or not they will be used.

    Args:
        content: its tables, each of them checked.
    """
    lists: dict[tuple[str, ...], str] = {}  # the names, and the first category that has them
    for category in content["categories"]:
        if isinstance(category.get("keypoints"), list) and category["keypoints"]:
            lists.setdefault(tuple(map(str, category["keypoints"])), category["name"])
    annotations = content.get("annotations", [])
    found = [a for a in annotations if a.get("keypoints")]
    if not found:
        return Keypoints()
    if len(lists) > 1:
        first, other = list(lists.values())[:2]
        return Keypoints(
            fault=f"the categories {first!r} and {other!r} list different keypoints, but "
            "Detectron2 has one list for all classes"
        )
    names = next(iter(lists), ())
    first_values = numbers(found[0]["keypoints"])
    number = len(names) or len(first_values or ()) // 3
    for annotation in found:
        if not number or numbers(annotation["keypoints"], 3 * number) is None:
            wanted = f"{3 * number} numbers" if number else "numbers"
            return Keypoints(
                fault=f"the keypoints of annotation {annotation['id']!r} are not {wanted}: x, y "
                "and visibility of each keypoint"
            )
    return Keypoints(names, number, len(annotations) - len(found))


def fill_in(annotations: Sequence[dict[str, Any]], found: Keypoints) -> Keypoints:
    """Gives every annotation keypoints, unlabelled ones where it has none, in place.

    Detectron2 and pycocotools expect keypoints in every annotation, and read `num_keypoints`.

    Args:
        annotations: those of the file.
        found: what :func:`find_keypoints` returns.

    Returns:
        The same with `labelled` and `incomplete`.
    """
    if not found.number:
        return found
    size, incomplete = 3 * found.number, False
    for annotation in annotations:
        values = annotation.get("keypoints")
        points = numbers(values, size) if values else [0] * size
        given = annotation.get("num_keypoints")
        labelled = given if type(given) is int and given >= 0 else sum(v > 0 for v in points[2::3])
        if not values or points is not values or labelled is not given:
            incomplete = True
            annotation.update(keypoints=points, num_keypoints=labelled)
    labelled = sum(annotation["num_keypoints"] > 0 for annotation in annotations)
    return replace(found, labelled=labelled, incomplete=incomplete)


class KeypointKeys(NamedTuple):
    """What messages say to the user of a config; by default of a YAML one."""

    on: str = "MODEL.KEYPOINT_ON is True"
    off: str = "give MODEL.KEYPOINT_ON False"
    number: str = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
    give: str = " "
    unmirrored: str = "give INPUT.RANDOM_FLIP none"


def check_keypoints(
    name: str,
    metadata: Any,
    number: int,
    *,
    mirrored: bool,
    keys: KeypointKeys = KeypointKeys(),  # noqa: B008 (it cannot be changed)
) -> None:
    """What a keypoint head needs of a data set to train on.

    Args:
        name: of the data set.
        metadata: of Detectron2's catalog.
        number: of keypoints that the head predicts.
        mirrored: whether images are mirrored at random.
        keys: of the kind of config.

    Raises:
        UserError: one sentence with the way out.
    """
    found = metadata.get("num_keypoints", len(metadata.get("keypoint_names", ())))
    if fault := metadata.get("keypoint_fault"):
        raise UserError(
            f"{keys.on}, but {fault}: correct the file, or {keys.off} to train on boxes alone."
        )
    if found is None:  # no annotations: predictions are only written
        return
    if not found:
        raise UserError(
            f"{keys.on}, but the data set {name} has no keypoints: annotate them, or {keys.off} "
            "to train on boxes alone."
        )
    if found != number:
        raise UserError(
            f"the objects of the data set {name} have {found} keypoints, but {keys.number} is "
            f"{number}: give {keys.number}{keys.give}{found}."
        )
    if not metadata.get("labelled_keypoints", 1):
        raise UserError(
            f"no object of the data set {name} has a labelled keypoint (visibility 1 or 2): label "
            f"some, or {keys.off} to train on boxes alone."
        )
    if not mirrored:
        return
    if not metadata.get("keypoints_named", True):
        raise UserError(
            f"the data set {name} does not name its keypoints, so left and right cannot be "
            'exchanged in mirrored images: list the names under "keypoints" in the categories of '
            f"its annotation file, or {keys.unmirrored}."
        )
    pairs = metadata.get("keypoint_flip_map", ())
    logger.info(
        "%s: mirrored images exchange %s",
        name,
        ", ".join(f"{a} and {b}" for a, b in pairs)
        or "no keypoints: no two names differ in left and right alone",
    )


def convert_incomplete(metadata: Any) -> None:
    """Makes Detectron2 convert a data set whose file is unfit for the keypoint evaluation.

    For boxes alone the file is evaluated as it is, with the areas that stand in it.
    """
    if metadata.get("keypoints_incomplete") and hasattr(metadata, "json_file"):
        del metadata.json_file
