"""What a finished training says about itself: where everything lies, and two pictures."""

import logging
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ghm_d2.data import CocoDataset
from ghm_d2.errors import reason, shown
from ghm_d2.run_folder import CONFIG, FINAL_CHECKPOINT, METRICS, RunFolder

from .pictures import plot_training

__all__ = ["ap_table", "next_command", "summarize_training"]

logger = logging.getLogger(__name__)


def summarize_training(
    run: RunFolder,
    draw: Callable[[Path], None],
    results: Mapping[str, Any] | None,
    command: str | None,
    *,
    iterations: int,
    seconds: float,
) -> None:
    """Draw the pictures and print the summary; on the main process alone.

    Nothing here makes a finished training fail: what cannot be drawn is a warning.

    Args:
        run: its OUTPUT_DIR.
        draw: draws predictions to a file.
        results: of the last evaluation, see :func:`ap_table`; None where there was none.
        command: that evaluates the final checkpoint again; None where there is no test data.
        iterations: how many the training has done.
        seconds: how long it took.
    """
    pictures = run.folder / "pictures"
    lines = [
        ("checkpoint", run.folder / FINAL_CHECKPOINT),
        ("metrics", run.folder / METRICS),
        ("config", run.folder / CONFIG),
        ("predictions", pictures / "predictions.png"),
        ("curves", pictures / "training.png"),
    ]
    _try(lambda: draw(lines[3][1]), "predictions")
    _try(lambda: plot_training(run.metrics, lines[4][1]), "curves")

    done = f"Trained to iteration {iterations} in {_duration(seconds)}"
    print(f"\n{done}, evaluation and pictures included.")
    if results:
        print(ap_table(results))
    for name, path in lines:
        if path.exists():
            print(f"  {name:<12} {shown(path)}")
    if command:
        print(f"Evaluate it again:\n  {command}", flush=True)
    else:
        print("Nothing was evaluated: give a second --dataset to test on.", flush=True)


def ap_table(results: Mapping[str, Any]) -> str:
    """The box AP of an evaluation, one row a figure: all classes first, then each class.

    Args:
        results: what `trainer.test` returns: `{"bbox": {name: percent}}`, or that for each
            data set.
    """
    sets = {"": results} if "bbox" in results else results
    lines = []
    for name, result in sets.items():
        lines += [f"  {shown(name)}"] if name else []
        rows = [
            f"  {shown(metric, 60):<14}{value:6.1f}"
            for metric, value in result.get("bbox", {}).items()
            if not math.isnan(value)  # COCO's area classes may hold no object
        ]
        lines += rows or ["  AP: nothing was detected"]
    return "\n".join(lines)


def next_command(
    program: str, config_file: str, overrides: Iterable[str], datasets: Iterable[CocoDataset]
) -> str:
    """The command that evaluates a checkpoint.

    Args:
        program: what the user runs to train.
        config_file: of the evaluation.
        overrides: of the config, the weights among them.
        datasets: the test sets that the command line registered.
    """
    # An installed command starts its own Python.
    words = [_python(), program] if program.endswith(".py") else program.split()
    words += ["--config-file", config_file, "--eval-only"]
    for data in datasets:
        words += ["--dataset", str(data)]
    return shlex.join([*words, *overrides])


def _python() -> str:
    """What to type for this interpreter: make does not activate the environment that it uses."""
    found = shutil.which("python")
    return "python" if found == sys.executable else os.path.relpath(sys.executable)


def _try(draw: Callable[[], None], what: str) -> None:
    try:
        draw()
    except Exception as error:  # whatever it is, the training is done and its result counts
        text = f"{type(error).__name__}: {reason(error)}"
        logger.warning("the picture of the %s could not be drawn (%s)", what, text)


def _duration(seconds: float) -> str:
    minutes = int(seconds) // 60
    hours = f"{minutes // 60} h {minutes % 60:02d} min"
    return hours if minutes >= 60 else f"{minutes} min {int(seconds) % 60:02d} s"
