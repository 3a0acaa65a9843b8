"""RetinaNet with GHM-C and GHM-R in place of focal loss and smooth L1."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms, cat
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor

from ghm_d2.losses import (
    ASL1Loss,
    CrossEntropyLoss,
    FocalLoss,
    GHMCLoss,
    GHMRLoss,
    OHEMLoss,
    SmoothL1Loss,
)
from ghm_d2.losses.base import raise_deferred_errors

from .build import build_losses, dense_settings
from .dense import DenseLoss, SteadyNormalizer, check_targets, levels_of_labels
from .targets import anchor_deltas, box_ious


@META_ARCH_REGISTRY.register()
class GHMRetinaNet(SteadyNormalizer, RetinaNet):
    """RetinaNet whose two losses are harmonised; the rest, but for one switch, is Detectron2's.

    Shape shorthand:

        N: number of images in the minibatch
        R: number of anchors of an image, over all levels
        K: number of foreground classes
    """

    @configurable
    def __init__(
        self,
        *,
        ghm_c: GHMCLoss | None,
        ghm_r: GHMRLoss | None,
        ghm_scope: str = "level",
        images_per_histogram: int = 0,
        num_histogram_groups: int = 1,
        cls_baseline: CrossEntropyLoss | FocalLoss | OHEMLoss | None = None,
        cls_targets: str = "hard",
        reg_baseline: ASL1Loss | SmoothL1Loss | None = None,
        clip_before_nms: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            ghm_c: classification loss; None: `cls_baseline`.
            ghm_r: box regression loss; None: `reg_baseline`.
            ghm_scope: see :class:`~ghm_d2.modeling.DenseLoss`, as for the next two.
            images_per_histogram: images that share a histogram; 0: all images.
            num_histogram_groups: groups in a training batch of one process.
            cls_baseline: classification loss over all anchors at once; None: Detectron2's focal
                loss.
            cls_targets: what a positive's own class should score: "hard", 1; "iou", the IoU of its
                decoded box with the box matched to it (Detectron2's focal loss allows only 1).
            reg_baseline: box regression loss, normalised as Detectron2's; None: Detectron2's own.
            clip_before_nms: clip boxes to the image before NMS, as mmdetection does, and drop
                those that are empty then; False: after it.
            kwargs: see :class:`detectron2.modeling.meta_arch.retinanet.RetinaNet`.

        Raises:
            ValueError: `cls_targets` or one of the three settings of :class:`DenseLoss` is out of
                range.
        """
        super().__init__(**kwargs)
        self.clip_before_nms = clip_before_nms
        self.cls_targets = check_targets(cls_targets)
        settings = ghm_scope, images_per_histogram, num_histogram_groups
        self.ghm_c, self.ghm_r = DenseLoss.of(ghm_c, *settings), DenseLoss.of(ghm_r, *settings)
        self.cls_baseline, self.reg_baseline = cls_baseline, reg_baseline

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        # First, so that a wrong key is refused before a network is built.
        ours = build_losses(cfg, "RETINANET") | dense_settings(cfg)
        clip = {"clip_before_nms": cfg.MODEL.GHM.CLIP_BEFORE_NMS}
        return {**super().from_config(cfg), **ours, **clip}

    def inference_single_image(
        self,
        anchors: list[Boxes],
        box_cls: list[Tensor],
        box_delta: list[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """Detectron2's, with the clipping of `clip_before_nms`.

        Args:
            anchors: #levels Boxes of (Hi * Wi * A, 4).
            box_cls: #levels tensors (Hi * Wi * A, K), scores in (0, 1).
            box_delta: #levels tensors (Hi * Wi * A, 4).
            image_size: height and width in pixels.

        Returns:
            The detections of one image, best first.
        """
        # Not by super(), which TorchScript does not know.
        pred = self._decode_multi_level_predictions(
            anchors,
            box_cls,
            box_delta,
            self.test_score_thresh,
            self.test_topk_candidates,
            image_size,
        )
        if self.clip_before_nms:
            pred.pred_boxes.clip(image_size)
            pred = pred[pred.pred_boxes.nonempty()]
        keep = batched_nms(
            pred.pred_boxes.tensor, pred.scores, pred.pred_classes, self.test_nms_thresh
        )
        return pred[keep[: self.max_detections_per_image]]

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """
        Args:
            anchors: #levels Boxes of (Hi * Wi * A, 4).
            pred_logits: #levels tensors (N, Hi * Wi * A, K).
            gt_labels: N tensors (R,), int64: class in [0, K), K = background, -1 = ignored.
            pred_anchor_deltas: #levels tensors (N, Hi * Wi * A, 4).
            gt_boxes: N tensors (R, 4), the box matched to each anchor.

        Returns:
            `loss_cls` and `loss_box_reg`, scalars.

        Raises:
            ValueError: a label or target is invalid, or the batch has more groups of
                `images_per_histogram` images than there are running counts.
        """
        if not any((self.ghm_c, self.ghm_r, self.cls_baseline, self.reg_baseline)):
            return super().losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        labels = torch.stack(gt_labels)
        positive = (labels >= 0) & (labels != self.num_classes)
        loss_cls = loss_box_reg = scores = None
        if self.cls_targets == "iou":
            decoded = Boxes.cat(anchors).tensor, cat(pred_anchor_deltas, dim=1), gt_boxes, positive
            scores = box_ious(self.box2box_transform, *decoded)
        if self.ghm_c is not None:
            sizes = [x.shape[1] for x in pred_logits]
            levels = None if scores is None else scores.split(sizes, dim=1)
            loss_cls = self.ghm_c(pred_logits, levels_of_labels(gt_labels, sizes), scores=levels)
        elif self.cls_baseline is not None:
            logits = cat(pred_logits, dim=1).flatten(0, 1)
            own = None if scores is None else scores.flatten()
            loss_cls = self.cls_baseline(logits, labels.flatten(), own)
        else:
            focal_loss = self._focal_loss(pred_logits, labels)
        if self.ghm_r is not None:
            loss_box_reg = self._ghm_r_loss(anchors, pred_anchor_deltas, gt_boxes, positive)
        # Here the step waits for the device, as Detectron2's does; the losses above never do so.
        num_positive = positive.sum().item()
        get_event_storage().put_scalar("num_pos_anchors", num_positive / len(gt_labels))
        raise_deferred_errors(self)
        # Detectron2 normalises by a running number of positives; a harmonised loss has its own.
        normalizer = self._ema_update("loss_normalizer", max(num_positive, 1), 100)
        if loss_cls is None:
            loss_cls = focal_loss / normalizer
        elif isinstance(self.cls_baseline, FocalLoss):  # the others are means
            loss_cls = loss_cls / normalizer
        if self.reg_baseline is not None:
            deltas = cat(pred_anchor_deltas, dim=1)
            boxes = Boxes.cat(anchors).tensor
            pair = anchor_deltas(self.box2box_transform, boxes, deltas, gt_boxes, positive)
            loss_box_reg = self.reg_baseline(*pair) / normalizer
        elif loss_box_reg is None:
            loss_box_reg = _dense_box_regression_loss(
                anchors,
                self.box2box_transform,
                pred_anchor_deltas,
                gt_boxes,
                positive,
                box_reg_loss_type=self.box_reg_loss_type,
                smooth_l1_beta=self.smooth_l1_beta,
            )
            loss_box_reg = loss_box_reg / normalizer
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}

    def _focal_loss(self, pred_logits: list[Tensor], labels: Tensor) -> Tensor:
        """Detectron2's focal loss, not normalised, for a detector with GHM-R alone."""
        valid = labels >= 0
        one_hot = F.one_hot(labels[valid], num_classes=self.num_classes + 1)[:, :-1]
        return sigmoid_focal_loss_jit(
            cat(pred_logits, dim=1)[valid],
            one_hot.to(pred_logits[0].dtype),
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
            reduction="sum",
        )

    def _ghm_r_loss(
        self,
        anchors: list[Boxes],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        positive: Tensor,
    ) -> Tensor:
        sizes = [len(x) for x in anchors]
        masks = positive.split(sizes, dim=1)
        levels = zip(
            (x.tensor for x in anchors),
            pred_anchor_deltas,
            torch.stack(gt_boxes).split(sizes, dim=1),
            masks,
            strict=True,
        )
        pairs = [anchor_deltas(self.box2box_transform, *level) for level in levels]
        return self.ghm_r(*zip(*pairs, strict=True), masks)
