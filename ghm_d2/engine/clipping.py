"""Gradient clipping by one global norm, as the published recipe has it.

Detectron2's CLIP_TYPE "norm" clips each parameter by itself, which is a different method: with
it, a limit of 35 almost never takes effect. "full_model" takes the norm over all parameters
together.
"""

from typing import Any

import torch
from detectron2 import solver
from detectron2.config import CfgNode

CLIP_TYPES = ("value", "norm", "full_model")  # the last one is ours


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Build Detectron2's optimizer, with global-norm clipping where the config asks for it.

    A trainer of your own whose `build_optimizer` returns this takes every config of this project.

    Args:
        cfg: `SOLVER.CLIP_GRADIENTS` with CLIP_TYPE "full_model" limits the `NORM_TYPE`-norm of all
            gradients together to `CLIP_VALUE`; every other type is left to Detectron2.
        model: the model whose parameters are optimised.

    Returns:
        The optimizer; see :func:`clip_gradients` for when it clips.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
        return solver.build_optimizer(cfg, model)

    stock = cfg.clone()  # Detectron2 does not know the type: it builds the optimizer without any
    stock.defrost()
    stock.SOLVER.CLIP_GRADIENTS.ENABLED = False
    optimizer = solver.build_optimizer(stock, model)

    clip_gradients(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    return optimizer


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float) -> None:
    """Limits one norm over all gradients together at the start of every `optimizer.step()`.

    That is after mixed precision has unscaled them, and after DistributedDataParallel's average.

    Args:
        optimizer: changed in place.
        max_norm: limit of the norm, above 0.
        norm_type: p of the p-norm.
    """

    def clip_all(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)

    optimizer.register_step_pre_hook(clip_all)
