"""What an OUTPUT_DIR holds for the page, and what is missing from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.data import MetadataCatalog

from ghm_d2.errors import UserError
from ghm_d2.run_folder import CONFIG, METRICS, RECORD, RunFolder
from ghm_d2.run_parts import Record, Rows, Settings

# What the page shows of each part of a run.
_PARTS = {
    "record": "environment, and where the data lies",
    "config": "configuration",
    "settings": "configuration",
    "metrics": "loss and AP curves",
    "statistics": "gradient histograms",
    "results": "final results",
}


@dataclass(frozen=True)
class TestSet:
    """A data set that was evaluated.

    Attributes:
        name: of the data set in the config.
        predictions: the evaluator's file in COCO's result format.
        annotations: COCO-format ground truth.
        images: folder that its file names are relative to.
        detections_per_image: at most this many count for an image, as in the evaluation.
    """

    __test__ = False  # without it, pytest would collect this class because of its name

    name: str
    predictions: Path
    annotations: Path
    images: Path
    detections_per_image: int = 100


@dataclass
class RunFiles:
    """The files of a training, read.

    Attributes:
        files: the OUTPUT_DIR.
        record, config, settings, metrics, statistics, results: as :class:`RunFolder` has them;
            empty where they are missing or damaged.
        test_sets: those with predictions and ground truth.
        missing: one sentence for each thing that the page cannot show.
    """

    files: RunFolder
    record: Record = field(default_factory=Record)
    config: str = ""
    settings: Settings = field(default_factory=Settings)
    metrics: Rows = field(default_factory=dict)
    statistics: dict[str, Rows] = field(default_factory=dict)
    results: dict[str, float | None] = field(default_factory=dict)
    test_sets: list[TestSet] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_run(folder: Path, datasets: Mapping[str, tuple[Path, Path]]) -> RunFiles:
    """Reads what there is.

    Args:
        folder: OUTPUT_DIR of a training, finished or not.
        datasets: name to annotation file and image folder, instead of the recorded ones.

    Raises:
        UserError: the folder does not exist, or holds nothing of a training.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist.")
    files = RunFolder(folder)
    if not files.is_training():
        raise UserError(
            f"{folder} holds neither {METRICS} nor {RECORD} nor {CONFIG}: give the OUTPUT_DIR of a "
            "training."
        )
    run = RunFiles(files)
    for name, what in _PARTS.items():
        try:
            setattr(run, name, getattr(files, name))
        except UserError as error:
            run.missing.append(f"{what}: {str(error).rstrip('.')}")
    # Without a config, its text and its settings are missing for the same reason.
    run.missing = [*dict.fromkeys(run.missing), *files.notes]
    run.test_sets = _test_sets(run, datasets)
    return run


def _test_sets(run: RunFiles, datasets: Mapping[str, tuple[Path, Path]]) -> list[TestSet]:
    names = run.settings.test or tuple(datasets)[:1]
    found = []
    for name in names:
        predictions = run.files.predictions(name, names)
        if not predictions.is_file():
            run.missing.append(
                f"AP by class, images: no {predictions.name} for the data set {name}"
            )
            continue
        annotations, images = _locate(run, name, datasets)
        converted = run.files.converted_annotations(name, names)
        if converted.is_file():
            annotations = converted
        if annotations is None or not annotations.is_file():
            where = f", which was at {annotations}" if annotations else ""
            run.missing.append(
                f"AP by class, images: the annotations of {name}{where}; give --dataset "
                f"{name}=annotations.json,image_dir"
            )
            continue
        limit = run.settings.detections_per_image or 100
        found.append(TestSet(name, predictions, annotations, images, limit))
    if not names:
        run.missing.append("AP by class, images: the config names no data set to test on")
    return found


def _locate(
    run: RunFiles, name: str, datasets: Mapping[str, tuple[Path, Path]]
) -> tuple[Path | None, Path]:
    """Annotations and images by the caller, else the training's record, else MetadataCatalog."""
    if known := datasets.get(name) or run.record.datasets.get(name):
        return known
    metadata = MetadataCatalog.get(name) if name in MetadataCatalog.list() else None
    file = metadata and metadata.get("json_file")
    return (Path(file), Path(metadata.get("image_root") or "")) if file else (None, Path())
