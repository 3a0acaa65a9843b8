"""Hand the runs that are not done yet to submitit, some side by side, and follow them."""

import contextlib
import logging
import os
import signal
import sys
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
from ghm_d2.errors import UserError, reason

from .plan import Run
from .results import Store

if TYPE_CHECKING:
    import submitit

logger = logging.getLogger(__name__)

CLUSTERS = ("local", "slurm", "debug")  # debug: in this process, one after the other
_POLL = 1.0  # seconds
_GRACE = 60.0  # seconds that cancelled runs get to end
_TIME_LIMITS = {"local": 30 * 24 * 60}  # minutes; submitit knows no job without a limit
_TIME_LIMIT = 24 * 60


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
    start: float = field(default_factory=time.perf_counter)


def execute(
    runs: Sequence[Run],
    store: Store,
    jobs: int,
    threads: int,
    gpus_each: int = 1,
    cluster: str = "local",
    parameters: Mapping[str, Any] | None = None,
) -> Outcome:
    """Bring every unfinished run to its end.

    A run that was cut off goes on from its last checkpoint. One that fails is reported, and the
    others go on. Ctrl-C, SIGTERM and a closed terminal cancel what is running.

    Args:
        runs: the plan; runs of one identity are run once.
        store: where results and OUTPUT_DIRs lie; on a cluster, all its machines must see it.
        jobs: runs side by side.
        threads: CPU threads of each.
        gpus_each: GPUs of each; where this machine has more, the runs side by side share them out.
        cluster: one of `CLUSTERS`.
        parameters: more for submitit's AutoExecutor, such as `slurm_partition`.

    Raises:
        UserError: submitit or the cluster is missing, or submitit refuses a parameter.
    """
    outcome, active = Outcome(), []
    planned = {run.id: run for run in runs}
    outcome.cached = {run.id for run in planned.values() if store.load(run)}
    waiting = deque(run for run in planned.values() if run.id not in outcome.cached)
    if outcome.cached:
        logger.info("done already: %d of %d runs", len(outcome.cached), len(planned))
    if not waiting:
        return outcome
    submitter = _Submitter(store, threads, gpus_each, cluster, parameters or {})
    submitter.executor(waiting[0])  # a wrong option is reported once, before anything starts
    total, steps = len(waiting), sum(run.iterations for run in waiting)
    done = {run.id: store.progress(run)[0] for run in waiting}
    quiet = {} if sys.stderr.isatty() else {"mininterval": 30.0, "file": _Lines()}
    stops = dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.default_int_handler)
    with (
        logging_redirect_tqdm([logging.getLogger("ghm_d2")]),
        tqdm(total=steps, initial=sum(done.values()), unit="it", **quiet) as bar,
        _signals(stops),
    ):
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    slot = min(set(range(jobs)) - {item.slot for item in active})
                    active.append(submitter.submit(waiting.popleft(), slot))
                for item in [item for item in active if item.job.done()]:
                    active.remove(item)
                    done[item.run.id] = item.run.iterations
                    _conclude(item, outcome, store, total)
                told = []
                for run in (item.run for item in active):
                    done[run.id], loss = store.progress(run)
                    loss = "" if loss is None else f", loss {loss:.3f}"
                    told.append(f"{run.name}: {done[run.id]} of {run.iterations}{loss}")
                bar.set_description(f"run {total - len(waiting)} of {total}", refresh=False)
                bar.set_postfix_str("; ".join(told), refresh=False)
                bar.update(sum(done.values()) - bar.n)
                time.sleep(_POLL if active else 0)
        finally:
            submitter.cancel(active)
    return outcome


def _conclude(item: _Active, outcome: Outcome, store: Store, total: int) -> None:
    """Note and tell what became of a run."""
    from submitit.core.utils import UncompletedJobError

    from .job import ELSEWHERE

    run = item.run
    try:
        reason = item.job.result()
    except UncompletedJobError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"its process ended without a result (killed, or out of memory?): {lines[-1]}"
    if reason == ELSEWHERE:
        outcome.elsewhere.add(run.id)
    elif reason:
        outcome.failed[run.id] = reason
    else:
        outcome.finished.add(run.id)
    count = f"{len(outcome.finished) + len(outcome.failed) + len(outcome.elsewhere)} of {total}"
    if reason:
        log = item.job.paths.stdout
        logger.warning("%s not finished (%s): %s; its log is %s", run.name, count, reason, log)
        return
    minutes = (time.perf_counter() - item.start) / 60
    ap = (store.load(run) or {}).get("metrics", {}).get("AP")
    told = "unknown" if ap is None else f"{ap:.2f}"
    logger.info("%s finished (%s) in %.1f min: AP %s", run.name, count, minutes, told)


class _Lines:
    """Where a bar goes that is not on a terminal: a file would be one long line."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


class _Submitter:
    """Starts runs by submitit, and cancels them."""

    def __init__(
        self, store: Store, threads: int, gpus_each: int, cluster: str, more: Mapping[str, Any]
    ) -> None:
        self._store, self._gpus_each, self._cluster = store, gpus_each, cluster
        self._parameters = {
            "cpus_per_task": threads,
            "gpus_per_node": gpus_each if cluster == "slurm" else 0,
            "timeout_min": _TIME_LIMITS.get(cluster, _TIME_LIMIT),
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

            executor = submitit.AutoExecutor(self._store.logs(run), cluster=self._cluster)
            executor.update_parameters(name=f"ghm_{run.id}", **self._parameters)
        except ImportError as error:
            raise UserError(
                "ablations are run by submitit: pip install submitit (--report-only needs none)."
            ) from error
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"submitit cannot use --cluster {self._cluster}: {reason(error)}."
            ) from error
        return executor

    def submit(self, run: Run, slot: int) -> _Active:
        """Start a run; slots number those side by side, from 0."""
        from submitit.helpers import environment_variables

        from .job import Job

        gpus = self._gpus(slot) if self._cluster == "local" else None
        job = Job(self._store.folder.resolve(), gpus)
        # A terminal sends Ctrl-C to every process: without this a training would die in mid-step,
        # where `cancel` lets it write a checkpoint first.
        deaf = _signals(dict.fromkeys((signal.SIGINT, signal.SIGHUP), signal.SIG_IGN))
        with environment_variables(**self._environment), deaf:
            return _Active(run, self.executor(run).submit(job, run), slot)

    def _gpus(self, slot: int) -> str:
        """CUDA_VISIBLE_DEVICES of a slot; submitit by itself would hide every GPU."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [str(i) for i in range(torch.cuda.device_count())]
        if visible is not None:
            names = [name for name in visible.split(",") if name]
        if len(names) > self._gpus_each:
            first = slot * self._gpus_each
            names = [names[(first + i) % len(names)] for i in range(self._gpus_each)]
        return ",".join(names)

    def cancel(self, active: Sequence[_Active]) -> None:
        """End what is still running, and wait for it; the next call goes on from the checkpoints.

        A training finishes its step and writes a checkpoint. A local one that takes longer than
        the time of grace is killed.
        """
        local = self._cluster == "local"
        for item in active:
            if not local:
                item.job.cancel(check=False)
            elif not item.job.done():  # its own `cancel` kills after a second
                os.kill(int(item.job.job_id), signal.SIGTERM)
        end = time.monotonic() + _GRACE
        for item in active if local else ():
            while not item.job.done() and time.monotonic() < end:
                time.sleep(0.1)
            if not item.job.done() and (pid := self._store.process(item.run)):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _signals(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Installs handlers for the block, except for signals that the user has set to be ignored."""
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
