"""What the config text inside an mmdetection checkpoint says of its RetinaNet."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghm_d2.errors import UserError, reason, shown

from .resnet import IMAGENET_INPUT

__all__ = ["MmdetSettings", "read_settings"]

_MOST_TEXT = 2**20  # characters; a config has some 30,000, and its syntax tree takes much more
_MOST_SCALES = 100

# What must hold where the text says anything of it.
_ALLOWED: dict[str, Sequence[Any]] = {
    "type": ("RetinaNet",),
    "backbone.type": ("ResNet", "ResNeXt"),
    "backbone.style": ("pytorch", "caffe"),
    "neck.type": ("FPN",),
    "neck.add_extra_convs": ("on_input", True),
    "neck.relu_before_extra_convs": (False,),
    "bbox_head.type": ("RetinaHead",),
    "bbox_head.loss_cls.type": ("GHMC", "FocalLoss"),
    "bbox_head.loss_cls.use_sigmoid": (True,),
    "bbox_head.anchor_generator.type": ("AnchorGenerator",),
    "bbox_head.anchor_generator.scale_major": (True,),
    "bbox_head.anchor_generator.center_offset": (0, 0.0),
    "bbox_head.anchor_generator.base_sizes": (None,),
    "bbox_head.anchor_generator.centers": (None,),
    "bbox_head.bbox_coder.type": ("DeltaXYWHBBoxCoder",),
    "bbox_head.bbox_coder.target_means": ([0, 0, 0, 0],),
    "bbox_head.bbox_coder.clip_border": (True,),
}


@dataclass(frozen=True)
class MmdetSettings:
    """Settings that no tensor shows.

    Attributes:
        ratios: anchor heights over widths.
        sizes: for each of the five levels, the square roots of the anchor areas in pixels.
        focal: whether the classification loss is focal loss.
        config: Detectron2's keys for the rest (input, stride, box deltas, inference).
    """

    ratios: list[float]
    sizes: list[list[float]]
    focal: bool
    config: dict[str, Any]


def read_settings(meta: Any) -> MmdetSettings:
    """Reads the "meta" entry of a checkpoint; without a config text, mmdetection's own settings.

    Raises:
        UserError: it is not a RetinaNet with GHM or focal loss that Detectron2 can express, or the
            text makes no sense.
    """
    texts = [meta.get(key) for key in ("cfg", "config")] if isinstance(meta, dict) else []
    text = next((found for x in texts if isinstance(x, str) and (found := _variables(x))), {})
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
    # mmdetection 1 has no anchor_generator and puts anchor_ before the names.
    anchors = head.get("anchor_generator", {x.removeprefix("anchor_"): head[x] for x in head})
    per_octave, base = anchors.get("scales_per_octave", 3), anchors.get("octave_base_scale", 4)
    if per_octave > _MOST_SCALES:
        raise UserError(f"its config has {shown(per_octave, 40)} anchor sizes in an octave.")
    scales = anchors.get("scales") or [base * 2 ** (i / per_octave) for i in range(per_octave)]
    strides = anchors.get("strides", (8, 16, 32, 64, 128))
    return MmdetSettings(
        ratios=[float(x) for x in anchors.get("ratios", (0.5, 1.0, 2.0))],
        sizes=[[float(stride * scale) for scale in scales] for stride in strides],
        focal=_get(head, "loss_cls.type", "GHMC") == "FocalLoss",
        config={**_input(text), **_boxes(model), **_inference(text)},
    )


def _boxes(model: Mapping[str, Any]) -> dict[str, Any]:
    head = model.get("bbox_head", {})
    stds = _get(head, "bbox_coder.target_stds", head.get("target_stds", [1.0] * 4))
    return {
        "MODEL.RESNETS.STRIDE_IN_1X1": _get(model, "backbone.style", "pytorch") == "caffe",
        "MODEL.RETINANET.BBOX_REG_WEIGHTS": [1.0 / float(x) for x in stds],
    }


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
    return {
        "INPUT.FORMAT": "RGB" if found.get("bgr_to_rgb", found.get("to_rgb", True)) else "BGR",
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
        raise UserError(f"its config text has {len(text)} characters.")
    try:
        body = ast.parse(text).body
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        return {}
    found = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = _literal(node.value)
            except (RecursionError, SyntaxError, TypeError, ValueError):
                continue  # an expression; those that matter are written out in saved configs
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
