"""What the gradient of a harmonised loss is made of: plain value, regions, easy and hard examples.

The value of a harmonised loss hovers around 1 by construction, so it says little about a model.
These figures say what it hides. They are recomputed from the arguments of the loss, so that it need
not keep anything for them, and piece by piece, to bound the extra memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghm_d2.losses import (
    GHMRLoss,
    exact_gradient_density,
    regression_examples,
    sigmoid_examples,
    softmax_examples,
)
from ghm_d2.losses.base import HarmonizedLoss
from ghm_d2.losses.functional import count_unit_regions, unit_region_index

# Easy examples have g < 1/3, hard ones g >= 2/3, medium ones lie between.
THIRDS = (1 / 3, 2 / 3)
SHARES = ("easy", "medium", "hard")

# Elements in a piece: the loss functions take about six times the memory of their arguments.
_PIECE = 1 << 22


@dataclass
class CallStatistics:
    """One call of a harmonised loss; tensors on its device, so that no step waits for the GPU.

    Attributes:
        counts: int64 (bins,), R_j, the examples in each unit region.
        gradient: float64 (bins, 3), `sum_i w_i g_i` by region and by easy, medium, hard.
        num_examples: int64 scalar.
        plain_sum: float64 scalar, `sum_i loss_i`.
        num_positives: int64 scalar, the examples with a target of at least 1/2 or, for softmax, of
            a foreground class; 0 for boxes.
        positive_sum: float64 scalar, `sum_i loss_i` over these.
        harmonized_sum: float64 scalar, `sum_i w_i loss_i`: the loss without `loss_weight`.
        largest_weight: float64 scalar, the largest `beta_i = N w_i` (paper, eq. 9); 1 is the
            weight of every example in a plain mean.
    """

    counts: Tensor
    gradient: Tensor
    num_examples: Tensor
    plain_sum: Tensor
    num_positives: Tensor
    positive_sum: Tensor
    harmonized_sum: Tensor
    largest_weight: Tensor


def kept_examples(
    loss: HarmonizedLoss,
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Plain loss, gradient norm g and kind of every example that counts, piece by piece.

    Args:
        loss: the module; its type and settings say what an example is.
        predictions, targets, weights: as for `loss.forward_pooled`.

    Yields:
        `(loss_i, g_i, positive_i)`, three tensors (n,), the first two float32 at least, the last
        bool (False for boxes), in the order of the examples.
    """
    weights = [None] * len(predictions) if weights is None else weights
    for prediction, target, weight in zip(predictions, targets, weights, strict=True):
        rows = max(_PIECE * len(prediction) // max(prediction.numel(), 1), 1)
        # An empty tensor gives no piece: the loss functions do not accept one.
        for start in range(0, len(prediction) if prediction.numel() else 0, rows):
            piece = slice(start, start + rows)
            x, t = prediction[piece].detach(), target[piece]
            if isinstance(loss, GHMRLoss):
                plain, norm = regression_examples(x, t, loss.mu)
                valid, positive = None, torch.zeros_like(norm, dtype=torch.bool)
            else:
                examples = sigmoid_examples if loss.activation == "sigmoid" else softmax_examples
                plain, norm = examples(x, t if t.dim() == 2 else t.long())
                valid = t >= 0 if t.dim() == 1 else None
                positive = positives(t, x.shape[1], loss.activation)
            masks = [valid] if weight is None else [valid, weight[piece] > 0]
            keep = torch.ones_like(norm, dtype=torch.bool)
            for mask in masks:
                if mask is not None:
                    keep &= mask.view(*mask.shape, *[1] * (keep.dim() - mask.dim()))
            yield plain[keep], norm[keep], positive[keep]


def positives(labels: Tensor, columns: int, activation: str) -> Tensor:
    """Whether an example is positive: bool (R, K), or (R,) for softmax class indices."""
    if labels.dim() == 2:
        return labels >= 0.5
    if activation == "softmax":
        return labels < columns - 1
    return labels.unsqueeze(1) == torch.arange(columns, device=labels.device)


@torch.no_grad()
def measure(
    loss: HarmonizedLoss,
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None = None,
    counts: Tensor | None = None,
    region_weights: Tensor | None = None,
) -> CallStatistics:
    """The statistics of one call; the arguments are those of :func:`ghm_d2.losses.base.observed`.

    Args:
        loss: the module that was called.
        predictions, targets, weights: what it was called with.
        counts: int64 (bins,), the R_j that it counted; None with the exact density.
        region_weights: float32 (bins,), its w_j; None with the exact density.
    """
    device = loss.acc_sum.device
    weight = None
    if counts is None:
        norms = [g for _, g, _ in kept_examples(loss, predictions, targets, weights)]
        norm = torch.cat(norms) if norms else torch.zeros(0, device=device)
        weight = 1 / exact_gradient_density(norm, 1 / loss.bins).double()
        counts = count_unit_regions(unit_region_index(norm, None, loss.bins), loss.bins)
        largest = weight.max() if len(norm) else weight.sum()
    else:
        largest = region_weights.max().double()
    gradient = torch.zeros(loss.bins * 3, dtype=torch.float64, device=device)
    plain_sum, positive_sum, harmonized_sum = torch.zeros(3, dtype=torch.float64, device=device)
    positives = torch.zeros((), dtype=torch.int64, device=device)
    number = 0
    for plain, norm, positive in kept_examples(loss, predictions, targets, weights):
        region = unit_region_index(norm, None, loss.bins)
        own = slice(number, number + len(norm))
        w = region_weights.double()[region] if weight is None else weight[own]
        third = (norm >= THIRDS[0]).long() + (norm >= THIRDS[1])
        gradient.scatter_add_(0, region * 3 + third, w * norm)
        plain_sum += plain.sum(dtype=torch.float64)
        positive_sum += (plain * positive).sum(dtype=torch.float64)
        positives += positive.sum()
        harmonized_sum += (w * plain).sum()
        number += len(norm)
    return CallStatistics(
        counts=counts,
        gradient=gradient.view(loss.bins, 3),
        num_examples=torch.tensor(number, device=device),
        plain_sum=plain_sum,
        num_positives=positives,
        positive_sum=positive_sum,
        harmonized_sum=harmonized_sum,
        largest_weight=largest * counts.sum(),
    )


def summarize(copies: Sequence[Sequence[CallStatistics]]) -> dict[str, Any]:
    """Everything about one loss in one step, as numbers that JSON holds.

    Args:
        copies: for each copy of the loss (`IMAGES_PER_HISTOGRAM` makes several), its calls, as
            many as any other copy's: one for each FPN level, or one for all.

    Returns:
        A dictionary of

        - `examples`: how many counted.
        - `plain_loss`: their mean binary cross entropy, cross entropy or authentic smooth L1.
        - `plain_loss_positives`: the mean over positives alone. Most examples are easy negatives,
          whose loss GHM-C may well let grow while the detector gets better.
        - `harmonized_loss`: the loss without its weight: summed over calls, averaged over copies.
        - `gradient_share_easy`, `..._medium`, `..._hard`: of `sum_i w_i g_i`; they add up
          to 1.
        - `non_empty_regions`: mean over the calls that saw an example.
        - `largest_weight`: the largest beta of any example.
        - `calls`: for each call, over all copies, `counts` (bins,) and `gradient_share`
          (bins,), the part of the total gradient that this region of this call has.

        Without any example, figures that would be 0 / 0 are None.
    """
    flat = [call for calls in copies for call in calls]
    examples = sum(int(call.num_examples) for call in flat)
    positives = sum(int(call.num_positives) for call in flat)
    gradient = sum(call.gradient.sum(0) for call in flat)
    total = float(gradient.sum())
    filled = [int((call.counts > 0).sum()) for call in flat if int(call.num_examples)]
    shares = (gradient / total).tolist() if total else [None] * 3
    calls = [
        {
            "counts": sum(call.counts for call in level).tolist(),
            "gradient_share": (sum(call.gradient.sum(1) for call in level) / (total or 1)).tolist(),
        }
        for level in zip(*copies, strict=True)
    ]
    return {
        "examples": examples,
        "plain_loss": sum(float(c.plain_sum) for c in flat) / examples if examples else None,
        "plain_loss_positives": (
            sum(float(c.positive_sum) for c in flat) / positives if positives else None
        ),
        "harmonized_loss": sum(float(c.harmonized_sum) for c in flat) / len(copies),
        **{f"gradient_share_{name}": s for name, s in zip(SHARES, shares, strict=True)},
        "non_empty_regions": sum(filled) / len(filled) if filled else None,
        "largest_weight": max(float(c.largest_weight) for c in flat) if examples else None,
        "calls": calls,
    }
