"""What GHM-C and GHM-R share: the way from examples over counts and weights to one loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import (
    WEIGHT_MESSAGE,
    ValueChecks,
    check_choice,
    check_plain,
    raise_first,
)
from .kernels import (
    Arguments,
    EagerExamples,
    EagerPart,
    Examples,
    FusedExamples,
    compiled_loss,
    device_examples,
    device_takes,
)
from .running_counts import RunningCounts
from .weighted import is_recomputation

# Makes the examples of several predictions with whole-tensor operations.
Eager = Callable[[Sequence[Tensor]], EagerExamples]

_observers: list[Callable[..., None]] = []


@contextmanager
def observed(observer: Callable[..., None]) -> Iterator[None]:
    """Within the `with` block, every call of a harmonised loss also calls `observer`.

    The observer is kept outside the modules, so that a model can be copied and saved at any moment.

    Args:
        observer: called for each histogram, with ``(loss module, predictions, targets, masks,
            counts, region_weights)``: three lists with one entry per tensor of the histogram,
            for GHM-C (R, K) and (R,) whatever shapes it was called with; the int64 (bins,) counts
            R_j and float32 (bins,) weights w_j (without `loss_weight`), both None with the exact
            density. A recomputation by activation checkpointing is not observed.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


class HarmonizedLoss(RunningCounts):
    """`loss_weight * sum_i loss_i / GD(g_i)` over the examples that a subclass provides."""

    # A subclass's names for its two arguments, and its message for a NaN in them.
    argument_names: tuple[str, str]
    not_finite_message: str

    def __init__(
        self,
        bins: int,
        momentum: float,
        loss_weight: float | str,
        *,
        density: str = "unit_region",
        **averaging: Any,
    ) -> None:
        """See :class:`~ghm_d2.losses.GHMCLoss`; `averaging` is for :class:`RunningCounts`."""
        super().__init__(bins, momentum, loss_weight, **averaging)
        self.density = check_choice("density", density, ("unit_region", "exact"))
        if density == "exact":
            if self.momentum:
                raise ValueError(
                    f"momentum must be 0 with density='exact', which has no region counts to "
                    f"average, got {momentum!r}"
                )
            for name in ("decay_empty_bins", "bias_correction", "sync"):
                if getattr(self, name):
                    raise ValueError(f"{name} must be False with density='exact', got True")
            if self.follows_weight:
                raise ValueError(
                    "loss_weight must be a number with density='exact', which has no region counts "
                    "to tell the gradient from, got 'auto'"
                )
        self._failures: dict[str, Tensor] = {}
        self._bits: Tensor | None = None
        self._messages: dict[int, str] = {}

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        names = ["bins", "momentum", "loss_weight", "normalize_by", "decay_empty_bins"]
        names += ["bias_correction", "sync", "density"]
        values = {name: getattr(self, name) for name in names} | {
            "loss_weight": self._weight_setting()
        }
        return ", ".join(f"{name}={value!r}" for name, value in values.items())

    def raise_deferred_errors(self) -> None:
        """Raises the ValueError of an earlier call on a CUDA device, if there is one; synchronises.

        On the CPU bad values raise in the call itself and this does nothing.
        """
        raise_first(self._failures)
        if self._bits is not None and (bits := int(self._bits)):
            self._bits.zero_()
            raise ValueError(next(m for bit, m in self._messages.items() if bits & bit))

    def forward_pooled(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        weights: Sequence[Tensor | None] | None = None,
        *,
        divisor: float | None = None,
    ) -> Tensor:
        """:meth:`forward` of several tensors (such as FPN levels) that share one histogram.

        Args:
            predictions: tensors as the first argument of :meth:`forward`.
            targets: one tensor for each of them, as the second argument.
            weights: likewise, a tensor or None for each; or None.
            divisor: see :meth:`forward`.

        Returns:
            One scalar; the running counts are updated once.

        Raises:
            ValueError: as :meth:`forward`, or the sequences differ in length.
        """
        return self._forward(predictions, targets, weights, True, divisor)

    def forward_levels(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        weights: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The sum of :meth:`forward` over several tensors (the authors' way with FPN levels).

        Each tensor has a histogram of its own; the running counts are updated once per tensor, in
        the order given. With `sync` one all-reduce adds up all their counts.

        Args:
            predictions, targets, weights: see :meth:`forward_pooled`.

        Returns:
            One scalar.

        Raises:
            ValueError: as :meth:`forward_pooled`; the running counts are then unchanged.
        """
        return self._forward(predictions, targets, weights, False)

    def _forward(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        weights: Sequence[Tensor | None] | None,
        pooled: bool,
        divisor: float | None = None,
    ) -> Tensor:
        weights = [None] * len(predictions) if weights is None else weights
        if not len(predictions) == len(targets) == len(weights):
            prediction, target = (name.removesuffix("s") + "s" for name in self.argument_names)
            raise ValueError(
                f"{target} and weights must have one entry for each of the {len(predictions)} "
                f"{prediction}, got {len(targets)} and {len(weights)}"
            )
        if not predictions:
            return self.acc_sum.new_zeros(())
        first = predictions[0]
        device = first.device.type if isinstance(first, Tensor) else "cpu"
        device = "cpu" if device == "meta" else device  # meta has no autocast to switch off
        # Region weights are ratios of counts, which half precision cannot hold.
        with torch.autocast(device, enabled=False):
            raw = []
            for each in zip(predictions, targets, weights, strict=True):
                for name, value in zip((*self.argument_names, "weight"), each, strict=True):
                    check_plain(name, value, self.acc_sum.device)
                raw.append(self._layout(*each))
            return self._loss(raw, pooled, divisor)

    def _layout(self, prediction: Tensor, target: Tensor, weight: Tensor | None) -> Arguments:
        """The arguments of one tensor in the layout of :meth:`_values`; checks shapes and types."""
        raise NotImplementedError

    def _values(
        self, prediction: Tensor, target: Tensor, weight: Tensor | None, checks: ValueChecks
    ) -> Arguments:
        """Prediction, target and bool mask as :meth:`_eager` takes them; checks values."""
        raise NotImplementedError

    def _all_values(self, raw: Sequence[Arguments], checks: ValueChecks) -> list[Arguments]:
        return [self._values(*each, checks) for each in raw]

    def _constants(
        self, raw: Sequence[Arguments], writes: bool, recomputed: bool
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the examples of one call depend on besides its tensors, such as `mu`.

        Args:
            raw: what :meth:`_layout` made of its tensors; the values are not checked yet.
            writes: whether this is a training step.
            recomputed: see :func:`is_recomputation`; the result must then be that of the first
                pass.

        Returns:
            `(constants, state)`: keyword arguments of :func:`device_examples`, and the buffers that
            they came from, by name, as they are after this step. A backward pass uses the constants
            of its forward pass, so a tensor among them must not be written to later.
        """
        return {}, {}

    def _eager(
        self, prediction: Tensor, target: Tensor, keep: Tensor | None, constants: dict[str, Any]
    ) -> EagerPart:
        """The examples of what :meth:`_values` made of one tensor, as whole tensors."""
        raise NotImplementedError

    def _kernel(
        self, arguments: Sequence[Arguments], eager: Eager, constants: dict[str, Any]
    ) -> FusedExamples | None:
        """The examples of several tensors for a CPU kernel; None where there is no kernel."""
        raise NotImplementedError

    def _device_arguments(self) -> dict[str, Any] | None:
        """Further arguments of :func:`device_examples`; None where there is no CUDA kernel."""
        raise NotImplementedError

    def _examples(self, arguments: Sequence[Arguments], constants: dict[str, Any]) -> Examples:
        """The examples of several tensors, some of which may hold none."""

        def eager(predictions: Sequence[Tensor]) -> EagerExamples:
            pairs = zip(predictions, arguments, strict=True)
            parts = [self._eager(x, y, keep, constants) for x, (_, y, keep) in pairs]
            return EagerExamples(parts)

        kernel = self._kernel(arguments, eager, constants)
        return kernel or eager([x for x, _, _ in arguments])

    def _device_examples(
        self, raw: Sequence[Arguments], constants: dict[str, Any]
    ) -> FusedExamples | None:
        """The examples for kernels that check values themselves; None where there are none."""

        def eager(predictions: Sequence[Tensor]) -> EagerExamples:
            pairs = zip(predictions, self._all_values(raw, ValueChecks()), strict=True)
            parts = [self._eager(x, y, keep, constants) for x, (_, y, keep) in pairs]
            return EagerExamples(parts)

        more = self._device_arguments()
        if more is None or torch.compiler.is_compiling():
            return None
        return device_examples(raw, self.bins, eager, **more, **constants)

    def _compiled_loss(
        self, raw: Sequence[Arguments], constants: dict[str, Any], pooled: bool
    ) -> Tensor | None:
        """The loss as one operator that torch.compile does not trace; None where there is none."""
        more = self._device_arguments()
        if more is None or compiled_loss is None or not torch.compiler.is_compiling():
            return None
        if self.follows_weight:  # the operator takes a number
            return None
        mu = constants.get("mu")
        if not device_takes(raw, self.bins, mu is None):
            return None
        if isinstance(mu, float):
            mu = self.acc_sum.new_full((), mu)
        writes = self.training and torch.is_grad_enabled()
        processes = self._processes()
        loss, _, *state = compiled_loss(
            [x.contiguous() for x, _, _ in raw], [y for _, y, _ in raw],
            [x.new_empty(0) if w is None else w for x, _, w in raw], self.acc_sum,
            self.num_updates if self.bias_correction else None, self.bins, more.get("ignored"), mu,
            self.momentum, self.normalize_by, self.decay_empty_bins,
            self.loss_weight * processes, pooled and len(raw) > 1, processes, writes,
        )  # fmt: skip
        if writes:
            names = ["acc_sum", "num_updates"][: 1 + self.bias_correction]
            self._write(dict(zip(names, state, strict=False)), None)
        return cast(Tensor, loss)

    def _refusals(self, prediction: Tensor, target: Tensor) -> dict[int, str]:
        """What each bit that a CUDA kernel sets means; see `conclude_with` of the kernels."""
        return {2: WEIGHT_MESSAGE, 4: self.not_finite_message}

    def _loss(self, raw: Sequence[Arguments], pooled: bool, divisor: float | None = None) -> Tensor:
        """The loss over one or more histograms, and one update of the buffers.

        Args:
            raw: what :meth:`_layout` made of each prediction, its target and its weight.
            pooled: whether all tensors share one histogram; else each has its own.
            divisor: see :meth:`_measure`.

        Returns:
            A scalar, float32 at least.
        """
        recomputed = is_recomputation(self.training and self.density != "exact")
        writes = self.training and torch.is_grad_enabled() and not recomputed
        constants, state = self._constants(raw, writes, recomputed)
        if (loss := self._compiled_loss(raw, constants, pooled)) is not None:
            if writes and state:
                self._write(state, torch.isfinite(loss.detach()))
            return loss
        checks = ValueChecks()
        device = self._device_examples(raw, constants)
        arguments = self._all_values(raw, checks) if device is None or _observers else []
        examples = self._examples(arguments, constants) if device is None else device
        counts = region_weights = None
        if self.density == "exact":
            # no kernel computes the exact density
            loss = self.loss_weight * cast(EagerExamples, examples).exact_sum(1 / self.bins, pooled)
        else:
            counts = examples.counts(self.bins)
            if pooled and len(raw) > 1:
                counts = counts.sum(0, keepdim=True)
            processes = self._pool(counts, writes)
            region_weights, walked = self._walk(counts)
            if self.follows_weight:
                values = arguments or self._all_values(raw, ValueChecks())
                found = partial(self._measure, values, divisor, counts, region_weights, writes)
                weight, average = self._follow(found, recomputed)
                state |= average
                weights = region_weights * (weight * processes)
            else:
                scale = self.loss_weight * processes
                weights = region_weights if scale == 1 else region_weights * scale
            if device is not None:
                buffers = {name: getattr(self, name) for name in walked} if writes else None
                device.conclude_with(walked, buffers, self._bits_of(device, raw))
            else:
                state |= walked
            loss = examples.weighted_sum(weights.expand(len(raw), -1))
        if not recomputed and _observers:
            self._tell(arguments, counts, region_weights, pooled)
        if device is not None:
            if writes and state:
                self._write(state, torch.isfinite(loss.detach()))
            return loss
        checks.require(torch.isfinite(loss.detach()), self.not_finite_message)
        holds = checks.all_hold()
        checks.defer_to(self._failures)
        if writes:
            self._write(state, holds)
        return loss if holds is None else torch.where(holds, loss, torch.nan)

    def _measure(
        self,
        arguments: Sequence[Arguments],
        divisor: float | None,
        counts: Tensor,
        region_weights: Tensor,
        meet: bool,
    ) -> Tensor:
        """What :meth:`_follow` averages; the own gradient with every g in the middle of its region.

        Args:
            arguments: what :meth:`_values` made of the tensors of this call.
            divisor: what the caller divides the reference loss by; None: its own.
            counts, region_weights: (L, bins), R_j over all processes and w_j of each histogram.
            meet: whether to add up the other figures over the processes as well.
        """
        figures = self._reference_gradient(arguments)
        if divisor is not None:
            figures[1] = divisor
        if meet and self._processes() > 1:
            dist.all_reduce(figures)
        middles = (torch.arange(self.bins, device=counts.device) + 0.5) / self.bins
        own = (counts * region_weights * middles).sum()
        return torch.stack([figures[0], figures[1].clamp(min=1), own])

    def _reference_gradient(self, arguments: Sequence[Arguments]) -> Tensor:
        """float (2,): L1 norm of the gradient of the reference's sum, and what divides that."""
        raise NotImplementedError

    def _bits_of(self, device: FusedExamples, raw: Sequence[Arguments]) -> Tensor:
        """int64 (1,): bits of what was refused since the last :meth:`raise_deferred_errors`."""
        where = device.data[0].device
        if self._bits is None or self._bits.device != where:
            self._bits = torch.zeros(1, dtype=torch.int64, device=where)
        for prediction, target, _ in raw:
            self._messages |= self._refusals(prediction, target)
        return self._bits

    def _tell(
        self,
        arguments: Sequence[Arguments],
        counts: Tensor | None,
        region_weights: Tensor | None,
        pooled: bool,
    ) -> None:
        """Calls the observers, for each histogram."""
        for number, part in enumerate([arguments] if pooled else [[each] for each in arguments]):
            columns = [list(column) for column in zip(*part, strict=True)]
            rows = [None if x is None else x[number] for x in (counts, region_weights)]
            for observer in _observers:
                observer(self, *columns, *rows)


def raise_deferred_errors(model: nn.Module) -> None:
    """Calls :meth:`HarmonizedLoss.raise_deferred_errors` of every loss inside `model`."""
    for module in model.modules():
        if isinstance(module, HarmonizedLoss):
            module.raise_deferred_errors()
