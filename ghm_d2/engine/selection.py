"""Which model is the best, and when to stop: what evaluations decide in a training."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ghm_d2.checkpoint import load_file
from ghm_d2.data.annotations import Uses
from ghm_d2.errors import UserError, similar_names
from ghm_d2.run_folder import BEST_CHECKPOINT, BEST_F1, FINAL_CHECKPOINT

from .agreement import any_process
from .evaluation import AllThresholdsCOCOEvaluator
from .finite_weights import require_finite_weights
from .process_states import ProcessStates
from .python_config import read_uses, target_of
from .settings import Config, Settings, key_of, pair, read_settings
from .validation import VALIDATION

logger = logging.getLogger(__name__)


def check_selection(cfg: Config) -> None:
    """Checks that there are evaluations to select by, and that they have the metric.

    Raises:
        UserError: the config asks for the best model or early stopping, but lacks one of them.
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
    name, figure = _of_data_set(settings)
    known = [f"{name}/{x}" if name else x for x in _known_figures(cfg, name or settings.test[0])]
    metric, key = settings.val_metric, key_of(cfg, "val_metric")
    if figure.startswith(f"{VALIDATION}/"):
        if not settings.validation_loss:
            raise UserError(f"{key} {metric} needs {pair(cfg, 'validation_loss', True)}.")
    elif known and metric not in known:
        raise UserError(
            f"{key} {metric} is not a metric of these evaluations{similar_names(metric, known)}: "
            f"give for example {pair(cfg, 'val_metric', known[0])}."
        )


def mode_of(settings: Settings) -> str:
    """Whether the highest or the lowest figure is the best, "max" or "min"."""
    return "min" if _of_data_set(settings)[1].startswith(f"{VALIDATION}/") else "max"


def _of_data_set(settings: Settings) -> tuple[str, str]:
    """The data set that the metric names ("" if there is only one), and the figure."""
    if len(settings.test) > 1:
        for name in settings.test:
            if settings.val_metric.startswith(f"{name}/"):
                return name, settings.val_metric.removeprefix(f"{name}/")
        return settings.test[0], ""
    return "", settings.val_metric


def _known_figures(cfg: Config, name: str) -> list[str]:
    """The figures of this project's evaluator, "bbox/AP" first; none where another one is used."""
    if MetadataCatalog.get(name).get("evaluator_type") != "coco":
        return []
    if isinstance(cfg, CfgNode):
        uses = Uses.of(cfg)
    elif target_of(cfg.dataloader.evaluator) is AllThresholdsCOCOEvaluator:
        uses = read_uses(cfg)
    else:
        return []
    classes = MetadataCatalog.get(name).get("thing_classes") or ()
    figures = ["AP", *(f"AP{x}" for x in range(50, 100, 5)), "APs", "APm", "APl"]
    figures += [f"AP-{k}" for k in classes]
    tasks = ["bbox"] + ["segm"] * bool(uses.masks) + ["keypoints"] * uses.keypoints
    of_f1 = ("F1", "precision", "recall", *(f"F1-{k}" for k in classes))
    return [f"{task}/{x}" for task in tasks for x in figures] + [f"{BEST_F1}/{x}" for x in of_f1]


class StoppedEarly(BaseException):
    """Ends the loop of a training whose result is as good as it gets; its work is done.

    Not an `Exception`, because Detectron2's loop would log a traceback of one.
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

    def __init__(self, settings: Settings, save: Callable[..., None]) -> None:
        """
        Args:
            settings: of the training.
            save: called with the name of the checkpoint, and `iteration` by name.
        """
        super().__init__(
            settings.eval_period,
            SimpleNamespace(save=save),
            settings.val_metric,
            mode_of(settings),
            BEST_CHECKPOINT.removesuffix(".pth"),
        )
        self._file = Path(settings.output_dir) / BEST_CHECKPOINT

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

    def __init__(self, settings: Settings, checkpointer: Any, states: ProcessStates) -> None:
        """
        Args:
            settings: of the training.
            checkpointer: saves in the main process.
            states: collected before it saves.
        """
        self._period, self._patience = settings.eval_period, settings.patience
        self._metric, self._sign = settings.val_metric, 1 if mode_of(settings) == "min" else -1
        self._checkpointer, self._states = checkpointer, states
        self._figures: dict[int, float] = {}  # by iteration, NaN where there was none

    @property
    def best(self) -> tuple[int, float] | None:
        """The iteration of the best figure, the first of equal ones, and the figure."""
        known = [item for item in self._figures.items() if math.isfinite(item[1])]
        return min(known, key=lambda item: (self._sign * item[1], item[0]), default=None)

    @property
    def exhausted(self) -> bool:
        """Whether the patience has run out: the training should stop."""
        best = self.best[0] if self.best else -1
        return sum(iteration > best for iteration in self._figures) >= self._patience

    def verdict(self) -> str:
        """Why the training has stopped, as a clause."""
        found = "was never a number"
        if self.best:
            iteration, value = self.best
            found = f"has not improved on {value:.4g}, reached after {iteration + 1} iterations,"
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
