"""Questions that all processes of a job answer together."""

from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm


def any_process(flag: bool) -> bool:
    """Whether `flag` is True in any process.

    A process that acts on its own flag alone leaves the others waiting in their next collective
    call. Every process must ask, at the same point of the step.

    Args:
        flag: this process' answer.

    Returns:
        The same answer in every process.
    """
    if comm.get_world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    vote = torch.tensor(int(flag), dtype=torch.int32, device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote)


def of_main_process(value: Any) -> Any:
    """Returns the main process' `value` in every process; all must call this at the same point.

    Args:
        value: anything that can be pickled; the values of the other processes are ignored.
    """
    return comm.all_gather(value)[0]
