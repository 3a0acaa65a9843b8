"""What a finished training says about itself: where everything lies, and two pictures."""

import argparse
import logging
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ghm_d2.engine.arguments import train_program
from ghm_d2.engine.pictures import draw_predictions, plot_training

__all__ = ["ap_table", "next_command", "summarize_training"]

logger = logging.getLogger(__name__)


def summarize_training(trainer: DefaultTrainer, args: argparse.Namespace, seconds: float) -> None:
    """Draw the pictures and print the summary; on the main process alone.

    Nothing here makes a finished training fail: what cannot be drawn is a warning.

    Args:
        trainer: after `train()`.
        args: the command line of the training.
        seconds: how long it took.
    """
    cfg = trainer.cfg
    output = Path(cfg.OUTPUT_DIR)
    pictures = output / "pictures"
    model = getattr(trainer.model, "module", trainer.model)
    _try(lambda: draw_predictions(cfg, model, pictures / "predictions.png"), "predictions")
    _try(lambda: plot_training(output / "metrics.json", pictures / "training.png"), "curves")

    lines = [
        ("checkpoint", output / "model_final.pth"),
        ("metrics", output / "metrics.json"),
        ("config", output / "config.yaml"),
        ("predictions", pictures / "predictions.png"),
        ("curves", pictures / "training.png"),
    ]
    done = f"Trained to iteration {trainer.max_iter} in {_duration(seconds)}"
    print(f"\n{done}, evaluation and pictures included.")
    results = getattr(trainer, "_last_eval_results", None)
    if results:
        print(ap_table(results))
    for name, path in lines:
        if path.exists():
            print(f"  {name:<12} {path}")
    if cfg.DATASETS.TEST:
        print(f"Evaluate it again:\n  {next_command(cfg, args)}", flush=True)
    else:
        print("Nothing was evaluated: give a second --dataset to test on.", flush=True)


def ap_table(results: dict[str, Any]) -> str:
    """The box AP of an evaluation, one row a figure: all classes first, then each class.

    Args:
        results: what ``trainer.test`` returns: ``{"bbox": {name: percent}}``, or that for each
            data set.
    """
    sets = {"": results} if "bbox" in results else results
    lines = []
    for name, result in sets.items():
        lines += [f"  {name}"] if name else []
        rows = [
            f"  {metric:<14}{value:6.1f}"
            for metric, value in result.get("bbox", {}).items()
            if not math.isnan(value)  # COCO's area classes may hold no object
        ]
        lines += rows or ["  AP: nothing was detected"]
    return "\n".join(lines)


def next_command(cfg: CfgNode, args: argparse.Namespace) -> str:
    """The command that evaluates the final checkpoint: its config.yaml holds every KEY VALUE."""
    program = train_program()
    # An installed command starts its own Python.
    words = [_python(), program] if program.endswith(".py") else [program]
    words += ["--config-file", os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "--eval-only"]
    for text in args.dataset:
        if text.partition("=")[0] in cfg.DATASETS.TEST:
            words += ["--dataset", text]
    words += ["MODEL.WEIGHTS", os.path.join(cfg.OUTPUT_DIR, "model_final.pth")]
    return shlex.join(words)


def _python() -> str:
    """What to type for this interpreter: make does not activate the environment that it uses."""
    found = shutil.which("python")
    return "python" if found == sys.executable else os.path.relpath(sys.executable)


def _try(draw: Callable[[], None], what: str) -> None:
    try:
        draw()
    except Exception as error:  # whatever it is, the training is done and its result counts
        logger.warning("the picture of the %s could not be drawn: %r", what, error)


def _duration(seconds: float) -> str:
    minutes = int(seconds) // 60
    hours = f"{minutes // 60} h {minutes % 60:02d} min"
    return hours if minutes >= 60 else f"{minutes} min {int(seconds) % 60:02d} s"
