"""Loss and gradient in one go: kernels behind one autograd function, chosen by device.

Training needs the gradient of a harmonised loss anyway, and it costs almost nothing once the loss
is computed. So the forward pass computes both, keeps only the gradient, and the backward pass
multiplies it by the incoming scalar.
"""

import importlib.util
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import blocked

__all__ = ["Kernel", "fused_sum", "regression_kernel", "sigmoid_kernel"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Kernel(Protocol):
    """What counts, weights and differentiates the examples of one flat prediction."""

    def counts(self, bins: int) -> Tensor:
        """int64 (bins,): the number of examples in each unit region."""

    def loss_and_gradient(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """The float32 scalar ``sum_i w_i loss_i``, and its gradient if one was wanted.

        :meth:`counts` comes first.
        """


class _FusedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, kernel: Kernel, weights: Tensor) -> Tensor:
        ctx.kernel, ctx.weights = kernel, weights
        loss, ctx.gradient = kernel.loss_and_gradient(weights)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            # A second pass over a retained graph: the first one gave its memory away.
            gradient = ctx.kernel.loss_and_gradient(ctx.weights)[1]
        # The usual factor of 1 is not worth a pass over memory; a CUDA device cannot be asked.
        if grad_output.device.type != "cpu" or grad_output != 1:
            gradient.mul_(grad_output)
        return gradient, None, None


def fused_sum(prediction: Tensor, kernel: Kernel, weights: Tensor) -> Tensor:
    """``sum_i w_region(i) * loss_i`` on the graph of ``prediction``.

    Args:
        prediction: (n,), contiguous, what ``kernel`` was made for.
        kernel: see :class:`Kernel`.
        weights: float32 (bins,).

    Returns:
        A float32 scalar. It can be differentiated once.
    """
    total: Tensor = _FusedSum.apply(prediction, kernel, weights)  # type: ignore[no-untyped-call]
    return total


def _wants_gradient(prediction: Tensor) -> bool:
    return prediction.requires_grad and torch.is_grad_enabled()


@cache
def _triton() -> Any:  # CUDA only
    """The module of the Triton kernels, imported when a CUDA tensor first needs it; or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton_kernels

    return triton_kernels


def _has_kernel(prediction: Tensor, bins: int) -> bool:
    if prediction.dtype not in _DTYPES or torch.compiler.is_compiling():
        return False
    if prediction.device.type == "cuda":  # CUDA only
        return (triton := _triton()) is not None and bins <= triton.MAX_BINS
    return prediction.device.type == "cpu"


def _positions(labels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Ascending positions in (R * K,) of what is positive, and of what integer labels ignore."""
    if labels.dim() == 2:
        return (labels == 1).flatten().nonzero().flatten(), labels.new_empty(0).long()
    rows = ((labels >= 0) & (labels < columns)).nonzero().flatten()
    ignored = (labels < 0).nonzero() * columns + torch.arange(columns)
    return rows * columns + labels[rows], ignored.flatten()


def sigmoid_kernel(logits: Tensor, labels: Tensor, keep: Tensor | None, bins: int) -> Kernel | None:
    """The kernel for sigmoid GHM-C, or None where the eager path is the only one.

    Args:
        logits: (R * K,) contiguous, on the graph.
        labels: int64 (R,), in [-1, K], or dense (R, K) of 0 and 1.
        keep: bool (R, K) or (R, 1), False drops an example; None keeps all.
        bins: number of unit regions.
    """
    columns = logits.numel() // labels.shape[0]
    if not _has_kernel(logits, bins):
        return None
    data, differentiate = logits.detach(), _wants_gradient(logits)
    if logits.device.type == "cpu":
        positive, ignored = _positions(labels, columns)
        if keep is not None:
            dropped = (~keep).expand(-1, columns).flatten().nonzero().flatten()
            ignored = torch.cat([ignored, dropped]).unique()  # ascending
        return blocked.SigmoidKernel(data, positive, ignored, differentiate)
    if labels.dim() == 2:  # CUDA only
        return None
    triton: Any = _triton()  # CUDA only
    kernel: Kernel = triton.TritonSigmoid(data, labels, keep, columns, differentiate)  # CUDA only
    return kernel  # CUDA only


def regression_kernel(
    pred: Tensor, target: Tensor, keep: Tensor | None, mu: float, bins: int
) -> Kernel | None:
    """The kernel for GHM-R, or None where the eager path is the only one.

    Args:
        pred: (n,) contiguous, on the graph.
        target: (n,) contiguous, floating point.
        keep: bool of n elements, False drops an example; None keeps all.
        mu: width of the quadratic part.
        bins: number of unit regions.
    """
    if not _has_kernel(pred, bins) or target.dtype == torch.float64:
        return None
    data, differentiate = pred.detach(), _wants_gradient(pred)
    if pred.device.type == "cpu":
        dropped = pred.new_empty(0).long() if keep is None else (~keep).nonzero().flatten()
        return blocked.RegressionKernel(data, target, dropped, mu, differentiate)
    kernel: Kernel = _triton().TritonRegression(data, target, keep, mu, differentiate)  # CUDA only
    return kernel  # CUDA only
