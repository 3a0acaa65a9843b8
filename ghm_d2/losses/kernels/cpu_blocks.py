"""Long tensors in blocks that stay in the cache, dealt to one Python thread a core.

PyTorch runs each of those threads on its core alone and releases the interpreter lock during an
operation. Every call between two operations takes the lock again, so what a block needs is cut and
allocated beforehand.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["BLOCK", "Blocks", "Scratch"]

# Measured on two cores with 2^16 to 2^21: smaller blocks spend their time in Python and wait for
# its lock, larger ones need more scratch memory (2 MiB a buffer here).
BLOCK = 1 << 19
# The blocks of a thread are at least so many: their scratch memory is then a small part of the
# whole, ...
_FEWEST = 8
# ... but they are not shorter than this for it.
_SHORTEST = 1 << 16
# Fewer examples than this for each thread are not worth the waiting for its lock.
_WORTHWHILE = 1 << 19
# So few stay on the calling thread, in blocks below the 2^15 elements from which PyTorch would
# deal each single operation to all cores, and wake these every time.
_FEW = 1 << 17
_SERIAL = (1 << 15) - 512

T = TypeVar("T")


class Blocks:
    """``size`` examples cut into blocks of equal length, but for the last one."""

    def __init__(self, size: int) -> None:
        self.size = size
        cores = torch.get_num_threads()
        self._on_calling_thread = cores == 1 or size <= _FEW
        self.threads = min(cores, max(size // _WORTHWHILE, 1))
        share = -(-size // self.threads)
        longest = min(BLOCK, max(_SHORTEST, share // _FEWEST))
        if cores > 1 and size <= _FEW:
            longest = _SERIAL
        self.length = -(-share // -(-share // longest)) if share else 1
        self.number = -(-size // self.length)

    def split(self, whole: Tensor) -> Sequence[Tensor]:
        """The blocks of a tensor of ``size`` elements, as views."""
        blocks: Sequence[Tensor] = whole.split(self.length)
        return blocks

    def cut(self, positions: Tensor) -> Sequence[Tensor]:
        """Ascending ``positions``, for each block those inside it, counted from its start."""
        if not positions.numel() or self.number == 1:
            return [positions] * self.number
        starts = torch.arange(0, self.size + self.length, self.length)
        cuts = torch.searchsorted(positions.contiguous(), starts).tolist()
        pairs = zip(cuts, cuts[1:], strict=False)
        return [positions[a:b] - i * self.length for i, (a, b) in enumerate(pairs)]

    def map(self, work: Callable[[range], T]) -> list[T]:
        """Calls ``work`` once a thread, with the numbers of that thread's blocks."""
        share = -(-self.number // self.threads)
        shares = [range(i, min(i + share, self.number)) for i in range(0, self.number, share)]

        def call(numbers: range) -> T:
            with torch.no_grad():  # a setting of each thread
                return work(numbers)

        if self._on_calling_thread:
            return [call(numbers) for numbers in shares]
        return list(_pool(os.getpid(), torch.get_num_threads()).map(call, shares))

    def scratch(self, buffers: int) -> Callable[[int], "Scratch"]:
        """Scratch memory of one thread: a function from a block's number to its scratch."""
        length = min(self.length, self.size)
        memory = torch.empty(buffers, length)
        whole = Scratch(memory)
        rest = self.size - (self.number - 1) * self.length
        last = whole if rest == length else Scratch(memory[:, :rest])
        return lambda number: last if number == self.number - 1 else whole


class Scratch:
    """Buffers of one block, and what else their memory is used as.

    Attributes:
        buffers: float32 (n,) each.
        region: int32 (n,), in the memory of the first buffer.
        halves: int32 (n // 2,), the first and the second half of ``region``.
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
        torch.set_num_threads(1)  # for this thread, and for all that start after it ...
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="ghm_d2", initializer=start)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(threads)  # ... until here
    return pool
