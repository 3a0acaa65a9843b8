"""The examples of one tensor: counted first, weighted once the counts of all tensors are known."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import count_unit_regions, harmonized_sum, unit_region_index

__all__ = ["EagerExamples", "Examples", "FusedExamples"]


class Examples(Protocol):
    """What :class:`~ghm_d2.losses.base.HarmonizedLoss` needs of the examples of one tensor."""

    def counts(self, bins: int) -> Tensor:
        """int64 (bins,): the number of examples in each unit region."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``sum_i w_region(i) * loss_i``, a scalar on the graph; ``weights`` float32 (bins,).

        :meth:`counts` comes first.
        """


class EagerExamples:
    """Loss and gradient norm as whole tensors: the readable path, for every device and dtype.

    It is also what torch.compile traces, what second derivatives are taken of, and what the exact
    density needs.
    """

    def __init__(self, loss: Tensor, gradient_norm: Tensor, valid: Tensor | None) -> None:
        """
        Args:
            loss: loss of each example, any shape, on the graph.
            gradient_norm: of the same shape, in [0, 1].
            valid: bool, broadcastable to it, False drops an example; None keeps all.
        """
        self.loss = loss
        self.gradient_norm = gradient_norm
        self.valid = valid

    def counts(self, bins: int) -> Tensor:
        """See :class:`Examples`."""
        self._region = unit_region_index(self.gradient_norm, self.valid, bins)
        return count_unit_regions(self._region, bins)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`Examples`."""
        if torch.compiler.is_compiling():
            return harmonized_sum(self.loss, self._region, weights)
        total: Tensor = _HarmonizedSum.apply(  # type: ignore[no-untyped-call]
            self.loss, self._region, weights
        )
        return total


class _HarmonizedSum(torch.autograd.Function):
    """:func:`harmonized_sum` whose backward pass keeps the weights of the forward pass.

    Plain operations would save the weight of each example, and activation checkpointing would
    compute it anew from running counts that have moved on in the meantime.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, region: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(region)
        ctx.weights = F.pad(weights.to(loss.dtype), (0, 1))
        total: Tensor = (loss * ctx.weights[region]).sum()
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (region,) = ctx.saved_tensors
        return grad_output * ctx.weights[region], None, None


class FusedExamples:
    """Examples of a kernel; a subclass computes loss and gradient of ``prediction`` at once.

    The gradient is written with the incoming factor in the region weights: in half precision, a
    loss scale that is multiplied afterwards finds zeros where the gradients were small.
    """

    def __init__(self, prediction: Tensor, eager: Callable[[Tensor], EagerExamples]) -> None:
        """
        Args:
            prediction: (n,), contiguous, on the graph.
            eager: makes the same examples of it for the second derivative.
        """
        self.prediction = prediction
        self.data = prediction.detach()
        self.eager = eager

    @property
    def differentiate(self) -> bool:
        """Whether a gradient will be asked for."""
        return self.prediction.requires_grad and torch.is_grad_enabled()

    def counts(self, bins: int) -> Tensor:
        """See :class:`Examples`."""
        raise NotImplementedError

    def loss(self, weights: Tensor) -> Tensor:
        """The float32 scalar ``sum_i w_i loss_i``; ``weights`` float32 (bins,)."""
        raise NotImplementedError

    def gradient(self, weights: Tensor, factor: Tensor) -> Tensor:
        """``factor * w_i * d loss_i`` (n,), of the prediction's dtype; ``factor`` is a scalar."""
        raise NotImplementedError

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`Examples`."""
        total: Tensor = _FusedSum.apply(  # type: ignore[no-untyped-call]
            self.prediction, self, weights
        )
        return total


class _FusedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, examples: FusedExamples, weights: Tensor) -> Tensor:
        ctx.save_for_backward(prediction)
        ctx.examples, ctx.weights = examples, weights
        return examples.loss(weights)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        examples, weights = ctx.examples, ctx.weights
        # A saved tensor also knows whether it was overwritten since.
        (prediction,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return examples.gradient(weights, grad_output), None, None
        # create_graph=True: this gradient will be differentiated in its turn.
        eager = examples.eager(prediction)
        eager.counts(weights.numel())
        (gradient,) = torch.autograd.grad(
            eager.weighted_sum(weights), prediction, grad_output, create_graph=True
        )
        return gradient, None, None
