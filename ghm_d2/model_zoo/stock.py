"""The same detector for stock Detectron2: its config, and the weights that it knows."""

from collections.abc import Mapping

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    build_model,
)
from fvcore.common.registry import Registry
from torch import Tensor, nn

from ghm_d2.errors import UserError

__all__ = [
    "build_stock_model",
    "stock_config",
    "stock_obstacle",
    "stock_weights",
    "without_statistics",
]

_OURS = "ghm_d2."


def stock_config(cfg: CfgNode) -> CfgNode:
    """The config for stock Detectron2 that infers as ``cfg`` does; without ``MODEL.GHM``.

    Gradient clipping that only this project has goes back to Detectron2's default too.

    Args:
        cfg: a config with ``MODEL.GHM``.
    """
    stock = cfg.clone()
    stock.defrost()
    stock.MODEL.pop("GHM")
    for node, key, registry in (
        (stock.MODEL, "META_ARCHITECTURE", META_ARCH_REGISTRY),
        (stock.MODEL.PROPOSAL_GENERATOR, "NAME", PROPOSAL_GENERATOR_REGISTRY),
        (stock.MODEL.ROI_HEADS, "NAME", ROI_HEADS_REGISTRY),
    ):
        node[key] = _stock_name(node[key], registry)
    if stock.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model":
        stock.SOLVER.CLIP_GRADIENTS = get_cfg().SOLVER.CLIP_GRADIENTS
    return stock


def _stock_name(name: str, registry: Registry) -> str:
    """The class itself, or the one of Detectron2 that ours extends."""
    if name not in registry:  # Detectron2 knows "PrecomputedProposals" without registering it
        return name
    return next(c.__name__ for c in registry.get(name).__mro__ if not _ours(c.__module__))


def _ours(module: str) -> bool:
    return module.startswith(_OURS)


def stock_obstacle(cfg: CfgNode, model: nn.Module) -> str | None:
    """What stock Detectron2 lacks to infer as ``cfg`` does; None if it lacks nothing.

    Args:
        cfg: the full config.
        model: built from ``stock_config(cfg)``.
    """
    if cfg.MODEL.GHM.get("CLIP_BEFORE_NMS", False):
        return "MODEL.GHM.CLIP_BEFORE_NMS"
    if _ours(BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME).__module__):
        return f"the backbone {cfg.MODEL.BACKBONE.NAME}"
    names = (type(module).__name__ for module in model.modules() if _ours(type(module).__module__))
    return next(names, None)


def stock_weights(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights that ``model`` has, without the statistics of the GHM losses.

    Args:
        weights: name to tensor of the trained model.
        model: built from :func:`stock_config`.

    Raises:
        UserError: the two do not fit each other.
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
        ghm: ``MODEL.GHM`` of the full one; a backbone of this project reads its settings there.
    """
    cfg = stock.clone()
    cfg.MODEL.GHM = ghm.clone()
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)
