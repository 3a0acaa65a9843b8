"""Refuses to save weights that are not finite, so that the last checkpoint stays usable."""

import torch
from detectron2.engine import HookBase
from torch import nn

from .finite import NotFiniteError


class FiniteWeights(HookBase):
    """Runs before the hook that writes checkpoints and refuses weights that are not finite.

    A step from finite gradients can still overflow. All processes hold the same weights and look
    at the same iterations, so that they stop together.
    """

    def __init__(self, period: int) -> None:
        """
        Args:
            period: `SOLVER.CHECKPOINT_PERIOD`.
        """
        self._period = period

    def after_step(self) -> None:
        """
        Raises:
            NotFiniteError: a checkpoint is due, and the model holds a NaN or an infinity.
        """
        done = self.trainer.iter + 1
        if done % self._period and done < self.trainer.max_iter:
            return
        require_finite_weights(self.trainer.model, self.trainer.iter)


def require_finite_weights(model: nn.Module, iteration: int) -> None:
    """Raises an error if a model is not finite; called before every checkpoint.

    Args:
        model: the model to be saved.
        iteration: the iteration just finished, from 0.

    Raises:
        NotFiniteError: the model holds a NaN or an infinity.
    """
    state = model.state_dict()
    values = {name: x for name, x in state.items() if x.is_floating_point()}
    sums = torch.stack([torch.linalg.vector_norm(x.float(), 1) for x in values.values()])
    bad = [n for n, good in zip(values, torch.isfinite(sums).tolist(), strict=True) if not good]
    if bad:
        raise NotFiniteError(
            f"iteration {iteration}: the step left {len(bad)} weights or buffers that are not "
            f"finite, the first {bad[0]}, though losses and gradients were; no checkpoint was "
            "written: go on from the last one with --resume and a smaller SOLVER.BASE_LR."
        )
