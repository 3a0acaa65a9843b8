"""From the command line to what every process does: data sets, classes, device, checks.

The rules are those of train_net.py, and so is the code: the parts of its config that the checks
read are filled in from the Python config, and messages name the Python config's keys.
"""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from detectron2.config import CfgNode, get_cfg
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, ListConfig, OmegaConf

from ghm_d2.config import add_ghm_config
from ghm_d2.data import CocoDataset, register_datasets
from ghm_d2.data.annotations import Uses
from ghm_d2.engine import setup
from ghm_d2.engine.checks import check_all
from ghm_d2.errors import UserError

__all__ = ["Plan", "apply_plan", "make_plan", "stock_view", "test_sets"]

_TRAIN, _TEST = "dataloader.train.dataset.names", "dataloader.test.dataset.names"
_CLASSES = ("model.num_classes", "model.roi_heads.num_classes")
_YAML_CLASSES = "MODEL.ROI_HEADS.NUM_CLASSES"


@dataclass(frozen=True)
class Plan:
    """What the command line decides about a config, the same for every process.

    Attributes:
        datasets: the checked `--dataset`s.
        train: names of the data sets to train on.
        test: names of those to test on.
        num_classes: of the `--dataset`s; None without any.
        device: of ``train.device``, "cpu" where there is no GPU.
        amp: ``train.amp.enabled``, False on the CPU.
    """

    datasets: tuple[CocoDataset, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    num_classes: int | None
    device: str
    amp: bool


def make_plan(cfg: DictConfig, args: argparse.Namespace) -> Plan:
    """Checks command line, data and weights; registers the `--dataset`s.

    Args:
        cfg: of :func:`~ghm_d2.lazy.config.load_config`, with the overrides.
        args: the command line.

    Raises:
        UserError: one sentence with the way out.
    """
    given = {text.partition("=")[0] for text in args.overrides}
    try:
        setup_logger(cfg.train.output_dir, distributed_rank=0, name="ghm_d2")
    except OSError as error:
        raise UserError(
            f"train.output_dir {cfg.train.output_dir} cannot be written ({error})."
        ) from error
    view = stock_view(cfg)
    setup.choose_device(view, args)
    datasets = register_datasets(args.dataset, labelled=not args.eval_only, uses=_uses(cfg))
    names = [dataset.name for dataset in datasets]
    num_classes = None
    if datasets:
        splits = {"DATASETS.TRAIN": _TRAIN, "DATASETS.TEST": _TEST}
        chosen = {yaml for yaml, key in splits.items() if key in given}
        setup.choose_splits(view, names, chosen, args.eval_only)
        num_classes = len(datasets[0].classes)
        _check_given_classes(cfg, given, datasets[0])
        view.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    weights = ["MODEL.WEIGHTS", ""] if "train.init_checkpoint" in given else []
    with _python_keys(cfg):
        check_all(view, argparse.Namespace(**vars(args), opts=weights))
    return Plan(
        datasets=tuple(datasets),
        train=tuple(view.DATASETS.TRAIN),
        test=tuple(view.DATASETS.TEST),
        num_classes=num_classes,
        device=view.MODEL.DEVICE,
        amp=view.SOLVER.AMP.ENABLED,
    )


def _uses(cfg: DictConfig) -> Uses:
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper") or {}
    masks = mapper.get("instance_mask_format", "polygon") if mapper.get("use_instance_mask") else ""
    return Uses(masks, bool(mapper.get("use_keypoint")))


def apply_plan(cfg: DictConfig, plan: Plan) -> None:
    """Changes a config, as each process loads it, to what the plan says."""
    OmegaConf.update(cfg, _TRAIN, list(plan.train))
    OmegaConf.update(cfg, _TEST, list(plan.test))
    cfg.train.device = plan.device
    cfg.train.amp.enabled = plan.amp
    if plan.num_classes is not None:
        for key in _class_keys(cfg):
            OmegaConf.update(cfg, key, plan.num_classes)


def test_sets(cfg: DictConfig) -> list[str]:
    """Names of the data sets to test on."""
    return list(_names(cfg, _TEST))


def stock_view(cfg: DictConfig) -> CfgNode:
    """A config of train_net.py that says of data, weights, device and processes what this one does.

    Its model is Detectron2's default: nothing may be built from it.
    """
    view = get_cfg()
    add_ghm_config(view)
    view.OUTPUT_DIR = cfg.train.output_dir
    view.DATASETS.TRAIN, view.DATASETS.TEST = _names(cfg, _TRAIN), _names(cfg, _TEST)
    view.SOLVER.IMS_PER_BATCH = cfg.dataloader.train.total_batch_size
    view.SOLVER.AMP.ENABLED = cfg.train.amp.enabled
    view.MODEL.DEVICE = cfg.train.device
    view.MODEL.WEIGHTS = cfg.train.init_checkpoint or ""
    if keys := _class_keys(cfg):
        view.MODEL.ROI_HEADS.NUM_CLASSES = OmegaConf.select(cfg, keys[0])
    return view


def _names(cfg: DictConfig, key: str) -> tuple[str, ...]:
    names = OmegaConf.select(cfg, key)
    return tuple(names) if isinstance(names, ListConfig) else (names,) if names else ()


def _class_keys(cfg: DictConfig) -> list[str]:
    return [key for key in _CLASSES if isinstance(OmegaConf.select(cfg, key), int)]


def _check_given_classes(cfg: DictConfig, given: set[str], dataset: CocoDataset) -> None:
    keys, count = _class_keys(cfg), len(dataset.classes)
    if not keys:
        raise UserError(
            f"the config has neither {' nor '.join(_CLASSES)}, so the {count} classes of "
            f"{dataset.json_file} have no place in the model."
        )
    for key in given & set(keys):
        if OmegaConf.select(cfg, key) != count:
            raise UserError(
                f"{key} {OmegaConf.select(cfg, key)} contradicts {dataset.json_file}, which lists "
                f"{count} categories: leave {key} out."
            )


@contextmanager
def _python_keys(cfg: DictConfig) -> Iterator[None]:
    """Lets a message of train_net.py's checks name, and spell, the keys of a Python config."""
    classes = next(iter(_class_keys(cfg)), _CLASSES[0])
    spelling = {
        r"\b([A-Z_.]+) (?:FILE\b|\"\('NAME',\)\")": r"\1=NAME",  # a pair that is to be typed
        rf"\bgive {re.escape(_YAML_CLASSES)} (\d+)": rf"give {classes}=\1",
        re.escape(_YAML_CLASSES): classes,
        r"DATASETS\.TRAIN": _TRAIN,
        r"DATASETS\.TEST": _TEST,
        r"MODEL\.WEIGHTS": "train.init_checkpoint",
        r"MODEL\.DEVICE": "train.device",
        r"SOLVER\.IMS_PER_BATCH": "dataloader.train.total_batch_size",
        r"\bOUTPUT_DIR": "train.output_dir",
        r"\btrain_net\.py": "lazy_train_net.py",
    }
    try:
        yield
    except UserError as error:
        text = str(error)
        for pattern, replacement in spelling.items():
            text = re.sub(pattern, replacement, text)
        raise UserError(text) from error
