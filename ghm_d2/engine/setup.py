"""From the command line to a config: YAML file, KEY VALUE pairs, `--dataset`, device."""

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ghm_d2.config import add_ghm_config
from ghm_d2.data import CocoDataset, register_datasets
from ghm_d2.data.annotations import Uses
from ghm_d2.errors import UserError, cannot, reason, similar_names
from ghm_d2.model_zoo.model_zoo import find_config, similar_configs

__all__ = [
    "build_config",
    "choose_device",
    "choose_splits",
    "locate_config_file",
    "merge_arguments",
    "merge_config_file",
    "setup_ghm_logger",
]

logger = logging.getLogger(__name__)

_NUM_CLASSES = ("MODEL.RETINANET.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES")


def build_config(
    args: argparse.Namespace, log_to_file: bool = True
) -> tuple[CfgNode, list[CocoDataset]]:
    """Build the config that the command line asks for and register its `--dataset`s.

    Args:
        args: the result of `parse_arguments`; its `config_file` becomes the path that was found.
        log_to_file: whether the log goes to a file in OUTPUT_DIR too.

    Returns:
        The config, not frozen, and the checked data sets, which every other process registers too.

    Raises:
        UserError: the config or the data is wrong.
    """
    cfg = merge_arguments(args)
    try:
        if log_to_file:
            setup_ghm_logger(cfg, comm.get_rank())
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written ({error}).") from error
    choose_device(cfg, args)

    datasets = register_datasets(args.dataset, labelled=not args.eval_only, uses=Uses.of(cfg))
    names = [dataset.name for dataset in datasets]
    if datasets:
        given = set(args.opts[::2])
        choose_splits(cfg, names, given, args.eval_only)
        _set_num_classes(cfg, datasets[0], given)
    return cfg, datasets


def merge_arguments(args: argparse.Namespace) -> CfgNode:
    """The config of the config file and the KEY VALUE pairs alone.

    Raises:
        UserError: one of the two is wrong.
    """
    cfg = get_cfg()
    add_ghm_config(cfg)
    args.config_file = locate_config_file(args.config_file)
    merge_config_file(cfg, args.config_file)
    _merge_pairs(cfg, args.opts)
    return cfg


def locate_config_file(file: str) -> str:
    """The path of a config file: that file, or else the one of this name in ``configs/``.

    Raises:
        UserError: there is neither.
    """
    if os.path.isfile(file):
        return file
    if found := find_config(file):
        return found
    raise UserError(f"the config file {file} does not exist{similar_configs(file)}.")


def setup_ghm_logger(cfg: CfgNode, rank: int) -> None:
    """Send this package's log where Detectron2 sends its own."""
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="ghm_d2")


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
    except KeyError as error:
        key = str(error.args[0]).rpartition(" ")[2]
        raise UserError(f"{file}: unknown key {key}{_similar(cfg, key)}.") from error
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
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


def choose_device(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Fall back to the CPU, and to full precision there, with one warning for what changed."""
    changes = []
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        processes = f" in {args.num_gpus} processes" if args.num_gpus > 1 else ""
        changes.append(f"no GPU found, running on the CPU{processes}, which is slow")
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        cfg.SOLVER.AMP.ENABLED = False
        changes.append("mixed precision (SOLVER.AMP) needs a GPU and is switched off")
    if changes:
        logger.warning("; ".join(changes))


def choose_splits(cfg: CfgNode, names: list[str], given: set[str], eval_only: bool) -> None:
    """Set DATASETS.TRAIN and TEST where the command line does not.

    A config file's choice counts if it names the data sets of the command line and nothing else, as
    the config.yaml of an earlier run does; any other is a default that `--dataset` replaces.
    """
    splits = cfg.DATASETS

    def chosen(split: str) -> bool:
        named = splits[split]
        return f"DATASETS.{split}" in given or bool(named) and set(named) <= set(names)

    if eval_only:
        if "DATASETS.TEST" not in given:
            splits.TEST = tuple(names)
        return
    if not chosen("TRAIN") and not chosen("TEST"):
        splits.TRAIN, splits.TEST = tuple(names[:1]), tuple(names[1:])
    elif not chosen("TEST"):
        splits.TEST = tuple(name for name in names if name not in splits.TRAIN)
    elif not chosen("TRAIN"):
        splits.TRAIN = tuple(name for name in names if name not in splits.TEST) or splits.TRAIN
    for name in names:
        if name not in (*splits.TRAIN, *splits.TEST):
            logger.warning(
                "--dataset %s is in neither DATASETS.TRAIN nor DATASETS.TEST: not used", name
            )


def _set_num_classes(cfg: CfgNode, dataset: CocoDataset, given: set[str]) -> None:
    count = len(dataset.classes)
    known = dict(_leaves(cfg))
    for key in _NUM_CLASSES:
        if key in given and known[key] != count:
            raise UserError(
                f"{key} {known[key]} contradicts {dataset.json_file}, which lists {count} "
                f"categories: leave {key} out."
            )
        cfg.merge_from_list([key, count])
    logger.info("%d classes: %s", count, ", ".join(dataset.classes))
