"""From the text in the files of a run to values of the promised types; no file is opened here.

Whatever valid JSON or YAML a file may hold becomes such a value or a ValueError.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ghm_d2.errors import reason
from ghm_d2.files import parse_json

Rows = dict[int, dict[str, Any]]

_MOST_VALUES = 100_000  # of a config


@dataclass(frozen=True)
class Record:
    """training.json: what a training says about itself when it begins.

    Attributes:
        date: ISO 8601.
        config: as text; kept here because an evaluation in the same folder replaces config.yaml.
        config_file: path of the file that was trained with.
        classes: names in the order of the model's outputs.
        datasets: annotation file and image folder of each data set of the command line.
        data: fingerprint of each data set that was trained on.
        hardware: in words.
        versions: of Python and packages.
        commit: of this project's checkout.
        score_thresholds: lowest score, in [0, 1], of the detections with the best F1, by class; ""
            for all classes. Checkpoints hold them, training.json does not.
    """

    date: str | None = None
    config: str = ""
    config_file: str | None = None
    classes: tuple[str, ...] = ()
    datasets: Mapping[str, tuple[Path, Path]] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hardware: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    score_thresholds: Mapping[str, float] = field(default_factory=dict)


def parse_record(content: Mapping[str, Any]) -> tuple[Record, list[str]]:
    """The record in a JSON object, and the names of the fields that are damaged and left out."""
    known: dict[str, Any] = {}
    damaged = []
    for name, usable in _RECORD.items():
        try:
            if (value := content.get(name)) is not None:
                known[name] = usable(value)
        except ValueError:
            damaged.append(name)
    return Record(**known), damaged


def _a(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{kind.__name__} expected")
    return value


def _texts(value: Any) -> list[str]:
    return [_a(str, x) for x in _a(list, value)]


def _score(value: Any) -> float:
    score = _number(value)
    if not 0 <= score <= 1:
        raise ValueError("a score lies in [0, 1]")
    return score


def _paths(value: Any) -> tuple[Path, Path]:
    file, images = _texts(value)
    return Path(file), Path(images)


_RECORD: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("date", "config", "config_file", "hardware", "commit"), partial(_a, str)),
    "classes": lambda x: tuple(_texts(x)),
    "datasets": lambda x: {name: _paths(value) for name, value in _a(dict, x).items()},
    "data": lambda x: {name: _a(dict, value) for name, value in _a(dict, x).items()},
    "versions": lambda x: {k: _a(str, v) for k, v in _a(dict, x).items() if v is not None},
    "score_thresholds": lambda x: {_a(str, k): _score(v) for k, v in _a(dict, x).items()},
}


@dataclass(frozen=True)
class Settings:
    """What readers of a run need from its config, be it a YAML or a Python one.

    Attributes:
        tree: the config as nested dictionaries, lists, texts and numbers.
        python: whether it is a Python config, as LazyConfig.save writes it.
        detector: name of the class.
        train, test: names of the data sets.
        iterations, images_per_batch, detections_per_image: None where the config does not say.
    """

    tree: Mapping[str, Any] = field(default_factory=dict)
    python: bool = False
    detector: str = ""
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    iterations: int | None = None
    images_per_batch: int | None = None
    detections_per_image: int | None = None


def parse_settings(text: str) -> Settings:
    """Parses a config; no code that it names is run.

    Args:
        text: `cfg.dump()`, or what LazyConfig.save has written.

    Raises:
        ValueError: it is not the YAML of a config.
    """
    try:
        tree = _plain(yaml.load(text, _PlainLoader), [_MOST_VALUES])
    except (yaml.YAMLError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"it is not valid YAML: {reason(error)}") from error
    if not isinstance(tree, dict):
        raise ValueError("it is not the YAML of a config")
    python = "MODEL" not in tree and isinstance(tree.get("model"), dict)
    detector, train, test, *counts = (_at(tree, keys[python].split(".")) for keys in _KEYS)
    return Settings(
        tree,
        python,
        detector.rpartition(".")[2] if isinstance(detector, str) else "",
        _names(train),
        _names(test),
        *(count if type(count) is int and count >= 0 else None for count in counts),
    )


# In a YAML config, and in a Python one.
_KEYS = (
    ("MODEL.META_ARCHITECTURE", "model._target_"),
    ("DATASETS.TRAIN", "dataloader.train.dataset.names"),
    ("DATASETS.TEST", "dataloader.test.dataset.names"),
    ("SOLVER.MAX_ITER", "train.max_iter"),
    ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size"),
    ("TEST.DETECTIONS_PER_IMAGE", "dataloader.evaluator.max_dets_per_image"),
)


class _PlainLoader(yaml.SafeLoader):
    """Reads a value with a Python tag, such as a tuple or a name, as its text or its parts."""


def _untagged(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_scalar(node) or tag.rpartition(":")[2]
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_mapping(node, deep=True)


_PlainLoader.add_multi_constructor("", _untagged)


def _plain(node: Any, room: list[int]) -> Any:
    """A copy without what JSON lacks; its size is limited, because YAML's aliases can explode."""
    room[0] -= 1
    if room[0] < 0:
        raise ValueError(f"it has more than {_MOST_VALUES} values")
    if isinstance(node, dict):
        return {str(key): _plain(value, room) for key, value in node.items()}
    if isinstance(node, list | tuple | set):
        return [_plain(value, room) for value in node]
    return node if node is None or isinstance(node, bool | int | float | str) else str(node)


def _at(tree: Any, path: Sequence[str]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _names(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(name for name in values if isinstance(name, str) and name)


def parse_row(
    line: str, usable: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> tuple[int, dict[str, Any]]:
    """The iteration and the values in a line of JSON.

    Args:
        line: of metrics.json or gradient_statistics.jsonl.
        usable: :func:`metrics_row` or :func:`statistics_row`.

    Raises:
        ValueError: it is no such line.
    """
    row = _a(dict, parse_json(line))
    iteration = row.pop("iteration", None)
    if type(iteration) is not int or not 0 <= iteration < 2**53:
        raise ValueError("it has no iteration")
    return iteration, usable(row)


def metrics_row(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name; NaN for null."""
    return {name: _number(value) for name, value in row.items()}


def statistics_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Name of the loss, histograms of each of its calls, all of one length, and gradient shares."""
    keys = ("counts", "gradient_share")
    calls = [
        {key: [_number(x) for x in _a(list, _a(dict, call).get(key))] for key in keys}
        for call in _a(list, row.get("calls"))
    ]
    if len({len(values) or None for call in calls for values in call.values()} | {None}) != 2:
        raise ValueError("the histograms are empty or of several lengths")
    shares = {name: _number(x) for name, x in row.items() if name.startswith("gradient_share_")}
    return {"loss": _a(str, row.get("loss")), "calls": calls, **shares}


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("number expected")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError("number out of range") from error


def finite(value: Any) -> float | None:
    """The value as a number; None where it is none, or not finite."""
    try:
        number = _number(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def last_training(rows: Sequence[tuple[int, dict[str, Any]]]) -> Rows:
    """Rows by iteration, without those of an earlier training from where a later one began."""
    kept: Rows = {}
    previous = -1
    for iteration, row in rows:
        if iteration < previous:
            kept = {i: values for i, values in kept.items() if i < iteration}
        kept.setdefault(iteration, {}).update(row)
        previous = iteration
    return kept
