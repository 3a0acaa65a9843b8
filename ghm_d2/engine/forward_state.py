"""What a forward pass in training mode reads, and changes, besides weights and batch."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghm_d2.losses.weighted import WeightedLoss

_NORMALIZER = "loss_normalizer"  # of Detectron2's dense detectors: a plain attribute
_WRITERS = (WeightedLoss, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class ForwardState:
    """A copy of the state that a forward pass in training mode reads and changes.

    Attributes:
        buffers: those that a forward pass in training mode writes, by their names in the model: the
            running averages of the losses and the running statistics of batch norm.
        normalizer: running number of positives of a dense detector; None where there is none.
        rng: states of PyTorch's generators, "cpu" and, for a model on a GPU, "cuda"; a forward
            pass uses no other generator.
    """

    buffers: dict[str, Tensor]
    normalizer: float | Tensor | None
    rng: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> "ForwardState":
        """A copy of the state of `model`; without any synchronisation."""
        buffers = {
            f"{name}.{key}": value.clone()
            for name, module in model.named_modules()
            if isinstance(module, _WRITERS)
            for key, value in module.named_buffers(recurse=False)
        }
        normalizer = getattr(model, _NORMALIZER, None)
        rng = {"cpu": torch.get_rng_state()}
        if next(model.parameters()).is_cuda:
            rng["cuda"] = torch.cuda.get_rng_state()
        return cls(buffers, _copied(normalizer), rng)

    def restore(self, model: nn.Module) -> None:
        """Brings `model` and the generators back to this state."""
        buffers = dict(model.named_buffers())
        for name, value in self.buffers.items():
            buffers[name].copy_(value)
        if self.normalizer is not None:
            setattr(model, _NORMALIZER, _copied(self.normalizer))
        elif hasattr(model, _NORMALIZER):
            delattr(model, _NORMALIZER)
        torch.set_rng_state(self.rng["cpu"])
        if "cuda" in self.rng and next(model.parameters()).is_cuda:
            torch.cuda.set_rng_state(self.rng["cuda"])


def _copied(value: float | Tensor | None) -> float | Tensor | None:
    return value.detach().clone() if isinstance(value, Tensor) else value
