"""Argument checks of the losses.

Types and shapes are checked when the loss is called. Checks that need *values* (a label out of
range, a NaN) would make a CUDA device wait for the host, so there they become flags on the
device: the loss turns NaN and :meth:`ValueChecks.raise_if_any` says why at a point where the
training step synchronises anyway.
"""

import math
import numbers

import torch
from torch import Tensor

__all__ = ["ValueChecks", "check_choice", "check_fraction", "check_non_negative", "check_positive"]


def check_bins(bins: int) -> int:
    """Returns ``bins`` as a Python int; raises ValueError unless it is a whole number >= 1."""
    if isinstance(bins, bool) or not isinstance(bins, numbers.Integral) or bins < 1:
        raise ValueError(f"bins must be a whole number of at least 1, got {bins!r}")
    return int(bins)


def check_fraction(name: str, value: float) -> float:
    """Returns ``value`` as a float; raises ValueError unless it lies in [0, 1)."""
    if not _is_real(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """Returns ``value`` as a float; raises ValueError unless it is finite and above 0."""
    if not _is_real(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def check_non_negative(name: str, value: float) -> float:
    """Returns ``value`` as a float; raises ValueError unless it is finite and at least 0."""
    if not _is_real(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Returns ``value``; raises ValueError unless it is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def check_flag(name: str, value: bool) -> bool:
    """Returns ``value``; raises ValueError unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_floating(name: str, value: Tensor) -> None:
    """Raises ValueError unless ``value`` is a floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a floating-point tensor, got {got}")


class ValueChecks:
    """Collects conditions on tensor values; raises at once on the CPU, later elsewhere."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, str]] = []

    def require(self, condition: Tensor, message: str) -> None:
        """Raises ValueError(``message``) where the scalar bool tensor ``condition`` is False.

        On the CPU now; on another device, or while torch.compile traces, the condition is kept.
        """
        if condition.device.type == "cpu" and not torch.compiler.is_compiling():
            if not condition:
                raise ValueError(message)
        else:
            self._pending.append((condition, message))

    def poison(self, loss: Tensor) -> Tensor:
        """Returns ``loss``, turned NaN on the device where a kept condition does not hold."""
        for condition, _ in self._pending:
            loss = torch.where(condition, loss, torch.full_like(loss, math.nan))
        return loss

    def raise_if_any(self) -> None:
        """Waits for the device, raises the first kept message that applies, forgets the rest."""
        pending, self._pending = self._pending, []
        if pending and not all(holds := torch.stack([c for c, _ in pending]).tolist()):
            raise ValueError(pending[holds.index(False)][1])
