"""The trainer: Detectron2's, with evaluators, global clipping and several processes on CPUs."""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    TrainerBase,
    create_ddp_model,
    default_writers,
)
from detectron2.evaluation import (
    DatasetEvaluator,
    inference_context,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from ghm_d2.checkpoint import RestrictedCheckpointer
from ghm_d2.data import workers
from ghm_d2.data.loader import build_test_mapper, build_train_loader, build_train_mapper
from ghm_d2.data.readable import ReadableMapper
from ghm_d2.errors import UserError, building
from ghm_d2.randomness import preserved
from ghm_d2.run_folder import FINAL_CHECKPOINT, RunFolder

from . import python_build
from .agreement import of_main_process
from .averaging import AveragedWeights
from .clipping import build_optimizer
from .evaluation import build_evaluator, costs_recorded, score_thresholds
from .finite import FiniteCheck, WithoutTracebacks
from .process_states import ProcessStates
from .selection import EarlyStopping, StoppedEarly
from .settings import Config, Settings, key_of, read_settings
from .step import CheckedAMPTrainer, CheckedTrainer
from .training_hooks import build_hooks
from .validation import ReadableImages, ValidationLoss, add_ground_truth
from .writers import build_more_writers

logger = logging.getLogger(__name__)

_WITHOUT_TRACEBACKS = WithoutTracebacks()


class GHMTrainer(DefaultTrainer):
    """`DefaultTrainer` for YAML and Python configs, with every guard of this project.

    Attributes:
        cfg: the config, a `CfgNode` or the `DictConfig` of a Python config.
        settings: what the engine reads of it.
        averaging, early_stopping: the hooks that average weights and that may end the training;
            None where they are off.
    """

    def __init__(self, cfg: Config) -> None:
        """Builds what `DefaultTrainer` builds, around a step and a checkpointer of our own.

        Args:
            cfg: config of the training.
        """
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        if isinstance(cfg, CfgNode):
            cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg, self.settings = cfg, read_settings(cfg)
        # In DefaultTrainer's order: in another one, the same seed would give other weights.
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        # Detectron2 would fill in device_ids, with which a model on the CPU is refused.
        on_cpu = torch.device(self.settings.device).type == "cpu"
        options = {"device_ids": None} if on_cpu else {}
        model = create_ddp_model(model, **self.settings.ddp, **options)
        step = CheckedAMPTrainer if self.settings.amp else CheckedTrainer
        self._trainer = step(model, data_loader, optimizer)
        self._trainer.accumulation_steps = self.settings.accumulation_steps
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RestrictedCheckpointer(
            model, self.settings.output_dir, trainer=weakref.proxy(self)
        )
        self._trainer.check = FiniteCheck(
            cfg,
            model,
            self.checkpointer.get_checkpoint_file,
            getattr(self._trainer, "precision", None),
        )
        logging.getLogger("detectron2.engine.train_loop").addFilter(_WITHOUT_TRACEBACKS)
        self.max_iter = self.settings.max_iter
        self._last_eval_results: dict[str, Any] | None = None  # DefaultTrainer's name
        self.averaging: AveragedWeights | None = None
        self.early_stopping: EarlyStopping | None = None
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """See :func:`~ghm_d2.engine.training_hooks.build_hooks`."""
        return build_hooks(self)

    def evaluate_now(self) -> dict[str, Any]:
        """Evaluates; after the last step, adds the score thresholds to the final checkpoint."""
        self._last_eval_results = self.test(self.cfg, self.evaluated_model)
        if self.iter >= self.max_iter:
            self.note_thresholds()
        return self._last_eval_results

    def note_thresholds(self) -> None:
        """Adds the last evaluation's score thresholds to the final checkpoint, saved before it."""
        if comm.is_main_process():
            self.checkpointer.note_thresholds(FINAL_CHECKPOINT, self.score_thresholds)

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's (the terminal, metrics.json and TensorBoard) and those of the config."""
        writers = default_writers(self.settings.output_dir, self.max_iter)
        return writers + build_more_writers(self.cfg)

    def train(self) -> dict[str, Any] | None:
        """Detectron2's training loop, which may end early.

        Returns:
            The results of the last evaluation; None without any.

        Raises:
            SystemExit: code 1; the results are not those that the config expects.
        """
        try:
            TrainerBase.train(self, self.start_iter, self.max_iter)
        except StoppedEarly:
            self.iter += 1  # as the loop counts where it ends by itself
            self.note_thresholds()
        return self._verified()

    def evaluate(self) -> dict[str, Any] | None:
        """The evaluation after the last step alone, for a training that was killed in it.

        Returns:
            As :meth:`train`.

        Raises:
            SystemExit: likewise.
        """
        with EventStorage(self.max_iter) as self.storage:
            self.iter = self.start_iter = self.max_iter
            self.before_train()
            self.after_train()
        return self._verified()

    @property
    def results(self) -> dict[str, Any] | None:
        """The results of the last evaluation; None before the first."""
        return self._last_eval_results

    @property
    def evaluated_model(self) -> nn.Module:
        """What is evaluated: the averaged weights where the config asks for them."""
        return self.averaging.model if self.averaging else self.model

    @property
    def score_thresholds(self) -> dict[str, float]:
        """Those of the last evaluation, on the first test set; see :func:`score_thresholds`."""
        return score_thresholds(self.results, self.settings.test)

    def _verified(self) -> dict[str, Any] | None:
        if comm.is_main_process() and self.results:
            verify_expected(self.settings, self.results)
        return self.results

    def resume_or_load(self, resume: bool = True) -> None:
        """Detectron2's; whether there is a checkpoint is what the main process finds."""
        resume = resume and of_main_process(self.checkpointer.has_checkpoint())
        self.checkpointer.resume_or_load(self.settings.weights, resume=resume)
        if resume:
            self.start_iter = self.iter + 1  # the checkpoint holds the last finished iteration

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Detectron2's; warns of a checkpoint that a training without `ProcessStates` has saved.

        Raises:
            UserError: its model is an average of weights, but this training averages none.
        """
        saved = state_dict.get("hooks", {})
        if AveragedWeights.__qualname__ in saved and not self.averaging:
            raise UserError(
                "--resume: the checkpoint is of a training with averaged weights: give "
                f"{key_of(self.cfg, 'ema_decay')} the value that it had."
            )
        super().load_state_dict(state_dict)
        if ProcessStates.__qualname__ not in saved:
            logger.warning(
                "the checkpoint holds no state of the processes: the order of images and random "
                "numbers start anew, and every process has the running counts of the main one"
            )

    @classmethod
    def build_model(cls, cfg: Config) -> nn.Module:
        """The model that the config describes, on its device."""
        if isinstance(cfg, CfgNode):
            with building("the model that MODEL describes"):
                return super().build_model(cfg)
        return python_build.build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's optimizer; see :func:`~ghm_d2.engine.clipping.build_optimizer`."""
        if isinstance(cfg, CfgNode):
            with building("the optimizer that SOLVER describes"):
                return build_optimizer(cfg, model)
        return python_build.build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: Config, optimizer: torch.optim.Optimizer) -> Any:
        """Detectron2's scheduler, or the multiplier from which its hook makes one."""
        if isinstance(cfg, CfgNode):
            with building("the schedule that SOLVER describes"):
                return super().build_lr_scheduler(cfg, optimizer)
        return python_build.build_lr_scheduler(cfg)

    @classmethod
    def build_train_loader(cls, cfg: Config) -> Iterable[list[dict]]:
        """See :func:`~ghm_d2.data.loader.build_train_loader`; over images that can be read."""
        if isinstance(cfg, CfgNode):
            with building("the training images that DATALOADER and INPUT describe"):
                mapper = ReadableMapper(cls.build_train_mapper(cfg), is_train=True)
                return build_train_loader(cfg, mapper)
        return python_build.build_train_loader(cfg)

    @classmethod
    def build_train_mapper(cls, cfg: Config) -> Any:
        """From a dataset dict to what the model takes in training."""
        if isinstance(cfg, CfgNode):
            return build_train_mapper(cfg)
        return python_build.build_train_mapper(cfg)

    @classmethod
    def build_test_loader(cls, cfg: Config, dataset_name: str) -> Iterable[list[dict]]:
        """Detectron2's, over readable images; with ground truth if validation losses are on."""
        if isinstance(cfg, CfgNode):
            mapper = cls.build_test_mapper(cfg)
            if read_settings(cfg).validation_loss:
                mapper = add_ground_truth(mapper, cfg)
            mapper = ReadableMapper(mapper, is_train=False)
            with building("the test images that DATALOADER and DATASETS describe"):
                loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
            return workers.watch(loader)
        return python_build.build_test_loader(cfg, dataset_name)

    @classmethod
    def build_test_mapper(cls, cfg: Config) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """From a dataset dict to what the model takes in a test."""
        if isinstance(cfg, CfgNode):
            with building("the test images that INPUT describes"):
                return build_test_mapper(cfg)
        return python_build.build_test_mapper(cfg)

    @classmethod
    def test(
        cls, cfg: Config, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Detectron2's evaluation; its figures also go to OUTPUT_DIR/inference/results.json.

        The file maps "TASK/FIGURE", after "NAME/" where there are several data sets, to a number,
        or to null where there is none.

        Args:
            cfg: names the data sets to test on.
            model: with the weights to evaluate.
            evaluators: one for each data set; None: those of :meth:`build_evaluator`.
        """
        settings = read_settings(cfg)
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        more = [ValidationLoss(model)] if settings.validation_loss else []
        results: dict[str, Any] = OrderedDict()
        # A training that is resumed after an evaluation does not repeat it, and would go on with
        # other random numbers if the evaluation had drawn some.
        with preserved(), costs_recorded(model) as timed, inference_context(model):
            for number, name in enumerate(settings.test):
                loader = cls.build_test_loader(cfg, name)
                evaluator = evaluators[number] if evaluators else cls.build_evaluator(cfg, name)
                each = [ReadableImages(name), evaluator, *more]
                with workers.watched():
                    results[name] = inference_on_dataset(timed, loader, each)
                if comm.is_main_process():
                    logger.info("Evaluation results for %s in csv format:", name)
                    print_csv_format(results[name])
        if len(results) == 1:
            results = next(iter(results.values()))
        if comm.is_main_process() and results:
            RunFolder(settings.output_dir).write_results(flatten_results_dict(results))
        return results

    @classmethod
    def build_evaluator(cls, cfg: Config, dataset_name: str) -> DatasetEvaluator:
        """See :func:`~ghm_d2.engine.evaluation.build_evaluator`.

        Its files go to :meth:`~ghm_d2.run_folder.RunFolder.inference`.
        """
        settings = read_settings(cfg)
        folder = RunFolder(settings.output_dir).inference(dataset_name, settings.test)
        if isinstance(cfg, CfgNode):
            return build_evaluator(cfg, dataset_name, str(folder))
        return python_build.build_evaluator(cfg, dataset_name, str(folder))


def verify_expected(settings: Settings, results: dict[str, Any]) -> None:
    """Detectron2's `verify_results`, for which a task without results is no error either.

    Raises:
        SystemExit: code 1; the results are not those that the config expects.
    """
    expected = [list(row) for row in settings.expected_results]
    results = dict.fromkeys((row[0] for row in expected), {}) | results
    verify_results(CfgNode({"TEST": {"EXPECTED_RESULTS": expected}}), results)
