"""The config keys of this extension."""

from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode as CN

# Keys that take a number or "auto".
AUTO_KEYS = tuple(
    f"MODEL.GHM.{part}.{key}"
    for part in ("RETINANET", "RPN", "ROI_BOX_HEAD")
    for key in ("REG.MU", "CLS.LOSS_WEIGHT", "REG.LOSS_WEIGHT")
)


class _Config(CN):
    """A config whose `AUTO_KEYS` take a number and "auto".

    yacs gives a value only to a key whose old value has the same type, or is None. A default of
    0.02 refuses "auto"; "0.02" refuses `MU 0.05`, which yacs reads as a number; None takes either,
    but then no command line could replace the one of a file by the other. So each of these keys is
    set to None just before it is merged; here, because a user's `cfg.merge_from_file` does not
    pass through any function of this package. A value that is neither a number nor "auto" is
    refused when the config is checked.
    """

    def __new__(cls, *content: Any, **options: Any) -> CN:
        # yacs calls this for nodes that it reads, and merges only nodes of the same class.
        return CN(*content, **options) if content else super().__new__(cls)

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        for start in range(0, len(cfg_list), 2):  # a key may stand there twice
            self._open(cfg_list[start : start + 1])
            super().merge_from_list(cfg_list[start : start + 2])

    def merge_from_other_cfg(self, cfg_other: CN) -> None:
        self._open(key for key in AUTO_KEYS if _value(cfg_other, key) is not None)
        super().merge_from_other_cfg(cfg_other)

    def _open(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key in AUTO_KEYS:
                node, _, leaf = key.rpartition(".")
                _value(self, node)[leaf] = None


def _value(node: Any, key: str) -> Any:
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _loss_node(bins: int, momentum: float, loss_weight: float) -> CN:
    node = CN()
    # False: Detectron2's own loss, exactly.
    node.ENABLED = True
    # Number M of unit regions.
    node.BINS = bins
    # alpha of the moving average of the region counts, in [0, 1); 0: counts of this call alone.
    node.MOMENTUM = momentum
    # Factor of this loss; "auto": it follows from the gradients at the predictions, which are kept
    # as large as those of a reference loss: in RetinaNet 4 times Detectron2's focal loss, twice its
    # smooth L1 for "ghm_r" and once for "asl1"; in two-stage detectors Detectron2's losses. "focal"
    # itself has 4 then, "smooth_l1" 1.
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
    # "ghm_r", or with ENABLED and LOSS_WEIGHT alone of the other keys: "smooth_l1", which is
    # Detectron2's with that factor; "asl1", authentic smooth L1 normalised alike, with MU too.
    # ENABLED False gives Detectron2's loss as it is.
    node.REG.LOSS_TYPE = "ghm_r"
    # mu of authentic smooth L1, in units of the deltas; "auto": for "ghm_r", 1.5 times a moving
    # average of the median error, in [0.01, 0.5].
    node.REG.MU = 0.02
    return node


def add_ghm_config(cfg: CN) -> None:
    """Adds `MODEL.GHM` to `cfg`.

    Importing it from `ghm_d2` also registers every architecture and the default data set.

    Args:
        cfg: a config from :func:`detectron2.config.get_cfg`; changed in place.
    """
    if type(cfg) is CN:
        object.__setattr__(cfg, "__class__", _Config)  # yacs would take it for a key
    cfg.MODEL.GHM = CN()
    # Pool the region counts over all processes (False: each has its own, as in the authors' code).
    # With IMAGES_PER_HISTOGRAM, the first groups of all processes share counts, and so on.
    cfg.MODEL.GHM.SYNC = False
    # Iterations between two looks at the gradients (plain losses, unit regions, easy and hard
    # examples); a multiple of 20, at which Detectron2 writes its logs; 0: never.
    cfg.MODEL.GHM.STATISTICS_PERIOD = 100
    # Whether GHMRetinaNet clips boxes to the image before NMS, as mmdetection does, not after it.
    cfg.MODEL.GHM.CLIP_BEFORE_NMS = False

    # How a training of any detector goes on, and where its figures go; all of it is off.
    cfg.MODEL.GHM.TRAINING = CN()
    # The figure of an evaluation that says which model is the best, as metrics.json names it:
    # "bbox/AP", with several data sets "NAME/bbox/AP", or a "validation/..." loss, the lowest of
    # which is the best.
    cfg.MODEL.GHM.TRAINING.VAL_METRIC = "bbox/AP"
    # Whether model_best.pth holds the weights of the best evaluation.
    cfg.MODEL.GHM.TRAINING.SAVE_BEST = False
    # Evaluations in a row without a better figure after which the training stops; 0: never.
    cfg.MODEL.GHM.TRAINING.PATIENCE = 0
    # Whether evaluations also compute the losses of the test data, each image by itself, without
    # touching running counts, random states or gradients.
    cfg.MODEL.GHM.TRAINING.VALIDATION_LOSS = False
    # Decay of a moving average of the weights, in [0, 1); the average is what is evaluated and
    # saved. The first updates take less: min(EMA_DECAY, (1 + n) / (10 + n)). 0: none.
    cfg.MODEL.GHM.TRAINING.EMA_DECAY = 0.0
    # Forward passes that the SOLVER.IMS_PER_BATCH images of an iteration are divided among. Each
    # pass has histograms of its own images and updates the running counts.
    cfg.MODEL.GHM.TRAINING.ACCUMULATION_STEPS = 1
    # Where the figures go besides the terminal, metrics.json and TensorBoard: "wandb", "mlflow".
    cfg.MODEL.GHM.TRAINING.WRITERS = ()
    # Detectron2's augmentations for training images, as Python would call them:
    # "RandomRotation([-10, 10]), RandomBrightness(0.8, 1.2)". They come before those of INPUT; one
    # that sets the size takes the place of MIN_SIZE_TRAIN, and RandomFlip that of RANDOM_FLIP.
    cfg.MODEL.GHM.AUGMENTATIONS = ""

    # META_ARCHITECTURE "GHMRetinaNet": the authors' settings.
    cfg.MODEL.GHM.RETINANET = _pair_node(_loss_node(30, 0.75, 1.0), _loss_node(10, 0.7, 10.0))
    # "ghm_c", or a baseline of the paper with ENABLED, LOSS_WEIGHT and TARGETS alone of the other
    # keys: "focal" (Detectron2's, with that factor), "cross_entropy" (mean over all anchors; the
    # paper's weight is 20) or "ohem" (3 negatives for each positive). ENABLED False gives
    # Detectron2's focal loss as it is.
    cfg.MODEL.GHM.RETINANET.CLS.LOSS_TYPE = "ghm_c"
    # Factor of GHM-C for each class: by name ("cup=2, bar=0.5", the others having 1), as a number
    # for each ("1 2 0.5"), or "balanced": objects / (classes * objects of the class).
    cfg.MODEL.GHM.RETINANET.CLS.CLASS_WEIGHT = ""
    # What a positive anchor's own class should score: "hard", 1; "iou", the IoU of its decoded box
    # with the box matched to it, so that scores rank boxes (with "focal": quality focal loss).
    cfg.MODEL.GHM.RETINANET.CLS.TARGETS = "hard"
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
    # As MODEL.GHM.RETINANET.CLS.CLASS_WEIGHT; with softmax, background has 1.
    cfg.MODEL.GHM.ROI_BOX_HEAD.CLS.CLASS_WEIGHT = ""
    # Foreground probability at the start with USE_SIGMOID_CE and GHM-C (softmax needs none).
    cfg.MODEL.GHM.ROI_BOX_HEAD.PRIOR_PROB = 0.01

    # BACKBONE.NAME "build_torchvision_fpn_backbone" (Faster R-CNN) or
    # "build_retinanet_torchvision_fpn_backbone". "res2" to "res5" in MODEL.FPN.IN_FEATURES are the
    # network's last feature maps of strides 4 to 32; it also takes nodes of the network's graph, at
    # strides that double. MODEL.BACKBONE.FREEZE_AT, which counts stages of a ResNet, has no effect.
    cfg.MODEL.GHM.TORCHVISION = CN()
    # A classification network of torchvision.models.
    cfg.MODEL.GHM.TORCHVISION.NAME = "mobilenet_v2"
    # Its batch norm: "FrozenBN", "BN" or "SyncBN".
    cfg.MODEL.GHM.TORCHVISION.NORM = "FrozenBN"
    # "res2" to "res5" or graph node up to which nothing is trained; "": all is trained.
    cfg.MODEL.GHM.TORCHVISION.FREEZE_AT = ""
    # Memory, in units of 10^6 bytes, in which each process keeps the feature maps of images that it
    # has seen, for a network that is frozen as a whole (FREEZE_AT its last stage, NORM "FrozenBN"):
    # an image that comes back unchanged or flipped costs nothing. 0: none is kept.
    cfg.MODEL.GHM.TORCHVISION.CACHE_MB = 0
