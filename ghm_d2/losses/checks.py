"""Argument checks of the losses.

Types and shapes are checked when the loss is called. Checks that need *values* (a label out of
range, a NaN) would make a CUDA device wait for the host, so there they become flags on the
device: the loss turns NaN and :func:`raise_first` says why at a point where the training step
synchronises anyway.
"""

import math
import numbers

import torch
from torch import Tensor, nn

WEIGHT_MESSAGE = "weight must be 0 or positive; it holds NaN or less"


def check_bins(bins: int, name: str = "bins") -> int:
    """Returns `bins` as a Python int; raises ValueError unless it is a whole number >= 1."""
    if isinstance(bins, bool) or not isinstance(bins, numbers.Integral) or bins < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {bins!r}")
    return int(bins)


def check_integer(name: str, value: int) -> int:
    """Returns `value` as a Python int; raises ValueError unless it is a whole number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def check_fraction(name: str, value: float) -> float:
    """Returns `value` as a float; raises ValueError unless it lies in [0, 1)."""
    if not _is_real(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """Returns `value` as a float; raises ValueError unless it is finite and above 0."""
    if not _is_real(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def check_width(name: str, value: float | Tensor, device: torch.device) -> float | Tensor:
    """Returns `value`; raises ValueError unless it is above 0, a number or a tensor of one.

    A tensor is a 0-d float32 one on `device`; its value is looked at on the CPU alone, where that
    takes no wait.
    """
    if not isinstance(value, Tensor):
        return check_positive(name, value)
    if value.dim() or value.dtype != torch.float32 or value.device != device:
        raise ValueError(
            f"{name} must be a number or a 0-d float32 tensor on {device}, got one of shape "
            f"{tuple(value.shape)} and {value.dtype} on {value.device}"
        )
    if device.type == "cpu" and not torch.compiler.is_compiling() and is_plain(value):
        check_positive(name, value.item())
    return value.detach()


def check_non_negative(name: str, value: float) -> float:
    """Returns `value` as a float; raises ValueError unless it is finite and at least 0."""
    if not _is_real(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)


def check_loss_weight(value: float | str, auto: float) -> float:
    """Returns `value` as a float, `auto` for "auto"; raises ValueError if it is neither."""
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(
                f"loss_weight must be a finite number of at least 0 or 'auto', got {value!r}"
            )
        return auto
    return check_non_negative("loss_weight", value)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Returns `value`; raises ValueError unless it is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def check_flag(name: str, value: bool) -> bool:
    """Returns `value`; raises ValueError unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_floating(name: str, value: Tensor) -> None:
    """Raises ValueError unless `value` is a floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a floating-point tensor, got {got}")


def check_plain(name: str, value: Tensor | None, device: torch.device) -> None:
    """Raises ValueError inside torch.jit.trace and torch.func, and on another device than the loss.

    A trace would hold the weights of its one call for ever, and a transform sees one example where
    the density needs all of them.
    """
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise ValueError(
            f"{name} must not be traced: a harmonised loss depends on the counts of its earlier "
            f"calls; trace the detector in eval mode, where it computes no loss"
        )
    if isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise ValueError(
            f"{name} must be a plain tensor, got one inside a transform of torch.func (vmap, grad, "
            f"jvp, ...): differentiate with torch.autograd"
        )
    if isinstance(value, Tensor) and value.device != device:
        raise ValueError(
            f"{name} must be on the device of the loss, {device}, got {value.device}: move the "
            f"loss with the model"
        )


def is_plain(value: Tensor) -> bool:
    """Whether a tensor has values to look at here and now; meta and fake tensors have none."""
    return type(value) in (Tensor, nn.Parameter) and not value.is_meta


class ValueChecks:
    """The conditions on tensor values of one call; raises at once on the CPU, later elsewhere."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, str]] = []

    def require(self, condition: Tensor, message: str) -> None:
        """Raises ValueError(`message`) where the scalar bool tensor `condition` is False.

        On the CPU now; on another device, or while torch.compile traces, the condition is kept.
        """
        if torch.compiler.is_compiling():
            self._kept.append((condition, message))
        elif not is_plain(condition):
            return
        elif condition.device.type == "cpu":
            if not condition:
                raise ValueError(message)
        else:
            self._kept.append((condition, message))

    def all_hold(self) -> Tensor | None:
        """Whether every kept condition holds, a scalar bool tensor; None where none was kept."""
        holds = None
        for condition, _ in self._kept:
            holds = condition if holds is None else holds & condition
        return holds

    def defer_to(self, failures: dict[str, Tensor]) -> None:
        """Notes in `failures`, for each message, whether it applies; see :func:`raise_first`."""
        if torch.compiler.is_compiling():
            return  # a traced function keeps no tensors; its NaN loss must do
        for condition, message in self._kept:
            failed = failures.get(message)
            failures[message] = ~condition if failed is None else failed | ~condition


def check_weight(weight: Tensor | None, rows: torch.Size, examples: torch.Size) -> None:
    """Raises ValueError unless `weight` is None or a tensor of one of these shapes."""
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight must be a tensor or None, got {type(weight).__name__}")
    if weight.shape not in (rows, examples):
        allowed = " or ".join(dict.fromkeys(str(tuple(s)) for s in (rows, examples)))
        raise ValueError(f"weight must have shape {allowed}, got {tuple(weight.shape)}")


def example_mask(weight: Tensor | None, checks: ValueChecks) -> Tensor | None:
    """`weight` as a bool mask of its shape: a positive value keeps an example and 0 drops it.

    The published code uses its weights as a mask, so their size has no effect.
    """
    if weight is None:
        return None
    checks.require((weight >= 0).all(), WEIGHT_MESSAGE)
    return weight > 0


def raise_first(failures: dict[str, Tensor]) -> None:
    """Waits for the device, forgets `failures`, raises the first message that applies."""
    kept = list(failures.items())
    failures.clear()
    if kept and any(failed := torch.stack([flag for _, flag in kept]).tolist()):
        raise ValueError(kept[failed.index(True)][0])
