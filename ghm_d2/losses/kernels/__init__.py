"""Kernels that compute loss and gradient together, chosen by device.

:class:`Examples` is all that a loss knows of them. `None` in place of a kernel means that the
whole-tensor functions (:class:`EagerExamples`) are the only path.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..functional import Averaging
from . import cpu
from .examples import Arguments, EagerExamples, EagerPart, Examples, FusedExamples

__all__ = [
    "Arguments",
    "EagerExamples",
    "EagerPart",
    "Examples",
    "FusedExamples",
    "device_examples",
    "regression_kernel",
    "sigmoid_kernel",
    "walk",
]

# On the CPU, fewer examples than this are done sooner by whole-tensor operations.
FEWEST = 0
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def _triton() -> Any:  # CUDA only
    """The module of the Triton kernels, imported when a CUDA tensor first needs it; or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton_launch

    return triton_launch


def _has_kernel(predictions: Sequence[Tensor], bins: int) -> bool:
    first = predictions[0]
    if first.dtype not in _DTYPES or torch.compiler.is_compiling():
        return False
    if any(x.dtype != first.dtype or x.device != first.device for x in predictions):
        return False
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in predictions)
    return first.device.type == "cpu" and plain and sum(x.numel() for x in predictions) >= FEWEST


def sigmoid_kernel(
    arguments: Sequence[Arguments],
    bins: int,
    eager: Callable[[Sequence[Tensor]], EagerExamples],
) -> FusedExamples | None:
    """The kernel for sigmoid GHM-C, or None where the eager path is the only one.

    Args:
        arguments: for each tensor logits (R, K), labels int64 (R,) in [-1, K] or dense (R, K), and
            a bool mask (R, K) or (R, 1), False drops an example; None keeps all. Soft targets have
            no kernel.
        bins: number of unit regions.
        eager: makes the same examples of the logits.
    """
    if not _has_kernel([x for x, _, _ in arguments], bins):
        return None
    if any(labels.requires_grad for _, labels, _ in arguments):
        return None
    logits = [x.contiguous() for x, _, _ in arguments]
    positive, dropped = [], []
    for x, labels, keep in arguments:
        if labels.is_floating_point() and not ((labels == 0) | (labels == 1)).all():
            return None
        columns = x.shape[1]
        if labels.dim() == 2:
            positive.append((labels == 1).flatten().nonzero().flatten())
            ignored = labels.new_empty(0).long()
        else:
            rows = ((labels >= 0) & (labels < columns)).nonzero().flatten()
            positive.append(rows * columns + labels[rows])
            ignored = ((labels < 0).nonzero() * columns + torch.arange(columns)).flatten()
        if keep is not None:
            masked = (~keep).expand(-1, columns).flatten().nonzero().flatten()
            ignored = torch.cat([ignored, masked]).unique()  # ascending
        dropped.append(ignored)
    return cpu.SigmoidExamples(logits, eager, positive, dropped)


def regression_kernel(
    arguments: Sequence[Arguments],
    mu: float,
    bins: int,
    eager: Callable[[Sequence[Tensor]], EagerExamples],
) -> FusedExamples | None:
    """The kernel for GHM-R, or None where the eager path is the only one.

    Args:
        arguments: for each tensor predicted deltas, targets of the same shape, and a bool mask that
            can be expanded to it, False drops an example; None keeps all.
        mu: width of the quadratic part.
        bins: number of unit regions.
        eager: makes the same examples of the predictions.
    """
    if not _has_kernel([x for x, _, _ in arguments], bins):
        return None
    pairs = [(x, y) for x, y, _ in arguments]
    if any(y.dtype == torch.float64 or y.requires_grad for _, y in pairs):
        return None
    preds, targets = ([x.contiguous() for x in column] for column in zip(*pairs, strict=True))
    drops = [y[:0] if keep is None else ~keep.expand_as(y) for _, y, keep in arguments]
    dropped = [drop.flatten().nonzero().flatten() for drop in drops]
    return cpu.RegressionExamples(preds, eager, targets, dropped, mu)


def walk(
    counts: Tensor, acc_sum: Tensor, num_updates: Tensor | None, averaging: Averaging
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`~ghm_d2.losses.functional.walk`, by a kernel where there is one."""
    kernel = functional.walk
    if _on_device(counts) and counts.shape[1] <= _triton().MAX_BINS:  # CUDA only
        kernel = _triton().walk
    return kernel(counts, acc_sum, num_updates, averaging)


def _on_device(x: Tensor) -> bool:
    """Whether the Triton kernels take a tensor."""
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return _triton() is not None


def device_examples(
    raw: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    bins: int,
    eager: Callable[[Sequence[Tensor]], EagerExamples],
    *,
    ignored: int | None = None,
    mu: float | None = None,
) -> FusedExamples | None:
    """The examples of a CUDA device, which check and write by themselves, or None.

    Args:
        raw: for each tensor logits (R, K), labels (R,) or (R, K), and weights of either shape, as
            they were given; or deltas, targets, and weights.
        bins: number of unit regions.
        eager: makes the same examples of the predictions.
        ignored: what is ignored in the labels.
        mu: width of the quadratic part, of deltas; None: these are logits.
    """
    if not _on_device(raw[0][0]):
        return None
    triton = _triton()
    if bins > triton.MAX_BINS or len(raw) > triton.MAX_TENSORS:
        return None
    kinds = {_kind(*each, logits=mu is None) for each in raw}
    if len(kinds) > 1 or (kind := kinds.pop()) is None:
        return None
    number, columns, _, _ = kind
    examples: FusedExamples = triton.TritonExamples(
        raw, eager, bins, kind=number, columns=columns, ignored=ignored, mu=mu or 0.0
    )
    return examples


def _kind(
    x: Tensor, y: Tensor, weight: Tensor | None, logits: bool
) -> tuple[int, int, torch.dtype, int] | None:
    """What all tensors of a launch must have in common; None where no kernel takes them."""
    if x.dtype not in _DTYPES or y.requires_grad or (not logits and y.dtype == torch.float64):
        return None
    # the numbers of triton.py, which has to be imported for none of this
    kind = 3 if not logits else 1 if y.dim() == 1 else 2
    columns = x.shape[1] if logits else x[:1].numel()
    return kind, columns, x.dtype, 0 if weight is None else weight.dim()
