"""Processes of mutation.py: how a mutant gets into one, and how one is watched."""

import gc
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = ["patch_function", "replace_module", "run_forked"]

_MEMORY = 6 << 30  # bytes that a mutant may ask for beyond what its parent holds
_ASLEEP = 60.0  # seconds without any running thread: it waits for nothing


def patch_function(source: str, path: Path, scope: str) -> None:
    """Gives the imported functions of ``scope`` the code that they have in ``source``."""
    wanted = {code.co_qualname: code for code in _codes(compile(source, str(path), "exec"))}
    patched = 0
    for function in gc.get_objects():
        if not isinstance(function, FunctionType) or function.__code__.co_filename != str(path):
            continue
        # A nested function comes with the one around it.
        name = function.__code__.co_qualname
        if scope == name or scope.startswith(f"{name}."):
            function.__code__ = wanted[name]
            patched += 1
    if not patched:
        raise RuntimeError(f"no imported function holds {scope} of {path.name}")


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def replace_module(source: str, path: Path) -> None:
    """Lets the import of the module in ``path`` find ``source`` instead."""
    name = f"ghm_d2.losses.{path.stem}"
    if name in sys.modules:
        raise RuntimeError(f"{name} has been imported already")

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
        def find_spec(self, fullname: str, *_: Any) -> Any:
            if fullname != name:
                return None
            return importlib.util.spec_from_file_location(name, path, loader=self)

        def get_source(self, fullname: str) -> str:
            return source

        def exec_module(self, module: ModuleType) -> None:
            exec(compile(source, str(path), "exec"), module.__dict__)

    sys.meta_path.insert(0, Finder())


def run_forked(work: Callable[[], Any], cpu_seconds: float | None) -> dict[str, Any]:
    """Runs ``work`` in a forked process.

    Args:
        work: its result says which test failed, None if none did.
        cpu_seconds: its limit; None: no limit at all, and its output is shown.

    Returns:
        outcome ("survived", "killed", "timed out" or "crashed"), by (which test), seconds of CPU.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(work, cpu_seconds, writing)
    os.close(writing)
    try:
        status, usage, asleep = _wait(pid, cpu_seconds)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    if cpu_seconds is None and status:
        raise SystemExit(f"the process of the tests ended with status {status}")
    seconds = round(usage.ru_utime + usage.ru_stime, 2)
    by, outcome = None, "crashed"
    if asleep or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        outcome = "timed out"
    elif text:
        answer = json.loads(text)
        if "error" in answer:
            raise RuntimeError(f"mutation.py itself failed:\n{answer['error']}")
        by = answer["result"]
        outcome = "survived" if by is None else "killed"
    return {"outcome": outcome, "by": by, "seconds": seconds}


def _child(work: Callable[[], Any], cpu_seconds: float | None, writing: int) -> None:
    try:
        if cpu_seconds is not None:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            limit = int(cpu_seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            held = pages * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, held + _MEMORY))
        answer = {"result": work()}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    os.write(writing, json.dumps(answer, default=str).encode())
    # No clean-up of what belongs to the parent.
    os._exit(0 if "result" in answer or cpu_seconds is not None else 1)


def _wait(pid: int, cpu_seconds: float | None) -> tuple[int, resource.struct_rusage, bool]:
    """Waits; kills a process whose threads all sleep. The clock says nothing on a busy machine."""
    awake, asleep = time.monotonic(), False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG if cpu_seconds is not None else 0)
        if done:
            return status, usage, asleep
        if _is_running(pid):
            awake = time.monotonic()
        elif time.monotonic() - awake > _ASLEEP and not asleep:
            asleep = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # the thread has ended
        if state in "RD":
            return True
    return False
