"""An evaluation's AP at every IoU threshold, not at 0.50 and 0.75 alone, and its costs."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.logger import create_small_table
from pycocotools.cocoeval import COCOeval
from torch import nn

from ghm_d2.files import write_json
from ghm_d2.run_folder import MEMORY_MIB, SECONDS_PER_IMAGE

__all__ = ["AllThresholdsCOCOEvaluator", "costs_recorded"]

_THRESHOLDS = range(50, 100, 5)  # per cent, as COCO has them


class AllThresholdsCOCOEvaluator(COCOEvaluator):
    """`COCOEvaluator` whose results hold AP50, AP55, ..., AP95; AP is their mean.

    Objects are compared with what the checks of `--dataset` have left of the annotation file, and
    as many detections of an image count as it may give.
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
