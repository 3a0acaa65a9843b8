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

from ghm_d2.errors import UserError, cannot, reason

from .run_files import TestSet

__all__ = ["Evaluation", "ImageScore", "evaluate"]

_LIMIT = 100  # detections an image, COCO's largest


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
        score_threshold: detections below it do not count for the images' scores.
        images: by descending score, without images that have neither objects nor detections.
    """

    name: str
    classes: list[str]
    objects: np.ndarray
    thresholds: np.ndarray
    ap: np.ndarray
    recalls: np.ndarray
    precision: np.ndarray
    score_threshold: float
    images: list[ImageScore]


def evaluate(data: TestSet) -> Evaluation:
    """Evaluates the predictions again.

    An image's score is F1 = 2 TP / (2 TP + FP + FN), over all classes together, with COCO's matches
    at IoU 0.5. Detections count from one score threshold on, the one that makes F1 largest over the
    whole data set.

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
            f"({type(error).__name__}: {reason(error)})."
        ) from error


def _evaluate(data: TestSet) -> Evaluation:
    truth = COCO(str(data.annotations))
    # loadRes asserts that every predicted image is among those of the annotations.
    predictions = truth.loadRes(str(data.predictions))
    result = COCOeval(truth, predictions, "bbox")
    result.evaluate()
    result.accumulate()
    ids = sorted(truth.getCatIds())
    precision = result.eval["precision"][:, :, :, 0, -1]
    precision = np.where(precision > -1, precision, np.nan)
    objects = Counter(
        a["category_id"] for a in truth.dataset["annotations"] if not a.get("iscrowd", 0)
    )
    threshold, scores = _image_scores(result)
    images = [
        _image(truth, predictions, data.images, ids, image, threshold, counts)
        for image, counts in scores.items()
    ]
    images = [i for i in images if i.found + i.false + i.missed]
    return Evaluation(
        data.name,
        [str(truth.cats[k]["name"]) for k in ids],
        np.array([objects[k] for k in ids]),
        result.params.iouThrs,
        100 * precision.mean(1),
        result.params.recThrs,
        precision,
        threshold,
        sorted(images, key=lambda i: (-i.score, -i.found, i.false + i.missed, str(i.file))),
    )


def _image_scores(result: COCOeval) -> tuple[float, dict[int, tuple[int, int, int]]]:
    """The score threshold, and found, false and missed of each image."""
    everything = result.params.areaRng[0]
    calls = [c for c in result.evalImgs if c is not None and c["aRng"] == everything]
    objects = dict.fromkeys(result.params.imgIds, 0)
    detections = []
    for call in calls:
        image = call["image_id"]
        objects[image] += int((~np.array(call["gtIgnore"], dtype=bool)).sum())
        rows = zip(call["dtScores"], call["dtMatches"][0], call["dtIgnore"][0], strict=True)
        detections += [(image, score, match > 0) for score, match, ignored in rows if not ignored]
    scores = np.array([score for _, score, _ in detections])
    hits = np.array([hit for _, _, hit in detections], dtype=bool)
    threshold = _best_threshold(scores, hits, sum(objects.values()))
    found = Counter(image for image, score, hit in detections if hit and score >= threshold)
    shown = Counter(image for image, score, _ in detections if score >= threshold)
    return threshold, {
        image: (found[image], shown[image] - found[image], number - found[image])
        for image, number in objects.items()
    }


def _best_threshold(scores: np.ndarray, hits: np.ndarray, objects: int) -> float:
    """The score from which on detections have the largest F1; 1 without any match."""
    if not hits.any():
        return 1.0
    order = np.argsort(-scores, kind="stable")
    f1 = 2 * np.cumsum(hits[order]) / (np.arange(1, len(order) + 1) + objects)
    last = np.append(np.diff(scores[order]) != 0, True)  # no threshold separates equal scores
    return float(scores[order][np.argmax(np.where(last, f1, -1))])


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
