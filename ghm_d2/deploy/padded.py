"""Operations on candidates of which a mask says what is real, so that no size depends on values."""

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
    """As float32; a cast that changes nothing would stop ONNX's converters to float16."""
    return x if x.dtype == torch.float32 else x.float()


def finite(x: Tensor) -> Tensor:
    """As `isfinite`, which ONNX has for float64 alone, a type that TensorRT lacks."""
    return x.abs() < float("inf")


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Of each image its own rows: (N, R, C) and (N, k) give (N, k, C)."""
    return table.gather(1, index[:, :, None].expand(-1, -1, table.shape[2]))


def top_scores(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` highest of each row and where they stand; -inf, 0 beyond the last."""
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
    """As the pooler does, but without sorting the boxes by level, whose numbers are not known.

    On all levels but its own, a box has no area, which costs nothing and gives zeros.

    Returns:
        (N * R, C, P, P) for boxes of (N, R, 4).
    """
    number, rows = boxes.shape[:2]
    flat = boxes.reshape(-1, 4)
    image = torch.arange(number, device=boxes.device, dtype=boxes.dtype)
    image = image[:, None, None].expand(-1, rows, 1).reshape(-1, 1)
    levels = len(pooler.level_poolers)
    if levels > 1:
        # The levels of Detectron2 are counted from the finest.
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

    All are moved apart and go through one NMS, so that the number of images may be anything.
    """
    boxes, scores, classes, valid = candidates
    images, rows = scores.shape
    exact = boxes if torch.onnx.is_in_onnx_export() else boxes.double()  # ONNX's NMS has float32
    placed = torch.where(valid[:, :, None], exact, 0.0)
    # Image by image, the squares of the classes stand in rows: far fewer pixels from the origin
    # than one after the other, so that float32 keeps the fractions.
    step = placed.max() - placed.min() + 1
    side = math.ceil(math.sqrt(groups))
    image = torch.arange(images, device=boxes.device)[:, None]
    across = (classes % side) * step
    down = (classes // side + image * side) * step
    corner = placed.min() - 2
    placed = placed + torch.stack((across, down, across, down), dim=2)
    # The invalid ones become one box that touches no other: the first suppresses the rest, so that
    # they cost no time.
    nowhere = torch.stack((corner, corner, corner + 1, corner + 1))
    placed = torch.where(valid[:, :, None], placed, nowhere)
    scores = torch.where(valid, scores, -float("inf"))
    # Two more that touch nothing: torch.export takes the number that NMS keeps for 2 at least.
    further = torch.stack((nowhere, nowhere - 2))
    flat = torch.cat((placed.flatten(0, 1), further))
    flat_scores = F.pad(scores.flatten(), (0, 2), value=-float("inf")).to(flat.dtype)
    keep = nms(flat, flat_scores, threshold)
    # Where a runtime pads the indices by -1, it marks one of the two.
    kept = torch.zeros_like(flat_scores).index_fill(0, keep, 1.0)[:-2].view(images, rows) > 0
    scores, order = _best(torch.where(kept & valid, scores, -float("inf")), number)
    # The padding of the order points at a row that is none.
    boxes, classes = F.pad(boxes, (0, 0, 0, number)), F.pad(classes, (0, number))
    return take_rows(boxes, order), scores, classes.gather(1, order), scores > -float("inf")


def _best(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` highest of each row, padded by -inf, and their places; of equals the first."""
    scores = F.pad(scores, (0, number), value=-float("inf"))
    if torch.onnx.is_in_onnx_export():  # it has no stable sort, but ONNX's TopK is one
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
