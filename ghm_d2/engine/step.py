"""Detectron2's training step, in one piece that looks at losses and gradients on its way."""

import contextlib
import time
from contextlib import AbstractContextManager

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .finite import FiniteCheck


class CheckedTrainer(SimpleTrainer):
    """`SimpleTrainer` that stops before the optimizer where something is not finite.

    Attributes:
        check: the :class:`FiniteCheck` of the training; set before the first step.
        accumulation_steps: forward passes that a batch is divided among, in the order of its
            images; the step uses the mean of their gradients, and the mean losses are logged.
    """

    check: FiniteCheck
    accumulation_steps = 1

    def run_step(self) -> None:
        """Detectron2's step inside :meth:`FiniteCheck.guard`."""
        with self.check.guard(self.iter):
            self._checked_step()

    def _checked_step(self) -> None:
        assert self.model.training, f"[{type(self).__name__}] model was changed to eval mode!"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        parts = _divided(data, self.accumulation_steps)
        found = [self._backward_of(part, number, len(parts)) for number, part in enumerate(parts)]
        losses = found[0]
        if len(found) > 1:
            losses = {k: sum(each[k].detach() for each in found) / len(found) for k in losses}
        self.after_backward()

        if self.async_write_metrics:
            self.concurrent_executor.submit(self._write_metrics, losses, data_time, iter=self.iter)
        else:
            self._write_metrics(losses, data_time)
        self._optimizer_step()

    def _backward_of(self, part: list[dict], number: int, parts: int) -> dict[str, Tensor]:
        """Adds the gradients of one part of the batch; returns its losses."""
        is_last = number + 1 == parts
        # Otherwise DistributedDataParallel would average the gradients after every part.
        with contextlib.nullcontext() if is_last else _no_sync(self.model):
            self.check.before_forward(part)
            with self._precision_context():
                losses = self.model(part)
                losses = losses if isinstance(losses, dict) else {"total_loss": losses}
                total = sum(losses.values())
            self.check.after_forward(losses)
            if not self.zero_grad_before_forward and number == 0:  # later parts add to them
                self.optimizer.zero_grad()
            self._backward(total / parts if parts > 1 else total)
        self.check.after_backward(averaged=is_last)
        return losses

    def _precision_context(self) -> AbstractContextManager:
        return contextlib.nullcontext()

    def _backward(self, total: Tensor) -> None:
        total.backward()

    def _optimizer_step(self) -> None:
        self.optimizer.step()


class CheckedAMPTrainer(CheckedTrainer, AMPTrainer):
    """`AMPTrainer` likewise; gradients that overflow are left to its GradScaler."""

    def _precision_context(self) -> AbstractContextManager:
        assert torch.cuda.is_available(), f"[{type(self).__name__}] CUDA is required!"
        return torch.autocast("cuda", self.precision)

    def _backward(self, total: Tensor) -> None:
        self.grad_scaler.scale(total).backward()
        if self.log_grad_scaler:
            get_event_storage().put_scalar("[metric]grad_scaler", self.grad_scaler.get_scale())

    def _optimizer_step(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def _divided(batch: list[dict], parts: int) -> list[list[dict]]:
    size = -(-len(batch) // parts)
    return [batch[start : start + size] for start in range(0, len(batch), size)] or [batch]


def _no_sync(model: nn.Module) -> AbstractContextManager:
    wrapped = isinstance(model, DistributedDataParallel)
    return model.no_sync() if wrapped else contextlib.nullcontext()
