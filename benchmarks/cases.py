"""What bench_losses.py measures: inputs like a detector's, and one call for each implementation.

A call is forward and backward: it returns the gradient with respect to the predictions.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss, sigmoid_focal_loss_jit
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from ghm_d2.losses import GHMCLoss, GHMRLoss, base, ghm_c, ghm_r

CLASSES = 80
FLOOR = "floor: read, read, write"
FUSED, EAGER, EXACT = "GHM, this project, fused", "GHM, eager", "GHM, exact density"
MMDET = "GHM, mmdetection 3.3.0"
_POSITIVE, _IGNORED = 0.0005, 0.01  # shares of the anchors, as RetinaNet labels them on COCO

Call = Callable[[], object]


def anchors_of_levels(height: int, width: int, anchors: int = 9) -> list[int]:
    """Number of RetinaNet's anchors on each of its levels (strides 8 to 128) for one image."""
    return [-(-height // s) * -(-width // s) * anchors for s in (8, 16, 32, 64, 128)]


class Logits:
    """Logits and integer labels of a RetinaNet's levels; most anchors are background."""

    work = "logits"

    def __init__(self, rows: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        """
        Args:
            rows: number of anchors of each level.
            device: where to put the tensors.
            dtype: of the logits.
        """
        g = torch.Generator(device).manual_seed(0)
        make = {"generator": g, "device": device}
        self.x = []
        self.labels = []
        for r in rows:
            x = torch.randn(r, CLASSES, **make).mul_(1.5).sub_(4).to(dtype)
            chance = torch.rand(r, **make)
            labels = torch.randint(0, CLASSES, (r,), **make)
            labels[chance > _POSITIVE] = CLASSES
            labels[chance > 1 - _IGNORED] = -1
            self.x.append(x.requires_grad_())
            self.labels.append(labels)
        self.size = sum(x.numel() for x in self.x)
        self.bytes = self.size * self.x[0].element_size()
        self.device = device

    def floor(self) -> Call:
        """Reads the logits twice and writes as many values."""
        xs = [x.detach() for x in self.x]
        outs = [torch.empty_like(x) for x in xs]

        def call() -> None:
            for x, out in zip(xs, outs, strict=True):
                x.sum()
                torch.mul(x, 2, out=out)

        return call

    def calls(self, bins: int, mmdet: types.ModuleType | None) -> dict[str, Callable[[], Call]]:
        """For each name a function that prepares its call; the cheapest loss comes first."""
        makers: dict[str, Callable[[], Call]] = {
            FUSED: lambda: self._ghm(GHMCLoss(bins, 0.75)),
            EAGER: lambda: _eagerly(self._ghm(GHMCLoss(bins, 0.75))),
            EXACT: lambda: self._ghm(GHMCLoss(bins, 0.0, density="exact")),
            "BCE, one-hot ready": lambda: self._dense(F.binary_cross_entropy_with_logits),
            "focal, fvcore jit, one-hot ready": lambda: self._dense(_focal(sigmoid_focal_loss_jit)),
            "focal, fvcore, one-hot ready": lambda: self._dense(_focal(sigmoid_focal_loss)),
            "focal, torchvision, one-hot ready": lambda: self._dense(
                _focal(torchvision_focal_loss)
            ),
            "focal, fvcore jit, as Detectron2 (mask + one-hot inside)": self._detectron2_focal,
        }
        if mmdet is not None:
            makers[MMDET] = lambda: self._mmdet(mmdet.GHMC(bins, 0.75))
        return makers

    def _gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.x)

    def _ghm(self, module: GHMCLoss) -> Call:
        module.to(self.device)
        return lambda: self._gradients(module.forward_levels(self.x, self.labels))

    def _mmdet(self, module: torch.nn.Module) -> Call:
        module.to(self.device)
        # mmdetection's assigner labels ignored anchors as background and gives them weight 0.
        weights = [(y >= 0).float() for y in self.labels]
        labels = [torch.where(y >= 0, y, CLASSES) for y in self.labels]
        return lambda: self._gradients(
            sum(module(x, y, w) for x, y, w in zip(self.x, labels, weights, strict=True))
        )

    def _dense(self, loss: Callable[..., Tensor]) -> Call:
        targets = [
            F.one_hot(y.clamp(min=0), CLASSES + 1)[:, :-1].to(x.dtype)
            for x, y in zip(self.x, self.labels, strict=True)
        ]
        return lambda: self._gradients(
            sum(loss(x, t, reduction="sum") for x, t in zip(self.x, targets, strict=True))
        )

    def _detectron2_focal(self) -> Call:
        labels = torch.cat(self.labels)

        def call() -> tuple[Tensor, ...]:
            valid = labels >= 0
            target = F.one_hot(labels[valid], num_classes=CLASSES + 1)[:, :-1]
            x = (torch.cat(self.x) if len(self.x) > 1 else self.x[0])[valid]
            loss = _focal(sigmoid_focal_loss_jit)(x, target.to(x.dtype), reduction="sum")
            return self._gradients(loss)

        return call


class Deltas:
    """Predicted and target deltas of positives."""

    work = "coordinates"

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        """
        Args:
            size: number of coordinates, rounded down to a multiple of 4.
            device: where to put the tensors.
            dtype: of both.
        """
        g = torch.Generator(device).manual_seed(0)
        shape = (max(size // 4, 1), 4)
        self.target = (torch.randn(shape, generator=g, device=device) * 0.4).to(dtype)
        noise = torch.randn(shape, generator=g, device=device) * 0.1
        self.x = (self.target + noise.to(dtype)).requires_grad_()
        self.size = self.x.numel()
        self.bytes = self.size * self.x.element_size()
        self.device = device

    def floor(self) -> Call:
        """Reads predictions and targets twice and writes as many values as predictions."""
        x, out = self.x.detach(), torch.empty_like(self.target)

        def call() -> None:
            x.sum()
            self.target.sum()
            torch.sub(x, self.target, out=out)

        return call

    def calls(self, bins: int, mmdet: types.ModuleType | None) -> dict[str, Callable[[], Call]]:
        """For each name a function that prepares its call."""
        makers: dict[str, Callable[[], Call]] = {
            FUSED: lambda: self._call(GHMRLoss(0.02, bins, 0.7)),
            EAGER: lambda: _eagerly(self._call(GHMRLoss(0.02, bins, 0.7))),
            EXACT: lambda: self._call(GHMRLoss(0.02, bins, 0.0, density="exact")),
            "smooth L1, torch": lambda: self._call(torch.nn.SmoothL1Loss(beta=1 / 9)),
        }
        if mmdet is not None:
            ones = torch.ones_like(self.target)
            makers[MMDET] = lambda: self._call(mmdet.GHMR(0.02, bins, 0.7), ones)
        return makers

    def _call(self, module: torch.nn.Module, *more: Tensor) -> Call:
        module.to(self.device)
        return lambda: torch.autograd.grad(module(self.x, self.target, *more), self.x)


def _focal(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(x: Tensor, target: Tensor, reduction: str) -> Tensor:
        return function(x, target, alpha=0.25, gamma=2.0, reduction=reduction)

    return loss


def _eagerly(call: Call) -> Call:
    """`call` without the kernels of either loss."""

    def none(*_: object, **__: object) -> None:
        return None

    def eager() -> object:
        with (
            mock.patch.object(ghm_c, "sigmoid_kernel", none),
            mock.patch.object(ghm_r, "regression_kernel", none),
            mock.patch.object(base, "device_examples", none),
        ):
            return call()

    return eager


@dataclass
class Case:
    """One input, measured with every implementation.

    Attributes:
        suite: "sizes", "regions", "levels" or "ghm_r".
        label: what to call it in the table.
        size: number of examples.
        bins: number of unit regions.
        scale: what time is predicted to be proportional to within the suite.
        make: builds the inputs.
        rows: the implementations; None: all.
    """

    suite: str
    label: str
    size: int
    bins: int
    scale: float
    make: Callable[[], Logits | Deltas]
    rows: Sequence[str] | None = field(default=None)
