"""A COCO-format file as one checked object, which training, evaluation and all tools see alike."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.structures import BoxMode

from ghm_d2.errors import shown

from .annotations import AnnotationPass, Uses, compressed_mask
from .checks import MANY_BOXES, MAX_BOXES, Findings, Problem
from .entries import category_entries, image_entries
from .image_checks import ImageFile, image_name, look_at_images
from .keypoints import Keypoints, fill_in, find_keypoints
from .tables import Ids, table_problems

_EVALUATED = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
_IDENTITY = (
    ("id", "name"),
    ("id", "file_name"),
    ("image_id", "category_id", "bbox", "iscrowd"),
)  # of a category, an image and an annotation


@dataclass
class CocoData:
    """What a file holds after everything that could be repaired has been.

    Attributes:
        content: the tables; ids are whole numbers, every annotation has an area and `iscrowd`, and
            no entry is left that training would leave out. Without annotations there is no key.
        found: what was repaired or cannot be.
        complete: False where the tables themselves are wrong; then nothing else was looked at.
        as_written: whether pycocotools reads the same from the file itself.
        paths: the file of each image by its id; empty where no folder was given.
        files: the image of each entry of the file, in its order.
        classes: names by ascending category id.
        without_mask: objects without a mask, crowd regions left out.
        most_objects: of one image.
        written_ids: the "id" of each annotation of `content` in the file itself, None where it has
            none.
        keypoints: those that a config takes, in every annotation; None: there are no annotations.
        fingerprint: tells the data from other data; see `data_fingerprint`.
    """

    content: dict[str, Any]
    found: Findings
    complete: bool = False
    as_written: bool = True
    paths: dict[int, str] = field(default_factory=dict)
    files: tuple[ImageFile | None, ...] = ()
    classes: tuple[str, ...] = ()
    without_mask: int = 0
    most_objects: int = 0
    written_ids: tuple[Any, ...] = ()
    keypoints: Keypoints | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)

    @property
    def category_ids(self) -> list[int]:
        """In the order of `classes`."""
        return sorted(row["id"] for row in self.content["categories"])

    def keep_written_ids(self) -> bool:
        """Gives the annotations back their ids in the file, for a copy in which they are found.

        Returns:
            Whether it was done; it is not if some ids are missing, repeated, or not integers.
        """
        if len(set(self.written_ids)) < len(self.written_ids) or not all(
            type(ident) is int for ident in self.written_ids
        ):
            return False
        for row, ident in zip(self.content.get("annotations", ()), self.written_ids, strict=True):
            row["id"] = ident
        return True

    def records(self, uses: Uses) -> list[dict[str, Any]]:
        """Detectron2's dictionaries of the images, with what `uses` takes of each annotation."""
        classes = {ident: k for k, ident in enumerate(self.category_ids)}
        number_of_points = self.keypoints.number if self.keypoints else 0
        records = {
            row["id"]: {
                "file_name": self.paths[row["id"]],
                "height": row["height"],
                "width": row["width"],
                "image_id": row["id"],
                "annotations": [],
            }
            for row in sorted(self.content["images"], key=lambda row: row["id"])
        }
        for row in self.content.get("annotations", ()):
            annotation = {
                "iscrowd": row["iscrowd"],
                "bbox": row["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": classes[row["category_id"]],
            }
            if uses.masks and (mask := row.get("segmentation")):
                annotation["segmentation"] = (
                    compressed_mask(mask) if isinstance(mask, dict) else mask
                )
            if number_of_points:
                values = row["keypoints"]
                # From pixel indices to coordinates of pixel centres, as Detectron2's loader does.
                shifts = (0.5, 0.5, 0) * number_of_points if any(values) else [0.0] * len(values)
                annotation["keypoints"] = [v + s for v, s in zip(values, shifts, strict=True)]
            records[row["image_id"]]["annotations"].append(annotation)
        return list(records.values())

    def evaluated(self, uses: Uses) -> dict[str, Any]:
        """The content, reduced to the fields that pycocotools reads."""
        names = [*_EVALUATED, *(["segmentation"] if uses.masks else [])]
        if self.keypoints and self.keypoints.number:
            names += ["keypoints", "num_keypoints"]
        content: dict[str, Any] = {
            "images": [
                {
                    "id": row["id"],
                    "file_name": os.path.abspath(self.paths[row["id"]]),
                    "height": row["height"],
                    "width": row["width"],
                }
                for row in self.content["images"]
            ],
            "categories": [
                {"id": row["id"], "name": row["name"]} for row in self.content["categories"]
            ],
        }
        if "annotations" in self.content:
            content["annotations"] = [
                {name: row[name] for name in names if name in row}
                for row in self.content["annotations"]
            ]
        return content


def check_content(
    content: dict[str, Any],
    *,
    labelled: bool = True,
    root: str | None = None,
    files: Sequence[ImageFile | None] | None = None,
    decode: bool = False,
    uses: Uses | None = None,
    name: str = "",
    examples: int = 1,
) -> CocoData:
    """Look at everything in a file, once.

    Args:
        content: the file; is changed.
        labelled: whether it must have annotations.
        root: folder of the images; None: they are not looked at.
        files: the images, where they have been looked at already.
        decode: read every pixel of the images.
        uses: what a config takes; by default everything.
        name: of the data set, for a progress bar.
        examples: how many of each kind of problem are kept.
    """
    data = CocoData(content, Findings(examples))
    report, uses = data.found.add, uses or Uses()
    data.found.add_all(table_problems(content, labelled=labelled))
    if data.found.kinds("stops"):
        return data
    data.complete = True
    if not content.get("annotations"):
        data.as_written = "annotations" not in content
        content.pop("annotations", None)
    if files is None:
        data.fingerprint = _fingerprint(content)
        rows = content["images"]
        data.files = (
            (None,) * len(rows)
            if root is None
            else tuple(look_at_images(rows, root, decode=decode, name=name, report=report))
        )
    else:
        data.files = tuple(files)
    images = image_entries(content["images"], data.files, root, report)
    categories = category_entries(content["categories"], report)
    content.update(images=images.rows, categories=categories.rows)
    data.paths = images.paths
    # Escaped here, no name can change a terminal, or fail to be written, wherever it goes.
    ordered = sorted(categories.rows, key=lambda row: row["id"])
    data.classes = tuple(shown(row["name"], limit=1000) for row in ordered)
    data.as_written &= images.as_written and categories.as_written
    if "annotations" in content:
        _annotations(data, images.ids, categories.ids, uses, report)
    return data


def _annotations(
    data: CocoData, image_ids: Ids, category_ids: Ids, uses: Uses, report: Any
) -> None:
    images = {row["id"]: row for row in data.content["images"]}
    rows = data.content["annotations"]
    taken = AnnotationPass(images, image_ids, category_ids, uses, report)
    for place, row in enumerate(rows):
        taken.take(row, place)
    data.found.add_all(taken.habits.problems())
    kept = data.content["annotations"] = taken.kept
    _number(data, kept)
    data.as_written &= taken.as_written and len(kept) == len(rows)
    data.without_mask = taken.without_mask
    data.most_objects = max(taken.boxes.values(), default=0)
    if taken.crowds == len(kept):
        report(Problem("no usable annotation", _why_nothing(data.found, len(rows), taken.crowds)))
    for ident, row in images.items():
        boxes = taken.boxes[ident]
        if not boxes:
            report(Problem("image without annotation", image_name(row)))
        elif boxes > MANY_BOXES:
            kind = "crowded image" if boxes > MAX_BOXES else "many boxes"
            report(Problem(kind, f"{image_name(row)} has {boxes} boxes"))
    objects = Counter(row["category_id"] for row in kept)
    for ident, name in zip(data.category_ids, data.classes, strict=True):
        if not objects[ident]:
            report(Problem("class without object", shown(repr(name))))
    found = find_keypoints(data.content)
    if found.fault:
        report(Problem("keypoints", found.fault))
    data.keypoints = fill_in(kept, found) if uses.keypoints else Keypoints()


def _number(data: CocoData, kept: Sequence[dict[str, Any]]) -> None:
    """Numbers annotations for pycocotools, which takes id 0 for no match and drops repeated ids."""
    written = data.written_ids = tuple(row.get("id") for row in kept)
    if all(type(i) is int and 0 < i < 2**53 for i in written) and len(set(written)) == len(kept):
        return
    data.as_written = False
    for new, row in enumerate(kept, start=1):
        row["id"] = new


def _why_nothing(found: Findings, annotations: int, crowds: int) -> str:
    reasons = {
        "stray annotation": "belong to no listed image",
        "empty box": "have no positive width and height",
        "box outside": "lie outside their image",
        "bad mask": "have no mask that can be used",
        "duplicate box": "repeat another one",
    }
    words = [f"{found.counts[kind]} {text}" for kind, text in reasons.items() if found.counts[kind]]
    if crowds:
        words.append(f"{crowds} are crowd regions (iscrowd 1)")
    if found.counts["stray annotation"]:
        words.append(f"the first: {found.examples['stray annotation'][0]}")
    return f"holds no object to train on: of its {annotations} annotations {', '.join(words)}"


def _fingerprint(content: dict[str, Any]) -> dict[str, Any]:
    """Of categories, images and annotations, whatever their order and the spaces between them."""
    digest = hashlib.sha256()
    tables = [content.get(name, []) for name in ("categories", "images", "annotations")]
    for table, keys in zip(tables, _IDENTITY, strict=True):
        rows = sorted(json.dumps([row.get(key) for key in keys]) for row in table)
        digest.update("\n".join(rows).encode())
    return {
        "images": len(tables[1]),
        "annotations": len(tables[2]),
        "sha256": digest.hexdigest()[:16],
    }
