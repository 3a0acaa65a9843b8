"""Anchors against boxes: the measure, the suggestion, and the line of the log."""

import logging
import shlex

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.structures import Boxes, BoxMode, pairwise_iou

from ghm_d2.config import add_ghm_config
from ghm_d2.data.anchor_check import (
    AnchorSettings,
    anchor_report,
    configured_anchors,
    log_anchor_fit,
)
from ghm_d2.data.anchors import Anchors, InputSize, best_shape_iou, suggest
from ghm_d2.engine.python_config import load_config, read_anchors
from ghm_d2.engine.trainer import GHMTrainer
from tests.tiny import ROOT

RETINANET = "configs/ghm_retinanet_R_50.yaml"
FASTER = "configs/ghm_faster_rcnn_R_50.yaml"
PYTHON_TWINS = ["configs/lazy/ghm_retinanet_R_50.py", "configs/lazy/ghm_faster_rcnn_R_50.py"]


def config(file=RETINANET, *pairs):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(str(ROOT / file), allow_unsafe=False)
    cfg.merge_from_list(list(pairs))
    return cfg


def settings(file=RETINANET, *pairs):
    """What a config of either kind says of anchors and resize."""
    if not file.endswith(".py"):
        return AnchorSettings.of(config(file, *pairs))
    return read_anchors(load_config(str(ROOT / file), pairs))


def square(*sizes, stride=0, ratios=(1.0,)):
    levels = tuple((float(size),) for size in sizes)
    return Anchors(levels, (ratios,) * len(levels), (stride,) * len(levels))


def records(sides, image=(800, 800), number=20):
    rows = [{"bbox": [5, 5, *sides], "bbox_mode": BoxMode.XYWH_ABS}] * number
    return [{"width": image[0], "height": image[1], "annotations": rows}]


def test_iou_of_shapes():
    boxes = np.array([(32, 32), (16, 64), (64, 64), (8, 8)])
    iou = best_shape_iou(boxes, square(32))
    np.testing.assert_allclose(iou, [1, 512 / 1536, 1 / 4, 1 / 16])
    assert best_shape_iou(boxes, square(32, ratios=(1.0, 4.0)))[1] == pytest.approx(1)
    # A quarter of a stride aside: 24 x 24 of 32 x 32 overlap.
    shifted = best_shape_iou(boxes[:1], square(32, stride=32))
    assert shifted[0] == pytest.approx(576 / (2 * 1024 - 576))
    assert best_shape_iou(boxes[3:], square(8, stride=128))[0] == 0


@pytest.mark.parametrize(
    ("file", "levels"), [(RETINANET, range(3, 8)), (FASTER, range(2, 7))], ids=["retinanet", "rpn"]
)
def test_the_measure_is_what_the_real_anchors_reach(file, levels):
    """Against Detectron2's anchors and IoU: between the best and the worst place of a box."""
    cfg = config(file)
    shapes = [ShapeSpec(channels=1, stride=2**level) for level in levels]
    grid = [torch.zeros(1, 1, 256 >> level, 256 >> level) for level in levels]
    real = Boxes.cat(build_anchor_generator(cfg, shapes)(grid))
    rng = np.random.default_rng(0)
    for width, height in ((20, 20), (40, 70), (150, 90)):
        x, y = rng.uniform(40, 72, (2, 100))
        placed = torch.tensor(np.stack([x, y, x + width, y + height], axis=1), dtype=torch.float32)
        reached = pairwise_iou(Boxes(placed), real).max(dim=1).values
        estimate = best_shape_iou(np.array([(width, height)]), configured_anchors(cfg))[0]
        assert reached.min() <= estimate <= reached.max() + 1e-6
        assert abs(reached.mean() - estimate) < 0.06


def test_resize_is_detectron2s():
    size = InputSize((400,), 600)
    boxes, images = np.array([(10, 20), (10, 20)]), np.array([(800, 800), (2000, 500)])
    np.testing.assert_allclose(size.resize(boxes, images), [(5, 10), (3, 6)])
    assert InputSize((0,), 600).resize(boxes, images).tolist() == boxes.tolist()
    both = InputSize((400, 800), 9999).resize(boxes, np.array([(800, 800)] * 2))
    np.testing.assert_allclose(both, [(5, 10), (10, 20)])


@pytest.mark.parametrize(
    ("anchors", "sides", "changes"),
    [
        (square(32, 64), (8, 8), {"sizes"}),
        (square(32, 64), (300, 300), {"sizes"}),
        (square(16, 32, 64), (120, 12), {"ratios"}),
        (square(32, 64, stride=32), (14, 14), {"sizes", "input"}),
    ],
)
def test_suggestions_fit_and_change_only_what_they_must(anchors, sides, changes):
    # Boxes within 10 % of a size.
    boxes = np.array(sides) * np.random.default_rng(0).uniform(0.9, 1.1, (200, 2))
    images = np.full((200, 2), 800)
    size = InputSize((800,), 1333)
    assert (best_shape_iou(size.resize(boxes, images), anchors) >= 0.5).mean() < 0.5
    found = suggest(boxes, images, anchors, size)
    reached = best_shape_iou(found.input_size.resize(boxes, images), found.anchors)
    assert found.share == (reached >= 0.5).mean() >= 0.8
    assert ("input" in changes) == (found.input_size != size)
    assert ("ratios" in changes) == (found.anchors.ratios != anchors.ratios)
    assert "sizes" not in changes or found.anchors.sizes != anchors.sizes


def test_a_python_config_says_the_same():
    for yaml, python in zip((RETINANET, FASTER), PYTHON_TWINS, strict=True):
        one, other = settings(yaml), settings(python)
        np.testing.assert_allclose(one.anchors.shapes(), other.anchors.shapes())
        assert one.input_size == other.input_size
    for words in (
        ["dataloader.train.mapper.augmentations.0._target_=ghm_d2.data.Nothing"],
        ["model.anchor_generator._target_=detectron2.modeling.anchor_generator.Rotated"],
    ):
        assert settings(PYTHON_TWINS[0], *words) is None
    step = "dataloader.train.mapper.augmentations.0"
    drawn = (f"{step}.short_edge_length=[400, 600]", f"{step}.sample_style=range")
    assert settings(PYTHON_TWINS[0], *drawn).input_size == InputSize((400, 500, 600), 1333)


def test_nothing_fits_a_hair():
    boxes, images = np.full((50, 2), 0.5), np.full((50, 2), 800)
    assert suggest(boxes, images, square(256, stride=64), InputSize((0,), 1333)) is None


@pytest.mark.parametrize("file", [RETINANET, FASTER, *PYTHON_TWINS])
@pytest.mark.parametrize(
    ("sides", "image"), [((7, 7), (800, 800)), ((60, 4), (800, 800)), ((40, 40), (4000, 4000))]
)
def test_the_words_of_the_warning_mend_it(file, sides, image):
    """Put into the config as the log says them, the pairs fit as many boxes as it promised."""
    data = records(sides, image)
    text, fits = anchor_report(settings(file), data)
    assert not fits and text.startswith("Most boxes have no anchor that fits: only 0% of 20 boxes")
    share, _, words = text.partition("With these settings it would be ")[2].partition("%: ")
    again, fits = anchor_report(settings(file, *shlex.split(words)), data)
    assert fits and again.startswith(f"{share}% of 20 boxes")


def test_no_warning_for_what_fits_or_has_no_anchors(caplog):
    with caplog.at_level(logging.INFO, "ghm_d2"):
        log_anchor_fit(settings(), records((100, 100)))
        log_anchor_fit(settings(), [{"width": 8, "height": 8, "annotations": []}])
        rotated = config(FASTER, "MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator")
        log_anchor_fit(AnchorSettings.of(rotated), records((1, 1)))
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "100% of 20 boxes have an anchor" in caplog.text


def test_one_list_stands_for_all_levels_and_unknown_strides_for_none():
    cfg = config(RETINANET, "MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16]])
    anchors = configured_anchors(cfg)
    assert anchors.sizes == ((8, 16),) * 5 and anchors.strides == (8, 16, 32, 64, 128)
    cfg.MODEL.RETINANET.IN_FEATURES = ["a", "b", "c", "d", "p7"]
    assert configured_anchors(cfg).strides == (0, 0, 0, 0, 128)


def test_crowds_and_empty_boxes_do_not_count_and_many_boxes_are_sampled():
    data = records((100, 100))
    data[0]["annotations"] = [
        {"bbox": [0, 0, 3, 3], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 1},
        {"bbox": [0, 0, 3, 0], "bbox_mode": BoxMode.XYWH_ABS},
        {"bbox": [0, 0, 100, 100], "bbox_mode": BoxMode.XYXY_ABS},
    ]
    assert anchor_report(settings(), data)[0].startswith("100% of 1 boxes have")
    many = anchor_report(settings(), records((100, 100), number=1000) * 50)[0]
    assert many.startswith("100% of 17,000 boxes (1 image in 3) have")


def test_training_says_it_before_it_starts(monkeypatch, caplog):
    """The loader asks, with the records that it loads."""
    cfg = config(RETINANET, "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 1)
    cfg.DATASETS.TRAIN = ("small_boxes",)
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    DatasetCatalog.register("small_boxes", lambda: [r | {"file_name": ""} for r in records((7, 7))])
    try:
        GHMTrainer.build_train_loader(cfg)
    finally:
        DatasetCatalog.remove("small_boxes")
    assert "Most boxes have no anchor that fits" in caplog.text
