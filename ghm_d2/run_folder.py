"""What a training leaves in its OUTPUT_DIR: the only code that knows, reads and writes these files.

A killed process, a full disk or an editor may have damaged any of them. A file that cannot be used
raises a UserError with one sentence; what is left out of a usable one is listed in
:attr:`RunFolder.notes`. A page that can do without a part catches the error; others let it through.
"""

import contextlib
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from ghm_d2 import provenance
from ghm_d2.errors import UserError, cannot
from ghm_d2.files import PART, read_json, read_text, write_json
from ghm_d2.run_logs import cut_rows
from ghm_d2.run_parts import (
    Record,
    Rows,
    Settings,
    finite,
    last_training,
    metrics_row,
    parse_record,
    parse_row,
    parse_settings,
    statistics_row,
)

logger = logging.getLogger(__name__)

METRICS = "metrics.json"
RECORD = "training.json"
CONFIG = "config.yaml"
STATISTICS = "gradient_statistics.jsonl"
FINAL_CHECKPOINT = "model_final.pth"
BEST_CHECKPOINT = "model_best.pth"  # weights alone, of the best evaluation
LAST_CHECKPOINT = "last_checkpoint"  # Detectron2's file with the name of the newest one

# In metrics.json: what an evaluation during a training cost.
SECONDS_PER_IMAGE = "inference/seconds_per_image"
MEMORY_MIB = "inference/memory_mib"
# In results.json and metrics.json: the task whose score_threshold gives detections the best F1.
BEST_F1 = "best_f1"


class RunFolder:
    """An OUTPUT_DIR. Each part is read when it is first asked for."""

    def __init__(self, folder: str | Path) -> None:
        """
        Args:
            folder: need not exist.
        """
        self.folder = Path(folder)
        self.notes: list[str] = []

    def is_training(self) -> bool:
        """Whether anything of a training lies here."""
        return any((self.folder / name).exists() for name in (METRICS, RECORD, CONFIG))

    def inference(self, name: str, names: Sequence[str]) -> Path:
        """The evaluator's folder for the data set `name`, one of the `names` in DATASETS.TEST."""
        folder = self.folder / "inference"
        return folder / name if len(names) > 1 else folder

    def predictions(self, name: str, names: Sequence[str]) -> Path:
        """The evaluator's predictions, in COCO's result format; see :meth:`inference`."""
        return self.inference(name, names) / "coco_instances_results.json"

    def converted_annotations(self, name: str, names: Sequence[str]) -> Path:
        """What the evaluator makes of annotations that pycocotools cannot read itself."""
        return self.inference(name, names) / f"{name}_coco_format.json"

    @property
    def results_file(self) -> Path:
        """Where :attr:`results` lie."""
        return self.folder / "inference" / "results.json"

    @cached_property
    def record(self) -> Record:
        """training.json; a field of another type counts as missing, which the notes say.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        record, damaged = parse_record(_read_object(self.folder / RECORD))
        self.notes += [f"{RECORD}: {name} is damaged and left out" for name in damaged]
        return record

    @cached_property
    def config(self) -> str:
        """The text of the config, from the record, else from config.yaml.

        Raises:
            UserError: it is in neither.
        """
        recorded = ""
        with contextlib.suppress(UserError):
            recorded = self.record.config
        return recorded or read_text(self.folder / CONFIG)

    @cached_property
    def settings(self) -> Settings:
        """The config, parsed.

        Raises:
            UserError: there is none, or its text is damaged.
        """
        try:
            return parse_settings(self.config)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"the config of {self.folder} is damaged ({error}).") from error

    @cached_property
    def metrics(self) -> dict[int, dict[str, float]]:
        """Values of the last training in metrics.json, by iteration and name.

        Raises:
            UserError: the file cannot be read.
        """
        return last_training(self._rows(METRICS, metrics_row))

    @cached_property
    def statistics(self) -> dict[str, Rows]:
        """Rows of gradient_statistics.jsonl by name of the loss, then by iteration.

        Raises:
            UserError: the file cannot be read.
        """
        losses: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for iteration, row in self._rows(STATISTICS, statistics_row):
            losses.setdefault(row["loss"], []).append((iteration, row))
        return {name: last_training(rows) for name, rows in losses.items()}

    @cached_property
    def results(self) -> dict[str, float | None]:
        """Figures of the last evaluation by "TASK/FIGURE", after "NAME/" for several data sets.

        A figure that does not exist is None, as the AP is where nothing was detected.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        content = _read_object(self.results_file)
        return {name: finite(value) for name, value in content.items()}

    def iterations_done(self) -> int:
        """How many iterations the last training has logged; see :attr:`metrics`."""
        return max((i + 1 for i, row in self.metrics.items() if "total_loss" in row), default=0)

    def seconds_per_iteration(self) -> float | None:
        """Median of the last training; None for one too short to be timed (3 iterations)."""
        times = [row.get("time", math.nan) for row in self.metrics.values()]
        times = list(filter(math.isfinite, times))
        return median(times) if times else None

    def last(self, name: str, start: int = 0) -> float | None:
        """The last value of a name in the metrics from iteration `start` on; None without one."""
        found = [i for i, row in self.metrics.items() if i >= start and name in row]
        return self.metrics[max(found)][name] if found else None

    def _rows(
        self, name: str, usable: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> list[tuple[int, dict[str, Any]]]:
        file = self.folder / name
        try:
            text = file.read_bytes().decode(errors="replace")
        except OSError as error:
            raise cannot("read", file, error) from error
        rows, damaged = [], 0
        for line in filter(str.strip, text.split("\n")):
            try:
                rows.append(parse_row(line, usable))
            except ValueError:  # a killed process was writing it, or somebody has edited it
                damaged += 1
        if damaged:
            self.notes.append(f"{name}: {damaged} damaged {'line' if damaged == 1 else 'lines'}")
        return rows

    def write_record(
        self,
        *,
        config: str,
        config_file: str,
        classes: Sequence[str],
        datasets: Mapping[str, tuple[str, str]],
        data: Mapping[str, Mapping[str, Any]],
        device: str,
        processes: int,
    ) -> None:
        """Writes training.json, with the date and where this training runs.

        Args:
            config: the whole config as text: `cfg.dump()`, or what LazyConfig.save writes.
            config_file, classes, datasets, data: as in :class:`Record`; paths become absolute.
            device: of one process.
            processes: how many.

        Raises:
            UserError: it cannot be written.
        """
        content = {
            "date": datetime.now(timezone.utc).date().isoformat(),
            "config_file": os.path.abspath(config_file),
            "config": config,
            "classes": list(classes),
            "datasets": {name: list(map(os.path.abspath, x)) for name, x in datasets.items()},
            "data": data,
            "hardware": provenance.hardware(device, processes),
            "versions": provenance.versions(),
            "commit": provenance.commit(),
        }
        write_json(self.folder / RECORD, content)

    def write_results(self, figures: Mapping[str, float]) -> None:
        """Writes :attr:`results`; what is not finite becomes null.

        Raises:
            UserError: the file cannot be written.
        """
        write_json(self.results_file, {name: finite(value) for name, value in figures.items()})

    def cut_logs(self, start: int) -> None:
        """Removes from the logs what iterations from `start` on wrote, which are done again.

        With 0 that is everything an earlier training left. The files are cut in place, because a
        writer may hold them open.
        """

        def is_undone(row: dict[str, Any]) -> bool:
            # The row of the last evaluation has the number of the iteration after the last one.
            return row["iteration"] > start - ("total_loss" in row or not start)

        cut_rows(self.folder / METRICS, is_undone)
        cut_rows(self.folder / STATISTICS, lambda row: row["iteration"] >= start)

    def last_checkpoint(self) -> str | None:
        """The name of the newest checkpoint; "" where its file is damaged, None without that file.

        Raises:
            UserError: the file cannot be read.
        """
        pointer = self.folder / LAST_CHECKPOINT
        if not pointer.is_file():
            return None
        try:
            name = pointer.read_bytes().decode(errors="replace").strip()
        except OSError as error:
            raise cannot("read", pointer, error) from error
        return os.path.basename(name) if name.isprintable() else ""

    def checkpoints(self) -> list[str]:
        """Names of checkpoints to resume from: the newest, then the earlier ones, latest first."""
        newest = self.last_checkpoint()
        if newest is None:
            return []
        last = _number(newest)
        numbers = {name: _number(name) for name in os.listdir(self.folder) if name != newest}
        earlier = [n for n, k in numbers.items() if k >= 0 and (last < 0 or k < last)]
        return [newest] * bool(newest) + sorted(earlier, key=numbers.__getitem__, reverse=True)

    def weights(self) -> Path:
        """The weights to predict with: those of the best evaluation where they were kept."""
        best = self.folder / BEST_CHECKPOINT
        return best if best.is_file() else self.folder / FINAL_CHECKPOINT

    def set_last_checkpoint_aside(self) -> None:
        """Leaves the folder without a checkpoint to resume; no file with weights is deleted."""
        best = self.folder / BEST_CHECKPOINT
        if best.is_file():  # or a training without SAVE_BEST would seem to have made it
            best.replace(best.with_name(f"{BEST_CHECKPOINT}.earlier"))
        pointer = self.folder / LAST_CHECKPOINT
        if pointer.is_file():
            aside = pointer.replace(f"{pointer}.earlier").name
            earlier = "%s holds the checkpoints of an earlier training, which is not resumed: "
            logger.warning(earlier + "%s is now %s", self.folder, LAST_CHECKPOINT, aside)

    def remove_partial_files(self) -> None:
        """Deletes the unfinished files of a process that was killed while writing."""
        for file in sorted(self.folder.glob(f"*{PART}")):
            file.unlink()
            logger.info("removed %s, which a killed process had not finished", file.name)


def _read_object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a complete JSON object.")
    return content


def _number(name: str) -> int:
    """The iteration in a name by PeriodicCheckpointer; -1 for others, such as model_final.pth."""
    match = re.fullmatch(r"model_(\d+)\.pth", name)
    return int(match[1]) if match else -1
