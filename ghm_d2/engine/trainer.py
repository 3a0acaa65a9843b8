"""The trainer: Detectron2's, with evaluators, global clipping and several processes on CPUs."""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    TrainerBase,
    create_ddp_model,
    default_writers,
    hooks,
)
from detectron2.evaluation import (
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    inference_context,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ghm_d2.analysis.hook import build_gradient_statistics
from ghm_d2.checkpoint import RestrictedCheckpointer
from ghm_d2.data import workers
from ghm_d2.data.keypoints import convert_incomplete
from ghm_d2.data.loader import build_test_mapper, build_train_loader, build_train_mapper
from ghm_d2.data.readable import ReadableMapper
from ghm_d2.errors import UserError
from ghm_d2.randomness import preserved
from ghm_d2.run_folder import RunFolder

from . import python_build
from .agreement import of_main_process
from .clipping import build_optimizer
from .evaluation import AllThresholdsCOCOEvaluator, costs_recorded
from .finite import FiniteCheck, FiniteWeights, WithoutTracebacks
from .length import LengthEstimate
from .output_folder import FolderIsThere
from .preemption import StopOnSignal
from .process_states import ProcessStates
from .settings import Config, Settings, read_settings
from .step import CheckedAMPTrainer, CheckedTrainer

__all__ = ["EVALUATOR_TYPES", "GHMTrainer", "verify_expected"]

logger = logging.getLogger(__name__)

EVALUATOR_TYPES = ("coco", "lvis", "pascal_voc")

_WITHOUT_TRACEBACKS = WithoutTracebacks()


class GHMTrainer(DefaultTrainer):
    """`DefaultTrainer` for YAML and Python configs, with every guard of this project.

    Attributes:
        cfg: the config, a `CfgNode` or the `DictConfig` of a Python config.
        settings: what the engine reads of it.
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
        # In the order of DefaultTrainer, which draws the same random numbers.
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        # A CPU model must not have device_ids, which Detectron2 gives where none are.
        on_cpu = torch.device(self.settings.device).type == "cpu"
        options = {"device_ids": None} if on_cpu else {}
        model = create_ddp_model(model, **self.settings.ddp, **options)
        step = CheckedAMPTrainer if self.settings.amp else CheckedTrainer
        self._trainer = step(model, data_loader, optimizer)
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
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, those around its checkpoints, and the gradient statistics."""
        settings, is_main = self.settings, comm.is_main_process()
        states = ProcessStates(settings.checkpoint_period)

        def test() -> dict[str, Any]:
            self._last_eval_results = self.test(self.cfg, self.model)
            return self._last_eval_results

        return [
            build_gradient_statistics(self.model, settings.statistics_period, settings.output_dir),
            FolderIsThere(settings.output_dir) if is_main else None,
            FiniteWeights(settings.checkpoint_period),
            LengthEstimate() if is_main else None,
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._precise_bn(),  # changes the model, so that it comes before its checkpoint
            states,
            hooks.PeriodicCheckpointer(
                self.checkpointer,
                settings.checkpoint_period,
                max_to_keep=settings.checkpoints_kept,
            )
            if is_main
            else None,
            StopOnSignal(self.checkpointer, states),
            # After the checkpoint, which stands where the evaluation fails.
            hooks.EvalHook(settings.eval_period, test),
            # The writers come last, so that they see the results.
            hooks.PeriodicWriter(self.build_writers(), settings.log_period) if is_main else None,
        ]

    def _precise_bn(self) -> HookBase | None:
        """Detectron2's, which only YAML configs have."""
        if not isinstance(self.cfg, CfgNode) or not self.cfg.TEST.PRECISE_BN.ENABLED:
            return None
        if not get_bn_modules(self.model):
            return None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # a loader of its own, small, beside that of the training
        loader = self.build_train_loader(cfg)
        return hooks.PreciseBN(
            cfg.TEST.EVAL_PERIOD, self.model, loader, cfg.TEST.PRECISE_BN.NUM_ITER
        )

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's: the terminal, metrics.json and TensorBoard."""
        return default_writers(self.settings.output_dir, self.max_iter)

    def train(self) -> dict[str, Any] | None:
        """Detectron2's training loop.

        Returns:
            The results of the last evaluation; None without any.

        Raises:
            SystemExit: code 1; the results are not those that the config expects.
        """
        TrainerBase.train(self, self.start_iter, self.max_iter)
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
        """Of the last evaluation; None before."""
        return self._last_eval_results

    def _verified(self) -> dict[str, Any] | None:
        if comm.is_main_process() and self.results:
            verify_expected(self.settings, self.results)
        return self.results

    def resume_or_load(self, resume: bool = True) -> None:
        """Detectron2's; whether there is a checkpoint is what the main process finds."""
        resume = resume and of_main_process(self.checkpointer.has_checkpoint())
        self.checkpointer.resume_or_load(self.settings.weights, resume=resume)
        if resume:
            self.start_iter = self.iter + 1  # the checkpoint has the one that was finished

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Detectron2's; warns of a checkpoint that a training without `ProcessStates` has saved."""
        super().load_state_dict(state_dict)
        if ProcessStates.__qualname__ not in state_dict.get("hooks", {}):
            logger.warning(
                "the checkpoint holds no state of the processes: the order of images and random "
                "numbers start anew, and every process has the running counts of the main one"
            )

    @classmethod
    def build_model(cls, cfg: Config) -> nn.Module:
        """The model that the config describes, on its device."""
        if isinstance(cfg, CfgNode):
            return super().build_model(cfg)
        return python_build.build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's optimizer; see :func:`~ghm_d2.engine.clipping.build_optimizer`."""
        if isinstance(cfg, CfgNode):
            return build_optimizer(cfg, model)
        return python_build.build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: Config, optimizer: torch.optim.Optimizer) -> Any:
        """Detectron2's scheduler, or the multiplier from which its hook makes one."""
        if isinstance(cfg, CfgNode):
            return super().build_lr_scheduler(cfg, optimizer)
        return python_build.build_lr_scheduler(cfg)

    @classmethod
    def build_train_loader(cls, cfg: Config) -> Iterable[list[dict]]:
        """See :func:`~ghm_d2.data.loader.build_train_loader`; over images that can be read."""
        if isinstance(cfg, CfgNode):
            mapper = ReadableMapper(build_train_mapper(cfg), is_train=True)
            return build_train_loader(cfg, mapper)
        return python_build.build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: Config, dataset_name: str) -> Iterable[list[dict]]:
        """Detectron2's, over images that can be read."""
        if isinstance(cfg, CfgNode):
            mapper = ReadableMapper(cls.build_test_mapper(cfg), is_train=False)
            return workers.watch(build_detection_test_loader(cfg, dataset_name, mapper=mapper))
        return python_build.build_test_loader(cfg, dataset_name)

    @classmethod
    def build_test_mapper(cls, cfg: Config) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """From a dataset dict to what the model takes in a test."""
        if isinstance(cfg, CfgNode):
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
        results: dict[str, Any] = OrderedDict()
        # A run that is resumed behind an evaluation does not repeat it.
        with preserved(), costs_recorded(model) as timed, inference_context(model):
            for number, name in enumerate(settings.test):
                loader = cls.build_test_loader(cfg, name)
                evaluator = evaluators[number] if evaluators else cls.build_evaluator(cfg, name)
                with workers.watched():
                    results[name] = inference_on_dataset(timed, loader, evaluator)
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
        """The evaluator of a Python config, or that for the metadata's `evaluator_type`.

        Its files go to :meth:`~ghm_d2.run_folder.RunFolder.inference`.

        Raises:
            UserError: the data set is not one of boxes that these evaluators know.
        """
        settings = read_settings(cfg)
        folder = str(RunFolder(settings.output_dir).inference(dataset_name, settings.test))
        if not isinstance(cfg, CfgNode):
            return python_build.build_evaluator(cfg, dataset_name, folder)
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind == "coco":
            if cfg.MODEL.KEYPOINT_ON:
                convert_incomplete(MetadataCatalog.get(dataset_name))
            # A cached conversion would outlive a change of the data.
            return AllThresholdsCOCOEvaluator(
                dataset_name,
                output_dir=folder,
                allow_cached_coco=False,
                max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
                kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
            )
        if kind == "lvis":
            return LVISEvaluator(dataset_name, output_dir=folder)
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        raise UserError(
            f"{dataset_name} cannot be evaluated: its evaluator_type is {kind!r}, "
            f"not one of {', '.join(EVALUATOR_TYPES)}."
        )


def verify_expected(settings: Settings, results: dict[str, Any]) -> None:
    """Detectron2's `verify_results`.

    Raises:
        SystemExit: code 1; the results are not those that the config expects.
    """
    expected = [list(row) for row in settings.expected_results]
    verify_results(CfgNode({"TEST": {"EXPECTED_RESULTS": expected}}), results)
