"""Detectors whose every tensor but the image has a fixed size, for :func:`torch.export.export`.

Detectron2's own inference keeps what passes a threshold, so its sizes depend on values, and
torch.export stops at the first decision about such a size. Here everything is kept, with a mask
beside it: what the mask excludes comes last and never suppresses anything. The detections are
those of Detectron2's inference.
"""

import copy

import torch
import torch.nn.functional as F
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import nms

__all__ = ["FixedSizeRCNN", "FixedSizeRetinaNet", "fixed_size_detector"]

Candidates = tuple[Tensor, Tensor, Tensor, Tensor]  # boxes, scores, classes, mask


def fixed_size_detector(model: nn.Module) -> nn.Module:
    """Wraps a RetinaNet or a Faster R-CNN.

    Args:
        model: passes :func:`~ghm_d2.deploy.detections.check_detector`.

    Returns:
        A module in eval mode that takes an image, (C, H, W), and returns ``boxes``, (D, 4),
        ``scores``, (D,), ``classes``, (D,), and ``count``, () int64. D is
        ``TEST.DETECTIONS_PER_IMAGE``; rows from ``count`` on are padding: 0, 0 and -1.
    """
    if isinstance(getattr(model.backbone, "top_block", None), LastLevelMaxPool):
        model = copy.deepcopy(model)
        model.backbone.top_block = _Subsample()
    wrapper = FixedSizeRetinaNet if isinstance(model, RetinaNet) else FixedSizeRCNN
    return wrapper(model).eval()


class FixedSizeRetinaNet(nn.Module):
    """See :func:`fixed_size_detector`."""

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model, size = self.model, image.shape[-2:]
        features = model.backbone(_normalize_and_pad(model, image))
        features = [features[name] for name in model.head_in_features]
        logits, deltas = model._transpose_dense_predictions(
            model.head(features), [model.num_classes, 4]
        )
        levels = []
        for anchors, level_logits, level_deltas in zip(
            model.anchor_generator(features), logits, deltas, strict=True
        ):
            scores, index = _top(level_logits[0].sigmoid().flatten(), model.test_topk_candidates)
            anchor = index // model.num_classes
            boxes = model.box2box_transform.apply_deltas(
                level_deltas[0][anchor], anchors.tensor[anchor]
            )
            valid = scores > model.test_score_thresh
            levels.append((boxes, scores, index % model.num_classes, valid))
        boxes, scores, classes, valid = (torch.cat(x) for x in zip(*levels, strict=True))
        if getattr(model, "clip_before_nms", False):
            boxes = _clip(boxes, size)
            valid = valid & Boxes(boxes).nonempty()
        candidates = (boxes, scores, classes, valid)
        kept = _nms(candidates, model.test_nms_thresh, model.max_detections_per_image)
        return _finish(kept, size)


class FixedSizeRCNN(nn.Module):
    """See :func:`fixed_size_detector`."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model, size = self.model, image.shape[-2:]
        features = model.backbone(_normalize_and_pad(model, image))
        boxes, real = self._proposals(features, size)
        proposals = [Instances(size, proposal_boxes=Boxes(boxes))]
        heads = model.roi_heads
        predictor = heads.box_predictor
        pooled = heads.box_pooler(
            [features[name] for name in heads.box_in_features], [Boxes(boxes)]
        )
        predictions = predictor(heads.box_head(pooled))
        boxes = predictor.predict_boxes(predictions, proposals)[0]
        scores = predictor.predict_probs(predictions, proposals)[0]
        real = real & boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)

        scores = scores[:, :-1]
        rows, num_classes = scores.shape
        boxes = boxes.view(rows, -1, 4).expand(rows, num_classes, 4).reshape(-1, 4)
        classes = torch.arange(num_classes, device=scores.device).expand(rows, -1)
        valid = (scores > predictor.test_score_thresh) & real[:, None]
        candidates = (_clip(boxes, size), scores.flatten(), classes.flatten(), valid.flatten())
        return _finish(
            _nms(candidates, predictor.test_nms_thresh, predictor.test_topk_per_image), size
        )

    def _proposals(
        self, features: dict[str, Tensor], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        rpn = self.model.proposal_generator
        features = [features[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(features)
        levels = []
        for level, (anchors, level_logits, level_deltas) in enumerate(
            zip(rpn.anchor_generator(features), logits, deltas, strict=True)
        ):
            scores = level_logits[0].permute(1, 2, 0).flatten()
            scores, index = _top(scores, rpn.pre_nms_topk[False])
            # (A * 4, H, W) -> (H * W * A, 4)
            per_anchor = level_deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
            boxes = rpn.box2box_transform.apply_deltas(per_anchor[index], anchors.tensor[index])
            valid = boxes.isfinite().all(dim=1) & scores.isfinite()
            boxes = _clip(boxes, size)
            valid = valid & Boxes(boxes).nonempty(threshold=rpn.min_box_size)
            # Detectron2 suppresses level by level; in float64, offsets between levels are exact.
            levels.append((boxes.double(), scores, torch.full_like(index, level), valid))
        candidates = tuple(torch.cat(x) for x in zip(*levels, strict=True))
        boxes, _, _, real = _nms(candidates, rpn.nms_thresh, rpn.post_nms_topk[False])
        return boxes.float(), real


class _Subsample(LastLevelMaxPool):
    """The same values as its base class, whose pooling torch.export ties to odd or even sizes."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, :, ::2, ::2]]


def _normalize_and_pad(model: nn.Module, image: Tensor) -> Tensor:
    """As Detectron2's ``preprocess_image`` does, but for tensors that hold the padding."""
    image = (image.to(model.pixel_mean) - model.pixel_mean) / model.pixel_std
    height, width = image.shape[-2:]
    step = model.backbone.size_divisibility
    if step > 1:
        right, below = ((x + step - 1) // step * step - x for x in (width, height))
        image = F.pad(image, (0, right, 0, below))
    return image.unsqueeze(0)


def _top(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The ``number`` highest scores, (number,), and where they stand; -inf, 0 beyond the last."""
    scores, index = F.pad(scores, (0, number), value=-float("inf")).topk(number)
    return scores, torch.where(scores == -float("inf"), 0, index)


def _clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    xs = [x.clamp(0, width) for x in (x1, x2)]
    ys = [y.clamp(0, height) for y in (y1, y2)]
    return torch.stack((xs[0], ys[0], xs[1], ys[1]), dim=1)


def _nms(candidates: Candidates, threshold: float, number: int) -> Candidates:
    """Per-class NMS as torchvision's ``batched_nms``; the ``number`` best survivors, padded."""
    # Two more that touch nothing: torch.export takes the number that NMS keeps for 2 at least.
    boxes, scores, classes, valid = (F.pad(x, (0, 0) * (x.dim() - 1) + (0, 2)) for x in candidates)
    scores = torch.where(valid, scores, -float("inf"))
    placed = torch.where(valid[:, None], boxes, 0.0)
    offset = classes * (placed.max() + 1)
    # The invalid ones, but for the last, become one box that touches no other: the first of them
    # suppresses the rest, so that they cost no time.
    corner = placed.min() - 2 - F.pad(placed.new_zeros(len(boxes) - 1), (0, 1), value=2.0)
    nowhere = torch.stack((corner, corner, corner + 1, corner + 1), dim=1)
    placed = torch.where(valid[:, None], placed + offset[:, None], nowhere)
    keep = nms(placed, scores.to(placed.dtype), threshold)
    real = F.pad(valid[keep], (0, number))[:number]
    keep = F.pad(keep, (0, number))[:number]
    return boxes[keep], scores[keep], classes[keep], real


def _finish(kept: Candidates, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clips, drops boxes without area and moves the rest to the front, as Detectron2 does."""
    boxes, scores, classes, real = kept
    boxes = _clip(boxes, size)
    real = real & Boxes(boxes).nonempty()
    order = (~real).int().argsort(stable=True)
    boxes, scores, classes, real = boxes[order], scores[order], classes[order], real[order]
    return (
        torch.where(real[:, None], boxes, 0.0),
        torch.where(real, scores, 0.0),
        torch.where(real, classes, -1),
        real.sum(),
    )
