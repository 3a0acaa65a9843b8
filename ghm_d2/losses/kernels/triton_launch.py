"""Calls the kernels of triton.py, for all tensors of a loss at once and without a wait.

A forward pass issues: zeros for the counts, the marks of the tiles (integer labels alone), one or
two launches that count, the walk, one or two that weight, and one that adds up, checks and writes.
A backward pass is one launch. Tensors that differ in kind or type take further launches.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..functional import Averaging
from . import triton as kernels
from .cpu_regions import region_finder
from .examples import EagerExamples, FusedExamples
from .triton_examples import CLASS, DELTA, NEGATIVE, SOFT

TILE = 2048
_PROGRAMS = 2048  # some sixteen for each of a Hopper chip's 132 multiprocessors
_MOST = 8  # tensors of one launch: each is one more comparison at the start of a program

Raw = tuple[Tensor, Tensor, Tensor | None]


def launch_options(kernel: str, kind: int | None = None, bins: int = 1) -> dict[str, int]:
    """Options of a launch: what benchmarks/kernel_code.py found to need the fewest instructions.

    Args:
        kernel: "count", "loss", "flag", "walk", "finish" or "scale".
        kind: what the first two read, such as NEGATIVE of triton_examples.py.
        bins: number of unit regions.
    """
    if kernel == "count" and kind == NEGATIVE.value and _width(bins) <= 32:
        # The 32 examples of a thread share the votes of a histogram. Without the limit, the
        # compiler would take more registers, none of which is needed.
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
        ignored: int | None = None,
        mu: float | Tensor | None = None,
    ) -> None:
        """
        Args:
            raw: for each tensor the prediction (float32, float16 or bfloat16), its labels (R,) or
                its targets, and the weights of its rows, (R,), or of its elements, or None.
            eager: see :class:`FusedExamples`.
            bins: number of unit regions.
            ignored: the value of a dense target that drops its element, or of a label that drops
                its row (None: -1).
            mu: width of the quadratic part for deltas; a tensor is 0-d float32, on their device,
                and read there. None: the predictions are logits.
        """
        super().__init__([x.contiguous() for x, _, _ in raw], eager)
        self.bins = bins
        self.device = self.data[0].device
        self.others = (mu,) if isinstance(mu, Tensor) else ()
        rows = [(x, y, w) for x, (_, y, w) in zip(self.predictions, raw, strict=True)]
        self.parts = list(_parts(rows, bins, ignored, mu, self.differentiate))

    def counts(self, bins: int) -> Tensor:
        """See :class:`FusedExamples`."""
        levels = len(self.data)
        scratch = torch.zeros(levels * bins + 1, dtype=torch.int64, device=self.device)
        counts, self.bits = scratch[:-1].view(levels, bins), scratch[-1:]
        for part in self.parts:
            part.count(counts, self.bits)
        return counts

    def conclude_with(
        self,
        state: dict[str, Tensor],
        buffers: dict[str, Tensor] | None,
        failed: Tensor,
    ) -> None:
        """Sets what :meth:`loss` does at its end.

        Args:
            state: the new running counts.
            buffers: where they are kept unless something was refused; None: nowhere.
            failed: int64 (1,): the bits of what was refused are added to it: 1 a label, 2 a weight,
                4 a loss that is not finite, 8 a dense target.
        """
        self.state, self.buffers, self.failed = state, buffers, failed

    def loss(self, weights: Tensor) -> Tensor:
        """See :class:`FusedExamples`; NaN where something was refused."""
        number = sum(part.programs for part in self.parts)
        partial = torch.empty(max(number, 1), device=self.device)
        for part, own in zip(
            self.parts, partial.split([p.programs for p in self.parts]), strict=True
        ):
            part.weigh(weights, own)
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
        factor = factor.float()
        return [x for part in self.parts for x in part.gradient(weights, factor)]


def _parts(
    raw: Sequence[Raw],
    bins: int,
    ignored: int | None,
    mu: float | Tensor | None,
    differentiate: bool,
) -> Iterator["_Part"]:
    """Tensors that follow each other and are alike, up to as many as a launch takes."""
    start = 0
    for settings, group in groupby(raw, lambda each: _settings(each, ignored, mu)):
        alike = list(group)
        for first in range(0, len(alike), _MOST):
            own = alike[first : first + _MOST]
            yield _Part(slice(start, start + len(own)), own, settings, bins, mu, differentiate)
            start += len(own)


class _Settings(NamedTuple):
    """What the tensors of a launch have in common."""

    kind: int
    columns: int  # of a row
    ignored: int | None
    weighted: int  # 1: a weight for each row, 2: for each element
    dtypes: tuple[torch.dtype | None, ...]


def _settings(raw: Raw, ignored: int | None, mu: float | Tensor | None) -> _Settings:
    x, y, weight = raw
    dtypes = x.dtype, y.dtype, None if weight is None else weight.dtype
    kind = (SOFT if y.dim() == 2 else CLASS) if mu is None else DELTA
    if kind is CLASS and ignored is None:
        ignored = -1
    # not taken from a first row: a level without positives has none
    columns = math.prod(x.shape[1:])
    weighted = 0 if weight is None else 1 if weight.dim() == 1 and columns > 1 else 2
    # Rows have labels or weights; without either, columns would only compile kernels anew.
    by_rows = kind is CLASS or weighted == 1
    return _Settings(kind.value, columns if by_rows else 1, ignored, weighted, dtypes)


class _Part:
    """Tensors similar enough for one launch to take them all.

    Attributes:
        rows: their indices among the tensors of the call.
        programs: how many partial sums of the loss they need.
        passes: the constants of the launches that count and that weight: one, or one for the tiles
            of plain background and one for the others.
    """

    def __init__(
        self,
        rows: slice,
        raw: Sequence[Raw],
        settings: _Settings,
        bins: int,
        mu: float | Tensor | None,
        differentiate: bool,
    ) -> None:
        self.rows = rows
        self.data = tuple(x.detach().view(-1) for x, _, _ in raw)
        self.targets = tuple(_bytes(y) for _, y, _ in raw)
        self.weights = tuple(self.data[0] if w is None else _bytes(w) for _, _, w in raw)
        # A kernel argument that is never read still needs a pointer.
        self.mu, width = (mu, None) if isinstance(mu, Tensor) else (self.data[0], mu or 0.0)
        sizes = [x.numel() for x in self.data]
        tiles = [-(-size // TILE) for size in sizes]
        self.tiles = sum(tiles)
        iterations = triton.next_power_of_2(max(-(-self.tiles // _PROGRAMS), 1))
        self.grid = (sum(-(-n // iterations) for n in tiles),)
        self.sizes = tuple(2 * size + 3 for size in sizes)  # see triton._size
        self.together = differentiate and self.data[0].dtype == torch.float32
        self.cut = {"ITERATIONS": iterations, "TILE": TILE, "LEVELS": len(sizes)}
        self.constants = self.cut | {
            "KIND": settings.kind, "COLUMNS": settings.columns, "IGNORED": settings.ignored,
            "WEIGHTED": settings.weighted, "TILES": kernels.ALL.value,
            "MU": width, "BINS": bins,
            "FLOOR_IS_EXACT": region_finder(bins).floor_is_exact,
        }  # fmt: skip
        self.outs: list[Tensor] | None = None
        # Marks pay only where most tiles are plain: not if weights may drop single logits.
        self.marked = settings.kind == CLASS.value and settings.weighted != 2
        self.passes = [self.constants]
        if self.marked:
            negative = {"KIND": NEGATIVE.value, "IGNORED": None, "WEIGHTED": 0, "COLUMNS": 1}
            plain = self.constants | negative | {"TILES": kernels.PLAIN.value}
            self.passes = [plain, self.constants | {"TILES": kernels.OTHER.value}]
        self.programs = len(self.passes) * self.grid[0]
        self.marks = self._mark() if self.marked and self.tiles else self.targets[0]

    def _mark(self) -> Tensor:
        """int8, for each tile whether it is anything but plain background."""
        marks = torch.empty(self.tiles, dtype=torch.int8, device=self.data[0].device)
        columns = self.constants["COLUMNS"]
        kernels.flag_kernel[(self.tiles,)](
            self.targets, self.weights, marks, self.sizes,
            COLUMNS=columns, WEIGHTED=self.constants["WEIGHTED"], TILE=TILE,
            ROWS=triton.next_power_of_2(-(-TILE // columns) + 1), LEVELS=len(self.data),
            num_warps=1 if columns > 16 else 4,
        )  # fmt: skip
        return marks

    def _pointers(self) -> tuple[tuple[Tensor, ...] | Tensor, ...]:
        return self.data, self.targets, self.weights, self.mu

    def count(self, counts: Tensor, bits: Tensor) -> None:
        """Adds to the rows of `counts`, int64 (T, bins), and to the bits of what is refused."""
        for constants in self.passes if self.tiles else []:
            kernels.count_kernel[self.grid](
                *self._pointers(), self.marks, counts[self.rows], bits, self.sizes,
                **constants, WIDTH=_width(constants["BINS"]),
                **launch_options("count", constants["KIND"], constants["BINS"]),
            )  # fmt: skip

    def weigh(self, weights: Tensor, partial: Tensor) -> None:
        """Writes sums of losses into `partial`, (programs,), and keeps a float32 gradient."""
        self.outs = [torch.empty_like(x) for x in self.data] if self.together else None
        for number, constants in enumerate(self.passes if self.tiles else []):
            own = partial[number * self.grid[0] :]
            self._weigh(constants, weights, own, own, self.outs, LOSS=True)

    def gradient(self, weights: Tensor, factor: Tensor) -> list[Tensor]:
        """`factor`, float32, times the gradient."""
        outs, self.outs = self.outs, None
        if outs is None:
            outs = [torch.empty_like(x) for x in self.data]
            tiles = {"TILES": kernels.EITHER.value} if self.marked else {}
            if self.tiles:
                self._weigh(self.constants | tiles, weights, factor, factor, outs, LOSS=False)
        elif self.tiles:
            kernels.scale_kernel[self.grid](
                tuple(outs), factor, self.sizes, **self.cut, **launch_options("scale")
            )
        return outs

    def _weigh(
        self,
        constants: dict[str, Any],
        weights: Tensor,
        factor: Tensor,
        partial: Tensor,
        outs: list[Tensor] | None,
        **what: bool,
    ) -> None:
        weights = weights if weights.stride(1) == 1 else weights.contiguous()
        kernels.loss_kernel[self.grid](
            *self._pointers(), tuple(outs or self.data), self.marks, weights[self.rows], factor,
            partial, self.sizes, weights.stride(0), **constants, **what,
            GRADIENT=outs is not None, **launch_options("loss"),
        )  # fmt: skip


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
    """log(momentum); for 0, a number so low that exp of its multiples is 0."""
    return math.log(momentum) if momentum else -1e4
