"""How a process of a job ends: with its own exit code, whatever its threads still hold."""

import atexit
import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist
from detectron2.utils import comm


def exit_code_of(work: Callable[[], None]) -> int:
    """Calls a function as a whole program; an error of its own is printed.

    Returns:
        The exit code that the interpreter would have ended with. Nothing of the call is left: no
        traceback keeps its models or their process groups alive.
    """
    try:
        work()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end_process(code: int) -> NoReturn:
    """Ends one process of a job at once, after running its `atexit` functions.

    A normal interpreter exit would abort some processes with code 134 instead of their own: gloo's
    threads still hold Python tensors and take the interpreter's lock to release them. An
    interpreter that is shutting down ends such a thread in the middle of a destructor ("terminate
    called without an active exception").
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads, or closed
            stream.flush()
    os._exit(code)


def leave_process_group() -> None:
    """Ends gloo's threads while the interpreter still runs; see :func:`end_process` for why.

    They end with the last reference to their group. Detectron2 keeps two of these references,
    and models in reference cycles keep the others. No process leaves before all have arrived:
    process 0 holds the store that the others use.
    """
    if comm.get_world_size() > 1:
        comm.synchronize()
        dist.destroy_process_group()
        comm._LOCAL_PROCESS_GROUP = None  # what comm.create_local_process_group has set
        comm.create_local_process_group.cache_clear()
        comm._get_global_gloo_group.cache_clear()
        gc.collect()
