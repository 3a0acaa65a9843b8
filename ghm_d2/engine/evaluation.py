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

EVALUATOR_TYPES = ("coco", "lvis", "pascal_voc")

_THRESHOLDS = range(50, 100, 5)  # per cent, as COCO has them

_Class = tuple[np.ndarray, np.ndarray, np.ndarray, int]  # see _best_level


def build_evaluator(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """The evaluator for the metadata's `evaluator_type`.

    Args:
        cfg: a YAML config.
        name: of the data set.
        folder: for its files.

    Raises:
        UserError: no evaluator here knows the data set's `evaluator_type`.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind == "coco":
        if cfg.MODEL.KEYPOINT_ON:
            convert_incomplete(MetadataCatalog.get(name))
        # A cached conversion would be used even after the data have changed.
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

    The ground truth is what the checks of `--dataset` kept of the annotation file, and up to
    `max_dets_per_image` detections of each image count. Besides "bbox", the results hold "best_f1",
    the result of :func:`best_f1` for the boxes.
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
        """Detectron2's results, with "best_f1" added in the process that has them."""
        self._best_f1: dict[str, float] = {}
        results = super().evaluate(img_ids)
        return {**results, BEST_F1: self._best_f1} if self._best_f1 else results

    def _tasks_from_predictions(self, predictions: Sequence[dict[str, Any]]) -> list[str]:
        """Detectron2's tasks, without "segm" if some ground truth objects have no mask."""
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
        # A reader would miss the AP50 ... AP95 after a long list of classes ("AP-" and a name).
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

    COCO's evaluation at IoU 0.5 records the score at which each per cent of recall is reached. For
    a class of at most 100 objects, these include the score of each object that was found.

    Args:
        coco_eval: a box evaluation after `accumulate()`.
        class_names: in the order of its categories; none where there is one class.

    Returns:
        score_threshold in [0, 1], F1, precision and recall (per cent, over all classes), and
        score_threshold-NAME and F1-NAME for each class. NaN where nothing was found.
    """
    params, at = coco_eval.params, int(np.argmin(np.abs(coco_eval.params.iouThrs - 0.5)))
    precision, scores = (coco_eval.eval[x][at, :, :, 0, -1] for x in ("precision", "scores"))
    objects, detections = Counter(), {category: [] for category in params.catIds}
    images = set(params.imgIds)
    for each in coco_eval.cocoGt.anns.values():
        if each["image_id"] in images and not each.get("iscrowd", 0) and not each.get("ignore", 0):
            objects[each["category_id"]] += 1
    for each in coco_eval.cocoDt.anns.values():
        detections[each["category_id"]].append(each["score"])
    classes = []
    for k, category in enumerate(params.catIds):
        reached = precision[:, k] > 0  # beyond the largest recall it is 0, and -1 without objects
        # The number of objects found at each recall.
        found = np.maximum(np.ceil(params.recThrs[reached] * objects[category] - 1e-6), 1)
        rest = np.sort(detections[category]), objects[category]
        classes.append((scores[reached, k], found, *rest))
    results = _best_level(classes)
    for name, each in zip(class_names, classes, strict=False):
        own = _best_level([each])
        results |= {f"{key}-{name}": own[key] for key in ("score_threshold", "F1")}
    return results


def _best_level(
    classes: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, int]],
) -> dict[str, float]:
    """The score at which F1 over some classes together is largest, and these metrics there.

    Args:
        classes: for each class, a tuple of scores in descending order; how many objects are found
            at or above each of them; the scores of all its detections in ascending order; and its
            number of objects.
    """
    levels = np.unique(np.concatenate([scores for scores, *_ in classes] or [np.zeros(0)]))
    total = sum(objects for *_, objects in classes)
    if not len(levels) or not total:
        return dict.fromkeys(("score_threshold", "F1", "precision", "recall"), float("nan"))
    found, number = np.zeros(len(levels)), np.zeros(len(levels))
    for scores, counts, detections, _ in classes:
        reached = np.searchsorted(-scores, -levels, side="right")
        found += np.concatenate([[0], counts])[reached]
        number += len(detections) - np.searchsorted(detections, levels, side="left")
    f1 = 2 * found / (number + total)
    best = int(np.argmax(f1))
    return {
        "score_threshold": float(levels[best]),
        "F1": 100 * float(f1[best]),
        "precision": 100 * float(found[best] / number[best]),
        "recall": 100 * float(found[best] / total),
    }


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
    """Records in metrics.json the cost of an evaluation during training, run in the `with` block.

    Recorded are the median time of a model call in seconds, post-processing included (the loader
    yields one image at a time), and on a GPU the peak memory of this process before the block in
    MiB, which is that of the training. Outside a training nothing is recorded.

    Args:
        model: what is evaluated.

    Yields:
        The function to call in place of the model, which is not changed.
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
