"""Weights averaged over time, which a training with averaging evaluates and saves."""

from functools import partial
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class AveragedWeights(HookBase):
    """Keeps an exponential moving average of the weights, `a <- d a + (1 - d) w` after each step.

    Update n (from 1) takes `d = min(decay, (1 + n) / (10 + n))`; a constant `d` would leave the
    random start in the average of a short training. Buffers are not averaged but copied from the
    model: its running counts and batch statistics are averages already.

    With this hook, the weights under "model" in a checkpoint are the average, so that any program
    that opens the file predicts with the weights that were evaluated. The weights that the
    optimizer continues from are in the state of this hook. It runs in every
    process, after the hooks that change the model and before those that evaluate or save it.

    Attributes:
        model: a copy of the model with the averaged weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: the model being trained, not wrapped in DistributedDataParallel.
            decay: d, in (0, 1).
        """
        self._trained = model
        self._averaged = AveragedModel(model, multi_avg_fn=partial(_average, decay))
        self._averaged.requires_grad_(False)

    @property
    def model(self) -> nn.Module:  # noqa: D102 (described above)
        return self._averaged.module

    def before_train(self) -> None:
        """Takes over the buffers of this process, which a checkpoint has restored by now."""
        for mine, trained in zip(self.model.buffers(), self._trained.buffers(), strict=True):
            mine.copy_(trained)

    def after_step(self) -> None:
        """Averages; the first update takes the weights as they are."""
        self._averaged.update_parameters(self._trained)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs besides the average."""
        return {
            "updates": int(self._averaged.n_averaged),
            "weights": {name: p.detach() for name, p in self._trained.named_parameters()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Exchanges the average, which was loaded as the model, for the weights of the training."""
        self.model.load_state_dict(self._trained.state_dict())
        for name, parameter in self._trained.named_parameters():
            parameter.copy_(state["weights"][name])
        self._averaged.n_averaged.fill_(state["updates"])


@torch.no_grad()
def _average(decay: float, averaged: list[Tensor], trained: list[Tensor], updates: Tensor) -> None:
    n = int(updates)
    torch._foreach_lerp_(averaged, trained, 1 - min(decay, (1 + n) / (10 + n)))
