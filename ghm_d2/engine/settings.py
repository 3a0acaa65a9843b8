"""What a run does, read once from a YAML or from a Python config."""

import json
import re
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.registry import _convert_target_to_string
from omegaconf import DictConfig, ListConfig, OmegaConf, SCMode

from ghm_d2.errors import UserError

Config = CfgNode | DictConfig  # of a .yaml and of a .py file

# Setting name: its key in a YAML config, its key in a Python config, and the default.
_KEYS: dict[str, tuple[str, str, Any]] = {
    "output_dir": ("OUTPUT_DIR", "train.output_dir", ""),
    "weights": ("MODEL.WEIGHTS", "train.init_checkpoint", ""),
    "device": ("MODEL.DEVICE", "train.device", "cuda"),
    "amp": ("SOLVER.AMP.ENABLED", "train.amp.enabled", False),
    "seed": ("SEED", "train.seed", -1),
    "max_iter": ("SOLVER.MAX_ITER", "train.max_iter", None),
    "checkpoint_period": ("SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period", None),
    "checkpoints_kept": ("", "train.checkpointer.max_to_keep", None),
    "eval_period": ("TEST.EVAL_PERIOD", "train.eval_period", 0),
    "log_period": ("", "train.log_period", 20),
    "statistics_period": ("MODEL.GHM.STATISTICS_PERIOD", "train.statistics_period", 0),
    "expected_results": ("TEST.EXPECTED_RESULTS", "train.expected_results", ()),
    "ddp": ("", "train.ddp", {"broadcast_buffers": False}),
    "images_per_batch": ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size", None),
    "reference_world_size": ("SOLVER.REFERENCE_WORLD_SIZE", "", 0),
    "learning_rate": ("SOLVER.BASE_LR", "optimizer.lr", None),
    "warmup": ("SOLVER.WARMUP_ITERS", "lr_multiplier.warmup_length", None),
    "train": ("DATASETS.TRAIN", "dataloader.train.dataset.names", ()),
    "test": ("DATASETS.TEST", "dataloader.test.dataset.names", ()),
    "train_workers": ("DATALOADER.NUM_WORKERS", "dataloader.train.num_workers", 0),
    "test_workers": ("DATALOADER.NUM_WORKERS", "dataloader.test.num_workers", 0),
    "val_metric": ("MODEL.GHM.TRAINING.VAL_METRIC", "train.val_metric", "bbox/AP"),
    "save_best": ("MODEL.GHM.TRAINING.SAVE_BEST", "train.save_best", False),
    "patience": ("MODEL.GHM.TRAINING.PATIENCE", "train.patience", 0),
    "validation_loss": ("MODEL.GHM.TRAINING.VALIDATION_LOSS", "train.validation_loss", False),
    "ema_decay": ("MODEL.GHM.TRAINING.EMA_DECAY", "train.ema_decay", 0.0),
    "accumulation_steps": (
        "MODEL.GHM.TRAINING.ACCUMULATION_STEPS",
        "train.accumulation_steps",
        1,
    ),
    "writers": ("MODEL.GHM.TRAINING.WRITERS", "train.writers", ()),
}
_CLASSES = (
    ("MODEL.RETINANET.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES"),
    ("model.num_classes", "model.roi_heads.num_classes"),
)
_DETECTIONS = (
    ("TEST.DETECTIONS_PER_IMAGE",),
    ("model.max_detections_per_image", "model.roi_heads.box_predictor.test_topk_per_image"),
)


@dataclass(frozen=True)
class Settings:
    """The settings of a run that the engine itself reads.

    Attributes:
        output_dir: folder of everything that the run leaves.
        weights: file to start from, or to evaluate; "" for none.
        device: of the model.
        amp: whether the step runs under mixed precision.
        seed: of the random numbers; below 0: a different one for each run.
        max_iter: iterations of the whole training.
        checkpoint_period: iterations between two checkpoints.
        checkpoints_kept: how many of them stay; None: all.
        eval_period: iterations between two evaluations; 0: after the last one alone.
        log_period: iterations between two rows of metrics.json.
        statistics_period: iterations between two looks at the gradients; 0: never.
        expected_results: (task, metric, value, tolerance) each.
        ddp: arguments for `create_ddp_model`.
        images_per_batch: over all processes.
        reference_world_size: processes that the schedule was written for; 0: any.
        learning_rate: of the optimizer, for messages.
        warmup: iterations in YAML; in Python the share of the training, as Detectron2 has it.
        train: names of the data sets to train on.
        test: names of those to test on.
        train_workers: processes that load training images.
        test_workers: processes that load test images.
        val_metric: figure of an evaluation that says which model is the best.
        save_best: whether the weights of the best evaluation are kept.
        patience: evaluations without a better figure after which the training stops; 0: never.
        validation_loss: whether evaluations compute the losses too.
        ema_decay: of the moving average of the weights, in [0, 1); 0: none.
        accumulation_steps: number of forward passes that a batch is split into.
        writers: further places that the figures go to, such as "wandb".
    """

    output_dir: str
    weights: str
    device: str
    amp: bool
    seed: int
    max_iter: int
    checkpoint_period: int
    checkpoints_kept: int | None
    eval_period: int
    log_period: int
    statistics_period: int
    expected_results: tuple[tuple[Any, ...], ...]
    ddp: dict[str, Any]
    images_per_batch: int
    reference_world_size: int
    learning_rate: float | None
    warmup: float | None
    train: tuple[str, ...]
    test: tuple[str, ...]
    train_workers: int
    test_workers: int
    val_metric: str
    save_best: bool
    patience: int
    validation_loss: bool
    ema_decay: float
    accumulation_steps: int
    writers: tuple[str, ...]

    @property
    def selects(self) -> bool:
        """Whether evaluations decide which model is kept, or when the training ends."""
        return self.save_best or self.patience > 0


_TYPES = get_type_hints(Settings)
_NAMES = tuple[str, ...]
_IN_WORDS = {
    str: "text, perhaps in quotes",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    _NAMES: "a list of names",
    tuple[tuple[Any, ...], ...]: "a list of [task, metric, value, tolerance] each",
    dict[str, Any]: "keys with values",
}


def read_settings(cfg: Config) -> Settings:
    """The settings of a config of either kind.

    Raises:
        UserError: a value has another type than its setting.
    """
    found = {}
    for name, kind in _TYPES.items():
        value = _plain(_get(cfg, name))
        if kind == _NAMES and isinstance(value, str):
            value = (value,)
        if value is not None and not _fits(value, kind):
            kind = next(x for x in (kind, *get_args(kind)) if x in _IN_WORDS)
            raise UserError(f"{key_of(cfg, name)} must be {_IN_WORDS[kind]}, got {value!r}.")
        found[name] = tuple(value) if isinstance(value, list) else value
    found["expected_results"] = tuple(map(tuple, found["expected_results"]))
    return Settings(**found)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if kind == _NAMES:
        return isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(map(_is_expected_result, value))
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def _is_expected_result(row: Any) -> bool:
    if not isinstance(row, list | tuple) or len(row) != 4:
        return False
    return all(_fits(x, kind) for x, kind in zip(row, (str, str, float, float), strict=True))


def fill_nulls(cfg: Config) -> None:
    """Gives settings that a Python config has as null their defaults: Detectron2 reads some too."""
    for name, (_, key, default) in _KEYS.items():
        node, _, last = key.rpartition(".")
        if isinstance(cfg, DictConfig) and default is not None and key:
            parent = OmegaConf.select(cfg, node)
            if isinstance(parent, DictConfig) and last in parent and parent[last] is None:
                change(cfg, name, default)


def key_of(cfg: Config, name: str) -> str:
    """What the user of this kind of config calls a setting."""
    return _KEYS[name][isinstance(cfg, DictConfig)]


def keys_of(*names: str) -> frozenset[str]:
    """What users of either kind of config call some settings."""
    return frozenset(key for name in names for key in _KEYS[name][:2])


def pair(cfg: Config, name: str, value: Any) -> str:
    """What the user of this kind of config types to change a setting."""
    return typed(cfg, key_of(cfg, name), value)


def typed(cfg: Config, full_key: str, value: Any) -> str:
    """What the user of this kind of config types to change a key."""
    return f"{full_key}={value}" if isinstance(cfg, DictConfig) else f"{full_key} {value}"


def change(cfg: Config, name: str, value: Any) -> None:
    """Gives a setting another value."""
    set_key(cfg, key_of(cfg, name), value)


def set_key(cfg: Config, full_key: str, value: Any) -> None:
    """Gives a key another value."""
    if isinstance(cfg, DictConfig):
        OmegaConf.update(cfg, full_key, list(value) if isinstance(value, tuple) else value)
    else:
        cfg.merge_from_list([full_key, value])


def as_text(cfg: Config) -> str:
    """The whole config as YAML, as Detectron2 writes it."""
    if isinstance(cfg, CfgNode):
        return cfg.dump()
    tree = _tree(cfg)
    try:
        return yaml.dump(_named(tree), default_flow_style=None, allow_unicode=True, width=9999)
    except TypeError:  # such as a lambda: this text can be read, but not loaded
        return yaml.safe_dump(str(tree))


def as_leaves(cfg: Config) -> dict[str, Any]:
    """Every value by its full key; what JSON cannot hold, such as a class, becomes a string."""
    tree = cfg if isinstance(cfg, CfgNode) else _named(_tree(cfg))
    found = {key.replace("/", "."): x for key, x in flatten_results_dict(tree).items()}
    return json.loads(json.dumps(found, default=_text))


def _text(value: Any) -> str:
    if callable(value):
        return _convert_target_to_string(value)
    return re.sub(r" at 0x\w+", "", repr(value))  # the address differs between processes


def _tree(cfg: DictConfig) -> Any:
    return OmegaConf.to_container(cfg, structured_config_mode=SCMode.INSTANTIATE)


def _named(value: Any) -> Any:
    """The calls of a Python config by the names of what they call."""
    if isinstance(value, dict):
        target = value.get("_target_")
        name = {"_target_": _convert_target_to_string(target)} if callable(target) else {}
        return {key: _named(item) for key, item in value.items()} | name
    return [_named(item) for item in value] if isinstance(value, list) else value


def value_of(cfg: Config, full_key: str) -> Any:
    """The value of any key; None where the config has no such key."""
    return _plain(_select(cfg, full_key, None))


def class_counts(cfg: Config) -> dict[str, int]:
    """The keys that count classes, and their values; empty where a Python config has none."""
    keys = _CLASSES[isinstance(cfg, DictConfig)]
    found = {full: _select(cfg, full, None) for full in keys}
    return {full: count for full, count in found.items() if isinstance(count, int)}


def class_keys(cfg: Config) -> tuple[str, ...]:
    """All keys that could count classes in this kind of config."""
    return _CLASSES[isinstance(cfg, DictConfig)]


def detections_per_image(cfg: Config) -> tuple[str, int | None]:
    """The key that limits the detections of an image, and its value; None where it has none."""
    keys = _DETECTIONS[isinstance(cfg, DictConfig)]
    found = {full: _select(cfg, full, None) for full in keys}
    known = {full: limit for full, limit in found.items() if isinstance(limit, int)}
    return next(iter(known.items()), (keys[0], None))


def _get(cfg: Config, name: str) -> Any:
    full, default = key_of(cfg, name), _KEYS[name][2]
    return _select(cfg, full, default) if full else default


def _select(cfg: Config, full: str, default: Any) -> Any:
    if isinstance(cfg, DictConfig):
        found = OmegaConf.select(cfg, full)
        return default if found is None else found
    node: Any = cfg
    for part in full.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return default if node is None else node


def _plain(value: Any) -> Any:
    if isinstance(value, DictConfig | ListConfig):
        return OmegaConf.to_container(value, resolve=True)
    return value
