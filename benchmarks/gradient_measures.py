"""What feature_gradients.py measures of one loss on one batch, and how batches are summed up."""

import copy
import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from gradient_variants import Predictions, Variant, own_logits
from torch import Tensor, nn

from ghm_d2.losses.base import observed


def measure_gradient(
    variant: Variant, p: Predictions, outputs: list[Tensor], features: list[Tensor], head: nn.Module
) -> dict[str, Any]:
    """One loss on one batch; `outputs` are the logits or deltas of `p`, made by `head`.

    Returns:
        Scalars and lists with one number per level or per call of the loss; `direction` is the
        gradient of the last convolution's weights.
    """
    trial = copy.deepcopy(variant)  # so that the variant's own counts stay as they are
    seen: list[tuple[Tensor, Tensor]] = []
    with observed(lambda *call: seen.append((call[4], call[5] * call[0].loss_weight))):
        value = trial(p)
    at_outputs = torch.autograd.grad(value, outputs, retain_graph=True)
    parameters = list(head.parameters())
    grads = torch.autograd.grad(outputs, [*features, *parameters], at_outputs, retain_graph=True)
    levels = [g.norm().item() for g in grads[: len(features)]]
    own = grads[len(features) :]
    size = [g.abs() for g in at_outputs]
    total = sum(g.sum().item() for g in size)
    share = [g.sum().item() / total if total else 0.0 for g in size]
    bare = [not positive.any() for positive in p.positives(variant.noisy)]
    squares = sum((g**2).sum().item() for g in at_outputs)
    record = {
        "loss": value.item(),
        "feature_norm": math.hypot(*levels),
        "feature_norm_by_level": levels,
        "head_norm": math.hypot(*(g.norm().item() for g in own)),
        "share_by_level": share,
        "share_of_levels_without_positives": sum(s for s, b in zip(share, bare, strict=True) if b),
        # As many equally large gradients would have this ratio of L1 to L2 norm.
        "effective_examples": total**2 / squares if squares else 0.0,
        "regions": [int((counts > 0).sum()) for counts, _ in seen],
        "largest_weight": [weights.max().item() for _, weights in seen],
        "last_region_share": [(c[-1] / c.sum().clamp(min=1)).item() for c, _ in seen],
        "direction": own[-2].flatten(),  # weight and bias of the last convolution come last
    }
    if outputs is p.logits:
        record |= _whose_logits(variant, p, size, total)
    return record


def _whose_logits(
    variant: Variant, p: Predictions, size: list[Tensor], total: float
) -> dict[str, Any]:
    """Shares of the logits' gradient: of the positives' own, and of those with a wrong label."""
    own_share, own_of_level, wrong_share = 0.0, [], 0.0
    labels = zip(p.level_labels(variant.noisy), p.level_labels(), size, strict=True)
    for given, true, g in labels:
        g = g.flatten(0, 1)
        own = own_logits(given, p.num_classes)
        wrong = (own | own_logits(true, p.num_classes)) & (given != true).unsqueeze(1)
        level = g[own].sum().item()
        own_share += level / total
        own_of_level.append(level / max(g.sum().item(), 1e-30))
        wrong_share += g[wrong].sum().item() / total
    return {
        "positives_share": own_share,
        "positives_share_by_level": own_of_level,
        "wrong_label_share": wrong_share,
    }


def summarize(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the batches, and how much they differ."""
    directions = torch.stack([b.pop("direction") for b in batches])
    out: dict[str, Any] = {}
    for name, first in batches[0].items():
        values = [b[name] for b in batches]
        out[name] = (
            [statistics.fmean(column) for column in zip(*values, strict=True)]
            if isinstance(first, list)
            else statistics.fmean(values)
        )
    norms = [b["feature_norm"] for b in batches]
    out["feature_norm_cv"] = statistics.stdev(norms) / max(statistics.fmean(norms), 1e-30)
    unit = F.normalize(directions, dim=1)
    pairs = len(batches) * (len(batches) - 1)
    out["cosine_between_batches"] = ((unit @ unit.T).sum().item() - len(batches)) / pairs
    out["mean_direction"] = directions.mean(dim=0)
    return out
