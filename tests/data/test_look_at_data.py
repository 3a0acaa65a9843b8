"""ghm-d2 look: the figures are right, the pictures show the boxes, mistakes get a sentence."""

import json

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from ghm_d2.cli.look import main
from ghm_d2.data.look_pictures import draw_histograms, spread
from ghm_d2.data.look_statistics import count_data, summary
from tests.kinds import KINDS, Kind
from tests.tiny import coco_content, forget_program, write_coco


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


def look(*argv):
    main([str(word) for word in argv])


def test_files_and_figures(tmp_path, capsys):
    data = write_coco(tmp_path / "data")
    look("--dataset", f"mine={data}", "--output", tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"mine_images.png", "mine_boxes.png", "mine_summary.txt"}
    text = (tmp_path / "out" / "mine_summary.txt").read_text()
    for words in (
        "mine: 6 images, 12 boxes, 3 classes",
        "boxes per image: 2 / 2 / 2 (fewest / median / most), 0 images without any",
        "27 / 27 / 27 pixels; 100% small (< 32), 0% medium, 0% large (>= 96)",
        "aspect ratio (height / width): 1.2 / 1.2 / 1.2",
        "has 33% of the boxes, 1.0 times as many as the rarest class",
    ):
        assert words in text, words
    assert "anchors of" not in text
    assert text in capsys.readouterr().out


def test_boxes_are_drawn_where_they_are(tmp_path):
    content = coco_content(1)
    content["annotations"] = content["annotations"][:1]  # x 8 .. 32, y 10 .. 40 of 64 x 64
    (tmp_path / "data" / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64), "black").save(tmp_path / "data" / "images" / "0.png")
    (tmp_path / "data" / "a.json").write_text(json.dumps(content))
    look("--dataset", f"m={tmp_path}/data/a.json,{tmp_path}/data/images", "--output", tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "m_images.png").convert("RGB")).astype(int)
    tile = sheet[24:424, 8:408]
    lit = tile.sum(2) > 150
    scale = 400 / 64
    assert lit[200, round(8 * scale) - 3 : round(8 * scale) + 3].any()  # the left side
    assert lit[200, round(32 * scale) - 3 : round(32 * scale) + 3].any()
    assert lit[round(40 * scale) - 3 : round(40 * scale) + 3, 120].any()
    assert not lit[:, 230:].any() and not lit[270:].any()


@pytest.mark.parametrize("name", KINDS)
def test_a_config_brings_its_data_and_its_anchors(name, tmp_path, capsys):
    data, kind = write_coco(tmp_path / "data"), Kind(name, tmp_path)
    size = kind.words(train_size=[32] if kind.python else (32,))
    look("--config-file", kind.file, "--dataset", f"m={data}", "--output", tmp_path / "o", *size)
    text = capsys.readouterr().out
    way_out = '"model.anchor_generator.sizes=' if kind.python else 'MODEL.ANCHOR_GENERATOR.SIZES "'
    assert "Most boxes have no anchor that fits" in text and way_out in text


def boxes(*rows, image=(100, 50)):
    annotations = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": k, **dict(more)}
        for box, k, *more in rows
    ]
    return {"file_name": "x", "width": image[0], "height": image[1], "annotations": annotations}


def test_what_does_not_count_is_said():
    crowd = (("iscrowd", 1),)
    data = count_data(
        "d",
        [
            boxes(((0, 0, 10, 40), 0), ((0, 0, 5, 0), 0), ((0, 0, 9, 9), 1, *crowd)),
            boxes(((0, 0, 100, 100), 5), image=(200, 300)),
            boxes(),
        ],
        ("a", "b"),
    )
    assert data.classes == ("a", "b", "2", "3", "4", "5")
    assert data.class_counts.tolist() == [1, 0, 0, 0, 0, 1]
    assert data.per_image.tolist() == [1, 1, 0]
    assert data.sizes.tolist() == [20, 100] and data.ratios.tolist() == [4, 1]
    text = summary(data)
    assert "not counted below: 1 crowd region, 1 box without area" in text
    assert "1 image without any" in text
    assert "4 classes have no box: b, 2, 3, 4" in text
    assert "50% small (< 32), 0% medium, 50% large (>= 96)" in text
    assert "there are no boxes" in summary(count_data("d", [boxes()], ("a",)))


def test_two_data_sets_in_one_picture(tmp_path, capsys):
    first, second = (write_coco(tmp_path / name) for name in "ab")
    look("--dataset", f"a={first}", f"b={second}", "--output", tmp_path / "o")
    assert Image.open(tmp_path / "o" / "compared.png").size[0] == 1320
    assert "compared.png" in capsys.readouterr().out


def test_one_class_and_thousands():
    text = summary(count_data("d", [boxes(*[((0, 0, 9, 9), 0)] * 4155)], ("cell",)))
    assert "d: 1 image, 4,155 boxes, 1 class\n" in text and "cell     4,155  100.0%" in text
    assert "imbalance" not in text


def test_rare_classes_and_long_tables():
    rows = [((0, 0, 10, 10), k % 40) for k in range(4000)] + [((0, 0, 8, 8), 40)]
    text = summary(count_data("d", [boxes(*rows)], [f"c{k}" for k in range(41)]))
    assert "1 class has less than a tenth of the mean number: c40" in text
    assert "100.0 times as many as the rarest class" in text
    assert "... and 11 rarer classes" in text


def test_hostile_names_are_drawn(tmp_path):
    data = write_coco(tmp_path / "data", content=coco_content(classes=(r"$\frac{", "$", "<b>")))
    look("--dataset", f"$m$={data}", "--output", tmp_path / "out", "--images", "1")
    assert (tmp_path / "out" / "_m__images.png").is_file()


def test_hostile_names_and_one_box_make_a_picture(tmp_path):
    data = count_data("$x_{", [boxes(((0, 0, 10, 10), 0))], (r"$\frac{", "b" * 300))
    draw_histograms([data], tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] == 1320


def test_spread_over_the_data():
    rows = [boxes(((0, 0, 9, 9), 0)) | {"file_name": i} for i in range(20)] + [boxes()]
    assert [r["file_name"] for r in spread(rows, 4)] == [0, 5, 10, 15]
    assert spread([boxes()], 4) == [boxes()]


def test_unreadable_images_are_counted(tmp_path, capsys):
    data = write_coco(tmp_path / "data")
    image = tmp_path / "data" / "images" / "2.png"
    image.write_bytes(image.read_bytes()[:80])  # the header alone, which is what is checked
    look("--dataset", f"m={data}", "--output", tmp_path / "o")
    text = capsys.readouterr().out
    assert "2.png cannot be read as an image" in text
    assert "1 of 6 images could not be read and are not drawn" in text


def test_mistakes(tmp_path, capsys):
    data = write_coco(tmp_path / "data")
    out = ["--output", tmp_path / "out"]
    (tmp_path / "file").write_text("")
    for argv, message in (
        (out, "nothing to look at"),
        ([*out, "--dataset", f"m={data}x"], "does not exist"),
        ([*out, "--dataset", f"m={data}", "--images", "0"], "at least 1, got 0"),
        ([*out, "--dataset", f"m={data}", "SEED", "1"], "give --config-file FILE too"),
        ([*out, "--config-file", "none.yaml"], "none.yaml does not exist"),
        (["--dataset", f"m={data}", "--output", tmp_path / "file"], "cannot be made"),
        (["--dataset", f"m={data}"], "--output"),
    ):
        with pytest.raises(SystemExit) as stop:
            look(*argv)
        captured = capsys.readouterr()
        assert stop.value.code == 2 and "Traceback" not in captured.err
        assert "ghm-d2 look: error: " in captured.err and message in captured.err
