"""Detectron2's training step, in one piece that looks at losses and gradients on its way."""

import contextlib
import time
from contextlib import AbstractContextManager

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import get_event_storage
from torch import Tensor

from .finite import FiniteCheck

__all__ = ["CheckedAMPTrainer", "CheckedTrainer"]


class CheckedTrainer(SimpleTrainer):
    """`SimpleTrainer` that stops before the optimizer where something is not finite.

    Attributes:
        check: the :class:`FiniteCheck` of the training; set before the first step.
    """

    check: FiniteCheck

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
        self.check.before_forward(data)
        with self._precision_context():
            losses = self.model(data)
            losses = losses if isinstance(losses, dict) else {"total_loss": losses}
            total = sum(losses.values())
        self.check.after_forward(losses)
        if not self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        self._backward(total)
        self.check.after_backward()
        self.after_backward()

        if self.async_write_metrics:
            self.concurrent_executor.submit(self._write_metrics, losses, data_time, iter=self.iter)
        else:
            self._write_metrics(losses, data_time)
        self._optimizer_step()

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
