"""GHM-R: gradient-harmonised box regression."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Eager, HarmonizedLoss
from .baselines import SmoothL1Loss
from .checks import ValueChecks, check_floating, check_positive, check_weight, example_mask
from .functional import at_least_float32, regression_examples
from .kernels import Arguments, EagerPart, FusedExamples, regression_kernel

# `mu="auto"`: factor of the median error, momentum of its moving average, range of the width.
_MEDIANS, _MOMENTUM, _RANGE = 1.5, 0.95, (0.01, 0.5)


class GHMRLoss(HarmonizedLoss):
    """Gradient-harmonised authentic smooth L1 (paper, section "GHM-R Loss").

    One example is one coordinate of one positive.

    Attributes:
        mu: the width; with `mu="auto"` a float32 scalar, that of the last call.
        running_median: float32 scalar, only with `mu="auto"`: the moving average of the median of
            |d|, -1 before the first update; saved and written like `acc_sum`.
    """

    running_median: Tensor
    argument_names = ("pred", "target")
    not_finite_message = (
        "pred and target must be finite; they hold NaN or infinite values "
        "(a zero-size ground-truth box gives an infinite target)"
    )

    def __init__(
        self,
        mu: float | str = 0.02,
        bins: int = 10,
        momentum: float = 0.7,
        loss_weight: float | str = 1.0,
        *,
        normalize_by: str = "valid_bins",
        decay_empty_bins: bool = False,
        bias_correction: bool = False,
        sync: bool = False,
        density: str = "unit_region",
        reference: SmoothL1Loss | None = None,
    ) -> None:
        """
        Args:
            mu: width of the quadratic part of authentic smooth L1, above 0, in units of the deltas;
                or "auto": 1.5 times the moving average (momentum 0.95) of the median of |d| over
                the coordinates of a call, this call included, clamped to [0.01, 0.5]. With `sync`,
                the processes' medians are averaged, weighted by their numbers of coordinates.
            bins, momentum: see :class:`~ghm_d2.losses.GHMCLoss`.
            loss_weight: likewise; the published code uses 10 in RetinaNet.
            normalize_by, decay_empty_bins, bias_correction, sync, density: likewise.
            reference: with `loss_weight="auto"`, the loss that the gradient is kept as large as,
                over the number of positives; None: L1 loss times 2.

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
        if self.follows_weight:
            self.reference = reference or SmoothL1Loss(loss_weight=2.0)
        self.follows = mu == "auto"
        if self.follows:
            self.register_buffer("running_median", torch.tensor(-1.0))
        self.mu: float | Tensor = _width(self.running_median) if self.follows else _check_mu(mu)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        mu = "auto" if self.follows else self.mu
        return f"mu={mu!r}, {super().extra_repr()}"

    def reset_parameters(self) -> None:
        """Sets the running averages to their start, as in a new module; also after `to_empty`."""
        super().reset_parameters()
        if self.follows:
            with torch.no_grad():
                self.running_median.fill_(-1)
            self.mu = _width(self.running_median)

    @torch.jit.unused
    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        divisor: float | None = None,
    ) -> Tensor:
        """
        Args:
            pred: predicted deltas of the positives, (P, 4) or any shape; floating point.
            target: same shape; where it requires a gradient, it gets one too.
            weight: (P,) or `pred`'s shape; 0 drops an example, a positive value keeps it. None
                keeps all.
            divisor: with `loss_weight="auto"`, what the reference loss is divided by in place of
                the number of positives, above 0.

        Returns:
            A scalar on the graph, float32 (float64 for float64 input); 0 without examples.

        Raises:
            ValueError: a shape, type or value is wrong; see :meth:`raise_deferred_errors` for
                when values are checked on CUDA.
        """
        return self.forward_pooled([pred], [target], [weight], divisor=divisor)

    @torch.no_grad()
    def _constants(
        self, raw: Sequence[Arguments], writes: bool, recomputed: bool
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if not self.follows:
            return {"mu": self.mu}, {}
        average = self.running_median
        if not recomputed:  # else the first computation has averaged the median in
            median, count = _median_error(raw, average)
            if writes and self._processes() > 1:
                total = torch.stack([median * count, count])
                dist.all_reduce(total)
                median, count = total[0] / total[1].clamp(min=1), total[1]
            moved = torch.where(average < 0, median, torch.lerp(median, average, _MOMENTUM))
            average = torch.where(count > 0, moved, average)
        mu = _width(average)
        if not torch.compiler.is_compiling():
            self.mu = mu
        return {"mu": mu}, {"running_median": average}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.follows:
            self.mu = _width(self.running_median)

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

    def _reference_gradient(self, arguments: Sequence[Arguments]) -> Tensor:
        return self.reference.gradient_norm(arguments)

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


def _check_mu(mu: float | str) -> float:
    if isinstance(mu, str):
        raise ValueError(f"mu must be a finite number above 0 or 'auto', got {mu!r}")
    return check_positive("mu", mu)


def _width(running_median: Tensor) -> Tensor:
    return (_MEDIANS * running_median).clamp(*_RANGE)


def _median_error(raw: Sequence[Arguments], like: Tensor) -> tuple[Tensor, Tensor]:
    """The lower median of |d| over all tensors, and the number of coordinates that count.

    Both are scalars of `like`'s type. The errors are sorted, because the number of coordinates
    stays on the device; ignored ones come last, as infinities.
    """
    errors, count = [], like.new_zeros(())
    for pred, target, weight in raw:
        error = (at_least_float32(pred.detach()) - at_least_float32(target.detach())).abs()
        keep = torch.ones_like(error, dtype=torch.bool)
        if weight is not None:
            keep = (weight > 0).view(*weight.shape, *[1] * (error.dim() - weight.dim())) & keep
        errors.append(error.masked_fill(~keep, torch.inf).flatten())
        count = count + keep.sum()
    ordered = torch.cat([*errors, errors[0].new_full((1,), torch.inf)]).sort().values
    middle = (count - 1).clamp(min=0).long() // 2
    median = ordered.gather(0, middle.view(1))[0].to(like.dtype)
    return torch.where(count > 0, median, 0.0), count
