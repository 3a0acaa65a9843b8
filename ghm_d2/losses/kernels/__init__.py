"""Kernels that compute loss and gradient together, chosen by device.

:class:`Examples` is all that a loss knows of them. ``None`` in place of a kernel means that the
whole-tensor functions (:class:`EagerExamples`) are the only path.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .examples import EagerExamples, Examples, FusedExamples

__all__ = [
    "EagerExamples",
    "Examples",
    "FusedExamples",
    "regression_kernel",
    "sigmoid_kernel",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def _triton() -> Any:  # CUDA only
    """The module of the Triton kernels, imported when a CUDA tensor first needs it; or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton

    return triton


def _has_kernel(prediction: Tensor, bins: int) -> bool:
    if prediction.dtype not in _DTYPES or torch.compiler.is_compiling():
        return False
    if prediction.device.type == "cuda":  # CUDA only
        return (triton := _triton()) is not None and bins <= triton.MAX_BINS
    return prediction.device.type == "cpu" and type(prediction) in (Tensor, torch.nn.Parameter)


def sigmoid_kernel(
    logits: Tensor,
    labels: Tensor,
    keep: Tensor | None,
    bins: int,
    eager: Callable[[Tensor], EagerExamples],
) -> FusedExamples | None:
    """The kernel for sigmoid GHM-C, or None where the eager path is the only one.

    Args:
        logits: (R * K,) contiguous, on the graph.
        labels: int64 (R,), in [-1, K], or dense (R, K); soft targets have no kernel.
        keep: bool (R, K) or (R, 1), False drops an example; None keeps all.
        bins: number of unit regions.
        eager: makes the same examples of the flat logits.
    """
    if not _has_kernel(logits, bins) or labels.requires_grad:
        return None
    columns = logits.numel() // labels.shape[0]
    if logits.device.type != "cpu":  # CUDA only
        if labels.dim() == 2:
            return None
        kernel: FusedExamples = _triton().TritonSigmoid(logits, eager, labels, keep, columns)
        return kernel
    if labels.dim() == 2:
        if labels.is_floating_point() and not ((labels == 0) | (labels == 1)).all():
            return None
        positive, ignored = (labels == 1).flatten().nonzero().flatten(), labels.new_empty(0).long()
    else:
        rows = ((labels >= 0) & (labels < columns)).nonzero().flatten()
        positive = rows * columns + labels[rows]
        ignored = ((labels < 0).nonzero() * columns + torch.arange(columns)).flatten()
    if keep is not None:
        dropped = (~keep).expand(-1, columns).flatten().nonzero().flatten()
        ignored = torch.cat([ignored, dropped]).unique()  # ascending
    return cpu.SigmoidExamples(logits, eager, positive, ignored)


def regression_kernel(
    pred: Tensor,
    target: Tensor,
    keep: Tensor | None,
    mu: float,
    bins: int,
    eager: Callable[[Tensor], EagerExamples],
) -> FusedExamples | None:
    """The kernel for GHM-R, or None where the eager path is the only one.

    Args:
        pred: (n,) contiguous, on the graph.
        target: (n,) contiguous, floating point.
        keep: bool of n elements, False drops an example; None keeps all.
        mu: width of the quadratic part.
        bins: number of unit regions.
        eager: makes the same examples of ``pred``.
    """
    if not _has_kernel(pred, bins) or target.dtype == torch.float64 or target.requires_grad:
        return None
    if pred.device.type != "cpu":  # CUDA only
        kernel: FusedExamples = _triton().TritonRegression(pred, eager, target, keep, mu)
        return kernel
    dropped = pred.new_empty(0).long() if keep is None else (~keep).nonzero().flatten()
    return cpu.RegressionExamples(pred, eager, target, dropped, mu)
