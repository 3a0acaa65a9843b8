"""What the runs of an ablation leave, written and read here alone."""

import contextlib
import fcntl
import functools
import json
import logging
import os
import re
import shutil
import statistics
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ghm_d2.errors import UserError
from ghm_d2.files import read_json, write_json, write_text
from ghm_d2.provenance import commit, versions
from ghm_d2.run_folder import RunFolder

from .plan import SPLITS, Run, effective

logger = logging.getLogger(__name__)

Result = dict[str, Any]


class Store:
    """The folder of an ablation.

    `<grid>.json` is the study: the figures of the report and every finished run; a copy of the
    folder with this file alone knows all its runs. While the grid runs, each process writes its
    result to `runs/<id>.json`; `work/<id>/` is its OUTPUT_DIR and `work/logs/<id>/` holds
    its output. Both may be deleted once the study is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.work = folder / "work"
        for place in (self.runs, self.work):
            place.mkdir(parents=True, exist_ok=True)
            (place / ".gitignore").write_text("*\n")

    def output(self, run: Run) -> Path:
        """OUTPUT_DIR of a run."""
        return self.work / run.id

    def logs(self, run: Run) -> Path:
        """The folder of what the processes of a run have printed."""
        return self.work / "logs" / run.id

    def load(self, run: Run) -> Result | None:
        """The finished run, or None; warns of one with another default or other weights."""
        found = self._find(run)
        if found is not None and (reason := _difference(run, found)):
            logger.warning("%s was run with %s: it is done again", run.name, reason)
            return None
        return found

    def _find(self, run: Run) -> Result | None:
        file = self.runs / f"{run.id}.json"
        if file.exists():
            try:
                return read_json(file)
            except UserError as error:
                logger.warning("the run counts as not done: %s", error)
        return self._studied.get(run.id)

    @functools.cached_property
    def _studied(self) -> dict[str, Result]:
        """The runs of every study in this folder, by their identities."""
        files = sorted(self.folder.glob("*.json"))
        return {found["id"]: found for file in files for found in read_study(file)}

    @contextlib.contextmanager
    def lock(self, run: Run) -> Iterator[bool]:
        """Keeps a run to this process; yields False where another one is at work on it."""
        with open(self.work / f"{run.id}.lock", "a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            yield True

    def process(self, run: Run) -> int:
        """The process that is at work on a run; 0 where there is none."""
        with self.lock(run) as free:
            return 0 if free else int((self.work / f"{run.id}.lock").read_text() or 0)

    def progress(self, run: Run) -> tuple[int, float | None]:
        """Iterations done and the last total loss, as far as the training has logged them."""
        left = RunFolder(self.output(run))
        try:
            return left.iterations_done(), left.last("total_loss")
        except UserError:  # it has not logged anything yet
            return 0, None

    def prepare(self, run: Run) -> tuple[Path, int]:
        """OUTPUT_DIR, without the files of a run with another default; the number of this start."""
        output = self.output(run)
        file = output / "run.json"
        own = {"config": run.config, "weights": run.weights}
        before = read_json(file) if file.exists() else own | {"starts": 0}
        if {key: before.get(key) for key in own} != own or (self._find(run) and not file.exists()):
            shutil.rmtree(output, ignore_errors=True)
            before["starts"] = 0
        starts = before["starts"] + 1
        write_json(file, own | {"starts": starts})
        return output, starts

    def save(self, run: Run, usage: Mapping[str, Any]) -> None:
        """Write the result of a run that has finished.

        Args:
            run: the run.
            usage: what its process knows of itself: seconds, peak memory, machine.

        Raises:
            UserError: the files of the run cannot be read.
        """
        left = RunFolder(self.output(run))
        metrics, nothing = _figures(left.results, next(iter(run.data["test"])))
        seconds = left.seconds_per_iteration()
        content = {
            "id": run.id,
            "row": run.row,
            "seed": run.seed,
            "overrides": run.overrides,
            "metrics": metrics,
            "nothing_detected": nothing,
            "iterations": run.iterations,
            "seconds_per_iteration": None if seconds is None else round(seconds, 5),
            **usage,
            "versions": versions(),
            "commit": commit(),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "data": run.data,
            "weights": run.weights,
            "config": run.config,
        }
        write_json(self.runs / f"{run.id}.json", content)
        for file in left.folder.glob("model_[0-9]*.pth"):
            file.unlink()  # model_final.pth stays

    def write_study(self, summary: Mapping[str, Any], results: Mapping[str, Result]) -> Path:
        """Write `<grid>.json`: the summary, these runs, and those that it holds already.

        Args:
            summary: what :func:`~ghm_d2.ablation.report.summarize` returns.
            results: identity to finished run.
        """
        file = self.folder / f"{summary['grid']}.json"
        runs = {found["id"]: found for found in read_study(file)} | dict(results)
        ordered = sorted(runs.values(), key=lambda found: (found["row"], found["seed"]))
        write_text(file, _study_text(summary, ordered))
        return file


def _study_text(summary: Mapping[str, Any], runs: list[Result]) -> str:
    """A study as JSON, one run a line: a new run is one new line in a diff.

    Configs hardly differ within a study: each run lists where it departs from the most common value
    of a key.
    """
    base: dict[str, Any] = {}
    for key in sorted({key for run in runs for key in run["config"]}):
        values = [json.dumps(run["config"][key]) for run in runs if key in run["config"]]
        base[key] = json.loads(statistics.mode(values))
    lines = []
    for run in runs:
        config = run["config"]
        # As text, because to Python True, 1 and 1.0 are the same.
        same = {k for k, v in config.items() if json.dumps(v) == json.dumps(base[k])}
        changed = {key: config[key] for key in sorted(config.keys() - same)}
        without = [key for key in base if key not in config]
        line = {**run, "config": changed, "without": without}
        lines.append(json.dumps(line, allow_nan=False))
    head = json.dumps({**summary, "config": base}, indent=1, allow_nan=False)
    return head.removesuffix("\n}") + ',\n "runs": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def read_study(file: Path) -> list[Result]:
    """The runs that a study holds; none where there is no such file, or it holds something else.

    Raises:
        UserError: the file is damaged; going on would replace it.
    """
    if not file.exists():
        return []
    try:
        content = read_json(file)
    except UserError as error:
        raise UserError(
            f"a study is damaged: {error} Restore it, or move it away to start without its runs."
        ) from error
    if not isinstance(content, dict) or "runs" not in content:
        return []
    runs = []
    for line in content["runs"]:
        run = dict(line)
        without = run.pop("without")
        base = {key: value for key, value in content["config"].items() if key not in without}
        runs.append(run | {"config": base | run["config"]})
    return runs


def _difference(run: Run, found: Result) -> str:
    """What makes a stored run of the same identity another one; "" where nothing does."""
    # Keys that are newer than the file are at their defaults, or the identity would differ.
    for key, value in effective(found["config"]).items():
        if key not in SPLITS and run.config.get(key) != value:
            return f"{key} {value!r} instead of {run.config.get(key)!r}"
    hashes = {found["weights"].get("sha256"), run.weights.get("sha256")} - {None}
    if len(hashes) > 1:  # a file that is missing here, as after a clone, is no difference
        return f"other weights ({run.weights['name']})"
    return ""


def _figures(evaluated: dict[str, float | None], first: str) -> tuple[dict[str, Any], bool]:
    """Name the figures: those of boxes on the first data set have no prefix.

    A model that finds nothing has an AP of 0. Detectron2 reports NaN, which a mean over the seeds
    would leave out.
    """
    metrics = {}
    for name, value in evaluated.items():
        metrics[name.removeprefix(f"{first}/").removeprefix("bbox/")] = value
    nothing = "AP" in metrics and metrics["AP"] is None
    if nothing:
        metrics = {k: 0.0 if re.fullmatch(r"AP\d*", k) else v for k, v in metrics.items()}
    return {k: None if v is None else round(v, 4) for k, v in metrics.items()}, nothing
