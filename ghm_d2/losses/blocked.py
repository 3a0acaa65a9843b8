"""CPU kernels: harmonised losses in blocks that stay in the cache, on all cores.

A loss written with whole-tensor operations reads and writes memory the size of the logits a dozen
times. Here a block of at most :data:`BLOCK` examples goes through all operations while it is in the
cache. The blocks are dealt to one Python thread a core, each of which PyTorch runs on that core
alone; it releases the interpreter lock meanwhile.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import unit_region_edges

__all__ = ["BLOCK", "RegressionKernel", "SigmoidKernel"]

# Of 2^13 to 2^21, measured on two cores: smaller blocks spend their time in Python (8 us an
# operation), larger ones leave the cache and need more scratch memory (0.75 MiB a buffer here).
BLOCK = 3 << 16
# Fewer examples than this for each thread are not worth the hand-over to it.
_WORTHWHILE = 1 << 14
# Above this logit, 1 - sigmoid has lost the digits that the loss needs.
_LARGE = 4.0

T = TypeVar("T")


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of this process: a forked one has its parent's memory but not its threads."""
    started = Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)  # for this thread, and for all that start after it ...
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="ghm_d2", initializer=start)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(threads)  # ... until here
    return pool


class _Blocks:
    """``size`` examples cut into blocks of nearly equal length, dealt to the threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.threads = min(torch.get_num_threads(), max(size // _WORTHWHILE, 1))
        share = -(-size // self.threads)
        blocks = -(-share // BLOCK)  # of each thread
        self.length = -(-share // max(blocks, 1)) or 1

    def cut(self, positions: Tensor) -> list[Tensor]:
        """Ascending ``positions``, for each block those inside it, counted from its start."""
        if not positions.numel():
            return [positions] * -(-self.size // self.length)
        starts = torch.arange(0, self.size + self.length, self.length)
        cuts = torch.searchsorted(positions, starts).tolist()
        pairs = zip(cuts, cuts[1:], strict=False)
        return [positions[a:b] - i * self.length for i, (a, b) in enumerate(pairs)]

    def map(self, work: Callable[[Iterator[tuple[int, slice]]], T]) -> list[T]:
        """Calls ``work`` once a thread, with the (number, span) of that thread's blocks."""
        number = -(-self.size // self.length)
        share = -(-number // self.threads)
        shares = [range(i, min(i + share, number)) for i in range(0, number, share)]

        def call(numbers: range) -> T:
            with torch.no_grad():  # a setting of each thread
                return work((i, self._span(i)) for i in numbers)

        if len(shares) <= 1:
            return [call(numbers) for numbers in shares]
        return list(_pool(os.getpid(), torch.get_num_threads()).map(call, shares))

    def _span(self, number: int) -> slice:
        return slice(number * self.length, min((number + 1) * self.length, self.size))

    def buffers(self, number: int) -> Callable[[int], list[Tensor]]:
        """Scratch memory of one thread: a function from a block's size to ``number`` tensors."""
        whole = torch.empty(number, min(self.length, self.size))
        return lambda size: [row[:size] for row in whole]


class _Regions:
    """The unit region of each gradient norm, exactly as ``unit_region_index`` finds it."""

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.edges = unit_region_edges(bins)
        below = torch.nextafter(self.edges[1:], torch.tensor(0.0))
        ends = torch.cat([self.edges, below])
        self.floor_is_exact = torch.equal((ends * bins).int(), self._search(ends).int())

    def _search(self, norm: Tensor) -> Tensor:
        return torch.bucketize(norm, self.edges[1:], right=True)

    def write(self, norm: Tensor, scratch: Tensor, spare: Tensor, region: Tensor) -> Tensor:
        """Fills int32 ``region`` with [0, bins]: ``bins`` for a norm of 1, any number for NaN."""
        torch.mul(norm, self.bins, out=scratch)
        region.copy_(scratch)
        if not self.floor_is_exact:
            # Only a product beside a whole number can be rounded across an edge.
            torch.round(scratch, out=spare).sub_(scratch).abs_()
            close = 2e-7 * self.bins
            if spare.min() < close:
                doubtful = (spare < close).nonzero().flatten()
                region[doubtful] = self._search(norm[doubtful]).int()
        return region

    def count(self, region: Tensor) -> Tensor:
        """int64 (bins + 1,). A NaN is refused later, by the loss; here it must only not crash."""
        try:
            return torch.bincount(region, minlength=self.bins + 1)
        except RuntimeError:  # a negative number
            return torch.bincount(region.clamp_(0, self.bins), minlength=self.bins + 1)

    def total(self, counts: list[Tensor], dropped: Tensor) -> Tensor:
        """Adds up counts of [0, bins]; what was dropped has been counted with a norm of 0."""
        total = torch.stack(counts).sum(0)
        total[self.bins - 1] += total[self.bins]  # the last region is closed
        total[0] -= dropped.numel()
        return total[: self.bins]


@cache
def _regions(bins: int) -> _Regions:
    return _Regions(bins)


def _table(weights: Tensor) -> Tensor:
    """The weight of each of [0, bins]."""
    return torch.cat([weights, weights[-1:]]).float()


class SigmoidKernel:
    """Binary cross entropy of logits.

    With z = x for a negative and -x for a positive, all examples are alike: the norm is
    sigmoid(z), the loss softplus(z), and the slope by z is the norm again. So the gradient's
    memory holds the norms between counting and weighting.
    """

    def __init__(
        self, logits: Tensor, positive: Tensor, dropped: Tensor, differentiate: bool
    ) -> None:
        """
        Args:
            logits: (n,) contiguous; float32, float16 or bfloat16.
            positive: ascending int64 positions of the logits whose target is 1.
            dropped: ascending int64 positions that do not count.
            differentiate: whether the gradient will be wanted.
        """
        self.logits = logits
        self.differentiate = differentiate
        self._blocks = _Blocks(logits.numel())
        self._positive = self._blocks.cut(positive)
        self._dropped = self._blocks.cut(dropped)
        self._all_dropped = dropped
        self._norms: Tensor | None = None

    def _write_norm(self, number: int, span: slice, norm: Tensor) -> Tensor:
        x, positive, dropped = self.logits[span], self._positive[number], self._dropped[number]
        if x.dtype == torch.float32:
            torch.sigmoid(x, out=norm)
        else:
            norm.copy_(x).sigmoid_()
        if positive.numel():
            norm[positive] = 1 - norm[positive]
        if dropped.numel():
            norm[dropped] = 0
        return norm

    def counts(self, bins: int) -> Tensor:
        """int64 (bins,): the number of examples in each unit region."""
        regions = _regions(bins)
        keep = self.differentiate and self.logits.dtype == torch.float32
        norms = torch.empty_like(self.logits) if keep else None

        def work(blocks: Iterator[tuple[int, slice]]) -> Tensor:
            buffers = self._blocks.buffers(3 if keep else 4)
            total = torch.zeros(bins + 1, dtype=torch.int64)
            for number, span in blocks:
                scratch, spare, region, *rest = buffers(span.stop - span.start)
                norm = self._write_norm(number, span, norms[span] if keep else rest[0])
                region = regions.write(norm, scratch, spare, region.view(torch.int32))
                total += regions.count(region)
            return total

        counts = self._blocks.map(work)
        self._norms = norms
        return regions.total(counts, self._all_dropped)

    def loss_and_gradient(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """The float32 weighted sum of losses, and its gradient (n,) if it was wanted."""
        regions, table = _regions(weights.numel()), _table(weights)
        norms, self._norms = self._norms, None
        gradient = norms
        if gradient is None and self.differentiate:
            gradient = torch.empty_like(self.logits)

        def work(blocks: Iterator[tuple[int, slice]]) -> float:
            keep = norms is not None
            buffers = self._blocks.buffers(3 if keep else 4)
            total = 0.0
            for number, span in blocks:
                weight, loss, region, *rest = buffers(span.stop - span.start)
                norm = norms[span] if keep else self._write_norm(number, span, rest[0])
                region = regions.write(norm, weight, loss, region.view(torch.int32))
                try:
                    torch.index_select(table, 0, region, out=weight)
                except IndexError:  # of a NaN
                    return torch.nan
                # Not torch.dot, which adds up one by one and loses a digit on blocks of this size.
                total -= self._negative_loss(number, span, norm, loss).mul_(weight).sum().item()
                if gradient is not None:
                    self._write_gradient(number, norm, weight, gradient[span])
            return total

        return torch.tensor(sum(self._blocks.map(work)), dtype=torch.float32), gradient

    def _negative_loss(self, number: int, span: slice, norm: Tensor, loss: Tensor) -> Tensor:
        # -softplus(z) = log(1 - sigmoid(z)), but for a large z.
        x, positive, dropped = self.logits[span], self._positive[number], self._dropped[number]
        torch.neg(norm, out=loss).log1p_()
        large = x > _LARGE
        if large.any():
            loss[large] = -F.softplus(x[large].float())
        if positive.numel():
            loss[positive] = -F.softplus(-x[positive].float())
        if dropped.numel():
            loss[dropped] = 0
        return loss

    def _write_gradient(self, number: int, norm: Tensor, weight: Tensor, out: Tensor) -> None:
        if out.dtype == torch.float32:
            torch.mul(norm, weight, out=out)
        else:
            out.copy_(norm * weight)
        if (positive := self._positive[number]).numel():
            out[positive] = -out[positive]


class RegressionKernel:
    """Authentic smooth L1 of the differences between predictions and targets.

    There are few of them, so loss, slope and region of each are kept from counting to weighting.
    """

    def __init__(
        self, pred: Tensor, target: Tensor, dropped: Tensor, mu: float, differentiate: bool
    ) -> None:
        """
        Args:
            pred: (n,) contiguous deltas; float32, float16 or bfloat16.
            target: (n,) contiguous deltas.
            dropped: int64 positions that do not count.
            mu: width of the quadratic part.
            differentiate: whether the gradient will be wanted.
        """
        self.pred, self.target, self.mu = pred, target, mu
        self.differentiate = differentiate
        self.dropped = dropped
        self._blocks = _Blocks(pred.numel())
        self._dropped = self._blocks.cut(dropped)

    def counts(self, bins: int) -> Tensor:
        """int64 (bins,): the number of examples in each unit region."""
        regions = _regions(bins)
        self._slope, self._loss = torch.empty(2, self.pred.numel())
        self._region = torch.empty(self.pred.numel(), dtype=torch.int32)

        def work(blocks: Iterator[tuple[int, slice]]) -> Tensor:
            buffers = self._blocks.buffers(3)
            total = torch.zeros(bins + 1, dtype=torch.int64)
            for number, span in blocks:
                norm, scratch, spare = buffers(span.stop - span.start)
                self._write(number, span, norm, scratch)
                torch.abs(self._slope[span], out=norm)
                region = regions.write(norm, scratch, spare, self._region[span])
                total += regions.count(region)
            return total

        return regions.total(self._blocks.map(work), self.dropped)

    def _write(self, number: int, span: slice, root: Tensor, square: Tensor) -> None:
        slope, loss = self._slope[span], self._loss[span]
        slope.copy_(self.pred[span]).sub_(self.target[span])
        if (dropped := self._dropped[number]).numel():
            slope[dropped] = 0
        torch.mul(slope, slope, out=square)
        torch.add(square, self.mu * self.mu, out=root).sqrt_()
        slope.div_(root)
        # d^2 / (root + mu), as in functional.regression_examples.
        torch.div(square, root.add_(self.mu), out=loss)

    def loss_and_gradient(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """The float32 weighted sum of losses, and its gradient (n,) if it was wanted.

        :meth:`counts` comes first.
        """
        weight = torch.index_select(_table(weights), 0, self._region.clamp_(min=0))  # of a NaN
        loss = (self._loss * weight).sum()
        return loss, weight.mul_(self._slope).to(self.pred.dtype) if self.differentiate else None
