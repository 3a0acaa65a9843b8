"""CUDA kernels in Triton: a histogram pass, one for the loss, and in the backward pass one more.

The predictions are read three times and the gradient is written once. Each program walks over many
tiles and keeps its histogram in registers, so the atomic additions to global memory are
``programs x regions``, however many examples there are.

``TRITON_INTERPRET=1`` runs the same kernels on the CPU; the tests do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .examples import Arguments, EagerExamples, FusedExamples

__all__ = ["MAX_BINS", "TritonRegression", "TritonSigmoid"]

MAX_BINS = 2047  # one histogram of a power of two, with a place for what does not count
_TILE = 4096
_PROGRAMS = 1024  # a few for each of a Hopper chip's 132 multiprocessors


@triton.jit
def _log1p(e):
    # log(1 + e) keeps nothing of an e below 1e-7; the series is exact to float32 below 0.01.
    series = e * (1.0 - e * (0.5 - e * (0.33333333 - e * 0.25)))
    return tl.where(e < 0.01, series, tl.log(1.0 + e))


@triton.jit
def _examples(
    x_ptr, y_ptr, keep_ptr, offsets, size, columns, keep_columns, mu,
    SIGMOID: tl.constexpr, HAS_KEEP: tl.constexpr,
):  # fmt: skip
    """(loss, gradient norm, slope, whether it counts) of one tile."""
    inside = offsets < size
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    counts = inside
    if HAS_KEEP:
        keep = tl.load(keep_ptr + offsets // keep_columns, mask=inside, other=0)
        counts = counts & (keep != 0)
    if SIGMOID:
        row = offsets // columns
        label = tl.load(y_ptr + row, mask=inside, other=-1)
        counts = counts & (label >= 0)
        sign = tl.where(label == offsets - row * columns, -1.0, 1.0)
        z = tl.where(counts, x * sign, 0.0)
        e = tl.exp(-tl.abs(z))
        norm = tl.where(z >= 0, 1.0 / (1.0 + e), e / (1.0 + e))
        loss = tl.maximum(z, 0.0) + _log1p(e)
        slope = norm * sign
    else:
        y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(counts, x - y, 0.0)
        root = tl.sqrt(d * d + mu * mu)
        slope = d / root
        norm = tl.abs(slope)
        loss = d * d / (root + mu)
    return loss, norm, slope, counts


@triton.jit
def _count_kernel(
    x_ptr, y_ptr, keep_ptr, counts_ptr, bins, size, columns, keep_columns, mu,
    SIGMOID: tl.constexpr, HAS_KEEP: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([WIDTH], dtype=tl.int32)
    step = tl.num_programs(0).to(tl.int64) * TILE
    start = tl.program_id(0).to(tl.int64) * TILE
    while start < size:
        offsets = start + tl.arange(0, TILE)
        _, norm, _, counts = _examples(
            x_ptr, y_ptr, keep_ptr, offsets, size, columns, keep_columns, mu, SIGMOID, HAS_KEEP
        )
        region = tl.minimum((norm * bins).to(tl.int32), bins - 1)
        # NaN converts to anything; what does not count goes to a place of its own.
        region = tl.where(counts & (norm == norm), region, WIDTH - 1)
        total += tl.histogram(region, WIDTH)
        start += step
    place = tl.arange(0, WIDTH)
    tl.atomic_add(counts_ptr + place, total.to(tl.int64), mask=place < bins)


@triton.jit
def _loss_kernel(
    x_ptr, y_ptr, keep_ptr, weights_ptr, out_ptr, size, columns, keep_columns, mu, bins,
    SIGMOID: tl.constexpr, HAS_KEEP: tl.constexpr, GRADIENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of each example, or the sum of each program's losses."""
    total = tl.zeros([TILE], dtype=tl.float32)
    step = tl.num_programs(0).to(tl.int64) * TILE
    start = tl.program_id(0).to(tl.int64) * TILE
    while start < size:
        offsets = start + tl.arange(0, TILE)
        loss, norm, slope, counts = _examples(
            x_ptr, y_ptr, keep_ptr, offsets, size, columns, keep_columns, mu, SIGMOID, HAS_KEEP
        )
        region = tl.minimum((norm * bins).to(tl.int32), bins - 1)
        region = tl.where(norm == norm, region, 0)
        weight = tl.load(weights_ptr + region, mask=counts, other=0.0)
        if GRADIENT:
            gradient = tl.where(counts, weight * slope, 0.0)
            gradient = gradient.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + offsets, gradient, mask=offsets < size)
        else:
            total += tl.where(counts, weight * loss, 0.0)
        start += step
    if not GRADIENT:
        tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


class _TritonExamples(FusedExamples):
    """The gradient is computed in the backward pass, from the predictions once more.

    A device cannot be asked for the incoming factor; to multiply a gradient by it later would read
    and write more memory than this.
    """

    sigmoid = False

    def __init__(
        self,
        arguments: Sequence[Arguments],
        eager: Callable[[Sequence[Tensor]], EagerExamples],
        mu: float = 0.0,
    ) -> None:
        """
        Args:
            arguments: for each tensor the contiguous prediction (float32, float16 or bfloat16);
                its integer labels (R,), or its contiguous targets; and a bool mask of the examples
                or of their rows, False drops an example, None keeps all.
            eager: see :class:`FusedExamples`.
            mu: width of the quadratic part, of deltas.
        """
        super().__init__([x for x, _, _ in arguments], eager)
        self.others, self.mu = [y for _, y, _ in arguments], mu
        # Bool masks of the examples, or of their rows.
        masks = [keep for _, _, keep in arguments]
        self.keeps = [None if m is None else m.contiguous().view(torch.uint8) for m in masks]

    def _launch(self, kernel: Any, number: int, *more: Any, **constants: Any) -> None:
        x, y, keep = self.data[number], self.others[number], self.keeps[number]
        columns, size = self.predictions[number].shape[-1] if self.sigmoid else 1, x.numel()
        keep_columns = 1 if keep is None else max(size // max(keep.numel(), 1), 1)
        kernel[_grid(size)](
            x, y, y if keep is None else keep, *more[:2], size, columns, keep_columns, self.mu,
            *more[2:], SIGMOID=self.sigmoid, HAS_KEEP=keep is not None, TILE=_TILE, **constants,
        )  # fmt: skip

    def counts(self, bins: int) -> Tensor:
        """See :class:`FusedExamples`."""
        shape = len(self.data), bins
        counts = torch.zeros(shape, dtype=torch.int64, device=self.data[0].device)
        width = max(16, triton.next_power_of_2(bins + 1))
        for number, row in enumerate(counts.unbind()):
            self._launch(_count_kernel, number, row, bins, WIDTH=width)
        return counts

    def loss(self, weights: Tensor) -> Tensor:
        """See :class:`FusedExamples`."""
        partials = [torch.empty(_grid(x.numel()), device=x.device) for x in self.data]
        self._weight(weights, partials, gradient=False)
        return torch.cat(partials).sum()

    def gradient(self, weights: Tensor, factor: Tensor) -> Sequence[Tensor]:
        """See :class:`FusedExamples`."""
        gradients = [torch.empty_like(x) for x in self.data]
        self._weight(weights * factor, gradients, gradient=True)
        return gradients

    def _weight(self, weights: Tensor, outs: Sequence[Tensor], gradient: bool) -> None:
        rows = weights.float().contiguous().unbind()
        for number, (row, out) in enumerate(zip(rows, outs, strict=True)):
            self._launch(_loss_kernel, number, row, out, row.numel(), GRADIENT=gradient)


def _grid(size: int) -> tuple[int]:
    return (max(1, min(_PROGRAMS, triton.cdiv(size, _TILE))),)


class TritonSigmoid(_TritonExamples):
    """Binary cross entropy of (R, K) logits with integer labels; see functional."""

    sigmoid = True


class TritonRegression(_TritonExamples):
    """Authentic smooth L1; see functional.regression_examples."""
