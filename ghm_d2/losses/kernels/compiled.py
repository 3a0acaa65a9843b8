"""The CUDA kernels as operators that torch.compile leaves whole; needs PyTorch 2.4.

A compiled function keeps no tensors between calls: a refused value shows only as a NaN loss, and a
second derivative needs the loss to be computed outside the compiled function.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import Averaging
from .examples import FusedExamples

# Written out: versions of PyTorch differ in the annotations that they can read a schema from.
_SETTINGS = "int bins, int? ignored, Tensor? mu"
_TENSORS = "Tensor[] predictions, Tensor[] targets, Tensor[] weights"
_LOSS = (
    f"({_TENSORS}, Tensor acc_sum, Tensor? num_updates, {_SETTINGS}, float momentum, "
    "str normalize_by, bool decay_empty_bins, float scale, bool pooled, int processes, bool meet) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_GRADIENT = f"({_TENSORS}, Tensor region_weights, Tensor factor, {_SETTINGS}) -> Tensor[]"


def _examples(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    bins: int,
    ignored: int | None,
    mu: Tensor | None,
) -> FusedExamples:
    from .triton_launch import TritonExamples

    own = [w if w.numel() else None for w in weights]
    raw = list(zip(predictions, targets, own, strict=True))
    return TritonExamples(raw, None, bins, ignored=ignored, mu=mu)


@torch.library.custom_op("ghm_d2::harmonized_loss", mutates_args=(), schema=_LOSS)
def harmonized_loss(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    acc_sum: Tensor,
    num_updates: Tensor | None,
    bins: int,
    ignored: int | None,
    mu: Tensor | None,
    momentum: float,
    normalize_by: str,
    decay_empty_bins: bool,
    scale: float,
    pooled: bool,
    processes: int,
    meet: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A forward pass of the kernels.

    Args:
        predictions, targets: see `TritonExamples`.
        weights: as many; an empty tensor stands for None, which a list of tensors cannot hold.
        acc_sum, num_updates: the running counts before this pass.
        bins, ignored, mu: see `TritonExamples`.
        momentum, normalize_by, decay_empty_bins: see `Averaging`.
        scale: factor of the region weights.
        pooled: whether all tensors share a histogram.
        processes: how many of them share their counts.
        meet: whether to add the counts up; else every process is taken to have this one's.

    Returns:
        The loss (NaN where something was refused), the scaled float32 (T, bins) weights of the
        regions, and the running counts after (as before, where something was refused).
    """
    from . import triton_launch

    examples = _examples(predictions, targets, weights, bins, ignored, mu)
    counts = examples.counts(bins)
    if pooled:
        counts = counts.sum(0, keepdim=True)
    if meet and processes > 1:
        dist.all_reduce(counts)
    elif processes > 1:
        counts = counts * processes
    averaging = Averaging(momentum, normalize_by, decay_empty_bins)
    region_weights, state = triton_launch.walk(counts, acc_sum, num_updates, averaging)
    region_weights = (region_weights * scale).expand(len(predictions), -1).contiguous()
    after = {"acc_sum": acc_sum.clone()}
    if num_updates is not None:
        after["num_updates"] = num_updates.clone()
    failed = torch.zeros(1, dtype=torch.int64, device=acc_sum.device)
    examples.conclude_with(state, after, failed)
    loss = examples.loss(region_weights)
    return loss, region_weights, after["acc_sum"], after.get("num_updates", failed)


@harmonized_loss.register_fake
def _(predictions, targets, weights, acc_sum, num_updates, *_):  # type: ignore[no-untyped-def]
    loss = acc_sum.new_empty(())
    region_weights = acc_sum.new_empty(len(predictions), acc_sum.numel())
    updates = acc_sum.new_empty(1, dtype=torch.int64)
    if num_updates is not None:
        updates = torch.empty_like(num_updates)
    return loss, region_weights, torch.empty_like(acc_sum), updates


@torch.library.custom_op("ghm_d2::harmonized_gradient", mutates_args=(), schema=_GRADIENT)
def harmonized_gradient(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    region_weights: Tensor,
    factor: Tensor,
    bins: int,
    ignored: int | None,
    mu: Tensor | None,
) -> list[Tensor]:
    """The gradients of :func:`harmonized_loss` with respect to its predictions, times a scalar."""
    examples = _examples(predictions, targets, weights, bins, ignored, mu)
    gradients = examples.gradient(region_weights, factor)
    return [g.view_as(x) for g, x in zip(gradients, predictions, strict=True)]


@harmonized_gradient.register_fake
def _(predictions, *_):  # type: ignore[no-untyped-def]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in predictions]


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    predictions, targets, weights, _, _, *settings = inputs
    ctx.lengths, ctx.settings = (len(predictions), len(targets)), settings[:2]
    ctx.save_for_backward(*predictions, *targets, *weights, output[1], settings[2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, factor, *_):  # type: ignore[no-untyped-def]
    *tensors, region_weights, mu = ctx.saved_tensors
    first, second = ctx.lengths
    parts = tensors[:first], tensors[first : first + second], tensors[first + second :]
    gradients = harmonized_gradient(*parts, region_weights, factor, *ctx.settings, mu)
    return gradients, [None] * second, [None] * len(parts[2]), *[None] * 12


harmonized_loss.register_autograd(_backward, setup_context=_setup_context)
