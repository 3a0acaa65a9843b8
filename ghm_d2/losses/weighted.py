"""A loss's weight: a number, or one that follows from the gradients that the loss sends."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_loss_weight

# Of the moving averages of gradients.
_MOMENTUM = 0.9


class WeightedLoss(nn.Module):
    """A loss times `loss_weight`, a number or "auto".

    With "auto" the gradient at the predictions is kept as large as that of a reference loss:
    `A(reference) / (A(divisor) * A(own))`, A being moving averages over training calls, this call
    included: of the L1 norm of the gradient that the reference would send to the predictions as a
    sum, of what it is divided by, and of the L1 norm of this loss's gradient at weight 1.

    Attributes:
        loss_weight: the weight; with "auto" a float32 scalar tensor after the first call, that of
            the last one.
        running_gradients: float32 (4,), the three averages times 1 - 0.9^n, n being the number of
            updates, and that factor; only with "auto". Saved with the model; written by training
            steps alone, once a step however often activations are computed, and not where one of
            the figures is 0 or not finite.
    """

    running_gradients: Tensor

    def __init__(self, loss_weight: float | str) -> None:
        super().__init__()
        self.follows_weight = loss_weight == "auto"
        self.loss_weight: float | Tensor = check_loss_weight(loss_weight, 1.0)
        if self.follows_weight:
            self.register_buffer("running_gradients", torch.zeros(4))

    def _weight_setting(self) -> float | str:
        """`loss_weight` as it was given."""
        return "auto" if self.follows_weight else float(self.loss_weight)

    def reset_parameters(self) -> None:
        """Sets the running averages to their start, as in a new module; also after `to_empty`."""
        if self.follows_weight:
            with torch.no_grad():
                self.running_gradients.zero_()

    def _weighted(self, loss: Tensor, measure: Callable[[], Tensor]) -> Tensor:
        """The loss of one call times its weight; `measure`: see :meth:`_follow`."""
        if not self.follows_weight:
            return self.loss_weight * loss
        recomputed = is_recomputation(self.training)
        weight, state = self._follow(measure, recomputed)
        if self.training and torch.is_grad_enabled() and not recomputed:
            self._write(state, torch.isfinite(loss.detach()))
        if torch.compiler.is_compiling():
            return loss * weight
        weighted: Tensor = _Scaled.apply(loss, weight)  # type: ignore[no-untyped-call]
        return weighted

    @torch.no_grad()
    def _follow(
        self, measure: Callable[[], Tensor], recomputed: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weight of this call, and the buffer after it, by name.

        Args:
            measure: gives the float (3,) figures of this call that are averaged.
            recomputed: see :func:`is_recomputation`; the average then holds this call already.
        """
        average = self.running_gradients
        if not recomputed:
            found = measure().to(average.dtype)
            found = torch.cat([found, found.new_ones(1)])
            usable = (torch.isfinite(found) & (found > 0)).all()
            average = torch.where(usable, torch.lerp(found, average, _MOMENTUM), average)
        reference, divisor, own, factor = average.unbind()
        weight = reference / divisor * factor / own
        weight = torch.where(factor > 0, weight, 1.0)  # 1: nothing was measured yet
        if not torch.compiler.is_compiling():
            self.loss_weight = weight
        return weight, {"running_gradients": average}

    @torch.no_grad()
    def _write(self, state: dict[str, Tensor], holds: Tensor | None) -> None:
        """Keeps `state`, unless a bad value was met: a refused call leaves nothing behind."""
        for name, value in state.items():
            buffer = getattr(self, name)
            buffer.copy_(value if holds is None else torch.where(holds, value, buffer))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        """Also loads checkpoints of detectors with other losses: what is missing stays as it is."""
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *args)
        own = {prefix + name for name in self._buffers}
        missing_keys += [key for key in missing if key not in own]

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "WeightedLoss":
        """Keeps the dtype of the buffers even in `model.half()`: counts exceed float16's 65504."""
        before = {name: x for name, x in self._buffers.items() if x is not None}
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, x in before.items():
            if (moved := getattr(self, name)).dtype != x.dtype:
                setattr(self, name, x.to(moved.device))
        return self


class _Scaled(torch.autograd.Function):
    """`loss * weight` whose backward pass keeps the weight of the forward pass.

    A plain product would save the weight, and activation checkpointing would compute it anew from
    averages that have moved on in the meantime.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: Tensor) -> Tensor:
        weight = ctx.weight = weight.to(loss.dtype)
        return loss * weight

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output * ctx.weight, None


def is_recomputation(averages: bool) -> bool:
    """Whether activation checkpointing repeats an earlier call, inside a backward pass.

    The gradient then uses the weights of the earlier call, which the loss's graph holds; its
    figures must not be averaged a second time.

    Args:
        averages: whether the module is in training mode and keeps running averages.

    Raises:
        ValueError: the checkpointing is reentrant: its first pass had no graph to hold weights.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if torch._C._current_graph_task_id() == -1:
        return False
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if averages and hooks is not None and hooks(True) is None:
        raise ValueError(
            "use_reentrant must be False in torch.utils.checkpoint around a loss that keeps "
            "running averages, got True: its first pass runs without gradients, so that they "
            "cannot tell it from a validation"
        )
    return True
