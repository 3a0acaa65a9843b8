"""Stops a training before a step that is not finite is taken, and says where it came from.

Detectron2 looks at the losses on the main process alone and never at the gradients. Here every
process looks, before the optimizer's step, so that the weights in memory are still good; all stop
together, and the batch is saved for `ghm-d2 replay`.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghm_d2.errors import UserError, described
from ghm_d2.losses.base import HarmonizedLoss

from .agreement import any_process
from .diagnosis import describe_images, diagnose
from .forward_state import ForwardState
from .output_folder import is_disk_error
from .replay import Replay, save_replay
from .settings import Config, as_text, read_settings

logger = logging.getLogger(__name__)

_FOLDER = "not_finite"


class NotFiniteError(UserError, FloatingPointError):
    """A training met a NaN, an infinity, or values that its losses refuse."""

    exit_code = 3


class FiniteCheck:
    """Looks at losses and gradients of every step before the optimizer moves the weights.

    :class:`CheckedTrainer` calls :meth:`before_forward`, :meth:`after_forward` and
    :meth:`after_backward` inside :meth:`guard`. The model itself is not changed, so that it can be
    copied and pickled at any time, and a forward pass outside the step meets no other process. One
    process waits for its device once, where Detectron2 is about to wait to log the losses; several
    also ask each other after the forward pass, before one of them can wait for the gradients of
    another that has stopped. Under mixed precision the gradients are left to the GradScaler.
    """

    def __init__(
        self,
        cfg: Config,
        model: nn.Module,
        last_checkpoint: Callable[[], str],
        precision: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            cfg: config of the training.
            model: what is trained, wrapped for several processes or not.
            last_checkpoint: called for the name of the last checkpoint, "" without one.
            precision: dtype of mixed precision; None without it.
        """
        self._cfg = cfg
        self._last_checkpoint = last_checkpoint
        self._precision = precision
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._votes = comm.get_world_size() > 1
        self._meets = any(map(_communicates, self._model.modules()))
        self._iteration = self._steps = 0
        self._batch: list[dict[str, Any]] | None = None
        self._losses: dict[str, Tensor] = {}
        self._agreed = False

    @contextlib.contextmanager
    def guard(self, iteration: int) -> Iterator[None]:
        """Context manager around one training step.

        Args:
            iteration: its number, from 0.

        Raises:
            NotFiniteError: in every process, if a loss or gradient of one is not finite or its
                losses refuse their input.
            UserError: in every other process, if one fails for another reason before the gradients
                are averaged; the failed process raises its own error.
        """
        self._iteration, self._batch, self._agreed = iteration, None, False
        self._steps += 1
        try:
            yield
        except UserError as error:
            if self._agreed:
                raise
            self._leave_together(str(error), error.exit_code)
            raise
        except (ValueError, FloatingPointError) as error:
            if self._agreed or self._batch is None:
                self._leave_together(described(error))
                raise
            self._stop(str(error).rstrip("."), cause=error)
        except Exception as error:
            self._leave_together(described(error))
            raise
        finally:
            self._losses = {}  # otherwise their graph stays in memory

    def before_forward(self, batch: list[dict[str, Any]]) -> None:
        """Notes what the forward pass is about to read."""
        self._batch, self._agreed = batch, False
        self._state = ForwardState.of(self._model)

    def after_forward(self, losses: dict[str, Tensor]) -> None:
        """Stops all processes where a loss of one of them is not finite."""
        self._losses = losses
        if self._votes:
            bad = not bool(self._finite_losses().all())
            if any_process(bad):
                self._agreed = True
                self._stop_agreed(self._loss_words() if bad else "")
        self._agreed = True

    def after_backward(self, averaged: bool = True) -> None:
        """Stops where a loss or a gradient is not finite.

        Args:
            averaged: whether the gradients are the mean over all processes, so that all of them see
                the same values here; otherwise they must vote.
        """
        flags = [self._finite_losses().all()]
        if self._precision is None:
            flags.append(torch.isfinite(torch.stack(self._gradient_norms())).all())
        # One transfer from the device, just before Detectron2 makes its own to log the losses.
        losses, *gradients = torch.stack(flags).tolist()
        words = "" if losses else self._loss_words()
        if losses and not all(gradients):
            words = self._gradient_words()
        if bool(words) if averaged else any_process(bool(words)):
            self._stop_agreed(words)

    def _finite_losses(self) -> Tensor:
        return torch.isfinite(torch.stack([x.detach().float() for x in self._losses.values()]))

    def _gradient_norms(self) -> list[Tensor]:
        # Sums of absolute values: squares overflow above 10^19, where clipping could still help.
        found = [torch.linalg.vector_norm(p.grad, 1) for p in self._with_gradient()]
        return found or [torch.zeros(())]

    def _with_gradient(self) -> list[nn.Parameter]:
        return [p for p in self._parameters if p.grad is not None]

    def _loss_words(self) -> str:
        finite = self._finite_losses().tolist()
        bad = [name for name, good in zip(self._losses, finite, strict=True) if not good]
        return ", ".join(f"{name} is {self._losses[name].item()}" for name in bad)

    def _gradient_words(self) -> str:
        bad = [
            name
            for name, p in self._model.named_parameters()
            if p.grad is not None and not torch.isfinite(p.grad).all()
        ]
        values = ", ".join(f"{name} {x.item():.4g}" for name, x in self._losses.items())
        if not bad:
            return f"the gradients overflow when they are added up, though the losses are {values}"
        return (
            f"{len(bad)} gradients are not finite, the first that of {bad[0]}, though the losses "
            f"are ({values})"
        )

    def _stop(self, words: str, cause: Exception) -> None:
        """After an error of this process' forward pass, which the others may not know of."""
        if self._votes and not self._meets:
            any_process(True)
            self._agreed = True
            self._stop_agreed(words, cause)
        # Where processes meet inside the forward pass, the others wait there and cannot vote;
        # they are ended when this process exits.
        self._agreed = True
        raise NotFiniteError(self._report(words)) from cause

    def _stop_agreed(self, words: str, cause: Exception | None = None) -> None:
        """Called by all processes at once; `words` is empty where this one found nothing."""
        mine = (NotFiniteError.exit_code, self._report(words) if words else "")
        reports = [each for each in comm.all_gather(mine) if each[1]]
        codes = {code for code, _ in reports}
        text = " ".join(report for _, report in reports)
        if NotFiniteError.exit_code in codes:
            raise NotFiniteError(text) from cause
        error = UserError(text)
        error.exit_code = min(codes)  # that of the process which has failed
        raise error from cause

    def _leave_together(self, words: str, exit_code: int = 1) -> None:
        """Tells the other processes to stop too, before this one raises its own error."""
        # Before its second forward pass, DistributedDataParallel orders its buckets together.
        elsewhere = self._meets or (self._batch is None and self._steps == 2)
        if self._votes and not self._agreed and not elsewhere:
            self._agreed = True
            any_process(True)
            text = f"process {comm.get_rank()} has stopped: {words.rstrip('.')}."
            comm.all_gather((exit_code, text))

    def _report(self, words: str) -> str:
        """Saves the batch and returns the error message."""
        where = f" of process {comm.get_rank()}" if self._votes else ""
        start = f"iteration {self._iteration}{where}: {words}"
        images = f"images {describe_images(self._batch)}"
        saved = self._save(start)
        level = self._diagnose()
        intact = self._last_checkpoint()
        return (
            f"{start}{f' ({level})' if level else ''}, in {images}: the "
            f"step was not taken and "
            + (f"the last checkpoint, {intact}, is intact" if intact else "no checkpoint exists")
            + f"; {saved}."
        )

    def _save(self, message: str) -> str:
        name = f"iteration_{self._iteration:07d}_process_{comm.get_rank()}.pth"
        path = os.path.join(read_settings(self._cfg).output_dir, _FOLDER, name)
        weights = {**self._model.state_dict(), **self._state.buffers}
        precision = str(self._precision).removeprefix("torch.") if self._precision else None
        replay = Replay(
            as_text(self._cfg),
            not isinstance(self._cfg, CfgNode),
            self._batch,
            weights,
            self._state,
            self._iteration,
            message,
            precision,
        )
        try:
            save_replay(path, replay)
        except UserError as error:  # a full disk must not hide what has happened
            return f"the batch could not be saved: {str(error).rstrip('.')}"
        trust = " --trust-checkpoint" if replay.python else ""
        return f"to look closer, run ghm-d2 replay {path}{trust}"

    def _diagnose(self) -> str:
        """Names levels and modules; empty where another forward pass is not possible."""
        if self._meets and self._votes:
            return ""
        device = next(self._model.parameters()).device.type
        try:
            self._state.restore(self._model)
            with torch.autocast(device, self._precision, enabled=self._precision is not None):
                return diagnose(self._model, self._batch).summary()
        except RuntimeError as error:  # for example, out of memory
            logger.warning("no closer look at the batch: %s", error)
            return ""
        finally:
            self._state.restore(self._model)


def _communicates(module: nn.Module) -> bool:
    """Whether the forward pass of `module` waits for other processes."""
    synced = isinstance(module, HarmonizedLoss) and module.sync
    return synced or "SyncBatchNorm" in type(module).__name__


class WithoutTracebacks(logging.Filter):
    """Keeps tracebacks of errors that are reported in one sentence out of Detectron2's log."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, UserError) or is_disk_error(error))
