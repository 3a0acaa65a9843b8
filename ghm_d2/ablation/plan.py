"""From a grid to runs: merged configs, checked before anything starts, and their identities."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from ghm_d2.config import add_ghm_config
from ghm_d2.data import CocoDataset, check_coco_dataset, parse_dataset
from ghm_d2.data.annotations import Uses
from ghm_d2.engine.checks import check_all
from ghm_d2.engine.processes import Processes
from ghm_d2.engine.settings import (
    Config,
    as_leaves,
    change,
    class_counts,
    key_of,
    keys_of,
    read_settings,
)
from ghm_d2.engine.setup import (
    as_typed,
    as_words,
    build_config,
    given_values,
    is_python,
    output_words,
)
from ghm_d2.errors import UserError

from .grid import Grid, Row

# Keys that decide where and how a run is kept, not what comes out of it. The device is among them,
# so that figures measured on a GPU are found again on a machine without one.
_NO_INFLUENCE = keys_of("output_dir", "device", "checkpoint_period")
SPLITS = keys_of("train", "test")
_OWN = {"seed": "--seeds", "output_dir": "--output"}


@dataclass(frozen=True)
class Run:
    """One training: a row of the grid with a seed.

    Attributes:
        id: hexadecimal hash of the configuration and of the data.
        row: name of the row.
        seed: of the training.
        argv: --config-file, FILE and more arguments of train_net.py, without the output folder and
            --resume.
        overrides: what the grid, the row and the command line changed in the config file.
        config: the merged config, keys to plain values, without what is said in `data`,
            `weights`, machine-dependent paths and settings of disabled losses.
        data: split ("train", "test") to data set name to hash of its files.
        weights: name and SHA-256 of the weights to start from where they are a file here.
        iterations: of the whole training.
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

    def argv_into(self, output: Path) -> list[str]:
        """Arguments of train_net.py that train into a folder."""
        return [*self.argv, *output_words(self.argv[1], output)]

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
        seeds: of the trainings.
        scratch: folder for the log of the checks.
        datasets: NAME=annotations.json,image_dir: the first trains, the others test.
        pairs: KEY, VALUE ... (KEY=VALUE each with a Python config), for all rows.
        config_file: base config, instead of the grid's.
        num_gpus: processes of each run.
        complete: whether everything that a training needs must be there, weights included.

    Returns:
        One run for each row and seed, all rows of the first seed first, so that a table which is
        cut short compares as many rows as it can.

    Raises:
        UserError: a config, a key or the data is wrong; the message names the row.
    """
    options = ["--num-gpus", str(num_gpus)] if num_gpus > 1 else []
    given = [word for text in datasets for word in ("--dataset", text)]
    base = str(config_file or grid.config_file)
    common = _typed(base, grid.overrides) | given_values(base, pairs)
    # The first config registers the data and finds the splits, which all rows then share.
    first, registered = _build(base, common, scratch, datasets)
    _check_overrides(first, grid, given_values(base, pairs))
    settings = read_settings(first)
    shared: dict[str, str] = {}
    # A training counts the classes of its data itself, but its splits must not depend on the order.
    splits: dict[str, str] = {}
    if datasets:
        splits = {
            key_of(first, name): as_typed(base, getattr(settings, name))
            for name in ("train", "test")
        }
        shared = splits | {key: str(count) for key, count in class_counts(first).items()}
    # Once for all rows, so that a warning about the device appears once.
    device = {key_of(first, "device"): as_typed(base, settings.device)}

    fingerprints = _Fingerprints(registered)
    runs = []
    for row in grid.rows:
        own = common | _typed(base, row.overrides)
        file = str(row.config_file or base)
        with _named(f"row {row.name!r}"):
            if is_python(file) != is_python(base):
                raise UserError(
                    f"{file} and {base} are not both YAML or both Python configs, but all rows "
                    "must have the same keys."
                )
            overrides = own | shared | device
            cfg, _ = _build(file, overrides, scratch)
            if complete:
                check_all(cfg, overrides.keys(), Processes(num_gpus))
            if not read_settings(cfg).test:
                test = key_of(cfg, "test")
                raise UserError(
                    f"{test} is empty, and an ablation compares evaluations: give a second "
                    f"--dataset, or {test}."
                )
            data = {
                split: {name: fingerprints.of(name) for name in getattr(read_settings(cfg), split)}
                for split in ("train", "test")
            }
        words = ["--config-file", file, *given, *options]
        for seed in seeds:
            change(cfg, "seed", seed)
            runs.append(_run(row, cfg, data, words, own, splits))
    runs.sort(key=lambda run: seeds.index(run.seed))  # stable: the rows stay in order
    return runs


def _typed(file: str, overrides: Mapping[str, Any]) -> dict[str, str]:
    return {key: as_typed(file, value) for key, value in overrides.items()}


def _build(
    file: str, overrides: Mapping[str, str], scratch: Path, datasets: Sequence[str] = ()
) -> tuple[Config, list[CocoDataset]]:
    return build_config(file, [*as_words(file, overrides), *output_words(file, scratch)], datasets)


def _run(
    row: Row,
    cfg: Config,
    data: dict[str, dict[str, str]],
    words: list[str],
    own: Mapping[str, str],
    splits: Mapping[str, str],
) -> Run:
    settings, config, file = read_settings(cfg), flat(cfg), words[1]
    weights = _weights(config, key_of(cfg, "weights"))
    # A Python config has no defaults: all of it counts.
    defaults = _defaults() if isinstance(cfg, CfgNode) else {}
    changed = {k: v for k, v in config.items() if k not in SPLITS and v != defaults.get(k)}
    # By content, not by name: the same data under another name is the same run.
    content = [changed, [list(names.values()) for names in data.values()]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    period = min(settings.checkpoint_period, max(settings.max_iter // 10, 1))
    last = {key_of(cfg, "seed"): settings.seed, key_of(cfg, "checkpoint_period"): period}
    overrides = {**own, **splits, **{key: str(value) for key, value in last.items()}}
    return Run(
        id=digest[:12],
        row=row.name,
        seed=settings.seed,
        argv=(*words, *as_words(file, overrides)),
        overrides={k: config[k] for k in own if k in config},
        config=config,
        data=data,
        weights=weights,
        iterations=settings.max_iter,
    )


def flat(cfg: Config) -> dict[str, Any]:
    """The leaves of a config as JSON has them, without the keys that change no result."""
    return effective({k: v for k, v in as_leaves(cfg).items() if k not in _NO_INFLUENCE})


def first_dataset(datasets: Sequence[str], without: str) -> CocoDataset:
    """Checks the data set that rows are trained on, to make other annotation files of it.

    Args:
        datasets: NAME=annotations.json,image_dir each.
        without: the sentence where there is none.

    Raises:
        UserError: there is none, or it is not COCO-format data.
    """
    if not datasets:
        raise UserError(without)
    return check_coco_dataset(parse_dataset(datasets[0]), uses=Uses(keypoints=False))


def effective(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out the settings of losses that are not enabled: they have no influence on a run.

    Args:
        config: keys to values; one from an older file still has these settings.
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


def _weights(config: dict[str, Any], key: str) -> dict[str, str]:
    """Replace the path of a local file by its name; returns name and hash of its content."""
    path, mark, query = (config.get(key) or "").partition("?")
    if not path or "://" in path:
        return {}
    config[key] = os.path.basename(path) + mark + query
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


def _check_overrides(cfg: Config, grid: Grid, given: Mapping[str, str]) -> None:
    """Refuse overrides that have an option of their own or would make rows equal."""
    own = {key_of(cfg, name): option for name, option in _OWN.items()}
    for key in [*given, *grid.overrides, *(key for row in grid.rows for key in row.overrides)]:
        if key in own:
            raise UserError(f"{key} is set by this tool: use {own[key]} instead.")
    for row in grid.rows:
        for key in row.overrides:
            if key in given:
                raise UserError(
                    f"{key} cannot be set for all runs: it is what row {row.name!r} differs in."
                )


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
