"""FCOS with GHM-C in place of focal loss."""

from typing import Any

import torch
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes
from torch import Tensor

from ghm_d2.losses import GHMCLoss
from ghm_d2.losses.base import raise_deferred_errors

from .dense import DenseLoss, SteadyNormalizer, check_targets, levels_of_labels
from .targets import box_ious


class GHMFCOS(SteadyNormalizer, FCOS):
    """FCOS whose classification loss is harmonised; all else, inference too, is Detectron2's.

    There is no GHM-R here: it harmonises the gradient norms of single coordinates under authentic
    smooth L1, while FCOS regresses with the GIoU of whole boxes. Detectron2 has no YAML config for
    FCOS, so this one is built by arguments, as in `configs/lazy/ghm_fcos_R_50.py`.
    """

    def __init__(
        self,
        *,
        ghm_c: GHMCLoss | None,
        ghm_scope: str = "level",
        images_per_histogram: int = 0,
        num_histogram_groups: int = 1,
        cls_targets: str = "hard",
        **kwargs: Any,
    ) -> None:
        """
        Args:
            ghm_c: classification loss; None: Detectron2's focal loss.
            ghm_scope: see :class:`~ghm_d2.modeling.DenseLoss`, as for the next two.
            images_per_histogram: images that share a histogram; 0: all images.
            num_histogram_groups: groups in a training batch of one process.
            cls_targets: for `ghm_c`; see :class:`~ghm_d2.modeling.GHMRetinaNet`.
            kwargs: see :class:`detectron2.modeling.meta_arch.fcos.FCOS`.

        Raises:
            ValueError: one of these four is out of range.
        """
        super().__init__(**kwargs)
        self.cls_targets = check_targets(cls_targets)
        self.ghm_c = DenseLoss.of(ghm_c, ghm_scope, images_per_histogram, num_histogram_groups)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        pred_centerness: list[Tensor],
    ) -> dict[str, Tensor]:
        """
        Args:
            anchors: #levels Boxes of (Hi * Wi, 4).
            pred_logits: #levels tensors (N, Hi * Wi, K).
            gt_labels: N tensors (R,), int64: class in [0, K), K = background.
            pred_anchor_deltas: #levels tensors (N, Hi * Wi, 4).
            gt_boxes: N tensors (R, 4), the box matched to each point.
            pred_centerness: #levels tensors (N, Hi * Wi, 1).

        Returns:
            `loss_fcos_cls`, `loss_fcos_loc` and `loss_fcos_ctr`, scalars.

        Raises:
            ValueError: a label or logit is invalid, or the batch has more groups of
                `images_per_histogram` images than there are running counts.
        """
        rest = gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
        if self.ghm_c is None:
            return super().losses(anchors, pred_logits, *rest)
        sizes, scores = [x.shape[1] for x in pred_logits], None
        if self.cls_targets == "iou":
            positive = torch.stack(gt_labels) != self.num_classes
            decoded = Boxes.cat(anchors).tensor, torch.cat(pred_anchor_deltas, dim=1), gt_boxes
            ious = box_ious(self.box2box_transform, *decoded, positive)
            scores = ious.split(sizes, dim=1)
        loss_cls = self.ghm_c(pred_logits, levels_of_labels(gt_labels, sizes), scores=scores)
        # Detectron2's method gives the other two losses and logs the positives. The focal loss that
        # is then replaced costs one pass without a graph, over a ninth of a RetinaNet's logits.
        losses = super().losses(anchors, [x.detach() for x in pred_logits], *rest)
        raise_deferred_errors(self)
        return losses | {"loss_fcos_cls": loss_cls}
