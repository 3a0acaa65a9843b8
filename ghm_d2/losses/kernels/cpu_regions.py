"""Unit regions of the gradient norms of one block, on the CPU."""

from functools import cache

import torch
from torch import Tensor

from ..functional import unit_region_edges
from .cpu_blocks import Scratch

# Regions are counted in pairs up to this many: the table of pairs must stay in the nearest cache.
_PAIRED = 64

Corrections = tuple[Tensor, Tensor]  # positions, and the regions of the norms there


class RegionFinder:
    """Finds and counts regions, exactly as `unit_region_index` and `count_unit_regions` do.

    Regions are int32 in [0, bins]: `bins` for a norm of 1, any number for NaN. They take the
    memory of the scratch's first buffer.
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.edges = unit_region_edges(bins)
        below = torch.nextafter(self.edges[1:], torch.tensor(0.0))
        ends = torch.cat([self.edges, below])
        self.floor_is_exact = torch.equal((ends * bins).int(), self._search(ends).int())

    def _search(self, norm: Tensor) -> Tensor:
        return torch.bucketize(norm, self.edges[1:], right=True)

    def find(self, norm: Tensor, scratch: Scratch) -> tuple[Tensor, Corrections | None]:
        """The region of each norm, float32 (n,); corrections where it is not floor(norm * bins)."""
        product, spare = scratch.buffers[:2]
        torch.mul(norm, self.bins, out=product)
        corrections = None
        if not self.floor_is_exact:
            # Only a product close to a whole number can be rounded across an edge.
            torch.round(product, out=spare).sub_(product).abs_()
            close = 2e-7 * self.bins
            if spare.min() < close:
                doubtful = (spare < close).nonzero().flatten()
                corrections = doubtful, self._search(norm[doubtful]).int()
        return _floor(scratch, corrections), corrections

    def find_again(self, norm: Tensor, scratch: Scratch, known: Corrections | None) -> Tensor:
        """The regions once more, from the corrections that :meth:`find` returned."""
        torch.mul(norm, self.bins, out=scratch.buffers[0])
        return _floor(scratch, known)

    def count(self, scratch: Scratch) -> Tensor:
        """The int64 (bins + 1,) counts of the regions that were found in `scratch`.

        A NaN is refused later, by the loss; here it only must not cause a crash.
        """
        width = self.bins + 1
        if width > _PAIRED:
            return _bincount(scratch.region, width)
        # Two regions make one number: half as many increments, and fewer wait for another.
        first, second = scratch.halves
        pairs = torch.add(second, first, alpha=width, out=scratch.pairs)
        table = _bincount(pairs, width * width).view(width, width)
        total = table.sum(0).add_(table.sum(1))
        if scratch.region.numel() % 2:
            total += _bincount(scratch.region[-1:], width)
        return total

    def total(self, counts: list[Tensor], dropped: list[int]) -> Tensor:
        """Adds up (T, bins + 1) counts; `dropped` examples were counted with a norm of 0."""
        total = sum(counts, start=torch.zeros(len(dropped), self.bins + 1, dtype=torch.int64))
        total[:, self.bins - 1] += total[:, self.bins]  # the last region is closed
        total[:, 0] -= torch.tensor(dropped)
        return total[:, : self.bins].contiguous()  # as an all-reduce needs it


@cache
def region_finder(bins: int) -> RegionFinder:
    """The finder for `bins` unit regions."""
    return RegionFinder(bins)


def _floor(scratch: Scratch, corrections: Corrections | None) -> Tensor:
    # Element by element into the same memory: one buffer less in the cache.
    region = scratch.region.copy_(scratch.buffers[0])
    if corrections is not None:
        positions, values = corrections
        region[positions] = values
    return region


def _bincount(numbers: Tensor, size: int) -> Tensor:
    try:
        return torch.bincount(numbers, minlength=size)
    except RuntimeError:  # a negative number, made from a NaN
        return torch.bincount(numbers.clamp(0, size - 1), minlength=size)
