"""GHM-R: gradient-harmonised box regression."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Eager, HarmonizedLoss
from .checks import ValueChecks, check_floating, check_positive, check_weight, example_mask
from .functional import regression_examples
from .kernels import Arguments, EagerPart, FusedExamples, regression_kernel

__all__ = ["GHMRLoss"]


class GHMRLoss(HarmonizedLoss):
    """Gradient-harmonised authentic smooth L1 (paper, section "GHM-R Loss").

    One example is one coordinate of one positive.
    """

    argument_names = ("pred", "target")
    not_finite_message = (
        "pred and target must be finite; they hold NaN or infinite values "
        "(a zero-size ground-truth box gives an infinite target)"
    )

    def __init__(
        self,
        mu: float = 0.02,
        bins: int = 10,
        momentum: float = 0.7,
        loss_weight: float = 1.0,
        *,
        normalize_by: str = "valid_bins",
        decay_empty_bins: bool = False,
        bias_correction: bool = False,
        sync: bool = False,
        density: str = "unit_region",
    ) -> None:
        """
        Args:
            mu: width of the quadratic part of authentic smooth L1, above 0, in units of the deltas.
            bins, momentum: see :class:`~ghm_d2.losses.GHMCLoss`.
            loss_weight: likewise; the published code uses 10 in RetinaNet.
            normalize_by, decay_empty_bins, bias_correction, sync, density: likewise.

        Raises:
            ValueError: an argument is out of range; the message names it.
        """
        super().__init__(
            bins,
            momentum,
            loss_weight,
            normalize_by=normalize_by,
            decay_empty_bins=decay_empty_bins,
            bias_correction=bias_correction,
            sync=sync,
            density=density,
        )
        self.mu = check_positive("mu", mu)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"mu={self.mu!r}, {super().extra_repr()}"

    @torch.jit.unused
    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """
        Args:
            pred: predicted deltas of the positives, (P, 4) or any shape; floating point.
            target: same shape; where it requires a gradient, it gets one too.
            weight: (P,) or `pred`'s shape; 0 drops an example, a positive value keeps it. None
                keeps all.

        Returns:
            A scalar on the graph, float32 (float64 for float64 input); 0 without examples.

        Raises:
            ValueError: a shape, type or value is wrong; see :meth:`raise_deferred_errors` for
                when values are checked on CUDA.
        """
        return self.forward_pooled([pred], [target], [weight])

    def _layout(self, pred: Tensor, target: Tensor, weight: Tensor | None) -> Arguments:
        check_floating("pred", pred)
        check_floating("target", target)
        if pred.shape != target.shape:
            raise ValueError(
                f"target must have pred's shape {tuple(pred.shape)}, got {tuple(target.shape)}"
            )
        check_weight(weight, pred.shape[:1], pred.shape)
        return pred, target, weight

    def _values(
        self, pred: Tensor, target: Tensor, weight: Tensor | None, checks: ValueChecks
    ) -> Arguments:
        keep = example_mask(weight, checks)
        if keep is not None:
            keep = keep.view(*keep.shape, *[1] * (pred.dim() - keep.dim()))
        return pred, target, keep

    def _constants(self, raw: Sequence[Arguments]) -> dict[str, Any]:
        return {"mu": self.mu}

    def _device_arguments(self) -> dict[str, Any] | None:
        return {} if self.density == "unit_region" else None

    def _kernel(
        self, arguments: Sequence[Arguments], eager: Eager, constants: dict[str, Any]
    ) -> FusedExamples | None:
        if self.density == "exact":
            return None
        return regression_kernel(arguments, constants["mu"], self.bins, eager)

    def _eager(
        self, pred: Tensor, target: Tensor, keep: Tensor | None, constants: dict[str, Any]
    ) -> EagerPart:
        if not pred.numel():
            return EagerPart.empty(pred)
        given = pred
        if keep is not None:
            pred, target = pred.masked_fill(~keep, 0), target.masked_fill(~keep, 0)
        return EagerPart(*regression_examples(pred, target, constants["mu"]), keep, given)
