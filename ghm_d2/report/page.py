"""From the files of a training to the page."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from tqdm import tqdm

from ghm_d2.errors import UserError
from ghm_d2.report.charts import draw_curves, draw_gradients, draw_precision
from ghm_d2.report.evaluation import Evaluation, evaluate
from ghm_d2.report.examples import best_and_worst
from ghm_d2.report.run_files import RunFiles, read_run
from ghm_d2.report.settings import differences

__all__ = ["write_report"]

_HEADLINE = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def write_report(
    folder: Path,
    file: Path,
    datasets: Mapping[str, tuple[Path, Path]] | None = None,
    images: int = 6,
) -> list[str]:
    """Write the page about a training.

    Args:
        folder: OUTPUT_DIR of the training.
        file: HTML file to write.
        datasets: annotation file and image folder of data sets whose recorded place is wrong.
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
        "summary": _summary(run),
        "headline": _headline(run),
        "differences": differences(run.settings) if run.settings else [],
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
            result = evaluate(data)
        except (OSError, ValueError) as error:
            run.missing.append(f"AP by class, images: {error}")
        else:
            context["evaluations"].append(_evaluation(result, images, run))
        steps.update()
    steps.close()
    context["missing"] = run.missing
    # Names of classes and files may hold anything.
    environment = Environment(
        loader=PackageLoader("ghm_d2.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(context)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"the page {file} cannot be written ({error.strerror}).") from error
    return run.missing


def _summary(run: RunFiles) -> list[tuple[str, str]]:
    settings = run.settings
    datasets, model = settings.get("DATASETS") or {}, settings.get("MODEL") or {}
    done = max((i for i, row in run.metrics.items() if "total_loss" in row), default=None)
    planned = (settings.get("SOLVER") or {}).get("MAX_ITER")
    seconds = [row["time"] for row in run.metrics.values() if "time" in row]
    known = {
        "detector": model.get("META_ARCHITECTURE"),
        "trained on": ", ".join(map(str, datasets.get("TRAIN") or ())),
        "tested on": ", ".join(map(str, datasets.get("TEST") or ())),
        "iterations": f"{done + 1} of {planned}" if done is not None and planned else None,
        "time per iteration": f"{np.median(seconds):.3g} s (median)" if seconds else None,
        "on": run.record.get("hardware"),
        "date": run.record.get("date"),
    }
    return [(name, str(value)) for name, value in known.items() if value]


def _headline(run: RunFiles) -> list[tuple[str, list[tuple[str, str]]]]:
    """(data set, its figures) of the last evaluation; the name is empty where there is one."""
    sets: dict[str, dict[str, str]] = {}
    for key, value in run.results.items():
        name, _, figure = key.rpartition("bbox/")
        if figure in _HEADLINE:
            shown = f"{value:.1f}" if isinstance(value, int | float) else "–"
            sets.setdefault(name.rstrip("/"), {})[figure] = shown
    return [(name, [(f, row[f]) for f in _HEADLINE if f in row]) for name, row in sets.items()]


def _gradients(run: RunFiles) -> list[tuple[str, list[tuple[str, str]]]]:
    charts = []
    for name, rows in run.statistics.items():
        try:
            charts.append((name, draw_gradients(rows)))
        except (KeyError, TypeError, ValueError) as error:
            run.missing.append(f"gradient histograms of {name}: damaged ({error!r})")
    return charts


def _evaluation(result: Evaluation, images: int, run: RunFiles) -> dict[str, Any]:
    best, worst, unreadable = best_and_worst(result, images)
    if unreadable:
        run.missing.append(f"{len(unreadable)} images of {result.name}; the first: {unreadable[0]}")
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
        "precision": draw_precision(result),
        "classes": len(result.classes),
        "threshold": f"{result.score_threshold:.3f}",
        "images": len(result.images),
        "examples": [("Best images", best), ("Worst images", worst)],
    }


def _figure(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1f}"


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    record = run.record
    versions = record.get("versions")
    rows = [
        ("folder", os.path.abspath(run.folder)),
        ("config file", record.get("config_file")),
        ("hardware", record.get("hardware")),
        *(versions.items() if isinstance(versions, dict) else ()),
        ("commit", record.get("commit")),
    ]
    datasets = record.get("datasets")
    for name, paths in datasets.items() if isinstance(datasets, dict) else ():
        rows.append((f"data set {name}", ", ".join(map(str, paths))))
    return [(str(name), str(value)) for name, value in rows if value]
