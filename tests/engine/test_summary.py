"""What a training prints: a screen before it begins, and at its end what to do next."""

import json
import logging
import os
import shlex

import pytest
import torch

from ghm_d2 import cli
from ghm_d2.engine import main, summary
from ghm_d2.run_folder import RunFolder
from tests.kinds import KINDS, Kind
from tests.tiny import forget_program, write_coco


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    return Kind(request.param, tmp_path)


def do(command):
    """Runs a command that the summary has printed, as a program of its own."""
    forget_program()
    words = shlex.split(command)
    words = words[words.index("ghm_d2") + 1 if "ghm_d2" in words else 1 :]
    if words[0].endswith("train_net.py"):
        main(words[1:])
    else:
        cli.main(words)


def test_a_screen_before_and_whole_commands_after(kind, tmp_path, capsys):
    sets = [f"{name}={write_coco(tmp_path / 'a b', name)}" for name in ("first", "second")]
    out = tmp_path / "the output"
    values = {"output": f"{out}/", "max_iter": 2, "eval_period": 1, "save_best": True}
    main(kind.argv("--overwrite", "--dataset", *sets, **values))
    text = capsys.readouterr().out
    before, after = text.split("Starting training from iteration 0")
    lines = before.splitlines()
    assert len(set(lines)) == len(lines) <= 24 and "Environment info" not in before
    assert not [line for line in lines if "WARNING" in line and "Some model parameters" in line]
    log = (out / "log.txt").read_text()
    for words in ("Environment info", "Serializing", "MIN_SIZE_TEST" * (not kind.python)):
        assert words in log and (not words or words not in before)
    assert "Start inference on 6 batches" in after  # from the first step on, all of it

    lines = after.split("evaluation and pictures included.")[1].splitlines()
    commands = {a.rstrip(":"): b.strip() for a, b in zip(lines, lines[1:], strict=False)}
    predict = commands["Predict on images or videos"]
    do(predict)
    found = json.loads((out / "predicted" / "predictions.json").read_text())
    weights = RunFolder(out).weights()  # the final ones where no evaluation has found anything
    assert str(weights) in predict
    record = torch.load(weights, weights_only=True)["ghm_d2"]
    threshold = record.get("score_thresholds", {}).get("", 0.5)
    assert all(row["score"] >= threshold for row in found)
    assert f"with a score of at least {threshold:.2f}" in capsys.readouterr().out
    do(commands["All of it on one page"])
    assert (out / "report.html").stat().st_size > 0
    predictions = out / "inference" / "coco_instances_results.json"
    predictions.unlink()
    do(commands["Evaluate it again"])
    assert predictions.exists()
    do(commands["Train it further"])
    assert torch.load(out / "model_final.pth", weights_only=False)["iteration"] == 3


def test_the_summary_names_files_and_what_to_do(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text('{"iteration": 1, "total_loss": 1.0}\n')
    for name in ("model_final.pth", "config.yaml"):
        (out / name).touch()

    def draw(file):
        file.parent.mkdir()
        file.touch()

    todo = {"Evaluate it again": "python train_net.py --eval-only"}
    summary.summarize_training(RunFolder(out), draw, {}, todo, iterations=12, seconds=3723)
    text = capsys.readouterr().out
    assert "iteration 12 in 1 h 02 min" in text
    for name in (
        "model_final.pth",
        "metrics.json",
        "config.yaml",
        "pictures/predictions.png",
        "pictures/training.png",
    ):
        assert f" {out / name}\n" in text
        assert (out / name).exists()
    assert text.endswith("Evaluate it again:\n  python train_net.py --eval-only\n")


def test_summary_survives_what_it_cannot_draw(tmp_path, caplog, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)

    def draw(file):
        raise KeyError("no image")

    run = RunFolder(tmp_path)
    summary.summarize_training(run, draw, None, {}, iterations=12, seconds=61.5)
    assert "predictions could not be drawn (KeyError: no image)" in caplog.text
    assert "curves could not be drawn (UserError: " in caplog.text
    text = capsys.readouterr().out
    assert "in 1 min 01 s" in text and "give a second --dataset" in text
    assert "model_final.pth" not in text


def test_the_table_shows_all_classes_and_each():
    nan = float("nan")
    results = {
        "bbox": {"AP": 12.345, "APl": nan, "AP55": 30.0, "AP-disc": 3.0, "AP-\x1b[2J": nan},
        "best_f1": {
            "score_threshold": 0.456, "F1": 50.0, "precision": 40.0, "recall": 66.7,
            "score_threshold-disc": 0.3, "F1-disc": 44.44, "F1-\x1b[2J": nan,
        },
    }  # fmt: skip
    assert summary.ap_table(results).splitlines() == [
        "  AP 12.3",
        "  best F1 50.0, of detections with a score of at least 0.46: precision 40.0, recall 66.7",
        "  class        AP  best F1  from score",
        "  disc        3.0     44.4        0.30",
        "  \\x1b[2J       -        -           -",
    ]
    assert "nothing was detected" in summary.ap_table({"bbox": {"AP": nan}})
    both = summary.ap_table({"a_val": results, "b_val": {"bbox": {"AP": 50.0}}}).splitlines()
    assert both[0] == "  a_val" and both[-2:] == ["  b_val", "  AP 50.0"]
    many = summary.ap_table({"bbox": {f"AP-{k}": 1.0 for k in range(80)}}).splitlines()
    assert len(many) == 23 and many[-1] == "  and 60 more classes in inference/results.json"


def test_the_next_command_names_an_interpreter_that_is_not_on_the_path(monkeypatch):
    monkeypatch.setattr(summary.shutil, "which", lambda name: "/usr/bin/python")
    monkeypatch.setattr(summary.sys, "executable", os.path.abspath(".venv/bin/python"))
    assert summary._python() == ".venv/bin/python"
