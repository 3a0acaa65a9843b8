"""COCO's AP at every IoU threshold, not at 0.50 and 0.75 alone."""

from collections.abc import Sequence

from detectron2.evaluation import COCOEvaluator
from detectron2.utils.logger import create_small_table
from pycocotools.cocoeval import COCOeval

__all__ = ["AllThresholdsCOCOEvaluator"]

_THRESHOLDS = range(50, 100, 5)  # per cent, as COCO has them


class AllThresholdsCOCOEvaluator(COCOEvaluator):
    """`COCOEvaluator` whose results hold AP50, AP55, ..., AP95; AP is their mean."""

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
    # is "all", the last limit 100 detections an image.
    precisions = coco_eval.eval["precision"][:, :, :, 0, -1]
    results = {}
    for threshold, precision in zip(coco_eval.params.iouThrs, precisions, strict=True):
        known = precision[precision > -1]
        ap = float(known.mean() * 100) if known.size else float("nan")
        results[f"AP{round(threshold * 100)}"] = ap
    return results
