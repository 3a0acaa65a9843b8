"""Evaluators; AP at every IoU threshold, the score with the best F1, and what a test costs."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.logger import create_small_table
from pycocotools.cocoeval import COCOeval
from torch import nn

from ghm_d2.data.keypoints import convert_incomplete
from ghm_d2.errors import UserError
from ghm_d2.files import write_json
from ghm_d2.run_folder import BEST_F1, MEMORY_MIB, SECONDS_PER_IMAGE

__all__ = [
    "EVALUATOR_TYPES",
    "AllThresholdsCOCOEvaluator",
    "best_f1",
    "build_evaluator",
    "costs_recorded",
    "score_thresholds",
]

EVALUATOR_TYPES = ("coco", "lvis", "pascal_voc")

_THRESHOLDS = range(50, 100, 5)  # per cent, as COCO has them


def build_evaluator(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """The evaluator for the metadata's `evaluator_type`.

    Args:
        cfg: a YAML config.
        name: of the data set.
        folder: for its files.

    Raises:
        UserError: the data set is not one of boxes that these evaluators know.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind == "coco":
        if cfg.MODEL.KEYPOINT_ON:
            convert_incomplete(MetadataCatalog.get(name))
        # A cached conversion would outlive a change of the data.
        return AllThresholdsCOCOEvaluator(
            name,
            output_dir=folder,
            allow_cached_coco=False,
            max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )
    if kind == "lvis":
        return LVISEvaluator(name, output_dir=folder)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    raise UserError(
        f"{name} cannot be evaluated: its evaluator_type is {kind!r}, not one of "
        f"{', '.join(EVALUATOR_TYPES)}."
    )


class AllThresholdsCOCOEvaluator(COCOEvaluator):
    """`COCOEvaluator` whose results hold AP50, AP55, ..., AP95; AP is their mean.

    Objects are compared with what the checks of `--dataset` have left of the annotation file, and
    as many detections of an image count as it may give. Beside the task "bbox" stands "best_f1",
    what :func:`best_f1` says of it.
    """

    def __init__(
        self,
        dataset_name: str,
        *args: Any,
        output_dir: str | None = None,
        max_dets_per_image: int | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            dataset_name: a registered data set.
            output_dir: for predictions, and annotations that are not those of the file itself.
            max_dets_per_image: TEST.DETECTIONS_PER_IMAGE; COCO's 100 where it is no more than that.
            args, options: as `COCOEvaluator` has them.
        """
        metadata = MetadataCatalog.get(dataset_name)
        content = metadata.get("evaluated_content")
        if content is not None and metadata.get("json_file") is None and output_dir is not None:
            file = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
            if comm.is_main_process():
                write_json(file, content(), indent=None)
            comm.synchronize()
            metadata.json_file = file
        most = max_dets_per_image if max_dets_per_image and max_dets_per_image > 100 else None
        super().__init__(
            dataset_name, *args, output_dir=output_dir, max_dets_per_image=most, **options
        )

    def evaluate(self, img_ids: Any = None) -> dict[str, Any]:
        """Detectron2's, and "best_f1" in the process that has the results."""
        self._best_f1: dict[str, float] = {}
        results = super().evaluate(img_ids)
        return {**results, BEST_F1: self._best_f1} if self._best_f1 else results

    def _tasks_from_predictions(self, predictions: Sequence[dict[str, Any]]) -> list[str]:
        """Detectron2's, without masks where objects have none that they could be compared with."""
        tasks = list(super()._tasks_from_predictions(predictions))
        without = self._metadata.get("without_mask", 0)
        if without and "segm" in tasks:
            self._logger.warning(
                f"{without} objects of {self._metadata.name} have no mask: boxes alone are compared"
            )
            tasks.remove("segm")
        return tasks

    def _derive_coco_results(
        self,
        coco_eval: COCOeval | None,
        iou_type: str,
        class_names: Sequence[str] | None = None,
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        all_thresholds = _ap_at_thresholds(coco_eval)
        if coco_eval is not None:
            if iou_type == "bbox":
                self._best_f1 = best_f1(coco_eval, class_names or ())
            self._logger.info(
                f"{iou_type} AP at each IoU threshold: \n{create_small_table(all_thresholds)}"
            )
        # Between the standard metrics and those of the classes, "AP-" and a name.
        classes = {name: results.pop(name) for name in list(results) if name.startswith("AP-")}
        return {**results, **all_thresholds, **classes}


def _ap_at_thresholds(coco_eval: COCOeval | None) -> dict[str, float]:
    """Per cent; NaN where it cannot be computed, as Detectron2 has it for its own metrics."""
    if coco_eval is None:
        return {f"AP{threshold}": float("nan") for threshold in _THRESHOLDS}
    # (thresholds, recalls, classes, areas, limits); -1 where a class has no object. The first area
    # is "all", the last limit that of the detections an image.
    precisions = coco_eval.eval["precision"][:, :, :, 0, -1]
    results = {}
    for threshold, precision in zip(coco_eval.params.iouThrs, precisions, strict=True):
        known = precision[precision > -1]
        ap = float(known.mean() * 100) if known.size else float("nan")
        results[f"AP{round(threshold * 100)}"] = ap
    return results


def best_f1(coco_eval: COCOeval, class_names: Sequence[str] = ()) -> dict[str, float]:
    """The score from which on detections have the largest F1 = 2 TP / (detections + objects).

    It is read off the curves that COCO's evaluation at IoU 0.5 has drawn, at every per cent of
    recall: of a class with no more than 100 objects, at each of them.

    Args:
        coco_eval: accumulated.
        class_names: in the order of its categories; none where there is one class.

    Returns:
        score_threshold in [0, 1], F1, precision and recall (per cent, over all classes), and
        score_threshold-NAME and F1-NAME for each class. NaN where nothing was found.
    """
    params, truth = coco_eval.params, coco_eval.cocoGt
    at = int(np.argmin(np.abs(params.iouThrs - 0.5)))
    precision, scores = (coco_eval.eval[x][at, :, :, 0, -1] for x in ("precision", "scores"))
    images = set(params.imgIds)
    objects = Counter(
        a["category_id"]
        for a in truth.dataset["annotations"]
        if a["image_id"] in images and not a.get("iscrowd", 0) and not a.get("ignore", 0)
    )
    curves = [
        _points(precision[:, k], scores[:, k], params.recThrs, objects[category])
        for k, category in enumerate(params.catIds)
    ]
    total = sum(objects[category] for category in params.catIds)
    overall = _best_point(_summed(curves), total)
    names = ("score_threshold", "F1", "precision", "recall")
    results = dict(zip(names, overall, strict=True))
    for name, curve, category in zip(class_names, curves, params.catIds, strict=False):
        found = _best_point(curve, objects[category])
        results |= {f"score_threshold-{name}": found[0], f"F1-{name}": found[1]}
    return results


def _points(
    precision: np.ndarray, scores: np.ndarray, recalls: np.ndarray, objects: int
) -> np.ndarray:
    """(P, 3): a score, the objects found from it on, and the detections; by falling score."""
    reached = precision > 0  # beyond the largest recall it is 0, and -1 without objects
    found = np.maximum(np.ceil(recalls[reached] * objects - 1e-6), 1)
    return np.stack([scores[reached], found, found / precision[reached]], axis=1)


def _summed(curves: Sequence[np.ndarray]) -> np.ndarray:
    """The curve of all classes together, at every score of one of them."""
    levels = np.unique(np.concatenate([curve[:, 0] for curve in curves] or [np.zeros(0)]))[::-1]
    total = np.zeros((len(levels), 2))
    for curve in curves:
        # How many points of the curve, which falls, lie at or above each level.
        passed = np.searchsorted(-curve[:, 0], -levels, side="right")
        total += np.concatenate([np.zeros((1, 2)), curve[:, 1:]])[passed]
    return np.column_stack([levels, total])


def _best_point(curve: np.ndarray, objects: int) -> tuple[float, float, float, float]:
    """Score, F1, precision and recall, the last three in per cent, where F1 is the largest."""
    if not len(curve) or not objects:
        return (float("nan"),) * 4
    score, found, detections = curve.T
    f1 = 2 * found / (detections + objects)
    best = int(np.argmax(f1))
    figures = (f1[best], found[best] / detections[best], found[best] / objects)
    return float(score[best]), *(100 * float(figure) for figure in figures)


def score_thresholds(results: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, float]:
    """The thresholds among the results of a test, "" for all classes together; empty without any.

    Args:
        results: what `GHMTrainer.test` returns.
        names: of its data sets, the first of which counts.
    """
    found = (
        (results or {}) if len(names) == 1 else (results or {}).get(names[0] if names else "", {})
    )
    prefix = "score_threshold"
    return {
        key.removeprefix(prefix).removeprefix("-"): value
        for key, value in found.get(BEST_F1, {}).items()
        if key.startswith(prefix) and np.isfinite(value)
    }


@contextmanager
def costs_recorded(model: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """Puts into metrics.json what the block, an evaluation in a training, costs.

    That is the median time of a call of the model, post-processing included (the loader gives it
    one image at a time), and on a GPU the most memory that this process has held until then, which
    is that of the training. Outside a training nothing is recorded.

    Args:
        model: what is evaluated.

    Yields:
        What is to be called in its place; nothing hangs on the model itself.
    """
    if not has_event_storage():
        yield model
        return
    on_gpu = any(p.is_cuda for p in model.parameters())
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    seconds: list[float] = []

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(inputs: Any) -> Any:
        start = clock()
        outputs = model(inputs)
        seconds.append(clock() - start)
        return outputs

    yield timed
    storage = get_event_storage()
    if seconds:
        storage.put_scalar(SECONDS_PER_IMAGE, median(seconds), smoothing_hint=False)
    if peak is not None:
        storage.put_scalar(MEMORY_MIB, peak, smoothing_hint=False)
