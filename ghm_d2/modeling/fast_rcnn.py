"""Fast R-CNN output layers with GHM-C and GHM-R in place of cross entropy and smooth L1."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor, nn

from ghm_d2.losses import ASL1Loss, GHMCLoss, GHMRLoss, SmoothL1Loss
from ghm_d2.losses.base import raise_deferred_errors

from .build import build_losses
from .targets import proposal_deltas


class GHMFastRCNNOutputLayers(FastRCNNOutputLayers):
    """Box predictor whose two losses are harmonised; its inference is Detectron2's.

    The authors evaluated GHM-R here. Of GHM-C they say that it does not help in the second stage,
    because sampling has balanced the examples already.

    Shape shorthand:

        R: number of sampled proposals, over all images
        K: number of foreground classes
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        ghm_c: GHMCLoss | None,
        ghm_r: GHMRLoss | None,
        reg_baseline: ASL1Loss | SmoothL1Loss | None = None,
        prior_prob: float = 0.01,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: shape of the box features.
            ghm_c: classification loss, its activation "sigmoid" with `use_sigmoid_ce` and
                "softmax" without; None: Detectron2's cross entropy.
            ghm_r: box regression loss; None: `reg_baseline`.
            reg_baseline: box regression loss, normalised as Detectron2's; None: Detectron2's own.
            prior_prob: foreground probability at the start, in (0, 1), with a sigmoid `ghm_c`:
                most logits are negatives, which would all share one unit region at 0.5.
            kwargs: see :class:`detectron2.modeling.roi_heads.FastRCNNOutputLayers`.

        Raises:
            ValueError: `ghm_c` has the wrong activation, or `use_fed_loss` is True with it.
        """
        super().__init__(input_shape, **kwargs)
        self.ghm_c, self.ghm_r, self.reg_baseline = ghm_c, ghm_r, reg_baseline
        if ghm_c is None:
            return
        if self.use_fed_loss:
            raise ValueError("use_fed_loss must be False with ghm_c: both decide what counts")
        activation = "sigmoid" if self.use_sigmoid_ce else "softmax"
        if ghm_c.activation != activation:
            raise ValueError(
                f"ghm_c must have activation {activation!r} with use_sigmoid_ce "
                f"{self.use_sigmoid_ce}, got {ghm_c.activation!r}"
            )
        if self.use_sigmoid_ce:
            nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        losses = build_losses(cfg, "ROI_BOX_HEAD")
        prior = {"prior_prob": cfg.MODEL.GHM.ROI_BOX_HEAD.PRIOR_PROB}
        return {**super().from_config(cfg, input_shape), **losses, **prior}

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """
        Args:
            predictions: `(scores, proposal_deltas)`: (R, K + 1) and (R, 4) or (R, K * 4).
            proposals: sampled proposals with `proposal_boxes`, `gt_boxes`, `gt_classes`.

        Returns:
            `loss_cls` and `loss_box_reg`, scalars.
        """
        # Detectron2's method logs the accuracy and calls box_reg_loss below. The cross entropy that
        # is then replaced costs next to nothing for at most a few thousand rows.
        losses = super().losses(predictions, proposals)
        if self.ghm_c is not None:
            scores = predictions[0]
            gt_classes = [x.gt_classes for x in proposals]
            labels = torch.cat(gt_classes) if gt_classes else scores.new_zeros(0).long()
            logits = scores[:, :-1] if self.use_sigmoid_ce else scores
            losses["loss_cls"] = self.ghm_c(logits, labels) * self.loss_weight.get("loss_cls", 1.0)
        raise_deferred_errors(self)
        return losses

    def box_reg_loss(
        self, proposal_boxes: Tensor, gt_boxes: Tensor, pred_deltas: Tensor, gt_classes: Tensor
    ) -> Tensor:
        """
        Args:
            proposal_boxes: (R, 4).
            gt_boxes: (R, 4).
            pred_deltas: (R, 4), class-agnostic, or (R, K * 4).
            gt_classes: (R,), class in [0, K), K = background.

        Returns:
            A scalar. GHM-R is not divided by R as Detectron2's loss is: thanks to the density it
            does not depend on the number of examples.
        """
        if self.ghm_r is None and self.reg_baseline is None:
            return super().box_reg_loss(proposal_boxes, gt_boxes, pred_deltas, gt_classes)
        pred, target = proposal_deltas(
            self.box2box_transform,
            proposal_boxes,
            pred_deltas,
            gt_boxes,
            gt_classes,
            self.num_classes,
        )
        normalizer = max(gt_classes.numel(), 1)
        if self.ghm_r is None:
            return self.reg_baseline(pred, target) / normalizer
        return self.ghm_r(pred, target, divisor=normalizer)
