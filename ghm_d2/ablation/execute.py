"""Hand the runs that are not done yet to submitit, some side by side, and follow them."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ghm_d2 import __file__ as _package
from ghm_d2.ablation.plan import Run
from ghm_d2.ablation.results import Store, last_step
from ghm_d2.errors import UserError

if TYPE_CHECKING:
    import submitit

__all__ = ["CLUSTERS", "Outcome", "execute", "free_cores"]

logger = logging.getLogger(__name__)

CLUSTERS = ("local", "slurm", "debug")  # debug: in this process, one after the other
_POLL = 0.5  # seconds
_GRACE = 60.0  # seconds that cancelled runs get to end
_LOCAL_LIMIT = 30 * 24 * 60  # minutes; submitit knows no job without a time limit


@dataclass
class Outcome:
    """What became of the runs, by their identities."""

    cached: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)


@dataclass
class _Active:
    run: Run
    job: "submitit.Job[str]"
    slot: int
    done: int = 0  # iterations
    start: float = field(default_factory=time.perf_counter)


def free_cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def execute(
    runs: Sequence[Run],
    store: Store,
    jobs: int,
    threads: int,
    gpus_each: int = 1,
    cluster: str = "local",
    parameters: Mapping[str, Any] | None = None,
) -> Outcome:
    """Bring every run to its end that has not reached it.

    A run that was cut off goes on from its last checkpoint. One that fails is reported, and the
    others go on. Ctrl-C, SIGTERM and a closed terminal cancel what is running.

    Args:
        runs: the plan; runs of one identity are run once.
        store: where results and OUTPUT_DIRs lie; on a cluster, all its machines must see it.
        jobs: runs side by side.
        threads: CPU threads of each.
        gpus_each: GPUs of each; where this machine has more, the runs side by side share them out.
        cluster: one of ``CLUSTERS``.
        parameters: more for submitit's AutoExecutor, such as ``slurm_partition``.

    Raises:
        UserError: submitit or the cluster is missing, or submitit refuses a parameter.
    """
    outcome = Outcome()
    waiting: deque[Run] = deque()
    for run in {run.id: run for run in runs}.values():
        if store.load(run):
            outcome.cached.add(run.id)
        else:
            waiting.append(run)
    if outcome.cached:
        logger.info("%d runs are done already", len(outcome.cached))
    if not waiting:
        return outcome
    submit = _Submitter(store, threads, gpus_each, cluster, parameters or {})
    submit.executor(waiting[0])  # whatever is wrong with it is wrong with all
    total = len(waiting)
    slots = deque(range(jobs))
    active: list[_Active] = []
    quiet = {} if sys.stderr.isatty() else {"mininterval": 30.0}
    with (
        logging_redirect_tqdm([logging.getLogger("ghm_d2")]),
        tqdm(total=sum(run.iterations for run in waiting), unit="it", **quiet) as bar,
        _signals(dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.default_int_handler)),
    ):
        try:
            while waiting or active:
                while waiting and slots:
                    run, slot = waiting.popleft(), slots.popleft()
                    done, _ = last_step(store.output(run))
                    bar.total -= done
                    active.append(_Active(run, submit(run, slot), slot, done))
                for item in [item for item in active if item.job.done()]:
                    reason = _outcome_of(item.job)
                    active.remove(item)
                    slots.append(item.slot)
                    _note(item, reason, outcome, total, store)
                    end = item.run.iterations
                    bar.total -= end - item.done if reason else 0
                    bar.update(0 if reason else end - item.done)
                bar.set_description(f"run {total - len(waiting)} of {total}", refresh=False)
                told = "; ".join(_follow(item, store, bar) for item in active)
                bar.set_postfix_str(told, refresh=False)
                bar.update(0)  # as often as a terminal, or a log, should see it
                if active:
                    time.sleep(_POLL)
        finally:
            submit.cancel(active)
    return outcome


def _follow(item: _Active, store: Store, bar: tqdm) -> str:
    """Move the bar to where a run is; returns that in words."""
    done, loss = last_step(store.output(item.run))
    bar.update(max(done - item.done, 0))
    item.done = max(done, item.done)
    told = "" if loss is None else f", loss {loss:.3f}"
    return f"{item.run.name}: {item.done} of {item.run.iterations}{told}"


def _note(item: _Active, reason: str, outcome: Outcome, total: int, store: Store) -> None:
    from ghm_d2.ablation.job import ELSEWHERE

    run = item.run
    if reason == ELSEWHERE:
        outcome.elsewhere.add(run.id)
        logger.info("%s: %s", run.name, reason)
        return
    if reason:
        outcome.failed[run.id] = reason
    else:
        outcome.finished.add(run.id)
    count = f"{len(outcome.finished) + len(outcome.failed) + len(outcome.elsewhere)} of {total}"
    if reason:
        log = item.job.paths.stdout
        logger.warning("%s failed (%s): %s; its log is %s", run.name, count, reason, log)
        return
    ap = (store.load(run) or {}).get("metrics", {}).get("AP")
    logger.info(
        "%s finished (%s) in %.1f min: AP %s",
        run.name,
        count,
        (time.perf_counter() - item.start) / 60,
        "unknown" if ap is None else f"{ap:.2f}",
    )


def _outcome_of(job: "submitit.Job[str]") -> str:
    """What :class:`~ghm_d2.ablation.job.Job` has returned, or why it could not."""
    from submitit.core.utils import UncompletedJobError

    try:
        return job.result()
    except UncompletedJobError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"its process ended without a result (killed, or out of memory?): {lines[-1]}"


class _Submitter:
    """Starts runs by submitit."""

    def __init__(
        self, store: Store, threads: int, gpus_each: int, cluster: str, more: Mapping[str, Any]
    ) -> None:
        self._store, self._gpus_each, self._cluster = store, gpus_each, cluster
        self._parameters = {
            "cpus_per_task": threads,
            "gpus_per_node": gpus_each if cluster == "slurm" else 0,
            "timeout_min": _LOCAL_LIMIT if cluster == "local" else 24 * 60,
            "stderr_to_stdout": True,
            **more,
        }
        paths = [str(Path(_package).parents[1]), os.environ.get("PYTHONPATH", "")]
        self._environment = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # The package that runs here, whatever is installed.
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }

    def executor(self, run: Run) -> "submitit.AutoExecutor":
        """submitit's executor, whose files lie in the run's folder of logs.

        Raises:
            UserError: submitit or the cluster is missing, or a parameter is refused.
        """
        try:
            import submitit
        except ImportError as error:
            raise UserError(
                "running an ablation needs submitit: pip install submitit (--report-only does "
                "without)."
            ) from error
        try:
            executor = submitit.AutoExecutor(self._store.logs(run), cluster=self._cluster)
            executor.update_parameters(name=f"ghm_{run.id}", **self._parameters)
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"submitit cannot use --cluster {self._cluster}: {reason}") from error
        return executor

    def __call__(self, run: Run, slot: int) -> "submitit.Job[str]":
        from submitit.helpers import environment_variables

        from ghm_d2.ablation.job import Job

        gpus = self._gpus(slot) if self._cluster == "local" else None
        job = Job(self._store.folder.resolve(), gpus)
        # Ctrl-C in a terminal reaches every process, and would kill a training in mid-step that
        # `cancel` lets write a checkpoint.
        deaf = _signals({signal.SIGINT: signal.SIG_IGN, signal.SIGHUP: signal.SIG_IGN})
        with environment_variables(**self._environment), deaf:
            return self.executor(run).submit(job, run)

    def cancel(self, active: Sequence[_Active]) -> None:
        """End what is still running, and wait for it; the next call goes on from the checkpoints.

        A training writes a checkpoint after its step. Here, what takes too long over it is killed.
        """
        local = self._cluster == "local"
        for item in active:
            if not local:
                item.job.cancel(check=False)
            elif not item.job.done():  # submitit's own way leaves one second
                os.kill(int(item.job.job_id), signal.SIGTERM)
        end = time.monotonic() + _GRACE
        for item in active if local else ():
            while not item.job.done() and time.monotonic() < end:
                time.sleep(0.1)
            if not item.job.done() and (pid := self._store.process(item.run)):
                os.kill(pid, signal.SIGKILL)

    def _gpus(self, slot: int) -> str:
        """CUDA_VISIBLE_DEVICES of one of the runs side by side; submitit's default hides all."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [str(i) for i in range(torch.cuda.device_count())]
        if visible is not None:
            names = [name for name in visible.split(",") if name]
        if len(names) > self._gpus_each:
            first = slot * self._gpus_each
            names = [names[(first + i) % len(names)] for i in range(self._gpus_each)]
        return ",".join(names)


@contextlib.contextmanager
def _signals(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Handles signals so within the block; what the user has made this ignore, it still ignores."""
    if threading.current_thread() is not threading.main_thread():  # Python allows it there alone
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number, handler in handlers.items()
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
