"""Runs a trained detector over images with ground truth and collects its distributions."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.modeling.meta_arch import GeneralizedRCNN, ProposalNetwork, RetinaNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import Tensor, nn

from ghm_d2.data.loader import build_test_mapper
from ghm_d2.errors import UserError
from ghm_d2.losses import GHMCLoss, GHMRLoss
from ghm_d2.losses.base import HarmonizedLoss
from ghm_d2.modeling.targets import anchor_deltas, proposal_deltas

from .distributions import ClassificationDistribution, RegressionDistribution

logger = logging.getLogger(__name__)


@dataclass
class PartDistributions:
    """What the losses of one part of a detector meet: "retinanet", "rpn" or "box_head"."""

    classification: ClassificationDistribution
    regression: RegressionDistribution

    @classmethod
    def of(cls, cfg: CfgNode | DictConfig, part: str, module: nn.Module) -> "PartDistributions":
        """Creates empty distributions, with the regions and mu of a part's harmonised losses.

        If the part does not use these losses, the values of a YAML config are taken or, with a
        Python config, the authors' values.
        """
        losses = {type(m): m for m in module.modules() if isinstance(m, HarmonizedLoss)}
        ghm_c = losses.get(GHMCLoss) or GHMCLoss()
        ghm_r = losses.get(GHMRLoss) or GHMRLoss()
        if isinstance(cfg, CfgNode):
            node, focal = cfg.MODEL.GHM[part], cfg.MODEL.RETINANET
            bins = node.CLS.BINS, node.REG.BINS
            alpha, gamma = focal.FOCAL_LOSS_ALPHA, focal.FOCAL_LOSS_GAMMA
            mu = ghm_r.mu if node.REG.MU == "auto" else node.REG.MU
        else:
            bins, mu = (ghm_c.bins, ghm_r.bins), ghm_r.mu
            alpha = getattr(module, "focal_loss_alpha", 0.25)
            gamma = getattr(module, "focal_loss_gamma", 2.0)
        softmax = isinstance(module, FastRCNNOutputLayers) and not module.use_sigmoid_ce
        activation = "softmax" if softmax else "sigmoid"
        return cls(
            ClassificationDistribution(bins[0], alpha, gamma, activation),
            RegressionDistribution(bins[1], float(mu)),
        )


def detector_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose `losses` see the examples, by the name of their node in `MODEL.GHM`.

    Raises:
        UserError: this model has none.
    """
    if isinstance(model, RetinaNet):
        return {"RETINANET": model}
    parts = {}
    if isinstance(model, GeneralizedRCNN | ProposalNetwork):
        if isinstance(model.proposal_generator, RPN):
            parts["RPN"] = model.proposal_generator
        predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
        if isinstance(predictor, FastRCNNOutputLayers):
            parts["ROI_BOX_HEAD"] = predictor
    if not parts:
        raise UserError(
            f"no figures can be drawn of a {type(model).__name__}: it is neither a RetinaNet nor "
            "a detector with Detectron2's RPN or box head."
        )
    return parts


def collect(
    cfg: CfgNode | DictConfig, model: nn.Module, records: Iterable[dict[str, Any]]
) -> dict[str, PartDistributions]:
    """Runs the model on each image as in training, but changes neither weights nor statistics.

    Anchors and proposals are matched (and sampled, where the detector samples) as in training;
    images are resized as for the test.

    Args:
        cfg: the config of the model, YAML or Python.
        model: a trained detector; left as it was.
        records: images in Detectron2's standard format, with annotations.

    Returns:
        Distributions by part: "retinanet", or "rpn" and "box_head".

    Raises:
        UserError: the detector is of an unknown kind, or no image could be read.
    """
    parts = {n: PartDistributions.of(cfg, n, m) for n, m in detector_parts(model).items()}
    if isinstance(cfg, CfgNode):
        mapper = build_test_mapper(cfg)
    else:
        mapper = instantiate(cfg.dataloader.test.mapper)
    mapper.is_train = True  # resized as for the test, yet with the ground truth
    unreadable = []
    images = 0
    with _recording(model, parts), torch.no_grad(), EventStorage():
        for record in records:
            try:
                image = mapper(record)
            except (OSError, SizeMismatchError) as error:
                unreadable.append(f"{record['file_name']} ({error})")
                continue
            model([image])
            images += 1
    if unreadable:
        logger.warning(
            "%d images cannot be read and were left out; the first: %s",
            len(unreadable),
            unreadable[0],
        )
    if not images:
        raise UserError("none of the images can be read.")
    logger.info("collected the examples of %d images", images)
    return {name.lower().removeprefix("roi_"): part for name, part in parts.items()}


@contextlib.contextmanager
def _recording(model: nn.Module, parts: dict[str, PartDistributions]) -> Iterator[None]:
    """Puts recorders in place of the losses, and has the model match ground truth meanwhile."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    # Their own `training` flags send the forward pass to the losses. `train()` would also set those
    # of their submodules, and batch norm would change its statistics.
    matching = [model]
    for name in ("proposal_generator", "roi_heads"):
        if isinstance(getattr(model, name, None), RPN | StandardROIHeads):
            matching.append(getattr(model, name))
    for module in matching:
        module.training = True
    replaced: list[tuple[nn.Module, str]] = []

    def replace(module: nn.Module, name: str, function: Callable) -> None:
        setattr(module, name, function)  # the instance's attribute hides the method of its class
        replaced.append((module, name))

    for name, module in detector_parts(model).items():
        recorder = _record_box_head if name == "ROI_BOX_HEAD" else _record_dense
        replace(module, "losses", partial(recorder, module, parts[name]))
        if name == "RETINANET":
            # A subclass may call its losses with other arguments than the recorder takes.
            forward = partial(RetinaNet.forward_training, module)
            replace(module, "forward_training", forward)
    try:
        yield
    finally:
        for module, name in replaced:
            delattr(module, name)
        for module, training in was_training.items():
            module.training = training


def _record_dense(
    module: RetinaNet | RPN,
    part: PartDistributions,
    anchors: list[Boxes],
    pred_logits: list[Tensor],
    gt_labels: list[Tensor],
    pred_anchor_deltas: list[Tensor],
    gt_boxes: list[Tensor],
) -> dict[str, Tensor]:
    """Stands in for `RetinaNet.losses` and `RPN.losses`."""
    labels, logits = torch.stack(gt_labels), torch.cat(pred_logits, dim=1)
    if isinstance(module, RPN):
        # Objectness: 1 = object becomes class 0, 0 = background becomes class 1, "background".
        labels, logits = torch.where(labels >= 0, 1 - labels, labels).long(), logits.unsqueeze(2)
    num_classes = logits.shape[2]
    part.classification.add(logits.flatten(0, 1), labels.flatten())
    pair = anchor_deltas(
        module.box2box_transform,
        Boxes.cat(anchors).tensor,
        torch.cat(pred_anchor_deltas, dim=1),
        gt_boxes,
        (labels >= 0) & (labels < num_classes),
    )
    part.regression.add(*pair)
    return {}


def _record_box_head(
    module: FastRCNNOutputLayers,
    part: PartDistributions,
    predictions: tuple[Tensor, Tensor],
    proposals: list[Instances],
) -> dict[str, Tensor]:
    """Stands in for `FastRCNNOutputLayers.losses`."""
    scores, deltas = predictions
    labels = torch.cat([x.gt_classes for x in proposals])
    part.classification.add(scores[:, :-1] if module.use_sigmoid_ce else scores, labels)
    # Without ground truth, an image's proposals are background and have no gt_boxes.
    pair = proposal_deltas(
        module.box2box_transform,
        torch.cat([x.proposal_boxes.tensor for x in proposals]),
        deltas,
        torch.cat(
            [(x.gt_boxes if x.has("gt_boxes") else x.proposal_boxes).tensor for x in proposals]
        ),
        labels,
        module.num_classes,
    )
    part.regression.add(*pair)
    return {}
