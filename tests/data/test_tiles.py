"""ghm-d2 tile-data: tiles hold the objects that lie in them, and what is lost is counted."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from ghm_d2.cli.tile_data import main
from ghm_d2.data import register_datasets
from tests.tiny import forget_program, one_sentence

pytest.importorskip("sahi")


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


def write(folder: Path, *boxes, polygon=None, size=(200, 120)):
    """One image, black but for its boxes, and its file."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    rows = []
    for number, (x, y, w, h) in enumerate(boxes, start=1):
        pixels[y : y + h, x : x + w] = 255
        rows.append({"id": number, "image_id": 1, "category_id": 1, "bbox": [x, y, w, h]})
        rows[-1] |= {"area": w * h, "iscrowd": 0}
    if polygon:
        rows[0]["segmentation"] = [polygon]
    folder.mkdir(exist_ok=True)
    cv2.imwrite(str(folder / "a.png"), pixels)
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": rows,
    }
    (folder / "a.json").write_text(json.dumps(content))
    return f"big={folder}/a.json,{folder}"


def tile(tmp_path, data, *more):
    main(["--dataset", data, "--output-dir", str(tmp_path / "out"), *more])
    return json.loads((tmp_path / "out" / "big.json").read_text())


def test_each_tile_holds_what_lies_in_it(tmp_path, capsys):
    data = write(tmp_path / "in", (10, 10, 20, 20), (90, 30, 40, 20), (150, 80, 30, 30))
    content = tile(tmp_path, data, "--side", "100", "--overlap", "0.2")
    assert {(row["width"], row["height"]) for row in content["images"]} == {(100, 100)}
    names = {row["id"]: row["file_name"] for row in content["images"]}
    for image in content["images"]:  # the white of a tile is exactly its boxes
        pixels = cv2.imread(str(tmp_path / "out" / "big" / image["file_name"]))[:, :, 0]
        drawn = np.zeros_like(pixels)
        for row in content["annotations"]:
            if row["image_id"] == image["id"]:
                x, y, w, h = map(int, row["bbox"])
                drawn[y : y + h, x : x + w] = 255
        assert (pixels == drawn).mean() > 0.98, names[image["id"]]
    text = capsys.readouterr().out
    assert "3 objects became" in text and "0 are in no tile" in text
    (found,) = register_datasets([f"cut={tmp_path}/out/big.json,{tmp_path}/out/big"])
    assert found.classes == ("cell",)


def test_parts_that_are_next_to_nothing_are_left_out(tmp_path):
    # Tiles begin at 0, 90 and 100: of 44 columns the first has 4, the last one 40.
    data = write(tmp_path / "in", (96, 10, 44, 20))
    content = tile(tmp_path, data, "--tile", "100", "--overlap", "0.1")
    widths = sorted(row["bbox"][2] for row in content["annotations"] if row["bbox"][1] == 10)
    assert widths == [40, 44]


def test_polygons_are_cut_too(tmp_path):
    data = write(tmp_path / "in", (80, 20, 40, 40), polygon=[80, 20, 120, 20, 120, 60, 80, 60])
    content = tile(tmp_path, data, "--side", "100", "--overlap", "0")
    row = next(row for row in content["annotations"] if row["bbox"][0] == 80)
    assert row["bbox"] == [80, 20, 20, 40] and row["area"] == 800
    x, y = np.reshape(row["segmentation"][0], (-1, 2)).T
    assert (x.min(), x.max(), y.min(), y.max()) == (80, 100, 20, 60)


def test_small_images_stay_whole_and_nothing_is_overwritten(tmp_path, capsys):
    data = write(tmp_path / "in", (10, 10, 20, 20))
    content = tile(tmp_path, data, "--side", "640")
    assert [row["bbox"] for row in content["annotations"]] == [[10, 10, 20, 20]]
    argv = ["--dataset", data, "--output-dir", tmp_path / "out"]
    assert "exists already" in one_sentence(main, argv, capsys, "ghm-d2 tile-data")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--side", "9"], "at least 32 pixels, got 9"),
        (["--overlap", "1"], "in [0, 0.9), got 1"),
        (["SEED", "1"], "SEED is not an option"),
    ],
)
def test_mistakes(tmp_path, capsys, more, words):
    argv = ["--dataset", write(tmp_path, (1, 1, 9, 9)), "--output-dir", tmp_path / "o", *more]
    assert words in one_sentence(main, argv, capsys, "ghm-d2 tile-data")


def test_without_sahi_there_is_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sahi", None)
    argv = ["--dataset", write(tmp_path, (1, 1, 9, 9)), "--output-dir", tmp_path / "o"]
    assert "pip install 'ghm_d2[tiles]'" in one_sentence(main, argv, capsys, "ghm-d2 tile-data")
