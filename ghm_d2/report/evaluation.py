"""AP of every class and IoU threshold, PR curves, and a score for each image, by pycocotools."""

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ghm_d2.engine.evaluation import best_f1
from ghm_d2.errors import UserError, cannot, described, shown

from .run_files import TestSet

_LIMIT = 100  # detections drawn per image, at most


@dataclass(frozen=True)
class ImageScore:
    """How good the detections of one image are.

    Attributes:
        file: of the image.
        score: F1 in [0, 1].
        found, false, missed: detections that match an object, that match none, and objects that no
            detection matches.
        truth, shown: (XYXY box, class index, text behind the name of the class) of the ground truth
            and of the detections above the threshold.
    """

    file: Path
    score: float
    found: int
    false: int
    missed: int
    truth: list[tuple[list[float], int, str]]
    shown: list[tuple[list[float], int, str]]


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one data set.

    Attributes:
        name: of the data set.
        classes: names by ascending category id.
        objects: (K,) objects of each class, without crowds.
        thresholds: (T,) IoU thresholds.
        ap: (T, K) in per cent; NaN where a class has no object.
        recalls: (101,) recalls of `precision`.
        precision: (T, 101, K); NaN as above.
        score_threshold: the one with the best F1 over all classes; detections below it do not count
            for what follows.
        class_thresholds: (K,) those with the best F1 of each class; NaN where it was never found.
        found, false, missed: (K,) at IoU 0.5.
        confusion: (K + 1, K + 1) objects of the class of the row that a detection of the class of
            the column lies on; the last column holds objects that nothing lies on, the last row
            detections that lie on no object.
        images: by descending score, without images that have neither objects nor detections.
        number: of all images, including those without objects or detections.
    """

    name: str
    classes: list[str]
    objects: np.ndarray
    thresholds: np.ndarray
    ap: np.ndarray
    recalls: np.ndarray
    precision: np.ndarray
    score_threshold: float
    class_thresholds: np.ndarray
    found: np.ndarray
    false: np.ndarray
    missed: np.ndarray
    confusion: np.ndarray
    images: list[ImageScore]
    number: int

    @property
    def precision_at_threshold(self) -> np.ndarray:
        """(K,) per cent; NaN without a detection."""
        with np.errstate(invalid="ignore"):
            return 100 * self.found / (self.found + self.false)

    @property
    def recall_at_threshold(self) -> np.ndarray:
        """(K,) per cent; NaN without an object."""
        with np.errstate(invalid="ignore"):
            return 100 * self.found / (self.found + self.missed)


def evaluate(data: TestSet) -> Evaluation:
    """Evaluates the predictions again.

    An image's score is F1 = 2 TP / (2 TP + FP + FN), over all classes together, with COCO's matches
    at IoU 0.5. Detections count from the score threshold on that
    :func:`~ghm_d2.engine.evaluation.best_f1` gives.

    Raises:
        UserError: the files do not belong together, one is damaged or cannot be read, or nothing
            was detected.
    """
    try:
        # Some versions of pycocotools fail on an empty list.
        if data.predictions.read_bytes().strip() == b"[]":
            raise UserError(f"the last evaluation of {data.name} detected nothing.")
        with contextlib.redirect_stdout(io.StringIO()):
            return _evaluate(data)
    except UserError:
        raise
    except OSError as error:
        raise cannot("read", error.filename or data.annotations, error) from error
    except Exception as error:  # pycocotools checks nothing: a damaged file may raise anything
        raise UserError(
            f"{data.predictions} does not belong to {data.annotations}, or one of them is damaged "
            f"({described(error)})."
        ) from error


def _evaluate(data: TestSet) -> Evaluation:
    truth = COCO(str(data.annotations))
    # loadRes asserts that every predicted image is among those of the annotations.
    predictions = truth.loadRes(str(data.predictions))
    result = COCOeval(truth, predictions, "bbox")
    result.params.maxDets = [1, 10, max(data.detections_per_image, 100)]
    result.evaluate()
    result.accumulate()
    ids = sorted(truth.getCatIds())
    names = [shown(truth.cats[k]["name"], limit=1000) for k in ids]  # as a training has them
    precision = result.eval["precision"][:, :, :, 0, -1]
    precision = np.where(precision > -1, precision, np.nan)
    objects = Counter(
        a["category_id"] for a in truth.dataset["annotations"] if not a.get("iscrowd", 0)
    )
    best = best_f1(result, [str(k) for k in ids])
    threshold = np.nan_to_num(best["score_threshold"], nan=1.0)
    by_image, by_class = _counted(result, threshold)
    images = [
        _image(truth, predictions, data.images, ids, image, threshold, tuple(counts))
        for image, counts in by_image.items()
    ]
    images = [i for i in images if i.found + i.false + i.missed]
    found, false, missed = np.array([by_class[k] for k in ids]).T
    return Evaluation(
        data.name,
        names,
        np.array([objects[k] for k in ids]),
        result.params.iouThrs,
        100 * precision.mean(1),
        result.params.recThrs,
        precision,
        threshold,
        np.array([best[f"score_threshold-{k}"] for k in ids]),
        found,
        false,
        missed,
        _confusion(truth, predictions, ids, threshold, result.params.maxDets[-1]),
        sorted(images, key=lambda i: (-i.score, -i.found, i.false + i.missed, str(i.file))),
        len(truth.imgs),
    )


def _counted(
    result: COCOeval, threshold: float
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Found, false and missed from a score on, by image and by category."""
    everything = result.params.areaRng[0]
    by_image = {image: np.zeros(3, int) for image in result.params.imgIds}
    by_class = {category: np.zeros(3, int) for category in result.params.catIds}
    for call in result.evalImgs:
        if call is None or call["aRng"] != everything:
            continue
        objects = int((~np.array(call["gtIgnore"], dtype=bool)).sum())
        counts = (np.array(call["dtScores"]) >= threshold) & (call["dtIgnore"][0] == 0)
        found = int((counts & (call["dtMatches"][0] > 0)).sum())
        row = np.array([found, int(counts.sum()) - found, objects - found])
        by_image[call["image_id"]] += row
        by_class[call["category_id"]] += row
    return by_image, by_class


def _confusion(
    truth: COCO, predictions: COCO, ids: Sequence[int], threshold: float, limit: int
) -> np.ndarray:
    """See :class:`Evaluation`; COCO's matches at IoU 0.5 once more, without regard to classes."""
    result = COCOeval(truth, predictions, "bbox")
    result.params.useCats, result.params.iouThrs = 0, np.array([0.5])
    result.params.areaRng = result.params.areaRng[:1]
    result.params.areaRngLbl = result.params.areaRngLbl[:1]
    result.params.maxDets = [limit]
    result.evaluate()
    index = {category: k for k, category in enumerate(ids)}
    none, confusion = len(ids), np.zeros((len(ids) + 1, len(ids) + 1), int)
    for call in filter(None, result.evalImgs):
        alone = {
            x for x, ignored in zip(call["gtIds"], call["gtIgnore"], strict=True) if not ignored
        }
        rows = zip(
            call["dtIds"], call["dtScores"], call["dtMatches"][0], call["dtIgnore"][0], strict=True
        )
        for detection, score, match, ignored in rows:
            if score < threshold or ignored:
                continue
            column = index[predictions.anns[detection]["category_id"]]
            on = truth.anns[int(match)]["category_id"] if match > 0 else None
            confusion[none if on is None else index[on], column] += 1
            alone.discard(int(match))
        for annotation in alone:
            confusion[index[truth.anns[annotation]["category_id"]], none] += 1
    return confusion


def _image(
    truth: COCO,
    predictions: COCO,
    folder: Path,
    ids: Sequence[int],
    image: int,
    threshold: float,
    counts: tuple[int, int, int],
) -> ImageScore:
    found, false, missed = counts
    labels = {category: index for index, category in enumerate(ids)}
    drawn = [a for a in predictions.imgToAnns[image] if a["score"] >= threshold]
    drawn = sorted(drawn, key=lambda a: -a["score"])[:_LIMIT]
    return ImageScore(
        folder / truth.imgs[image]["file_name"],
        2 * found / max(2 * found + false + missed, 1),
        found,
        false,
        missed,
        [
            (_corners(a), labels[a["category_id"]], " (crowd)" if a.get("iscrowd", 0) else "")
            for a in truth.imgToAnns[image]
        ],
        [(_corners(a), labels[a["category_id"]], f" {a['score']:.0%}") for a in drawn],
    )


def _corners(annotation: dict[str, Any]) -> list[float]:
    x, y, width, height = annotation["bbox"]
    return [x, y, x + width, y + height]
