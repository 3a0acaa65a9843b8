"""Makes the page from the files of a training."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.config import get_cfg
from jinja2 import Environment, PackageLoader, StrictUndefined
from tqdm import tqdm

from ghm_d2.config import add_ghm_config
from ghm_d2.errors import UserError, shown
from ghm_d2.files import write_text

from .charts import draw_confusion, draw_curves, draw_gradients, draw_precision
from .evaluation import Evaluation, evaluate
from .examples import best_and_worst
from .run_files import RunFiles, read_run

_HEADLINE = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_LONGEST_LINE = 2000
# With fewer iterations or passes, a training is called short; COCO's 1x schedule has 12 passes.
_SHORT, _FEW_PASSES = 500, 5


def write_report(
    folder: Path,
    file: Path,
    datasets: Mapping[str, tuple[Path, Path]] | None = None,
    images: int = 6,
) -> list[str]:
    """Writes the page about a training.

    Args:
        folder: OUTPUT_DIR of the training.
        file: HTML file to write.
        datasets: name to annotation file and image folder of data sets that have been moved.
        images: how many best and how many worst images to show.

    Returns:
        One sentence for each thing that the page does not show; they stand on it too.

    Raises:
        UserError: there is no training in the folder, or the page cannot be written.
    """
    run = read_run(folder, datasets or {})
    steps = tqdm(total=2 + len(run.test_sets), desc="report", unit="part", delay=2)
    context = {
        "title": folder.resolve().name,
        "python": run.settings.python,
        "summary": _summary(run),
        "note": _note(run),
        "headline": _headline(run),
        "differences": [] if run.settings.python else differences(run.settings.tree),
        "config": run.config,
        "curves": draw_curves(run.metrics),
        "environment": _environment(run),
    }
    steps.update()
    context["gradients"] = _gradients(run)
    steps.update()
    context["evaluations"] = []
    for data in run.test_sets:
        try:
            context["evaluations"].append(_evaluation(evaluate(data), data.images, images, run))
        except UserError as error:
            run.missing.append(f"AP by class, images: {str(error).rstrip('.')}")
        steps.update()
    steps.close()
    context["missing"] = run.missing
    # Names of classes and files may hold markup and control characters.
    environment = Environment(
        loader=PackageLoader("ghm_d2.report", "."),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(context)
    write_text(file, text)
    return run.missing


def _visible(value: Any) -> Any:
    """Text without control characters; pictures unchanged, as `shown` would shorten them."""
    if not isinstance(value, str) or value.startswith("data:image/"):
        return value
    return "\n".join(shown(line, _LONGEST_LINE) for line in value.split("\n"))


def differences(settings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Every key whose value is not the default of Detectron2 or this package.

    Args:
        settings: a config as nested dictionaries.

    Returns:
        (key, value, default) as text, in the order of the config; the default is empty where this
        version has no such key.
    """

    def text(value: Any) -> str:
        return '""' if value == "" else shown(value)

    cfg = get_cfg()
    add_ghm_config(cfg)
    defaults = dict(_leaves(yaml.safe_load(cfg.dump())))
    return [
        (key, text(value), text(defaults[key]) if key in defaults else "")
        for key, value in _leaves(settings)
        if key not in defaults or defaults[key] != value
    ]


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _summary(run: RunFiles) -> list[tuple[str, str]]:
    settings = run.settings
    done = run.files.iterations_done() if run.metrics else 0
    seconds = run.files.seconds_per_iteration() if run.metrics else None
    passes = _passes(run, done)
    iterations = f"{done} of {settings.iterations}" if done and settings.iterations else None
    if iterations and passes:
        iterations += f", {passes:.3g} passes over the training images"
    known = {
        "detector": settings.detector,
        "trained on": ", ".join(_counted(name, run.record.data) for name in settings.train),
        "tested on": ", ".join(settings.test),
        "iterations": iterations,
        "time per iteration": f"{seconds:.3g} s (median)" if seconds else None,
        "on": run.record.hardware,
        "date": run.record.date,
    }
    return [(name, value) for name, value in known.items() if value]


def _counted(name: str, data: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of a data set, with its counts where the training has noted them."""
    known = data.get(name, {})
    counts = [f"{known[k]:,} {k}" for k in ("images", "annotations") if type(known.get(k)) is int]
    return f"{name} ({', '.join(counts).replace('annotations', 'objects')})" if counts else name


def _passes(run: RunFiles, done: int) -> float | None:
    """How often the training has seen each image so far; None where that is not known."""
    images = [run.record.data.get(name, {}).get("images") for name in run.settings.train]
    batch = run.settings.images_per_batch
    if not (done and batch and images and all(type(n) is int and n > 0 for n in images)):
        return None
    return done * batch / sum(images)


def _note(run: RunFiles) -> str:
    """What to think of the figures of a short training; "" for others."""
    done = run.files.iterations_done() if run.metrics else 0
    passes = _passes(run, done)
    if not done or done >= _SHORT and (passes is None or passes >= _FEW_PASSES):
        return ""
    seen = f", in which each image was seen {passes:.2g} times" if passes is not None else ""
    return (
        f"This training is short: {done} iterations{seen}. A detector usually needs some ten "
        "passes and a thousand iterations or more; until then AP, thresholds and confusions say "
        "little about what it could learn."
    )


def _headline(run: RunFiles) -> list[tuple[str, list[tuple[str, str]]]]:
    """(data set, its figures) of the last evaluation; the name is empty where there is one."""
    sets: dict[str, dict[str, str]] = {}
    for key, value in run.results.items():
        name, _, figure = key.rpartition("bbox/")
        if figure in _HEADLINE:
            sets.setdefault(name.rstrip("/"), {})[figure] = _figure(value)
    return [(name, [(f, row[f]) for f in _HEADLINE if f in row]) for name, row in sets.items()]


def _gradients(run: RunFiles) -> list[tuple[str, list[tuple[str, str]]]]:
    charts = []
    for name, rows in run.statistics.items():
        try:
            charts.append((name, draw_gradients(rows)))
        except ValueError:  # the number of regions changed during the training
            run.missing.append(f"gradient histograms of {name}: the rows do not fit each other")
    return charts


def _evaluation(result: Evaluation, folder: Path, images: int, run: RunFiles) -> dict[str, Any]:
    best, worst, unreadable = best_and_worst(result, folder, images)
    if unreadable:
        run.missing.append(f"{len(unreadable)} images of {result.name}; the first: {unreadable[0]}")
    trained = [shown(name, limit=1000) for name in run.record.classes]
    if trained and trained != result.classes:
        run.missing.append(
            f"names of classes: {result.name} has others than the training, or another order; the "
            "names in the annotations are shown"
        )
    order = np.argsort(-result.objects, kind="stable")
    with np.errstate(invalid="ignore"):
        rows = [
            (result.classes[k], int(result.objects[k]), _figure(np.mean(result.ap[:, k])),
             [_figure(value) for value in result.ap[:, k]])
            for k in order
        ]  # fmt: skip
        known = result.ap[:, ~np.isnan(result.ap[0])]
        means = [_figure(row.mean()) if row.size else "–" for row in known]
        mean = _figure(known.mean()) if known.size else "–"
    return {
        "name": result.name,
        "thresholds": [f"{threshold:.2f}".lstrip("0") for threshold in result.thresholds],
        "rows": rows,
        "mean": (int(result.objects.sum()), mean, means),
        "at_threshold": _at_threshold(result, order),
        "confusion": draw_confusion(result),
        "precision": draw_precision(result),
        "classes": len(result.classes),
        "threshold": f"{result.score_threshold:.3f}",
        "images": len(result.images),
        "number": result.number,
        "examples": [("Best images", best), ("Worst images", worst)],
    }


def _at_threshold(result: Evaluation, order: np.ndarray) -> list[tuple[Any, ...]]:
    """Rows of the table: name, found, false, missed, precision, recall, and the class's own score.

    The first is that of all classes together.
    """
    counts = np.stack([result.found, result.false, result.missed])
    precision, recall = result.precision_at_threshold, result.recall_at_threshold
    found, false, missed = counts.sum(1)
    total = [100 * found / n if n else math.nan for n in (found + false, found + missed)]
    rows = [("all classes", found, false, missed, *map(_figure, total), "")]
    for k in order:
        own = result.class_thresholds[k]
        figures = (_figure(precision[k]), _figure(recall[k]))
        score = "–" if math.isnan(own) else f"{own:.2f}"
        rows.append((result.classes[k], *counts[:, k], *figures, score))
    return rows


def _figure(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    record = run.record
    rows = [
        ("folder", os.path.abspath(run.files.folder)),
        ("config file", record.config_file),
        ("hardware", record.hardware),
        *record.versions.items(),
        ("commit", record.commit),
    ]
    for name, paths in record.datasets.items():
        rows.append((f"data set {name}", ", ".join(map(str, paths))))
    return [(name, value) for name, value in rows if value]
