"""From config to losses, and the checks of the keys that describe them."""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from ghm_d2.config import AUTO_KEYS, add_ghm_config
from ghm_d2.data.augmentation import train_augmentations
from ghm_d2.data.class_weights import BALANCED
from ghm_d2.data.fields import number
from ghm_d2.errors import UserError
from ghm_d2.losses import (
    ASL1Loss,
    CrossEntropyLoss,
    FocalLoss,
    GHMCLoss,
    GHMRLoss,
    OHEMLoss,
    SmoothL1Loss,
)

from .dense import SCOPES, TARGETS, groups_of_images

CLS_BASELINES = {"focal": FocalLoss, "cross_entropy": CrossEntropyLoss, "ohem": OHEMLoss}
REG_BASELINES = {"smooth_l1": SmoothL1Loss, "asl1": ASL1Loss}
# Where Detectron2 keeps the delta of smooth L1.
_BETA = {
    "RETINANET": "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA",
    "RPN": "MODEL.RPN.SMOOTH_L1_BETA",
    "ROI_BOX_HEAD": "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA",
}

# The keys that choose the parts of a detector that have harmonised losses.
_CHOSEN_BY = {
    "RETINANET": "MODEL.META_ARCHITECTURE",
    "RPN": "MODEL.PROPOSAL_GENERATOR.NAME",
    "ROI_BOX_HEAD": "MODEL.ROI_HEADS.NAME",
}
# Parts that make or expect rotated boxes, and our parts that would exchange boxes with them.
_ROTATED = {
    "MODEL.ANCHOR_GENERATOR.NAME": ("RotatedAnchorGenerator", tuple(_CHOSEN_BY)),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RRPN", ("ROI_BOX_HEAD",)),
    "MODEL.ROI_HEADS.NAME": ("RROIHeads", ("RPN",)),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignRotated", ("ROI_BOX_HEAD",)),
}


def build_losses(cfg: CfgNode, part: str) -> dict[str, nn.Module | None]:
    """Builds the losses that `MODEL.GHM.<part>` describes, as arguments of the part's class.

    Args:
        cfg: a config with `MODEL.GHM`.
        part: "RETINANET", "RPN" or "ROI_BOX_HEAD".

    Returns:
        `ghm_c`, `ghm_r` and `reg_baseline`, and for RetinaNet `cls_baseline`; None where a loss is
        not enabled or `LOSS_TYPE` names another one.

    Raises:
        UserError: a key holds a value that is not allowed, or two keys exclude each other; the
            message names them.
    """
    _check_boxes(cfg, part)
    prefix, node = f"MODEL.GHM.{part}", cfg.MODEL.GHM[part]
    losses: dict[str, nn.Module | None] = dict.fromkeys(("ghm_c", "ghm_r", "reg_baseline"))
    if "LOSS_TYPE" in node.CLS:  # the paper's baselines are those of a dense detector
        losses["cls_baseline"] = None
    if part == "ROI_BOX_HEAD":
        _check_box_head(cfg)
    if node.CLS.ENABLED:
        kind = node.CLS.get("LOSS_TYPE", "ghm_c")
        _check_choice(f"{prefix}.CLS.LOSS_TYPE", kind, ("ghm_c", *CLS_BASELINES))
        softmax = part == "ROI_BOX_HEAD" and not cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE
        with _naming_keys(f"{prefix}.CLS"):
            focal = {
                "alpha": cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA,
                "gamma": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA,
            }
            retinanet = part == "RETINANET"
            reference = FocalLoss(**focal, loss_weight="auto") if retinanet else CrossEntropyLoss()
            if kind == "ghm_c":
                losses["ghm_c"] = GHMCLoss(
                    activation="softmax" if softmax else "sigmoid",
                    class_weight=_class_weight(cfg, part),
                    reference=reference,
                    **_arguments(cfg, node.CLS),
                )
            elif node.CLS.get("CLASS_WEIGHT"):
                raise UserError(
                    f"{prefix}.CLS.CLASS_WEIGHT works with GHM-C alone, not with LOSS_TYPE "
                    f"{kind!r}: leave one of the two out"
                )
            else:
                more = focal if kind == "focal" else {"reference": reference}
                loss = CLS_BASELINES[kind](loss_weight=node.CLS.LOSS_WEIGHT, **more)
                losses["cls_baseline"] = loss
    if node.REG.ENABLED:
        kind = node.REG.LOSS_TYPE
        _check_choice(f"{prefix}.REG.LOSS_TYPE", kind, ("ghm_r", *REG_BASELINES))
        replaced = cfg.MODEL[part].BBOX_REG_LOSS_TYPE
        if replaced != "smooth_l1":
            raise UserError(
                f"MODEL.{part}.BBOX_REG_LOSS_TYPE {replaced!r} and {prefix}.REG.ENABLED True "
                "exclude each other: what REG.LOSS_TYPE names replaces smooth_l1; set one of the "
                "two"
            )
        with _naming_keys(f"{prefix}.REG"):
            beta = attrgetter(_BETA[part])(cfg)
            if kind == "ghm_r":
                losses["ghm_r"] = GHMRLoss(
                    mu=node.REG.MU,
                    reference=SmoothL1Loss(beta, 2.0 if part == "RETINANET" else 1.0),
                    **_arguments(cfg, node.REG),
                )
            else:
                more = {"beta": beta}
                if kind == "asl1":
                    more = {"mu": node.REG.MU, "reference": SmoothL1Loss(beta)}
                loss = REG_BASELINES[kind](loss_weight=node.REG.LOSS_WEIGHT, **more)
                losses["reg_baseline"] = loss
    return losses


def dense_settings(cfg: CfgNode) -> dict[str, Any]:
    """What `MODEL.GHM.RETINANET` gives :class:`~ghm_d2.modeling.GHMRetinaNet` besides losses.

    Raises:
        UserError: a key holds a value that is not allowed; the message names it.
    """
    node = cfg.MODEL.GHM.RETINANET
    _check_choice("MODEL.GHM.RETINANET.SCOPE", node.SCOPE, SCOPES)
    if node.IMAGES_PER_HISTOGRAM < 0:
        raise UserError(
            f"MODEL.GHM.RETINANET.IMAGES_PER_HISTOGRAM must be a whole number of at least 0 "
            f"(0 = all images of the process), got {node.IMAGES_PER_HISTOGRAM!r}"
        )
    images = node.IMAGES_PER_HISTOGRAM
    batch = cfg.SOLVER.IMS_PER_BATCH // max(cfg.MODEL.GHM.TRAINING.ACCUMULATION_STEPS, 1)
    targets = node.CLS.TARGETS if node.CLS.ENABLED else TARGETS[0]
    _check_choice("MODEL.GHM.RETINANET.CLS.TARGETS", targets, TARGETS)
    return {
        "cls_targets": targets,
        "ghm_scope": node.SCOPE,
        "images_per_histogram": images,
        "num_histogram_groups": groups_of_images(batch, images),
    }


def validate_ghm_config(cfg: CfgNode) -> None:
    """Checks every `MODEL.GHM` key that the chosen architecture uses, building no network.

    Raises:
        UserError: one sentence that names the key, what it holds and what is allowed.
    """
    defaults = CfgNode({"MODEL": CfgNode()})
    add_ghm_config(defaults)
    _check_types(cfg.MODEL.GHM, defaults.MODEL.GHM, "MODEL.GHM")
    train_augmentations(cfg)
    period = cfg.MODEL.GHM.STATISTICS_PERIOD
    if period < 0 or period % 20:
        raise UserError(
            f"MODEL.GHM.STATISTICS_PERIOD must be 0 or a multiple of 20, at which Detectron2 "
            f"writes its logs, got {period!r}"
        )
    if cfg.MODEL.META_ARCHITECTURE == "GHMRetinaNet":
        _check_losses(cfg, "RETINANET")
        dense_settings(cfg)
    elif cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "ProposalNetwork"):
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "GHMRPN":
            _check_losses(cfg, "RPN")
        if cfg.MODEL.ROI_HEADS.NAME in ("GHMROIHeads", "GHMCascadeROIHeads"):
            _check_losses(cfg, "ROI_BOX_HEAD")
        if cfg.MODEL.ROI_HEADS.NAME == "GHMCascadeROIHeads":
            _check_cascade(cfg)


def _check_losses(cfg: CfgNode, part: str) -> None:
    """Builds the losses, those that are switched off too: what they hold may be meant to count."""
    build_losses(cfg, part)
    node = cfg.MODEL.GHM[part]
    for name, kind, more in (("CLS", GHMCLoss, {}), ("REG", GHMRLoss, {"mu": node.REG.MU})):
        if not node[name].ENABLED:
            with _naming_keys(f"MODEL.GHM.{part}.{name}"):
                kind(**more, **_arguments(cfg, node[name]))


def _arguments(cfg: CfgNode, node: CfgNode) -> dict[str, Any]:
    return {
        "bins": node.BINS,
        "momentum": node.MOMENTUM,
        "loss_weight": node.LOSS_WEIGHT,
        "normalize_by": node.NORMALIZE_BY,
        "decay_empty_bins": node.DECAY_EMPTY_BINS,
        "bias_correction": node.BIAS_CORRECTION,
        "density": node.DENSITY,
        "sync": cfg.MODEL.GHM.SYNC,
    }


def _class_weight(cfg: CfgNode, part: str) -> list[float] | None:
    """`CLS.CLASS_WEIGHT`; names have become numbers when the data were read."""
    key, text = f"MODEL.GHM.{part}.CLS.CLASS_WEIGHT", cfg.MODEL.GHM[part].CLS.get("CLASS_WEIGHT")
    if not text:
        return None
    weights = [number(word) for word in text.split()]
    classes = cfg.MODEL["RETINANET" if part == "RETINANET" else "ROI_HEADS"].NUM_CLASSES
    if len(weights) != classes or None in weights or min(weights) < 0:
        raise UserError(
            f"{key} must be a number of at least 0 for each of the {classes} classes, with spaces "
            f"between them, NAME=NUMBER with commas, or {BALANCED!r}, got {text!r}"
        )
    return weights


@contextmanager
def _naming_keys(prefix: str) -> Iterator[None]:
    """Turns a loss's error about an argument into one about the key that the value came from."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        key = {"gamma": "MODEL.RETINANET.FOCAL_LOSS_GAMMA", "beta": _BETA[prefix.split(".")[2]]}
        raise UserError(f"{key.get(name, f'{prefix}.{name.upper()}')} {rest}") from None


def _check_choice(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key} must be one of {allowed}, got {value!r}")


def _check_types(node: CfgNode, default: CfgNode, prefix: str) -> None:
    """Refuses wrong types set by code: Detectron2 checks only files and command lines."""
    for key, expected in default.items():
        name, value = f"{prefix}.{key}", node[key]
        if isinstance(expected, CfgNode):
            if not isinstance(value, CfgNode):
                raise UserError(f"{name} must hold keys of its own, got {value!r}")
            _check_types(value, expected, name)
            continue
        if name in AUTO_KEYS and value == "auto":
            continue
        wanted = (int, float) if isinstance(expected, float) else type(expected)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(expected, bool):
            kind = type(expected).__name__ + (' or "auto"' if name in AUTO_KEYS else "")
            raise UserError(f"{name} must be of type {kind}, as in {expected!r}, got {value!r}")


def _check_boxes(cfg: CfgNode, part: str) -> None:
    """Refuses rotated boxes, which no part here knows: Detectron2 would fail at an assertion."""
    for key, (rotated, parts) in _ROTATED.items():
        if part in parts and attrgetter(key)(cfg) == rotated:
            chosen = _CHOSEN_BY[part]
            raise UserError(
                f"{key} {rotated} and {chosen} {attrgetter(chosen)(cfg)} exclude each other: boxes "
                "with GHM are parallel to the axes, not rotated; set one of the two"
            )


def _check_cascade(cfg: CfgNode) -> None:
    """Checks, with full messages, what Detectron2 only asserts of a cascade."""
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise UserError(
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG must be True with MODEL.ROI_HEADS.NAME "
            "GHMCascadeROIHeads, got False"
        )
    node, ious = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS
    if len(node.IOUS) != len(node.BBOX_REG_WEIGHTS) or node.IOUS[0] != ious[0]:
        raise UserError(
            f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS must have one value for each of its "
            f"{len(node.BBOX_REG_WEIGHTS)} BBOX_REG_WEIGHTS, the first one that of "
            f"MODEL.ROI_HEADS.IOU_THRESHOLDS, {ious[0]}; got {tuple(node.IOUS)}"
        )


def _check_box_head(cfg: CfgNode) -> None:
    """Refuses what excludes GHM-C in the box head."""
    if cfg.MODEL.GHM.ROI_BOX_HEAD.CLS.ENABLED and cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS:
        raise UserError(
            "MODEL.ROI_BOX_HEAD.USE_FED_LOSS True and MODEL.GHM.ROI_BOX_HEAD.CLS.ENABLED True "
            "exclude each other: both decide which classes count; set one of the two to False"
        )
    prior = cfg.MODEL.GHM.ROI_BOX_HEAD.PRIOR_PROB
    if not 0 < prior < 1:
        raise UserError(f"MODEL.GHM.ROI_BOX_HEAD.PRIOR_PROB must lie in (0, 1), got {prior!r}")
