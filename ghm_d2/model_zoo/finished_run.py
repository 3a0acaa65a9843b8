"""What a finished training has left in its OUTPUT_DIR; an unfinished one is refused."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from ghm_d2.checkpoint import load_file
from ghm_d2.checkpoint.origin import read_origin
from ghm_d2.config import add_ghm_config
from ghm_d2.errors import UserError, reason
from ghm_d2.run_folder import FINAL_CHECKPOINT, MEMORY_MIB, RECORD, SECONDS_PER_IMAGE, RunFolder
from ghm_d2.run_parts import Record, Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedRun:
    """A training that ran to its last iteration and was evaluated there.

    Attributes:
        folder: its OUTPUT_DIR.
        settings: of its config.
        cfg: the config itself; None for a Python config.
        weights: name to tensor, of the model alone.
        record: what the training wrote into training.json; empty where there is none.
        origin: what the checkpoint says of the classes and the data.
        box_ap: box AP of each data set in percent, None where nothing was detected.
        seconds_per_iteration: median over the run; None for a run too short to be timed.
        seconds_per_image: of the network and its post-processing, in the last evaluation.
        memory_mib: most GPU memory held by the first process; None on the CPU.
    """

    folder: Path
    settings: Settings
    cfg: CfgNode | None
    weights: dict[str, Tensor]
    record: Record
    origin: Record
    box_ap: dict[str, float | None]
    seconds_per_iteration: float | None
    seconds_per_image: float | None
    memory_mib: float | None


def read_finished_run(folder: str | Path) -> FinishedRun:
    """Reads an OUTPUT_DIR.

    Raises:
        UserError: the training has not reached its last iteration, has no evaluation of its final
            weights, or one of its files is missing or damaged.
    """
    run = RunFolder(folder)
    if not run.folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the OUTPUT_DIR of a finished training.")
    if (run.folder / RECORD).exists():
        record = run.record
    else:
        record = Record()
        logger.warning("%s has no %s: hardware, versions and commit stay unknown", folder, RECORD)
    settings = run.settings
    done, wanted = run.iterations_done(), settings.iterations
    if wanted is None:
        raise UserError(f"the config of {folder} does not say for how many iterations to train.")
    if done < wanted:
        raise UserError(
            f"{folder} is not finished, it has done {done} of {wanted} iterations: continue with "
            "--resume."
        )
    if not (box_ap := _box_ap(run, settings.test, wanted)):
        raise UserError(
            f"{folder} holds no evaluation of its final weights: train with test data that has "
            "annotations."
        )
    seconds_per_image = run.last(SECONDS_PER_IMAGE, wanted)
    if seconds_per_image is None:
        logger.warning("%s does not record the time per image: the zoo leaves it empty", folder)
    for note in run.notes:
        logger.warning("%s: %s", folder, note)
    weights, origin = _read_weights(run.folder / FINAL_CHECKPOINT, wanted)
    return FinishedRun(
        folder=run.folder,
        settings=settings,
        cfg=None if settings.python else _config(run),
        weights=weights,
        record=record,
        origin=origin,
        box_ap=box_ap,
        seconds_per_iteration=run.seconds_per_iteration(),
        seconds_per_image=seconds_per_image,
        memory_mib=run.last(MEMORY_MIB, wanted),
    )


def _config(run: RunFolder) -> CfgNode:
    cfg = get_cfg()
    add_ghm_config(cfg)
    try:
        cfg.merge_from_other_cfg(CfgNode(run.settings.tree))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the config of {run.folder} is not one of this version ({reason(error)})."
        ) from error
    return cfg


def _box_ap(run: RunFolder, names: tuple[str, ...], iterations: int) -> dict[str, float | None]:
    """Box AP of each test set after the last iteration."""
    keys = {name: f"{name}/bbox/AP" if len(names) > 1 else "bbox/AP" for name in names}
    found = {name: run.last(key, iterations) for name, key in keys.items()}
    return {
        name: round(ap, 2) if math.isfinite(ap) else None
        for name, ap in found.items()
        if ap is not None
    }


def _read_weights(file: Path, iterations: int) -> tuple[dict[str, Tensor], Record]:
    if not file.exists():
        raise UserError(
            f"{file} does not exist: the training is not finished, go on with --resume."
        )
    checkpoint = load_file(file)
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    for key, kind in (("model", dict), ("iteration", int)):
        if not isinstance(entries.get(key), kind):
            raise UserError(f"{file} is not a checkpoint of a training (it has no {key}).")
    weights, done = entries["model"], entries["iteration"] + 1
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{file} holds {name} ({type(value).__name__}) among the tensors of the model."
            )
    if done < iterations:
        raise UserError(
            f"{file} is of iteration {done} and not of the last one, {iterations}: it belongs to "
            "another training."
        )
    return weights, read_origin(entries)
