"""A harmonised loss over the levels of any dense detector and groups of images; its normaliser."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.utils.comm import get_world_size
from torch import Tensor, nn

from ghm_d2.losses import GHMCLoss, GHMRLoss

SCOPES = ("level", "batch")
TARGETS = ("hard", "iou")


def check_targets(cls_targets: str) -> str:
    """Returns it; raises ValueError unless it is one of `TARGETS`."""
    if cls_targets not in TARGETS:
        raise ValueError(f"cls_targets must be one of {TARGETS}, got {cls_targets!r}")
    return cls_targets


def groups_of_images(total_batch_size: int, images_per_histogram: int) -> int:
    """How many groups of images each process of this run trains on in a step.

    Args:
        total_batch_size: images in a step over all processes, at least 1.
        images_per_histogram: images in a group; 0: all of the process.
    """
    per_process = max(total_batch_size // get_world_size(), 1)
    return -(-per_process // images_per_histogram) if images_per_histogram else 1


def levels_of_labels(labels: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """The labels of each level, (N, Ri), from those of each image, N tensors (R,).

    A slice of the stacked labels is not contiguous: each level would be copied once more.
    """
    by_image = [x.split(sizes) for x in labels]
    flat = torch.cat([x for level in zip(*by_image, strict=True) for x in level])
    parts = flat.split([len(labels) * size for size in sizes])
    return [x.view(len(labels), size) for x, size in zip(parts, sizes, strict=True)]


class DenseLoss(nn.ModuleList):
    """GHM-C or GHM-R over the FPN levels of a batch, every group of images with its own counts.

    It is a list of the groups' losses: `dense[0].acc_sum` are the running counts of the first
    group, saved as `0.acc_sum`. A checkpoint of fewer groups fills the further ones too.

    Shape shorthand:

        N: number of images in the minibatch
        Ri: number of anchors (or points) of an image on level i
        Pi: number of those that a mask selects, over all images
        K: number of foreground classes
    """

    def __init__(
        self,
        loss: GHMCLoss | GHMRLoss,
        ghm_scope: str = "level",
        images_per_histogram: int = 0,
        num_histogram_groups: int = 1,
    ) -> None:
        """
        Args:
            loss: copied for each group, as each of the authors' processes had its own.
            ghm_scope: "level": one histogram for each FPN level, the levels sharing one set of
                running counts, and the losses of the levels added up (authors' code); "batch":
                one histogram over all levels.
            images_per_histogram: images that share a histogram and running counts; their losses
                are averaged over the groups, as DistributedDataParallel averages processes. 0:
                all images.
            num_histogram_groups: groups in a training batch of one process; see
                :func:`groups_of_images`.

        Raises:
            ValueError: an argument is out of range.
        """
        if ghm_scope not in SCOPES:
            raise ValueError(f"ghm_scope must be one of {SCOPES}, got {ghm_scope!r}")
        if images_per_histogram < 0:
            raise ValueError(
                f"images_per_histogram must be at least 0 (0 = all images), "
                f"got {images_per_histogram!r}"
            )
        if num_histogram_groups < 1:
            raise ValueError(
                f"num_histogram_groups must be at least 1, got {num_histogram_groups!r}"
            )
        super().__init__(copy.deepcopy(loss) for _ in range(num_histogram_groups))
        self.ghm_scope = ghm_scope
        self.images_per_histogram = images_per_histogram

    @classmethod
    def of(cls, loss: GHMCLoss | GHMRLoss | None, *args: Any, **kwargs: Any) -> "DenseLoss | None":
        """Like the constructor; None where `loss` is None."""
        return None if loss is None else cls(loss, *args, **kwargs)

    @torch.jit.unused
    def forward(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        masks: Sequence[Tensor] | None = None,
        *,
        scores: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """
        Args:
            predictions: #levels tensors (N, Ri, ...); for GHM-C the logits (N, Ri, K).
            targets: #levels tensors (N, Ri, ...); for GHM-C int64 (N, Ri), class in [0, K),
                K = background, -1 = ignored.
            masks: #levels bool tensors (N, Ri) where only some anchors are examples, as for
                GHM-R the positives. Predictions and targets are then (Pi, ...): the rows
                `x[mask]`. None: all are.
            scores: for GHM-C, #levels tensors (N, Ri) in [0, 1]: the target of the class that a
                positive's label names, such as the IoU of its box. None: 1.

        Returns:
            A scalar, on the graph also without any example: the mean over the groups.

        Raises:
            ValueError: the arguments do not fit each other, a value is invalid (on CUDA
                :func:`ghm_d2.losses.raise_deferred_errors` says so), or the batch has more groups
                of `images_per_histogram` images than there are losses.
        """
        lengths = len(predictions), len(targets), len(targets if masks is None else masks)
        if not lengths[0] or len(set(lengths)) > 1:
            raise ValueError(
                f"predictions, targets and masks must have an entry for each level, got {lengths}"
            )
        images = self._group_sizes(len((predictions if masks is None else masks)[0]))
        if masks is None:
            rows = [images] * len(predictions)
        else:
            rows = _rows_of_groups(predictions, masks, images)
        tensors = [predictions, targets]
        if scores is not None:
            tensors += zip(*map(_soft_targets, predictions, targets, scores), strict=True)
            del tensors[1]
        columns = [list(map(_split, column, rows)) for column in tensors]
        if masks is None:
            columns = [[[x.flatten(0, 1) for x in level] for level in part] for part in columns]
        total = []
        for loss, *group in zip(self, *(zip(*part, strict=True) for part in columns), strict=False):
            call = loss.forward_levels if self.ghm_scope == "level" else loss.forward_pooled
            total.append(call(*group))
        return total[0] if len(total) == 1 else sum(total) / len(total)

    def _group_sizes(self, num_images: int) -> list[int]:
        size = self.images_per_histogram or num_images
        groups = [min(size, num_images - start) for start in range(0, num_images, size)]
        if len(groups) > len(self):
            raise ValueError(
                f"images_per_histogram {size} makes {len(groups)} groups of a batch of "
                f"{num_images} images, but the model was built for {len(self)}: build it with the "
                f"number of images it trains with (SOLVER.IMS_PER_BATCH, num_histogram_groups)"
            )
        return groups

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self[0].state_dict():
            if (first := state_dict.get(f"{prefix}0.{name}")) is not None:
                for group in range(1, len(self)):
                    state_dict.setdefault(f"{prefix}{group}.{name}", first)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SteadyNormalizer:
    """Mix-in before a `DenseDetector`: training steps alone move its running averages.

    Detectron2 moves them, such as the number of positives that focal loss and smooth L1 are divided
    by, in every pass in training mode: also for a validation loss under `no_grad`, and again
    where activation checkpointing repeats a forward pass during the backward pass.
    """

    _averaged = False  # whether the last forward pass has written its average

    def _ema_update(
        self, name: str, value: float, initial_value: float, momentum: float = 0.9
    ) -> float:
        repeated = torch._C._current_graph_task_id() != -1  # inside a backward pass
        if repeated and self._averaged:
            return getattr(self, name)  # what the first computation divided by
        before = getattr(self, name, None)
        average = super()._ema_update(name, value, initial_value, momentum)
        # A reentrant checkpoint computes first without a graph: its repetition writes.
        self._averaged = torch.is_grad_enabled()
        if not self._averaged:
            if before is None:
                delattr(self, name)
            else:
                setattr(self, name, before)
        return average


def _soft_targets(logits: Tensor, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Targets (N, Ri, K) whose own class has the score, and which rows (N, Ri) are not ignored."""
    classes = logits.shape[-1]
    wrong = (labels < -1) | (labels > classes)
    column = labels.clamp(min=0).masked_fill(wrong, 0).unsqueeze(-1)
    own = scores.masked_fill(wrong, 2.0).unsqueeze(-1)  # 2 is refused by the loss
    target = scores.new_zeros(*labels.shape, classes + 1).scatter_(-1, column, own)
    return target[..., :-1], labels != -1


def _split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """`x.split`, without the copy that a split into one part costs in the backward pass."""
    return x.split(sizes) if len(sizes) > 1 else [x]


def _rows_of_groups(
    predictions: Sequence[Tensor], masks: Sequence[Tensor], images: Sequence[int]
) -> list[list[int]]:
    """For each level, how many of the rows `x[mask]` belong to each group of `images`."""
    if len(images) == 1:  # counting them would wait for the device
        return [[len(x)] for x in predictions]
    counts = [torch.stack([part.sum() for part in mask.split(images)]) for mask in masks]
    rows = torch.stack(counts).tolist()
    for x, level in zip(predictions, rows, strict=True):
        if len(x) != sum(level):
            raise ValueError(
                f"predictions must be the {sum(level)} rows that the mask of their level selects, "
                f"got {len(x)}"
            )
    return rows
