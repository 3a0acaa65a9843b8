"""Real jobs of two processes on the CPU: torchrun, Detectron2's launcher, kills and SIGTERM."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.engine.test_resume import final, same, stop_at
from tests.kinds import KINDS, Kind
from tests.tiny import ROOT, write_coco

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
SCRIPT = str(ROOT / "train_net.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
LAUNCHER = [sys.executable, SCRIPT, "--num-gpus", "2"]


@pytest.fixture
def start(tmp_path):
    """Start a job that trains into tmp_path/NAME; it is ended with the test."""
    jobs, data = [], f"data={write_coco(tmp_path)}"

    def run(command, name, *words, iterations=6, kind="yaml", **values):
        values = {"output": tmp_path / name, "max_iter": iterations, "period": 3} | values
        argv = Kind(kind, tmp_path).argv(*words, "--dataset", data, **values)
        words = [*command, *argv]
        job = subprocess.Popen(
            [str(word) for word in words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENVIRONMENT,
            cwd=tmp_path,
            start_new_session=True,
        )
        jobs.append(job)
        return job

    yield run
    for job in jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def wait_for(file, job):
    while not file.exists():
        assert job.poll() is None, job.communicate()[0][-3000:]
        time.sleep(0.05)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as stream:
        return [int(word) for word in stream.read().split()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_torchrun_goes_on_after_a_kill(start, tmp_path, kind):
    """Also in a folder with the checkpoint of an earlier training, which must not be resumed."""
    whole = start([*TORCHRUN, SCRIPT], "whole", iterations=60, kind=kind)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "last_checkpoint").write_text("model_final.pth")
    restarting = [*TORCHRUN, "--max-restarts", "1", SCRIPT]
    killed = start(restarting, "killed", iterations=60, kind=kind)
    wait_for(tmp_path / "killed" / "model_0000008.pth", killed)
    os.kill(children(killed.pid)[-1], signal.SIGKILL)
    texts = [job.communicate()[0] for job in (whole, killed)]
    assert [whole.returncode, killed.returncode] == [0, 0], texts[1][-3000:]
    assert "Starting training from iteration 0" in texts[1]
    assert texts[1].count("Starting training from iteration") == 2
    assert "last_checkpoint is now last_checkpoint.earlier" in texts[1]
    assert texts[1].count("Trained to iteration 60") == 1
    same(final(tmp_path / "whole"), final(tmp_path / "killed"))
    # Without SYNC each process has counts of its own, and a checkpoint holds both.
    buffers = final(tmp_path / "whole")["trainer"]["hooks"]["ProcessStates"]["processes"]
    assert [any("acc_sum" in name for name in x["buffers"]) for x in buffers] == [False, True]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Detectron2 launches NCCL where GPUs are")
@pytest.mark.parametrize(("kind", "workers"), [("yaml", 0), ("python", 1)])
def test_detectron2_s_launcher_resumes_exactly(start, tmp_path, kind, workers):
    values = {"kind": kind, "workers": workers}
    whole = start(LAUNCHER, "whole", **values)
    text = whole.communicate()[0]
    assert whole.returncode == 0, text[-3000:]
    stop_at(tmp_path / "whole", tmp_path / "parts")
    parts = start(LAUNCHER, "parts", "--resume", **values)
    text = parts.communicate()[0]
    assert parts.returncode == 0 and "Starting training from iteration 3" in text, text[-3000:]
    same(final(tmp_path / "whole"), final(tmp_path / "parts"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Detectron2 launches NCCL where GPUs are")
@pytest.mark.parametrize(
    ("kind", "number"),
    [("yaml", signal.SIGTERM), ("python", signal.SIGHUP), ("yaml", signal.SIGINT)],
)
def test_a_signal_stops_both_processes(start, tmp_path, kind, number):
    """To every process of the job, those that load images too, as clusters and terminals do."""
    job = start(LAUNCHER, "out", iterations=5000, kind=kind, workers=1)
    wait_for(tmp_path / "out" / "model_0000002.pth", job)
    os.killpg(job.pid, number)
    text = job.communicate(timeout=600)[0]
    assert job.returncode == 75, text[-3000:]
    assert text.count("Stopped by SIG") == 1 and "Traceback" not in text
    name = (tmp_path / "out" / "last_checkpoint").read_text()
    states = torch.load(tmp_path / "out" / name, weights_only=True)["trainer"]["hooks"]
    assert len(states["ProcessStates"]["processes"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_torchrun_reports_a_mistake_once(start, tmp_path, kind):
    named = Kind(kind, tmp_path)
    weights = " ".join(named.words(weights="gone.pth")).replace("=", " ")
    for words, values, sentence in (
        (["--num-gpus", "3"], {}, "torchrun chooses the processes"),
        ([], {"weights": "gone.pth"}, f"{weights} does not exist"),
        ([], {"images": 3}, f"{named.key('images')} 3 cannot be divided among 2 processes"),
        (named.words(max_iter="many"), {}, f"{named.key('max_iter')} is of type int"),
    ):
        job = start([*TORCHRUN, SCRIPT], "out", *words, kind=kind, **values)
        text = job.communicate()[0]
        assert job.returncode and text.count(f"train_net.py: error: {sentence}") == 1, text[-3000:]
