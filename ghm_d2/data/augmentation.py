"""Augmentations of Detectron2, named in a config as Python would call them."""

import ast
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation

from ghm_d2.errors import UserError, building, described, shown, similar_names
from ghm_d2.randomness import preserved

# Only augmentations that need nothing but the image: Detectron2's mapper passes them no boxes or
# classes.
AUGMENTATIONS: dict[str, type[T.Augmentation]] = {
    name: kind
    for name in dir(T)
    if isinstance(kind := getattr(T, name), type)
    and issubclass(kind, T.Augmentation)
    and kind.get_transform is not T.Augmentation.get_transform
    and set(inspect.signature(kind.get_transform).parameters) <= {"self", "image"}
} | {"RandomApply": T.RandomApply}
_SIZES = (T.Resize, T.ResizeScale, T.ResizeShortestEdge, T.FixedSizeCrop)


def train_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Training augmentations: Detectron2's own and what `MODEL.GHM.AUGMENTATIONS` adds.

    What is added comes first. Where it sets the size of images it takes the place of
    `INPUT.MIN_SIZE_TRAIN`, and where it flips them, that of `INPUT.RANDOM_FLIP`.

    Raises:
        UserError: an entry cannot be used; the message says why and what is allowed.
    """
    given = build_augmentations(cfg.MODEL.GHM.AUGMENTATIONS, "MODEL.GHM.AUGMENTATIONS")
    replaced: tuple[type, ...] = (T.RandomFlip,) if any(map(_is_flip, given)) else ()
    replaced += _SIZES if _set_size(given) else ()
    with building("the augmentation that INPUT describes"):
        own = [a for a in build_augmentation(cfg, is_train=True) if not isinstance(a, replaced)]
        if cfg.INPUT.CROP.ENABLED:
            own.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    return [*given, *own]


def sets_size(cfg: CfgNode) -> bool:
    """Whether `MODEL.GHM.AUGMENTATIONS` decides how large images become, not `INPUT`."""
    node = cfg.MODEL.get("GHM", {})
    return _set_size(build_augmentations(node.get("AUGMENTATIONS", ""), "MODEL.GHM.AUGMENTATIONS"))


def _set_size(given: Sequence[T.Augmentation]) -> bool:
    return any(isinstance(augmentation, _SIZES) for augmentation in given)


def _is_flip(augmentation: T.Augmentation) -> bool:
    return isinstance(augmentation, T.RandomFlip)


def build_augmentations(text: str, key: str) -> list[T.Augmentation]:
    """Augmentations from a text such as `RandomFlip(), RandomBrightness(0.8, 1.2)`.

    Each is tried on an image.

    Args:
        text: calls with commas between them; empty: none.
        key: where it stands, for messages.

    Raises:
        UserError: see :func:`train_augmentations`.
    """
    try:
        tree = ast.parse(f"[{text}\n]", mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise _unknown(text, key) from error
    calls = tree.elts if isinstance(tree, ast.List) else [tree]
    found = [_call(call, text, key) for call in calls]
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    with preserved():
        for call, augmentation in zip(calls, found, strict=True):
            try:
                tried = T.AugInput(image)
                augmentation(tried).apply_box(np.array([[8.0, 8.0, 40.0, 40.0]]))
                if min(tried.image.shape[:2]) < 1:
                    raise ValueError("nothing is left of an image")
            except Exception as error:  # whatever its arguments lead to
                raise UserError(
                    f"{key}: {shown(ast.unparse(call))} fails on a test image of 128 x 96 pixels "
                    f"({described(error)})."
                ) from error
    return found


def _call(tree: ast.expr, text: str, key: str) -> T.Augmentation:
    """Builds what a call names; its arguments are plain values, or calls of the same kind."""
    name, arguments = tree, ast.Call(tree, [], [])
    if isinstance(tree, ast.Call):
        name, arguments = tree.func, tree
    name = name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", None)
    if name is None:
        raise _unknown(text, key)
    if name not in AUGMENTATIONS:
        raise UserError(
            f"{key} {shown(repr(text))}: {shown(name)} is not an augmentation of images in "
            f"Detectron2{similar_names(name, AUGMENTATIONS)}; there are "
            f"{', '.join(sorted(AUGMENTATIONS))}."
        )
    kind = AUGMENTATIONS[name]
    try:
        values = [_value(node, text, key) for node in arguments.args]
        named = {node.arg: _value(node.value, text, key) for node in arguments.keywords}
        return kind(*values, **named)
    except UserError:
        raise
    except Exception as error:  # its own checks raise AssertionError among others
        signature = str(inspect.signature(kind)).partition(" ->")[0]
        raise UserError(
            f"{key}: {shown(ast.unparse(tree))} cannot be built ({described(error)}): its "
            f"arguments are {name}{signature}."
        ) from error


def _value(node: ast.expr, text: str, key: str) -> Any:
    if isinstance(node, ast.Call):
        return _call(node, text, key)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise _unknown(text, key) from error


def _unknown(text: str, key: str) -> UserError:
    return UserError(
        f"{key} {shown(repr(text))} is not of the form NAME(ARGUMENTS), as in "
        "RandomBrightness(0.8, 1.2) or ResizeScale(0.1, 2.0, 640, 640), FixedSizeCrop((640, 640))."
    )
