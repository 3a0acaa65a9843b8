"""The same detector in stock Detectron2: its config, and the weights that it has a place for."""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    build_model,
)
from torch import Tensor, nn

from ghm_d2.errors import UserError


def stock_config(cfg: CfgNode) -> CfgNode:
    """A config without `MODEL.GHM` with which stock Detectron2 infers as `cfg` does.

    A gradient clipping that only this project has becomes Detectron2's default.
    """
    stock = cfg.clone()
    stock.defrost()
    stock.MODEL.pop("GHM")
    for node, key, registry in (
        (stock.MODEL, "META_ARCHITECTURE", META_ARCH_REGISTRY),
        (stock.MODEL.PROPOSAL_GENERATOR, "NAME", PROPOSAL_GENERATOR_REGISTRY),
        (stock.MODEL.ROI_HEADS, "NAME", ROI_HEADS_REGISTRY),
    ):
        if node[key] in registry:  # "PrecomputedProposals" is in none
            # The class itself, or the one of Detectron2 that ours extends.
            classes = registry.get(node[key]).__mro__
            node[key] = next(c.__name__ for c in classes if not _ours(c))
    if stock.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model":
        stock.SOLVER.CLIP_GRADIENTS = get_cfg().SOLVER.CLIP_GRADIENTS
    return stock


def _ours(made: Any) -> bool:
    return made.__module__.startswith("ghm_d2.")


def stock_obstacle(cfg: CfgNode, model: nn.Module) -> str | None:
    """What stock Detectron2 lacks to infer as `cfg` does; None if it lacks nothing.

    Args:
        cfg: the full config.
        model: built from `stock_config(cfg)`.
    """
    if cfg.MODEL.GHM.get("CLIP_BEFORE_NMS", False):
        return "MODEL.GHM.CLIP_BEFORE_NMS"
    if _ours(BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)):
        return f"the backbone {cfg.MODEL.BACKBONE.NAME}"
    return next((type(x).__name__ for x in model.modules() if _ours(type(x))), None)


def stock_weights(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights that `model` has a place for, without the running counts of the GHM losses.

    Args:
        weights: name to tensor of the trained model.
        model: built from :func:`stock_config`.

    Raises:
        UserError: the weights do not fit the model.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in without_statistics(weights).items()}
    if wrong := sorted(dict(shapes.items() ^ found.items())):
        raise UserError(
            f"the weights do not fit the config of the run: {wrong[0]} is missing, not expected or "
            f"of another shape ({len(wrong)} such parameters)."
        )
    return {name: weights[name] for name in shapes}


def without_statistics(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the running counts of the GHM losses."""
    return {name: tensor for name, tensor in weights.items() if ".ghm_" not in f".{name}"}


def build_stock_model(stock: CfgNode, ghm: CfgNode) -> nn.Module:
    """The model of a :func:`stock_config` on the CPU, its weights random.

    Args:
        stock: the config.
        ghm: `MODEL.GHM` of the full config; a backbone of this project has its settings there.
    """
    cfg = stock.clone()
    cfg.MODEL.GHM = ghm.clone()
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)
