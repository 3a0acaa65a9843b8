"""What the config text inside an mmdetection checkpoint says of its RetinaNet."""

import ast
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghm_d2.errors import UserError, reason, shown

from .resnet import IMAGENET_INPUT

logger = logging.getLogger(__name__)

STRIDES = [8.0, 16.0, 32.0, 64.0, 128.0]  # of P3 to P7
# Without and with a ReLU between P6 and P7; the first is registered in ghm_d2.modeling.
BACKBONES = ("build_mmdet_retinanet_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")

_MOST_TEXT = 2**20  # characters; a config has some 30,000, and its syntax tree takes much more
_MOST_SCALES = 100
_READ = ("model", "test_cfg", "img_norm_cfg")  # the variables whose content is looked at

# The values that can be converted; the first is the default of a key that the text lacks.
_ALLOWED: dict[str, Sequence[Any]] = {
    "type": ("RetinaNet",),
    "backbone.type": ("ResNet", "ResNeXt"),
    "backbone.style": ("pytorch", "caffe"),
    "neck.type": ("FPN",),
    "neck.add_extra_convs": ("on_input", True),
    "neck.relu_before_extra_convs": (False, True),
    "neck.norm_cfg": (None,),
    "bbox_head.type": ("RetinaHead",),
    "bbox_head.loss_cls.type": ("GHMC", "FocalLoss"),
    "bbox_head.loss_cls.use_sigmoid": (True,),
    "bbox_head.norm_cfg": (None,),
    "bbox_head.anchor_generator.type": ("AnchorGenerator",),
    "bbox_head.anchor_generator.scale_major": (True,),
    "bbox_head.anchor_generator.base_sizes": (None,),
    "bbox_head.anchor_generator.centers": (None,),
    "bbox_head.bbox_coder.type": ("DeltaXYWHBBoxCoder",),
    "bbox_head.bbox_coder.target_means": ([0, 0, 0, 0],),
    "bbox_head.bbox_coder.clip_border": (True,),
    "bbox_head.bbox_coder.add_ctr_clamp": (False,),
    "test_cfg.nms.type": ("nms",),
}


@dataclass(frozen=True)
class MmdetSettings:
    """Settings that no tensor shows.

    Attributes:
        ratios: anchor heights over widths.
        sizes: for each of the five levels, the square roots of the anchor areas in pixels.
        harmonised: whether the losses of classes and of boxes are GHM-C and GHM-R.
        config: Detectron2's keys for the rest (backbone, input, box deltas, inference).
    """

    ratios: list[float]
    sizes: list[list[float]]
    harmonised: tuple[bool, bool]
    config: dict[str, Any]


def read_settings(meta: Any) -> MmdetSettings:
    """Reads the "meta" entry of a checkpoint; without a config text, mmdetection's own settings.

    Raises:
        UserError: it is not a RetinaNet with GHM or focal loss that Detectron2 can express, or the
            text makes no sense.
    """
    texts = [meta.get(key) for key in ("cfg", "config")] if isinstance(meta, dict) else []
    text = next((found for x in texts if isinstance(x, str) and (found := _variables(x))), {})
    if not text:
        logger.warning("no config text in it can be read: mmdetection's own settings are assumed")
    try:
        return _settings(text)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"its config text cannot be understood ({reason(error)}).") from error


def _settings(text: Mapping[str, Any]) -> MmdetSettings:
    model = text.get("model", {})
    for path, allowed in _ALLOWED.items():
        value = _get(model, path, allowed[0])
        if value not in allowed:
            raise UserError(
                f"its config has {path} = {shown(repr(value), 80)}, and only "
                f"{' or '.join(map(repr, allowed))} can be converted."
            )
    head = model.get("bbox_head", {})
    # mmdetection 1 has no anchor_generator: its keys are in the head, with anchor_ before some.
    anchors = head.get("anchor_generator", {x.removeprefix("anchor_"): head[x] for x in head})
    per_octave, base = anchors.get("scales_per_octave", 3), anchors.get("octave_base_scale", 4)
    if per_octave > _MOST_SCALES:
        raise UserError(f"its config has {shown(per_octave, 40)} anchor sizes in an octave.")
    scales = anchors.get("scales") or [base * 2 ** (i / per_octave) for i in range(per_octave)]
    strides = list(anchors.get("strides", STRIDES))
    if [float(x) for x in strides] != STRIDES:
        raise UserError(f"its anchors have the strides {shown(strides, 80)} and not {STRIDES}.")
    losses = _get(head, "loss_cls.type", "GHMC"), _get(head, "loss_bbox.type", None)
    return MmdetSettings(
        ratios=[float(x) for x in anchors.get("ratios", (0.5, 1.0, 2.0))],
        sizes=[[float(stride * scale) for scale in scales] for stride in strides],
        harmonised=(losses[0] == "GHMC", (losses[1] or losses[0]) in ("GHMR", "GHMC")),
        config={
            "MODEL.ANCHOR_GENERATOR.OFFSET": float(anchors.get("center_offset", 0)),
            **_backbone(model),
            **_input(text),
            **_boxes(model),
            **_inference(text),
        },
    )


def _backbone(model: Mapping[str, Any]) -> dict[str, Any]:
    relu = _get(model, "neck.relu_before_extra_convs", False)
    return {
        "MODEL.BACKBONE.NAME": BACKBONES[bool(relu)],
        "MODEL.RESNETS.STRIDE_IN_1X1": _get(model, "backbone.style", "pytorch") == "caffe",
    }


def _boxes(model: Mapping[str, Any]) -> dict[str, Any]:
    head = model.get("bbox_head", {})
    stds = _get(head, "bbox_coder.target_stds", head.get("target_stds", [1.0] * 4))
    return {"MODEL.RETINANET.BBOX_REG_WEIGHTS": [1.0 / float(x) for x in stds]}


def _inference(text: Mapping[str, Any]) -> dict[str, Any]:
    test = _get(text, "model.test_cfg", None) or text.get("test_cfg", {})
    nms = test.get("nms", {})
    return {
        "MODEL.RETINANET.SCORE_THRESH_TEST": float(test.get("score_thr", 0.05)),
        "MODEL.RETINANET.NMS_THRESH_TEST": float(nms.get("iou_threshold", nms.get("iou_thr", 0.5))),
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": int(test.get("nms_pre", 1000)),
        "TEST.DETECTIONS_PER_IMAGE": int(test.get("max_per_img", 100)),
    }


def _input(text: Mapping[str, Any]) -> dict[str, Any]:
    new, old = _get(text, "model.data_preprocessor", {}), text.get("img_norm_cfg", {})
    found = new or old  # mmdetection 3, or 1 and 2
    if "mean" not in found:
        return IMAGENET_INPUT
    rgb = new.get("bgr_to_rgb", False) if new else old.get("to_rgb", True)
    return {
        "INPUT.FORMAT": "RGB" if rgb else "BGR",
        "MODEL.PIXEL_MEAN": [float(x) for x in found["mean"]],
        "MODEL.PIXEL_STD": [float(x) for x in found["std"]],
    }


def _get(node: Any, path: str, default: Any) -> Any:
    for part in path.split("."):
        if part not in node:
            return default
        node = node[part]
    return node


def _variables(text: str) -> dict[str, Any]:
    """The variables that a Python config assigns, read without running it."""
    if len(text) > _MOST_TEXT:
        raise UserError(f"its config text is too long ({len(text)} characters).")
    try:
        body = ast.parse(text).body
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        return {}
    found, computed = {}, []
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = _literal(node.value)
            except (RecursionError, SyntaxError, TypeError, ValueError):
                computed.append(node.targets[0].id)
    if computed := [name for name in _READ if name in computed]:
        logger.warning(
            "the config in the checkpoint computes %s by code, which is not run: mmdetection's own "
            "settings are assumed instead",
            " and ".join(computed),
        )
    return found


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "dict" and not node.args:
        return {x.arg: _literal(x.value) for x in node.keywords}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {ast.literal_eval(key): _literal(value) for key, value in pairs}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(x) for x in node.elts]
    return ast.literal_eval(node)
