"""From a grid to runs: merged configs, checked before anything starts, and their identities."""

import argparse
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

from ghm_d2.ablation.grid import Grid, Row
from ghm_d2.config import add_ghm_config
from ghm_d2.data import CocoDataset
from ghm_d2.engine.checks import check_all
from ghm_d2.engine.processes import Processes
from ghm_d2.engine.setup import build_config
from ghm_d2.errors import UserError

__all__ = ["Run", "effective", "plan_runs"]

# Keys that decide where and how a run is kept, not what comes out of it. The device is among them:
# seeds already stand for the last digits, and the figures of a GPU shall be found without one.
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
        config: the merged config, keys to plain values, without what is said in ``data``,
            ``weights``, machine-dependent paths and settings of disabled losses.
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


def plan_runs(grid: Grid, args: argparse.Namespace, scratch: Path) -> list[Run]:
    """Build and check the config of every row; nothing is trained.

    Args:
        grid: the table.
        args: with ``seeds``, ``dataset``, ``opts``, ``config_file``, ``num_gpus`` and
            ``report_only`` (weights may be missing).
        scratch: folder for the log of the checks.

    Returns:
        One run for each row and seed, all rows of the first seed first, so that a table which is
        cut short compares as many rows as it can.

    Raises:
        UserError: a config, a key or the data is wrong; the message names the row.
    """
    _check_pairs(grid, args.opts)
    base = Path(args.config_file) if args.config_file else grid.config_file
    pairs = [*_words(grid.overrides), *args.opts]
    # The first config registers the data and finds the splits, which all rows then share.
    first, datasets = _build(base, pairs, scratch, args.dataset)
    shared = []
    if datasets:
        shared = _words({key: _leaf(first, key) for key in (*SPLITS, *_NUM_CLASSES)})
    device = ["MODEL.DEVICE", first.MODEL.DEVICE]  # chosen, and warned of, once

    fingerprints = _Fingerprints(datasets)
    runs = []
    for row in grid.rows:
        own = [*pairs, *_words(row.overrides)]
        file = row.config_file or base
        with _named(f"row {row.name!r}"):
            words = [*own, *shared, *device]
            cfg, _ = _build(file, words, scratch)
            if not args.report_only:
                check_all(cfg, set(words[::2]), Processes(args.num_gpus))
            if not cfg.DATASETS.TEST:
                raise UserError(
                    "DATASETS.TEST is empty, and an ablation compares evaluations: give a second "
                    "--dataset, or DATASETS.TEST."
                )
        for seed in args.seeds:
            cfg.SEED = seed
            runs.append(_run(row, seed, file, own, shared, cfg, args, fingerprints))
    runs.sort(key=lambda run: args.seeds.index(run.seed))  # stable: the rows stay in order
    return runs


def _build(
    file: Path, pairs: Sequence[str], scratch: Path, datasets: Sequence[str] = ()
) -> tuple[CfgNode, list[CocoDataset]]:
    return build_config(str(file), [*pairs, "OUTPUT_DIR", str(scratch)], datasets)


def _run(
    row: Row,
    seed: int,
    file: Path,
    own: list[str],
    shared: list[str],
    cfg: CfgNode,
    args: argparse.Namespace,
    fingerprints: "_Fingerprints",
) -> Run:
    config = flat(cfg)
    data = {
        split: {name: fingerprints.of(name) for name in cfg.DATASETS[split.upper()]}
        for split in ("train", "test")
    }
    weights = _weights(config)
    changed = {k: v for k, v in config.items() if k not in SPLITS and v != _defaults().get(k)}
    # By content, not by name: the same data under another name is the same run.
    content = [changed, [list(names.values()) for names in data.values()]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    options = ["--config-file", str(file)]
    for text in args.dataset:
        options += ["--dataset", text]
    if args.num_gpus > 1:
        options += ["--num-gpus", str(args.num_gpus)]
    period = min(cfg.SOLVER.CHECKPOINT_PERIOD, max(cfg.SOLVER.MAX_ITER // 10, 1))
    late = _words({"SEED": seed, "SOLVER.CHECKPOINT_PERIOD": period})
    pairs = dict(zip(own[::2], own[1::2], strict=True))
    splits = [word for pair in zip(shared[::2], shared[1::2], strict=True)
              if pair[0] in SPLITS for word in pair]  # fmt: skip
    return Run(
        id=digest[:12],
        row=row.name,
        seed=seed,
        argv=(*options, *(word for pair in pairs.items() for word in pair), *splits, *late),
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
    """Leave out the settings of losses that are not enabled: they decide nothing of a run.

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
            self._known[name] = self._hash(name)
        return self._known[name]

    def _hash(self, name: str) -> str:
        metadata = MetadataCatalog.get(name)
        found = self._files.get(name, (metadata.get("json_file"), metadata.get("image_root")))
        if found[0] and found[1]:
            annotations = _sha256(found[0])
            with open(found[0], encoding="utf-8") as stream:
                names = [image["file_name"] for image in json.load(stream)["images"]]
            sizes = [os.path.getsize(os.path.join(found[1], name)) for name in names]
            content: list[Any] = [annotations, sorted(zip(names, sizes, strict=True))]
        else:  # registered by the user's own code
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
