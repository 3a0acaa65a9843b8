"""ghm-d2 predict as users run it, and every mistake."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ghm_d2.cli.predict import main
from ghm_d2.config import add_ghm_config
from ghm_d2.data.pictures import draw
from ghm_d2.deploy import setup
from ghm_d2.deploy.coco_ids import category_ids, image_ids
from ghm_d2.deploy.setup import image_preparer
from tests.detectors import small_config
from tests.exportable import (
    BASES,
    FASTER_RCNN,
    OPTS,
    RETINANET,
    detector,
    picture,
    save_detector,
    write_pictures,
)
from tests.tiny import CLASSES, coco_content, forget_program, write_coco


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
    assert np.array_equal(drawn, picture(300, 410))


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


MASK = ("ghm_mask_rcnn_R_50",)
CASCADE = ("ghm_cascade_rcnn_R_50", "MODEL.MASK_ON", True)
KEYPOINT = (FASTER_RCNN, "MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3,
            "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,))  # fmt: skip


def saved(detector_and_opts, folder):
    base, *opts = detector_and_opts
    return detector(base, *opts), save_detector(base, folder, *opts)


@pytest.mark.parametrize("which", [MASK, CASCADE, KEYPOINT], ids=["mask", "cascade", "keypoint"])
def test_masks_and_keypoints(which, tmp_path):
    """Each as Detectron2's evaluator would write it of the model's own output."""
    model, words = saved(which, tmp_path)
    (image,) = write_pictures(tmp_path / "in", (300, 400))
    out = tmp_path / "out"
    run(words, "--input", image, "--output", out, "--confidence-threshold", 0.1)
    inputs = image_preparer(small_config(which[0], *OPTS))(picture(300, 400))
    with torch.no_grad():
        found = model([{"image": inputs, "height": 300, "width": 400}])[0]["instances"]
    found = found[found.scores >= 0.1]
    expected = instances_to_coco_json(found, 1)
    assert len(expected) > 0
    results = written(out)
    for row, wanted in zip(results, expected, strict=True):
        assert {key: row[key] for key in wanted} == wanted
    field = "keypoints" if which is KEYPOINT else "segmentation"
    assert all(field in row for row in results)
    assert max(np.asarray(Image.open(out / "0.png")).shape) == 400


def test_drawing():
    """The mask and the keypoints where they are, whatever size the drawing has."""
    metadata = Metadata(
        thing_classes=["a"],
        keypoint_names=["left", "right"],
        keypoint_connection_rules=[("left", "right", (255, 0, 0))],
    )
    mask = np.zeros((1, 30, 40), bool)
    mask[0, 10:20, 20:30] = True
    points = np.array([[[5.0, 20.0, 1.0], [15.0, 20.0, 1.0]]])
    item = ([18.0, 8.0, 32.0, 28.0], 0, "")
    drawn = draw(np.zeros((30, 40, 3), np.uint8), [item], metadata, (400, 800), mask, points)
    assert drawn.shape == (300, 400, 3)
    orange = np.array([0xE6, 0x9F, 0])
    assert (drawn[150:195, 205:295] == orange // 2).all()  # the mask
    assert (drawn[202:270, 190:310] == 0).all()  # below it, inside the box
    assert (drawn[200, [50, 150]] == orange).all()  # the two keypoints
    assert (drawn[200, 60:140] == (255, 0, 0)).all()  # and the line between them
    assert (drawn[85:275, 180] == orange).all() and (drawn[85:275, 320] == orange).all()


@pytest.mark.parametrize("name", ["PanopticFPN", "SemanticSegmentor", "ProposalNetwork"])
def test_other_models(name, tmp_path, fails):
    """What returns instances is run, masks of the whole image included; the others are named."""
    opts = (
        *["MODEL.META_ARCHITECTURE", name, "MODEL.MASK_ON", True],
        *["MODEL.SEM_SEG_HEAD.NORM", "", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 8],
    )
    cfg = small_config(FASTER_RCNN, *OPTS, *opts)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    words = ["--config-file", tmp_path / "config.yaml", "MODEL.WEIGHTS", tmp_path / "model.pth"]
    (image,) = write_pictures(tmp_path / "in", (100, 140))
    argv = ["--input", image, "--output", tmp_path / "out", "--confidence-threshold", 0]
    if name == "PanopticFPN":
        run(words, *argv)
        results = written(tmp_path / "out")
        assert results and {tuple(r["segmentation"]["size"]) for r in results} == {(100, 140)}
    else:
        assert f"{name} outputs" in fails(*argv, *words)


def renumbered(folder, images):
    """A data set whose ids are no counting numbers: image i is 100 + 7 i, the categories 7, 11, 90.

    Returns what follows "NAME=" in --dataset, and the file.
    """
    content = coco_content(len(images))
    for entry, name in zip(content["images"], images, strict=True):
        entry["file_name"] = name
        entry["id"] = 100 + 7 * entry["id"]
    for category, number in zip(content["categories"], (7, 11, 90), strict=True):
        category["id"] = number
    for annotation in content["annotations"]:
        annotation["category_id"] = {1: 7, 2: 11, 3: 90}[annotation["category_id"]]
        annotation["image_id"] = 100 + 7 * annotation["image_id"]
    text = write_coco(folder, content=content, images=0)
    for entry in content["images"]:
        file = folder / "images" / entry["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(64, 64, entry["id"])).save(file)
    return text, folder / "train.json"


def test_coco_takes_the_results(retinanet, tmp_path):
    """The whole way to an AP, with images in folders and an image of another place beside them."""
    text, file = renumbered(tmp_path / "data", ["a/0.png", "b/0.png", "c.png"])
    (other,) = write_pictures(tmp_path / "other", (64, 64))
    images = tmp_path / "data" / "images"
    argv = ["--input", images, other, "--output", tmp_path / "out", "--dataset", f"mine={text}"]
    run(retinanet, *argv, "--confidence-threshold", 0.05, "INPUT.MIN_SIZE_TEST", 150)
    results = written(tmp_path / "out")
    ids = {(r["file_name"], r["image_id"]) for r in results}
    assert ids == {("a/0.png", 107), ("b/0.png", 114), ("c.png", 121)}
    truth = COCO(str(file))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "out" / "predictions.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] >= 0
    rest = json.loads((tmp_path / "out" / "predictions_other_images.json").read_text())
    assert {r["file_name"] for r in rest} == {"0.png"}  # twice in the data set: not known by name
    names = sorted(
        f.relative_to(tmp_path / "out").as_posix() for f in tmp_path.rglob("out/**/*.png")
    )
    assert names == ["0.png", "a/0.png", "b/0.png", "c.png"]


def test_images_of_a_data_set_that_lie_elsewhere(retinanet, tmp_path):
    text, _ = renumbered(tmp_path / "data", ["a/x.png", "b/y.png"])
    moved = shutil.move(tmp_path / "data" / "images" / "b", tmp_path / "moved")
    shutil.copytree(moved, tmp_path / "data" / "images" / "b")
    argv = ["--input", f"{moved}/*.png", "--output", tmp_path / "out", "--dataset", f"mine={text}"]
    run(retinanet, *argv, "--confidence-threshold", 0.05)
    assert {(r["file_name"], r["image_id"]) for r in written(tmp_path / "out")} == {("y.png", 114)}


def test_ids_of_built_in_data_sets(tmp_path, monkeypatch):
    """Categories by the metadata, images where they are the data set's own files."""
    assert category_ids(MetadataCatalog.get("coco_2017_val"), 80)[-3:] == [88, 89, 90]
    assert category_ids(MetadataCatalog.get("lvis_v1_val"), 3) == [1, 2, 3]
    assert category_ids(MetadataCatalog.get("ghm_synthetic_val"), 3) == [1, 2, 3]
    assert category_ids(Metadata(), 3) == [0, 1, 2]
    text, file = renumbered(tmp_path / "data", ["0.png"])
    root = tmp_path / "data" / "images"
    register_coco_instances("built_in", {}, str(file), str(root))
    try:
        metadata = MetadataCatalog.get("built_in")
        (elsewhere,) = write_pictures(tmp_path / "elsewhere", (64, 64))
        assert image_ids([elsewhere], metadata, named=False) == {}
        assert category_ids(metadata, 3) == [0, 1, 2]  # not read
        assert image_ids([elsewhere, root / "0.png"], metadata, False) == {root / "0.png": 107}
        assert category_ids(metadata, 3) == [7, 11, 90]
    finally:
        DatasetCatalog.remove("built_in")
        MetadataCatalog.remove("built_in")


def test_the_weights_name_the_classes(tmp_path, capsys):
    words = save_detector(RETINANET, tmp_path, ghm_d2={"classes": ["a", "b", "c"], "data": {}})
    (image,) = write_pictures(tmp_path / "in", (150, 150))
    argv = ["--input", image, "--output", tmp_path / "out", "--confidence-threshold", 0.1]
    run(words, *argv)
    rows = written(tmp_path / "out")
    assert rows and all(r["category"] == "abc"[r["category_id"]] for r in rows)
    assert "are numbered" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["uint16 png", "uint16 tiff", "int32 tiff", "float tiff"])
def test_deep_images_are_refused(kind, retinanet, tmp_path, capsys):
    dtype, suffix = kind.split()
    (good,) = write_pictures(tmp_path / "in", (150, 150))
    grey = picture(150, 150)[:, :, 0].astype(dtype) * 200
    Image.fromarray(grey).save(tmp_path / "in" / f"deep.{suffix}")
    run(retinanet, "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert "convert it to 8 bits" in capsys.readouterr().out
    assert [f.name for f in (tmp_path / "out").glob("*.*") if f.suffix != ".json"] == [good.name]


def test_folders_patterns_and_kinds_of_files(retinanet, tmp_path, capsys, caplog):
    write_pictures(tmp_path / "in" / "deep" / "er", (150, 150), (160, 150))
    Image.fromarray(picture(150, 150)).save(tmp_path / "in" / "new.avif")
    (tmp_path / "in" / "notes.txt").write_text("nothing")
    out = tmp_path / "in" / "out"  # inside what is read
    for extra in ([], ["--overwrite"]):
        run(retinanet, "--input", tmp_path / "in", "--output", out, *extra)
        assert "in 3 images or frames" in capsys.readouterr().out
    assert "1 files are left out" in caplog.text and "the first: notes.txt" in caplog.text
    there = sorted(f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file())
    assert there == ["deep/er/0.png", "deep/er/1.png", "new.avif.png", "predictions.json"]
    words = ["--input", f"{tmp_path}/in/**/[0-9].png", "--output", tmp_path / "plain"]
    run(retinanet, *words, "--no-pictures", "--confidence-threshold", 0.1)
    assert [f.name for f in (tmp_path / "plain").iterdir()] == ["predictions.json"]
    assert {"out/deep/er/0.png", "deep/er/1.png"} < {
        r["file_name"] for r in written(tmp_path / "plain")
    }


def test_results_are_not_overwritten(retinanet, tmp_path, fails):
    (image,) = write_pictures(tmp_path / "in", (150, 150))
    argv = ["--input", image, "--output", tmp_path / "out"]
    run(retinanet, *argv)
    before = written(tmp_path / "out")
    sentence = fails(*argv, "--confidence-threshold", 0, *retinanet)
    assert "predictions.json exists already" in sentence and "--overwrite" in sentence
    assert written(tmp_path / "out") == before
    run(retinanet, *argv, "--confidence-threshold", 0, "--overwrite")
    assert len(written(tmp_path / "out")) > len(before)


def test_large_images_are_drawn_small(retinanet, tmp_path):
    """In the right place, though; the results are in pixels of the image."""
    small = picture(150, 200)
    Image.fromarray(small).resize((2000, 1500)).save(tmp_path / "large.png")
    argv = ["--input", tmp_path / "large.png", "--output", tmp_path / "out"]
    run(retinanet, *argv, "--confidence-threshold", 0.3)
    drawn = np.asarray(Image.open(tmp_path / "out" / "large.png")).astype(int)
    assert drawn.shape == (1200, 1600, 3)
    plain = np.asarray(Image.fromarray(small).resize((2000, 1500)).resize((1600, 1200)))
    changed = np.abs(drawn - plain).max(axis=2) > 25
    rows = written(tmp_path / "out")
    assert rows
    for x, y, _, height in (row["bbox"] for row in rows):
        down = (np.array([y, y + height]) * 0.8).astype(int)
        left = int(x * 0.8)
        assert changed[slice(*down), max(0, left - 3) : left + 4].any(axis=1).mean() > 0.7


def write_video(file: Path, frames: int) -> None:
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 5, (208, 160))
    assert writer.isOpened()
    for number in range(frames):
        writer.write(np.ascontiguousarray(picture(160, 208, number)[:, :, ::-1]))
    writer.release()


@pytest.mark.parametrize("channels", ["BGR", "RGB"])
def test_video(retinanet, channels, tmp_path, capsys):
    """In each frame is found what the model finds in it, and the drawn video has as many frames."""
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
    Image.fromarray(np.full((150, 150), 9000, np.uint16)).save(tmp_path / "deep.png")
    out = ["--output", tmp_path / "out"]
    for argv, message in (
        ([*retinanet, *out], "the following arguments are required: --input"),
        ([*retinanet, *out, "--input", tmp_path / "none.png"], "none.png does not exist"),
        ([*retinanet, *out, "--input", tmp_path / "empty"], "holds no .jpg"),
        ([*retinanet, *out, "--input", "rtsp://camera/1"], "streams and downloads are not read"),
        ([*retinanet, *out, "--input", "https://x.org/a.jpg"], "downloads are not read"),
        ([*retinanet, *out, "--input", "0"], "cameras are not read"),
        ([*retinanet, *out, "--input", "/dev/null"], "cameras are not read"),
        ([*retinanet, *out, "--input", "-"], "standard input is not read"),
        ([*retinanet, *out, "--input", f"{tmp_path}/in/*.jpg"], "holds no .jpg"),
        ([*retinanet, *out, "--input", tmp_path / "deep.png"], "none of the 1 inputs"),
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


def test_the_folder_of_a_training_stands_for_its_weights(tmp_path):
    """Its config.yaml does where no weights are given; the best model comes first."""
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.MODEL.WEIGHTS = "backbone.pth"
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())

    def chosen(config_file, weights=None):
        own = cfg.clone()
        if weights is not None:
            own.MODEL.WEIGHTS = str(weights)
        keys = setup._choose_weights(own, str(config_file), {"MODEL.WEIGHTS"} if weights else set())
        return own.MODEL.WEIGHTS if keys else None

    assert chosen(file) is None  # nothing is trained yet
    for name in ("model_final.pth", "model_best.pth"):
        (tmp_path / name).touch()
        assert chosen(file) == chosen("other.yaml", tmp_path) == str(tmp_path / name)
    assert chosen(file, tmp_path / "model_final.pth") is None  # a file is that file
    assert chosen(tmp_path / "other.yaml") is None
