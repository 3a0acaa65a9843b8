"""ghm-d2 export as users run it, and every mistake."""

import json
import re
import sys

import pytest
import torch

from ghm_d2.cli import export as export_command
from ghm_d2.cli.export import main
from ghm_d2.deploy.detections import Detections, detect
from ghm_d2.deploy.export import METADATA_KEY, load_exported
from tests.detectors import small_config
from tests.exportable import (
    FASTER_RCNN,
    OPTS,
    RETINANET,
    detector,
    save_detector,
    skip_where_refused,
    write_pictures,
)
from tests.tiny import CLASSES, forget_program, write_coco


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


@pytest.fixture(scope="module", params=[RETINANET, FASTER_RCNN])
def words(request, tmp_path_factory):
    return save_detector(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def retinanet(tmp_path_factory):
    return save_detector(RETINANET, tmp_path_factory.mktemp("retinanet"))


@pytest.fixture
def fails(capsys):
    """Run main, expect one sentence on stderr; return it."""

    def run(*argv, code=2):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        captured = capsys.readouterr()
        assert stop.value.code == code
        lines = [x for x in captured.err.splitlines() if x.startswith("ghm-d2 export: ")]
        assert len(lines) == 1 and "Traceback" not in captured.err + captured.out
        return lines[0]

    return run


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_exports_and_checks(words, format, tmp_path, capsys):
    skip_where_refused(format)
    write_pictures(tmp_path / "images", (170, 200), (300, 260))
    file = tmp_path / "new" / "model.bin"
    argv = ["--check", tmp_path / "images", *words, "--format", format, "--output", file]
    main([str(word) for word in argv])
    text = capsys.readouterr().out
    found = [line for line in text.splitlines() if "detections are the same" in line]
    assert len(found) == 2
    for line in found:
        matched, _, expected = line.split(": ")[-1].split()[:3]
        assert int(matched) >= int(expected) - 1 > 0 and "0 were found by one side alone" in line
    wrote = f"Wrote {re.escape(str(file))} \\({format}\\)"
    assert re.search(wrote + r"\. Seconds per image on cpu: file \d+\.\d+", text)
    assert "noise" not in text


def test_without_images_the_file_runs_on_noise_and_knows_its_classes(retinanet, tmp_path, capsys):
    file = tmp_path / "model.ts"
    data = f"train={write_coco(tmp_path / 'data')}"
    main([*retinanet, "--format", "torchscript", "--output", str(file), "--dataset", data])
    assert "Seconds per image" in capsys.readouterr().out
    extra = {METADATA_KEY: ""}
    torch.jit.load(str(file), _extra_files=extra)
    found = json.loads(extra[METADATA_KEY])
    assert found["class_names"] == list(CLASSES)
    assert found["input_format"] == small_config(RETINANET, *OPTS).INPUT.FORMAT == "BGR"
    image = torch.rand(3, 150, 170) * 255
    with torch.no_grad():
        scores = detect(detector(RETINANET), image).scores
    assert torch.equal(load_exported(file, "torchscript")(image).scores, scores)


def test_file_that_finds_something_else_is_exit_code_1(
    retinanet, tmp_path, monkeypatch, fails, capsys
):
    def wrong(file, format, options):
        right = load_exported(file, format, options)

        def run(image):
            boxes, scores, classes = right(image)
            return Detections(boxes, scores - 2e-4 * (scores == scores.max()), classes)

        return run

    monkeypatch.setattr(export_command, "load_exported", wrong)
    images = write_pictures(tmp_path / "images", (170, 200))
    argv = [*retinanet, "--format", "torchscript", "--output", tmp_path / "m", "--check", *images]
    assert "does not find what the model finds" in fails(*argv, code=1)


def test_nothing_found_is_said(retinanet, tmp_path, capsys):
    images = write_pictures(tmp_path / "images", (170, 200))
    argv = [*retinanet, "--format", "torchscript", "--output", tmp_path / "m", "--check", *images]
    main([str(w) for w in [*argv, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.999"]])
    assert "the comparison shows little" in capsys.readouterr().out


def test_mistakes(retinanet, tmp_path, fails):
    write_pictures(tmp_path / "images", (60, 40))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "broken.pth").write_text("no weights")
    out = ["--format", "torchscript", "--output", tmp_path / "m"]
    config = retinanet[:2]
    for argv, message in (
        ([*retinanet, "--format", "caffe", "--output", "x"], "invalid choice: 'caffe'"),
        ([*retinanet, "--format", "onnx"], "the following arguments are required: --output"),
        ([*retinanet, *out, "SEED"], "one key has no value"),
        ([*retinanet, *out, "--batch", "0"], "--batch must be at least 1, got 0"),
        ([*retinanet, *out, "--opset", "17"], "--opset is for ONNX alone"),
        ([*retinanet, *out[2:], "--format", "onnx", "--opset", "9"], "between 16 and 20, got 9"),
        ([*retinanet, *out[:3], tmp_path], "is a folder: name a file"),
        ([*retinanet, *out[:3], tmp_path / "broken.png" / "m"], "cannot be made"),
        ([*retinanet, *out, "--check", tmp_path / "none.png"], "none.png does not exist"),
        ([*retinanet, *out, "--check", tmp_path / "empty"], "holds no .jpg, .jpeg"),
        ([*retinanet, *out, "--check", tmp_path / "broken.png"], "broken.png cannot be read"),
        ([*retinanet, *out, "--check", tmp_path / "images", "MODEL.WEIGTHS", "x"],
         "unknown key MODEL.WEIGTHS (similar: MODEL.WEIGHTS"),
        ([*config, *out], "a trained detector is needed, but MODEL.WEIGHTS is empty"),
        ([*config, *out, "MODEL.WEIGHTS", tmp_path / "no.pth"], "no.pth does not exist"),
        ([*config, *out, "MODEL.WEIGHTS", tmp_path / "broken.pth"], "broken.pth"),
        ([*retinanet, *out, "MODEL.RETINANET.NUM_CLASSES", "5"], "the weights do not fit"),
        ([*retinanet, *out, "INPUT.FORMAT", "L"], "INPUT.FORMAT L is not supported"),
        ([*retinanet, *out, "MODEL.META_ARCHITECTURE", "RetinaNets"], "is not registered"),
        (["--config-file", tmp_path / "c.yaml", *out], "c.yaml does not exist"),
    ):  # fmt: skip
        sentence = fails(*argv)
        assert message in sentence, sentence
        assert sentence.startswith("ghm-d2 export: error: ")
        assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_batch_half_and_opset(format, retinanet, tmp_path, capsys):
    skip_where_refused(format)
    write_pictures(tmp_path / "images", (170, 200))
    file = tmp_path / "model.bin"
    argv = ["--check", tmp_path / "images", *retinanet, "--format", format, "--output", file]
    opset = ["--opset", 18] if format == "onnx" else []
    main([str(word) for word in [*argv, "--half", "--batch", 2, *opset]])
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if "detections are the same" in line]
    matched, _, expected = line.split(": ")[-1].split()[:3]
    assert int(matched) >= 0.9 * int(expected) > 0
    assert "they are numbered (--dataset" in text  # no names in the file: said, not silent
    extra = {METADATA_KEY: ""}
    if format == "torchscript":
        torch.jit.load(str(file), _extra_files=extra)
        found = json.loads(extra[METADATA_KEY])
        assert (found["batch"], found["half"], found["fixed_size"]) == (True, True, True)
        assert found["input"].startswith("images: (N, C, H, W)")


def test_image_too_small_for_torch_export(retinanet, tmp_path, fails):
    images = write_pictures(tmp_path / "images", (60, 40))
    argv = [*retinanet, "--format", "torch_export", "--output", tmp_path / "m", "--check", *images]
    sentence = fails(*argv, "INPUT.MIN_SIZE_TEST", "0")
    assert "40 x 60 pixels" in sentence and "no side below 129" in sentence


def test_missing_package_is_named(retinanet, tmp_path, fails, monkeypatch):
    skip_where_refused("onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    sentence = fails(*retinanet, "--format", "onnx", "--output", tmp_path / "m")
    assert "needs the package onnx: run pip install onnx onnxruntime" in sentence


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--check" in text and "KEY VALUE" in text
