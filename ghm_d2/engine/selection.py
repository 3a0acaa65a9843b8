"""Which model is the best, and when to stop: what evaluations decide in a training."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ghm_d2.checkpoint import load_file
from ghm_d2.errors import UserError, similar_names
from ghm_d2.run_folder import BEST_CHECKPOINT, BEST_F1, FINAL_CHECKPOINT

from .agreement import any_process
from .finite_weights import require_finite_weights
from .process_states import ProcessStates
from .settings import Config, Settings, key_of, pair, read_settings
from .validation import VALIDATION

__all__ = ["BestCheckpointer", "EarlyStopping", "EvalHook", "StoppedEarly", "check_selection"]

logger = logging.getLogger(__name__)


def check_selection(cfg: Config) -> None:
    """Looks for evaluations, and for a figure that these have.

    Raises:
        UserError: the best model, or early stopping, is asked for without one of them.
    """
    settings = read_settings(cfg)
    if not settings.selects:
        return
    wanted = key_of(cfg, "save_best" if settings.save_best else "patience")
    if not settings.test:
        raise UserError(
            f"{wanted} needs test data to compare models by, and {key_of(cfg, 'test')} is empty: "
            "give a second --dataset."
        )
    if not settings.eval_period:
        raise UserError(
            f"{wanted} needs evaluations during the training, and {key_of(cfg, 'eval_period')} is "
            f"0: give for example {pair(cfg, 'eval_period', max(settings.max_iter // 10, 1))}."
        )
    metric, key = settings.val_metric, key_of(cfg, "val_metric")
    known = _known_figures(settings)
    if f"{VALIDATION}/" in metric:
        if not settings.validation_loss:
            raise UserError(f"{key} {metric} needs {pair(cfg, 'validation_loss', True)}.")
    elif metric not in known:
        raise UserError(
            f"{key} {metric} is no figure of these evaluations{similar_names(metric, known)}: give "
            f"for example {pair(cfg, 'val_metric', known[0])}."
        )


def _known_figures(settings: Settings) -> list[str]:
    """The names of the figures of the evaluators of this project, "bbox/AP" first."""
    known = []
    for name in settings.test:
        prefix = f"{name}/" if len(settings.test) > 1 else ""
        ap = ["AP", *(f"AP{x}" for x in range(50, 100, 5)), "APs", "APm", "APl"]
        ap += [f"AP-{k}" for k in MetadataCatalog.get(name).get("thing_classes") or ()]
        known += [f"{prefix}{task}/{x}" for task in ("bbox", "segm", "keypoints") for x in ap]
        known += [f"{prefix}{BEST_F1}/{x}" for x in ("F1", "precision", "recall")]
    return known


def _lower_is_better(metric: str) -> bool:
    """Whether a figure is a loss."""
    return "loss" in metric.rpartition("/")[2]


class StoppedEarly(BaseException):
    """Ends the loop of a training whose result is as good as it gets; its work is done.

    No `Exception`, of which Detectron2's loop would log a traceback.
    """


class EvalHook(hooks.EvalHook):
    """Detectron2's; a resumed training first repeats the evaluation that was due at its checkpoint.

    The checkpoint was written before it and knows nothing of its outcome, which the hooks behind
    this one need. They meet the training as that evaluation left it, in :meth:`before_train`.
    """

    def before_train(self) -> None:
        """Goes back to the end of the last step where an evaluation belongs there."""
        start = self.trainer.start_iter
        if 0 < start < self.trainer.max_iter and self._period > 0 and start % self._period == 0:
            self.trainer.iter = self.trainer.storage.iter = start - 1
            self._do_eval()


def _has_repeated_evaluation(trainer: Any) -> bool:
    return trainer.iter < trainer.start_iter


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's, whose best figure outlives an interruption; it saves weights alone.

    With the state of the training, its file would become the one to resume from. It runs in every
    process, behind :class:`EvalHook`; the main one compares and saves.
    """

    def __init__(
        self, eval_period: int, save: Callable[..., None], folder: str, metric: str
    ) -> None:
        """
        Args:
            eval_period: that of :class:`EvalHook`.
            save: called with the name of the checkpoint, and `iteration` by name.
            folder: where `save` writes.
            metric: its name in the storage.
        """
        mode = "min" if _lower_is_better(metric) else "max"
        stem = BEST_CHECKPOINT.removesuffix(".pth")
        super().__init__(eval_period, SimpleNamespace(save=save), metric, mode, stem)
        self._file = Path(folder) / BEST_CHECKPOINT

    def before_train(self) -> None:
        """Forgets a best figure whose weights are gone: overwritten by iterations done again."""
        if comm.is_main_process() and self.best_iter is not None:
            try:
                kept = load_file(self._file)["iteration"]
            except (UserError, LookupError, TypeError):
                kept = None
            if kept != self.best_iter:
                logger.info("%s is not that of iteration %d", self._file, self.best_iter)
                self.best_metric = self.best_iter = None
        if _has_repeated_evaluation(self.trainer):
            self._best_checking()

    def _best_checking(self) -> None:
        if comm.is_main_process():
            super()._best_checking()

    def state_dict(self) -> dict[str, Any]:
        """The best figure so far and its iteration."""
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores them."""
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]


class EarlyStopping(HookBase):
    """Ends a training after so many evaluations in a row without a better figure.

    A figure that is missing or not finite is not better. The last state is saved as that of a
    finished training. It runs in every process, behind :class:`EvalHook`.
    """

    def __init__(
        self, eval_period: int, patience: int, metric: str, checkpointer: Any, states: ProcessStates
    ) -> None:
        """
        Args:
            eval_period: that of :class:`EvalHook`.
            patience: evaluations, at least 1.
            metric: its name in the storage.
            checkpointer: saves in the main process.
            states: collected before it saves.
        """
        self._period, self._patience, self._metric = eval_period, patience, metric
        self._checkpointer, self._states = checkpointer, states
        self._figures: dict[int, float] = {}  # by iteration, NaN where there was none

    @property
    def best(self) -> tuple[int, float] | None:
        """The iteration of the best figure, the first of equal ones, and the figure."""
        known = [item for item in self._figures.items() if math.isfinite(item[1])]
        sign = 1 if _lower_is_better(self._metric) else -1
        return min(known, key=lambda item: (sign * item[1], item[0]), default=None)

    @property
    def exhausted(self) -> bool:
        """Whether the patience is."""
        best = self.best[0] if self.best else -1
        return sum(iteration > best for iteration in self._figures) >= self._patience

    def verdict(self) -> str:
        """Why the training has stopped, as a clause."""
        found = "was never a number"
        if self.best:
            iteration, value = self.best
            found = f"has not got better than {value:.4g}, after {iteration + 1} iterations,"
        return f"{self._metric} {found} in {self._patience} evaluations"

    def before_train(self) -> None:
        """Looks at an evaluation that was repeated."""
        if _has_repeated_evaluation(self.trainer):
            self._look()

    def after_step(self) -> None:
        """Looks at the evaluation of this step, if there was one.

        Raises:
            StoppedEarly: the patience is exhausted, and the last checkpoint written.
            NotFiniteError: the weights are not finite; none is written.
        """
        done = self.trainer.iter + 1
        if done % self._period == 0 and done < self.trainer.max_iter:
            self._look()

    def _look(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._metric, (math.nan, -1))
        self._figures[self.trainer.iter] = value if iteration == self.trainer.iter else math.nan
        # The main process alone has figures.
        if not any_process(comm.is_main_process() and self.exhausted):
            return
        require_finite_weights(self.trainer.model, self.trainer.iter)
        self._states.collect()
        if comm.is_main_process():
            name, done = FINAL_CHECKPOINT.removesuffix(".pth"), self.trainer.iter + 1
            self._checkpointer.save(name, iteration=self.trainer.iter)
            logger.info("stopped early after %d iterations: %s", done, self.verdict())
        comm.synchronize()
        raise StoppedEarly

    def state_dict(self) -> dict[str, Any]:
        """The figures so far."""
        return {"figures": self._figures}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores them."""
        self._figures = dict(state["figures"])
