"""The config keys of this extension, and the losses that they describe."""

from typing import Any

from detectron2.config import CfgNode as CN

from .errors import UserError
from .losses import ASL1Loss, CrossEntropyLoss, GHMCLoss, GHMRLoss, OHEMLoss

__all__ = [
    "add_ghm_config",
    "build_asl1",
    "build_cls_baseline",
    "build_ghm_c",
    "build_ghm_r",
    "groups_of_images",
    "validate_ghm_config",
]

SCOPES = ("level", "batch")
CLS_BASELINES = {"cross_entropy": CrossEntropyLoss, "ohem": OHEMLoss}


def _loss_node(bins: int, momentum: float, loss_weight: float) -> CN:
    node = CN()
    # False: Detectron2's own loss, exactly.
    node.ENABLED = True
    # Number M of unit regions.
    node.BINS = bins
    # alpha of the moving average of the region counts, in [0, 1); 0: counts of this call alone.
    node.MOMENTUM = momentum
    # Factor of this loss.
    node.LOSS_WEIGHT = loss_weight
    # Divisor of the region weights: "valid_bins" (non-empty regions, authors' code) or
    # "all_bins" (M, paper).
    node.NORMALIZE_BY = "valid_bins"
    # Whether the average of an empty region decays (paper) or stays (authors' code).
    node.DECAY_EMPTY_BINS = False
    # Whether averages are divided by 1 - alpha^n, so that the first steps are not too large.
    node.BIAS_CORRECTION = False
    # "unit_region", or "exact" (sorting; needs MOMENTUM 0; the window is 1 / BINS).
    node.DENSITY = "unit_region"
    return node


def _pair_node(cls: CN, reg: CN) -> CN:
    node = CN()
    # GHM-C on the classification loss.
    node.CLS = cls
    # GHM-R on the box regression loss.
    node.REG = reg
    # "ghm_r", or "asl1": authentic smooth L1, normalised as Detectron2's smooth L1; of the other
    # keys it takes ENABLED, LOSS_WEIGHT (1 is as strong as smooth L1) and MU.
    node.REG.LOSS_TYPE = "ghm_r"
    # mu of authentic smooth L1, in units of the deltas.
    node.REG.MU = 0.02
    return node


def add_ghm_config(cfg: CN) -> None:
    """Adds ``MODEL.GHM`` to ``cfg`` and registers every architecture and the default data set.

    Args:
        cfg: a config from :func:`detectron2.config.get_cfg`; changed in place.
    """
    from . import data, model_zoo, modeling  # noqa: F401  (their import registers)

    cfg.MODEL.GHM = CN()
    # Pool the region counts over all processes (False: each has its own, as in the authors' code).
    # With IMAGES_PER_HISTOGRAM, the first groups of all processes share counts, and so on.
    cfg.MODEL.GHM.SYNC = False
    # Iterations between two looks at the gradients (plain losses, unit regions, easy and hard
    # examples); a multiple of 20, at which Detectron2 writes its logs; 0: never.
    cfg.MODEL.GHM.STATISTICS_PERIOD = 100
    # GHMRetinaNet clips boxes to the image before NMS, as mmdetection does, and not after it.
    cfg.MODEL.GHM.CLIP_BEFORE_NMS = False

    # META_ARCHITECTURE "GHMRetinaNet": the authors' settings.
    cfg.MODEL.GHM.RETINANET = _pair_node(_loss_node(30, 0.75, 1.0), _loss_node(10, 0.7, 10.0))
    # "ghm_c", or a baseline of the paper, which takes of the other keys ENABLED and LOSS_WEIGHT:
    # "cross_entropy" (mean over all anchors; the paper's weight is 20) or "ohem" (3 negatives for
    # each positive). Focal loss is ENABLED False.
    cfg.MODEL.GHM.RETINANET.CLS.LOSS_TYPE = "ghm_c"
    # One histogram for each FPN "level" (authors' code) or for the whole "batch".
    cfg.MODEL.GHM.RETINANET.SCOPE = "level"
    # Images that share a histogram; 0: all images of the process. 2 makes one GPU with 16 images
    # compute what the authors' 8 GPUs with 2 images did.
    cfg.MODEL.GHM.RETINANET.IMAGES_PER_HISTOGRAM = 0

    # The authors published no weights for two-stage detectors. These make the gradients as large as
    # those of Detectron2's losses, measured by benchmarks/loss_scale.py (geometric mean over two
    # data sets, rounded); sigmoid GHM-C in the box head would want 0.11.

    # PROPOSAL_GENERATOR.NAME "GHMRPN".
    cfg.MODEL.GHM.RPN = _pair_node(_loss_node(30, 0.75, 0.25), _loss_node(10, 0.7, 0.75))

    # ROI_HEADS.NAME "GHMROIHeads", or "GHMCascadeROIHeads": every stage has these losses.
    cfg.MODEL.GHM.ROI_BOX_HEAD = _pair_node(_loss_node(30, 0.75, 0.25), _loss_node(10, 0.7, 0.25))
    # Foreground probability at the start with USE_SIGMOID_CE and GHM-C (softmax needs none).
    cfg.MODEL.GHM.ROI_BOX_HEAD.PRIOR_PROB = 0.01

    # BACKBONE.NAME "build_torchvision_fpn_backbone" (Faster R-CNN) or
    # "build_retinanet_torchvision_fpn_backbone". MODEL.FPN.IN_FEATURES then names nodes of the
    # network's graph, at strides that double; MODEL.BACKBONE.FREEZE_AT counts stages of a ResNet
    # and has no effect.
    cfg.MODEL.GHM.TORCHVISION = CN()
    # A classification network of torchvision.models.
    cfg.MODEL.GHM.TORCHVISION.NAME = "mobilenet_v2"
    # Its batch norm: "FrozenBN", "BN" or "SyncBN".
    cfg.MODEL.GHM.TORCHVISION.NORM = "FrozenBN"
    # Graph node up to which nothing is trained; "": all is trained.
    cfg.MODEL.GHM.TORCHVISION.FREEZE_AT = ""


def _loss_arguments(node: CN, sync: bool) -> dict[str, Any]:
    return {
        "bins": node.BINS,
        "momentum": node.MOMENTUM,
        "loss_weight": node.LOSS_WEIGHT,
        "normalize_by": node.NORMALIZE_BY,
        "decay_empty_bins": node.DECAY_EMPTY_BINS,
        "bias_correction": node.BIAS_CORRECTION,
        "density": node.DENSITY,
        "sync": sync,
    }


def build_ghm_c(cfg: CN, part: str, activation: str = "sigmoid") -> GHMCLoss | None:
    """Builds the GHM-C loss that ``MODEL.GHM.<part>.CLS`` describes.

    Args:
        cfg: a config with ``MODEL.GHM``.
        part: "RETINANET", "RPN" or "ROI_BOX_HEAD".
        activation: see :class:`~ghm_d2.losses.GHMCLoss`.

    Returns:
        The loss, or None where it is not enabled or LOSS_TYPE names another.

    Raises:
        UserError: a key holds a value out of range; the message names it.
    """
    node = cfg.MODEL.GHM[part].CLS
    if not node.ENABLED or _cls_loss_type(cfg, part) != "ghm_c":
        return None
    try:
        return GHMCLoss(activation=activation, **_loss_arguments(node, cfg.MODEL.GHM.SYNC))
    except ValueError as error:
        raise _name_key(f"MODEL.GHM.{part}.CLS", error) from None


def build_cls_baseline(cfg: CN, part: str) -> CrossEntropyLoss | OHEMLoss | None:
    """Builds the baseline that ``MODEL.GHM.<part>.CLS.LOSS_TYPE`` names, or None.

    Raises:
        UserError: see :func:`build_ghm_c`.
    """
    node = cfg.MODEL.GHM[part].CLS
    if not node.ENABLED or (kind := _cls_loss_type(cfg, part)) not in CLS_BASELINES:
        return None
    try:
        return CLS_BASELINES[kind](loss_weight=node.LOSS_WEIGHT)
    except ValueError as error:
        raise _name_key(f"MODEL.GHM.{part}.CLS", error) from None


def _cls_loss_type(cfg: CN, part: str) -> str:
    # The baselines are those of a dense detector: RPN and box head have no such key.
    kind, allowed = cfg.MODEL.GHM[part].CLS.get("LOSS_TYPE", "ghm_c"), ("ghm_c", *CLS_BASELINES)
    if kind not in allowed:
        raise UserError(f"MODEL.GHM.{part}.CLS.LOSS_TYPE must be one of {allowed}, got {kind!r}")
    return kind


def build_ghm_r(cfg: CN, part: str) -> GHMRLoss | None:
    """Builds the GHM-R loss that ``MODEL.GHM.<part>.REG`` describes; see :func:`build_ghm_c`."""
    node = cfg.MODEL.GHM[part].REG
    if not node.ENABLED or _reg_loss_type(cfg, part) != "ghm_r":
        return None
    try:
        return GHMRLoss(mu=node.MU, **_loss_arguments(node, cfg.MODEL.GHM.SYNC))
    except ValueError as error:
        raise _name_key(f"MODEL.GHM.{part}.REG", error) from None


def build_asl1(cfg: CN, part: str) -> ASL1Loss | None:
    """Builds authentic smooth L1 where ``MODEL.GHM.<part>.REG.LOSS_TYPE`` is "asl1", or None.

    Raises:
        UserError: see :func:`build_ghm_c`.
    """
    node = cfg.MODEL.GHM[part].REG
    if not node.ENABLED or _reg_loss_type(cfg, part) != "asl1":
        return None
    try:
        return ASL1Loss(mu=node.MU, loss_weight=node.LOSS_WEIGHT)
    except ValueError as error:
        raise _name_key(f"MODEL.GHM.{part}.REG", error) from None


def _reg_loss_type(cfg: CN, part: str) -> str:
    kind, allowed = cfg.MODEL.GHM[part].REG.LOSS_TYPE, ("ghm_r", "asl1")
    if kind not in allowed:
        raise UserError(f"MODEL.GHM.{part}.REG.LOSS_TYPE must be one of {allowed}, got {kind!r}")
    replaced = cfg.MODEL[part].BBOX_REG_LOSS_TYPE
    if replaced != "smooth_l1":
        raise UserError(
            f"MODEL.{part}.BBOX_REG_LOSS_TYPE {replaced!r} and MODEL.GHM.{part}.REG.ENABLED True "
            f"exclude each other: what REG.LOSS_TYPE names replaces smooth_l1; set one of the two"
        )
    return kind


def _name_key(prefix: str, error: ValueError) -> UserError:
    name, _, rest = str(error).partition(" ")
    return UserError(f"{prefix}.{name.upper()} {rest}")


def histogram_groups(cfg: CN) -> int:
    """How many groups of IMAGES_PER_HISTOGRAM images one process trains on in a step.

    Raises:
        UserError: IMAGES_PER_HISTOGRAM is negative.
    """
    images = cfg.MODEL.GHM.RETINANET.IMAGES_PER_HISTOGRAM
    if images < 0:
        raise UserError(
            f"MODEL.GHM.RETINANET.IMAGES_PER_HISTOGRAM must be a whole number of at least 0 "
            f"(0 = all images of the process), got {images!r}"
        )
    return groups_of_images(cfg.SOLVER.IMS_PER_BATCH, images)


def groups_of_images(total_batch_size: int, images_per_histogram: int) -> int:
    """How many groups of images one process trains on in a step, of as many as there are now.

    Args:
        total_batch_size: images in a step over all processes, at least 1.
        images_per_histogram: images in a group; 0: all images of the process.
    """
    from detectron2.utils.comm import get_world_size

    per_process = max(total_batch_size // get_world_size(), 1)
    return -(-per_process // images_per_histogram) if images_per_histogram else 1


def validate_ghm_config(cfg: CN) -> None:
    """Checks every ``MODEL.GHM`` key that the chosen architecture uses, building no network.

    Raises:
        UserError: one sentence that names the key, what it holds and what is allowed.
    """
    _check_types(cfg.MODEL.GHM, _defaults().MODEL.GHM, "MODEL.GHM")
    period = cfg.MODEL.GHM.STATISTICS_PERIOD
    if period < 0 or period % 20:
        raise UserError(
            f"MODEL.GHM.STATISTICS_PERIOD must be 0 or a multiple of 20, at which Detectron2 "
            f"writes its logs, got {period!r}"
        )
    if cfg.MODEL.META_ARCHITECTURE == "GHMRetinaNet":
        _validate_pair(cfg, "RETINANET")
        scope = cfg.MODEL.GHM.RETINANET.SCOPE
        if scope not in SCOPES:
            raise UserError(f"MODEL.GHM.RETINANET.SCOPE must be one of {SCOPES}, got {scope!r}")
        histogram_groups(cfg)
    elif cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "ProposalNetwork"):
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "GHMRPN":
            _validate_pair(cfg, "RPN")
        if cfg.MODEL.ROI_HEADS.NAME in ("GHMROIHeads", "GHMCascadeROIHeads"):
            _validate_pair(cfg, "ROI_BOX_HEAD")
            check_box_head(cfg)
        if cfg.MODEL.ROI_HEADS.NAME == "GHMCascadeROIHeads":
            _check_cascade(cfg)


def _defaults() -> CN:
    cfg = CN({"MODEL": CN()})
    add_ghm_config(cfg)
    return cfg


def _check_types(node: CN, default: CN, prefix: str) -> None:
    """Code may set any value: only files and command lines pass Detectron2's check of types."""
    for key, expected in default.items():
        name, value = f"{prefix}.{key}", node[key]
        if isinstance(expected, CN):
            if not isinstance(value, CN):
                raise UserError(f"{name} must hold keys of its own, got {value!r}")
            _check_types(value, expected, name)
            continue
        wanted = (int, float) if isinstance(expected, float) else type(expected)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(expected, bool):
            kind = type(expected).__name__
            raise UserError(f"{name} must be of type {kind}, as in {expected!r}, got {value!r}")


def _validate_pair(cfg: CN, part: str) -> None:
    for build in (build_ghm_c, build_cls_baseline, build_ghm_r, build_asl1):
        build(cfg, part)


def _check_cascade(cfg: CN) -> None:
    """What Detectron2 asserts of a cascade, as sentences."""
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise UserError(
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG must be True with MODEL.ROI_HEADS.NAME "
            "GHMCascadeROIHeads, got False"
        )
    node, ious = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS
    if len(node.IOUS) != len(node.BBOX_REG_WEIGHTS) or node.IOUS[0] != ious[0]:
        raise UserError(
            f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS must be as many as its BBOX_REG_WEIGHTS "
            f"({len(node.BBOX_REG_WEIGHTS)}) and begin with MODEL.ROI_HEADS.IOU_THRESHOLDS "
            f"{ious[0]}, got {tuple(node.IOUS)}"
        )


def check_box_head(cfg: CN) -> None:
    """Refuses what GHM-C cannot stand beside in the box head.

    Raises:
        UserError: ``USE_FED_LOSS`` is on, or ``PRIOR_PROB`` is not in (0, 1).
    """
    if not cfg.MODEL.GHM.ROI_BOX_HEAD.CLS.ENABLED:
        return
    if cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS:
        raise UserError(
            "MODEL.ROI_BOX_HEAD.USE_FED_LOSS True and MODEL.GHM.ROI_BOX_HEAD.CLS.ENABLED True "
            "exclude each other: both decide which classes count; set one of the two to False"
        )
    prior = cfg.MODEL.GHM.ROI_BOX_HEAD.PRIOR_PROB
    if not 0 < prior < 1:
        raise UserError(f"MODEL.GHM.ROI_BOX_HEAD.PRIOR_PROB must lie in (0, 1), got {prior!r}")
