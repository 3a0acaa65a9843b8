"""What a finished training says about itself: where everything lies, pictures, what to do next."""

import logging
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ghm_d2 import errors
from ghm_d2.data import CocoDataset
from ghm_d2.errors import described, shown
from ghm_d2.run_folder import BEST_CHECKPOINT, BEST_F1, CONFIG, FINAL_CHECKPOINT, METRICS, RunFolder

from .arguments import Command, train_program
from .pictures import plot_training
from .processes import started_by_torchrun
from .settings import Config, pair, read_settings

logger = logging.getLogger(__name__)

_OVERALL = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_MOST_CLASSES = 20  # as many as fit on a screen


def summarize_training(
    run: RunFolder,
    draw: Callable[[Path], None],
    results: Mapping[str, Any] | None,
    commands: Mapping[str, str],
    *,
    iterations: int,
    seconds: float,
    note: str = "",
    tested: bool = False,
) -> None:
    """Draw the pictures and print the summary; on the main process alone.

    Nothing here makes a finished training fail: what cannot be drawn is a warning.

    Args:
        run: its OUTPUT_DIR.
        draw: draws predictions to a file.
        results: of the last evaluation, see :func:`ap_table`; None where there was none.
        commands: what to do next, by a heading; see :func:`next_commands`.
        iterations: how many the training has done.
        seconds: how long it took.
        note: why it has stopped before its last iteration.
        tested: whether there is test data, which may be without ground truth.
    """
    pictures = run.folder / "pictures"
    lines = [
        ("checkpoint", run.folder / FINAL_CHECKPOINT),
        ("best model", run.folder / BEST_CHECKPOINT),
        ("metrics", run.folder / METRICS),
        ("config", run.folder / CONFIG),
        ("predictions", pictures / "predictions.png"),
        ("curves", pictures / "training.png"),
    ]
    _try(lambda: draw(pictures / "predictions.png"), "predictions")
    _try(lambda: plot_training(run.metrics, pictures / "training.png"), "curves")

    done = f"Trained to iteration {iterations} in {_duration(seconds)}"
    print(f"\n{done}, evaluation and pictures included.")
    if note:
        print(f"It stopped early: {note}.")
    if results:
        print(ap_table(results))
    elif not tested:
        print("Nothing was evaluated: give a second --dataset to test on.")
    for name, path in lines:
        if path.exists():
            print(f"  {name:<12} {shown(path)}")
    for heading, command in commands.items():
        print(f"{heading}:\n  {command}")
    sys.stdout.flush()


def ap_table(results: Mapping[str, Any]) -> str:
    """The box AP of an evaluation: over all classes, where its F1 is the best, and by class.

    Args:
        results: what `trainer.test` returns: `{"bbox": {name: percent}}`, or that for each
            data set.
    """
    lines = []
    for name, result in ({"": results} if "bbox" in results else results).items():
        lines += [f"  {shown(name)}"] if name else []
        lines += _overall(result) or ["  AP: nothing was detected"]
        lines += _by_class(result)
    return "\n".join(lines)


def _overall(result: Mapping[str, Any]) -> list[str]:
    # COCO's area classes may hold no object.
    figures = {k: v for k, v in result.get("bbox", {}).items() if not math.isnan(v)}
    known = [f"{name} {figures[name]:.1f}" for name in _OVERALL if name in figures]
    lines = [f"  {'   '.join(known)}"] if known else []
    best = result.get(BEST_F1, {})
    if math.isfinite(best.get("F1", math.nan)):
        lines.append(
            f"  best F1 {best['F1']:.1f}, of detections with a score of at least "
            f"{best['score_threshold']:.2f}: precision {best['precision']:.1f}, recall "
            f"{best['recall']:.1f}"
        )
    return lines


def _by_class(result: Mapping[str, Any]) -> list[str]:
    best = result.get(BEST_F1, {})
    found = {k[3:]: v for k, v in result.get("bbox", {}).items() if k.startswith("AP-")}
    if not found:
        return []
    rows = [("class", "AP", "best F1", "from score")]
    for name, ap in list(found.items())[:_MOST_CLASSES]:
        f1, score = (best.get(f"{x}-{name}", math.nan) for x in ("F1", "score_threshold"))
        figures = (f"{ap:.1f}", f"{f1:.1f}", f"{score:.2f}")
        rows.append((shown(name, 40), *("-" if x == "nan" else x for x in figures)))
    wide = max(len(row[0]) for row in rows)
    lines = [f"  {row[0]:<{wide}}  {row[1]:>6}  {row[2]:>7}  {row[3]:>10}" for row in rows]
    more = len(found) - _MOST_CLASSES
    return lines + [f"  and {more} more classes in inference/results.json"] * (more > 0)


def next_commands(
    cfg: Config, run: RunFolder, datasets: Sequence[CocoDataset], command: Command, done: int
) -> dict[str, str]:
    """Whole commands that go on with a finished training, by what they do.

    Args:
        cfg: of the training.
        run: its OUTPUT_DIR.
        datasets: those of the command line.
        command: the one that ran the training.
        done: number of iterations done.
    """
    settings = read_settings(cfg)
    tested = [dataset for dataset in datasets if dataset.name in settings.test] or datasets[:1]
    names = [str(data) for data in tested]
    options = ["--config-file", str(run.folder / CONFIG)]
    weights = _words(cfg, "weights", run.weights())
    if not isinstance(cfg, CfgNode):  # a saved Python config may not be loadable
        options = ["--config-file", command.config_file]
        weights = [*command.overrides, *weights]
    options += [word for name in names for word in ("--dataset", name)]
    images = MetadataCatalog.get((*settings.test, *settings.train)[0]).get("image_root")
    found = {}
    if images:
        found["Predict on images or videos"] = _line(
            "predict", *options, "--input", images, "--output", run.folder / "predicted", *weights
        )
    found["All of it on one page"] = _line("report", run.folder)
    if settings.test:
        found["Evaluate it again"] = _line("train", *options, "--eval-only", *weights)
    words = [word for word in command.words if word not in ("--resume", "--overwrite")]
    longer = _words(cfg, "max_iter", 2 * settings.max_iter)
    if done < settings.max_iter:
        longer = _words(cfg, "patience", 2 * settings.patience)
    found["Train it further"] = _line("train", *words, "--resume", *longer)
    return found


def _words(cfg: Config, name: str, value: Any) -> list[str]:
    text = pair(cfg, name, value)
    return text.split(" ", 1) if isinstance(cfg, CfgNode) else [text]


def _line(name: str, *words: Any) -> str:
    """A command of this project as its user would type it."""
    program = train_program() if name == "train" else errors.command(name)
    start = program.split()
    if program.endswith(".py"):
        start = [_python(), sys.argv[0] if sys.argv[0].endswith(program) else program]
        if started_by_torchrun():
            start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], start[1]]
    elif start[0] == "python":
        start[0] = _python()
    return shlex.join([*start, *map(str, words)])


def _python() -> str:
    """What to type for this interpreter: make does not activate the environment that it uses."""
    found = shutil.which("python")
    return "python" if found == sys.executable else os.path.relpath(sys.executable)


def _try(draw: Callable[[], None], what: str) -> None:
    try:
        draw()
    except Exception as error:  # whatever it is, the training is done and its result counts
        text = described(error)
        logger.warning("the picture of the %s could not be drawn (%s)", what, text)


def _duration(seconds: float) -> str:
    minutes = int(seconds) // 60
    hours = f"{minutes // 60} h {minutes % 60:02d} min"
    return hours if minutes >= 60 else f"{minutes} min {int(seconds) % 60:02d} s"
