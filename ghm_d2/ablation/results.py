"""What a finished run leaves: one small JSON file, found again by the run's identity."""

import json
import logging
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghm_d2 import __file__ as _package
from ghm_d2.ablation.files import read_json, write_json
from ghm_d2.ablation.plan import SPLITS, Run, effective

__all__ = ["Store", "last_step"]

logger = logging.getLogger(__name__)

_VERSION = 1  # of the files' layout


class Store:
    """The folder of an ablation.

    ``runs/<id>.json`` holds a finished run and is all that is needed to find it again;
    ``work/<id>/`` is its OUTPUT_DIR, and may be deleted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.work = folder / "work"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        (self.work / ".gitignore").write_text("*\n")  # checkpoints and logs

    def output(self, run: Run) -> Path:
        """OUTPUT_DIR of a run."""
        return self.work / run.id

    def load(self, run: Run) -> dict[str, Any] | None:
        """The finished run, or None; one of another default or other weights is warned of."""
        file = self.runs / f"{run.id}.json"
        found = read_json(file)
        if found is None:
            if file.exists():
                logger.warning("%s is damaged: the run counts as not done", file)
            return None
        if reason := _difference(run, found):
            logger.warning("%s: %s holds a run with %s: it is done again", run.name, file, reason)
            return None
        return found

    def save(self, run: Run, seconds: float) -> dict[str, Any]:
        """Collect what a run that has ended well has left, and write it.

        Args:
            run: the run.
            seconds: time of the process (of the last one, after a resume).

        Raises:
            FileNotFoundError: the run has evaluated nothing.
        """
        output = self.output(run)
        evaluated = json.loads((output / "inference" / "results.json").read_text())
        usage = read_json(output / "usage.json") or {}
        metrics, nothing = _figures(evaluated, next(iter(run.data["test"])))
        content = {
            "layout": _VERSION,
            "id": run.id,
            "row": run.row,
            "seed": run.seed,
            "overrides": run.overrides,
            "metrics": metrics,
            "nothing_detected": nothing,
            "iterations": run.iterations,
            "seconds_per_iteration": _seconds_per_iteration(output / "metrics.json"),
            "seconds": round(seconds, 1),
            "peak_rss_mb": usage.get("peak_rss_mb"),
            "peak_gpu_mb": usage.get("peak_gpu_mb"),
            "starts": usage.get("starts"),
            "cpu": usage.get("cpu"),
            "gpu": usage.get("gpu"),
            "threads": usage.get("threads"),
            "versions": usage.get("versions"),
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "data": run.data,
            "weights": run.weights,
            "config": run.config,
        }
        write_json(self.runs / f"{run.id}.json", content)
        for file in output.glob("model_[0-9]*.pth"):
            file.unlink()  # model_final.pth stays
        return content


def _difference(run: Run, found: dict[str, Any]) -> str:
    """What makes a stored run of the same identity another one; "" where nothing does."""
    # Keys that are newer than the file are at their defaults, or the identity would differ.
    for key, value in effective(found["config"]).items():
        if key not in SPLITS and run.config.get(key) != value:
            return f"{key} {value!r} instead of {run.config.get(key)!r}"
    hashes = {found["weights"].get("sha256"), run.weights.get("sha256")} - {None}
    if len(hashes) > 1:  # a file that is missing here, as after a clone, is no difference
        return f"other weights ({run.config['MODEL.WEIGHTS'] or 'none'})"
    return ""


def _figures(evaluated: dict[str, float | None], first: str) -> tuple[dict[str, Any], bool]:
    """Name the figures: those of boxes on the first data set have no prefix.

    A model that finds nothing has an AP of 0; Detectron2 says NaN, which means would leave out.
    """
    metrics = {}
    for name, value in evaluated.items():
        metrics[name.removeprefix(f"{first}/").removeprefix("bbox/")] = value
    nothing = "AP" in metrics and metrics["AP"] is None
    if nothing:
        metrics = {k: 0.0 if re.fullmatch(r"AP\d*", k) else v for k, v in metrics.items()}
    return {k: None if v is None else round(v, 4) for k, v in metrics.items()}, nothing


def _rows(metrics: Path, tail: int | None = None) -> Iterator[dict[str, Any]]:
    """The lines of metrics.json, or those of its last `tail` bytes."""
    try:
        with open(metrics, "rb") as stream:
            if tail is not None:
                stream.seek(max(stream.seek(0, 2) - tail, 0))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut off at either end
            continue
        if isinstance(row, dict):
            yield row


def last_step(output: Path) -> tuple[int, float | None]:
    """Iterations done and the last total loss, as far as metrics.json tells."""
    done, loss = 0, None
    for row in _rows(output / "metrics.json", tail=20000):
        if "total_loss" in row:
            done, loss = row["iteration"] + 1, row["total_loss"]
    return done, loss


def _seconds_per_iteration(metrics: Path) -> float | None:
    """Median over the log; None for a training too short to be timed (3 iterations)."""
    times = [row["time"] for row in _rows(metrics) if "time" in row]
    return round(statistics.median(times), 5) if times else None


def commit() -> str | None:
    """The commit of the code, with "+changes" where files differ from it; None without git."""

    def git(*words: str) -> str:
        folder = Path(_package).parent
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        return None
    return head + ("+changes" if changed else "") if head else None
