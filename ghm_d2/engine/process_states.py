"""What a checkpoint of Detectron2 forgets, so that a resumed run is the run that was stopped."""

import logging
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import Tensor, nn

from ghm_d2.data.loader import TrainLoader
from ghm_d2.errors import counted
from ghm_d2.randomness import get_random_state, set_random_state

logger = logging.getLogger(__name__)


class ProcessStates(HookBase):
    """Adds to every checkpoint the random state and the buffers of each process, and the place in
    the data.

    Detectron2 saves the model of the main process, the optimizer and the schedule. Without
    MODEL.GHM.SYNC every process has its own running counts (and, with BatchNorm, its own
    statistics). A RetinaNet's running number of positives is a plain attribute, which no checkpoint
    holds.

    It runs in every process, after the schedule and before the hook that saves. It saves only
    tensors and plain values, so that Detectron2 can open the file too.
    """

    def __init__(self, period: int) -> None:
        """
        Args:
            period: of the checkpoints, in iterations.
        """
        self._period = period
        self._states: list[dict[str, Any]] = []
        self._iteration = -1
        self._random_state: dict[str, Any] | None = None

    def before_train(self) -> None:
        """Restores the random state as late as possible: building the model draws numbers too."""
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def after_step(self) -> None:
        """Collects where a checkpoint is due."""
        following = self.trainer.iter + 1
        if following % self._period == 0 or following >= self.trainer.max_iter:
            self.collect()

    def after_train(self) -> None:
        """Ends the processes that load images; none is needed for what follows."""
        self.trainer._trainer._data_loader_iter_obj = None

    def collect(self) -> None:
        """Brings the states of all processes to the main one; all of them call it together."""
        if self._iteration != self.trainer.iter:
            self._states = _differences(comm.gather(_process_state(_model(self.trainer))))
            self._iteration = self.trainer.iter

    def state_dict(self) -> dict[str, Any]:
        """What was collected after this iteration; empty if nothing was."""
        if self._iteration != self.trainer.iter:
            if comm.get_world_size() > 1:  # collecting would wait for processes that do not save
                return {}
            self.collect()
        state: dict[str, Any] = {"processes": self._states}
        loader = self.trainer.data_loader
        if isinstance(loader, TrainLoader):
            state["data"] = loader.state_dict(self.trainer.iter + 1 - self.trainer.start_iter)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores this process' part, with a warning for what does not fit this run."""
        states, rank, world = state["processes"], comm.get_rank(), comm.get_world_size()
        if len(states) != world:
            logger.warning(
                "the checkpoint was written by %s, and this run has %d: those without a state of "
                "their own start with the running counts of the first one and new random numbers",
                counted(len(states), "process"),
                world,
            )
        if rank < len(states):
            own = states[rank]
            self._random_state = own["random"]
            model = _model(self.trainer)
            _load_buffers(model, own["buffers"])
            for name, module in _dense_detectors(model).items():
                if name in own["normalizers"]:
                    module.loss_normalizer = own["normalizers"][name]
        loader = self.trainer.data_loader
        if isinstance(loader, TrainLoader) and "data" in state:
            loader.load_state_dict(state["data"])
        else:
            logger.warning("the order of images starts anew: the data loader cannot resume")


def _model(trainer: Any) -> nn.Module:
    return getattr(trainer.model, "module", trainer.model)


def _process_state(model: nn.Module) -> dict[str, Any]:
    return {
        "random": get_random_state(),
        "buffers": {name: x.detach().cpu() for name, x in _buffers(model).items()},
        "normalizers": {
            name: float(module.loss_normalizer)
            for name, module in _dense_detectors(model).items()
            if hasattr(module, "loss_normalizer")  # set in its first step
        },
    }


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that are saved with the model."""
    saved = model.state_dict(keep_vars=True)
    return {name: x for name, x in model.named_buffers() if name in saved}


def _dense_detectors(model: nn.Module) -> dict[str, DenseDetector]:
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, DenseDetector)}


def _differences(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drops buffers equal to those of process 0, nearly all of them: the model holds these."""
    for state in states[1:]:
        first = states[0]["buffers"]
        state["buffers"] = {
            name: x for name, x in state["buffers"].items() if not torch.equal(x, first[name])
        }
    for state in states[:1]:  # saved with the model
        state["buffers"] = {}
    return states


@torch.no_grad()
def _load_buffers(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    known = _buffers(model)
    for name, x in buffers.items():
        if name in known and known[name].shape == x.shape:
            known[name].copy_(x)
        else:
            logger.warning("the checkpoint's %s of this process does not fit the model", name)
