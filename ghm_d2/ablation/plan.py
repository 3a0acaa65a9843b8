"""From a grid to runs: merged configs, checked before anything starts, and their identities."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict

from ghm_d2.config import add_ghm_config
from ghm_d2.data import CocoDataset
from ghm_d2.engine.checks import check_all
from ghm_d2.engine.processes import Processes
from ghm_d2.engine.setup import build_config
from ghm_d2.errors import UserError

from .grid import Grid, Row

__all__ = ["Run", "effective", "plan_runs"]

# Keys that decide where and how a run is kept, not what comes out of it. The device is among them,
# so that figures measured on a GPU are found again on a machine without one.
_NO_INFLUENCE = ("OUTPUT_DIR", "MODEL.DEVICE", "SOLVER.CHECKPOINT_PERIOD")
SPLITS = ("DATASETS.TRAIN", "DATASETS.TEST")
_NUM_CLASSES = ("MODEL.RETINANET.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES")
_OWN = {"SEED": "--seeds", "OUTPUT_DIR": "--output"}


@dataclass(frozen=True)
class Run:
    """One training: a row of the grid with a seed.

    Attributes:
        id: hexadecimal hash of the configuration and of the data.
        row: name of the row.
        seed: value of SEED.
        argv: arguments of train_net.py, without OUTPUT_DIR and --resume.
        overrides: what the grid, the row and the command line changed in the config file.
        config: the merged config, keys to plain values, without what is said in `data`,
            `weights`, machine-dependent paths and settings of disabled losses.
        data: split ("train", "test") to data set name to hash of its files.
        weights: name and SHA-256 of MODEL.WEIGHTS where that is a file here.
        iterations: SOLVER.MAX_ITER.
    """

    id: str
    row: str
    seed: int
    argv: tuple[str, ...]
    overrides: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, dict[str, str]]
    weights: dict[str, str]
    iterations: int

    @property
    def name(self) -> str:
        """How a person refers to it."""
        return f"{self.row}, seed {self.seed}"


def plan_runs(
    grid: Grid,
    seeds: Sequence[int],
    *,
    scratch: Path,
    datasets: Sequence[str] = (),
    pairs: Sequence[str] = (),
    config_file: str | None = None,
    num_gpus: int = 1,
    complete: bool = True,
) -> list[Run]:
    """Build and check the config of every row; nothing is trained.

    Args:
        grid: the table.
        seeds: values of SEED.
        scratch: folder for the log of the checks.
        datasets: NAME=annotations.json,image_dir: the first trains, the others test.
        pairs: KEY VALUE ..., for all rows.
        config_file: base config, instead of the grid's.
        num_gpus: processes of each run.
        complete: whether everything must be there that a training needs, weights among it.

    Returns:
        One run for each row and seed, all rows of the first seed first, so that a table which is
        cut short compares as many rows as it can.

    Raises:
        UserError: a config, a key or the data is wrong; the message names the row.
    """
    _check_pairs(grid, pairs)
    options = ["--num-gpus", str(num_gpus)] if num_gpus > 1 else []
    given = [word for text in datasets for word in ("--dataset", text)]
    base = Path(config_file) if config_file else grid.config_file
    common = [*_words(grid.overrides), *pairs]
    # The first config registers the data and finds the splits, which all rows then share.
    first, registered = _build(base, common, scratch, datasets)
    shared = {key: _leaf(first, key) for key in (*SPLITS, *_NUM_CLASSES)} if datasets else {}
    # A training counts the classes of its data itself, but its splits must not depend on the order.
    splits = _words({key: value for key, value in shared.items() if key in SPLITS})
    device = ["MODEL.DEVICE", first.MODEL.DEVICE]  # chosen, and warned of, once

    fingerprints = _Fingerprints(registered)
    runs = []
    for row in grid.rows:
        own = [*common, *_words(row.overrides)]
        file = row.config_file or base
        with _named(f"row {row.name!r}"):
            words = [*own, *_words(shared), *device]
            cfg, _ = _build(file, words, scratch)
            if complete:
                check_all(cfg, set(words[::2]), Processes(num_gpus))
            if not cfg.DATASETS.TEST:
                raise UserError(
                    "DATASETS.TEST is empty, and an ablation compares evaluations: give a second "
                    "--dataset, or DATASETS.TEST."
                )
            data = {
                split: {name: fingerprints.of(name) for name in cfg.DATASETS[split.upper()]}
                for split in ("train", "test")
            }
        words = ["--config-file", str(file), *given, *options]
        for seed in seeds:
            cfg.SEED = seed
            runs.append(_run(row, cfg, data, words, own, splits))
    runs.sort(key=lambda run: seeds.index(run.seed))  # stable: the rows stay in order
    return runs


def _build(
    file: Path, pairs: Sequence[str], scratch: Path, datasets: Sequence[str] = ()
) -> tuple[CfgNode, list[CocoDataset]]:
    return build_config(str(file), [*pairs, "OUTPUT_DIR", str(scratch)], datasets)


def _run(
    row: Row,
    cfg: CfgNode,
    data: dict[str, dict[str, str]],
    words: list[str],
    own: list[str],
    splits: list[str],
) -> Run:
    config = flat(cfg)
    weights = _weights(config)
    changed = {k: v for k, v in config.items() if k not in SPLITS and v != _defaults().get(k)}
    # By content, not by name: the same data under another name is the same run.
    content = [changed, [list(names.values()) for names in data.values()]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    period = min(cfg.SOLVER.CHECKPOINT_PERIOD, max(cfg.SOLVER.MAX_ITER // 10, 1))
    pairs = dict(zip(own[::2], own[1::2], strict=True))
    last = _words({"SEED": cfg.SEED, "SOLVER.CHECKPOINT_PERIOD": period})
    return Run(
        id=digest[:12],
        row=row.name,
        seed=cfg.SEED,
        argv=(*words, *_words(pairs), *splits, *last),
        overrides={k: config[k] for k in pairs if k in config},
        config=config,
        data=data,
        weights=weights,
        iterations=cfg.SOLVER.MAX_ITER,
    )


def flat(cfg: CfgNode) -> dict[str, Any]:
    """The leaves of a config as JSON has them, without the keys that change no result."""
    leaves = {key.replace("/", "."): value for key, value in flatten_results_dict(cfg).items()}
    kept = {k: v for k, v in leaves.items() if k not in _NO_INFLUENCE}
    return json.loads(json.dumps(effective(kept)))


def effective(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out the settings of losses that are not enabled: they have no influence on a run.

    Args:
        config: keys to values; also of an older file, which has them still.
    """
    disabled = tuple(
        key.removesuffix("ENABLED")
        for key, value in config.items()
        if key.startswith("MODEL.GHM.") and key.endswith(".ENABLED") and not value
    )
    return {
        key: value
        for key, value in config.items()
        if not key.startswith(disabled) or key.endswith(".ENABLED")
    }


@functools.cache
def _defaults() -> dict[str, Any]:
    cfg = get_cfg()
    add_ghm_config(cfg)
    return flat(cfg)


def _weights(config: dict[str, Any]) -> dict[str, str]:
    """Replace the path of a local file by its name; returns name and hash of its content."""
    path, mark, query = config["MODEL.WEIGHTS"].partition("?")
    if not path or "://" in path:
        return {}
    config["MODEL.WEIGHTS"] = os.path.basename(path) + mark + query
    found = {"sha256": _sha256(path)} if os.path.isfile(path) else {}
    return {"name": os.path.basename(path), **found}


def _sha256(path: str | os.PathLike[str]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class _Fingerprints:
    """Hashes of the data: the annotations' bytes, and the name and size of every image.

    The images' bytes are not read: that would take minutes on COCO.
    """

    def __init__(self, datasets: Sequence[CocoDataset]) -> None:
        self._files = {d.name: (d.json_file, d.image_root) for d in datasets}
        self._known: dict[str, str] = {}

    def of(self, name: str) -> str:
        """Hexadecimal hash of a registered data set."""
        if name not in self._known:
            try:
                self._known[name] = self._hash(name)
            except OSError as error:
                raise UserError(f"the data set {name} cannot be read ({error}).") from error
        return self._known[name]

    def _hash(self, name: str) -> str:
        metadata = MetadataCatalog.get(name)
        if (file := metadata.get("json_file")) and not os.path.isfile(file):
            DatasetCatalog.get(name)  # the default data set is drawn on first use
        found = self._files.get(name, (metadata.get("json_file"), metadata.get("image_root")))
        if found[0] and found[1] and os.path.isfile(found[0]):
            annotations = _sha256(found[0])
            with open(found[0], encoding="utf-8") as stream:
                names = [image["file_name"] for image in json.load(stream)["images"]]
            sizes = [os.path.getsize(os.path.join(found[1], name)) for name in names]
            content: list[Any] = [annotations, sorted(zip(names, sizes, strict=True))]
        else:  # registered by the user's own code, or a folder of labels
            records = DatasetCatalog.get(name)
            content = [
                record | {"file_name": os.path.basename(record["file_name"])} for record in records
            ]
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_pairs(grid: Grid, pairs: Sequence[str]) -> None:
    """Refuse pairs that belong to an option, or that would make rows equal."""
    for key in [*pairs[::2], *grid.overrides, *(key for row in grid.rows for key in row.overrides)]:
        if key in _OWN:
            raise UserError(f"{key} is set by this tool: use {_OWN[key]} instead.")
    for row in grid.rows:
        for key in row.overrides:
            if key in pairs[::2]:
                raise UserError(
                    f"{key} cannot be set for all runs: it is what row {row.name!r} differs in."
                )


def _words(overrides: dict[str, Any]) -> list[str]:
    return [str(word) for pair in overrides.items() for word in pair]


def _leaf(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
