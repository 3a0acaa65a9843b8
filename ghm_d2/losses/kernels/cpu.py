"""CPU kernels: loss and gradient of harmonised losses, block by block.

A loss written with whole-tensor operations reads and writes memory the size of the logits a dozen
times. Here a block goes through all operations while it is in the cache.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_blocks import Blocks, Scratch
from .cpu_regions import Corrections, region_finder
from .examples import EagerExamples, FusedExamples

# Above this logit, 1 - sigmoid has lost the digits that the loss needs.
_LARGE = 4.0
_ROW = 512  # logits that are searched together for a large one


def _tables(weights: Tensor) -> Sequence[Tensor]:
    """The weight of each region in [0, bins], for each tensor."""
    return torch.cat([weights, weights[:, -1:]], dim=1).float().unbind()


class _CpuExamples(FusedExamples):
    """A float32 gradient adds next to no cost to the loss, so both are computed together.

    Half precision cannot hold a gradient before its factor is known; there, the backward pass
    computes it.
    """

    def __init__(
        self,
        predictions: Sequence[Tensor],
        eager: Callable[[Sequence[Tensor]], EagerExamples],
        dropped: Sequence[Tensor],
    ) -> None:
        super().__init__(predictions, eager)
        self._with_gradient = self.differentiate and predictions[0].dtype == torch.float32
        self._blocks = Blocks(*(x.numel() for x in predictions))
        self._dropped = self._blocks.cut(dropped)
        self._numbers_dropped = [positions.numel() for positions in dropped]
        self._gradient: list[Tensor] | None = None
        self._corrections: list[Corrections | None] = [None] * len(self._blocks.lengths)

    def loss(self, weights: Tensor) -> Tensor:
        """See :class:`FusedExamples`; a float32 gradient is written in passing."""
        total, self._gradient = self._weighted(weights, True, self._with_gradient)
        return torch.tensor(total, dtype=torch.float32)

    def gradient(self, weights: Tensor, factor: Tensor) -> Sequence[Tensor]:
        """See :class:`FusedExamples`."""
        gradient, self._gradient = self._gradient, None
        if gradient is not None:
            return gradient if factor == 1 else [x.mul_(factor) for x in gradient]
        # Half precision, or a repeated backward pass: the first gave the gradient's memory away.
        _, gradient = self._weighted(weights * factor, False, True)
        assert gradient is not None
        return gradient

    def _weighted(
        self, weights: Tensor, want_loss: bool, want_gradient: bool
    ) -> tuple[float, list[Tensor] | None]:
        """The weighted sum of losses (0 unless wanted), and the gradient (None unless wanted)."""
        raise NotImplementedError

    def _count(self, bins: int, buffers: int, write: Callable[[int, Scratch], Tensor]) -> Tensor:
        """The int64 (T, bins) counts of the norms that `write` makes of each block."""
        finder, blocks = region_finder(bins), self._blocks

        def work(numbers: range) -> Tensor:
            scratch_of = blocks.scratch(buffers)
            total = torch.zeros(len(self.data), bins + 1, dtype=torch.int64)
            for i in numbers:
                scratch = scratch_of(i)
                _, self._corrections[i] = finder.find(write(i, scratch), scratch)
                total[blocks.owners[i]] += finder.count(scratch)
            return total

        return finder.total(blocks.map(work), self._numbers_dropped)

    def _sum(
        self,
        weights: Tensor,
        buffers: int,
        norm_of: Callable[[int, Scratch], Tensor],
        use: Callable[[int, Scratch, Tensor], float],
    ) -> float:
        """Adds up what `use` returns for each block, given its number, scratch and weights.

        The weights lie in the second buffer, which may have held the norms; the first is free.
        """
        finder, tables = region_finder(weights.shape[1]), _tables(weights)
        owners = self._blocks.owners

        def work(numbers: range) -> float:
            scratch_of = self._blocks.scratch(buffers)
            total = 0.0
            for i in numbers:
                scratch = scratch_of(i)
                region = finder.find_again(norm_of(i, scratch), scratch, self._corrections[i])
                weight = scratch.buffers[1]
                try:
                    torch.index_select(tables[owners[i]], 0, region, out=weight)
                except IndexError:  # a NaN has no region
                    return torch.nan
                total += use(i, scratch, weight)
            return total

        return sum(self._blocks.map(work))

    def _empty(self) -> list[Tensor]:
        return [torch.empty_like(x) for x in self.data]


class SigmoidExamples(_CpuExamples):
    """Binary cross entropy of logits.

    With z = x for a negative and -x for a positive, all examples are alike: the norm is
    sigmoid(z), the loss softplus(z), and the slope by z is the norm again. So the gradient's
    memory holds the norms between counting and weighting.
    """

    def __init__(
        self,
        logits: Sequence[Tensor],
        eager: Callable[[Sequence[Tensor]], EagerExamples],
        positive: Sequence[Tensor],
        dropped: Sequence[Tensor],
    ) -> None:
        """
        Args:
            logits, eager: see :class:`FusedExamples`; float32, float16 or bfloat16.
            positive: for each tensor, ascending int64 positions of the logits whose target is 1.
            dropped: likewise, of the logits that do not count.
        """
        super().__init__(logits, eager, dropped)
        self._x = self._blocks.split(self.data)
        self._positive = self._blocks.cut(positive)
        self._norms: list[Tensor] | None = None

    def _write_norm(self, number: int, norm: Tensor) -> Tensor:
        x, positive, dropped = self._x[number], self._positive[number], self._dropped[number]
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
        """See :class:`FusedExamples`."""
        kept = self._empty() if self._with_gradient else None
        norms = None if kept is None else self._blocks.split(kept)

        def write(number: int, scratch: Scratch) -> Tensor:
            norm = scratch.buffers[2] if norms is None else norms[number]
            return self._write_norm(number, norm)

        counts = self._count(bins, 3 if norms is None else 2, write)
        self._norms = kept
        return counts

    def _weighted(
        self, weights: Tensor, want_loss: bool, want_gradient: bool
    ) -> tuple[float, list[Tensor] | None]:
        kept, self._norms = self._norms, None
        gradient = kept
        if gradient is None and want_gradient:
            gradient = self._empty()
        norms = None if kept is None else self._blocks.split(kept)
        gradients = None if gradient is None else self._blocks.split(gradient)

        def norm_of(number: int, scratch: Scratch) -> Tensor:
            return self._write_norm(number, scratch.buffers[2]) if norms is None else norms[number]

        def use(number: int, scratch: Scratch, weight: Tensor) -> float:
            norm, total = scratch.buffers[2] if norms is None else norms[number], 0.0
            if want_loss:
                # Not torch.dot, which adds up one by one and loses a digit on such a block.
                loss = self._negative_loss(number, norm, scratch.buffers[0])
                total = -loss.mul_(weight).sum().item()
            if gradients is not None:
                self._write_gradient(number, norm, weight, gradients[number])
            return total

        return self._sum(weights, 3 if norms is None else 2, norm_of, use), gradient

    def _negative_loss(self, number: int, norm: Tensor, loss: Tensor) -> Tensor:
        # -softplus(z) = log(1 - sigmoid(z)); a large z loses digits there and is redone.
        x, positive, dropped = self._x[number], self._positive[number], self._dropped[number]
        torch.neg(norm, out=loss).log1p_()
        _replace_large(x, loss)
        if positive.numel():
            loss[positive] = F.softplus(-x[positive].float()).neg_()
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


def _replace_large(x: Tensor, loss: Tensor) -> None:
    """Writes -softplus(x) into `loss`, (n,), for each row of _ROW logits that holds a large one.

    An incomplete last row is always written. Masking single elements would take longer than all
    the rest.
    """
    n = x.numel() // _ROW * _ROW
    if n:
        rows = x[:n].view(-1, _ROW)
        large = (~(rows.amax(1) <= _LARGE)).nonzero().flatten()  # a NaN may hide a large one
        if large.numel():
            loss[:n].view(-1, _ROW)[large] = F.softplus(rows[large].float()).neg_()
    if n < x.numel():
        loss[n:] = F.softplus(x[n:].float()).neg_()


class RegressionExamples(_CpuExamples):
    """Authentic smooth L1 of the differences between predictions and targets.

    Everything is computed twice, to count and to weight: arithmetic is cheap, memory is not.
    """

    def __init__(
        self,
        preds: Sequence[Tensor],
        eager: Callable[[Sequence[Tensor]], EagerExamples],
        targets: Sequence[Tensor],
        dropped: Sequence[Tensor],
        mu: float | Tensor,
    ) -> None:
        """
        Args:
            preds, eager: see :class:`FusedExamples`; deltas in float32, float16 or bfloat16.
            targets: contiguous deltas.
            dropped: for each tensor, ascending int64 positions that do not count.
            mu: width of the quadratic part; may be a 0-d tensor.
        """
        super().__init__(preds, eager, dropped)
        self.mu = float(mu)
        self.others = (mu,) if isinstance(mu, Tensor) else ()
        flat = [target.view(-1) for target in targets]
        self._pairs = list(zip(*map(self._blocks.split, (self.data, flat)), strict=True))

    def _write(self, number: int, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
        """Square of the difference, root, and slope, into the buffers after the first two."""
        (pred, target), dropped = self._pairs[number], self._dropped[number]
        square, root, slope = scratch.buffers[2:]
        slope.copy_(pred).sub_(target)
        if dropped.numel():
            slope[dropped] = 0
        torch.mul(slope, slope, out=square)
        torch.add(square, self.mu * self.mu, out=root).sqrt_()
        return square, root, slope.div_(root)

    def counts(self, bins: int) -> Tensor:
        """See :class:`FusedExamples`."""
        return self._count(bins, 5, lambda number, s: self._write(number, s)[2].abs_())

    def _weighted(
        self, weights: Tensor, want_loss: bool, want_gradient: bool
    ) -> tuple[float, list[Tensor] | None]:
        gradient = self._empty() if want_gradient else None
        gradients = None if gradient is None else self._blocks.split(gradient)

        def norm_of(number: int, scratch: Scratch) -> Tensor:
            return torch.abs(self._write(number, scratch)[2], out=scratch.buffers[1])

        def use(number: int, scratch: Scratch, weight: Tensor) -> float:
            square, root, slope = scratch.buffers[2:]
            total = 0.0
            if want_loss:
                # d^2 / (root + mu), as in functional.regression_examples.
                total = square.div_(root.add_(self.mu)).mul_(weight).sum().item()
            if gradients is not None:
                gradients[number].copy_(slope.mul_(weight))
            return total

        return self._sum(weights, 5, norm_of, use), gradient
