"""The processes of a job: started by torchrun, or by Detectron2's launcher."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.multiprocessing import ProcessExitedException

from ghm_d2.data.workers import ENDING_SIGNALS
from ghm_d2.errors import UserError

from .agreement import any_process
from .process_end import end_process, exit_code_of

Result = TypeVar("Result")

_SIGTERM_EXIT = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Processes:
    """The processes of a job, as Detectron2's launcher counts them.

    Attributes:
        num_gpus: processes on each machine, whether they have GPUs or not.
        num_machines: machines of the job.
        machine_rank: number of this one, from 0.
        dist_url: where they meet; "auto" for one machine.
    """

    num_gpus: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.num_gpus * self.num_machines


def started_by_torchrun() -> bool:
    """Whether this process is one of a job that torchrun has started."""
    return dist.is_torchelastic_launched()


def is_restarted() -> bool:
    """Whether torchrun has restarted this job after a failure; every process must ask.

    Machines count the failures of their own processes, so they have to agree.
    """
    if not started_by_torchrun():
        return False
    return any_process(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)


def join_torchrun(given: Processes, device: str) -> Processes:
    """Makes this process, which torchrun has started, part of its job.

    Args:
        given: what the command line asks for.
        device: of the model; "cpu" communicates by gloo, GPUs by nccl.

    Returns:
        What torchrun has chosen.

    Raises:
        UserError: the command line asks for other processes, or the machines are not alike.
    """
    world, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if given not in (Processes(), Processes(here)):
        raise UserError(
            "torchrun chooses the processes: leave out --num-gpus, --num-machines, --machine-rank "
            "and --dist-url."
        )
    if world % here:
        raise UserError(
            f"every machine must run the same number of processes: --nproc-per-node is {here} on "
            f"this one, and the whole job has {world} processes."
        )
    rank = int(os.environ["RANK"])
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        if here > torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node {here} is more than the {torch.cuda.device_count()} GPUs of "
                "this machine."
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if world > 1:
        backend = "nccl" if on_gpu else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            place = {"store": _new_store(rank, world), "rank": rank, "world_size": world}
        else:
            place = {}
        dist.init_process_group(backend, timeout=DEFAULT_TIMEOUT, **place)
        comm.create_local_process_group(here)
    return Processes(here, world // here, rank // here, "env://")


def _new_store(rank: int, world: int) -> dist.TCPStore:
    """A store that ends with process 0.

    The one that torchrun offers outlives a restart and holds the addresses of the processes that
    have ended (https://github.com/pytorch/pytorch/issues/135712). Here it is only used
    to pass on the port of the new store. If the port is still that of an earlier store, nothing
    answers there, and it is read again.
    """
    host, key = os.environ["MASTER_ADDR"], "ghm_d2/port"
    lasting = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), timeout=DEFAULT_TIMEOUT)
    if rank == 0:
        store = dist.TCPStore(
            host, 0, world, is_master=True, timeout=DEFAULT_TIMEOUT, wait_for_workers=False
        )
        lasting.set(key, str(store.port))
        return store
    deadline = time.monotonic() + DEFAULT_TIMEOUT.total_seconds()
    while True:
        port = int(lasting.get(key))
        try:
            with socket.create_connection((host, port), timeout=5):
                break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    return dist.TCPStore(host, port, world, timeout=DEFAULT_TIMEOUT, wait_for_workers=False)


def main_first(prepare: Callable[[], Result]) -> Result:
    """Calls a function in the first process of each machine and then in the others.

    Files that it makes are made once, and the others find them.

    Raises:
        UserError: `prepare` raised it in some process; all processes raise the same one.
    """
    result, failure = None, None
    for first in (True, False):
        if (comm.get_local_rank() == 0) == first:
            try:
                result = prepare()
            except UserError as error:
                failure = str(error)
        failures = [text for text in comm.all_gather(failure) if text is not None]
        if failures:
            raise UserError(failures[0])
    return result


def main_only(work: Callable[[], Result]) -> Result | None:
    """Calls a function in the main process alone; all processes must call this together.

    Returns:
        Its result there, and None elsewhere.

    Raises:
        UserError: `work` raised it; all processes raise the same one.
    """
    result, failure = None, None
    if comm.is_main_process():
        try:
            result = work()
        except UserError as error:
            failure = str(error)
    if failure := comm.all_gather(failure)[0]:
        raise UserError(failure)
    return result


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Lets the main process alone report a mistake of the user that all of them meet."""
    try:
        yield
    except UserError:
        rank = int(os.environ["RANK"]) if started_by_torchrun() else comm.get_rank()
        if rank:
            time.sleep(10)  # the first process to leave ends the others
        raise


def launch_processes(work: Callable[..., None], processes: Processes, *arguments: Any) -> None:
    """Calls `work(*arguments)` in every process.

    Signals that end a job are passed on to these processes.

    Raises:
        SystemExit: with the exit code of the first process that failed, which has reported why.
    """
    if processes.world_size == 1:
        return work(*arguments)
    try:
        with _passes_signals_on():
            launch(
                _whole_process,
                processes.num_gpus,
                num_machines=processes.num_machines,
                machine_rank=processes.machine_rank,
                dist_url=processes.dist_url,
                # A Python config holds classes and functions, some of its own file.
                args=(work, *map(PicklableWrapper, arguments)),
            )
    except ProcessExitedException as error:
        if error.exit_code == -signal.SIGTERM:  # ended before its training handled signals
            sys.exit(_SIGTERM_EXIT)
        if error.exit_code < 0:
            name = signal.Signals(-error.exit_code).name
            raise SystemExit(
                f"process {error.error_index} of the job was ended by {name} "
                f"({'perhaps for lack of memory' if name == 'SIGKILL' else 'see above'})."
            ) from error
        sys.exit(error.exit_code)


@contextlib.contextmanager
def _passes_signals_on() -> Iterator[None]:
    """Passes signals on to the processes of a job, so that these end by themselves."""

    def pass_on(*_: Any) -> None:
        for child in multiprocessing.active_children():
            child.terminate()

    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    # multiprocessing's resource tracker ignores SIGINT and SIGTERM by itself. If SIGHUP killed it,
    # a new one would start and complain about resources that it does not know.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    resource_tracker.ensure_running()
    signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _whole_process(work: Callable[..., None], *arguments: Any) -> NoReturn:
    """Runs and ends a process that Detectron2's launcher has spawned."""
    end_process(exit_code_of(lambda: work(*arguments)))
