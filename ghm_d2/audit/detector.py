"""Detections of every image by a trained detector, or by detectors trained on the other images."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghm_d2 import __file__ as _package
from ghm_d2.data.split import fold_coco
from ghm_d2.engine.output_folder import exists_and_is_newer
from ghm_d2.engine.setup import output_words
from ghm_d2.errors import UserError
from ghm_d2.files import read_json, write_json
from ghm_d2.run_folder import FINAL_CHECKPOINT, RunFolder

_TRAIN, _HELD_OUT = "audit_train", "audit_held_out"
_RECORD = "audit.json"


def detect(
    content: Mapping[str, Any],
    image_dir: str,
    folder: Path,
    config_file: str,
    overrides: Sequence[str],
) -> Path:
    """Runs a trained detector on the images of a data set.

    Args:
        content: the checked content of the annotation file.
        image_dir: the folder of its images.
        folder: where to write; created if it does not exist.
        config_file, overrides: config of the detector, which must give its weights.

    Returns:
        The file of its detections, in COCO's results format.

    Raises:
        UserError: the evaluation failed, after printing its own message.
    """
    file = folder / "held_out.json"
    write_json(file, content, indent=None)
    words = ["--eval-only", "--dataset", f"{_HELD_OUT}={file},{image_dir}"]
    _train([*words, *_config(config_file, overrides, folder)], "the evaluation")
    return _predictions(folder)


def cross_fit(
    content: Mapping[str, Any],
    image_dir: str,
    folder: Path,
    config_file: str,
    overrides: Sequence[str],
    *,
    folds: int,
    seed: int,
    fingerprint: Mapping[str, Any],
) -> list[Path]:
    """For each fold, trains a detector on the other folds and runs it on the fold.

    An interrupted call continues where it stopped when it is repeated.

    Args:
        content, image_dir, config_file, overrides: as for :func:`detect`.
        folder: where to write; `fold_1` and so on in it are the OUTPUT_DIRs of the trainings.
        folds: how many, at least 2.
        seed: another one gives other folds.
        fingerprint: identifies the data, so that the folder is not reused for other data.

    Returns:
        The files of the detections of each fold, in COCO's results format.

    Raises:
        UserError: a training failed or was stopped, or the folder is of other settings.
    """
    settings = {
        "config_file": config_file,
        "overrides": list(overrides),
        "folds": folds,
        "seed": seed,
        "data": dict(fingerprint),
    }
    parts = fold_coco(content, folds, seed)
    record = folder / _RECORD
    if record.exists() and read_json(record) != settings:
        raise UserError(
            f"{folder} holds detectors of another data set, config or number of folds "
            f"({_RECORD}): name another --output."
        )
    write_json(record, settings)
    found = []
    for number, (rest, held_out) in enumerate(parts, start=1):
        run = RunFolder(folder / f"fold_{number}")
        found.append(_predictions(run.folder))
        if exists_and_is_newer(found[-1], run.folder / FINAL_CHECKPOINT):
            print(f"fold {number} of {folds} is done already", flush=True)
            continue
        print(f"fold {number} of {folds}: {run.folder}", flush=True)
        words = _config(config_file, overrides, run.folder)
        for name, part in ((_TRAIN, rest), (_HELD_OUT, held_out)):
            file = run.folder / f"{name.removeprefix('audit_')}.json"
            write_json(file, part, indent=None)
            words += ["--dataset", f"{name}={file},{image_dir}"]
        if run.last_checkpoint() is not None:
            words.append("--resume")
        _train(words, f"the training of fold {number}")
    return found


def _predictions(folder: Path) -> Path:
    return RunFolder(folder).predictions(_HELD_OUT, [_HELD_OUT])


def _config(config_file: str, overrides: Sequence[str], folder: Path) -> list[str]:
    return ["--config-file", config_file, *overrides, *output_words(config_file, folder)]


def _train(words: Sequence[str], what: str) -> None:
    """Runs a training in its own process: its loggers and registered data would affect the next.

    A signal to end this process is passed on to the training, which first writes a checkpoint.
    """
    paths = [str(Path(_package).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    program = [sys.executable, "-m", "ghm_d2", "train", *words]
    process, early = None, []

    def forward(number: int, _: object) -> None:
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    # Set before the training starts: a signal in between would end this process alone. A terminal
    # sends Ctrl-C to both processes; this one must wait for the checkpoint.
    before = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}
    before |= {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        process = subprocess.Popen(program, env=environment)
        for number in early:
            process.send_signal(number)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        error = UserError(
            f"{what} ended with exit code {code}, for the reason above; the same command "
            "continues from its last checkpoint."
        )
        error.exit_code = code if code > 0 else 1
        raise error
