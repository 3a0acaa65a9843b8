"""Writes gradient statistics of a training to metrics.json, TensorBoard and their own file."""

import json
import os
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.file_io import PathManager
from torch import nn

from ghm_d2.losses.base import HarmonizedLoss, observed
from ghm_d2.losses.weighted import WeightedLoss
from ghm_d2.run_folder import STATISTICS as FILE

from .statistics import SHARES, CallStatistics, measure, summarize

_SCALARS = ("plain_loss", "plain_loss_positives", *(f"gradient_share_{name}" for name in SHARES))
_SCALARS += ("non_empty_regions", "largest_weight")

Kind = TypeVar("Kind", bound=WeightedLoss)


def build_gradient_statistics(
    model: nn.Module, period: int, folder: str, passes: int = 1
) -> "GradientStatistics | None":
    """Builds the hook that writes gradient statistics to a folder.

    Args:
        model: the model, wrapped for several processes or not.
        period: in iterations; 0: never.
        folder: OUTPUT_DIR.
        passes: forward passes in a step.

    Returns:
        None where the period is 0, the model has no harmonised loss, or this is not the
        main process.
    """
    if not period or not comm.is_main_process():
        return None
    hook = GradientStatistics(model, period, os.path.join(folder, FILE), passes)
    return hook if hook.losses else None


class GradientStatistics(HookBase):
    """Observes every harmonised loss of a model at each `period`-th iteration and the last one.

    It must run before the hook that writes the logs. Between observed steps the losses run as they
    would without it. The statistics cover the examples of the main process; only with
    `MODEL.GHM.SYNC` do its counts cover those of all processes.
    """

    def __init__(self, model: nn.Module, period: int, file: str, passes: int = 1) -> None:
        """
        Args:
            model: the model, wrapped for several processes or not.
            period: in iterations, above 0.
            file: JSON lines are appended to it, one for each loss and observed iteration; its
                folder must exist.
            passes: forward passes in a step.
        """
        self.period, self.passes = period, passes
        self.file = file
        self.losses = losses_by_name(model)
        self._calls: dict[HarmonizedLoss, list[CallStatistics]] | None = None  # None: not observed
        self._observation = ExitStack()

    def before_step(self) -> None:
        """Begins to observe the losses if this iteration is one to be observed."""
        following = self.trainer.iter + 1
        if following % self.period == 0 or following == self.trainer.max_iter:
            self._calls = {}
            self._observation.enter_context(observed(self._record))

    def after_step(self) -> None:
        """Writes what was seen."""
        self._observation.close()
        if self._calls is None:
            return
        calls, self._calls = self._calls, None
        # Only the last forward pass counts: over all of them, sums over calls would be `passes`
        # times those of a single pass.
        calls = {loss: each[-max(len(each) // self.passes, 1) :] for loss, each in calls.items()}
        with PathManager.open(self.file, "a") as stream:
            for name, modules in self.losses.items():
                copies = [calls[module] for module in modules if module in calls]
                if not copies:
                    continue
                summary = summarize(copies)
                put(self.trainer.storage, name, summary)
                row = {"iteration": self.trainer.iter, "loss": name, **summary}
                # Six significant digits are enough, and halve the file.
                row = json.loads(json.dumps(row), parse_float=lambda x: float(f"{float(x):.6g}"))
                stream.write(json.dumps(row) + "\n")

    def after_train(self) -> None:
        """Ends the observation if an error has broken off the step."""
        self._observation.close()

    def _record(self, module: HarmonizedLoss, *arguments: Any) -> None:
        self._calls.setdefault(module, []).append(measure(module, *arguments))


class LossWeights(HookBase):
    """Writes the weights of losses with `loss_weight="auto"` as `NAME/loss_weight`.

    It must run before the hook that writes the logs, at whose iterations alone it reads them: a
    weight lies on the device, and reading it waits for that.
    """

    def __init__(self, model: nn.Module, period: int) -> None:
        """
        Args:
            model: the model, wrapped for several processes or not.
            period: of the logs, in iterations.
        """
        self.period = period
        self.losses = {
            name: copies
            for name, copies in losses_by_name(model, WeightedLoss).items()
            if copies[0].follows_weight
        }

    def after_step(self) -> None:
        """Writes the weights of this step, averaged over copies."""
        following = self.trainer.iter + 1
        if following % self.period and following != self.trainer.max_iter:
            return
        for name, copies in self.losses.items():
            weight = sum(float(loss.loss_weight) for loss in copies) / len(copies)
            self.trainer.storage.put_scalar(f"{name}/loss_weight", weight, smoothing_hint=False)


def losses_by_name(model: nn.Module, kind: type[Kind] = HarmonizedLoss) -> dict[str, list[Kind]]:
    """The losses of a model; copies ("ghm_c.0", "ghm_c.1") share one name.

    Args:
        model: the model, wrapped for several processes or not.
        kind: the class of the losses.
    """
    losses: dict[str, list[Kind]] = {}
    for path, module in getattr(model, "module", model).named_modules():
        if isinstance(module, kind):
            parent, _, last = path.rpartition(".")
            losses.setdefault(parent if last.isdigit() else path, []).append(module)
    return losses


def put(storage: EventStorage, name: str, summary: dict[str, Any]) -> None:
    """Hands the result of :func:`summarize` to Detectron2's writers as `NAME/...`.

    The two histograms over the gradient norm show log10(1 + R_j), without which the first region
    would dwarf all others, and the share of the gradient.
    """
    for key in _SCALARS:
        if summary[key] is not None:
            storage.put_scalar(f"{name}/{key}", summary[key], smoothing_hint=False)
    counts = torch.tensor([call["counts"] for call in summary["calls"]]).sum(0).double()
    shares = torch.tensor([call["gradient_share"] for call in summary["calls"]]).sum(0)
    _put_histogram(storage, f"{name}/log10_examples", (1 + counts).log10())
    _put_histogram(storage, f"{name}/gradient_share", shares)


def _put_histogram(storage: EventStorage, name: str, heights: torch.Tensor) -> None:
    """Puts a histogram over [0, 1] with the given heights.

    Detectron2's `put_histogram` takes values and counts them itself. Like it, this appends to the
    list that the TensorBoard writer reads.
    """
    edges = torch.linspace(0, 1, len(heights) + 1, dtype=torch.float64)
    centres = (edges[1:] + edges[:-1]) / 2
    storage._histograms.append(
        {
            "tag": name,
            "min": 0.0,
            "max": 1.0,
            "num": float(heights.sum()),
            "sum": float((heights * centres).sum()),
            "sum_squares": float((heights * centres**2).sum()),
            "bucket_limits": edges[1:].tolist(),
            "bucket_counts": heights.tolist(),
            "global_step": storage.iter,
        }
    )
