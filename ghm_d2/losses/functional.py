"""Pure functions of the harmonised losses.

Every loss here is a sum over examples, `sum_i loss_i / GD(g_i)` (paper, eq. 9 and 11, where the
number of examples cancels). An *example* is one (anchor, class) logit, one softmax row, or one
box coordinate. The three `*_examples` functions turn predictions into `(loss_i, g_i)`;
:func:`count_unit_regions` and :func:`harmonized_sum` do the rest for all of them alike.

Shape shorthand:

    R: number of anchors or regions of interest
    K: number of foreground classes
    P: number of positive anchors or regions of interest
    M: number of unit regions (`bins`)
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_choice, check_floating, check_width, is_plain


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32: region weights are ratios of counts beyond 65504."""
    return x if x.dtype == torch.float64 else x.float()


def authentic_smooth_l1_loss(
    pred: Tensor, target: Tensor, mu: float | Tensor = 0.02, reduction: str = "none"
) -> Tensor:
    """Authentic smooth L1, `sqrt(d^2 + mu^2) - mu` with `d = pred - target` (paper, eq. 12).

    Args:
        pred: predicted deltas, any shape, floating point.
        target: same shape.
        mu: width of the quadratic part, above 0, in the units of the deltas; a number, or a 0-d
            float32 tensor without gradient, on their device.
        reduction: "none", "mean" or "sum".

    Returns:
        Loss of `pred`'s shape, or a scalar; float32, or float64 for float64 input. `mean` of
        no elements is 0, on the graph.

    Raises:
        ValueError: shapes differ, `mu` is not above 0 (a CUDA tensor's value is not checked), or
            `reduction` is unknown.
    """
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    check_floating("pred", pred)
    check_floating("target", target)
    if pred.shape != target.shape:
        raise ValueError(
            f"target must have pred's shape {tuple(pred.shape)}, got {tuple(target.shape)}"
        )
    loss, _ = regression_examples(pred, target, check_width("mu", mu, pred.device))
    if reduction == "none":
        return loss
    return loss.sum() / max(loss.numel(), 1) if reduction == "mean" else loss.sum()


def regression_examples(pred: Tensor, target: Tensor, mu: float | Tensor) -> tuple[Tensor, Tensor]:
    """Authentic smooth L1 and its gradient norm `|d| / sqrt(d^2 + mu^2)` (paper, eq. 13).

    Args:
        pred: predicted deltas, any shape.
        target: same shape.
        mu: above 0, a number or a 0-d float32 tensor without gradient.

    Returns:
        `(loss, gradient_norm)`, both of `pred`'s shape; the norm in [0, 1] carries no gradient.
    """
    d = at_least_float32(pred) - at_least_float32(target)
    mu = mu.to(d.dtype) if isinstance(mu, Tensor) else mu
    root = torch.sqrt(mu * mu + d * d)
    # d^2 / (root + mu) is root - mu without the cancellation that leaves nothing of a small d.
    loss = d * d / (root + mu)
    return loss, torch.abs(d / root).detach()


def sigmoid_examples(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross entropy of each logit and its gradient norm `|sigmoid(x) - t|` (paper, eq. 3).

    Args:
        logits: (R, K).
        labels: int64 (R,) with a class in [0, K), anything else meaning "no class"; or dense
            (R, K) targets in [0, 1].

    Returns:
        `(loss, gradient_norm)`, both (R, K); the norm in [0, 1] carries no gradient.
    """
    x = at_least_float32(logits)
    p = x.detach().sigmoid()
    if labels.dim() == 2:
        t = labels.to(x.dtype)
        return F.binary_cross_entropy_with_logits(x, t, reduction="none"), torch.abs(p - t)
    # Integer labels: one logit of a positive row differs, so no one-hot tensor is made.
    # BCE(x, t) = softplus(x) for t = 0 and softplus(-x) for t = 1.
    column = labels.clamp(0, x.shape[1] - 1).unsqueeze(1)
    positive = ((labels >= 0) & (labels < x.shape[1])).unsqueeze(1)
    x_own = x.gather(1, column)
    p_own = p.gather(1, column)
    signed = x.scatter(1, column, torch.where(positive, -x_own, x_own))
    gradient_norm = p.scatter_(1, column, torch.where(positive, 1 - p_own, p_own))
    # softplus with a threshold would return x itself above 20: exact in float32, not in float64.
    loss = (
        torch.logaddexp(signed, signed.new_zeros(()))
        if x.dtype == torch.float64
        else F.softplus(signed)
    )
    return loss, gradient_norm


def softmax_examples(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row and its gradient norm `1 - p_target`.

    The paper never treats softmax. `1 - p_target` is half the L1 distance between the
    probabilities and the one-hot target, so it equals `|p - t|` for two classes.

    Args:
        logits: (R, K + 1), the last column is background.
        labels: int64 (R,) in [0, K]; other values are clamped and the row must be dropped later.

    Returns:
        `(loss, gradient_norm)`, both (R,); the norm in [0, 1] carries no gradient.
    """
    log_p = torch.log_softmax(at_least_float32(logits), dim=1)
    loss = -log_p.gather(1, labels.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return loss, -torch.expm1(-loss.detach())


def focal_gradient(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Size of the gradient that focal loss sends to each logit.

    `|d/dx a g^gamma BCE(x, t)| = a (g^(gamma + 1) + gamma g^(gamma - 1) p (1 - p) BCE(x, t))` with
    p = sigmoid(x), g = |p - t| and a = alpha t + (1 - alpha) (1 - t).

    Args:
        logits: any shape.
        targets: of the same shape, in [0, 1].
        alpha: in [0, 1]; negative: a = 1.
        gamma: at least 0; 0: cross entropy.

    Returns:
        Of the logits' shape, float32 at least, without a gradient.
    """
    x = at_least_float32(logits.detach())
    t = targets.to(x.dtype)
    p = x.sigmoid()
    size = g = (p - t).abs()
    if gamma:
        # The power of 0 is infinite where gamma is below 1. Softplus(x) - t x is BCE(x, t).
        power = g.clamp(min=1e-12).pow(gamma - 1)
        size = power * (g * g + gamma * p * (1 - p) * (F.softplus(x) - t * x))
    return size if alpha < 0 else size * (alpha * t + (1 - alpha) * (1 - t))


def focal_gradient_norm(
    logits: Tensor,
    labels: Tensor,
    keep: Tensor | None,
    alpha: float,
    gamma: float,
    share: float = 1.0,
) -> Tensor:
    """L1 norm of the gradient of the sum of focal loss, and what it may be divided by.

    Args:
        logits: (R, K).
        labels: int64 (R,), class in [0, K), K = background, less = ignored; or dense (R, K).
        keep: bool (R, 1) or (R, K), False drops a logit; None keeps all.
        alpha, gamma: see :func:`focal_gradient`.
        share: below 1, all but the positives' own logits is estimated from about this share of the
            rows, spread evenly and always the same.

    Returns:
        float (3,): the norm, the number of positive rows, the number of rows that count.
    """
    rows, columns = logits.shape
    if not logits.numel():
        return torch.zeros(3, device=logits.device)
    dense, classes = labels.dim() == 2, labels
    if dense:
        highest, classes = labels.max(1)
        classes = torch.where(highest > 0, classes, columns)
    positive = (classes >= 0) & (classes < columns)
    picked = torch.arange(rows, device=logits.device)
    index = picked
    if logits.device.type == "cpu" and not torch.compiler.is_compiling() and is_plain(logits):
        index = positive.nonzero().flatten()  # a CUDA device would make the host wait

    def total(x: Tensor, t: Tensor, counted: Tensor) -> Tensor:
        # 0 times the NaN of an ignored example would still be NaN
        return torch.where(counted, focal_gradient(x, t, alpha, gamma), 0.0).sum()

    own = classes[index].clamp(0, columns - 1).unsqueeze(1)
    x = logits[index].gather(1, own)
    counted = positive[index].unsqueeze(1)
    if keep is not None:
        counted = counted & keep[index].expand(-1, columns).gather(1, own)
    positives = counted.sum()
    exact = total(x, labels[index].gather(1, own) if dense else torch.ones_like(x), counted)

    if (sample := math.ceil(rows * share)) < rows:
        # Multiples of the golden ratio: steps of equal length might meet one anchor of each cell.
        picked = ((picked[:sample].double() * ((5**0.5 - 1) / 2)).frac() * rows).long()
    x, scale = logits[picked], rows / len(picked)
    own = classes[picked].unsqueeze(1)
    counted = own >= 0 if keep is None else (own >= 0) & keep[picked]
    others = counted & (own != torch.arange(columns, device=logits.device))
    rest = total(x, labels[picked] if dense else torch.zeros_like(x), others)
    return torch.stack([exact + scale * rest, positives, scale * counted.any(1).sum()])


def unit_region_edges(bins: int, device: torch.device | str = "cpu") -> Tensor:
    """The edges j / M, float32 (M + 1,).

    The published code compares with float32 quotients; floor(g * M) puts a g that is one rounding
    step off an edge into the wrong region for most M. A CUDA device multiplies float32 by the
    rounded reciprocal instead of dividing; from float64 the quotient is right everywhere.
    """
    return (torch.arange(bins + 1, device=device).double() / bins).float()


def unit_region_index(gradient_norm: Tensor, valid: Tensor | None, bins: int) -> Tensor:
    """The unit region of each example: j where `j/M <= g < (j+1)/M`, the last region closed.

    Args:
        gradient_norm: any shape, in [0, 1].
        valid: bool, broadcastable to it, or None when all examples count.
        bins: M.

    Returns:
        int64 of `gradient_norm`'s shape, in [0, M); M for examples that do not count.
    """
    edges = unit_region_edges(bins, gradient_norm.device)[1:-1]
    region = torch.bucketize(gradient_norm, edges.to(gradient_norm.dtype), right=True)
    return region if valid is None else torch.where(valid, region, bins)


def count_unit_regions(region: Tensor, bins: int) -> Tensor:
    """Number of examples in each unit region.

    Args:
        region: int64, any shape, from :func:`unit_region_index`.
        bins: M.

    Returns:
        int64 (M,). Never float32, where counting by ones stops at 2^24.
    """
    region = region.flatten()
    if region.device.type == "cpu" and not torch.compiler.is_compiling() and is_plain(region):
        return torch.bincount(region, minlength=bins + 1)[:bins]
    # torch.bincount makes a CUDA device wait for the host to learn the largest index.
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=region.device)
    return counts.scatter_add_(0, region, region.new_ones(1).expand_as(region))[:bins]


def harmonized_sum(loss: Tensor, region: Tensor, region_weights: Tensor) -> Tensor:
    """`sum_i w_{region(i)} * loss_i`, the harmonised loss.

    Args:
        loss: loss of each example, any shape.
        region: int64 of its shape, from :func:`unit_region_index`; M drops the example.
        region_weights: float (M,), `1 / (S_j * D)`.

    Returns:
        A scalar of `loss`'s dtype, on its graph.
    """
    padded = F.pad(region_weights.to(loss.dtype), (0, 1))
    return (loss * padded[region]).sum()


class Averaging(NamedTuple):
    """How counts become weights; see :class:`~ghm_d2.losses.GHMCLoss`."""

    momentum: float
    normalize_by: str = "valid_bins"
    decay_empty_bins: bool = False


def walk(
    counts: Tensor, acc_sum: Tensor, num_updates: Tensor | None, averaging: Averaging
) -> tuple[Tensor, dict[str, Tensor]]:
    """Takes the moving average over several histograms, one after the other (authors' code).

    `S_j <- alpha S_j + (1 - alpha) R_j` for each histogram, and `w_j = 1 / (S_j D)` of each
    after its own step.

    Args:
        counts: int64 (L, M), R_j of each of L histograms.
        acc_sum: float32 (M,), S_j before the first.
        num_updates: int64 (M,), how often each region was averaged, to correct the bias of the
            start; None: no correction.
        averaging: the settings.

    Returns:
        `(weights, state)`: float32 (L, M), 0 where a histogram has no example, and the buffers
        after the last, by name.
    """
    filled = counts > 0
    # Authors' code leaves an empty region as it was; the paper's formula lets it decay. A histogram
    # without any example saw nothing and changes nothing either way.
    updated = filled
    if averaging.decay_empty_bins:
        updated = filled.any(1, keepdim=True).expand_as(filled)
    # Rounded as the published code rounds: alpha * S in float32, (1 - alpha) * R in float64.
    share = (counts.double() * (1 - averaging.momentum)).float()
    means = []
    for moves, own in zip(updated.unbind(), share.unbind(), strict=True):
        acc_sum = torch.where(moves, acc_sum * averaging.momentum + own, acc_sum)
        means.append(acc_sum)
    state, mean = {"acc_sum": acc_sum}, torch.stack(means)
    if num_updates is not None:
        updates = num_updates + updated.cumsum(0)
        mean = (mean.double() / (1 - averaging.momentum ** updates.double())).float()
        state["num_updates"] = updates[-1]
    valid = averaging.normalize_by == "valid_bins"
    divisor = filled.sum(1, keepdim=True) if valid else counts.shape[1]
    return torch.where(filled, 1 / (mean * divisor), 0.0), state
