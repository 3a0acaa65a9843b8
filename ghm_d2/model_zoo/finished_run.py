"""Reads what a finished training has left in its OUTPUT_DIR, and refuses what is not finished."""

import json
import logging
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from ghm_d2.config import add_ghm_config
from ghm_d2.engine.record import RECORD_FILE
from ghm_d2.errors import UserError

__all__ = ["FinishedRun", "read_finished_run"]

logger = logging.getLogger(__name__)

# Lines of Detectron2's log that its own scripts parse.
_PROCESS_START = "Rank of current process: 0"
_TRAINING_START = "Starting training from iteration"
_INFERENCE = re.compile(r"Total inference pure compute time: .*\(([\d.]+) s / iter per device")
_MEMORY = re.compile(r"max_mem: (\d+)M")


@dataclass(frozen=True)
class FinishedRun:
    """A training that ran to SOLVER.MAX_ITER and was evaluated there.

    Attributes:
        folder: its OUTPUT_DIR.
        cfg: the config it was trained with.
        weights: name to tensor, of the model alone.
        record: what the training wrote into training.json; empty where there is none.
        box_ap: data set to box AP in percent, None where nothing was detected.
        seconds_per_iteration: median over the run; None for a run too short to be timed.
        seconds_per_image: of the network and its post-processing, in the last evaluation.
        memory_mib: most GPU memory held by the first process; None on the CPU.
    """

    folder: Path
    cfg: CfgNode
    weights: dict[str, Tensor]
    record: dict[str, Any]
    box_ap: dict[str, float | None]
    seconds_per_iteration: float | None
    seconds_per_image: float | None
    memory_mib: int | None


def read_finished_run(folder: str | Path) -> FinishedRun:
    """Read an OUTPUT_DIR.

    Raises:
        UserError: the training has not reached SOLVER.MAX_ITER, has no evaluation of its final
            weights, or one of its files is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the OUTPUT_DIR of a finished training.")
    record = _read_record(folder)
    cfg = _read_config(folder, record)
    rows = _last_training(_read_metrics(folder))
    done, wanted = _iterations(rows), cfg.SOLVER.MAX_ITER
    if done < wanted:
        raise UserError(
            f"{folder} is not finished, it has done {done} of {wanted} iterations: go on with "
            "train_net.py --resume."
        )
    box_ap = _box_ap(rows, cfg)
    if not box_ap:
        raise UserError(
            f"{folder} holds no evaluation of its final weights: train with a DATASETS.TEST that "
            "has annotations."
        )
    log = _training_log(folder)
    times = [row["time"] for row in rows if "time" in row]
    images, memory = _INFERENCE.findall(log), _MEMORY.findall(log)
    return FinishedRun(
        folder=folder,
        cfg=cfg,
        weights=_read_weights(folder / "model_final.pth", wanted),
        record=record,
        box_ap=box_ap,
        seconds_per_iteration=median(times) if times else None,
        seconds_per_image=float(images[-1]) if images else None,
        memory_mib=int(memory[-1]) if memory else None,
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(
            f"{file} cannot be read ({reason}): {file.parent} is not the OUTPUT_DIR of a finished "
            "training."
        ) from error


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD_FILE
    if not file.exists():
        logger.warning("%s does not exist: hardware, versions and commit stay unknown", file)
        return {}
    try:
        return json.loads(_text(file))
    except ValueError as error:
        raise UserError(f"{file} is not a complete JSON file ({error}).") from error


def _read_config(folder: Path, record: dict[str, Any]) -> CfgNode:
    # config.yaml is that of the last command in this folder, which may have been an evaluation.
    text = record["config"] if record else _text(folder / "config.yaml")
    cfg = get_cfg()
    add_ghm_config(cfg)
    try:
        cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(text)))
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the config of {folder} is not one of this version ({reason}).") from error
    return cfg


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    rows, damaged = [], 0
    for line in _text(folder / "metrics.json").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the training was stopped while writing it
            damaged += 1
    if damaged:
        logger.warning("%s: %d damaged lines left out", folder / "metrics.json", damaged)
    return rows


def _last_training(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows since the iterations last jumped back: a folder may have been trained into twice."""
    starts = [i for i in range(1, len(rows)) if rows[i]["iteration"] < rows[i - 1]["iteration"]]
    return rows[starts[-1] :] if starts else rows


def _iterations(rows: list[dict[str, Any]]) -> int:
    return max((row["iteration"] + 1 for row in rows if "total_loss" in row), default=0)


def _box_ap(rows: list[dict[str, Any]], cfg: CfgNode) -> dict[str, float | None]:
    """Box AP of each test set after the last iteration."""
    names = cfg.DATASETS.TEST
    keys = {name: f"{name}/bbox/AP" if len(names) > 1 else "bbox/AP" for name in names}
    final = [row for row in rows if row["iteration"] >= cfg.SOLVER.MAX_ITER]
    found = {n: row[key] for row in final for n, key in keys.items() if key in row}
    return {name: None if math.isnan(ap) else round(ap, 2) for name, ap in found.items()}


def _training_log(folder: Path) -> str:
    """The log of the last process that trained; other commands may have written after it."""
    file = folder / "log.txt"
    if not file.exists():
        logger.warning("%s does not exist: time per image and memory stay unknown", file)
        return ""
    parts = _text(file).split(_PROCESS_START)
    return next((part for part in reversed(parts) if _TRAINING_START in part), "")


def _read_weights(file: Path, iterations: int) -> dict[str, Tensor]:
    if not file.exists():
        raise UserError(
            f"{file} does not exist: the training is not finished, go on with train_net.py "
            "--resume."
        )
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        weights, done = checkpoint["model"], checkpoint["iteration"] + 1
    except (EOFError, KeyError, OSError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split()[:20])
        raise UserError(f"{file} is not a checkpoint of a training ({reason}).") from error
    if done < iterations:
        raise UserError(
            f"{file} is of iteration {done} and not of the last one, {iterations}: the training "
            "that it belongs to was another one."
        )
    return weights
