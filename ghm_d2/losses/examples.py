"""The examples of one tensor: counted first, weighted once the counts of all tensors are known."""

from typing import Protocol

from torch import Tensor

from .functional import count_unit_regions, harmonized_sum, unit_region_index
from .fused import Kernel, fused_sum

__all__ = ["EagerExamples", "Examples", "FusedExamples"]


class Examples(Protocol):
    """What :class:`~ghm_d2.losses.base.HarmonizedLoss` needs of the examples of one tensor."""

    def counts(self, bins: int) -> Tensor:
        """int64 (bins,): the number of examples in each unit region."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``sum_i w_region(i) * loss_i``, a scalar on the graph; ``weights`` float32 (bins,)."""


class EagerExamples:
    """Loss and gradient norm as whole tensors: the readable path, for every device and dtype.

    It is also what torch.compile traces and what the exact density needs.
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
        """See :class:`Examples`; :meth:`counts` comes first."""
        return harmonized_sum(self.loss, self._region, weights)


class FusedExamples:
    """Examples of a kernel that computes loss and gradient together."""

    def __init__(self, prediction: Tensor, kernel: Kernel) -> None:
        """
        Args:
            prediction: (n,), contiguous, on the graph.
            kernel: made for it.
        """
        self.prediction = prediction
        self.kernel = kernel

    def counts(self, bins: int) -> Tensor:
        """See :class:`Examples`."""
        return self.kernel.counts(bins)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`Examples`."""
        return fused_sum(self.prediction, self.kernel, weights)
