"""The guards around a training, once through a YAML and once through a Python config."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from ghm_d2.engine import GHMTrainer, main
from ghm_d2.engine.preemption import PREEMPTED
from tests.engine.test_resume import final, same
from tests.kinds import KINDS, Kind, metrics
from tests.tiny import ROOT, coco_content, forget_program, write_coco


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    return Kind(request.param, tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {name: f"{name}={write_coco(folder, name)}" for name in ("first", "second")}


@pytest.fixture
def run(kind, data, tmp_path):
    """Trains into tmp_path/NAME as a program of its own."""

    def train(name, *words, test=False, **values):
        forget_program()
        sets = ["--dataset", data["first"]]
        sets += ["--dataset", data["second"]] * test
        values = {"output": tmp_path / name, "max_iter": 4, "period": 2} | values
        main(kind.argv(*words, *sets, **values))

    return train


@pytest.fixture
def fails(run, capsys):
    """As run; the sentence with which it ends, and its exit code."""

    def train(*words, code=2, **values):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*words, **values)
        captured = capsys.readouterr()
        assert stop.value.code == code, captured.err
        assert "Traceback" not in captured.err + captured.out
        return captured.err

    return train


def script(words, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *words]
    return subprocess.run(words, capture_output=True, text=True, env=environment, **options)


def at_iteration(monkeypatch, number, act):
    """Calls ``act(trainer)`` before the step of one iteration."""
    run_step = GHMTrainer.run_step

    def acting(trainer):
        if trainer.iter == number:
            act(trainer)
        run_step(trainer)

    monkeypatch.setattr(GHMTrainer, "run_step", acting)


def test_a_resumed_training_is_the_undisturbed_one(run, tmp_path, monkeypatch):
    run("whole")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        at_iteration(patch, 3, lambda trainer: (_ for _ in ()).throw(RuntimeError("killed")))
        run("parts")
    run("parts", "--resume")
    same(final(tmp_path / "whole"), final(tmp_path / "parts"))
    assert final(tmp_path / "parts")["trainer"]["hooks"]["ProcessStates"]["processes"]
    assert json.loads((tmp_path / "parts" / "training.json").read_text())["classes"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_and_stops(run, fails, tmp_path, monkeypatch, number):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        at_iteration(patch, 1, lambda trainer: os.kill(os.getpid(), number))
        error = fails("parts", code=PREEMPTED, period=100)
    signal.signal(signal.SIGINT, before)
    assert f"Stopped by {number.name} after 2 of 4 iterations" in error
    run("parts", "--resume", period=100)
    assert final(tmp_path / "parts")["iteration"] == 3


def test_a_loss_that_is_not_finite_stops(fails, kind, tmp_path, monkeypatch, capsys):
    def spoil(trainer):
        trainer.model.backbone.fpn_output5.weight.data.fill_(torch.nan)

    at_iteration(monkeypatch, 2, spoil)
    error = fails("out", code=3)
    assert "iteration 2" in error and "model_0000001.pth, is intact" in error
    file = next((tmp_path / "out" / "not_finite").iterdir())
    replay = ["-m", "ghm_d2", "replay", str(file)]
    done = script(replay)
    if kind.python:
        assert done.returncode == 2 and "give --trust-checkpoint" in done.stderr
        done = script([*replay, "--trust-checkpoint"])
    assert done.returncode == 1 and "NOT FINITE" in done.stdout, done.stderr


def test_a_finished_training_is_not_replaced_unasked(run, fails, kind, tmp_path):
    run("out")
    weights = (tmp_path / "out" / "model_final.pth").read_bytes()
    error = fails("out", seed=2)
    assert "holds a finished training (model_final.pth)" in error and "--overwrite" in error
    assert kind.words(max_iter="N")[-1] in error
    assert (tmp_path / "out" / "model_final.pth").read_bytes() == weights
    run("out", "--overwrite", seed=2)
    assert (tmp_path / "out" / "model_final.pth").read_bytes() != weights
    assert [row["iteration"] for row in metrics(tmp_path / "out")] == [3]


HOLDER = """
import sys
from ghm_d2.engine.output_folder import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_one_folder_takes_one_training(run, fails, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        error = fails("out")
        assert f"another training writes into {tmp_path}/out (process {holder.pid} on " in error
        assert not (tmp_path / "out" / "config.yaml").exists()
    finally:
        holder.kill()
        holder.wait()
    run("out", max_iter=1)  # the lock has ended with its process
    assert final(tmp_path / "out")["iteration"] == 0


def test_a_folder_that_is_gone_is_noticed(fails, kind, tmp_path, monkeypatch):
    def move(trainer):
        os.rename(tmp_path / "out", tmp_path / "away")

    at_iteration(monkeypatch, 2, move)
    error = fails("out", period=100)
    assert "was deleted or moved away" in error
    assert not list((tmp_path / "out").glob("*.pth"))


def test_a_training_killed_in_its_last_evaluation_evaluates(run, fails, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(
            "ghm_d2.engine.trainer.inference_on_dataset",
            lambda *args: (_ for _ in ()).throw(RuntimeError("killed")),
        )
        run("out", test=True)
    assert (tmp_path / "out" / "model_final.pth").exists()
    run("out", "--resume", test=True)
    rows = [row for row in metrics(tmp_path / "out") if "bbox/AP" in row]
    assert [row["iteration"] for row in rows] == [4]
    assert (tmp_path / "out" / "pictures" / "predictions.png").exists()
    assert "4 iterations are done already" in fails("out", "--resume", test=True)


def test_expected_results_are_compared(run, fails, monkeypatch):
    monkeypatch.setattr(
        "ghm_d2.engine.trainer.inference_on_dataset", lambda *args: {"bbox": {"AP": 50.0}}
    )
    run("out", test=True, expected="[['bbox','AP',49.0,2.0]]")
    fails("other", code=1, test=True, expected="[['bbox','AP',47.0,2.0]]")


@pytest.mark.parametrize(
    ("name", "value"),
    [("period", 0), ("max_iter", 0), ("max_iter", -3), ("workers", -1), ("eval_period", -1)],
)
def test_values_that_make_no_training(fails, kind, name, value):
    least = 0 if name in ("workers", "eval_period") else 1
    assert f"{kind.key(name)} must be at least {least}, got {value}" in fails(
        "out", **{name: value}
    )


def test_a_warm_up_longer_than_the_training(run, fails, kind, capsys):
    if kind.python:  # there the warm-up is a share of the training
        assert "must be in 0 .. 1, a share of the training, got 3" in fails("out", warmup=3)
    else:
        run("out", max_iter=1, warmup=3)
        assert "the warm-up is longer than the training" in capsys.readouterr().out
    assert f"{kind.key('warmup')} must be" in fails("out", warmup=-1)


def changed_data(folder, change):
    content = coco_content()
    change(content)
    return f"first={write_coco(folder, 'changed', content)}"


def test_resume_notices_other_data(run, fails, data, tmp_path, monkeypatch):
    run("out")

    def other_classes(content):
        names = [x["name"] for x in content["categories"]]
        for category, name in zip(content["categories"], names[::-1], strict=True):
            category["name"] = name

    def other_boxes(content):
        content["annotations"][0]["bbox"][0] += 1.0

    for change, words in ((other_classes, "in another order"), (other_boxes, "is not that of")):
        monkeypatch.setitem(data, "first", changed_data(tmp_path / "data", change))
        assert words in fails("out", "--resume", max_iter=6)


def test_resume_notices_a_checkpoint_without_a_training(run, fails, tmp_path):
    run("out")
    file = tmp_path / "out" / "model_final.pth"
    whole = torch.load(file, weights_only=False)
    torch.save({"model": whole["model"], "iteration": 3}, file)
    assert "holds no state of a training" in fails("out", "--resume", max_iter=6)
    whole["trainer"]["_trainer"]["optimizer"] = {"state": 3}
    torch.save(whole, file)
    assert "cannot be resumed" in fails("out", "--resume", max_iter=6)


def test_evaluation_refuses_other_classes(run, fails, data, tmp_path, monkeypatch):
    run("out")

    def reverse(content):
        names = [x["name"] for x in content["categories"]]
        for category, name in zip(content["categories"], names[::-1], strict=True):
            category["name"] = name

    monkeypatch.setitem(data, "first", changed_data(tmp_path / "data", reverse))
    weights = tmp_path / "out" / "model_final.pth"
    assert "in another order" in fails("out", "--eval-only", weights=weights)


def test_a_worker_that_hangs_is_named(fails, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("ghm_d2.data.workers.TIMEOUT", 2)
    monkeypatch.setattr("ghm_d2.data.readable.ReadableMapper.__call__", hang)
    assert "no image came from the processes" in fails("out", workers=1)


def hang(self, record):
    signal.pause()


@pytest.mark.parametrize("size", [2_000, 100_000], ids=["at the start", "at a checkpoint"])
def test_a_full_disk_is_one_sentence(kind, data, tmp_path, size):
    """Files that cannot grow stand for the disk, wherever the training writes."""
    argv = kind.argv("--dataset", data["first"], output=tmp_path / "out", max_iter=2)
    limit = (size, size)
    done = script(
        [str(ROOT / "train_net.py"), *argv],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "cannot be written (File too large)" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.part"))


def test_interrupted_before_the_first_step(run, fails, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(
        GHMTrainer, "build_model", lambda *args: os.kill(os.getpid(), signal.SIGINT)
    )
    assert "interrupted" in fails("out", code=1)
    signal.signal(signal.SIGINT, before)


def test_a_config_that_is_its_own_base(tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text(f"_BASE_: {file}")
    with pytest.raises(SystemExit) as stop:
        main(["--config-file", str(file)])
    assert stop.value.code == 2
    assert f"{file}: its _BASE_ leads back to itself" in capsys.readouterr().err


def test_a_comma_in_the_image_folder(fails, data, tmp_path, monkeypatch):
    text = write_coco(tmp_path / "a,b")
    monkeypatch.setitem(data, "first", f"first={text}")
    assert "b/images does not exist (what follows the last comma)." in fails("out")
