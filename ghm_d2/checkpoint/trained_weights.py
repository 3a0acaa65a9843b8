"""Loading weights to evaluate, to predict or to export with."""

from typing import Any

import torch

from ghm_d2.errors import UserError
from ghm_d2.losses.base import HarmonizedLoss
from ghm_d2.run_parts import Record

from .checkpointer import RestrictedCheckpointer


def load_trained_weights(
    model: torch.nn.Module,
    weights: str,
    folder: str = "",
    *,
    resume: bool = False,
    trusted: bool = False,
) -> Record:
    """Load weights to evaluate or to predict with, their running counts included.

    Args:
        model: receives the weights, which must have its shapes.
        weights: file or URL.
        folder: of a training.
        resume: load the last checkpoint in `folder`; `weights` where there is none.
        trusted: whether the file may run code.

    Returns:
        What the checkpoint says of the classes and the data that it was trained on.

    Raises:
        UserError: the file cannot be loaded, or holds weights of other shapes, as with another
            number of classes.
    """
    checkpointer = _EvaluationCheckpointer(model, save_dir=folder)
    checkpointer.trusted = trusted
    if resume:
        checkpointer.resume_or_load(weights)
    else:
        checkpointer.load(weights, checkpointables=[])
    return checkpointer.origin


class _EvaluationCheckpointer(RestrictedCheckpointer):
    """Refuses weights of other shapes, whereas training would start these layers afresh."""

    _starts = False

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        super()._log_incompatible_keys(incompatible)
        # Inference does not use the running counts of the losses, so another BINS is no obstacle.
        wrong = [x for x in incompatible.incorrect_shapes if not self._is_of_a_loss(x[0])]
        if wrong:
            name, found, expected = wrong[0]
            raise UserError(
                f"the weights do not fit the model: {name} has the shape {found} instead of "
                f"{expected} ({len(wrong)} such parameters); evaluate with the config, and the "
                "number of classes, of the training."
            )

    def _is_of_a_loss(self, name: str) -> bool:
        return isinstance(self.model.get_submodule(name.rpartition(".")[0]), HarmonizedLoss)
