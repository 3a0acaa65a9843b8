"""What lies in the OUTPUT_DIR of a training, and what does not."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from detectron2.data import MetadataCatalog

from ghm_d2.analysis.hook import FILE as STATISTICS_FILE
from ghm_d2.engine.record import RECORD_FILE
from ghm_d2.errors import UserError

__all__ = ["RunFiles", "TestSet", "read_run"]

_PREDICTIONS = "coco_instances_results.json"


@dataclass(frozen=True)
class TestSet:
    """A data set that was evaluated.

    Attributes:
        name: in DATASETS.TEST.
        predictions: the evaluator's file in COCO's result format.
        annotations: COCO-format ground truth.
        images: folder that its file names are relative to.
    """

    __test__ = False  # pytest takes the name for its own

    name: str
    predictions: Path
    annotations: Path
    images: Path


@dataclass
class RunFiles:
    """The files of a training, read.

    Attributes:
        folder: OUTPUT_DIR.
        record: training.json, empty where there is none.
        config: the whole config as YAML, or an empty string.
        metrics: rows of the last training in metrics.json, by iteration.
        statistics: rows of gradient_statistics.jsonl by name of the loss, then by iteration.
        results: inference/results.json.
        test_sets: those with predictions and ground truth.
        missing: one sentence for each thing that the page cannot show.
    """

    folder: Path
    record: dict[str, Any]
    config: str
    metrics: dict[int, dict[str, Any]]
    statistics: dict[str, dict[int, dict[str, Any]]]
    results: dict[str, float | None]
    test_sets: list[TestSet]
    missing: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The config as nested dictionaries; empty where it is missing or damaged."""
        return _parse_yaml(self.config)


def read_run(folder: Path, datasets: Mapping[str, tuple[Path, Path]]) -> RunFiles:
    """Read what there is.

    Args:
        folder: OUTPUT_DIR of a training, finished or not.
        datasets: annotation file and image folder of data sets, which replace the recorded ones.

    Raises:
        UserError: the folder does not exist, or nothing in it is of a training.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist.")
    if not any((folder / name).exists() for name in ("metrics.json", RECORD_FILE, "config.yaml")):
        raise UserError(
            f"{folder} holds neither metrics.json nor {RECORD_FILE} nor config.yaml: give the "
            "OUTPUT_DIR of a training."
        )
    missing: list[str] = []
    record = _object(folder / RECORD_FILE, missing, "environment, and where the data lies")
    config = record.get("config") or ""
    if not isinstance(config, str) or not config:
        config = _text(folder / "config.yaml", missing, "configuration")
    if config and not _parse_yaml(config):
        missing.append("configuration: it is not the YAML of a config")
    run = RunFiles(
        folder,
        record,
        config,
        _last_run(_rows(folder / "metrics.json", missing, "loss and AP curves")),
        _statistics(_rows(folder / STATISTICS_FILE, missing, "gradient histograms")),
        _object(folder / "inference" / "results.json", missing, "final results"),
        [],
        missing,
    )
    run.test_sets = _test_sets(run, datasets)
    return run


def _parse_yaml(text: str) -> dict[str, Any]:
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _text(file: Path, missing: list[str], what: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        missing.append(f"{what}: {file.name} cannot be read ({error.strerror})")
    except UnicodeDecodeError:
        missing.append(f"{what}: {file.name} is not text")
    return ""


def _object(file: Path, missing: list[str], what: str) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, which ``missing`` then says."""
    text = _text(file, missing, what)
    if not text:
        return {}
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        missing.append(f"{what}: {file.name} is not a complete JSON object")
        return {}
    return content


def _rows(file: Path, missing: list[str], what: str) -> list[dict[str, Any]]:
    rows, damaged = [], 0
    for line in _text(file, missing, what).splitlines():
        try:
            row = json.loads(line)
            row["iteration"] + 0
        except (KeyError, TypeError, ValueError):  # the training was stopped while writing it
            damaged += 1
        else:
            rows.append(row)
    if damaged:
        missing.append(f"{damaged} damaged lines of {file.name}")
    return rows


def _last_run(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By iteration; what an earlier training wrote from where a later one began is left out."""
    kept: dict[int, dict[str, Any]] = {}
    previous = -1
    for row in rows:
        iteration = row["iteration"]
        if iteration < previous:
            kept = {i: values for i, values in kept.items() if i < iteration}
        kept.setdefault(iteration, {}).update(row)
        previous = iteration
    return kept


def _statistics(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    names = dict.fromkeys(str(row.get("loss")) for row in rows)
    return {name: _last_run([r for r in rows if str(r.get("loss")) == name]) for name in names}


def _test_sets(run: RunFiles, datasets: Mapping[str, tuple[Path, Path]]) -> list[TestSet]:
    names = (run.settings.get("DATASETS") or {}).get("TEST") or ()
    names = list(names) or list(datasets)[:1]
    found = []
    for name in names:
        inference = run.folder / "inference"
        inference = inference / name if len(names) > 1 else inference
        if not (inference / _PREDICTIONS).is_file():
            run.missing.append(f"AP by class, images: no {_PREDICTIONS} for the data set {name}")
            continue
        annotations, images = _locate(run, name, datasets)
        # What the evaluator converted, because pycocotools could not read the file itself.
        converted = inference / f"{name}_coco_format.json"
        if converted.is_file():
            annotations = converted
        if annotations is None or not annotations.is_file():
            where = f", which was at {annotations}" if annotations else ""
            run.missing.append(
                f"AP by class, images: the annotations of {name}{where}; give --dataset "
                f"{name}=annotations.json,image_dir"
            )
            continue
        images = images or Path()
        found.append(TestSet(name, inference / _PREDICTIONS, annotations, images))
    if not names:
        run.missing.append("AP by class, images: nothing was evaluated (DATASETS.TEST is empty)")
    return found


def _locate(
    run: RunFiles, name: str, datasets: Mapping[str, tuple[Path, Path]]
) -> tuple[Path | None, Path | None]:
    """From the command line, the record of the training, or Detectron2's own data sets."""
    if name in datasets:
        return datasets[name]
    recorded = run.record.get("datasets")
    if isinstance(recorded, dict) and name in recorded:
        file, images = map(Path, recorded[name])
        return file, images
    metadata = MetadataCatalog.get(name) if name in MetadataCatalog.list() else None
    if metadata is None or not metadata.get("json_file"):
        return None, None
    return Path(metadata.json_file), Path(metadata.get("image_root") or os.curdir)
