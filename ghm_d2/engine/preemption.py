"""SIGTERM, with which clusters end a job: one last checkpoint, then the end."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.utils import comm

from ghm_d2.engine.agreement import any_process
from ghm_d2.engine.finite import require_finite_weights
from ghm_d2.engine.process_states import ProcessStates

__all__ = ["PREEMPTED", "Preempted", "StopOnSigterm"]

PREEMPTED = 75  # exit code; EX_TEMPFAIL of sysexits.h: "try again later"


class Preempted(SystemExit):
    """Ends every process of a job that was stopped and can be resumed."""


class StopOnSigterm(HookBase):
    """After SIGTERM to any process, all of them finish their step and the main one saves.

    It runs in every process, after the hook that saves periodically. After the last iteration
    SIGTERM ends the process at once, as without this hook: everything is saved then.
    """

    def __init__(self, checkpointer: DetectionCheckpointer, states: ProcessStates) -> None:
        """
        Args:
            checkpointer: saves in the main process.
            states: collected before it saves.
        """
        self._checkpointer, self._states = checkpointer, states
        self._asked = False
        self._before: Any = None

    def before_train(self) -> None:
        """Takes over SIGTERM; Python lets the main thread alone do that."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def after_train(self) -> None:
        """Gives it back, before the last evaluation."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Clusters and launchers may both signal, so another one changes nothing.
        if not self._asked and comm.is_main_process():
            # A handler must not use the buffers that it may have interrupted.
            os.write(2, b"SIGTERM: a checkpoint will be written after this step\n")
        self._asked = True

    def after_step(self) -> None:
        """Stops all processes where one was asked to.

        Raises:
            Preempted: the checkpoint is written.
            NotFiniteError: the weights are not finite; none is written.
        """
        iteration = self.trainer.iter
        if not any_process(self._asked) or iteration + 1 >= self.trainer.max_iter:
            return
        require_finite_weights(self.trainer.model, iteration)
        self._states.collect()
        if comm.is_main_process():
            name = f"model_{iteration:07d}"  # as PeriodicCheckpointer has it
            self._checkpointer.save(name, iteration=iteration)
            print(
                f"Stopped by SIGTERM after {iteration + 1} of "
                f"{self.trainer.max_iter} iterations, {self._checkpointer.get_checkpoint_file()} "
                "is written: go on with --resume.",
                file=sys.stderr,
                flush=True,
            )
        comm.synchronize()
        raise Preempted(PREEMPTED)
