"""The signals that end a job (SIGTERM, SIGHUP, SIGINT): one last checkpoint, then the end."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.utils import comm

from ghm_d2.data.workers import ENDING_SIGNALS

from .agreement import any_process
from .finite_weights import require_finite_weights
from .process_states import ProcessStates

PREEMPTED = 75  # exit code; EX_TEMPFAIL of sysexits.h: "try again later"


class Preempted(SystemExit):
    """Ends every process of a job that was stopped and can be resumed."""


class StopOnSignal(HookBase):
    """After an ending signal to any process, all of them finish their step and the main one saves.

    Clusters send SIGTERM, a closing terminal sends SIGHUP, and Ctrl-C sends SIGINT; a second
    Ctrl-C ends the process at once. The hook runs in every process, after the hook that saves
    periodically. After the last iteration these signals end the process at once, as without this
    hook: everything is saved by then.
    """

    def __init__(self, checkpointer: DetectionCheckpointer, states: ProcessStates) -> None:
        """
        Args:
            checkpointer: saves in the main process.
            states: collected before it saves.
        """
        self._checkpointer, self._states = checkpointer, states
        self._asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def before_train(self) -> None:
        """Takes over the signals; Python allows this only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in ENDING_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self._before[number] = signal.signal(number, self._note)

    def after_train(self) -> None:
        """Restores the previous signal handlers, before the last evaluation."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked is signal.SIGINT is signal.Signals(number):
            raise KeyboardInterrupt
        # Clusters and launchers may both signal, so another one changes nothing.
        if self._asked is None and comm.is_main_process():
            name = signal.Signals(number).name
            # print() is not safe here: the signal may have interrupted a write to the same buffer.
            os.write(2, f"{name}: a checkpoint will be written after this step\n".encode())
        self._asked = self._asked or signal.Signals(number)

    def after_step(self) -> None:
        """Stops all processes where one was asked to.

        Raises:
            Preempted: the checkpoint is written.
            NotFiniteError: the weights are not finite; none is written.
        """
        iteration = self.trainer.iter
        if not any_process(self._asked is not None) or iteration + 1 >= self.trainer.max_iter:
            return
        require_finite_weights(self.trainer.model, iteration)
        self._states.collect()
        if comm.is_main_process():
            name = f"model_{iteration:07d}"  # as PeriodicCheckpointer has it
            self._checkpointer.save(name, iteration=iteration)
            name = self._asked.name if self._asked else "a signal to another process"
            print(
                f"Stopped by {name} after {iteration + 1} of "
                f"{self.trainer.max_iter} iterations, {self._checkpointer.get_checkpoint_file()} "
                "is written: go on with --resume.",
                file=sys.stderr,
                flush=True,
            )
        comm.synchronize()
        raise Preempted(PREEMPTED)
