"""How the processes of a job end: with their exit code, and without gloo's threads."""

import atexit
import os
import sys
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm

from ghm_d2.engine.finite import NotFiniteError
from ghm_d2.engine.preemption import PREEMPTED, Preempted
from ghm_d2.engine.process_end import exit_code_of, leave_process_group
from ghm_d2.engine.processes import Processes, launch_processes
from ghm_d2.errors import UserError, exits_with_one_sentence

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Detectron2 launches NCCL where GPUs are"
)

ENDS = {
    "done": (0, None),
    "mistake": (2, UserError("a mistake.")),
    "not finite": (3, NotFiniteError("not finite.")),
    "preempted": (PREEMPTED, Preempted(PREEMPTED)),
    "no code": (0, SystemExit()),
    "text": (1, SystemExit("a text")),
    "interrupt": (1, KeyboardInterrupt()),
    "error": (1, RuntimeError("broken")),
}


def leave_by(end):
    with exits_with_one_sentence("job"):
        if end is not None:
            raise end


@pytest.mark.parametrize("name", ENDS)
def test_exit_codes(name, capsys):
    code, end = ENDS[name]
    assert exit_code_of(lambda: leave_by(end)) == code
    assert ("Traceback" in capsys.readouterr().err) == (name == "error")


class Survivor:
    """An object that the interpreter destroys last tells that it came to its own end."""

    def __del__(self):
        os.write(1, b"finalized\n")


def work(name):
    torch.set_num_threads(1)
    sys.survivor = Survivor()
    atexit.register(print, "registered")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    comm.all_gather("met")
    leave_by(ENDS[name][1])


@pytest.mark.parametrize("name", ["done", "not finite", "error"])
def test_no_process_of_a_job_goes_through_the_end_of_the_interpreter(name, capfd):
    code = exit_code_of(lambda: launch_processes(work, Processes(2), name))
    out, err = capfd.readouterr()
    assert code == ENDS[name][0], err
    assert "registered" in out and "finalized" not in out
    assert "terminate called" not in err and ("Traceback" in err) == (name == "error")


def leaver(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)

    def train():
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model(torch.ones(1, 2)).sum().backward()
        comm.all_gather("met")
        model.itself = model  # as trainers and hooks refer to each other

    train()
    assert threads_of_gloo()
    leave_process_group()
    assert not threads_of_gloo()
    assert comm.get_world_size() == 1 and comm.get_local_rank() == 0


def threads_of_gloo():
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_thread_of_gloo_survives_the_group(tmp_path):
    torch.multiprocessing.spawn(leaver, (tmp_path,), nprocs=2)
