"""From a config file and what overrides it to a config: data sets, classes, device."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from hydra.core.override_parser.types import Quote, QuotedString

from ghm_d2 import data, model_zoo, modeling  # noqa: F401  (they register what configs name)
from ghm_d2.config import add_ghm_config
from ghm_d2.config_files import find_config, similar_configs
from ghm_d2.data import CocoDataset, register_datasets
from ghm_d2.data.class_weights import set_class_weights
from ghm_d2.errors import UserError, cannot, counted, reason, similar_names

from .python_config import load_config as load_python_config
from .python_config import read_uses
from .settings import (
    Config,
    change,
    class_counts,
    class_keys,
    fill_nulls,
    key_of,
    read_settings,
    set_key,
)

logger = logging.getLogger(__name__)


def is_python(file: str) -> bool:
    """Whether a config file is a program, which only its suffix tells."""
    return file.endswith(".py")


def given_values(file: str, overrides: Sequence[str]) -> dict[str, str]:
    """The keys that the overrides of a config file name, and their values as they were typed."""
    if is_python(file):
        return {key: value for key, _, value in (text.partition("=") for text in overrides)}
    return dict(zip(overrides[::2], overrides[1::2], strict=True))


def given_keys(file: str, overrides: Sequence[str]) -> set[str]:
    """The keys alone."""
    return set(given_values(file, overrides))


def as_words(file: str, values: Mapping[str, str]) -> list[str]:
    """The overrides of a config file that :func:`given_values` reads."""
    if is_python(file):
        return [f"{key}={value}" for key, value in values.items()]
    return [word for pair in values.items() for word in pair]


def as_typed(file: str, value: Any) -> str:
    """What a user types for a value; quoted for Hydra, which would parse a bare string."""
    if not is_python(file):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(as_typed(file, item) for item in value)}]"
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    return "null" if value is None else str(value)


def output_words(file: str, folder: str | os.PathLike[str]) -> list[str]:
    """The override that sends whatever a run leaves to a folder."""
    key = "train.output_dir" if is_python(file) else "OUTPUT_DIR"
    return as_words(file, {key: as_typed(file, str(folder))})


def build_config(
    config_file: str,
    overrides: Sequence[str] = (),
    datasets: Sequence[str] = (),
    *,
    eval_only: bool = False,
    log_to_file: bool = True,
) -> tuple[Config, list[CocoDataset]]:
    """Build the config of a run and register its data sets.

    Args:
        config_file: as for :func:`load_config`.
        overrides: likewise.
        datasets: NAME=annotations.json,image_dir or NAME=FOLDER, each.
        eval_only: whether all data sets are for testing.
        log_to_file: whether the log goes to a file in the output folder too.

    Returns:
        The config, not frozen, and the checked data sets, which every other process registers too.

    Raises:
        UserError: the config or the data is wrong.
    """
    cfg = load_config(config_file, overrides)
    try:
        if log_to_file:
            setup_ghm_logger(read_settings(cfg).output_dir, comm.get_rank())
    except OSError as error:
        folder = f"{key_of(cfg, 'output_dir')} {read_settings(cfg).output_dir or repr('')}"
        raise cannot("written", folder, error) from error
    choose_device(cfg)

    uses = read_uses(cfg)
    checked = register_datasets(datasets, labelled=not eval_only, uses=uses)
    if checked:
        given = given_keys(config_file, overrides)
        choose_splits(cfg, [dataset.name for dataset in checked], given, eval_only)
        _set_num_classes(cfg, checked[0], given)
    if isinstance(cfg, CfgNode):
        set_class_weights(cfg)
    return cfg, checked


def load_config(config_file: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a file, changed by the overrides alone.

    Args:
        config_file: a .yaml or .py file, or the name of one in `configs/`; a .py file is
            executed.
        overrides: KEY, VALUE, KEY, VALUE ... for YAML, KEY=VALUE each for Python.

    Raises:
        UserError: the file or an override is wrong.
    """
    file = locate_config_file(config_file)
    if is_python(file):
        cfg = load_python_config(file, overrides)
        fill_nulls(cfg)
        return cfg
    cfg = get_cfg()
    add_ghm_config(cfg)
    merge_config_file(cfg, file)
    _merge_pairs(cfg, overrides)
    return cfg


def locate_config_file(file: str) -> str:
    """The path of a config file: that file, or else the one of this name in `configs/`.

    Raises:
        UserError: there is neither.
    """
    if os.path.isfile(file):
        return file
    if found := find_config(file):
        return found
    raise UserError(f"the config file {file} does not exist{similar_configs(file)}.")


def setup_ghm_logger(output_dir: str, rank: int) -> None:
    """Send this package's log where Detectron2 sends its own."""
    setup_logger(output_dir, distributed_rank=rank, name="ghm_d2")


def merge_config_file(cfg: CfgNode, file: str) -> None:
    """Merge a YAML file into `cfg`, running no code that it names.

    Raises:
        UserError: the file is not a valid config; the sentence names what is wrong.
    """
    try:
        # Unsafe YAML runs whatever code the file names.
        cfg.merge_from_file(file, allow_unsafe=False)
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{file} (or its _BASE_) needs unsafe YAML loading ({error.problem}): write the value "
            "out instead of the tag."
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {reason(error)}.") from error
    except OSError as error:  # its _BASE_
        raise cannot("read", f"{file}: {error.filename}", error) from error
    except RecursionError as error:
        raise UserError(f"{file}: its _BASE_ leads back to itself.") from error
    except KeyError as error:
        key = str(error.args[0]).rpartition(" ")[2]
        raise UserError(f"{file}: unknown key {key}{_similar(cfg, key)}.") from error
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        kinds, values, full_key = str(error).rpartition("for config key: ")
        if values:  # yacs puts the values between them, which may be a whole tree
            kinds = kinds.partition(" with values")[0]
            raise UserError(f"{file} is not a valid config: {full_key}: {kinds}.") from error
        raise UserError(f"{file} is not a valid config: {reason(error)}.") from error


def _merge_pairs(cfg: CfgNode, pairs: Sequence[str]) -> None:
    known = dict(_leaves(cfg))
    for key, text in zip(pairs[::2], pairs[1::2], strict=True):
        if key not in known:
            raise UserError(f"unknown key {key}{_similar(cfg, key)}.")
        try:
            cfg.merge_from_list([key, text])
        except ValueError as error:
            default = known[key]
            raise UserError(
                f"{key} is of type {type(default).__name__}, as in {default!r}: "
                f"{text} does not fit."
            ) from error


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _similar(cfg: CfgNode, key: str) -> str:
    return similar_names(key, (name for name, _ in _leaves(cfg)), separator=".")


def choose_device(cfg: Config) -> None:
    """Fall back to the CPU, and to full precision there, with one warning for what changed."""
    settings, changes = read_settings(cfg), []
    device = settings.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        device = "cpu"
        change(cfg, "device", device)
        changes.append("no GPU found, running on the CPU, which is slow")
    if device == "cpu" and settings.amp:
        change(cfg, "amp", False)
        name = key_of(cfg, "amp").rpartition(".")[0]
        changes.append(f"mixed precision ({name}) needs a GPU and is switched off")
    if changes:
        logger.warning("; ".join(changes))


def choose_splits(cfg: Config, names: list[str], given: set[str], eval_only: bool) -> None:
    """Set the data sets to train and test on where the command line does not.

    A config file's choice counts if it names the data sets of the command line and nothing else, as
    the config.yaml of an earlier run does; any other is a default that `--dataset` replaces.
    """
    settings = read_settings(cfg)
    splits = {"train": settings.train, "test": settings.test}

    def chosen(split: str) -> bool:
        named = splits[split]
        return key_of(cfg, split) in given or bool(named) and set(named) <= set(names)

    if eval_only:
        if key_of(cfg, "test") not in given:
            change(cfg, "test", tuple(names))
        return
    if not chosen("train") and not chosen("test"):
        splits = {"train": tuple(names[:1]), "test": tuple(names[1:])}
    elif not chosen("test"):
        splits["test"] = tuple(name for name in names if name not in splits["train"])
    elif not chosen("train"):
        splits["train"] = (
            tuple(name for name in names if name not in splits["test"]) or splits["train"]
        )
    for split, named in splits.items():
        change(cfg, split, named)
    for name in names:
        if name not in (*splits["train"], *splits["test"]):
            logger.warning(
                "--dataset %s is in neither %s nor %s: not used",
                name,
                key_of(cfg, "train"),
                key_of(cfg, "test"),
            )


def _set_num_classes(cfg: Config, dataset: CocoDataset, given: set[str]) -> None:
    count, counts = len(dataset.classes), class_counts(cfg)
    if not counts:
        raise UserError(
            f"the config has neither {' nor '.join(class_keys(cfg))}, so the {count} classes of "
            f"{dataset.json_file} have no place in the model."
        )
    for name, known in counts.items():
        if name in given and known != count:
            raise UserError(
                f"{name} {known} contradicts {dataset.json_file}, which lists {count} "
                f"categories: leave {name} out."
            )
        set_key(cfg, name, count)
    logger.info("%s: %s", counted(count, "class"), ", ".join(dataset.classes))
