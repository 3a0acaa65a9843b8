"""What a detector finds in one image, and whether two detectors find the same."""

from typing import NamedTuple

from detectron2.modeling import FCOS, GeneralizedRCNN, RetinaNet
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import Tensor, nn

from ghm_d2.errors import UserError


class Detections(NamedTuple):
    """The N detections of an image, best first.

    Attributes:
        boxes: (N, 4) float32, x1, y1, x2, y2 in pixels of the image that was given, clipped to it.
        scores: (N,) float32 in [0, 1].
        classes: (N,) int64 in [0, K).
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def check_detector(model: nn.Module) -> None:
    """Refuses a model that cannot be exported.

    Raises:
        UserError: it is of another kind, or has masks or keypoints.
    """
    if isinstance(model, RetinaNet | FCOS):
        return
    heads = getattr(model, "roi_heads", None)
    predictors = getattr(heads, "box_predictor", None)
    predictors = predictors if isinstance(predictors, nn.ModuleList) else [predictors]
    known = all(isinstance(predictor, FastRCNNOutputLayers) for predictor in predictors)
    if not isinstance(model, GeneralizedRCNN) or not known:
        raise UserError(
            f"the model {type(model).__name__} with the heads {type(heads).__name__} is neither a "
            "RetinaNet, FCOS, Faster R-CNN nor Cascade R-CNN: only these can be exported."
        )
    if any(getattr(heads, name, False) for name in ("mask_on", "keypoint_on")):
        raise UserError(
            "masks and keypoints are not exported: give MODEL.MASK_ON False MODEL.KEYPOINT_ON "
            "False to export the boxes alone."
        )


def limits(model: nn.Module) -> tuple[float, int]:
    """The score below which the model drops detections, and how many it keeps per image."""
    if not isinstance(model, GeneralizedRCNN):
        return model.test_score_thresh, model.max_detections_per_image
    predictor = model.roi_heads.box_predictor
    if isinstance(predictor, nn.ModuleList):  # of a cascade; the last one decides
        predictor = predictor[-1]
    return predictor.test_score_thresh, predictor.test_topk_per_image


def detect(model: nn.Module, image: Tensor) -> Detections:
    """Runs the model's own inference on one image, (C, H, W), 0 .. 255 in `INPUT.FORMAT`."""
    found = model([{"image": image}])[0]["instances"]
    return Detections(found.pred_boxes.tensor, found.scores, found.pred_classes)


class Comparison(NamedTuple):
    """How far two runs of a detector on one image agree.

    Attributes:
        expected: number of detections of the reference.
        matched: how many of them the other found too.
        missing: detections of either side without a partner.
        score_difference: largest difference of the scores of two partners.
        box_difference: largest difference of their coordinates, in pixels.
    """

    expected: int
    matched: int
    missing: int
    score_difference: float
    box_difference: float


def compare_detections(
    expected: Detections,
    actual: Detections,
    score_threshold: float,
    most: int,
    score_tolerance: float = 1e-4,
    box_tolerance: float = 0.1,
) -> Comparison:
    """Pairs the detections of two runs of a detector on one image.

    Two detections are partners if they have the same class, scores within `score_tolerance` and
    coordinates within `box_tolerance` pixels; their order may differ, as that of equal scores
    does. A detection within `score_tolerance` of the score below which detections are dropped may
    appear in only one run: it is not counted as missing.

    Args:
        expected: the reference.
        actual: the other run.
        score_threshold: detections with lower scores are dropped.
        most: detections beyond this number are dropped.
        score_tolerance: see above.
        box_tolerance: see above.
    """
    expected, actual = (Detections(*(t.detach().cpu() for t in x)) for x in (expected, actual))
    box_gap = (expected.boxes[:, None] - actual.boxes[None]).abs().amax(dim=2)
    score_gap = (expected.scores[:, None] - actual.scores[None]).abs()
    possible = (box_gap <= box_tolerance) & (score_gap <= score_tolerance)
    possible &= expected.classes[:, None] == actual.classes[None]

    left = set(range(len(actual.scores)))
    alone, score_difference, box_difference = [], 0.0, 0.0
    for i, row in enumerate(possible):
        partner = min(
            left & set(row.nonzero()[:, 0].tolist()),
            key=box_gap[i].tolist().__getitem__,
            default=None,
        )
        if partner is None:
            alone.append(expected.scores[i].item())
            continue
        left.remove(partner)
        score_difference = max(score_difference, score_gap[i, partner].item())
        box_difference = max(box_difference, box_gap[i, partner].item())
    matched = len(expected.scores) - len(alone)
    alone += actual.scores[sorted(left)].tolist()
    cut = score_threshold
    for scores in (expected.scores, actual.scores):
        if len(scores) >= most:
            cut = max(cut, scores.min().item())
    missing = sum(score > cut + score_tolerance for score in alone)
    return Comparison(len(expected.scores), matched, missing, score_difference, box_difference)
