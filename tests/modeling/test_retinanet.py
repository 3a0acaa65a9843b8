"""GHMRetinaNet: stock equality, scopes and groups against the oracle-tested losses."""

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from ghm_d2.losses import GHMCLoss, GHMRLoss
from tests.detectors import (
    NUM_CLASSES,
    TWO_IMAGES,
    assert_same_detections,
    batch,
    calibrated,
    gradients,
    same_weights,
    small_model,
    step,
)

OFF = ("MODEL.GHM.RETINANET.CLS.ENABLED", False, "MODEL.GHM.RETINANET.REG.ENABLED", False)
STOCK = ("MODEL.META_ARCHITECTURE", "RetinaNet")
K = NUM_CLASSES


def captured(model, inputs):
    """What ``model.losses`` was called with, and what it returned."""
    calls = []
    original = model.losses
    model.losses = lambda *args: calls.append((args, original(*args))) or calls[-1][1]
    with EventStorage():
        model(inputs)
    del model.losses
    return calls[0]


def by_level(args, image):
    """Logits, labels, deltas and targets of each level for a slice of images, computed plainly."""
    anchors, logits, labels, deltas, gt_boxes, transform = args
    start, out = 0, []
    for level, x in enumerate(logits):
        stop = start + x.shape[1]
        y = torch.stack([label[start:stop] for label in labels[image]])
        boxes = torch.stack([b[start:stop] for b in gt_boxes[image]])
        foreground = (y >= 0) & (y < K)
        tiled = anchors[level].tensor.expand_as(boxes)
        target = transform.get_deltas(tiled[foreground], boxes[foreground])
        out.append(
            (x[image].reshape(-1, K), y.reshape(-1), deltas[level][image][foreground], target)
        )
        start = stop
    return out


@pytest.fixture(scope="module")
def inputs():
    return batch(*TWO_IMAGES, *TWO_IMAGES[::-1])


def test_off_gives_exactly_the_stock_losses(inputs):
    stock = small_model("ghm_retinanet_R_50", *STOCK)
    ours = same_weights(stock, small_model("ghm_retinanet_R_50", *OFF, seed=1))
    for _ in range(2):
        (a, log_a), (b, log_b) = step(stock, inputs), step(ours, inputs)
        assert a == b
        assert log_a == log_b
        ga, gb = gradients(stock), gradients(ours)
        # Not bit-equal: two backward passes of one stock model are not either.
        torch.testing.assert_close(ga, gb, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["CLS", "REG"])
def test_one_part_off_gives_the_stock_loss_of_that_part(inputs, part):
    stock = small_model("ghm_retinanet_R_50", *STOCK)
    ours = same_weights(
        stock,
        small_model(
            "ghm_retinanet_R_50",
            f"MODEL.GHM.RETINANET.{part}.ENABLED",
            False,
            "SOLVER.IMS_PER_BATCH",
            4,
            seed=1,
        ),  # fmt: skip
    )
    stock_name, ghm_name = ("loss_cls", "loss_box_reg")[:: 1 if part == "CLS" else -1]
    for _ in range(2):
        (a, log_a), (b, log_b) = step(stock, inputs), step(ours, inputs)
        assert a[stock_name] == b[stock_name]
        assert a[ghm_name] != b[ghm_name]
        assert log_a["num_pos_anchors"] == log_b["num_pos_anchors"]


def test_inference_is_bit_equal_to_stock(inputs):
    keep_all = ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    stock = calibrated(small_model("ghm_retinanet_R_50", *STOCK, *keep_all), inputs)
    ours = same_weights(stock, small_model("ghm_retinanet_R_50", *keep_all, seed=1))
    assert_same_detections(stock, ours, inputs)


def test_clipping_before_nms():
    """Two boxes that agree inside the image alone, and one that lies outside it."""
    model = small_model("ghm_retinanet_R_50").eval()
    boxes = torch.tensor([[-60.0, 0, 40, 20], [0, 0, 40, 20], [-30, 0, -10, 20]])
    scores = torch.zeros(3, K)
    scores[:, 1] = torch.tensor([0.9, 0.8, 0.7])
    args = [Boxes(boxes)], [scores], [torch.zeros(3, 4)], (64, 64)
    assert torch.equal(model.inference_single_image(*args).pred_boxes.tensor, boxes)
    model = small_model("ghm_retinanet_R_50", "MODEL.GHM.CLIP_BEFORE_NMS", True).eval()
    found = model.inference_single_image(*args)
    assert found.pred_boxes.tensor.tolist() == [[0.0, 0.0, 40.0, 20.0]]
    assert found.scores.tolist() == pytest.approx([0.9]) and found.pred_classes.tolist() == [1]


@pytest.mark.parametrize("scope", ["level", "batch"])
@pytest.mark.parametrize("images_per_histogram", [0, 2, 3])
def test_losses_are_those_of_the_levels_and_groups(inputs, scope, images_per_histogram):
    model = small_model(
        "ghm_retinanet_R_50",
        "MODEL.GHM.RETINANET.SCOPE", scope,
        "MODEL.GHM.RETINANET.IMAGES_PER_HISTOGRAM", images_per_histogram,
        "SOLVER.IMS_PER_BATCH", 4,
    )  # fmt: skip
    size = images_per_histogram or 4
    groups = [slice(i, min(i + size, 4)) for i in range(0, 4, size)]
    c = [GHMCLoss(30, 0.75, 1.0) for _ in groups]
    r = [GHMRLoss(0.02, 10, 0.7, 10.0) for _ in groups]
    for _ in range(2):
        args, losses = captured(model, inputs)
        cls, reg = [], []
        for g, images in enumerate(groups):
            levels = by_level((*args, model.box2box_transform), images)
            if scope == "level":
                cls.append(sum(c[g](x, y) for x, y, _, _ in levels))
                reg.append(sum(r[g](d, t) for _, _, d, t in levels))
            else:
                x, y, d, t = map(torch.cat, zip(*levels, strict=True))
                cls.append(c[g](x, y))
                reg.append(r[g](d, t))
        torch.testing.assert_close(losses["loss_cls"], sum(cls) / len(groups))
        torch.testing.assert_close(losses["loss_box_reg"], sum(reg) / len(groups))
        for g in range(len(groups)):
            torch.testing.assert_close(model.ghm_c[g].acc_sum, c[g].acc_sum)
            torch.testing.assert_close(model.ghm_r[g].acc_sum, r[g].acc_sum)
    assert model.ghm_c[0].acc_sum.sum() > 0


def test_more_groups_than_built_for_is_refused(inputs):
    model = small_model("ghm_retinanet_R_50", "SOLVER.IMS_PER_BATCH", 2)
    with pytest.raises(ValueError, match="images_per_histogram"), EventStorage():
        model(inputs)


def test_eval_mode_and_inference_leave_the_counts_alone(inputs):
    model = small_model("ghm_retinanet_R_50", "SOLVER.IMS_PER_BATCH", 4)
    step(model, inputs)
    before = {k: v.clone() for k, v in model.state_dict().items() if "ghm_" in k}
    assert before
    with torch.no_grad():
        model.eval()(inputs)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_further_groups_start_from_the_first_ones_counts():
    one = small_model("ghm_retinanet_R_50", "SOLVER.IMS_PER_BATCH", 2)
    one.ghm_c[0].acc_sum.fill_(5.0)
    two = small_model("ghm_retinanet_R_50", "SOLVER.IMS_PER_BATCH", 4)
    missing, unexpected = two.load_state_dict(one.state_dict(), strict=False)
    assert not missing and not unexpected
    assert two.ghm_c[1].acc_sum.tolist() == [5.0] * 30


@pytest.mark.parametrize("scope", ["level", "batch"])
def test_no_object_in_the_batch(scope):
    model = small_model("ghm_retinanet_R_50", "MODEL.GHM.RETINANET.SCOPE", scope)
    losses, _ = step(model, batch([], []))
    assert losses["loss_box_reg"] == 0
    assert 0 < losses["loss_cls"] < float("inf")
    grads = gradients(model)
    assert "head.bbox_pred.weight" in grads
    assert grads["head.cls_score.weight"].abs().sum() > 0


def test_one_image_without_objects():
    losses, _ = step(small_model("ghm_retinanet_R_50"), batch(TWO_IMAGES[0], []))
    assert all(0 < v < float("inf") for v in losses.values())


def test_zero_size_box_is_a_clear_error():
    inputs = batch([[10.0, 10, 10, 40], [20.0, 20, 80, 90]], TWO_IMAGES[1])
    with pytest.raises(ValueError, match="zero-size ground-truth box"):
        step(small_model("ghm_retinanet_R_50"), inputs)


def test_nan_pixels_are_a_clear_error():
    inputs = batch(*TWO_IMAGES)
    inputs[0]["image"][0, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="logits"):
        step(small_model("ghm_retinanet_R_50"), inputs)


def test_label_out_of_range_is_a_clear_error():
    inputs = batch(*TWO_IMAGES)
    inputs[0]["instances"].gt_classes[:] = K + 2
    with pytest.raises(ValueError, match="labels"):
        step(small_model("ghm_retinanet_R_50"), inputs)


def test_unknown_scope_is_refused():
    model = small_model("ghm_retinanet_R_50")
    with pytest.raises(ValueError, match="ghm_scope"):
        type(model)(
            backbone=model.backbone,
            head=model.head,
            head_in_features=model.head_in_features,
            anchor_generator=model.anchor_generator,
            box2box_transform=model.box2box_transform,
            anchor_matcher=model.anchor_matcher,
            num_classes=K,
            pixel_mean=[0.0, 0, 0],
            pixel_std=[1.0, 1, 1],
            ghm_c=GHMCLoss(),
            ghm_r=None,
            ghm_scope="image",
        )
