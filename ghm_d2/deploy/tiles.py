"""Detection tile by tile with SAHI, for images in which objects are too small for the detector."""

from collections.abc import Callable

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from ghm_d2.data.tiles import check_tiling, import_sahi

OVERLAP = 0.2


def tiled(
    infer: Callable[[np.ndarray], Instances], side: int, threshold: float
) -> Callable[[np.ndarray], Instances]:
    """A function like `infer` that looks at an image as a whole and at its tiles.

    What is found twice is merged as SAHI does by default (greedy merging by the share of the
    smaller box); masks and keypoints are left out.

    Args:
        infer: from an RGB image, (H, W, 3) uint8, to detections on the CPU.
        side: of a tile in pixels.
        threshold: detections with lower scores are not merged into others.

    Raises:
        UserError: SAHI is not installed, or the side is out of range.
    """
    sahi = import_sahi()
    check_tiling(side, OVERLAP)

    def predict(rgb: np.ndarray) -> dict[str, Instances]:
        return {"instances": _in_pixels(infer(rgb), rgb.shape[:2])}

    predict.input_format = "RGB"  # SAHI reads this attribute of Detectron2's predictor
    model = sahi.models.detectron2.Detectron2DetectionModel(
        confidence_threshold=threshold, device="cpu", load_at_init=False
    )
    model.model = predict

    def run(rgb: np.ndarray) -> Instances:
        result = sahi.predict.get_sliced_prediction(
            rgb,
            model,
            slice_height=side,
            slice_width=side,
            overlap_height_ratio=OVERLAP,
            overlap_width_ratio=OVERLAP,
            verbose=0,
        )
        rows = sorted(result.object_prediction_list, key=lambda row: -row.score.value)
        found = Instances(rgb.shape[:2])
        boxes = torch.tensor([row.bbox.to_xyxy() for row in rows], dtype=torch.float32)
        found.pred_boxes = Boxes(boxes.reshape(-1, 4))
        found.scores = torch.tensor([row.score.value for row in rows])
        found.pred_classes = torch.tensor([row.category.id for row in rows], dtype=torch.int64)
        return found

    return run


def _in_pixels(found: Instances, size: tuple[int, int]) -> Instances:
    """Boxes, scores and classes alone, in pixels of the image."""
    scaled = Instances(size)
    boxes = found.pred_boxes.clone()
    boxes.scale(size[1] / found.image_size[1], size[0] / found.image_size[0])
    boxes.clip(size)
    scaled.pred_boxes = boxes
    scaled.scores, scaled.pred_classes = found.scores, found.pred_classes
    return scaled
