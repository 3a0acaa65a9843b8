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
    "compiled_loss",
    "device_examples",
    "device_takes",
    "regression_kernel",
    "sigmoid_kernel",
    "walk",
]

# On the CPU, whole-tensor operations are faster for fewer examples than this.
FEWEST = 1 << 13
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


MAX_BINS = 2047  # a histogram is a power of two long, with a place for what does not count
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# torch.compile can use the kernels where PyTorch lets them be registered as operators.
compiled_loss: Any = None
if hasattr(torch.library, "custom_op"):
    from . import compiled

    compiled_loss = compiled.harmonized_loss


@cache
def _triton() -> Any:  # CUDA only
    """What launches the Triton kernels, imported when a CUDA tensor first needs it."""
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
    mu: float | Tensor,
    bins: int,
    eager: Callable[[Sequence[Tensor]], EagerExamples],
) -> FusedExamples | None:
    """The kernel for GHM-R, or None where the eager path is the only one.

    Args:
        arguments: for each tensor predicted deltas, targets of the same shape, and a bool mask that
            can be expanded to it, False drops an example; None keeps all.
        mu: width of the quadratic part, a number or a 0-d float32 tensor.
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
    compiling = torch.compiler.is_compiling()
    if not compiling and _on_device(counts) and counts.shape[1] <= MAX_BINS:  # CUDA only
        kernel = _triton().walk
    return kernel(counts, acc_sum, num_updates, averaging)


def _on_device(x: Tensor) -> bool:
    """Whether the Triton kernels take a tensor."""
    return x.device.type == "cuda" and _HAS_TRITON


def device_takes(raw: Sequence[Arguments], bins: int, logits: bool) -> bool:
    """Whether the CUDA kernels take these tensors.

    Args:
        raw: for each tensor logits (R, K), labels (R,) or (R, K), and weights of either shape, as
            they were given; or deltas, targets, and weights.
        bins: number of unit regions.
        logits: whether `raw` holds logits; False: deltas.
    """
    return bins <= MAX_BINS and all(
        _on_device(x)
        and x.dtype in _DTYPES
        and not y.requires_grad
        and (logits or y.dtype != torch.float64)  # a difference is not taken in float64
        for x, y, _ in raw
    )


def device_examples(
    raw: Sequence[Arguments],
    bins: int,
    eager: Callable[[Sequence[Tensor]], EagerExamples] | None,
    *,
    ignored: int | None = None,
    mu: float | Tensor | None = None,
) -> FusedExamples | None:
    """The examples on a CUDA device, whose kernels check values and write buffers; or None.

    Args:
        raw, bins: see :func:`device_takes`.
        eager: makes the same examples of the predictions.
        ignored: the label value that is ignored; None: -1 in integer labels.
        mu: width of the quadratic part for deltas: a number, or a 0-d float32 tensor on their
            device, which is read there without a wait; None: `raw` holds logits.
    """
    if not device_takes(raw, bins, mu is None):
        return None
    found: FusedExamples = _triton().TritonExamples(raw, eager, bins, ignored=ignored, mu=mu)
    return found
