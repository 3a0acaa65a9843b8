"""What a detector believes instead of what is annotated.

Let p_k be the largest score of class k in the detections that cover an annotated box (IoU >= 0.5),
0 if there is none, and t the one-hot vector of the annotated class: |p_k - t_k| is the gradient
norm of GHM-C. It stays large where a detector that has learned from the other annotations does not
believe this one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, nms

from ghm_d2.data.corrupt import KINDS, box_ious

from .predictions import Detections

_COVERS = 0.5  # least IoU of a detection that is taken for one of the annotated object
_MOVED = 0.7  # IoU below which an annotation can be certain to be moved; see `Suspect.certain`
_NOTHING = 0.1  # confidence x IoU below which a box is certain to be spurious

Row = dict[str, Any]


@dataclass(frozen=True)
class Suspect:
    """An annotation, or a detection without one, and how much speaks against it.

    Attributes:
        kind: one of `ghm_d2.data.corrupt.KINDS`.
        score: in [0, 1], comparable within its kind.
        certain: whether the detector is as sure of something else as it usually is of its finds;
            :func:`choose` takes these if no number is asked for.
        image_id: the id of the image.
        annotation_id: None for an object that is missing.
        category_id, bbox: what is annotated; None for an object that is missing.
        believed_category_id, believed_bbox: what the detector believes; None for a spurious box.
        confidence: of the detector in what it believes, in [0, 1].
    """

    kind: str
    score: float
    certain: bool
    image_id: int
    annotation_id: int | None
    category_id: int | None
    bbox: list[float] | None
    believed_category_id: int | None
    believed_bbox: list[float] | None
    confidence: float

    def as_row(self) -> Row:
        """All fields but `certain`, for a JSON file."""
        return {name: value for name, value in asdict(self).items() if name != "certain"}


def judge(content: Mapping[str, Any], detections: Mapping[int, Detections]) -> list[Suspect]:
    """Compares annotations with detections.

    The detector should not have been trained on these annotations, whose errors it would believe.

    Args:
        content: the checked content of an annotation file; crowd regions are not judged.
        detections: by image id; images without an entry are not judged.

    Returns:
        Up to three entries for each annotation and one for each detected object that matches no
        annotation, the most suspicious first. Their scores:

        - wrong class: half the sum of the gradient norms of the annotated class and of the other
          class that is believed most; above 0.5 the other class is believed more.
        - moved: confidence x (1 - IoU) of the detection that fits best.
        - spurious: 1 - confidence x IoU of the detection that fits best.
        - missing: confidence x (1 - largest IoU with an annotation) of a detection that matches
          no annotation.
    """
    rows: dict[int, list[Row]] = {image: [] for image in detections}
    for row in content.get("annotations", ()):
        if row["image_id"] in rows:
            rows[row["image_id"]].append(row)
    images = [_Image(image, rows[image], detections[image]) for image in sorted(rows)]
    usual = _usual_confidence(images)
    suspects = [suspect for image in images for suspect in image.suspects(usual)]
    return sorted(suspects, key=lambda s: (-s.score, s.image_id, s.annotation_id or 0))


class _Image:
    """Annotations and detections of one image.

    In shapes, A is the number of annotated objects, D of detections, N of those left after NMS
    across classes, and K of classes that occur.
    """

    def __init__(self, image_id: int, rows: Sequence[Row], detections: Detections) -> None:
        self.id = image_id
        boxes, classes, scores = detections
        crowd = np.array([row.get("iscrowd", 0) for row in rows], int)
        overlaps = box_ious(boxes, [row["bbox"] for row in rows], crowd.tolist()).T
        self.rows = [row for row in rows if not row.get("iscrowd")]
        self.own = np.array([row["category_id"] for row in self.rows], int)
        # (A, K): p_k of the module's docstring
        self.known = np.unique(np.concatenate([classes, self.own]))
        of_class = classes == self.known[:, None]  # (K, D)
        covering = np.where(overlaps[crowd == 0] >= _COVERS, scores, 0.0)  # (A, D)
        self.beliefs = (covering[:, None] * of_class).max(axis=2, initial=0)
        corners = box_convert(torch.from_numpy(boxes), "xywh", "xyxy")
        kept = nms(corners, torch.from_numpy(scores), _COVERS).numpy()
        self.boxes, self.classes, self.scores = boxes[kept], classes[kept], scores[kept]
        self.overlaps = overlaps[crowd == 0][:, kept]  # (A, N)
        self.covered = overlaps[:, kept].max(axis=0, initial=0)  # (N,), also by crowd regions
        self.match = _match(self.overlaps * self.scores)

    def own_beliefs(self) -> np.ndarray:
        """(A,): p of the annotated class."""
        return self.beliefs[np.arange(len(self.rows)), np.searchsorted(self.known, self.own)]

    def suspects(self, usual: Mapping[int, float]) -> Iterator[Suspect]:
        """
        Args:
            usual: by class, the mean confidence of the detector where it agrees with annotations.
        """
        for i, (row, own) in enumerate(zip(self.rows, self.own_beliefs(), strict=True)):
            others = np.where(self.known == row["category_id"], 0.0, self.beliefs[i])
            k = int(others.argmax())
            if (other := others[k]) > 0:
                score = (1 - own + other) / 2
                believed = (int(self.known[k]), row["bbox"])
                yield self._suspect("wrong class", score, score > 0.5, other, row, believed)
            fit = 0.0
            if (n := self.match[i]) >= 0:
                iou, score = self.overlaps[i, n], self.scores[n]
                fit = iou * score
                certain = iou < _MOVED and self._is_sure(n, usual)
                yield self._suspect(
                    "moved", score * (1 - iou), certain, score, row, self._detected(n)
                )
            yield self._suspect("spurious", 1 - fit, fit < _NOTHING, 1 - fit, row, (None, None))
        for n in set(range(len(self.scores))) - set(self.match):
            covered, score = self.covered[n], self.scores[n]
            certain = covered < _COVERS and self._is_sure(n, usual)
            yield self._suspect(
                "missing", score * (1 - covered), certain, score, {}, self._detected(n)
            )

    def _is_sure(self, n: int, usual: Mapping[int, float]) -> bool:
        return self.scores[n] >= usual.get(int(self.classes[n]), 1.0)

    def _detected(self, n: int) -> tuple[int, list[float]]:
        return int(self.classes[n]), self.boxes[n].tolist()

    def _suspect(
        self,
        kind: str,
        score: float,
        certain: bool,
        confidence: float,
        given: Row,
        believed: tuple[int | None, list[float] | None],
    ) -> Suspect:
        return Suspect(
            kind,
            round(float(score), 6),
            bool(certain),
            self.id,
            given.get("id"),
            given.get("category_id"),
            given.get("bbox"),
            *believed,
            round(float(confidence), 6),
        )


def _match(fits: np.ndarray) -> list[int]:
    """The detection of each annotation, -1 for none: the best pairs first, each detection once."""
    match, used = [-1] * len(fits), set()
    for place in np.argsort(-fits, axis=None, kind="stable"):
        i, n = map(int, np.unravel_index(place, fits.shape))
        if fits[i, n] <= 0:
            break
        if match[i] < 0 and n not in used:
            match[i] = n
            used.add(n)
    return match


def _usual_confidence(images: Sequence[_Image]) -> dict[int, float]:
    """By class, the mean of its p over annotations for which no other class is believed more."""
    found: dict[int, list[float]] = {}
    for image in images:
        for category, own, best in zip(
            image.own.tolist(),
            image.own_beliefs(),
            image.beliefs.max(axis=1, initial=0),
            strict=True,
        ):
            if own == best > 0:
                found.setdefault(category, []).append(float(own))
    return {category: float(np.mean(values)) for category, values in found.items()}


def choose(suspects: Sequence[Suspect], number: int | None = None) -> list[Suspect]:
    """The entries of :func:`judge` that are believed to be errors.

    Args:
        suspects: the most suspicious first.
        number: how many to take of each kind; None: all that are `certain`.

    Returns:
        Each annotation at most once; if it is taken for several kinds, under the first in `KINDS`.
    """
    chosen: list[Suspect] = []
    seen: set[int] = set()
    for kind in KINDS:
        of_kind = [s for s in suspects if s.kind == kind]
        taken = [s for s in of_kind if s.certain] if number is None else of_kind[:number]
        chosen += [s for s in taken if s.annotation_id is None or s.annotation_id not in seen]
        seen |= {s.annotation_id for s in taken if s.annotation_id is not None}
    return chosen
