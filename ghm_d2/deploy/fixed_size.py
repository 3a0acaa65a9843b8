"""Detectors whose tensor sizes never depend on values, so that other runtimes can follow them.

Detectron2's own inference keeps what passes a threshold, so its sizes depend on values:
torch.export stops at the first decision about such a size, and many runtimes take no batch with
such sizes. Here everything is kept, with a mask beside it: what the mask excludes comes last and
never suppresses anything. The detections are those of Detectron2's inference.
"""

import copy

import torch
import torch.nn.functional as F
from detectron2.modeling import FCOS, GeneralizedRCNN, RetinaNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads
from torch import Tensor, nn

from .padded import (
    Size,
    clip,
    finish,
    finite,
    nonempty,
    padded_nms,
    pool,
    single,
    take_rows,
    top_scores,
)


def fixed_size_detector(model: nn.Module, *, batch: bool = False, half: bool = False) -> nn.Module:
    """Wraps a detector.

    Args:
        model: passes :func:`~ghm_d2.deploy.detections.check_detector`.
        batch: whether it takes N images of one size at once.
        half: whether convolutions and linear layers compute in float16. Images, boxes and scores
            stay float32: float16 has no fractions above 1024 and skips odd numbers above 2048.

    Returns:
        A module in eval mode that takes images, (N, C, H, W), and returns `boxes`, (N, D, 4),
        `scores`, (N, D), `classes`, (N, D), and `count`, (N,) int64. D is
        `TEST.DETECTIONS_PER_IMAGE`; rows from `count` on are padding: 0, 0, -1. Without
        `batch`, it takes one image, (C, H, W), and its outputs lack the first axis too.
    """
    subsample = isinstance(getattr(model.backbone, "top_block", None), LastLevelMaxPool)
    if subsample or half:
        model = copy.deepcopy(model)
    if subsample:
        model.backbone.top_block = _Subsample()
    if half:
        for part in _layers(model):
            _halve(part)
    wrapper = FixedSizeRCNN if isinstance(model, GeneralizedRCNN) else FixedSizeDense
    fixed = wrapper(model)
    return (fixed if batch else SingleImage(fixed)).eval()


class SingleImage(nn.Module):
    """A batched detector for one image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(x[0] for x in self.model(image[None]))


class FixedSizeDense(nn.Module):
    """RetinaNet and FCOS; see :func:`fixed_size_detector`."""

    def __init__(self, model: RetinaNet | FCOS) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model, size = self.model, images.shape[-2:]
        features = model.backbone(_normalize_and_pad(model, images))
        features = [features[name] for name in model.head_in_features]
        outputs = [[single(x) for x in levels] for levels in model.head(features)]
        dims = [model.num_classes, 4, 1][: len(outputs)]  # FCOS also has centerness
        logits, deltas, *centerness = model._transpose_dense_predictions(outputs, dims)
        levels = []
        anchors = model.anchor_generator([single(f) for f in features])
        for level, level_anchors in enumerate(anchors):
            scores = logits[level].sigmoid()
            if centerness:
                scores = torch.sqrt(scores * centerness[0][level].sigmoid())
            scores, index = top_scores(scores.flatten(1), model.test_topk_candidates)
            anchor = index // model.num_classes
            boxes = model.box2box_transform.apply_deltas(
                take_rows(deltas[level], anchor).reshape(-1, 4),
                level_anchors.tensor[anchor.flatten()],
            ).view(*index.shape, 4)
            valid = scores > model.test_score_thresh
            levels.append((boxes, scores, index % model.num_classes, valid))
        boxes, scores, classes, valid = (torch.cat(x, dim=1) for x in zip(*levels, strict=True))
        if getattr(model, "clip_before_nms", False):
            boxes = clip(boxes, size)
            valid = valid & nonempty(boxes)
        candidates = (boxes, scores, classes, valid)
        groups = model.num_classes
        kept = padded_nms(candidates, model.test_nms_thresh, model.max_detections_per_image, groups)
        return finish(kept, size, model.max_detections_per_image)


class FixedSizeRCNN(nn.Module):
    """Faster R-CNN and Cascade R-CNN; see :func:`fixed_size_detector`."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        heads, size = self.model.roi_heads, images.shape[-2:]
        features = self.model.backbone(_normalize_and_pad(self.model, images))
        boxes, real = self._proposals(features, size)
        number, rows = real.shape
        if isinstance(heads, CascadeROIHeads):
            stages = list(zip(heads.box_head, heads.box_predictor, strict=True))
        else:
            stages = [(getattr(heads, "box_head", None), heads.box_predictor)]
        probabilities = []
        for stage, (head, predictor) in enumerate(stages):
            if stage > 0:
                boxes = clip(boxes, size)
            # Not predict_boxes and predict_probs, which split their results by image.
            outputs = predictor(self._pooled(features, boxes, head))
            logits, deltas = (single(x) for x in outputs)
            boxes = predictor.box2box_transform.apply_deltas(deltas, boxes.reshape(-1, 4))
            sigmoid = predictor.use_sigmoid_ce
            probabilities.append(logits.sigmoid() if sigmoid else logits.softmax(dim=-1))
            if stage + 1 < len(stages):
                boxes = boxes.view(number, rows, 4)
        scores = sum(probabilities) * (1.0 / len(stages)) if len(stages) > 1 else probabilities[0]
        usable = finite(boxes).all(dim=1) & finite(scores).all(dim=1)
        real = real & usable.view(number, rows)

        scores = scores[:, :-1]
        num_classes = scores.shape[1]
        boxes = boxes.view(number, rows, -1, 4).expand(-1, -1, num_classes, -1).flatten(1, 2)
        scores = scores.view(number, rows, num_classes)
        classes = torch.arange(num_classes, device=scores.device).expand_as(scores).flatten(1)
        valid = (scores > predictor.test_score_thresh) & real[:, :, None]
        candidates = (clip(boxes, size), scores.flatten(1), classes, valid.flatten(1))
        most = predictor.test_topk_per_image
        return finish(
            padded_nms(candidates, predictor.test_nms_thresh, most, num_classes), size, most
        )

    def _pooled(self, features: dict[str, Tensor], boxes: Tensor, head: nn.Module) -> Tensor:
        """The pooled features that the box predictor takes, (N * R, ...)."""
        heads = self.model.roi_heads
        if isinstance(heads, Res5ROIHeads):
            x = pool(heads.pooler, [features[name] for name in heads.in_features], boxes)
            return heads.res5(x).mean(dim=[2, 3])
        return head(pool(heads.box_pooler, [features[n] for n in heads.box_in_features], boxes))

    def _proposals(self, features: dict[str, Tensor], size: Size) -> tuple[Tensor, Tensor]:
        rpn = self.model.proposal_generator
        features = [features[name] for name in rpn.in_features]
        logits, deltas = ([single(x) for x in levels] for levels in rpn.rpn_head(features))
        anchors = rpn.anchor_generator([single(f) for f in features])
        levels = []
        for level, level_anchors in enumerate(anchors):
            scores = logits[level].permute(0, 2, 3, 1).flatten(1)
            scores, index = top_scores(scores, rpn.pre_nms_topk[False])
            # (N, A * 4, H, W) -> (N, H * W * A, 4)
            per_anchor = deltas[level].unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            boxes = rpn.box2box_transform.apply_deltas(
                take_rows(per_anchor, index).reshape(-1, 4), level_anchors.tensor[index.flatten()]
            ).view(*index.shape, 4)
            valid = finite(boxes).all(dim=2) & finite(scores)
            boxes = clip(boxes, size)
            valid = valid & nonempty(boxes, rpn.min_box_size)
            levels.append((boxes, scores, torch.full_like(index, level), valid))
        # Detectron2's RPN applies NMS to each level by itself.
        candidates = tuple(torch.cat(x, dim=1) for x in zip(*levels, strict=True))
        kept = padded_nms(candidates, rpn.nms_thresh, rpn.post_nms_topk[False], len(levels))
        return kept[0], kept[3]


class _Subsample(LastLevelMaxPool):
    """The same values as its base class, whose pooling torch.export ties to odd or even sizes."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:, :, ::2, ::2]]


def _layers(model: nn.Module) -> list[nn.Module]:
    """The parts that can compute in float16, because their numbers are not coordinates."""
    if not isinstance(model, GeneralizedRCNN):
        return [model.backbone, model.head]
    heads = model.roi_heads
    own = heads.res5 if isinstance(heads, Res5ROIHeads) else heads.box_head
    predictors = heads.box_predictor
    several = predictors if isinstance(predictors, nn.ModuleList) else [predictors]
    return [model.backbone, model.proposal_generator.rpn_head, own, *several]


def _halve(part: nn.Module) -> None:
    part.half().register_forward_pre_hook(_to_half)


def _to_half(_: nn.Module, inputs: tuple) -> tuple:
    (x,) = inputs
    if isinstance(x, Tensor):
        return (x.half(),)
    return ([y.half() for y in x],)


def _normalize_and_pad(model: nn.Module, images: Tensor) -> Tensor:
    """As Detectron2's `preprocess_image`, for a tensor of images that all have one size."""
    images = (single(images) - model.pixel_mean) / model.pixel_std
    height, width = images.shape[-2:]
    step = model.backbone.size_divisibility
    if step > 1:
        right, below = ((x + step - 1) // step * step - x for x in (width, height))
        images = F.pad(images, (0, right, 0, below))
    return images
