"""What one process does with a Python config: train or evaluate."""

import copy
import os
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ghm_d2.analysis.hook import FILE, GradientStatistics
from ghm_d2.checkpoint import RestrictedCheckpointer, load_trained_weights
from ghm_d2.engine.clipping import clip_gradients
from ghm_d2.engine.pictures import plot_training
from ghm_d2.engine.submission import report_submissions
from ghm_d2.engine.summary import ap_table
from ghm_d2.errors import UserError
from ghm_d2.run_folder import RunFolder

from .plan import stock_view, test_sets

__all__ = ["evaluate", "evaluate_only", "train"]


def train(cfg: DictConfig, *, resume: bool) -> None:
    """Trains, evaluates, and says where everything lies.

    Args:
        cfg: a config with the plan applied.
        resume: go on from the last checkpoint in ``train.output_dir``.

    Raises:
        UserError: weights that cannot be loaded, a wrong argument of a call, or nothing left to do.
    """
    start = time.perf_counter()
    settings = cfg.train
    model = _build(cfg.model, "model").to(settings.device)
    cfg.optimizer.params.model = model
    optimizer = _build(cfg.optimizer, "optimizer")
    if clip := settings.get("clip_gradients"):
        clip_gradients(optimizer, clip.max_norm, clip.norm_type)
    loader = _build(cfg.dataloader.train, "dataloader.train")
    on_cpu = {"device_ids": None} if torch.device(settings.device).type == "cpu" else {}
    model = create_ddp_model(model, **on_cpu, **settings.ddp)
    trainer = (AMPTrainer if settings.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = RestrictedCheckpointer(model, settings.output_dir, trainer=trainer)
    results: dict[str, Any] = {}
    trainer.register_hooks(_hooks(cfg, model, checkpointer, results))
    checkpointer.resume_or_load(settings.init_checkpoint or "", resume=resume)
    first = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    if first >= settings.max_iter:
        raise UserError(
            f"--resume: {first} iterations are done already and train.max_iter is "
            f"{settings.max_iter}: give a larger one, or evaluate with --eval-only --resume."
        )
    trainer.train(first, settings.max_iter)
    if comm.is_main_process():
        _summarize(Path(settings.output_dir), results, time.perf_counter() - start)


def evaluate_only(cfg: DictConfig, *, resume: bool) -> None:
    """Evaluates ``train.init_checkpoint``, or with ``resume`` the last one in the output folder.

    Raises:
        UserError: the weights cannot be loaded or do not fit.
    """
    model = _build(cfg.model, "model").to(cfg.train.device)
    view = stock_view(cfg)
    load_trained_weights(view, model, resume)
    results = evaluate(cfg, model)
    if comm.is_main_process():
        report_submissions(view, results)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """The results of every test set: ``{"bbox": {figure: per cent}}``, or that for each name."""
    names = test_sets(cfg)
    results = {}
    for name in names:
        loader = copy.deepcopy(cfg.dataloader)
        loader._set_parent(cfg)  # its interpolations reach into the rest of the config
        loader.test.dataset.names = name
        if len(names) > 1 and "output_dir" in loader.evaluator:
            loader.evaluator.output_dir = os.path.join(loader.evaluator.output_dir, name)
        results[name] = inference_on_dataset(
            model,
            _build(loader.test, "dataloader.test"),
            _build(loader.evaluator, "dataloader.evaluator"),
        )
        if comm.is_main_process():
            print_csv_format(results[name])
    return results if len(names) != 1 else results[names[0]]


def _build(node: DictConfig, key: str) -> Any:
    """Calls what a node describes; an argument that does not exist or fit is a mistake of the user.

    Raises:
        UserError: TypeError, ValueError or ImportError of the call.
    """
    try:
        return instantiate(node)
    except (TypeError, ValueError, ImportError) as error:
        message = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{key} cannot be built: {message}.") from error


def _hooks(
    cfg: DictConfig, model: nn.Module, checkpointer: RestrictedCheckpointer, results: dict[str, Any]
) -> list[hooks.HookBase | None]:
    settings = cfg.train

    def test() -> dict[str, Any]:
        results.clear()
        results.update(evaluate(cfg, model))
        return dict(results)

    main = comm.is_main_process()
    statistics = None
    if main and (period := settings.get("statistics_period")):
        statistics = GradientStatistics(model, period, os.path.join(settings.output_dir, FILE))
    return [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=_build(cfg.lr_multiplier, "lr_multiplier")),
        statistics if statistics and statistics.losses else None,
        hooks.PeriodicCheckpointer(checkpointer, **settings.checkpointer) if main else None,
        hooks.EvalHook(settings.eval_period, test) if test_sets(cfg) else None,
        hooks.PeriodicWriter(
            default_writers(settings.output_dir, settings.max_iter), period=settings.log_period
        )
        if main
        else None,
    ]


def _summarize(output: Path, results: dict[str, Any], seconds: float) -> None:
    print(f"\nTrained in {seconds / 60:.1f} min, evaluation included.")
    if results:
        print(ap_table(results))
    curves = output / "pictures" / "training.png"
    plot_training(RunFolder(output).metrics, curves)
    for name, path in (
        ("checkpoint", output / "model_final.pth"),
        ("metrics", output / "metrics.json"),
        ("config", output / "config.yaml"),
        ("curves", curves),
    ):
        if path.exists():
            print(f"  {name:<12} {path}")
