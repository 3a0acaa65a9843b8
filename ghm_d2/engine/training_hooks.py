"""Which hooks a training has, and in which order."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules

from ghm_d2.analysis.hook import LossWeights, build_gradient_statistics

from .averaging import AveragedWeights
from .finite_weights import FiniteWeights
from .length import LengthEstimate
from .output_folder import FolderIsThere
from .preemption import StopOnSignal
from .process_states import ProcessStates
from .selection import BestCheckpointer, EarlyStopping, EvalHook


def build_hooks(trainer: Any) -> list[HookBase | None]:
    """Detectron2's hooks, those around its checkpoints, and those that the config asks for.

    Args:
        trainer: a :class:`~ghm_d2.engine.GHMTrainer`, whose `averaging` and `early_stopping` are
            set here.
    """
    settings, is_main = trainer.settings, comm.is_main_process()
    states = ProcessStates(settings.checkpoint_period)
    if settings.ema_decay:
        model = getattr(trainer.model, "module", trainer.model)
        trainer.averaging = AveragedWeights(model, settings.ema_decay)
        trainer.checkpointer.saved_model = trainer.averaging.model
    checkpointer = writer = None
    if is_main:
        checkpointer = hooks.PeriodicCheckpointer(
            trainer.checkpointer,
            settings.checkpoint_period,
            max_to_keep=settings.checkpoints_kept,
        )
        writer = hooks.PeriodicWriter(trainer.build_writers(), _log_period(settings))
    return [
        build_gradient_statistics(
            trainer.model,
            settings.statistics_period,
            settings.output_dir,
            settings.accumulation_steps,
        ),
        LossWeights(trainer.model, _log_period(settings)) if is_main else None,
        FolderIsThere(settings.output_dir) if is_main else None,
        FiniteWeights(settings.checkpoint_period),
        LengthEstimate() if is_main else None,
        hooks.IterationTimer(),
        hooks.LRScheduler(),
        _precise_bn(trainer),  # changes the model, so that it comes before its checkpoint
        trainer.averaging,
        states,
        checkpointer,
        StopOnSignal(trainer.checkpointer, states),
        # After the checkpoint, so that one exists even if the evaluation fails.
        *_evaluation_hooks(trainer, states),
        writer,  # comes last, so that it sees the results
    ]


def _log_period(settings: Any) -> int:
    """At most the evaluation period, or metrics.json would lack evaluations between its rows."""
    if (settings.selects or settings.validation_loss) and settings.eval_period:
        return min(settings.log_period, settings.eval_period)
    return settings.log_period


def _evaluation_hooks(trainer: Any, states: ProcessStates) -> list[HookBase | None]:
    settings, best = trainer.settings, None

    def save_best(name: str, **state: Any) -> None:
        trainer.checkpointer.save_weights(name, trainer.score_thresholds, **state)

    kind = EvalHook if settings.selects else hooks.EvalHook
    if settings.save_best:
        best = BestCheckpointer(settings, save_best)
    if settings.patience:
        trainer.early_stopping = EarlyStopping(settings, trainer.checkpointer, states)
    return [kind(settings.eval_period, trainer.evaluate_now), best, trainer.early_stopping]


def _precise_bn(trainer: Any) -> HookBase | None:
    """Detectron2's, which only YAML configs have."""
    cfg = trainer.cfg
    if not isinstance(cfg, CfgNode) or not cfg.TEST.PRECISE_BN.ENABLED:
        return None
    if not get_bn_modules(trainer.model):
        return None
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0  # this second loader must not start as many workers again
    loader = trainer.build_train_loader(cfg)
    return hooks.PreciseBN(
        cfg.TEST.EVAL_PERIOD, trainer.model, loader, cfg.TEST.PRECISE_BN.NUM_ITER
    )
