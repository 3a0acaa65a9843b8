"""The default data set: what the pictures hold, and how the folder comes to be."""

import hashlib
import json
import logging
import multiprocessing
import os
from collections import Counter

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ghm_d2.data import synthetic, synthetic_images
from ghm_d2.data.synthetic import ensure_synthetic, register_synthetic
from ghm_d2.data.synthetic_images import CLASSES, IMAGE_SIZE, SPLITS, make_image
from ghm_d2.errors import UserError

# Of the first 20 pictures of each split. A change here without a new VERSION leaves users with
# pictures that the code no longer draws.
PINNED = {1: "fd6e15f48c94dbe5a0fd272f4dcc155d841324f5c0d2072f2e3d311111ba7b35"}


@pytest.fixture(scope="module")
def train() -> list:
    return [make_image("train", index) for index in range(200)]


@pytest.fixture
def few(monkeypatch):
    """A data set of five pictures, for tests of the folder."""
    monkeypatch.setattr(synthetic, "SPLITS", {"train": 3, "val": 2})


def test_pixels_and_labels_are_those_of_the_version():
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(20):
            pixels, objects = make_image(split, index)
            digest.update(pixels.tobytes())
            digest.update(repr(objects).encode())
    assert {synthetic_images.VERSION: digest.hexdigest()} == PINNED


def test_every_picture_is_another():
    pictures = [make_image(split, index)[0] for split in SPLITS for index in range(20)]
    assert pictures[0].shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and pictures[0].dtype == np.uint8
    assert len({picture.tobytes() for picture in pictures}) == 40


def test_boxes_hold_shapes_of_their_class(train):
    # The share of its box that an upright shape fills; the tilt is at most 2/64 of a turn.
    expected = {"circle": (0.71, 0.86), "square": (0.70, 1.01), "triangle": (0.45, 0.60)}
    seen = Counter()
    for _, objects in train:
        for item in objects:
            x, y, width, height = item.box
            assert min(x, y) >= 0 and x + width <= IMAGE_SIZE and y + height <= IMAGE_SIZE
            assert min(width, height) >= 7 and max(width, height) <= 38
            if item.difficulty == "clean":
                low, high = expected[CLASSES[item.category]]
                seen[item.category] += low < item.area / (width * height) < high
    clean = Counter(i.category for _, objects in train for i in objects if i.difficulty == "clean")
    # Not all: a neighbour that overlaps may hide a part of a clean object.
    assert all(seen[k] >= 0.9 * clean[k] for k in range(3)) and len(clean) == 3


def test_a_box_is_where_the_object_is_seen(train):
    """A clean object is brighter than the rim around its box; a faint one much less so."""
    steps = {"clean": [], "faint": []}
    for pixels, objects in train:
        for item in objects:
            x, y, width, height = item.box
            if item.difficulty in steps and min(x, y, 127 - x - width, 127 - y - height) > 4:
                rim = pixels[y - 4 : y + height + 4, x - 4 : x + width + 4].astype(float)
                rim[4:-4, 4:-4] = np.nan
                middle = pixels[y + height // 2, x + width // 2].astype(float)
                # The channel of its hue is the one that differs most.
                steps[item.difficulty].append((middle - np.nanmedian(rim, axis=(0, 1))).max())
    assert np.percentile(steps["clean"], 5) > 55
    assert 10 < np.median(steps["faint"]) < 45


def test_positives_are_few_and_one_class_is_rare(train):
    per_image = [len(objects) for _, objects in train]
    assert min(per_image) == 0 and max(per_image) == 4 and 1.8 < np.mean(per_image) < 2.6
    classes = Counter(CLASSES[item.category] for _, objects in train for item in objects)
    share = {name: count / sum(classes.values()) for name, count in classes.items()}
    assert 0.64 < share["circle"] < 0.80 and 0.13 < share["square"] < 0.28
    assert 0.04 < share["triangle"] < 0.12
    kinds = Counter(item.difficulty for _, objects in train for item in objects)
    assert set(kinds) == set(synthetic_images.DIFFICULTY_PERCENT)
    assert 0.65 < kinds["clean"] / sum(kinds.values()) < 0.85


def test_the_folder_holds_what_is_drawn(tmp_path, few):
    folder = ensure_synthetic(tmp_path)
    assert folder == tmp_path / "ghm_synthetic"
    for split, size in (("train", 3), ("val", 2)):
        content = json.loads((folder / "annotations" / f"{split}.json").read_text())
        assert [c["name"] for c in content["categories"]] == list(CLASSES)
        assert len(content["images"]) == size
        for index, image in enumerate(content["images"]):
            pixels, objects = make_image(split, index)
            assert np.array_equal(Image.open(folder / split / image["file_name"]), pixels)
            rows = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            assert [tuple(a["bbox"]) for a in rows] == [item.box for item in objects]
            assert [a["category_id"] - 1 for a in rows] == [item.category for item in objects]
            assert [a["area"] for a in rows] == [item.area for item in objects]


def test_a_second_call_writes_nothing_and_a_new_version_everything(
    tmp_path, few, monkeypatch, caplog
):
    picture = ensure_synthetic(tmp_path) / "train" / "000000.png"
    picture.write_bytes(b"mark")
    ensure_synthetic(tmp_path)
    assert picture.read_bytes() == b"mark"
    monkeypatch.setattr(synthetic, "VERSION", -1)
    with caplog.at_level(logging.WARNING):
        ensure_synthetic(tmp_path)
    assert np.array_equal(Image.open(picture), make_image("train", 0)[0])
    assert "another version" in caplog.text


def test_a_folder_of_someone_else_is_left_alone(tmp_path, few):
    stranger = tmp_path / "ghm_synthetic" / "notes.txt"
    stranger.parent.mkdir()
    stranger.write_text("mine")
    with pytest.raises(UserError, match="not written by ghm_d2: move it away"):
        ensure_synthetic(tmp_path)
    assert stranger.read_text() == "mine"


def test_an_interrupted_generation_leaves_no_folder(tmp_path, few, monkeypatch):
    def interrupted(split, index):
        if (split, index) == ("val", 1):
            raise KeyboardInterrupt
        return make_image(split, index)

    monkeypatch.setattr(synthetic, "make_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_synthetic(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["ghm_synthetic.lock"]


def test_no_write_access_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .* set DETECTRON2_DATASETS"):
        ensure_synthetic(tmp_path / "file")


def _ask(root, start) -> None:
    start.wait()
    ensure_synthetic(root)


def test_of_processes_that_ask_at_once_one_generates(tmp_path, few, monkeypatch):
    def counted(folder, write=synthetic._write):
        (tmp_path / f"writer-{os.getpid()}").touch()
        write(folder)

    monkeypatch.setattr(synthetic, "_write", counted)
    context = multiprocessing.get_context("fork")  # the children keep the patches
    start, root = context.Barrier(3), tmp_path / "datasets"
    children = [context.Process(target=_ask, args=(root, start)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(600)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert len(list(tmp_path.glob("writer-*"))) == 1
    assert sorted(p.name for p in root.iterdir()) == ["ghm_synthetic", "ghm_synthetic.lock"]


def test_registered_data_is_generated_when_asked_for(tmp_path, few, monkeypatch):
    names = ["ghm_synthetic_train", "ghm_synthetic_val"]
    before = {name: DatasetCatalog.pop(name) for name in names}
    metadata = {name: MetadataCatalog.pop(name) for name in names}
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    try:
        register_synthetic()
        register_synthetic()
        assert not (tmp_path / "ghm_synthetic").exists()
        known = MetadataCatalog.get("ghm_synthetic_val")
        assert known.evaluator_type == "coco" and known.thing_classes == list(CLASSES)
        assert known.json_file == str(tmp_path / "ghm_synthetic" / "annotations" / "val.json")
        for name, split, size in zip(names, SPLITS, (3, 2), strict=True):
            dicts = DatasetCatalog.get(name)
            assert len(dicts) == size
            for index, entry in enumerate(dicts):
                _, objects = make_image(split, index)
                assert [a["category_id"] for a in entry["annotations"]] == [
                    item.category for item in objects
                ]
                assert os.path.isfile(entry["file_name"])
    finally:
        for name in names:
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name)
            DatasetCatalog.register(name, before[name])
            MetadataCatalog[name] = metadata[name]
