"""A resumed training is the training that was stopped, bit for bit; whatever it was stopped by."""

import os
import shutil
import signal

import pytest
import torch

from ghm_d2.engine import GHMTrainer, main
from ghm_d2.engine.preemption import PREEMPTED
from tests.kinds import KINDS, Kind
from tests.tiny import forget_program, write_shapes

# A stock RetinaNet divides by a running number of positives.
STOCK = ["MODEL.META_ARCHITECTURE", "RetinaNet", "DATALOADER.ASPECT_RATIO_GROUPING", "False"]
STOCK += ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]


@pytest.fixture(autouse=True)
def clean_up(monkeypatch):
    torch.set_num_threads(1)
    # Neither matters here, and they take as long as the training.
    monkeypatch.setattr("ghm_d2.engine.run.summarize_training", lambda *args, **kwargs: None)
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", lambda: "")
    yield
    forget_program()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """NAME=annotations,folder of images that are wide, high and square."""
    return f"resumed={write_shapes(tmp_path_factory.mktemp('data'))}"


@pytest.fixture
def train(data, tmp_path):
    """Run main on `data` into a folder; no seed is given."""

    def run(output, *words, kind="yaml", heads="", **values):
        config = Kind(kind, tmp_path, heads)
        values = {"output": output, "seed": -1, "max_iter": 6, "period": 3} | values
        sizes = "[48,64]" if config.python else "(48,64)"
        fixed = {"train_size": sizes, "eval_period": 3}
        main(config.argv("--dataset", data, **fixed, **values) + list(map(str, words)))

    return run


def stop_at(source, target, name="model_0000002.pth"):
    """A folder as a kill after that checkpoint leaves it."""
    target.mkdir()
    shutil.copy(source / name, target / name)
    (target / "last_checkpoint").write_text(name)
    return target


def same(a, b, path=""):
    """Checks that two checkpoints are equal in every number."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{path}/{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def final(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", ["", "boxes"], ids=["worker", "rcnn"])
def test_resumed_is_undisturbed(train, tmp_path, kind, heads):
    """With a worker before the kill and none after it; an R-CNN samples anchors at random."""
    both = {name: Kind(kind, tmp_path).names("resumed") for name in ("train_names", "test_names")}
    train(tmp_path / "whole", kind=kind, heads=heads, workers=0 if heads else 1, **both)
    parts = stop_at(tmp_path / "whole", tmp_path / "parts")
    train(parts, "--resume", kind=kind, heads=heads, workers=0, **both)
    same(final(tmp_path / "whole"), final(parts))


def test_a_stock_detector_resumes_undisturbed(train, tmp_path):
    both = {name: "('resumed',)" for name in ("train_names", "test_names")}
    train(tmp_path / "whole", *STOCK, **both)
    parts = stop_at(tmp_path / "whole", tmp_path / "parts")
    train(parts, "--resume", *STOCK, **both)
    same(final(tmp_path / "whole"), final(parts))


def test_sigterm_saves_and_stops(train, tmp_path, monkeypatch, capfd):
    """The step is finished, and the resumed run is the undisturbed one."""
    train(tmp_path / "whole", "SEED", 3)
    run_step = GHMTrainer.run_step

    def signalled(trainer):
        if trainer.iter == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # by the cluster and by a launcher
        run_step(trainer)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(GHMTrainer, "run_step", signalled)
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "parts", "SEED", 3, "DATALOADER.NUM_WORKERS", 1)
    assert stop.value.code == PREEMPTED == 75
    assert signal.getsignal(signal.SIGTERM) == before
    error = capfd.readouterr().err
    assert error.count("SIGTERM: a checkpoint will be written after this step\n") == 1
    assert "Stopped by SIGTERM after 4 of 6 iterations" in error
    assert "model_0000003.pth is written: go on with --resume." in error
    (tmp_path / "parts" / "model_0000005.pth.part").write_text("of a process that was killed")
    train(tmp_path / "parts", "SEED", 3, "--resume")
    same(final(tmp_path / "whole"), final(tmp_path / "parts"))
    assert not list((tmp_path / "parts").glob("*.part"))


def test_sigterm_during_the_last_step_changes_nothing(train, tmp_path, monkeypatch):
    run_step = GHMTrainer.run_step

    def signalled(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        run_step(trainer)

    monkeypatch.setattr(GHMTrainer, "run_step", signalled)
    train(tmp_path / "out", "SOLVER.MAX_ITER", 1)
    assert final(tmp_path / "out")["iteration"] == 0


def test_checkpoints_of_detectron2_and_of_other_runs(train, tmp_path, capsys):
    """What is missing or does not fit is a warning, and the training goes on."""
    train(tmp_path / "out", "SOLVER.MAX_ITER", 1)
    checkpoint = final(tmp_path / "out")
    states = checkpoint["trainer"]["hooks"]["ProcessStates"]
    states["processes"] *= 2
    states["data"].update(processes=2, batch_size=1)
    torch.save(checkpoint, tmp_path / "out" / "model_final.pth")
    train(tmp_path / "out", "--resume", "SOLVER.MAX_ITER", 2)
    text = capsys.readouterr().out
    assert "the checkpoint was written by 2 processes, and this run has 1" in text
    assert "2 processes with 1 image each, this run has 1 process with 2 images each" in text
    checkpoint = final(tmp_path / "out")
    del checkpoint["trainer"]["hooks"]["ProcessStates"]
    torch.save(checkpoint, tmp_path / "out" / "model_final.pth")
    train(tmp_path / "out", "--resume", "SOLVER.MAX_ITER", 3)
    text = capsys.readouterr().out
    assert "holds no state of the processes" in text and final(tmp_path / "out")["iteration"] == 2
