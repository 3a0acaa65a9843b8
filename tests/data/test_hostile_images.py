"""Images and boxes as they come from the wild: read, repaired, or refused by their names."""

import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from PIL import Image
from torch._utils import ExceptionWrapper

from ghm_d2.cli import check_data
from ghm_d2.data import check_coco_dataset, checks, parse_dataset, register_coco_dataset
from ghm_d2.data.coco import check_content
from ghm_d2.data.readable import ReadableMapper, TooManyUnreadable
from ghm_d2.engine import GHMTrainer
from ghm_d2.errors import UserError
from tests.detectors import batch, small_config, small_model, step
from tests.tiny import coco_content, forget_program, tiny_pairs, write_coco


@pytest.fixture(autouse=True)
def clean_up(monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    yield
    forget_program()


def save(folder, make, suffix="png"):
    """One data set of six images, the fourth of which is what `make(path)` writes."""
    content = coco_content()
    content["images"][3]["file_name"] = f"odd.{suffix}"
    spec = f"odd={write_coco(folder, 'odd', content)}"
    make(folder / "images" / f"odd.{suffix}")
    return parse_dataset(spec)


def gray():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    gray().convert("RGB").save(path, exif=exif)


def wide(path, **options):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(path, exif=exif)


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


GOOD = {
    "cmyk.jpg": lambda p: gray().convert("CMYK").save(p),
    "gray.png": lambda p: gray().save(p),
    "gray.jpg": lambda p: gray().save(p),
    "palette.png": lambda p: gray().convert("P").save(p),
    "alpha.png": lambda p: gray().convert("RGBA").save(p),
    "bilevel.png": lambda p: gray().convert("1").save(p),
    "rotated.jpg": rotated,
}
REFUSED = {
    "missing.png": (lambda p: None, "is missing from"),
    "text.jpg": (lambda p: p.write_text("<html>"), "cannot be read: cannot identify"),
    "empty.png": (lambda p: p.touch(), "cannot be read"),
    "deep.png": (lambda p: Image.new("I;16", (64, 64)).save(p), "mode I;16.*convert it to 8 bits"),
    "float.tiff": (lambda p: Image.new("F", (64, 64)).save(p), "mode F"),
    "small.png": (lambda p: Image.new("RGB", (64, 60)).save(p), "64 x 60 .*says 64 x 64"),
    "turned.jpg": (wide, "32 x 64 pixels after its EXIF .*says 64 x 64"),
    "pixel.png": (lambda p: Image.new("RGB", (1, 1)).save(p), "1 x 1 pixels"),
}


@pytest.mark.parametrize("name", GOOD)
def test_images_that_are_read(tmp_path, name):
    register_coco_dataset(check_coco_dataset(save(tmp_path, GOOD[name], name.split(".")[1])))
    mapper = DatasetMapper(small_config("ghm_retinanet_R_50", *tiny_pairs()), True)
    sample = ReadableMapper(mapper, True)(DatasetCatalog.get("odd")[3])
    assert sample["image"].shape == (3, 64, 64) and sample["image"].float().std() > 10


@pytest.mark.parametrize("name", REFUSED)
def test_images_that_are_refused_before_training(tmp_path, name):
    make, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as error:
        check_coco_dataset(save(tmp_path, make, name.split(".")[1]))
    assert "odd.json: image 4 (odd." in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def tool(capsys):
    """ghm-d2 check-data: exit code and output."""

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            check_data.main([str(word) for word in words])
        captured = capsys.readouterr()
        return stop.value.code, captured.out + captured.err

    return run


def test_the_tool_lists_everything_at_once(tmp_path, tool):
    content = coco_content()
    notes, images = content["annotations"], content["images"]
    notes[0]["bbox"] = [5, 5, 0, 7]
    notes[1]["bbox"] = [100, 100, 9, 9]
    notes[2]["bbox"] = [-9, 5, 20, 20]
    notes[3].update(category_id=77)
    notes[4]["bbox"] = [1, 2, float("nan"), 4]
    notes[5]["image_id"] = 99
    notes[6]["segmentation"] = [[1, 2, 3, 4]]
    images[4]["file_name"], images[5]["width"] = "gone.png", 63
    write_coco(tmp_path, "all", content)
    truncated(tmp_path / "images" / "0.png")
    Image.new("I;16", (64, 64)).save(tmp_path / "images" / "1.png")
    gray().convert("P").save(tmp_path / "images" / "2.png")
    code, text = tool(tmp_path / "all.json", tmp_path / "images")
    assert code == 1
    for words in (
        "annotation 1 of image 1 (0.png) has the bbox [5, 5, 0, 7]",
        "annotation 2 of image 1 (0.png) has the bbox [100, 100, 9, 9] in 64 x 64",
        "annotation 3 of image 2 (1.png) has the bbox [-9, 5, 20, 20]",
        "annotation 4 has the category_id 77",
        "annotation 5 has the bbox [1, 2, nan, 4]",
        "annotation 6 refers to image 99",
        "annotation 7 of image 4 (3.png)",
        "image 5 (gone.png) is missing",
        "image 6 (5.png) has 64 x 64 pixels, but the annotation file says 63 x 64",
        "image 1 (0.png) cannot be read: image file is truncated",
        "image 2 (1.png) has Pillow's mode I;16",
        "image 3 (2.png) has the mode P",
    ):
        assert words in text
    code, text = tool(tmp_path / "all.json", tmp_path / "images", "--headers-only")
    assert code == 1 and "truncated" not in text


def test_exit_codes_of_the_tool(tmp_path, tool):
    write_coco(tmp_path, "clean")
    file, folder = tmp_path / "clean.json", tmp_path / "images"
    assert tool(file, folder) == (
        0,
        f"{file}: 6 images, 12 annotations, 3 categories\nNo problem found.\n",
    )
    for words in ((), (file,), (file, tmp_path / "gone"), (tmp_path / "gone.json", folder)):
        code, text = tool(*words)
        assert code == 2 and text.startswith("ghm-d2 check-data: error: ")
    for bad in ("{", '{"images": 3}', "[]"):
        file.write_text(bad)
        code, text = tool(file, folder)
        assert code == (1 if bad.startswith('{"') else 2) and "Traceback" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["images"][0].update(file_name=7), '"file_name" 7 instead of a text'),
        (lambda c: c["images"][1].update(id=1), "id 1 occurs more than once in images"),
        (lambda c: c["images"][1].update(id=[1]), r'"id" \[1\]'),
        (lambda c: c["annotations"][1].update(image_id={}), '"image_id" {}'),
        (lambda c: c["categories"][0].update(name=None), 'entry 0 of categories has no "name"'),
        (lambda c: c["annotations"][0].update(bbox="1,2,3,4"), "instead of four finite numbers"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, True, 4]), "four finite numbers"),
    ],
)
def test_entries_that_are_refused(tmp_path, change, words):
    content = coco_content()
    change(content)
    with pytest.raises(UserError, match=words):
        check_coco_dataset(parse_dataset(f"x={write_coco(tmp_path, 'x', content)}"))


def test_a_crowded_image_is_refused_and_fewer_boxes_train():
    def found(number):
        content = coco_content()
        one = content["annotations"][0]
        content["annotations"] = [
            {**one, "id": i + 1, "bbox": [30 + i * 1e-4, 9, 20, 20]} for i in range(number)
        ]
        return check_content(content).found

    crowded = found(50_000)
    assert crowded.kinds("stops") == ["crowded image"]
    assert crowded.examples["crowded image"] == ["image 1 (0.png) has 50000 boxes"]
    many = found(1001)
    assert not many.kinds("stops")
    assert many.examples["many boxes"] == ["image 1 (0.png) has 1001 boxes"]
    corner = torch.rand(checks.MAX_BOXES, 2) * 100
    boxes = torch.cat([corner, corner + 1 + torch.rand(checks.MAX_BOXES, 2) * 27], 1)
    losses, _ = step(small_model("ghm_retinanet_R_50"), batch(boxes.tolist()))
    assert all(torch.isfinite(x) for x in losses.values())


def trainer(folder, steps=3):
    pairs = tiny_pairs(
        DATASETS__TRAIN="('odd',)",
        DATASETS__TEST="('odd',)",
        OUTPUT_DIR=folder / "out",
        SOLVER__MAX_ITER=steps,
    )
    return GHMTrainer(small_config("ghm_retinanet_R_50", *pairs))


def test_an_image_that_breaks_is_replaced_in_training_and_black_in_a_test(tmp_path, caplog):
    dataset = save(tmp_path, lambda p: Image.new("RGB", (64, 64)).save(p))
    register_coco_dataset(check_coco_dataset(dataset))
    training = trainer(tmp_path, 4)
    truncated(tmp_path / "images" / "odd.png")
    training.train()
    text = caplog.text
    assert "odd.png cannot be used (image file is truncated" in text
    assert "another image replaces it (1 of " in text
    assert "a black image replaces it (1 of 4" in text
    assert "bbox" in training._last_eval_results
    tested = [x for batch in training.build_test_loader(training.cfg, "odd") for x in batch]
    assert [x["image_id"] for x in tested] == [1, 2, 3, 4, 5, 6]  # none of them twice
    assert [bool(x["image"].any()) for x in tested] == [True] * 3 + [False] + [True] * 2


def test_an_image_too_flat_to_resize_is_skipped(tmp_path, caplog):
    Image.new("RGB", (9000, 1)).save(tmp_path / "flat.png")
    record = {"file_name": str(tmp_path / "flat.png"), "height": 1, "width": 9000}
    mapper = DatasetMapper(small_config("ghm_retinanet_R_50"), True)
    assert ReadableMapper(mapper, True)(record) is None and "flat.png cannot be used" in caplog.text


def test_many_unreadable_images_stop_with_a_sentence():
    def broken(record):
        if record["file_name"].startswith("bad"):
            raise OSError("Input/output error")
        return record

    few = ReadableMapper(broken, True)
    for i in range(1000):  # a few percent may fail for ever
        few({"file_name": f"bad{i % 50}" if i % 20 == 0 else "good"})
    many = ReadableMapper(broken, True)
    with pytest.raises(
        TooManyUnreadable, match="21 of 21 images could not be read, the last bad20"
    ):
        for i in range(50):
            many({"file_name": f"bad{i}"})
    try:
        many({"file_name": "bad50"})
    except TooManyUnreadable:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(TooManyUnreadable) as error:
        wrapped.reraise()
    assert "\n" not in str(error.value) and str(error.value).startswith("22 of 22 images")


def test_truncated_json_is_one_sentence(tmp_path):
    spec = parse_dataset(f"x={write_coco(tmp_path, 'x')}")
    text = json.dumps(coco_content())
    for length in (0, 1, len(text) // 2, len(text) - 1):
        (tmp_path / "x.json").write_text(text[:length])
        with pytest.raises(UserError, match="x.json is not a complete JSON file"):
            check_coco_dataset(spec)
