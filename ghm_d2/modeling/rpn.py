"""The region proposal network with harmonised losses."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes
from torch import Tensor

from ghm_d2.losses import ASL1Loss, GHMCLoss, GHMRLoss, SmoothL1Loss
from ghm_d2.losses.base import raise_deferred_errors

from .build import build_losses
from .targets import anchor_deltas


@PROPOSAL_GENERATOR_REGISTRY.register()
class GHMRPN(RPN):
    """RPN with GHM-C on the objectness and GHM-R on the deltas of the sampled anchors.

    One histogram over all levels and images: a level seldom holds more than a few of the 256
    anchors that are sampled in an image.
    """

    @configurable
    def __init__(
        self,
        *,
        ghm_c: GHMCLoss | None,
        ghm_r: GHMRLoss | None,
        reg_baseline: ASL1Loss | SmoothL1Loss | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            ghm_c: objectness loss; None: Detectron2's binary cross entropy.
            ghm_r: box regression loss; None: `reg_baseline`.
            reg_baseline: box regression loss, normalised as Detectron2's; None: Detectron2's own.
            kwargs: see :class:`detectron2.modeling.proposal_generator.RPN`.
        """
        super().__init__(**kwargs)
        self.ghm_c, self.ghm_r, self.reg_baseline = ghm_c, ghm_r, reg_baseline

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        losses = build_losses(cfg, "RPN")  # refuses wrong keys before a network is built
        return {**super().from_config(cfg, input_shape), **losses}

    @torch.jit.unused
    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """
        Args:
            anchors: #levels Boxes of (Hi * Wi * A, 4).
            pred_objectness_logits: #levels tensors (N, Hi * Wi * A).
            gt_labels: N tensors (R,): 1 = object, 0 = background, -1 = not sampled.
            pred_anchor_deltas: #levels tensors (N, Hi * Wi * A, 4).
            gt_boxes: N tensors (R, 4), the box matched to each anchor.

        Returns:
            `loss_rpn_cls` and `loss_rpn_loc`, scalars.
        """
        # Detectron2's method also logs the sampled anchors. The losses that are then replaced cost
        # next to nothing for a few hundred examples.
        losses = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        labels, normalizer = torch.stack(gt_labels), self.batch_size_per_image * len(gt_labels)
        if self.ghm_c is not None:
            # One class: 0 is "object", 1 is background.
            classes = torch.where(labels >= 0, 1 - labels, labels).long()
            logits = torch.cat(pred_objectness_logits, dim=1)
            loss = self.ghm_c(logits.view(-1, 1), classes.flatten(), divisor=normalizer)
            losses["loss_rpn_cls"] = loss * self.loss_weight.get("loss_rpn_cls", 1.0)
        if self.ghm_r is not None or self.reg_baseline is not None:
            pred, target = anchor_deltas(
                self.box2box_transform,
                Boxes.cat(anchors).tensor,
                torch.cat(pred_anchor_deltas, dim=1),
                gt_boxes,
                labels == 1,
            )
            if self.ghm_r is not None:
                loss = self.ghm_r(pred, target, divisor=normalizer)
            else:
                loss = self.reg_baseline(pred, target) / normalizer
            losses["loss_rpn_loc"] = loss * self.loss_weight.get("loss_rpn_loc", 1.0)
        raise_deferred_errors(self)
        return losses
