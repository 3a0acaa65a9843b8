"""MODEL.GHM.AUGMENTATIONS: what it builds, what it refuses, and that images and boxes follow it."""

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T

from ghm_d2.cli.look import main as look
from ghm_d2.data.anchor_check import AnchorSettings, anchor_report
from ghm_d2.data.augmentation import AUGMENTATIONS, build_augmentations, train_augmentations
from ghm_d2.data.loader import build_train_mapper
from ghm_d2.engine import main, python_build
from ghm_d2.engine.python_config import load_config
from tests.detectors import small_config
from tests.tiny import (
    PYTHON_CONFIG,
    RETINANET,
    forget_program,
    one_sentence,
    tiny_pairs,
    write_coco,
)

JITTER = "ResizeScale(0.5, 0.5, 128, 128), FixedSizeCrop((128, 96))"


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


def kinds(*pairs):
    cfg = small_config("ghm_retinanet_R_50", *tiny_pairs(), *pairs)
    return [type(aug).__name__ for aug in train_augmentations(cfg)]


def test_what_sets_the_size_or_flips_takes_the_place_of_detectron2_s():
    key = "MODEL.GHM.AUGMENTATIONS"
    assert kinds() == ["ResizeShortestEdge", "RandomFlip"]
    assert kinds(key, "RandomBrightness(0.8, 1.2)") == [
        "RandomBrightness", "ResizeShortestEdge", "RandomFlip",
    ]  # fmt: skip
    assert kinds(key, JITTER) == ["ResizeScale", "FixedSizeCrop", "RandomFlip"]
    assert kinds(key, "RandomFlip(vertical=True, horizontal=False)") == [
        "RandomFlip", "ResizeShortestEdge",
    ]  # fmt: skip
    assert kinds(key, "RandomContrast(1, 1)", "INPUT.CROP.ENABLED", "True") == [
        "RandomContrast", "RandomCrop", "ResizeShortestEdge", "RandomFlip",
    ]  # fmt: skip


def test_anchors_are_not_judged_by_a_size_that_images_do_not_have(tmp_path):
    records = [record(tmp_path)]
    for text, silent in ((JITTER, True), ("RandomFlip()", False)):
        cfg = small_config("ghm_retinanet_R_50", *tiny_pairs(), "MODEL.GHM.AUGMENTATIONS", text)
        assert (anchor_report(AnchorSettings.of(cfg), records)[0] == "") is silent


def test_all_that_detectron2_has_for_images_are_known():
    assert {
        "FixedSizeCrop", "RandomApply", "RandomBrightness", "RandomContrast", "RandomCrop",
        "RandomExtent", "RandomFlip", "RandomLighting", "RandomRotation", "RandomSaturation",
        "Resize", "ResizeScale", "ResizeShortestEdge",
    } <= set(AUGMENTATIONS)  # fmt: skip
    (made,) = build_augmentations("T.RandomApply(RandomRotation([-10, 10]), prob=0.5)", "KEY")
    assert isinstance(made, T.RandomApply) and made.prob == 0.5
    assert made.aug.angle == [-10, 10]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("RandomBrighness(0.8, 1.2)", "similar: RandomBrightness"),
        ("MinIoURandomCrop()", "is not an augmentation of images in Detectron2"),
        (
            "RandomBrightness(0.8)",
            "are RandomBrightness(intensity_min, intensity_max)",
        ),
        ("RandomBrightness(0.8, 1.2, 3)", "its arguments are RandomBrightness(intensity_min"),
        ("RandomRotation(angel=[1, 2])", "its arguments are RandomRotation(angle"),
        ("ResizeShortestEdge([64], sample_style='x')", "cannot be built (AssertionError: x)"),
        ("RandomCrop('relative', 3)", "fails on a test image of 128 x 96 pixels"),
        ("RandomApply('x')", "cannot be built"),
        ("RandomBrightness(0.8, 1.2", "not of the form NAME(ARGUMENTS)"),
        ("RandomBrightness(a, b)", "not of the form NAME(ARGUMENTS)"),
        ("__import__('os').system('true')", "is not an augmentation of images in Detectron2"),
        ("7", "not of the form"),
    ],
)
def test_mistakes_are_named_before_training(text, words):
    with pytest.raises(ValueError) as error:
        build_augmentations(text, "KEY")
    assert str(error.value).startswith("KEY") and words in str(error.value)


def test_training_refuses_before_it_begins(tmp_path, capsys):
    pairs = tiny_pairs(OUTPUT_DIR=tmp_path, MODEL__GHM__AUGMENTATIONS="RandomFlop()")
    argv = ["--config-file", RETINANET, "--dataset", f"a={write_coco(tmp_path)}", *pairs]
    assert "RandomFlop" in one_sentence(main, argv, capsys, "train_net.py")


def record(tmp_path):
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[16:48, 8:24] = 255  # a box that is white
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    box = {"bbox": [8, 16, 24, 48], "bbox_mode": 0, "category_id": 0, "iscrowd": 0}
    return {"file_name": str(tmp_path / "a.png"), "height": 64, "width": 64, "annotations": [box]}


def white_box(image):
    y, x = np.nonzero(image.numpy().max(0) > 200)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


@pytest.mark.parametrize(
    "augmentations",
    [
        JITTER,
        "RandomRotation([90, 90]), RandomFlip(prob=1.0)",
        "RandomExtent((2, 2), (0, 0))",
    ],
)
def test_boxes_follow_their_objects(tmp_path, augmentations):
    cfg = small_config(
        "ghm_retinanet_R_50", *tiny_pairs(), "MODEL.GHM.AUGMENTATIONS", augmentations,
        "INPUT.MIN_SIZE_TRAIN", "(64,)",
    )  # fmt: skip
    sample = build_train_mapper(cfg)(record(tmp_path))
    (box,) = sample["instances"].gt_boxes.tensor.tolist()
    assert box == pytest.approx(white_box(sample["image"]), abs=1.5)
    if augmentations == JITTER:
        assert tuple(sample["image"].shape[1:]) == (128, 96)


def test_colours_change(tmp_path):
    cfg = small_config(
        "ghm_retinanet_R_50", *tiny_pairs(),
        "MODEL.GHM.AUGMENTATIONS", "RandomBrightness(0.5, 0.5)",
    )  # fmt: skip
    assert build_train_mapper(cfg)(record(tmp_path))["image"].max() == 127


def test_python_configs_take_texts_too(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        PYTHON_CONFIG + "dataloader.train.mapper.augmentations.insert(0, 'RandomContrast(1, 1)')\n"
    )
    mapper = python_build.build_train_mapper(load_config(str(file)))
    names = [type(aug).__name__ for aug in mapper.augmentations.augs]
    assert names == ["RandomContrast", "ResizeShortestEdge", "RandomFlip"]
    file.write_text(PYTHON_CONFIG + "dataloader.train.mapper.augmentations.append('Nothing')\n")
    with pytest.raises(ValueError, match="augmentations 'Nothing': Nothing is not an augmentation"):
        python_build.build_train_mapper(load_config(str(file)))


def test_look_draws_what_the_detector_will_see(tmp_path, capsys):
    data = write_coco(tmp_path / "data")
    words = [
        "--config-file", RETINANET, "--dataset", f"m={data}", "--output", str(tmp_path / "out"),
        "--augmented",
    ]  # fmt: skip
    look([*words, *tiny_pairs(), "MODEL.GHM.AUGMENTATIONS", JITTER])
    picture = cv2.imread(str(tmp_path / "out" / "m_augmented.png"))
    assert picture is not None and picture.shape[1] == 4 * 408 + 8
    assert "m_augmented.png" in capsys.readouterr().out
    forget_program()
    assert "give --config-file FILE" in one_sentence(look, words[2:], capsys, "ghm-d2 look")
