"""Calls the kernels of triton.py, for all tensors of a loss at once and without a wait.

A forward pass issues: zeros for the counts, the marks of the tiles (integer labels alone), one or
two launches that count, the walk, one or two that weight, and one that adds up, checks and writes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..functional import Averaging
from . import triton as kernels
from .cpu_regions import region_finder
from .examples import EagerExamples, FusedExamples

__all__ = ["TILE", "TritonExamples", "launch_options", "walk"]

TILE = 2048
_PROGRAMS = 2048  # some sixteen for each of a Hopper chip's 132 multiprocessors

Raw = tuple[Tensor, Tensor, Tensor | None]


def launch_options(kernel: str, kind: int | None = None, bins: int = 1) -> dict[str, int]:
    """Options of a launch: what benchmarks/kernel_code.py found to need the fewest instructions.

    Args:
        kernel: "count", "loss", "flag", "walk", "finish" or "scale".
        kind: what the first two read, such as NEGATIVE of triton.py.
        bins: number of unit regions.
    """
    if kernel == "count" and kind == kernels.NEGATIVE.value and _width(bins) <= 32:
        # Thirty-two examples a thread share the votes of a histogram; more registers would be
        # taken, and none of them is needed.
        return {"num_warps": 2, "maxnreg": 64}
    return {"num_warps": 8 if kernel in ("count", "loss") else 4}


def _width(bins: int) -> int:
    width: int = triton.next_power_of_2(bins + 1)
    return max(16, width)


def _bytes(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x


class TritonExamples(FusedExamples):
    """Examples of a few tensors on a CUDA device.

    A float32 gradient is written together with the loss, and multiplied in the backward pass where
    the incoming factor is not 1. Half precision cannot hold a gradient before its factor is known:
    its backward pass reads the predictions once more.
    """

    concludes = True

    def __init__(
        self,
        raw: Sequence[Raw],
        eager: Callable[[Sequence[Tensor]], EagerExamples] | None,
        bins: int,
        *,
        kind: int,
        columns: int,
        ignored: int | None = None,
        mu: float | Tensor = 0.0,
    ) -> None:
        """
        Args:
            raw: for each tensor the prediction (float32, float16 or bfloat16), its labels (R,) or
                its targets, and the weights of its rows, (R,), or of its elements; all or none.
            eager: see :class:`FusedExamples`.
            bins: number of unit regions.
            kind: CLASS, SOFT or DELTA of triton.py.
            columns: elements of a row.
            ignored: the label that drops a row, or the target that drops an element.
            mu: width of the quadratic part, of deltas; a tensor is float32, on their device, and
                read there.
        """
        super().__init__([x.contiguous() for x, _, _ in raw], eager)
        self.others = (mu,) if isinstance(mu, Tensor) else ()
        self.targets = [_bytes(y) for _, y, _ in raw]
        weights = [self.data[0] if w is None else _bytes(w) for _, _, w in raw]
        self.weights, first = weights, raw[0][2]
        weighted = 0 if first is None else 1 if first.dim() == 1 and columns > 1 else 2
        self.device = self.data[0].device
        sizes = [x.numel() for x in self.data]
        tiles = [-(-size // TILE) for size in sizes]
        self.iterations = triton.next_power_of_2(max(-(-sum(tiles) // _PROGRAMS), 1))
        self.grid = (sum(-(-n // self.iterations) for n in tiles),)
        self.sizes = tuple(2 * size + 3 for size in sizes)  # see triton._size
        self.tiles = sum(tiles)
        self.bins = bins
        self._together = self.differentiate and self.data[0].dtype == torch.float32
        # Rows have labels or weights; without either, columns would only compile kernels anew.
        by_rows = kind == kernels.CLASS.value or weighted == 1
        self.settings = {
            "KIND": kind, "COLUMNS": columns if by_rows else 1, "IGNORED": ignored,
            "WEIGHTED": weighted, "MARKED": 0, "MU": None if self.others else mu,
            "BINS": bins, "FLOOR_IS_EXACT": region_finder(bins).floor_is_exact,
            "ITERATIONS": self.iterations, "TILE": TILE, "LEVELS": len(sizes),
        }  # fmt: skip
        self._gradients: list[Tensor] | None = None
        self.marks = self._mark()

    def _passes(self) -> list[dict[str, Any]]:
        """The constants of the launches that cover all tiles."""
        if self.settings["KIND"] != kernels.CLASS.value or self.settings["WEIGHTED"] == 2:
            return [self.settings]
        negative = {"KIND": kernels.NEGATIVE.value, "IGNORED": None, "WEIGHTED": 0, "COLUMNS": 1}
        return [self.settings | negative | {"MARKED": 1}, self.settings | {"MARKED": 2}]

    def counts(self, bins: int) -> Tensor:
        """See :class:`FusedExamples`."""
        levels = len(self.data)
        scratch = torch.zeros(levels * bins + 1, dtype=torch.int64, device=self.device)
        counts, self.bits = scratch[:-1].view(levels, bins), scratch[-1:]
        for settings in self._passes() if self.tiles else []:
            kernels.count_kernel[self.grid](
                *self._pointers(), self.marks, counts, self.bits, self.sizes,
                **settings, WIDTH=_width(bins), **launch_options("count", settings["KIND"], bins),
            )  # fmt: skip
        return counts

    def _mark(self) -> Tensor:
        """int8, for each tile whether it is anything but plain background."""
        if len(self._passes()) == 1 or not self.tiles:
            return self.targets[0]  # nobody reads it
        marks = torch.empty(self.tiles, dtype=torch.int8, device=self.device)
        columns = self.settings["COLUMNS"]
        kernels.flag_kernel[(self.tiles,)](
            tuple(self.targets), tuple(self.weights), marks, self.sizes,
            COLUMNS=columns, WEIGHTED=self.settings["WEIGHTED"], TILE=TILE,
            ROWS=triton.next_power_of_2(-(-TILE // columns) + 1), LEVELS=len(self.data),
            num_warps=1 if columns > 16 else 4,
        )  # fmt: skip
        return marks

    def _pointers(self) -> tuple[tuple[Tensor, ...] | Tensor, ...]:
        mu = self.others[0] if self.others else self.data[0]
        return tuple(self.data), tuple(self.targets), tuple(self.weights), mu

    def conclude_with(
        self,
        state: dict[str, Tensor],
        buffers: dict[str, Tensor] | None,
        failed: Tensor,
    ) -> None:
        """What :meth:`loss` does at its end.

        Args:
            state: the new running counts.
            buffers: where they are kept unless something was refused; None: nowhere.
            failed: int64 (1,): the bits of what was refused are added to it: 1 a label, 2 a weight,
                4 a loss that is not finite, 8 a dense target.
        """
        self.state, self.buffers, self.failed = state, buffers, failed

    def loss(self, weights: Tensor) -> Tensor:
        """See :class:`FusedExamples`; NaN where something was refused."""
        outs = [torch.empty_like(x) for x in self.data] if self._together else None
        partial = torch.empty(2 * self.grid[0], device=self.device)
        number = self._weigh(weights, self.bits, partial, outs)
        self._gradients = outs
        total = torch.empty((), device=self.device)
        state, buffers = self.state, self.buffers or self.state
        finish = kernels.finish_kernel[(1,)]
        finish(
            partial, number, self.bits, self.failed, total, state["acc_sum"], buffers["acc_sum"],
            state.get("num_updates", self.bits), buffers.get("num_updates", self.bits),
            WRITES=self.buffers is not None, CORRECTED="num_updates" in state, BINS=self.bins,
            WIDTH=_width(self.bins), BLOCK=1024, **launch_options("finish"),
        )  # fmt: skip
        return total

    def gradient(self, weights: Tensor, factor: Tensor) -> Sequence[Tensor]:
        """See :class:`FusedExamples`."""
        outs, self._gradients = self._gradients, None
        factor = factor.float()
        if outs is None:
            outs = [torch.empty_like(x) for x in self.data]
            self._weigh(weights, factor, None, outs)
        elif self.tiles:
            kernels.scale_kernel[self.grid](
                tuple(outs), factor, self.sizes,
                ITERATIONS=self.iterations, TILE=TILE, LEVELS=len(outs), **launch_options("scale"),
            )  # fmt: skip
        return outs

    def _weigh(
        self, weights: Tensor, factor: Tensor, partial: Tensor | None, outs: list[Tensor] | None
    ) -> int:
        """Sums of losses into `partial`, their number returned, and gradients into `outs`."""
        number = 0
        weights = weights if weights.stride(1) == 1 else weights.contiguous()
        for settings in self._passes() if self.tiles else []:
            kernels.loss_kernel[self.grid](
                *self._pointers(), tuple(self.data if outs is None else outs), self.marks, weights,
                factor, factor if partial is None else partial[number:], self.sizes,
                weights.stride(0), **settings, LOSS=partial is not None,
                GRADIENT=outs is not None, **launch_options("loss"),
            )  # fmt: skip
            number += self.grid[0]
        return number


def walk(
    counts: Tensor, acc_sum: Tensor, num_updates: Tensor | None, averaging: Averaging
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`~ghm_d2.losses.functional.walk` in one launch."""
    levels, bins = counts.shape
    weights = torch.empty(levels, bins, device=counts.device)
    state = {"acc_sum": torch.empty_like(acc_sum)}
    if num_updates is not None:
        state["num_updates"] = torch.empty_like(num_updates)
    momentum = averaging.momentum
    kernels.walk_kernel[(1,)](
        counts, acc_sum, acc_sum if num_updates is None else num_updates, weights,
        state["acc_sum"], state.get("num_updates", acc_sum), levels,
        KEPT=momentum, LOG_MOMENTUM=_log(momentum), ADDED=1 - momentum,
        CORRECTED=num_updates is not None, DECAY=averaging.decay_empty_bins,
        VALID=averaging.normalize_by == "valid_bins", BINS=bins, WIDTH=_width(bins),
        enable_fp_fusion=False, **launch_options("walk"),
    )  # fmt: skip
    return weights, state


def _log(momentum: float) -> float:
    """log(momentum); of 0 a number whose multiples have an exponential of 0."""
    return math.log(momentum) if momentum else -1e4
