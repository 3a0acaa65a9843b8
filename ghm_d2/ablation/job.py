"""One run in the process that submitit has started for it: train, evaluate, keep the result."""

import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from submitit.helpers import DelayedSubmission

from ghm_d2.engine import main
from ghm_d2.errors import UserError, described
from ghm_d2.provenance import machine
from ghm_d2.run_folder import FINAL_CHECKPOINT, RunFolder

from .plan import Run
from .results import Store

ELSEWHERE = "another process is at work on it"


class Job:
    """Brings one run to its end.

    Args:
        folder: of the ablation.
        gpus: CUDA_VISIBLE_DEVICES; None: as the cluster has set it.
    """

    def __init__(self, folder: Path, gpus: str | None = None) -> None:
        self._folder, self._gpus, self._requeued = folder, gpus, False

    def __call__(self, run: Run) -> str:
        """Returns "" once the result is kept, or else in one sentence why there is none."""
        # submitit ignores SIGTERM: without this, a run could be cancelled only during its
        # training, which has a handler of its own.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._gpus is not None:  # in time: nothing has initialised CUDA yet
            os.environ["CUDA_VISIBLE_DEVICES"] = self._gpus
        store = Store(self._folder)
        with store.lock(run) as free:
            if not free:
                return ELSEWHERE
            if store.load(run):  # finished since it was submitted
                return ""
            return self._run(run, store)

    def checkpoint(self, run: Run) -> DelayedSubmission:
        """submitit calls this before a time limit or a preemption, then queues the job anew."""
        self._requeued = True  # for this process; the new job starts from the same arguments
        return DelayedSubmission(Job(self._folder, self._gpus), run)

    def _run(self, run: Run, store: Store) -> str:
        output, starts = store.prepare(run)
        begin = time.perf_counter()
        options = {None: [], FINAL_CHECKPOINT: ["--resume", "--eval-only"]}
        last = RunFolder(output).last_checkpoint()
        argv = [*run.argv_into(output), *options.get(last, ["--resume"])]
        if reason := self._train(argv):
            return reason
        seconds = round(time.perf_counter() - begin, 1)
        try:
            store.save(run, {"seconds": seconds, "starts": starts, **_usage()})
        except UserError as error:
            return str(error)
        return ""

    def _train(self, argv: list[str]) -> str:
        try:
            main(argv)
        except SystemExit as stop:
            if self._requeued:  # submitit must see its own exit
                raise
            return _reason(stop) if stop.code else ""
        except Exception as error:
            traceback.print_exc()
            return _sentence(error)
        return ""


def _reason(stop: SystemExit) -> str:
    """Why the trainer has exited: the error behind it, where there is one."""
    if isinstance(stop.code, str):
        return stop.code
    if isinstance(stop.__context__, Exception):
        return _sentence(stop.__context__)
    return f"the training ended with exit code {stop.code}"


def _sentence(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return described(error)


def _usage() -> dict[str, Any]:
    """Memory and machine of this process; of a resumed run, those of the process that ended it."""
    on_gpu = torch.cuda.is_initialized()
    here = machine("cuda" if on_gpu else "cpu")
    unit = 1024**2 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {
        "peak_rss_mb": round(peak, 1),
        "peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 1024**2, 1) if on_gpu else None,
        "cpu": here["cpu"],
        "gpu": here.get("gpu"),
        "threads": here["threads"],
    }
