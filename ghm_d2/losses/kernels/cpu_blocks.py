"""Long tensors in blocks that stay in the cache, dealt to one Python thread per core.

PyTorch runs each of those threads on its core alone and releases the interpreter lock during an
operation. Every call between two operations takes the lock again, so what a block needs is cut and
allocated beforehand.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

# Measured on two cores with 2^16 to 2^21: smaller blocks spend their time in Python and wait for
# its lock, larger ones need more scratch memory (2 MiB a buffer here).
BLOCK = 1 << 19
# A thread gets at least this many blocks: longer ones would need too much scratch memory.
_FEWEST = 8
# But no block is shorter than this: the calls would cost more than the work.
_SHORTEST = 1 << 16
# With fewer examples per thread, waiting for the lock costs more than a thread gains.
_WORTHWHILE = 1 << 19
# Up to this many stay on the calling thread, in blocks below 2^15 elements: from there on, PyTorch
# would spread every single operation over all cores and wake them each time.
_FEW = 1 << 17
_SERIAL = (1 << 15) - 512

T = TypeVar("T")


class Blocks:
    """Tensors of `sizes` examples cut into blocks of one length, except the last of each.

    Attributes:
        owners: for each block, the number of its tensor.
        lengths: for each block, the number of its examples.
    """

    def __init__(self, *sizes: int) -> None:
        self.sizes, size = sizes, sum(sizes)
        cores = torch.get_num_threads()
        self._on_calling_thread = cores == 1 or size <= _FEW
        self.threads = min(cores, max(size // _WORTHWHILE, 1))
        share = -(-size // self.threads)
        longest = min(BLOCK, max(_SHORTEST, share // _FEWEST))
        if cores > 1 and size <= _FEW:
            longest = _SERIAL
        self.length = -(-share // -(-share // longest)) if share else 1
        self.owners: list[int] = []
        self.lengths: list[int] = []
        for number, own in enumerate(sizes):
            whole, rest = divmod(own, self.length)
            lengths = [self.length] * whole + [rest] * (rest > 0)
            self.lengths += lengths
            self.owners += [number] * len(lengths)

    def split(self, whole: Sequence[Tensor]) -> list[Tensor]:
        """The blocks of flat tensors of `sizes` elements, as views."""
        return [block for x in whole if x.numel() for block in x.split(self.length)]

    def cut(self, positions: Sequence[Tensor]) -> list[Tensor]:
        """Ascending `positions` in each tensor: those inside each block, from its start on."""
        blocks: list[Tensor] = []
        for own, size in zip(positions, self.sizes, strict=True):
            starts = range(0, size, self.length)
            if not own.numel() or len(starts) == 1:
                blocks += [own] * len(starts)
                continue
            edges = torch.tensor([*starts, size])
            cuts = torch.searchsorted(own.contiguous(), edges).tolist()
            triples = zip(starts, cuts, cuts[1:], strict=False)
            blocks += [own[a:b] - start for start, a, b in triples]
        return blocks

    def map(self, work: Callable[[range], T]) -> list[T]:
        """Calls `work` once per thread, with the numbers of that thread's blocks."""
        ends = list(accumulate(self.lengths))
        share = -(-sum(self.sizes) // self.threads)
        cuts = [0, *(bisect_left(ends, share * i) + 1 for i in range(1, self.threads)), len(ends)]
        shares = [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]

        def call(numbers: range) -> T:
            with torch.no_grad():  # each thread starts with gradients enabled
                return work(numbers)

        if self._on_calling_thread:
            return [call(numbers) for numbers in shares]
        return list(_pool(os.getpid(), torch.get_num_threads()).map(call, shares))

    def scratch(self, buffers: int) -> Callable[[int], "Scratch"]:
        """Scratch memory of one thread: a function from a block's number to its scratch."""
        memory = torch.empty(buffers, max(self.lengths, default=0))
        by_length: dict[int, Scratch] = {}

        def scratch_of(number: int) -> Scratch:
            length = self.lengths[number]
            if length not in by_length:
                by_length[length] = Scratch(memory[:, :length])
            return by_length[length]

        return scratch_of


class Scratch:
    """Buffers of one block, and other views of their memory.

    Attributes:
        buffers: float32 (n,) each.
        region: int32 (n,), in the memory of the first buffer.
        halves: int32 (n // 2,), the first and the second half of `region`.
        pairs: int32 (n // 2,), in the memory of the second buffer.
    """

    def __init__(self, memory: Tensor) -> None:
        """
        Args:
            memory: float32 (#buffers, n), #buffers at least 2.
        """
        self.buffers = memory.unbind()
        self.region, second = memory.view(torch.int32)[:2].unbind()
        half = memory.shape[1] // 2
        self.halves = self.region[:half], self.region[half : 2 * half]
        self.pairs = second[:half]


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of this process: a forked one has its parent's memory but not its threads."""
    started = Barrier(threads + 1)

    def start() -> None:
        # A thread adopts the process's number of threads when it first reads it, so it reads it
        # now: later, each worker would spread over all cores, which the others need.
        torch.get_num_threads()
        torch.set_num_threads(1)  # for this thread, and for all that start after it ...
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="ghm_d2", initializer=start)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(threads)  # ... until here
    return pool
