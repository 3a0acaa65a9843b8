"""ghm-d2 predict as users run it, and every mistake."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.utils.visualizer import Visualizer
from exportable import BASES, RETINANET, detector, picture, save_detector, write_pictures
from PIL import Image
from tiny import CLASSES, coco_content, forget_program, write_coco

from ghm_d2.cli.predict import main


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


@pytest.fixture(scope="module")
def retinanet(tmp_path_factory):
    return save_detector(RETINANET, tmp_path_factory.mktemp("retinanet"))


@pytest.fixture
def fails(capsys):
    """Run main, expect one sentence on stderr; return it."""

    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        captured = capsys.readouterr()
        assert stop.value.code == 2
        lines = [x for x in captured.err.splitlines() if x.startswith("ghm-d2 predict: error: ")]
        assert len(lines) == 1 and "Traceback" not in captured.err + captured.out
        return lines[0]

    return run


def run(words, *argv):
    main([str(word) for word in [*argv, *words]])


def written(folder):
    return json.loads((folder / "predictions.json").read_text())


def expected_results(model, rgb, resized, threshold):
    """Boxes (x, y, width, height), scores and classes from Detectron2's inference alone."""
    height, width = rgb.shape[:2]
    image = np.asarray(Image.fromarray(rgb).resize(resized, Image.BILINEAR))[:, :, ::-1]
    image = torch.as_tensor(image.transpose(2, 0, 1).astype(np.float32))
    with torch.no_grad():
        found = model([{"image": image, "height": height, "width": width}])[0]["instances"]
    found = found[found.scores >= threshold]
    boxes = found.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    return boxes, found.scores, found.pred_classes


@pytest.mark.parametrize("base", BASES)
def test_pictures_and_results(base, tmp_path, capsys):
    words = save_detector(base, tmp_path)
    write_pictures(tmp_path / "in", (300, 400), (150, 210))
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    out = tmp_path / "out"
    run(words, "--input", tmp_path / "in", "--output", out, "--confidence-threshold", 0.2)
    results = written(out)
    assert sorted(x.name for x in out.iterdir()) == ["0.png", "1.png", "predictions.json"]
    for number, (size, resized) in enumerate([((300, 400), (200, 150)), ((150, 210), (210, 150))]):
        rgb = picture(*size, seed=number)
        boxes, scores, classes = expected_results(detector(base), rgb, resized, 0.2)
        rows = [r for r in results if r["file_name"] == f"{number}.png"]
        assert len(rows) == len(boxes) > 0
        assert {r["image_id"] for r in rows} == {number + 1}
        np.testing.assert_allclose([r["bbox"] for r in rows], boxes.numpy(), rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose([r["score"] for r in rows], scores.numpy(), rtol=1e-6)
        assert [r["category_id"] for r in rows] == classes.tolist()
        assert all("category" not in r for r in rows)
        drawn = np.asarray(Image.open(out / f"{number}.png"))
        assert max(drawn.shape) == 400  # small images are drawn larger
        plain = np.asarray(Image.fromarray(rgb).resize(drawn.shape[1::-1]))
        assert (np.abs(drawn.astype(int) - plain).max(axis=2) > 60).mean() > 0.01
    text = capsys.readouterr().out
    assert f"{len(results)} detections in 2 images or frames, " in text
    assert "they are numbered (--dataset" in text


def test_threshold_leaves_out_and_zero_keeps_all(retinanet, tmp_path):
    images = write_pictures(tmp_path / "in", (300, 410))
    for threshold in ("0", "0.2", "1"):
        argv = ["--input", *images, "--output", tmp_path / threshold]
        run(retinanet, *argv, "--confidence-threshold", threshold)
    scores = {t: [r["score"] for r in written(tmp_path / t)] for t in ("0", "0.2", "1")}
    assert scores["1"] == []
    assert 0 < len(scores["0.2"]) < len(scores["0"])
    assert scores["0.2"] == [s for s in scores["0"] if s >= 0.2]
    drawn = np.asarray(Image.open(tmp_path / "1" / "0.png"))
    # Some versions of matplotlib move a picture by a part of a pixel.
    assert np.array_equal(drawn, Visualizer(picture(300, 410)).get_output().get_image())


def test_names_and_category_ids_of_the_data_set(retinanet, tmp_path):
    content = coco_content()
    for category, number in zip(content["categories"], (7, 11, 90), strict=True):
        category["id"] = number
    for annotation in content["annotations"]:
        annotation["category_id"] = {1: 7, 2: 11, 3: 90}[annotation["category_id"]]
    data = f"mine={write_coco(tmp_path / 'data', content=content)}"
    images = write_pictures(tmp_path / "in", (200, 260))
    argv = ["--input", *images, "--output", tmp_path / "out", "--dataset", data]
    run(retinanet, *argv, "--confidence-threshold", "0.1")
    pairs = {(r["category_id"], r["category"]) for r in written(tmp_path / "out")}
    assert len(pairs) > 1 and pairs <= set(zip((7, 11, 90), CLASSES, strict=True))


def test_broken_files_are_counted_and_skipped(retinanet, tmp_path, capsys):
    good, cut = write_pictures(tmp_path / "in", (200, 260), (150, 150))
    cut.write_bytes(cut.read_bytes()[:3000])
    (tmp_path / "in" / "a.jpg").write_text("no image")
    (tmp_path / "in" / "b.mp4").write_text("no video")
    argv = ["--input", tmp_path / "in", "--output", tmp_path / "out"]
    run(retinanet, *argv, "--confidence-threshold", "0.1")
    text = capsys.readouterr().out
    for file, kind in (("1.png", "an image"), ("a.jpg", "an image"), ("b.mp4", "a video")):
        (line,) = [x for x in text.splitlines() if f"{file} cannot be read as {kind}" in x]
        assert "skipped" in line
    assert "3 of 4 inputs could not be read and were skipped" in text
    assert {r["file_name"] for r in written(tmp_path / "out")} == {good.name}
    assert not list((tmp_path / "out").glob("b*"))


def write_video(file: Path, frames: int) -> None:
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 5, (208, 160))
    assert writer.isOpened()
    for number in range(frames):
        writer.write(np.ascontiguousarray(picture(160, 208, number)[:, :, ::-1]))
    writer.release()


@pytest.mark.parametrize("channels", ["BGR", "RGB"])
def test_video(retinanet, channels, tmp_path, capsys):
    """Each frame is found what the model finds in it, and the drawn video has as many frames."""
    write_video(tmp_path / "clip.avi", 3)
    argv = ["--input", tmp_path / "clip.avi", "--output", tmp_path / "out", "INPUT.FORMAT",
            channels, "INPUT.MIN_SIZE_TEST", "0", "--confidence-threshold", "0.1"]  # fmt: skip
    run(retinanet, *argv)
    results = written(tmp_path / "out")
    video = cv2.VideoCapture(str(tmp_path / "clip.avi"))
    for number in range(3):
        there, frame = video.read()
        assert there
        frame = frame if channels == "BGR" else frame[:, :, ::-1]
        image = torch.as_tensor(np.ascontiguousarray(frame.transpose(2, 0, 1), dtype=np.float32))
        with torch.no_grad():
            scores = detector(RETINANET)([{"image": image}])[0]["instances"].scores
        found = [r["score"] for r in results if r["frame"] == number]
        assert len(found) > 0
        np.testing.assert_allclose(found, scores[scores >= 0.1].numpy(), rtol=1e-5)
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert (drawn.get(3), drawn.get(4), drawn.get(5)) == (208, 160, 5)
    assert "in 3 images or frames" in capsys.readouterr().out


def test_mistakes(retinanet, tmp_path, fails):
    (image,) = write_pictures(tmp_path / "in", (150, 150))
    write_pictures(tmp_path / "other", (150, 150))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_text("no image")
    out = ["--output", tmp_path / "out"]
    for argv, message in (
        ([*retinanet, *out], "the following arguments are required: --input"),
        ([*retinanet, *out, "--input", tmp_path / "none.png"], "none.png does not exist"),
        ([*retinanet, *out, "--input", tmp_path / "empty"], "holds no .jpg"),
        ([*retinanet, *out, "--input", tmp_path / "broken.png"], "none of the 1 inputs"),
        ([*retinanet, "--output", tmp_path / "in", "--input", image], "would overwrite the input"),
        ([*retinanet, "--output", image, "--input", image], "cannot be made"),
        ([*retinanet, *out, "--input", tmp_path / "in", tmp_path / "other"],
         "2 inputs would be written to"),
        ([*retinanet, *out, "--input", image, "--confidence-threshold", "50"], "in [0, 1], got 50"),
        ([*retinanet, *out, "--input", image, "--confidence-threshold", "x"], "invalid float"),
        ([*retinanet[:2], *out, "--input", image], "a trained detector is needed"),
        ([*retinanet, *out, "--input", image, "INPUT.FORMAT", "L"], "INPUT.FORMAT L is not"),
    ):  # fmt: skip
        sentence = fails(*argv)
        assert message in sentence, sentence


def test_the_script_itself(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--confidence-threshold" in text and "KEY VALUE" in text
