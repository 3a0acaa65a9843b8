"""Puts a finished training into a zoo, as Detectron2's model zoo has it."""

import hashlib
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from ghm_d2.errors import UserError
from ghm_d2.model_zoo.finished_run import FinishedRun, read_finished_run
from ghm_d2.model_zoo.index import NAME, read_index, write_index
from ghm_d2.model_zoo.model_zoo import configs_folder
from ghm_d2.model_zoo.stock import build_stock_model, stock_config, stock_obstacle, stock_weights
from ghm_d2.model_zoo.zoo import sha256_of

__all__ = ["export_run", "write_weights"]

logger = logging.getLogger(__name__)

_STOCK_HEADER = """\
# For stock Detectron2, which knows no GHM losses: finds what the model was trained to find.
# MODEL.WEIGHTS lies beside this file; give its path.
"""


def export_run(
    run: str | Path, zoo: str | Path, model_id: int | None = None, name: str | None = None
) -> Path:
    """Write weights, metrics, configs and an index entry for a finished training.

    Args:
        run: its OUTPUT_DIR.
        zoo: a folder, created if it does not exist.
        model_id: at least 1; None: one more than the largest in the zoo.
        name: of the model; None: its config file relative to ``configs/``.

    Returns:
        The new folder ``zoo/<name>/<model_id>``.

    Raises:
        UserError: the run is not finished or not evaluated, the name is none, or the zoo has a
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
        # In one piece or not at all.
        with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as new:
            files = _write_files(finished, Path(new, "model"))
            os.rename(Path(new, "model"), target)
        index["models"].append({"name": name, "id": model_id, **files, **_figures(finished)})
        write_index(index_file, index)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written ({error.strerror}).") from error
    return target


def _config_name(run: FinishedRun) -> str:
    file = run.record.get("config_file")
    if not file:
        raise UserError(f"{run.folder} does not say which config it was trained with: give --name.")
    path, root = Path(file).resolve().with_suffix(""), configs_folder().resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _write_files(run: FinishedRun, folder: Path) -> dict[str, Any]:
    """Write the four files; return what the index says of them."""
    folder.mkdir()
    full = run.cfg.clone()
    # Of the machine that trained, not of the model.
    full.OUTPUT_DIR, full.MODEL.DEVICE = get_cfg().OUTPUT_DIR, get_cfg().MODEL.DEVICE
    stock = stock_config(full)
    model = build_stock_model(stock, full.MODEL.GHM)
    weights = write_weights(stock_weights(run.weights, model), folder)
    (folder / "config.yaml").write_text(full.dump())
    shutil.copyfile(run.folder / "metrics.json", folder / "metrics.json")
    if obstacle := stock_obstacle(full, model):
        logger.warning("no config for stock Detectron2 is written: it lacks %s", obstacle)
    else:
        stock.MODEL.WEIGHTS = weights.name
        (folder / "config_stock.yaml").write_text(_STOCK_HEADER + stock.dump())
    return {
        "weights": weights.name,
        "md5": _md5(weights),
        "sha256": sha256_of(weights),
        "config_sha256": sha256_of(folder / "config.yaml"),
        "stock": obstacle is None,
    }


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> Path:
    """Write ``model_final_<first 6 of md5>.pkl`` in the format of Detectron2's model zoo.

    Returns:
        The file.
    """
    file = folder / "model_final.pkl"
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    data = pickle.dumps({"model": arrays, "__author__": "ghm_d2"}, protocol=3)
    # NumPy 1 does not know this name, NumPy 2 knows both. It stands once, before the first array.
    file.write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1))
    return file.rename(folder / f"model_final_{_md5(file)[:6]}.pkl")


def _md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


def _figures(run: FinishedRun) -> dict[str, Any]:
    cfg: CfgNode = run.cfg
    return {
        "train_data": list(cfg.DATASETS.TRAIN),
        "classes": run.record.get("classes", []),
        "iterations": cfg.SOLVER.MAX_ITER,
        "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
        "seconds_per_iteration": run.seconds_per_iteration,
        "seconds_per_image": run.seconds_per_image,
        "memory_mib": run.memory_mib,
        "box_ap": run.box_ap,
        **{key: run.record.get(key) for key in ("date", "hardware", "versions", "commit")},
    }
