"""CPU kernels: harmonised losses in blocks that stay in the cache, on all cores.

A loss written with whole-tensor operations reads and writes memory the size of the logits a dozen
times. Here a block of :data:`BLOCK` examples goes through all operations while it is in the cache,
so memory sees what the mathematics needs: the predictions read twice (to count, to weight) and the
gradient written once. PyTorch runs operations on so few elements on the calling thread, so the
blocks are dealt to one Python thread a core; PyTorch releases the interpreter lock meanwhile.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from .functional import unit_region_edges

__all__ = ["BLOCK", "RegressionKernel", "SigmoidKernel"]

# The largest size that PyTorch does not split over threads itself; four float32 buffers of it
# (512 KiB) fit the second-level cache.
BLOCK = 1 << 15

T = TypeVar("T")
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def map_spans(work: Callable[[int, int], T], size: int) -> list[T]:
    """Calls ``work(start, stop)`` on spans of whole blocks that cover ``size``, one a thread."""
    threads = torch.get_num_threads()
    blocks = -(-size // BLOCK)
    step = -(-blocks // threads) * BLOCK or 1
    spans = [(start, min(start + step, size)) for start in range(0, size, step)]
    if len(spans) <= 1:
        return [work(*span) for span in spans]
    # A forked process (a data loader's worker) has the parent's pool but not its threads.
    key = (os.getpid(), threads)
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix="ghm_d2")
    return list(_pools[key].map(lambda span: work(*span), spans))


class _Buffers:
    """Scratch memory of one thread."""

    def __init__(self, size: int) -> None:
        size = min(size, BLOCK)
        self.floats = [torch.empty(size) for _ in range(4)]
        self.region = torch.empty(size, dtype=torch.int32)

    def views(self, size: int) -> list[Tensor]:
        return [x[:size] for x in self.floats] + [self.region[:size]]


class _Regions:
    """The unit region of each gradient norm, exactly as :func:`unit_region_index` finds it."""

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.edges = unit_region_edges(bins)
        below = torch.nextafter(self.edges[1:], torch.tensor(0.0))
        ends = torch.cat([self.edges, below])
        self.floor_is_exact = torch.equal((ends * bins).int(), self._search(ends).int())

    def _search(self, norm: Tensor) -> Tensor:
        return torch.bucketize(norm, self.edges[1:], right=True)

    def write(self, norm: Tensor, scratch: Tensor, spare: Tensor, region: Tensor) -> None:
        """Writes int32 in [0, bins] to ``region``: ``bins`` for a norm of 1, anything for NaN."""
        torch.mul(norm, self.bins, out=scratch)
        region.copy_(scratch).clamp_(0, self.bins)
        if self.floor_is_exact:
            return
        # Only a product beside a whole number can be rounded across an edge.
        torch.round(scratch, out=spare).sub_(scratch).abs_()
        close = 2e-7 * self.bins
        if spare.min() < close:
            doubtful = (spare < close).nonzero().flatten()
            region[doubtful] = self._search(norm[doubtful]).int()


@cache
def _regions(bins: int) -> _Regions:
    return _Regions(bins)


def _closed(counts: Tensor, bins: int) -> Tensor:
    """Moves what has a gradient norm of 1 to the last region, which is closed."""
    counts[bins - 1] += counts[bins]
    return counts[:bins]


def _padded(weights: Tensor) -> Tensor:
    return torch.cat([weights, weights[-1:]]).float()


class _Kernel:
    """One histogram pass and one loss-and-gradient pass over a flat tensor of predictions.

    Subclasses say what a prediction's gradient norm, loss and slope are.
    """

    def __init__(self, prediction: Tensor, dropped: Tensor) -> None:
        """
        Args:
            prediction: (n,) contiguous, float32, float16 or bfloat16.
            dropped: ascending int64 positions of examples that do not count.
        """
        self.prediction = prediction
        self.size = prediction.numel()
        self.dropped = dropped
        self._dropped = self._in_blocks(dropped)

    def _in_blocks(self, positions: Tensor) -> list[Tensor]:
        """Ascending ``positions`` cut at the blocks, relative to each block's start."""
        starts = torch.arange(0, self.size + BLOCK, BLOCK)
        cuts = torch.searchsorted(positions, starts).tolist()
        return [
            positions[a:b] - i * BLOCK for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))
        ]

    def counts(self, bins: int) -> Tensor:
        """int64 (bins,): the number of examples in each unit region."""
        regions = _regions(bins)

        def work(start: int, stop: int) -> Tensor:
            buffers = _Buffers(stop - start)
            total = torch.zeros(bins + 1, dtype=torch.int64)
            for begin in range(start, stop, BLOCK):
                x, norm, scratch, spare, region = buffers.views(min(BLOCK, stop - begin))
                self._norm(begin, x, norm)
                regions.write(norm, scratch, spare, region)
                total += torch.bincount(region, minlength=bins + 1)
            return total

        counts = _closed(torch.stack(map_spans(work, self.size)).sum(0), bins)
        counts[0] -= self.dropped.numel()  # they were counted with a gradient norm of 0
        return counts

    def loss_and_gradient(self, weights: Tensor, gradient: Tensor | None) -> Tensor:
        """The weighted sum of losses; writes its gradient to ``gradient`` unless that is None.

        Args:
            weights: float32 (bins,) of the unit regions.
            gradient: (n,) of the prediction's dtype.
        """
        regions, table = _regions(weights.numel()), _padded(weights)

        def work(start: int, stop: int) -> float:
            buffers = _Buffers(stop - start)
            total = 0.0
            for begin in range(start, stop, BLOCK):
                size = min(BLOCK, stop - begin)
                x, norm, weight, loss, region = buffers.views(size)
                self._norm(begin, x, norm)
                regions.write(norm, weight, loss, region)
                torch.index_select(table, 0, region, out=weight)
                if gradient is not None:
                    self._write_slope(begin, x, norm, weight, gradient[begin : begin + size])
                self._loss(x, norm, out=loss)
                total += torch.dot(loss, weight).item()
            return total

        return torch.tensor(sum(map_spans(work, self.size)), dtype=torch.float32)

    def _norm(self, start: int, x: Tensor, norm: Tensor) -> None:
        raise NotImplementedError

    def _write_slope(
        self, start: int, x: Tensor, norm: Tensor, weight: Tensor, out: Tensor
    ) -> None:
        raise NotImplementedError

    def _loss(self, x: Tensor, norm: Tensor, out: Tensor) -> None:
        raise NotImplementedError


class SigmoidKernel(_Kernel):
    """Binary cross entropy of logits.

    With z = x for a negative and -x for a positive, all examples are alike: the norm is
    sigmoid(z), the loss softplus(z), and the slope by z is the norm again.
    """

    def __init__(self, logits: Tensor, positive: Tensor, dropped: Tensor) -> None:
        """
        Args:
            logits: (n,).
            positive: ascending int64 positions of the logits whose target is 1.
            dropped: ascending int64 positions that do not count.
        """
        super().__init__(logits, dropped)
        self._positive = self._in_blocks(positive)

    def _norm(self, start: int, x: Tensor, norm: Tensor) -> None:
        block = start // BLOCK
        x.copy_(self.prediction[start : start + x.numel()])
        if (positive := self._positive[block]).numel():
            x[positive] = -x[positive]
        if (dropped := self._dropped[block]).numel():
            x[dropped] = -torch.inf  # norm, loss and slope are then exactly 0
        torch.sigmoid(x, out=norm)

    def _write_slope(
        self, start: int, x: Tensor, norm: Tensor, weight: Tensor, out: Tensor
    ) -> None:
        if out.dtype == torch.float32:
            torch.mul(norm, weight, out=out)
        else:
            out.copy_(norm * weight)
        if (positive := self._positive[start // BLOCK]).numel():
            out[positive] = -out[positive]

    def _loss(self, x: Tensor, norm: Tensor, out: Tensor) -> None:
        # softplus(z) = max(z, 0) - log(1 - min(p, 1 - p)), p = sigmoid(z): exact at both ends, and
        # the exponential is not computed twice.
        torch.sub(1, norm, out=out)
        torch.minimum(out, norm, out=out).neg_().log1p_()
        torch.sub(x.relu_(), out, out=out)


class RegressionKernel(_Kernel):
    """Authentic smooth L1 of the differences between predictions and targets."""

    def __init__(self, pred: Tensor, target: Tensor, dropped: Tensor, mu: float) -> None:
        """
        Args:
            pred: (n,) deltas.
            target: (n,) deltas.
            dropped: ascending int64 positions that do not count.
            mu: width of the quadratic part.
        """
        super().__init__(pred, dropped)
        self.target = target
        self.mu = mu

    def _norm(self, start: int, x: Tensor, norm: Tensor) -> None:
        span = slice(start, start + x.numel())
        x.copy_(self.prediction[span])
        x.sub_(self.target[span])
        if (dropped := self._dropped[start // BLOCK]).numel():
            x[dropped] = 0
        torch.mul(x, x, out=norm).add_(self.mu * self.mu).sqrt_()
        torch.div(x, norm, out=norm).abs_()

    def _write_slope(
        self, start: int, x: Tensor, norm: Tensor, weight: Tensor, out: Tensor
    ) -> None:
        # The slope d / sqrt(d^2 + mu^2) is the norm with the sign of d.
        out.copy_(torch.copysign(norm, x).mul_(weight))

    def _loss(self, x: Tensor, norm: Tensor, out: Tensor) -> None:
        # d^2 / (root + mu), as in functional.regression_examples.
        torch.mul(x, x, out=x)
        torch.add(x, self.mu * self.mu, out=out).sqrt_().add_(self.mu)
        torch.div(x, out, out=out)
