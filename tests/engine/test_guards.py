"""The guards around a training, once through a YAML and once through a Python config."""

import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys

import pytest
import torch

from ghm_d2.cli import replay
from ghm_d2.engine import GHMTrainer, main
from ghm_d2.engine.output_folder import locked
from ghm_d2.engine.preemption import PREEMPTED
from tests.engine.test_resume import final, same
from tests.foreign import Call
from tests.kinds import KINDS, Kind, metrics
from tests.tiny import ROOT, coco_content, forget_program, one_sentence, write_coco


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
    (tmp_path / "parts" / "model_0000003.pth.part").touch()
    with open(tmp_path / "parts" / "metrics.json", "a") as stream:
        stream.write('{"iteration": 2, "total_loss": 1.0}\n{"iter')
    run("parts", "--resume")
    same(final(tmp_path / "whole"), final(tmp_path / "parts"))
    assert not list((tmp_path / "parts").glob("*.part"))
    assert [row["iteration"] for row in metrics(tmp_path / "parts")] == [3]
    assert final(tmp_path / "parts")["trainer"]["hooks"]["ProcessStates"]["processes"]
    assert json.loads((tmp_path / "parts" / "training.json").read_text())["classes"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_and_stops(run, fails, tmp_path, monkeypatch, number):
    # Under nohup, SIGHUP is ignored; a shell's background jobs ignore SIGINT.
    ends = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, ends)
    with monkeypatch.context() as patch:
        at_iteration(patch, 1, lambda trainer: os.kill(os.getpid(), number))
        error = fails("parts", code=PREEMPTED, period=100)
    signal.signal(number, before)
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
    words = [str(file)]
    if kind.python:
        with pytest.raises(SystemExit) as stop:
            replay.main(words)
        assert stop.value.code == 2 and "give --trust-checkpoint" in capsys.readouterr().err
        words.append("--trust-checkpoint")
    with pytest.raises(SystemExit) as stop:
        replay.main(words)
    assert stop.value.code == 1 and "NOT FINITE" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_never_written(fails, tmp_path, monkeypatch):
    def spoil(trainer):
        weight = trainer.model.head.cls_score.weight.data
        trainer.optimizer.register_step_post_hook(lambda *_: weight.fill_(torch.inf))

    at_iteration(monkeypatch, 3, spoil)
    assert "not finite, the first head.cls_score.weight" in fails("out", code=3)
    assert [file.name for file in (tmp_path / "out").glob("*.pth")] == ["model_0000001.pth"]


def test_images_that_cannot_be_read_are_counted(run, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(data, "first", f"first={write_coco(tmp_path / 'data')}")
    image = tmp_path / "data" / "images" / "2.png"
    image.write_bytes(image.read_bytes()[:80])  # the header alone, which is what is checked
    run("out")
    text = capsys.readouterr().out
    assert re.search(r"/2\.png cannot be used .*\(1 of \d images so far", text)


def test_weights_run_no_code_unless_trusted(fails, tmp_path):
    file, made = tmp_path / "evil.pkl", tmp_path / "made"
    file.write_bytes(pickle.dumps(Call(os.mkdir, str(made))))
    assert f"evil.pkl holds {os.name}.mkdir" in fails("out", weights=file)
    assert not made.exists()
    fails("out", "--trust-checkpoint", weights=file)  # it holds no weights, but it was opened
    assert made.exists()


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


def hold(folder, end):
    with locked(folder):
        end.send("locked")
        end.recv()


def test_one_folder_takes_one_training(run, fails, tmp_path):
    context = multiprocessing.get_context("fork")  # a spawned process would import torch first
    end, other_end = context.Pipe()
    holder = context.Process(target=hold, args=(str(tmp_path / "out"), other_end), daemon=True)
    holder.start()
    try:
        assert end.recv() == "locked"
        error = fails("out")
        assert f"another training writes into {tmp_path}/out (process {holder.pid} on " in error
        assert not (tmp_path / "out" / "config.yaml").exists()
    finally:
        holder.kill()
        holder.join()
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
    assert "bbox/AP" in json.loads((tmp_path / "out" / "inference" / "results.json").read_text())
    assert "4 iterations are done already" in fails("out", "--resume", test=True)


def test_expected_results_of_a_task_that_has_none(fails):
    fails("out", code=1, test=True, max_iter=1, expected="[['segm','AP',1.0,2.0]]")


def test_expected_results_are_compared(run, fails, monkeypatch):
    monkeypatch.setattr(
        "ghm_d2.engine.trainer.inference_on_dataset", lambda *args: {"bbox": {"AP": 50.0}}
    )
    run("out", test=True, expected="[['bbox','AP',49.0,2.0]]")
    fails("other", code=1, test=True, expected="[['bbox','AP',47.0,2.0]]")


BAD_VALUES = [
    ("period", 0, "at least 1"),
    ("period", -1, "at least 1"),
    ("max_iter", 0, "at least 1"),
    ("max_iter", -3, "at least 1"),
    ("images", 0, "at least 1"),
    ("images", -2, "at least 1"),
    ("eval_period", -5, "at least 0"),
    ("workers", -1, "at least 0"),
    ("seed", 2**32, "at most 4294967295"),
    ("lr", -0.01, "finite and at least 0"),
    ("lr", "1e999", "finite and at least 0"),
    ("warmup_factor", -1.0, "finite and at least 0"),
    ("steps", "[-1,2,3]", "finite and at least 0"),
    ("steps", "[2,1,3]", "each larger than the one before"),
    ("steps", "['a']", "each larger than the one before"),
    ("clip", 0.0, "above 0"),
    ("clip", -1.0, "above 0"),
    ("clip_norm", 0.0, "above 0"),
    ("train_size", "[]", "in pixels"),
    ("train_size", "[-5]", "in pixels"),
    ("train_size", "['a']", "in pixels"),
    ("largest_size", 0, "at least 1"),
    ("format", "XYZ", "BGR"),
    ("detections", 0, "at least 1"),
    ("detections", -2, "at least 1"),
    ("topk", -1, "at least 1"),
    ("device", "nonsense", "cuda or cpu"),
    ("device", "", "cuda or cpu"),
    ("device", "meta", "cuda or cpu"),
    ("expected", "[['bbox']]", "a list of [task, metric, value, tolerance]"),
    ("expected", "[5]", "a list of [task, metric, value, tolerance]"),
    ("expected", "[['bbox','AP','x',1.0]]", "a list of [task, metric, value, tolerance]"),
    ("train_names", "[5]", "a list of names"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD_VALUES, ids=str)
def test_values_that_make_no_training(fails, kind, name, value, words):
    if not kind.python and str(value).startswith("["):
        value = str(value).replace("[]", "()")
        if name in ("steps", "train_size", "train_names"):
            value = f"({value[1:-1]},)" if value != "()" else value
    error = fails("out", **{name: value})
    assert f"{kind.key(name)} " in error and words in error


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("warmup_method", "nonsense", "Unknown warmup method: nonsense"),
        ("style", "nonsense", "nonsense"),
        ("norm", "XX", "KeyError: XX"),
        ("offset", 3.0, "3.0 (detectron2/modeling/anchor_generator.py, line "),
        ("prior", 0.0, "ZeroDivisionError"),
        ("channels", -3, "negative dimension -3"),
    ],
)
def test_parts_that_cannot_be_built(fails, name, value, words):
    error = fails("out", **{name: value})
    assert "cannot be built: " in error and words in error


def test_one_test_set_named_twice(fails, kind):
    twice = kind.names("second", "second")
    error = fails("out", test=True, train_names=kind.names("first"), test_names=twice)
    assert f"{kind.key('test_names')} names a data set twice" in error


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

    for change, words in (
        (other_classes, "in another order"),
        (other_boxes, "is not what the checkpoint was trained on"),
    ):
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
    file.write_bytes(file.read_bytes()[:-100])
    run("out", "--resume", max_iter=5)
    assert "going back to model_0000003.pth" in (tmp_path / "out" / "log.txt").read_text()
    assert final(tmp_path / "out")["iteration"] == 4


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
    assert "the processes that load images delivered none" in fails("out", workers=1)


def hang(self, record):
    signal.pause()


# One process imports torch for all: each training is a fork of it, whose files cannot grow.
FULL_DISK = """
import json, os, resource, sys
from ghm_d2.engine import main
for size, argv in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        main(argv)
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for stream in (sys.stdout, sys.stderr):
        print("ended with", code, file=stream, flush=True)
"""
SIZES = {"at the start": 2_000, "at a checkpoint": 100_000}  # bytes


@pytest.fixture(scope="module")
def full_disk(data, tmp_path_factory):
    """(kind, size) to output folder, what was printed, and the exit code."""
    folder = tmp_path_factory.mktemp("full")
    cases = {(name, size): folder / f"{name}_{size}" for name in KINDS for size in SIZES.values()}
    jobs = []
    for (name, size), output in cases.items():
        argv = Kind(name, folder).argv("--dataset", data["first"], output=output, max_iter=2)
        jobs.append((size, argv))
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, json.dumps(jobs)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    parts = [re.split(r"ended with (\d+)\n", text) for text in (done.stdout, done.stderr)]
    told = zip(parts[0][::2], parts[1][::2], parts[1][1::2], strict=False)
    return {case: (cases[case], *one) for case, one in zip(cases, told, strict=True)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", KINDS)
def test_a_full_disk_is_one_sentence(full_disk, name, size):
    """Files that cannot grow stand for the disk, wherever the training writes."""
    output, out, err, code = full_disk[name, size]
    assert code == "2", err
    assert "Traceback" not in out + err
    assert "cannot be written (File too large)" in err.splitlines()[-1]
    assert not list(output.glob("*.part"))


def test_interrupted_before_the_first_step(run, fails, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(
        GHMTrainer, "build_model", lambda *args: os.kill(os.getpid(), signal.SIGINT)
    )
    assert "interrupted" in fails("out", code=1)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("files", [["a"], ["a", "b"]], ids=["itself", "each other"])
def test_configs_that_lead_back_to_themselves(kind, tmp_path, capsys, files):
    base, suffix = ("from .{} import model", ".py") if kind.python else ("_BASE_: {}.yaml", ".yaml")
    for name, other in zip(files, [*files[1:], files[0]], strict=True):
        (tmp_path / f"{name}{suffix}").write_text(base.format(other))
    first = tmp_path / f"a{suffix}"
    error = one_sentence(main, ["--config-file", first], capsys, "train_net.py")
    assert f"{first}: its _BASE_ leads back to itself" in error or "RecursionError" in error


@pytest.mark.parametrize(
    "name", ["../out", "a\\b", "a\x1b[31m", "${x}", "x" * 101, "results.json", ".."]
)
def test_names_of_data_sets_that_are_no_folder(fails, data, tmp_path, monkeypatch, name):
    monkeypatch.setitem(data, "first", f"{name}={write_coco(tmp_path / 'data')}")
    error = fails("out")
    assert "choose another one" in error and error.strip().isprintable()


def test_names_of_classes_that_no_terminal_should_see(run, data, tmp_path, monkeypatch, capfd):
    names = ("di\x1b[31msc", "b\ud800r", "c\nup")
    for split in ("first", "second"):
        text = write_coco(tmp_path / "data", split, coco_content(classes=names))
        monkeypatch.setitem(data, split, f"{split}={text}")
    run("out", test=True, max_iter=1)
    out, err = capfd.readouterr()
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Logging error" not in err and "\x1b[31m" not in out + err + log
    escaped = ["di\\x1b[31msc", "b\\ud800r", "c\\nup"]
    assert ", ".join(escaped) in log
    assert json.loads((tmp_path / "out" / "training.json").read_text())["classes"] == escaped


def test_words_that_are_no_text(fails, tmp_path):
    error = fails("out", output=f"{tmp_path}/\udc80")
    assert "\\udc80 is not text in UTF-8" in error


def test_a_comma_in_the_image_folder(fails, data, tmp_path, monkeypatch):
    text = write_coco(tmp_path / "a,b")
    monkeypatch.setitem(data, "first", f"first={text}")
    assert "b/images does not exist (what follows the last comma)." in fails("out")


def test_more_processes_than_gpus(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "--num-gpus 2 is more than the 1 GPU" in fails("out", "--num-gpus", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "CUDA_VISIBLE_DEVICES" in fails("out", "--num-gpus", "2")
    error = fails("out", device="cuda:2")
    assert "'cuda:2' cannot be used (there are 2 GPUs, counted from 0)" in error


def annotated(heads):
    """Annotations with a mask and three keypoints for each box."""
    content = coco_content()
    for category in content["categories"]:
        category["keypoints"] = ["nose", "left_eye", "right_eye"]
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        if heads == "masks":
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if heads == "keypoints":
            annotation["keypoints"] = [v for k in range(3) for v in (x + k, y + 2 * k, 2)]
    return content


@pytest.mark.parametrize("heads", ["masks", "keypoints"])
def test_the_validation_loss_of_every_head(kind, tmp_path, heads):
    """And what a head is trained on must be there, and be read."""
    named = Kind(kind.name, tmp_path, heads)
    data = [f"{name}={write_coco(tmp_path, name, annotated(heads))}" for name in ("a", "b")]
    values = {"output": tmp_path / "out", "max_iter": 1, "validation_loss": True}
    main(named.argv("--dataset", *data, **values))
    results = json.loads((tmp_path / "out" / "inference" / "results.json").read_text())
    loss = f"validation/loss_{heads[:-1]}"
    assert results[loss] > 0 and results["validation/loss_box_reg"] > 0
    assert results["validation/total_loss"] > results[loss]


@pytest.mark.parametrize("heads", ["masks", "keypoints"])
def test_a_head_without_its_annotations(kind, tmp_path, capsys, heads):
    named, data = Kind(kind.name, tmp_path, heads), f"a={write_coco(tmp_path, 'a')}"
    base = named.argv("--dataset", data, output=tmp_path / "out")
    error = one_sentence(main, base, capsys, "train_net.py")
    missing = "no segmentation" if heads == "masks" else "no keypoints"
    assert "is True, but" in error and missing in error
    if kind.python:
        option = "use_instance_mask" if heads == "masks" else "use_keypoint"
        unread = f"dataloader.train.mapper.{option}=False"
        error = one_sentence(main, [*base, unread], capsys, "train_net.py")
        assert "annotations that the mapper leaves out" in error
        off = f"model.roi_heads.{heads[:-1]}_in_features=null"
        assert off in error
        main([*base, unread, off, *named.words(max_iter=1)])
    else:
        off = f"MODEL.{heads[:-1].upper()}_ON"
        main([*base, off, "False", *named.words(max_iter=1)])
    assert (tmp_path / "out" / "model_final.pth").exists()
