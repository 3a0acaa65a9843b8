"""The first loss of the published recipe, on real COCO labels with every logit at the prior.

Only two unit regions fill then, so the value follows from the labels alone. An independent port's
COCO log starts at a classification loss of 20.42 and a box loss of 2.50.
"""

import copy
import math
from statistics import median

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ghm_d2.data import check_coco_dataset, parse_dataset, register_coco_dataset
from tests import reference
from tests.detectors import small_config
from tests.tiny import unregister_all

PRIOR_LOGIT = -math.log(99)
K = 80
BATCHES = 40


@pytest.fixture(scope="module")
def first_steps(shared_dir):
    """For 40 batches of 2: the losses of a fresh model, those of each level, and its labels."""
    folder = shared_dir / "data" / "coco-mini"
    if not folder.is_dir():
        pytest.skip(f"no images at {folder}")
    name = "published_start"
    annotations = folder / "annotations" / "instances_train2017.json"
    data = parse_dataset(f"{name}={annotations},{folder / 'train2017'}")
    register_coco_dataset(check_coco_dataset(data))
    # The image sizes of the recipe: the backbone is never run, so its width has no effect.
    cfg = small_config(
        "ghm_retinanet_R_50",
        "MODEL.RETINANET.NUM_CLASSES", K,
        "DATASETS.TRAIN", (name,),
        "DATALOADER.NUM_WORKERS", 0,
    )  # fmt: skip
    assert cfg.INPUT.MIN_SIZE_TRAIN == (800,) and cfg.INPUT.MAX_SIZE_TRAIN == 1333
    torch.manual_seed(0)
    np.random.seed(0)  # of the order of the images
    model = build_model(cfg).train()
    loader = iter(build_detection_train_loader(cfg))
    try:
        return [first_step(model, next(loader)) for _ in range(BATCHES)]
    finally:
        unregister_all()


@torch.no_grad()
def first_step(model, inputs):
    (ghm_c,), (ghm_r,) = model.ghm_c, model.ghm_r
    ghm_c.acc_sum.zero_()
    ghm_r.acc_sum.zero_()
    height, width = model.preprocess_image(inputs).tensor.shape[-2:]
    assert height % 32 == width % 32 == 0
    features = [
        torch.empty(1, 1, math.ceil(height / stride), math.ceil(width / stride))
        for stride in (8, 16, 32, 64, 128)
    ]
    anchors = model.anchor_generator(features)
    labels, boxes = model.label_anchors(anchors, [x["instances"] for x in inputs])
    logits = [torch.full((len(inputs), len(a), K), PRIOR_LOGIT) for a in anchors]
    deltas = [torch.zeros(len(inputs), len(a), 4) for a in anchors]
    with EventStorage():
        losses = model.losses(anchors, logits, labels, deltas, boxes)
    level_labels = torch.stack(labels).split([len(a) for a in anchors], dim=1)
    # The same loss, called level by level as a training step: only that writes the counts.
    alone = copy.deepcopy(ghm_c)
    with torch.enable_grad():
        pairs = zip(logits, level_labels, strict=True)
        levels = [alone(x.flatten(0, 1), y.flatten()).item() for x, y in pairs]
    return {
        "cls": losses["loss_cls"].item(),
        "box": losses["loss_box_reg"].item(),
        "levels": levels,
        "labels": [y.flatten().numpy() for y in level_labels],
    }


def positives(labels):
    return int(np.count_nonzero((labels >= 0) & (labels < K)))


def oracle_level(counts, labels):
    """The oracle's loss of a level, from its two kinds of example and how many of each there are.

    Every logit being the same, the sum over them is two products.
    """
    kinds = reference.sigmoid_examples(np.full((1, 2), PRIOR_LOGIT), np.array([[1, 0]]))
    own = positives(labels)
    numbers = np.array([own, K * np.count_nonzero(labels >= 0) - own])
    region = reference.region_of(kinds.gradient_norm[0], counts.bins)
    regions = np.zeros(counts.bins, dtype=np.int64)
    np.add.at(regions, region, numbers)
    weights = counts.region_weights(regions, write=True)
    return float((numbers * weights[region] * kinds.loss[0]).sum())


def test_each_level_is_the_oracle_on_its_own_labels(first_steps):
    for step in first_steps:
        counts = reference.RunningCounts(bins=30, momentum=0.75)
        expected = [oracle_level(counts, labels) for labels in step["labels"]]
        # Sums of millions of float32 terms.
        np.testing.assert_allclose(step["levels"], expected, rtol=1e-4)
        assert step["cls"] == pytest.approx(sum(step["levels"]), rel=1e-5)


def test_oracle_by_kinds_is_the_oracle_example_by_example(first_steps):
    by_kind = reference.RunningCounts(bins=30, momentum=0.75)
    by_example = reference.ghm_c(bins=30, momentum=0.75)
    coarse = max((step["labels"][2:] for step in first_steps), key=lambda x: positives(x[0]))
    assert positives(coarse[0]) > 0
    for labels in coarse:
        logits = np.full((len(labels), K), PRIOR_LOGIT)
        loss, _ = by_example(logits, labels)
        assert oracle_level(by_kind, labels) == pytest.approx(loss, rel=1e-9)


def test_the_finest_level_is_9_2_where_it_has_positives(first_steps):
    finest = [step["levels"][0] for step in first_steps if positives(step["labels"][0])]
    assert len(finest) > BATCHES / 2
    # 1 / (1 - 0.75) = 4 times the mean of the two regions' losses.
    assert finest == pytest.approx([4 * (math.log(100) - math.log(0.99)) / 2] * len(finest), 1e-4)


def test_the_sum_is_that_of_a_published_log(first_steps):
    # The standard error of these medians is 0.8 and 0.3: the spread from batch to batch is wide.
    assert median(step["cls"] for step in first_steps) == pytest.approx(20.42, abs=2)
    assert median(step["box"] for step in first_steps) == pytest.approx(2.50, abs=0.8)
