"""The trainer: Detectron2's, with evaluators, global clipping and several processes on CPUs."""

import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ghm_d2.analysis.hook import build_gradient_statistics
from ghm_d2.checkpoint import RestrictedCheckpointer
from ghm_d2.data.loader import build_test_mapper, build_train_loader
from ghm_d2.data.readable import ReadableMapper
from ghm_d2.engine.agreement import of_main_process
from ghm_d2.engine.clipping import build_optimizer
from ghm_d2.engine.evaluation import AllThresholdsCOCOEvaluator, costs_recorded
from ghm_d2.engine.finite import FiniteCheck, FiniteWeights, WithoutTracebacks
from ghm_d2.engine.preemption import StopOnSigterm
from ghm_d2.engine.process_states import ProcessStates
from ghm_d2.engine.step import CheckedAMPTrainer, CheckedTrainer
from ghm_d2.errors import UserError
from ghm_d2.randomness import preserved
from ghm_d2.run_folder import RunFolder

__all__ = ["EVALUATOR_TYPES", "GHMTrainer"]

logger = logging.getLogger(__name__)

EVALUATOR_TYPES = ("coco", "lvis", "pascal_voc")

_WITHOUT_TRACEBACKS = WithoutTracebacks()


class GHMTrainer(DefaultTrainer):
    """`DefaultTrainer` with an evaluator for each box data set and `full_model` clipping."""

    def __init__(self, cfg: CfgNode) -> None:
        """Builds what `DefaultTrainer` builds, around a step and a checkpointer of our own.

        Args:
            cfg: config of the training.
        """
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        # In the order of DefaultTrainer, which draws the same random numbers.
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        # A CPU model must not have device_ids, which Detectron2 gives where none are.
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        options = {"device_ids": None} if on_cpu else {}
        model = create_ddp_model(model, broadcast_buffers=False, **options)
        step = CheckedAMPTrainer if cfg.SOLVER.AMP.ENABLED else CheckedTrainer
        self._trainer = step(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RestrictedCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self._trainer.check = FiniteCheck(
            cfg,
            model,
            self.checkpointer.get_checkpoint_file,
            getattr(self._trainer, "precision", None),
        )
        logging.getLogger("detectron2.engine.train_loop").addFilter(_WITHOUT_TRACEBACKS)
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, those around its checkpoints, and the gradient statistics."""
        stock = super().build_hooks()
        # Before evaluation and logs; the main process alone saves.
        place = next(i for i, hook in enumerate(stock) if isinstance(hook, hooks.EvalHook))
        place -= comm.is_main_process()
        states = ProcessStates(self.cfg.SOLVER.CHECKPOINT_PERIOD)
        stop = StopOnSigterm(self.checkpointer, states)
        stock.insert(place, states)
        stock.insert(place + 1 + comm.is_main_process(), stop)
        statistics = build_gradient_statistics(self.cfg, self.model)
        return [statistics, FiniteWeights(self.cfg.SOLVER.CHECKPOINT_PERIOD), *stock]

    def resume_or_load(self, resume: bool = True) -> None:
        """Detectron2's; whether there is a checkpoint is what the main process finds."""
        super().resume_or_load(resume and of_main_process(self.checkpointer.has_checkpoint()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Detectron2's; warns of a checkpoint that a training without `ProcessStates` has saved."""
        super().load_state_dict(state_dict)
        if ProcessStates.__qualname__ not in state_dict.get("hooks", {}):
            logger.warning(
                "the checkpoint holds no state of the processes: the order of images and random "
                "numbers start anew, and every process has the running counts of the main one"
            )

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        """See :func:`~ghm_d2.data.loader.build_train_loader`; over images that can be read."""
        return build_train_loader(cfg, ReadableMapper(DatasetMapper(cfg, True), is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        """Detectron2's, over images that can be read."""
        mapper = ReadableMapper(build_test_mapper(cfg), is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Detectron2's optimizer; see :func:`build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: torch.nn.Module,
        evaluators: list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Detectron2's evaluation; its figures also go to OUTPUT_DIR/inference/results.json.

        The file maps "TASK/FIGURE", after "NAME/" where there are several data sets, to a number,
        or to null where there is none.
        """
        # A run that is resumed behind an evaluation does not repeat it.
        with preserved(), costs_recorded(model):
            results = super().test(cfg, model, evaluators)
        if comm.is_main_process() and results:
            RunFolder(cfg.OUTPUT_DIR).write_results(flatten_results_dict(results))
        return results

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The evaluator for the metadata's `evaluator_type`, one of `EVALUATOR_TYPES`.

        Its files go to :meth:`~ghm_d2.run_folder.RunFolder.inference`.

        Raises:
            UserError: the data set is not one of boxes that these evaluators know.
        """
        folder = str(RunFolder(cfg.OUTPUT_DIR).inference(dataset_name, cfg.DATASETS.TEST))
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind == "coco":
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
