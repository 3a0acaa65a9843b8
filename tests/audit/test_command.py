"""ghm-d2 audit: from files to files; cross-fitting trains the tiny detector."""

import json
import signal
import sys

import pytest
from PIL import Image

from ghm_d2 import engine
from ghm_d2.audit import detector
from ghm_d2.cli import audit
from tests.tiny import RETINANET, coco_content, forget_program, one_sentence, tiny_pairs, write_coco


def result(image, box, category, score=0.9):
    return {"image_id": image, "bbox": box, "category_id": category, "score": score}


@pytest.fixture
def data(tmp_path):
    """Six images whose annotations are believed, but for the class of the first one."""
    content = coco_content()
    found = [result(a["image_id"], a["bbox"], a["category_id"]) for a in content["annotations"]]
    found[0]["category_id"] = 2
    (tmp_path / "found.json").write_text(json.dumps(found))
    yield ["--dataset", f"my={write_coco(tmp_path)}", "--output", str(tmp_path / "out")]
    forget_program()


def fails(capsys, *words):
    return one_sentence(audit.main, words, capsys, "ghm-d2 audit")


def test_everything_is_written_and_counted(data, tmp_path, capsys):
    words = [*data, "--predictions", str(tmp_path / "found.json")]
    audit.main(words)
    text = capsys.readouterr().out
    assert "6 images with 12 objects" in text
    assert "wrong class: 1\n  missing: 0\n  moved: 0\n  spurious: 0\n" in text
    files = {p.stem: read(p) for p in (tmp_path / "out").glob("*.json")}
    (suspect,) = files["suspects"]
    assert suspect["file_name"] == "0.png" and suspect["annotation_id"] == 1
    assert suspect["score"] == 0.95 and suspect["believed_category_id"] == 2
    assert files["mended"]["annotations"][0]["category_id"] == 2
    assert files["dropped"]["annotations"] == coco_content()["annotations"][1:]
    assert "suspect" in files["marked"]["annotations"][0]
    with Image.open(tmp_path / "out" / "suspects.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert (0x56, 0xB4, 0xE9) in colours  # what is believed

    assert "suspects.json exists already" in fails(capsys, *words)
    audit.main([*words, "--overwrite", "--number", "0"])
    assert json.loads((tmp_path / "out" / "suspects.json").read_text()) == []
    assert not (tmp_path / "out" / "suspects.png").exists()  # that of the audit before


def test_ids_of_the_file_are_kept(data, tmp_path):
    content = coco_content()
    for row in content["annotations"]:
        row["id"] -= 1  # 0 is none for pycocotools
    (tmp_path / "train.json").write_text(json.dumps(content))
    audit.main([*data, "--predictions", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "out" / "suspects.json").read_text())[0]["annotation_id"] == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, "detection 0 is not an object"),
        ({"image_id": 1, "category_id": 1, "score": 1}, 'detection 0 has no "bbox"'),
        (result(1, [1, 2, 3], 1), "the bbox [1, 2, 3] instead of four finite numbers"),
        (result(1, [1, 2, 3, 4], 1, 1.5), "the score 1.5 instead of a probability in [0, 1]"),
        (result(1, [1, 2, 3, 4], 9), "the category_id 9, which is not in the data set"),
        (result(99, [1, 2, 3, 4], 1), "nothing was detected in the images of the data set"),
        (result([1], [1, 2, 3, 4], 1), "nothing was detected"),
    ],
)
def test_predictions_that_cannot_be_used(row, message, data, tmp_path, capsys):
    (tmp_path / "found.json").write_text(json.dumps([row]))
    assert message in fails(capsys, *data, "--predictions", tmp_path / "found.json")


def test_what_is_left_out_is_counted(data, tmp_path, capsys):
    found = [result(1, [8, 10, 24, 30], 1), result(99, [1, 2, 3, 4], 1), result(1, [1, 2, 0, 4], 1)]
    (tmp_path / "found.json").write_text(json.dumps(found))
    audit.main([*data, "--predictions", str(tmp_path / "found.json")])
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert "1 detections in images that are not in the data set are left out" in text
    assert "1 detections without width and height are left out" in text
    assert "5 of 6 images have no detection and are not judged" in text
    assert "1 images with 2 objects" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --config-file or --predictions"),
        (["--predictions", "a.json", "--folds", "3"], "--folds and KEY VALUE pairs need"),
        (["--predictions", "a.json", "--number", "-1"], "--number must not be negative, got -1"),
        (["--predictions", "missing.json"], "missing.json cannot be read"),
        (["--config-file", "missing.yaml"], "missing.yaml does not exist"),
        (
            ["--config-file", RETINANET, "--folds", "7"],
            "2 and the number of images, 6",
        ),
        (
            ["--config-file", RETINANET, "--folds", "1"],
            "2 and the number of images, 6",
        ),
    ],
)
def test_mistakes(words, message, data, capsys):
    assert message in fails(capsys, *data, *words)


def test_one_data_set(data, capsys):
    assert "give exactly one --dataset to judge, got 2" in fails(
        capsys, *data, *data[:2], "--predictions", "x"
    )


def test_cross_fitting_trains_on_the_others_and_goes_on(data, tmp_path, capfd, monkeypatch):
    """In this process, where it takes a second."""
    words = [*data, "--config-file", RETINANET, "--folds", "2"]
    words += tiny_pairs(MODEL__RETINANET__SCORE_THRESH_TEST=0.0, SOLVER__MAX_ITER=1)
    started = []

    def train(arguments, what):
        started.append((what, "--resume" in arguments))
        if len(started) == 1:  # after its checkpoint
            (tmp_path / "out" / "fold_1" / "last_checkpoint").write_text("model_0000000.pth")
            raise detector.UserError("stopped")
        engine.main([word for word in arguments if word != "--resume"])
        forget_program()

    monkeypatch.setattr(detector, "_train", train)
    with pytest.raises(SystemExit):
        audit.main(words)
    audit.main(words)
    first, second = "the training of fold 1", "the training of fold 2"
    assert started == [(first, False), (first, True), (second, False)]
    assert "6 images with 12 objects" in capfd.readouterr().out
    parts = []
    for fold in ("fold_1", "fold_2"):
        folder = tmp_path / "out" / fold
        parts.append({row["id"] for row in read(folder / "held_out.json")["images"]})
        rest = {row["id"] for row in read(folder / "train.json")["images"]}
        assert parts[-1] | rest == {1, 2, 3, 4, 5, 6} and not parts[-1] & rest
        found = read(folder / "inference" / "coco_instances_results.json")
        assert {row["image_id"] for row in found} == parts[-1]
        assert set(read(folder / "training.json")["datasets"]) == {"audit_train", "audit_held_out"}
    assert not parts[0] & parts[1]

    # Finished folds are taken as they are, but for other settings, of which they are none.
    audit.main([*words, "--overwrite"])
    assert len(started) == 3 and "fold 2 of 2 is done already" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        audit.main([*words, "--overwrite", "--seed", "2"])
    assert "of another data set, config or number of folds" in capfd.readouterr().err

    # A trained detector judges all images.
    pairs = tiny_pairs(MODEL__RETINANET__SCORE_THRESH_TEST=0.0)
    pairs[pairs.index("MODEL.WEIGHTS") + 1] = str(tmp_path / "out" / "fold_1" / "model_final.pth")
    audit.main([*data[:3], str(tmp_path / "two"), "--config-file", RETINANET, *pairs])
    found = read(tmp_path / "two" / "detector" / "inference" / "coco_instances_results.json")
    assert {row["image_id"] for row in found} == {1, 2, 3, 4, 5, 6}


def test_the_exit_code_of_a_training_is_that_of_the_audit(data, tmp_path, capfd, monkeypatch):
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@"\nexit 75\n')
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(SystemExit) as stop:
        audit.main([*data, "--config-file", RETINANET, "--folds", "2", *tiny_pairs()])
    captured = capfd.readouterr()
    assert stop.value.code == 75
    assert "the training of fold 1 ended with exit code 75" in captured.err
    assert f"-m ghm_d2 train --config-file {RETINANET} MODEL.WEIGHTS" in captured.out


def test_a_signal_reaches_the_training(tmp_path, monkeypatch):
    """SIGTERM to the audit; after it, its own handlers are there again."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\ntrap "exit 75" TERM\nkill -TERM $PPID\nsleep 5 & wait\nexit 1\n')
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(detector.UserError) as error:
        detector._train([], "the training")
    assert error.value.exit_code == 75
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def read(file):
    return json.loads(file.read_text())
