"""The losses that the paper compares with: cross entropy, OHEM, and authentic smooth L1 alone.

Shape shorthand:

    R: number of anchors
    K: number of foreground classes
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import ValueChecks, check_bins, check_floating, check_non_negative, check_positive
from .functional import at_least_float32, authentic_smooth_l1_loss

__all__ = ["ASL1Loss", "CrossEntropyLoss", "OHEMLoss", "cross_entropy_loss", "ohem_loss"]


def cross_entropy_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy, summed over classes and averaged over the anchors that count.

    The average is over all of them, as in the authors' framework, not over the positives as with
    focal loss. It is therefore small, and the paper's baseline multiplies it by 20.

    Args:
        logits: (R, K), floating point.
        labels: integer (R,): a class in [0, K), K = background, -1 = ignored.

    Returns:
        A scalar on the graph, float32 (float64 for float64 logits); 0 where no anchor counts.

    Raises:
        ValueError: a shape, type or (on the CPU) a label is wrong.
    """
    rows = _row_losses(logits, labels)
    valid = labels >= 0
    return (rows * valid).sum() / valid.sum().clamp(min=1)


def ohem_loss(logits: Tensor, labels: Tensor, negatives_per_positive: int = 3) -> Tensor:
    """Cross entropy of the positives and the hardest negatives, averaged over both together.

    Online hard example mining (Shrivastava et al., CVPR 2016) by the 1 : 3 rule of SSD (Liu et al.,
    ECCV 2016): of the negatives, those of the largest loss, three for each positive. Chosen among
    all anchors of the call; a call without positives keeps as many negatives as one positive would.

    Args:
        logits: (R, K), floating point.
        labels: integer (R,): a class in [0, K), K = background, -1 = ignored.
        negatives_per_positive: at least 1.

    Returns:
        A scalar on the graph, float32 (float64 for float64 logits); 0 where no anchor counts.
        On CUDA the host waits for the number of positives.

    Raises:
        ValueError: a shape, type, (on the CPU) a label or `negatives_per_positive` is wrong.
    """
    rows = _row_losses(logits, labels)
    ratio = check_bins(negatives_per_positive, "negatives_per_positive")
    negative = labels == logits.shape[1]
    positive = (labels >= 0) & ~negative
    positives, negatives = torch.stack([positive.sum(), negative.sum()]).tolist()
    kept = min(ratio * max(positives, 1), negatives)
    hardest = rows.detach().masked_fill(~negative, -1).topk(kept, sorted=False).indices
    total: Tensor = (rows * positive).sum() + rows[hardest].sum()
    return total / max(int(positives + kept), 1)


def _row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy of each row, summed over its classes: (R,), anything where ignored."""
    check_floating("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be 2-dimensional, got shape {tuple(logits.shape)}")
    rows, classes = logits.shape
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != (rows,):
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be integers of shape ({rows},), got {got}")
    ValueChecks().require(
        ((labels >= -1) & (labels <= classes)).all(),
        f"labels must lie in [-1, {classes}] "
        f"(-1 = ignored, {classes} = background); they hold a value outside",
    )
    x = at_least_float32(logits)
    column = labels.long().clamp(min=0).unsqueeze(1)
    target = x.new_zeros(rows, classes + 1).scatter_(1, column, 1)[:, :-1]
    return F.binary_cross_entropy_with_logits(x, target, reduction="none").sum(dim=1)


class CrossEntropyLoss(nn.Module):
    """:func:`cross_entropy_loss` times `loss_weight` (20 in the paper's baseline)."""

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = check_non_negative("loss_weight", loss_weight)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"loss_weight={self.loss_weight!r}"

    @torch.jit.unused
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See :func:`cross_entropy_loss`."""
        return self.loss_weight * cross_entropy_loss(logits, labels)


class OHEMLoss(nn.Module):
    """:func:`ohem_loss` times `loss_weight`."""

    def __init__(self, loss_weight: float = 1.0, negatives_per_positive: int = 3) -> None:
        super().__init__()
        self.loss_weight = check_non_negative("loss_weight", loss_weight)
        self.negatives_per_positive = check_bins(negatives_per_positive, "negatives_per_positive")

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        ratio = self.negatives_per_positive
        return f"loss_weight={self.loss_weight!r}, negatives_per_positive={ratio!r}"

    @torch.jit.unused
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See :func:`ohem_loss`."""
        return self.loss_weight * ohem_loss(logits, labels, self.negatives_per_positive)


class ASL1Loss(nn.Module):
    """Sum of :func:`~ghm_d2.losses.authentic_smooth_l1_loss`, times `loss_weight`.

    A detector divides it by what it divides its smooth L1 loss by.
    """

    def __init__(self, mu: float = 0.02, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.mu = check_positive("mu", mu)
        self.loss_weight = check_non_negative("loss_weight", loss_weight)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"mu={self.mu!r}, loss_weight={self.loss_weight!r}"

    @torch.jit.unused
    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            pred: predicted deltas of the positives, any shape, floating point.
            target: same shape.

        Returns:
            A scalar on the graph, float32 (float64 for float64 input).
        """
        return self.loss_weight * authentic_smooth_l1_loss(pred, target, self.mu, "sum")
