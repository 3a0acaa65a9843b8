"""Run what is not done yet: each run in a process of its own, some side by side."""

import contextlib
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ghm_d2 import __file__ as _package
from ghm_d2.ablation.plan import Run
from ghm_d2.ablation.results import Store, last_step

__all__ = ["Outcome", "execute", "free_cores"]

logger = logging.getLogger(__name__)

_POLL = 0.5  # seconds
CHILD = (sys.executable, "-m", "ghm_d2.ablation.child")


@dataclass
class Outcome:
    """What became of the runs, by their identities."""

    cached: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)


def free_cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def execute(
    runs: Sequence[Run], store: Store, jobs: int, threads: int, gpus_each: int = 1
) -> Outcome:
    """Bring every run to its end that has not reached it.

    A run that was cut off goes on from its last checkpoint. One that fails is reported, and the
    others go on.

    Args:
        runs: the plan; runs of one identity are run once.
        store: where results and OUTPUT_DIRs lie.
        jobs: processes side by side.
        threads: CPU threads of each.
        gpus_each: GPUs of each; where there are more, the processes side by side share them out.
    """
    outcome = Outcome()
    waiting: deque[Run] = deque()
    for run in {run.id: run for run in runs}.values():
        if store.load(run):
            outcome.cached.add(run.id)
        else:
            waiting.append(run)
    total = len(waiting)
    if outcome.cached:
        logger.info("%d runs are done already", len(outcome.cached))
    if not waiting:
        return outcome
    active: list[_Process] = []
    slots = deque(range(jobs))
    quiet = {} if sys.stderr.isatty() else {"mininterval": 30.0}
    bar = tqdm(total=sum(run.iterations for run in waiting), unit="it", **quiet)
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_redirect_tqdm([logging.getLogger("ghm_d2")]))
        stack.enter_context(bar)
        stack.callback(lambda: [process.stop() for process in active])
        while waiting or active:
            while waiting and slots:
                run = waiting.popleft()
                process = _Process.start(
                    run, store, slots[0], _environment(slots[0], threads, gpus_each)
                )
                if process is None:
                    logger.info("%s is being run by another process", run.name)
                    outcome.elsewhere.add(run.id)
                    bar.total -= run.iterations
                    continue
                slots.popleft()
                bar.total -= process.done
                active.append(process)
            for process in [p for p in active if p.ended()]:
                active.remove(process)
                slots.append(process.slot)
                if reason := process.failure(store):
                    outcome.failed[process.run.id] = reason
                    bar.total -= process.run.iterations - process.done
                else:
                    outcome.finished.add(process.run.id)
                count = len(outcome.finished) + len(outcome.failed) + len(outcome.elsewhere)
                _report(process, store, reason, f"{count} of {total}")
                bar.update(process.advance(None if reason else process.run.iterations))
            for process in active:
                bar.update(process.advance())
            losses = [f"{p.run.name}: {p.done} of {p.run.iterations}{p.loss}" for p in active]
            number = total - len(waiting)
            bar.set_description(f"run {number} of {total}", refresh=False)
            bar.set_postfix_str("; ".join(losses), refresh=False)
            bar.update(0)
            if active:
                time.sleep(_POLL)
    return outcome


def _report(process: "_Process", store: Store, reason: str, count: str) -> None:
    if reason:
        log = process.log_file
        logger.warning("%s failed (%s): %s; its log is %s", process.run.name, count, reason, log)
        return
    found = store.load(process.run)
    ap = (found or {}).get("metrics", {}).get("AP")
    logger.info(
        "%s finished (%s) in %.1f min: AP %s",
        process.run.name,
        count,
        process.seconds / 60,
        "unknown" if ap is None else f"{ap:.2f}",
    )


class _Process:
    """A run at work."""

    def __init__(
        self, run: Run, output: Path, slot: int, lock: IO[str], env: dict[str, str]
    ) -> None:
        self.run, self.slot, self._output, self._lock = run, slot, output, lock
        self.done, self.loss, self.seconds = 0, "", 0.0
        self.log_file = output / "ablate.log"
        pointer = output / "last_checkpoint"
        options = ["--resume"] if pointer.exists() else []
        if options and pointer.read_text().strip() == "model_final.pth":
            options.append("--eval-only")  # it was cut off in its evaluation
        words = [*CHILD, str(output / "usage.json"), *run.argv]
        words += ["OUTPUT_DIR", str(output), *options]
        self._start = time.perf_counter()
        with open(self.log_file, "a") as log:
            self._popen = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,  # its end tells the process that this one has died
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C is for this process, which then stops the others
            )
        self.done, _ = last_step(output) if options else (0, None)

    @classmethod
    def start(cls, run: Run, store: Store, slot: int, env: dict[str, str]) -> "_Process | None":
        """Start a run, unless another process is running it."""
        output = store.output(run)
        output.mkdir(exist_ok=True)
        lock = open(store.work / f"{run.id}.lock", "w")  # noqa: SIM115  (held until the end)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        if store.load(run):  # finished since this process looked
            lock.close()
            return None
        if (store.runs / f"{run.id}.json").exists():  # of another default: start from nothing
            shutil.rmtree(output)
            output.mkdir()
        return cls(run, output, slot, lock, env)

    def advance(self, done: int | None = None) -> int:
        """Note how far the run is; returns the iterations since the last call."""
        before = self.done
        now, loss = last_step(self._output)
        self.done = max(now if done is None else done, before)
        self.loss = "" if loss is None else f", loss {loss:.3f}"
        return self.done - before

    def ended(self) -> bool:
        """Whether the process is over."""
        if self._popen.poll() is None:
            return False
        self.seconds = time.perf_counter() - self._start
        self._close()
        return True

    def failure(self, store: Store) -> str:
        """Save the result; returns why there is none, in one sentence, or ""."""
        code = self._popen.returncode
        if code == 0:
            try:
                store.save(self.run, self.seconds)
            except (OSError, ValueError) as error:
                return f"its results cannot be read ({error})"
            return ""
        lines = [line.strip() for line in _tail(self.log_file) if line.strip()]
        said = [line for line in lines if line.startswith("train_net.py: error: ")]
        last = (said or lines or ["it said nothing"])[-1].removeprefix("train_net.py: error: ")
        return f"signal {-code}; {last}" if code < 0 else last

    def stop(self) -> None:
        """End the process; the next call of the tool goes on from its last checkpoint."""
        self._popen.terminate()
        try:
            self._popen.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._close()

    def _close(self) -> None:
        self._popen.stdin.close()
        self._lock.close()


def _tail(file: Path, size: int = 20000) -> Iterable[str]:
    with open(file, "rb") as stream:
        stream.seek(max(stream.seek(0, 2) - size, 0))
        return stream.read().decode(errors="replace").splitlines()


def _environment(slot: int, threads: int, gpus_each: int) -> dict[str, str]:
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = str(threads)
    # The package that runs here, whatever is installed.
    paths = [str(Path(_package).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    gpus = _gpus()
    if len(gpus) > gpus_each:
        own = [gpus[(slot * gpus_each + i) % len(gpus)] for i in range(gpus_each)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return environment


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]
