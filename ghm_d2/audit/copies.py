"""Copies of an annotation file in which suspects are marked, dropped or mended."""

from collections.abc import Mapping, Sequence
from typing import Any

from .suspects import Suspect


def marked(content: Mapping[str, Any], suspects: Sequence[Suspect]) -> dict[str, Any]:
    """The content with a field `suspect` in the annotations that are suspicious.

    The field is :meth:`Suspect.as_row`: `kind`, `score`, what the detector believes. Missing
    objects, which have no annotation, are listed in the top-level field `missing`.
    """
    by_id = {s.annotation_id: s for s in suspects}
    annotations = [
        {**row, "suspect": by_id[row["id"]].as_row()} if row["id"] in by_id else row
        for row in content.get("annotations", ())
    ]
    missing = [s.as_row() for s in suspects if s.kind == "missing"]
    return {**content, "annotations": annotations, "missing": missing}


def dropped(content: Mapping[str, Any], suspects: Sequence[Suspect]) -> dict[str, Any]:
    """The content without the annotations that are suspicious; nothing is added."""
    gone = {s.annotation_id for s in suspects}
    annotations = [row for row in content.get("annotations", ()) if row["id"] not in gone]
    return {**content, "annotations": annotations}


def mended(content: Mapping[str, Any], suspects: Sequence[Suspect]) -> dict[str, Any]:
    """The content as the detector believes it: classes and boxes replaced, objects added, dropped.

    Annotations keep their masks and keypoints; added objects have none.
    """
    by_id = {s.annotation_id: s for s in suspects}
    annotations = []
    for row in content.get("annotations", ()):
        suspect = by_id.get(row["id"])
        if suspect is None:
            annotations.append(row)
        elif suspect.kind == "wrong class":
            annotations.append({**row, "category_id": suspect.believed_category_id})
        elif suspect.kind == "moved":
            annotations.append({**row, **_box(suspect, has_mask=bool(row.get("segmentation")))})
    new = max((row["id"] for row in content.get("annotations", ())), default=0) + 1
    for ident, suspect in enumerate((s for s in suspects if s.kind == "missing"), start=new):
        where = {"id": ident, "image_id": suspect.image_id, "iscrowd": 0}
        annotations.append({**where, "category_id": suspect.believed_category_id, **_box(suspect)})
    return {**content, "annotations": annotations}


def _box(suspect: Suspect, *, has_mask: bool = False) -> dict[str, Any]:
    box = suspect.believed_bbox or []
    return {"bbox": box} if has_mask else {"bbox": box, "area": box[2] * box[3]}
