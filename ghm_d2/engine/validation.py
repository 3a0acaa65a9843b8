"""What an evaluation says besides AP: the losses of its images, and that they could be read."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.data import DatasetMapper
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from ghm_d2.analysis.hook import losses_by_name
from ghm_d2.analysis.statistics import kept_examples
from ghm_d2.errors import UserError
from ghm_d2.losses.base import HarmonizedLoss, observed

from .forward_state import ForwardState
from .python_config import read_uses
from .settings import Config

logger = logging.getLogger(__name__)

VALIDATION = "validation"  # the task under which the losses stand among the results


def add_ground_truth(mapper: Callable[[dict], dict], cfg: Config) -> DatasetMapper:
    """Has the mapper of a test keep what the losses need; the images stay those of the test.

    Args:
        mapper: Detectron2's; changed in place.
        cfg: says whether masks and keypoints belong to it.

    Raises:
        UserError: it is not Detectron2's; how others add ground truth is unknown.
    """
    if not isinstance(mapper, DatasetMapper):
        raise UserError(
            "train.validation_loss needs Detectron2's DatasetMapper as dataloader.test.mapper, got "
            f"a {type(mapper).__name__}: use a DatasetMapper, or give train.validation_loss=False."
        )
    uses = read_uses(cfg)
    mapper.is_train = True
    mapper.use_instance_mask, mapper.use_keypoint = bool(uses.masks), uses.keypoints
    mapper.instance_mask_format = uses.masks or mapper.instance_mask_format
    return mapper


class ValidationLoss(DatasetEvaluator):
    """The mean over the images of what each loss is for that image alone.

    The model is asked as in a training step, but with its norms, dropout and harmonised losses in
    eval mode: these weigh an example as a step would now, and keep nothing. Every image meets the
    same state and the same random numbers, so that neither its order nor its process matters.
    Beside the losses of the model stand the plain ones of its harmonised losses, since a harmonised
    value hardly falls while a detector learns.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: the one that is evaluated, wrapped for several processes or not.
        """
        self._model = getattr(model, "module", model)
        self._names = {
            loss: name for name, copies in losses_by_name(model).items() for loss in copies
        }

    def reset(self) -> None:
        """Begins anew."""
        self._state = ForwardState.of(self._model)
        self._sums: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def process(self, inputs: list[dict[str, Any]], outputs: Any) -> None:
        """Adds the losses of each image that has ground truth."""
        for image in inputs:
            if "instances" not in image:  # the image is unreadable or not labelled
                continue
            try:
                with _as_in_training(self._model), observed(self._add_plain):
                    losses = {k: float(v) for k, v in self._model([image]).items()}
            except (ValueError, FloatingPointError) as error:  # not finite: the losses refuse it
                logger.warning("no validation loss for %s: %s", image.get("file_name"), error)
                losses = {"total_loss": math.nan}
            finally:
                self._state.restore(self._model)
            for name, value in {"total_loss": sum(losses.values()), **losses}.items():
                self._add(name, value, 1)

    def _add_plain(self, loss: HarmonizedLoss, *arguments: Any) -> None:
        for plain, _, positive in kept_examples(loss, *arguments[:3]):
            name = self._names[loss]
            self._add(f"{name}/plain_loss", float(plain.sum()), len(plain))
            if positive.any():
                of_positives = f"{name}/plain_loss_positives"
                self._add(of_positives, float(plain[positive].sum()), int(positive.sum()))

    def _add(self, name: str, value: float, number: int) -> None:
        self._sums[name] += value
        self._counts[name] += number

    def evaluate(self) -> dict[str, dict[str, float]]:
        """The means over all processes, in the main one; nothing without ground truth."""
        found = comm.gather((self._sums, self._counts))
        sums, counts = Counter(), Counter()
        for of_process in found:
            sums.update(of_process[0])
            counts.update(of_process[1])
        means = {name: sums[name] / counts[name] for name in counts if counts[name]}
        return {VALIDATION: means} if means else {}


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Puts modules with children in training mode, to compute losses; leaves in eval mode."""
    was_training = {module: module.training for module in model.modules()}
    for module in was_training:
        has_parts = any(True for _ in module.children())
        module.training = has_parts and not isinstance(module, HarmonizedLoss)
    model.training = True
    try:
        # Detectron2's detectors write figures of their training into the current storage.
        with torch.no_grad(), EventStorage():
            yield
    finally:
        for module, training in was_training.items():
            module.training = training


class ReadableImages(DatasetEvaluator):
    """Refuses a test without one readable image: unreadable ones are tested as black."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: of the data set.
        """
        self._name = name

    def reset(self) -> None:
        """Begins anew."""
        self._failures: list[str] = []
        self._images = 0

    def process(self, inputs: list[dict[str, Any]], outputs: Any) -> None:
        """Counts."""
        self._images += len(inputs)
        self._failures += [image["unreadable"] for image in inputs if "unreadable" in image]

    def evaluate(self) -> None:
        """
        Raises:
            UserError: no process has read an image.
        """
        found = comm.all_gather((self._images, self._failures))
        images, failures = sum(n for n, _ in found), [x for _, part in found for x in part]
        if images and len(failures) == images:
            raise UserError(
                f"none of the {images} images of {self._name} could be read, the first "
                f"{failures[0]}: check the disk and what the config does to test images, or list "
                "all that are damaged with ghm-d2 check-data."
            )
