"""Puts a finished training into a zoo, in the layout of Detectron2's model zoo."""

import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from ghm_d2.checkpoint.files import write_checkpoint
from ghm_d2.checkpoint.origin import ORIGIN
from ghm_d2.config_files import configs_folder
from ghm_d2.errors import UserError, cannot
from ghm_d2.files import write_json, write_text
from ghm_d2.run_folder import METRICS
from ghm_d2.run_parts import Record

from .finished_run import FinishedRun, read_finished_run
from .stock import (
    build_stock_model,
    stock_config,
    stock_obstacle,
    stock_weights,
    without_statistics,
)
from .zoo import NAME, digest, read_index

logger = logging.getLogger(__name__)

_STOCK_HEADER = """\
# For stock Detectron2, which has no GHM losses and needs none to detect.
# MODEL.WEIGHTS names a file beside this one: put its full path there.
"""


def export_run(
    run: str | Path, zoo: str | Path, model_id: int | None = None, name: str | None = None
) -> Path:
    """Writes weights, metrics, configs and an index entry for a finished training.

    Args:
        run: its OUTPUT_DIR.
        zoo: a folder, created if it does not exist.
        model_id: at least 1; None: one more than the largest in the zoo.
        name: of the model; None: its config file relative to `configs/`.

    Returns:
        The new folder `zoo/<name>/<model_id>`.

    Raises:
        UserError: the run is not finished or not evaluated, the name is invalid, or the zoo has a
            model of this name and id already.
    """
    finished = read_finished_run(run)
    name = _config_name(finished) if name is None else name.removesuffix(".yaml")
    if not NAME.fullmatch(name):
        raise UserError(f"the name {name!r} must be words joined by slashes, as in bccd/small.")
    zoo = Path(zoo)
    index_file = zoo / "index.json"
    index = read_index(index_file) if index_file.exists() else {"models": []}
    if model_id is None:
        model_id = 1 + max((entry["id"] for entry in index["models"]), default=0)
    if model_id < 1:
        raise UserError(f"the id must be at least 1, got {model_id}.")
    target = zoo / name / str(model_id)
    listed = any((e["name"], e["id"]) == (name, model_id) for e in index["models"])
    if target.exists() or listed:
        raise UserError(f"{target} exists already: choose another --id.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Under a temporary name first, so that a model in the zoo is always complete.
        with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as new:
            files = _write_files(finished, Path(new, "model"))
            os.rename(Path(new, "model"), target)
        index["models"].append({"name": name, "id": model_id, **files, **_figures(finished)})
        write_json(index_file, index, indent=2)
    except OSError as error:
        raise cannot("written", error.filename, error) from error
    return target


def _config_name(run: FinishedRun) -> str:
    file = run.record.config_file
    if not file:
        raise UserError(f"{run.folder} does not say which config it was trained with: give --name.")
    path, root = Path(file).resolve().with_suffix(""), configs_folder().resolve()
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    # Trained in another checkout, or in one that has been moved: the longest end of the path that
    # names one of our configs.
    ends = (Path(*Path(file).parts[i:]) for i in range(len(Path(file).parts)))
    known = next((end for end in ends if not end.is_absolute() and (root / end).is_file()), None)
    return (known or Path(path.name)).with_suffix("").as_posix()


def _write_files(run: FinishedRun, folder: Path) -> dict[str, Any]:
    """Writes weights, metrics and configs; returns what the index says of them."""
    folder.mkdir()
    weights, config, stock = _for_stock(run) if run.cfg else _of_python_config(run)
    file = write_weights(weights, folder, run.origin)
    write_text(folder / "config.yaml", config)
    shutil.copyfile(run.folder / METRICS, folder / METRICS)
    if stock is not None:
        stock.MODEL.WEIGHTS = file.name
        write_text(folder / "config_stock.yaml", _STOCK_HEADER + stock.dump())
    return {
        "weights": file.name,
        "md5": digest(file, "md5"),
        "sha256": digest(file),
        "config_sha256": digest(folder / "config.yaml"),
        "stock": stock is not None,
        "python": run.cfg is None,
    }


def _for_stock(run: FinishedRun) -> tuple[dict[str, Tensor], str, CfgNode | None]:
    """Weights, config, and a config for stock Detectron2; None if that lacks something."""
    full = run.cfg.clone()
    # These two describe the machine that trained, not the model.
    full.OUTPUT_DIR, full.MODEL.DEVICE = get_cfg().OUTPUT_DIR, get_cfg().MODEL.DEVICE
    stock = stock_config(full)
    model = build_stock_model(stock, full.MODEL.GHM)
    obstacle = stock_obstacle(full, model)
    if obstacle:
        logger.warning("no config for stock Detectron2 is written: it lacks %s", obstacle)
    return stock_weights(run.weights, model), full.dump(), None if obstacle else stock


def _of_python_config(run: FinishedRun) -> tuple[dict[str, Tensor], str, None]:
    """As `_for_stock`, but builds no model, because a Python config may call anything."""
    logger.warning("no config for stock Detectron2 is written: the training's is a Python config")
    tree = copy.deepcopy(run.settings.tree)
    if isinstance(train := tree.get("train"), dict):
        train.update({"output_dir": "./output", "device": "cuda", "init_checkpoint": ""})
    return without_statistics(run.weights), yaml.safe_dump(tree, sort_keys=False), None


def write_weights(
    weights: Mapping[str, Tensor], folder: Path, origin: Record | None = None
) -> Path:
    """Writes `model_final_<first 6 of md5>.pkl` in the format of Detectron2's model zoo.

    Args:
        weights: name to tensor.
        folder: to write to.
        origin: of the weights; its class names and data are stored with them.

    Returns:
        The file.
    """
    file = folder / "model_final.pkl"
    content: dict[str, Any] = {"model": dict(weights), "__author__": "ghm_d2"}
    if origin is not None and origin.classes:
        content[ORIGIN] = {"classes": list(origin.classes), "data": dict(origin.data)}
    write_checkpoint(str(file), content)
    return file.rename(folder / f"model_final_{digest(file, 'md5')[:6]}.pkl")


def _figures(run: FinishedRun) -> dict[str, Any]:
    record, settings = run.record, run.settings
    return {
        "train_data": list(settings.train),
        "classes": list(run.origin.classes or record.classes),
        "iterations": settings.iterations,
        "images_per_batch": settings.images_per_batch,
        "seconds_per_iteration": run.seconds_per_iteration,
        "seconds_per_image": run.seconds_per_image,
        "memory_mib": run.memory_mib,
        "box_ap": run.box_ap,
        "date": record.date,
        "hardware": record.hardware,
        "versions": dict(record.versions) or None,
        "commit": record.commit,
    }
