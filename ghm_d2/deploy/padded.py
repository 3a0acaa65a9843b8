"""Operations on padded candidates: a mask marks the real ones, so no size depends on values."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import nms

Size = tuple[int, int]
# Of N images and R candidates each: boxes, (N, R, 4), scores, classes, mask, (N, R).
Candidates = tuple[Tensor, Tensor, Tensor, Tensor]


def single(x: Tensor) -> Tensor:
    """As float32; no cast if it is already, which would break converting ONNX to float16."""
    return x if x.dtype == torch.float32 else x.float()


def finite(x: Tensor) -> Tensor:
    """As `isfinite`, which ONNX has only for float64, a type that TensorRT lacks."""
    return x.abs() < float("inf")


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Picks rows of each image by index: (N, R, C) and (N, k) give (N, k, C)."""
    return table.gather(1, index[:, :, None].expand(-1, -1, table.shape[2]))


def top_scores(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` highest scores of each row and their indices, padded by -inf and 0."""
    scores, index = F.pad(scores, (0, number), value=-float("inf")).topk(number)
    return scores, torch.where(scores == -float("inf"), 0, index)


def clip(boxes: Tensor, size: Size) -> Tensor:
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    xs = [x.clamp(0, width) for x in (x1, x2)]
    ys = [y.clamp(0, height) for y in (y1, y2)]
    return torch.stack((xs[0], ys[0], xs[1], ys[1]), dim=-1)


def nonempty(boxes: Tensor, threshold: float = 0.0) -> Tensor:
    return Boxes(boxes.flatten(0, 1)).nonempty(threshold).view(boxes.shape[:2])


def pool(pooler: ROIPooler, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """As the pooler, but every box is pooled on every level: how many belong to each varies.

    On all levels but its own, a box has no area, which costs nothing, and its result is zeros.

    Returns:
        (N * R, C, P, P) for boxes of (N, R, 4).
    """
    number, rows = boxes.shape[:2]
    flat = boxes.reshape(-1, 4)
    image = torch.arange(number, device=boxes.device, dtype=boxes.dtype)
    image = image[:, None, None].expand(-1, rows, 1).reshape(-1, 1)
    levels = len(pooler.level_poolers)
    if levels > 1:
        # Counted from 0, the finest level.
        level = assign_boxes_to_levels(
            [Boxes(flat)],
            pooler.min_level,
            pooler.max_level,
            pooler.canonical_box_size,
            pooler.canonical_level,
        )
    pooled = []
    for k, (level_pooler, feature) in enumerate(zip(pooler.level_poolers, features, strict=True)):
        here = flat if levels == 1 else torch.where((level == k)[:, None], flat, 0.0)
        x = level_pooler(single(feature), torch.cat((image, here), dim=1))
        pooled.append(x if levels == 1 else torch.where((level == k)[:, None, None, None], x, 0.0))
    return sum(pooled[1:], start=pooled[0])


def padded_nms(candidates: Candidates, threshold: float, number: int, groups: int) -> Candidates:
    """NMS within each class of each image; the `number` best survivors of each, padded.

    One NMS, with images and classes moved apart, serves any number of images.
    """
    boxes, scores, classes, valid = candidates
    images, rows = scores.shape
    exact = boxes if torch.onnx.is_in_onnx_export() else boxes.double()  # ONNX's NMS is float32
    placed = torch.where(valid[:, :, None], exact, 0.0)
    # The classes of an image form a square grid, and the grids stand below one another. In a single
    # row, coordinates would become so large that float32 loses their fractions.
    step = placed.max() - placed.min() + 1
    side = math.ceil(math.sqrt(groups))
    image = torch.arange(images, device=boxes.device)[:, None]
    across = (classes % side) * step
    down = (classes // side + image * side) * step
    corner = placed.min() - 2
    placed = placed + torch.stack((across, down, across, down), dim=2)
    # All invalid candidates become the same box, which touches no valid one: the first suppresses
    # the rest, so that they cost no time.
    nowhere = torch.stack((corner, corner, corner + 1, corner + 1))
    placed = torch.where(valid[:, :, None], placed, nowhere)
    scores = torch.where(valid, scores, -float("inf"))
    # Two more boxes that touch nothing: torch.export assumes that NMS keeps at least 2.
    further = torch.stack((nowhere, nowhere - 2))
    flat = torch.cat((placed.flatten(0, 1), further))
    flat_scores = F.pad(scores.flatten(), (0, 2), value=-float("inf")).to(flat.dtype)
    keep = nms(flat, flat_scores, threshold)
    # Where a runtime pads the indices by -1, these mark the last of the two, which is cut off.
    kept = torch.zeros_like(flat_scores).index_fill(0, keep, 1.0)[:-2].view(images, rows) > 0
    scores, order = _best(torch.where(kept & valid, scores, -float("inf")), number)
    # Padding in `order` points beyond the last row: without these rows, gather would fail.
    boxes, classes = F.pad(boxes, (0, 0, 0, number)), F.pad(classes, (0, number))
    return take_rows(boxes, order), scores, classes.gather(1, order), scores > -float("inf")


def _best(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` highest of each row, padded by -inf, and their indices; ties stay in order."""
    scores = F.pad(scores, (0, number), value=-float("inf"))
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort, but its TopK is stable
        return scores.topk(number)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :number], order[:, :number]


def finish(kept: Candidates, size: Size, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clips, drops boxes without area and moves the rest to the front, as Detectron2 does."""
    boxes, scores, classes, real = kept
    boxes = clip(boxes, size)
    real = real & nonempty(boxes)
    scores, order = _best(torch.where(real, scores, -float("inf")), number)
    real = scores > -float("inf")
    boxes, classes = F.pad(boxes, (0, 0, 0, number)), F.pad(classes, (0, number))
    return (
        torch.where(real[:, :, None], take_rows(boxes, order), 0.0),
        torch.where(real, scores, 0.0),
        torch.where(real, classes.gather(1, order), -1),
        real.sum(1),
    )
