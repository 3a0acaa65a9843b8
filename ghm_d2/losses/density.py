"""The exact gradient density, by sorting: O(N log N) where the definition is O(N^2)."""

import torch
from torch import Tensor

from .checks import check_floating, check_positive, is_plain
from .functional import count_unit_regions

# Far above any gradient norm plus half a window: what is dropped is never inside a window.
_OUTSIDE = 4.0


def exact_gradient_density(
    gradient_norm: Tensor, epsilon: float, valid: Tensor | None = None
) -> Tensor:
    """`GD(g) = #{k: g - eps/2 <= g_k < g + eps/2} / l` at every example (paper, eq. 6 to 8).

    `l = min(g + eps/2, 1) - max(g - eps/2, 0)` is the part of the window inside [0, 1].

    Args:
        gradient_norm: any shape, in [0, 1], floating point.
        epsilon: width of the window, in (0, 1].
        valid: bool of the same shape; False drops an example from every count. None: all count.

    Returns:
        Density of `gradient_norm`'s shape and dtype (float32 at least), at least 1 where valid;
        1 where not valid.

    Raises:
        ValueError: `epsilon` is not in (0, 1], or a valid `gradient_norm` is NaN or outside
            [0, 1] (checked on the CPU alone: elsewhere the host would wait for the device).
    """
    check_floating("gradient_norm", gradient_norm)
    if check_positive("epsilon", epsilon) > 1:
        raise ValueError(f"epsilon must lie in (0, 1], got {epsilon!r}")
    g = gradient_norm.detach().flatten()
    g = g if g.dtype == torch.float64 else g.float()
    keep = None if valid is None else valid.flatten()
    if _may_look(g):
        inside = (g >= 0) & (g <= 1)
        if not (inside if keep is None else inside | ~keep).all():
            raise ValueError("gradient_norm must lie in [0, 1]; it holds NaN or a value outside")
    if keep is not None:
        g = torch.where(keep, g, g.new_tensor(_OUTSIDE))
    ordered, order = _sort(g)
    density = torch.empty_like(g).index_copy_(0, order, _sorted_density(ordered, epsilon / 2))
    if keep is not None:
        density = torch.where(keep, density, 1.0)
    return density.view(gradient_norm.shape)


def _may_look(g: Tensor) -> bool:
    """Whether a value can be asked for without a wait for a device or a break in a graph."""
    return g.device.type == "cpu" and not torch.compiler.is_compiling() and is_plain(g)


def _sorted_density(g: Tensor, half: float) -> Tensor:
    """The density at each of the ascending norms `g`; a window extends `half` to either side.

    The binary searches dominate the cost, and most norms of a detector are tiny. A norm below
    `half` needs none: nothing lies below its own window, and it lies above no other window.
    """
    # On another device the host would have to wait for `start`, so all norms are searched for.
    start = int(torch.searchsorted(g, half)) if _may_look(g) else 0
    large = g[start:]
    # large[k] lies above the windows of the first ends[k] norms.
    ends = torch.searchsorted(g + half, large, right=True)
    counts = count_unit_regions(ends, g.numel()).cumsum(0).add_(start)
    counts[start:] -= torch.searchsorted(g, large - half)
    length = (g + half).clamp_(max=1)
    length[start:] -= (large - half).clamp_(min=0)
    return counts.to(g.dtype).div_(length)


def _sort(g: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending sort of non-negative values: their bit patterns sort alike, and faster."""
    bits = torch.int64 if g.dtype == torch.float64 else torch.int32
    ordered, order = torch.sort((g + 0.0).view(bits))  # + 0.0 turns -0.0 into 0.0
    return ordered.view(g.dtype), order
