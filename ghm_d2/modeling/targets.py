"""The deltas of matched boxes: what a detector predicted, and what it should have."""

from collections.abc import Sequence

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor


def anchor_deltas(
    transform: Box2BoxTransform,
    anchors: Tensor,
    deltas: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    positive: Tensor,
) -> tuple[Tensor, Tensor]:
    """Deltas of the positive anchors of all images.

    Args:
        transform: from boxes to deltas.
        anchors: (R, 4), the same in every image.
        deltas: (N, R, 4), predicted.
        gt_boxes: N tensors (R, 4) or one (N, R, 4), the box matched to each anchor.
        positive: bool (N, R).

    Returns:
        Predictions and targets, (P, 4) each, image after image.
    """
    image, index = positive.nonzero(as_tuple=True)
    boxes = gt_boxes if isinstance(gt_boxes, Tensor) else torch.stack(list(gt_boxes))
    return deltas[image, index], transform.get_deltas(anchors[index], boxes[image, index])


@torch.no_grad()
def box_ious(
    transform: Box2BoxTransform,
    anchors: Tensor,
    deltas: Tensor,
    gt_boxes: Sequence[Tensor] | Tensor,
    positive: Tensor,
) -> Tensor:
    """How well each positive anchor's box, as predicted, fits the box matched to it.

    Args:
        transform: from deltas to boxes.
        anchors, deltas, gt_boxes, positive: see :func:`anchor_deltas`.

    Returns:
        float32 (N, R) in [0, 1], without a gradient: the IoU of the two; 0 where `positive` is
        False, or a delta is NaN (the losses say so then).
    """
    image, index = positive.nonzero(as_tuple=True)
    matched = gt_boxes if isinstance(gt_boxes, Tensor) else torch.stack(list(gt_boxes))
    boxes = transform.apply_deltas(deltas[image, index].float(), anchors[index])
    ious = matched_pairwise_iou(Boxes(boxes), Boxes(matched[image, index]))
    found = ious.new_zeros(positive.shape)
    found[image, index] = ious.nan_to_num(0.0).clamp(0, 1)  # rounding may exceed 1
    return found


def proposal_deltas(
    transform: Box2BoxTransform,
    proposals: Tensor,
    deltas: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Deltas of the proposals that are objects.

    Args:
        transform: from boxes to deltas.
        proposals: (R, 4).
        deltas: (R, 4), class-agnostic, or (R, K * 4).
        gt_boxes: (R, 4), the box matched to each proposal.
        gt_classes: (R,), class in [0, K), K = background.
        num_classes: K.

    Returns:
        Predictions and targets, (P, 4) each.
    """
    index = ((gt_classes >= 0) & (gt_classes < num_classes)).nonzero(as_tuple=True)[0]
    box_dim = proposals.shape[1]
    if deltas.shape[1] == box_dim:
        pred = deltas[index]
    else:
        # Without proposals, Detectron2's gt_classes is an empty float tensor.
        pred = deltas.view(-1, num_classes, box_dim)[index, gt_classes[index].long()]
    return pred, transform.get_deltas(proposals[index], gt_boxes[index])
