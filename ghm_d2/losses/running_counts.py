"""The running counts of the unit regions: their buffers, moving average, and pooling."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_bins, check_choice, check_flag, check_fraction
from .functional import Averaging
from .kernels import walk
from .weighted import WeightedLoss

# A number of updates after which 1 - alpha^n has long been 1 in float64.
_STEADY = 1 << 40


class RunningCounts(WeightedLoss):
    """A loss that averages the counts of unit regions over its calls.

    Attributes:
        acc_sum: float32 (bins,), the exponential moving average of the region counts,
            `S_j <- alpha * S_j + (1 - alpha) * R_j`. Saved with the model; written by training
            steps alone: in training mode, with gradients enabled, and not again where
            activation checkpointing repeats a forward pass.
        num_updates: int64 (bins,), how often region j was averaged; only with `bias_correction`.
    """

    acc_sum: Tensor
    num_updates: Tensor

    def __init__(
        self,
        bins: int,
        momentum: float,
        loss_weight: float | str,
        *,
        normalize_by: str = "valid_bins",
        decay_empty_bins: bool = False,
        bias_correction: bool = False,
        sync: bool = False,
    ) -> None:
        """See :class:`~ghm_d2.losses.GHMCLoss` for the arguments."""
        super().__init__(loss_weight)
        self.bins = check_bins(bins)
        self.momentum = check_fraction("momentum", momentum)
        self.normalize_by = check_choice("normalize_by", normalize_by, ("valid_bins", "all_bins"))
        self.decay_empty_bins = check_flag("decay_empty_bins", decay_empty_bins)
        self.bias_correction = check_flag("bias_correction", bias_correction)
        self.sync = check_flag("sync", sync)
        self.register_buffer("acc_sum", torch.zeros(self.bins))
        if self.bias_correction:
            self.register_buffer("num_updates", torch.zeros(self.bins, dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Sets the running counts to 0, as in a new module; also after `to_empty`."""
        super().reset_parameters()
        with torch.no_grad():
            self.acc_sum.zero_()
            if self.bias_correction:
                self.num_updates.zero_()

    @torch.no_grad()
    def _walk(self, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights of each histogram, and the buffers after the last; see :func:`walk`."""
        averaging = Averaging(self.momentum, self.normalize_by, self.decay_empty_bins)
        return walk(counts, self.acc_sum, getattr(self, "num_updates", None), averaging)

    def _pool(self, counts: Tensor, meet: bool) -> int:
        """Adds up `counts` over all processes in place; returns how many there are.

        Without `meet`, as outside training steps, every process is taken to have this one's
        counts: a process that validates alone would otherwise wait for the others for ever.
        """
        world = self._processes()
        if world > 1 and meet:
            dist.all_reduce(counts)
        elif world > 1:
            counts *= world
        return world

    def _processes(self) -> int:
        synced = self.sync and dist.is_available() and dist.is_initialized()
        return dist.get_world_size() if synced else 1

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        *args: Any,
    ) -> None:
        """Also loads checkpoints without bias correction: their averages are taken to need none."""
        acc_sum = state_dict.get(f"{prefix}acc_sum")
        if self.bias_correction and acc_sum is not None:
            state_dict.setdefault(f"{prefix}num_updates", (acc_sum > 0).long() * _STEADY)
        super()._load_from_state_dict(state_dict, prefix, *args)
