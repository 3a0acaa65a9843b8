"""GHM-C: gradient-harmonised classification."""

import torch
from torch import Tensor

from .base import HarmonizedLoss, example_mask
from .checks import ValueChecks, check_choice, check_floating
from .examples import EagerExamples, Examples, FusedExamples
from .functional import sigmoid_examples, softmax_examples
from .fused import sigmoid_kernel

__all__ = ["GHMCLoss"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class GHMCLoss(HarmonizedLoss):
    """Gradient-harmonised cross entropy (paper, section "GHM-C Loss").

    The value is about 1 whatever the model's quality: the mean over unit regions of a loss that
    depends on the region alone. Watch the AP, or the plain cross entropy of
    the positives: the mean over all examples may rise while a detector learns.
    """

    argument_names = ("logits", "labels")
    not_finite_message = "logits must be finite; they hold NaN or infinite values"

    def __init__(
        self,
        bins: int = 30,
        momentum: float = 0.75,
        loss_weight: float = 1.0,
        *,
        activation: str = "sigmoid",
        normalize_by: str = "valid_bins",
        decay_empty_bins: bool = False,
        bias_correction: bool = False,
        sync: bool = False,
        density: str = "unit_region",
    ) -> None:
        """
        Args:
            bins: number M of unit regions, at least 1.
            momentum: alpha of the moving average of the counts, in [0, 1); 0: none.
            loss_weight: factor of the loss, at least 0.
            activation: "sigmoid" harmonises every (anchor, class) logit; "softmax" every row.
            normalize_by: divisor D of the region weights: "valid_bins", the regions that hold an
                example of this call (authors' code), or "all_bins", M (paper).
            decay_empty_bins: whether the average of a region without examples decays (paper) or
                stays as it was (authors' code).
            bias_correction: divide the average by ``1 - alpha^n``, n its number of updates. The
                authors start from 0 without it, so their first loss is 1 / (1 - alpha) too large.
            sync: pool the counts of all processes and return world_size times this process's
                share, so that the mean over processes is the loss of all examples together.
                Every process must then make every call.
            density: "unit_region", or "exact" (paper, eq. 6; window 1 / bins; needs momentum 0).

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
        self.activation = check_choice("activation", activation, ("sigmoid", "softmax"))

    def extra_repr(self) -> str:
        """The settings, as ``print(model)`` shows them."""
        return f"activation={self.activation!r}, {super().extra_repr()}"

    @torch.jit.unused
    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """
        Args:
            logits: (R, K) for sigmoid, (R, K + 1) for softmax; float16, bfloat16, float32, float64.
            labels: integer (R,): a class in [0, K), K = background, -1 = ignored; or, for sigmoid
                alone, dense (R, K) of 0 and 1.
            weight: (R,) or the examples' shape ((R, K) for sigmoid, (R,) for softmax); 0 drops an
                example, a positive value keeps it. None keeps all.

        Returns:
            A scalar on the graph, float32 (float64 for float64 logits); 0 without examples.

        Raises:
            ValueError: a shape, type or value is wrong; see :meth:`raise_deferred_errors` for
                when values are checked on CUDA.
        """
        return self.forward_pooled([logits], [labels], [weight])

    def _examples(
        self, logits: Tensor, labels: Tensor, weight: Tensor | None, checks: ValueChecks
    ) -> Examples | None:
        check_floating("logits", logits)
        if logits.dim() != 2:
            raise ValueError(f"logits must be 2-dimensional, got shape {tuple(logits.shape)}")
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels must be a tensor, got {type(labels).__name__}")
        if labels.dim() == 2 and self.activation == "sigmoid":
            return self._dense_examples(logits, labels, weight, checks)
        if labels.shape != logits.shape[:1]:
            dense = f" or {tuple(logits.shape)}" if self.activation == "sigmoid" else ""
            raise ValueError(
                f"labels must have shape ({logits.shape[0]},){dense}, got {tuple(labels.shape)}"
            )
        if labels.dtype not in _INTEGERS:
            raise ValueError(f"labels of shape (R,) must be integers, got {labels.dtype}")
        sigmoid = self.activation == "sigmoid"
        background = logits.shape[1] if sigmoid else logits.shape[1] - 1
        labels = labels.long()
        checks.require(
            ((labels >= -1) & (labels <= background)).all(),
            f"labels must lie in [-1, {background}] "
            f"(-1 = ignored, {background} = background); they hold a value outside",
        )
        shape = logits.shape if sigmoid else labels.shape
        keep = example_mask(weight, shape, checks)
        if logits.numel() == 0:
            return None
        if sigmoid:
            return self._sigmoid_examples(logits, labels, keep)
        valid = labels >= 0 if keep is None else (labels >= 0) & keep
        return EagerExamples(*softmax_examples(_without(logits, valid.unsqueeze(1)), labels), valid)

    def _dense_examples(
        self, logits: Tensor, labels: Tensor, weight: Tensor | None, checks: ValueChecks
    ) -> Examples | None:
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels must have shape ({logits.shape[0]},) or {tuple(logits.shape)}, "
                f"got {tuple(labels.shape)}"
            )
        checks.require(
            ((labels == 0) | (labels == 1)).all(), "labels of shape (R, K) must be 0 or 1"
        )
        keep = example_mask(weight, logits.shape, checks)
        return self._sigmoid_examples(logits, labels, keep) if logits.numel() else None

    def _sigmoid_examples(self, logits: Tensor, labels: Tensor, keep: Tensor | None) -> Examples:
        if self.density == "unit_region":
            flat = logits.contiguous().view(-1)
            kernel = sigmoid_kernel(flat, labels, keep, self.bins)
            if kernel is not None:
                return FusedExamples(flat, kernel)
        valid = keep
        if labels.dim() == 1:
            counted = (labels >= 0).unsqueeze(1)
            valid = counted if keep is None else counted & keep
        if valid is not None:
            logits = _without(logits, valid)
        return EagerExamples(*sigmoid_examples(logits, labels), valid)


def _without(logits: Tensor, valid: Tensor) -> Tensor:
    """Zeroes what is dropped: 0 times the NaN of an ignored example would still be NaN."""
    return logits.masked_fill(~valid, 0)
