"""What the harmonised losses are compared with: focal, cross entropy, OHEM, (authentic) smooth L1.

Shape shorthand:

    R: number of anchors
    K: number of foreground classes
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import (
    ValueChecks,
    check_bins,
    check_floating,
    check_loss_weight,
    check_non_negative,
    check_positive,
)
from .functional import (
    at_least_float32,
    authentic_smooth_l1_loss,
    focal_gradient_norm,
    regression_examples,
)
from .weighted import WeightedLoss

# Predictions, targets, and which of them count (None: all), as the kernels take them.
Examples = tuple[Tensor, Tensor, Tensor | None]

# Of more logits in a call, the gradient of negatives is estimated from about as many.
_SAMPLE = 1 << 13
# As many are copied into one tensor for less than it costs to go through several.
_FEW = 1 << 20


def _gradient_norms(examples: Sequence[Examples], alpha: float, gamma: float) -> Tensor:
    """:func:`focal_gradient_norm` of all tensors of a call."""
    xs, ys, keeps = zip(*examples, strict=True)
    size = sum(x.numel() for x in xs)
    share = min(1.0, _SAMPLE / max(size, 1))
    if size <= _FEW and len({y.dim() for y in ys}) == 1 and all(keep is None for keep in keeps):
        examples = [(torch.cat(xs), torch.cat(ys), None)]
    found = [focal_gradient_norm(*each, alpha, gamma, share) for each in examples]
    return torch.stack(found).sum(0)


def focal_loss(
    logits: Tensor,
    labels: Tensor,
    scores: Tensor | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Focal loss, or with `scores` quality focal loss; summed, as Detectron2's is.

    `sum |p - t|^gamma BCE(x, t)`, p = sigmoid(x). Focal loss (Lin et al., ICCV 2017) has t in
    {0, 1} and the factor alpha for t = 1, 1 - alpha for t = 0. Quality focal loss (Li et al.,
    "Generalized Focal Loss", NeurIPS 2020, arXiv 2006.04388) has the score for t and no alpha.

    Args:
        logits: (R, K), floating point.
        labels: integer (R,): a class in [0, K), K = background, -1 = ignored.
        scores: (R,), in [0, 1], the target of the class that a row's label names. None: 1.
        alpha: in [0, 1]; negative: no such factor.
        gamma: at least 0.

    Returns:
        A scalar on the graph, float32 (float64 for float64 logits); 0 where no anchor counts.

    Raises:
        ValueError: a shape, type or (on the CPU) a label or score is wrong.
    """
    x, target = _logits_and_targets(logits, labels, scores)
    loss = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    loss = loss * (x.sigmoid() - target).abs().pow(gamma)
    if alpha >= 0 and scores is None:
        loss = loss * (alpha * target + (1 - alpha) * (1 - target))
    return (loss * (labels >= 0).unsqueeze(1)).sum()


def cross_entropy_loss(logits: Tensor, labels: Tensor, scores: Tensor | None = None) -> Tensor:
    """Binary cross entropy, summed over classes and averaged over the anchors that count.

    The average is over all of them, as in the authors' framework, not over the positives as with
    focal loss. It is therefore small, and the paper's baseline multiplies it by 20.

    Args:
        logits: (R, K), floating point.
        labels, scores: see :func:`focal_loss`.

    Returns:
        A scalar on the graph, float32 (float64 for float64 logits); 0 where no anchor counts.

    Raises:
        ValueError: as :func:`focal_loss`.
    """
    rows = _row_losses(logits, labels, scores)
    valid = labels >= 0
    return (rows * valid).sum() / valid.sum().clamp(min=1)


def ohem_loss(
    logits: Tensor,
    labels: Tensor,
    negatives_per_positive: int = 3,
    scores: Tensor | None = None,
) -> Tensor:
    """Cross entropy of the positives and the hardest negatives, averaged over both together.

    Online hard example mining (Shrivastava et al., CVPR 2016) by the 1 : 3 rule of SSD (Liu et al.,
    ECCV 2016): of the negatives, those of the largest loss, three for each positive. Chosen among
    all anchors of the call; a call without positives keeps as many negatives as one positive would.

    Args:
        logits: (R, K), floating point.
        labels, scores: see :func:`focal_loss`.
        negatives_per_positive: at least 1.

    Returns:
        A scalar on the graph, float32 (float64 for float64 logits); 0 where no anchor counts.
        On CUDA the host waits for the number of positives.

    Raises:
        ValueError: as :func:`focal_loss`, or `negatives_per_positive` is wrong.
    """
    return _ohem(logits, labels, negatives_per_positive, scores)[0]


def _ohem(
    logits: Tensor, labels: Tensor, negatives_per_positive: int, scores: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`ohem_loss`, and the numbers of the rows that it keeps."""
    rows = _row_losses(logits, labels, scores)
    ratio = check_bins(negatives_per_positive, "negatives_per_positive")
    negative = labels == logits.shape[1]
    positive = ((labels >= 0) & ~negative).nonzero().flatten()
    kept = min(ratio * max(len(positive), 1), int(negative.sum()))
    hardest = rows.detach().masked_fill(~negative, -1).topk(kept, sorted=False).indices
    chosen = torch.cat([positive, hardest])
    return rows[chosen].sum() / max(len(chosen), 1), chosen


def _row_losses(logits: Tensor, labels: Tensor, scores: Tensor | None) -> Tensor:
    """Binary cross entropy of each row, summed over its classes: (R,), anything where ignored."""
    x, target = _logits_and_targets(logits, labels, scores)
    return F.binary_cross_entropy_with_logits(x, target, reduction="none").sum(dim=1)


def _logits_and_targets(
    logits: Tensor, labels: Tensor, scores: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits and targets (R, K), float32 at least; anything where ignored."""
    check_floating("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be 2-dimensional, got shape {tuple(logits.shape)}")
    rows, classes = logits.shape
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != (rows,):
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be integers of shape ({rows},), got {got}")
    checks = ValueChecks()
    checks.require(
        ((labels >= -1) & (labels <= classes)).all(),
        f"labels must lie in [-1, {classes}] "
        f"(-1 = ignored, {classes} = background); they hold a value outside",
    )
    x = at_least_float32(logits)
    own = x.new_ones(rows)
    if scores is not None:
        check_floating("scores", scores)
        if scores.shape != (rows,):
            raise ValueError(f"scores must have shape ({rows},), got {tuple(scores.shape)}")
        inside = (scores >= 0) & (scores <= 1)
        checks.require(inside.all(), "scores must lie in [0, 1]; they hold a value outside")
        own = scores.detach().to(x.dtype)
    column = labels.long().clamp(min=0).unsqueeze(1)
    return x, x.new_zeros(rows, classes + 1).scatter_(1, column, own.unsqueeze(1))[:, :-1]


class FocalLoss(nn.Module):
    """:func:`focal_loss` times `loss_weight`.

    A detector divides it by what it divides its own focal loss by. "auto" is `AUTO_WEIGHT`.
    """

    AUTO_WEIGHT = 4.0

    def __init__(
        self, alpha: float = 0.25, gamma: float = 2.0, loss_weight: float | str = 1.0
    ) -> None:
        super().__init__()
        self.alpha, self.gamma = float(alpha), check_non_negative("gamma", gamma)
        self.loss_weight = check_loss_weight(loss_weight, self.AUTO_WEIGHT)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"alpha={self.alpha!r}, gamma={self.gamma!r}, loss_weight={self.loss_weight!r}"

    @torch.jit.unused
    def forward(self, logits: Tensor, labels: Tensor, scores: Tensor | None = None) -> Tensor:
        """See :func:`focal_loss`."""
        return self.loss_weight * focal_loss(logits, labels, scores, self.alpha, self.gamma)

    def gradient_norm(self, examples: Sequence[Examples]) -> Tensor:
        """L1 norm of the gradient at the logits, and the number of positives: float (2,).

        Of more than 2^13 logits, most negatives are estimated from a sample of the rows.
        """
        norm, positives, _ = _gradient_norms(examples, self.alpha, self.gamma)
        return torch.stack([self.loss_weight * norm, positives])


class _ClsBaseline(WeightedLoss):
    def __init__(self, loss_weight: float | str, reference: FocalLoss | None) -> None:
        super().__init__(loss_weight)
        if self.follows_weight:
            self.reference = reference or FocalLoss(loss_weight="auto")

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"loss_weight={self._weight_setting()!r}"

    def _measure(self, example: Examples, own: Tensor) -> Tensor:
        norm, positives = self.reference.gradient_norm([example]).unbind()
        return torch.stack([norm, positives.clamp(min=1), own])


class CrossEntropyLoss(_ClsBaseline):
    """:func:`cross_entropy_loss` times `loss_weight` (20 in the paper's baseline).

    `loss_weight="auto"` keeps the gradient as large as that of `reference`, over its number of
    positives; None: focal loss with its "auto" weight. See
    :class:`~ghm_d2.losses.weighted.WeightedLoss`.
    """

    def __init__(self, loss_weight: float | str = 1.0, reference: FocalLoss | None = None) -> None:
        super().__init__(loss_weight, reference)

    @torch.jit.unused
    def forward(self, logits: Tensor, labels: Tensor, scores: Tensor | None = None) -> Tensor:
        """See :func:`cross_entropy_loss`."""

        def measure() -> Tensor:
            example = _example(logits, labels, scores)
            return self._measure(example, torch.div(*self.gradient_norm([example]).unbind()))

        return self._weighted(cross_entropy_loss(logits, labels, scores), measure)

    @staticmethod
    def gradient_norm(examples: Sequence[Examples]) -> Tensor:
        """L1 norm of the gradient of the sum of the losses, and the number of rows: float (2,)."""
        norm, _, rows = _gradient_norms(examples, -1, 0)
        return torch.stack([norm, rows])


class OHEMLoss(_ClsBaseline):
    """:func:`ohem_loss` times `loss_weight`; "auto" and `reference`: see `CrossEntropyLoss`."""

    def __init__(
        self,
        loss_weight: float | str = 1.0,
        negatives_per_positive: int = 3,
        reference: FocalLoss | None = None,
    ) -> None:
        super().__init__(loss_weight, reference)
        self.negatives_per_positive = check_bins(negatives_per_positive, "negatives_per_positive")

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"{super().extra_repr()}, negatives_per_positive={self.negatives_per_positive!r}"

    @torch.jit.unused
    def forward(self, logits: Tensor, labels: Tensor, scores: Tensor | None = None) -> Tensor:
        """See :func:`ohem_loss`."""
        loss, chosen = _ohem(logits, labels, self.negatives_per_positive, scores)

        def measure() -> Tensor:
            x, target, keep = example = _example(logits, labels, scores)
            rows = x[chosen], target[chosen], None if keep is None else keep[chosen]
            own = focal_gradient_norm(*rows, -1, 0)[0] / max(len(chosen), 1)
            return self._measure(example, own)

        return self._weighted(loss, measure)


def _example(logits: Tensor, labels: Tensor, scores: Tensor | None) -> Examples:
    if scores is None:
        return logits, labels.long(), None
    return (*_logits_and_targets(logits, labels, scores), (labels >= 0).unsqueeze(1))


class SmoothL1Loss(nn.Module):
    """Sum of smooth L1, times `loss_weight`; Detectron2's RetinaNet has no such factor.

    A detector divides it by what it divides its own smooth L1 loss by. "auto" is `AUTO_WEIGHT`.
    """

    AUTO_WEIGHT = 1.0

    def __init__(self, beta: float = 0.0, loss_weight: float | str = 1.0) -> None:
        super().__init__()
        self.beta = check_non_negative("beta", beta)
        self.loss_weight = check_loss_weight(loss_weight, self.AUTO_WEIGHT)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"beta={self.beta!r}, loss_weight={self.loss_weight!r}"

    @torch.jit.unused
    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            pred: predicted deltas of the positives, any shape, floating point.
            target: same shape.

        Returns:
            A scalar on the graph, float32 (float64 for float64 input).
        """
        pair = at_least_float32(pred), at_least_float32(target)
        return self.loss_weight * F.smooth_l1_loss(*pair, beta=self.beta, reduction="sum")

    def gradient_norm(self, examples: Sequence[Examples]) -> Tensor:
        """L1 norm of the gradient at the deltas, and the number of positives: float (2,).

        A positive that counts in part, by a mask of its coordinates, is a part of one.
        """
        figures = []
        for pred, target, keep in examples:
            d = (at_least_float32(pred.detach()) - at_least_float32(target.detach())).abs()
            size = (d / self.beta).clamp(max=1) if self.beta else d.sign()
            counted = torch.ones_like(d, dtype=torch.bool) if keep is None else keep.expand_as(d)
            positives = counted.sum() / pred.shape[1:].numel()
            figures.append(torch.stack([torch.where(counted, size, 0.0).sum(), positives]))
        norm, positives = torch.stack(figures).sum(0).unbind()
        return torch.stack([self.loss_weight * norm, positives])


class ASL1Loss(WeightedLoss):
    """Sum of :func:`~ghm_d2.losses.authentic_smooth_l1_loss`, times `loss_weight`.

    A detector divides it by what it divides its smooth L1 loss by. "auto" keeps the gradient as
    large as that of `reference`; None: L1 loss. See :class:`~ghm_d2.losses.weighted.WeightedLoss`.
    """

    def __init__(
        self,
        mu: float = 0.02,
        loss_weight: float | str = 1.0,
        reference: SmoothL1Loss | None = None,
    ) -> None:
        super().__init__(loss_weight)
        self.mu = check_positive("mu", mu)
        if self.follows_weight:
            self.reference = reference or SmoothL1Loss()

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"mu={self.mu!r}, loss_weight={self._weight_setting()!r}"

    @torch.jit.unused
    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            pred: predicted deltas of the positives, any shape, floating point.
            target: same shape.

        Returns:
            A scalar on the graph, float32 (float64 for float64 input).
        """

        def measure() -> Tensor:
            norm, positives = self.reference.gradient_norm([(pred, target, None)]).unbind()
            own = regression_examples(pred, target, self.mu)[1].sum()
            return torch.stack([norm, positives, own / positives])

        return self._weighted(authentic_smooth_l1_loss(pred, target, self.mu, "sum"), measure)
