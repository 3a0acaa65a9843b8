"""The losses that feature_gradients.py compares, on one set of predictions.

Shape shorthand:

    N: number of images
    R: number of anchors of an image, over all levels; R_l: of one level
    K: number of foreground classes
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from fvcore.nn import sigmoid_focal_loss_jit, smooth_l1_loss
from torch import Tensor, nn

from ghm_d2.losses import CrossEntropyLoss, GHMCLoss, GHMRLoss
from ghm_d2.losses.base import HarmonizedLoss

SMOOTH_L1_BETA = 1 / 9  # the paper's


@dataclass
class Predictions:
    """A batch's predictions and what they should be.

    Attributes:
        anchors: #levels Boxes of R_l.
        logits: #levels (N, R_l, K).
        deltas: #levels (N, R_l, 4).
        labels: int64 (N, R): a class in [0, K), K = background, -1 = ignored.
        noisy_labels: the same where some boxes carry a wrong class.
        boxes: (N, R, 4), the box matched to each anchor.
        transform: from anchors and boxes to deltas.
    """

    anchors: list[Boxes]
    logits: list[Tensor]
    deltas: list[Tensor]
    labels: Tensor
    noisy_labels: Tensor
    boxes: Tensor
    transform: Box2BoxTransform

    @property
    def num_classes(self) -> int:
        return self.logits[0].shape[-1]

    def level_labels(self, noisy: bool = False) -> list[Tensor]:
        """#levels (N * R_l,)."""
        labels = self.noisy_labels if noisy else self.labels
        parts = labels.split([len(a) for a in self.anchors], dim=1)
        return [part.flatten() for part in parts]

    def positives(self, noisy: bool = False) -> list[Tensor]:
        """#levels bool (N * R_l,)."""
        return [(y >= 0) & (y < self.num_classes) for y in self.level_labels(noisy)]

    def level_deltas(self) -> list[tuple[Tensor, Tensor]]:
        """For each level the deltas of its positives and their targets, both (P, 4)."""
        pairs = []
        boxes = self.boxes.split([len(a) for a in self.anchors], dim=1)
        for anchor, delta, box, positive in zip(
            self.anchors, self.deltas, boxes, self.positives(), strict=True
        ):
            index = positive.nonzero().squeeze(1)
            own = anchor.tensor[index % len(anchor)]
            target = self.transform.get_deltas(own, box.flatten(0, 1)[index])
            pairs.append((delta.flatten(0, 1)[index], target))
        return pairs


class Variant(nn.Module):
    """A loss as a detector would use it; its running averages are buffers."""

    noisy = False

    def forward(self, predictions: Predictions) -> Tensor:
        raise NotImplementedError


class _Normalized(Variant):
    """Detectron2's division by a running number of positives: from 100, momentum 0.9."""

    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        self.noisy = noisy
        self.register_buffer("normalizer", torch.tensor(100.0))

    def forward(self, predictions: Predictions) -> Tensor:
        number = max(sum(int(p.sum()) for p in predictions.positives()), 1)
        self.normalizer.mul_(0.9).add_(0.1 * number)
        return self.total(predictions) / self.normalizer.item()

    def total(self, predictions: Predictions) -> Tensor:
        raise NotImplementedError


class Focal(_Normalized):
    """Detectron2's focal loss, alpha 0.25, gamma 2."""

    def total(self, predictions: Predictions) -> Tensor:
        terms = []
        levels = zip(predictions.logits, predictions.level_labels(self.noisy), strict=True)
        for x, y in levels:
            one_hot = F.one_hot(y[y >= 0], predictions.num_classes + 1)[:, :-1].to(x.dtype)
            x = x.flatten(0, 1)[y >= 0]
            terms.append(sigmoid_focal_loss_jit(x, one_hot, alpha=0.25, gamma=2, reduction="sum"))
        return sum(terms)


class SmoothL1(_Normalized):
    """Smooth L1 over the coordinates of the positives."""

    def total(self, predictions: Predictions) -> Tensor:
        return sum(
            smooth_l1_loss(x, t, beta=SMOOTH_L1_BETA, reduction="sum")
            for x, t in predictions.level_deltas()
        )


class CrossEntropy(Variant):
    """The paper's baseline: mean over all anchors, times 20."""

    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        self.noisy = noisy
        self.loss = CrossEntropyLoss(20.0)

    def forward(self, predictions: Predictions) -> Tensor:
        logits = torch.cat(predictions.logits, dim=1).flatten(0, 1)
        labels = predictions.noisy_labels if self.noisy else predictions.labels
        return self.loss(logits, labels.flatten())


class GHMC(Variant):
    """GHM-C over levels or the batch; `separate`: one density for the positives' own logits and
    one for all others, the two losses added."""

    def __init__(
        self,
        scope: str = "level",
        noisy: bool = False,
        separate: bool = False,
        loss: Callable[..., GHMCLoss] = GHMCLoss,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.scope, self.noisy, self.separate = scope, noisy, separate
        self.losses = nn.ModuleList(loss(30, **settings) for _ in range(1 + separate))

    def forward(self, predictions: Predictions) -> Tensor:
        labels = predictions.level_labels(self.noisy)
        logits = [x.flatten(0, 1) for x in predictions.logits]
        masks: list[list[Tensor | None]] = [[None] * len(labels)]
        if self.separate:
            own = [own_logits(y, predictions.num_classes).float() for y in labels]
            masks = [own, [1 - mask for mask in own]]
        return sum(
            _harmonized(loss, self.scope, logits, labels, mask)
            for loss, mask in zip(self.losses, masks, strict=True)
        )


class GHMR(Variant):
    """GHM-R over levels or the batch."""

    def __init__(self, scope: str = "level", mu: float = 0.02, **settings: Any) -> None:
        super().__init__()
        self.scope = scope
        self.losses = nn.ModuleList([GHMRLoss(mu, 10, **{"loss_weight": 10.0, **settings})])

    def forward(self, predictions: Predictions) -> Tensor:
        deltas, targets = zip(*predictions.level_deltas(), strict=True)
        return _harmonized(self.losses[0], self.scope, deltas, targets, [None] * len(deltas))


class FlooredGHMC(GHMCLoss):
    """GHM-C in which no region counts as fewer than 10 examples: a cap on the weights."""

    floor = 10

    def _walk(self, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights, state = super()._walk(counts)
        cap = 1 / (self.floor * (counts > 0).sum(1, keepdim=True).clamp(min=1))
        return weights.clamp(max=cap), state


def _harmonized(loss: HarmonizedLoss, scope: str, predictions, targets, weights) -> Tensor:
    if scope == "batch":
        return loss.forward_pooled(predictions, targets, weights)
    return loss.forward_levels(predictions, targets, weights)


def own_logits(labels: Tensor, num_classes: int) -> Tensor:
    """Bool (R, K): the logit of a positive's own class."""
    one_hot = F.one_hot(labels.clamp(min=0), num_classes + 1)[:, :-1]
    return one_hot.bool() & (labels >= 0).unsqueeze(1)


def cls_variants() -> dict[str, Variant]:
    """Fresh classification losses; the first is the reference."""
    start = {"bias_correction": True}
    return {
        "focal": Focal(),
        "cross entropy x 20": CrossEntropy(),
        "authors": GHMC(),
        "authors, momentum 0.9": GHMC(momentum=0.9),
        "authors, decay_empty_bins": GHMC(decay_empty_bins=True),
        "authors, all_bins": GHMC(normalize_by="all_bins"),
        "level": GHMC(**start),
        "level, momentum 0": GHMC(momentum=0.0),
        "level, momentum 0.9": GHMC(momentum=0.9, **start),
        "level, momentum 0.99": GHMC(momentum=0.99, **start),
        "batch": GHMC("batch", **start),
        "batch, no correction": GHMC("batch"),
        "batch, momentum 0": GHMC("batch", momentum=0.0),
        "batch, momentum 0.99": GHMC("batch", momentum=0.99, **start),
        "batch, decay_empty_bins": GHMC("batch", decay_empty_bins=True, **start),
        "batch, all_bins": GHMC("batch", normalize_by="all_bins", **start),
        "batch, at least 10": GHMC("batch", loss=FlooredGHMC, **start),
        "batch, separate": GHMC("batch", separate=True, **start),
        "batch, separate, momentum 0.99": GHMC("batch", separate=True, momentum=0.99, **start),
        "focal, noise": Focal(noisy=True),
        "cross entropy x 20, noise": CrossEntropy(noisy=True),
        "level, noise": GHMC(noisy=True, **start),
        "batch, noise": GHMC("batch", noisy=True, **start),
        "batch, at least 10, noise": GHMC("batch", noisy=True, loss=FlooredGHMC, **start),
        "batch, separate, noise": GHMC("batch", noisy=True, separate=True, **start),
    }


def box_variants() -> dict[str, Variant]:
    """Fresh box losses; the first is the reference."""
    start = {"momentum": 0.7, "bias_correction": True}
    return {
        "smooth L1": SmoothL1(),
        "authors": GHMR(momentum=0.7),
        "authors, decay_empty_bins": GHMR(momentum=0.7, decay_empty_bins=True),
        "authors, all_bins": GHMR(momentum=0.7, normalize_by="all_bins"),
        "level": GHMR(**start),
        "level, mu 0.1": GHMR(mu=0.1, **start),
        "batch": GHMR("batch", **start),
        "batch, mu 0.1": GHMR("batch", mu=0.1, **start),
        "batch, mu 0.1, momentum 0": GHMR("batch", mu=0.1, momentum=0.0),
        "batch, mu 0.1, momentum 0.9": GHMR("batch", mu=0.1, momentum=0.9, bias_correction=True),
        "batch, mu 0.1, momentum 0.99": GHMR("batch", mu=0.1, momentum=0.99, bias_correction=True),
    }
