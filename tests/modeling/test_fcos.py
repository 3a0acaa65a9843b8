"""GHMFCOS: stock equality, and its classification loss against GHM-C on plainly cut levels."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage

from ghm_d2.losses import GHMCLoss
from ghm_d2.modeling import GHMFCOS
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

K = NUM_CLASSES


def small_fcos(cls=GHMFCOS, seed=0, **kwargs):
    backbone = small_model("ghm_retinanet_R_50", seed=seed).backbone
    shapes = [ShapeSpec(channels=16)] * 5
    return cls(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, num_classes=K, conv_dims=[16]),
        num_classes=K,
        test_score_thresh=0.0,
        pixel_mean=[103.5, 116.3, 123.7],
        pixel_std=[57.0, 57.0, 57.0],
        **kwargs,
    ).train()


@pytest.fixture(scope="module")
def inputs():
    return batch(*TWO_IMAGES)


def test_off_gives_exactly_the_stock_losses(inputs):
    stock = small_fcos(FCOS)
    ours = same_weights(stock, small_fcos(ghm_c=None, seed=1))
    for _ in range(2):
        (a, log_a), (b, log_b) = step(stock, inputs), step(ours, inputs)
        assert a == b and log_a == log_b


def test_on_changes_the_classification_loss_alone(inputs):
    stock = small_fcos(FCOS)
    ours = same_weights(stock, small_fcos(ghm_c=GHMCLoss(), seed=1))
    for _ in range(2):
        (a, log_a), (b, log_b) = step(stock, inputs), step(ours, inputs)
        assert list(a) == list(b) and log_a == log_b
        assert {name for name in a if a[name] != b[name]} == {"loss_fcos_cls"}
    assert gradients(ours)["head.cls_score.weight"].abs().sum() > 0


@pytest.mark.parametrize("images", [0, 1])
def test_the_loss_is_ghm_c_level_by_level(inputs, images):
    groups = [slice(0, 2)] if not images else [slice(0, 1), slice(1, 2)]
    model = small_fcos(
        ghm_c=GHMCLoss(), images_per_histogram=images, num_histogram_groups=len(groups)
    )
    calls, original = [], model.losses
    model.losses = lambda *args: calls.append(args) or original(*args)
    single = [GHMCLoss() for _ in groups]
    for _ in range(2):
        with EventStorage():
            found = model(inputs)["loss_fcos_cls"]
        _, logits, labels, *_ = calls[-1]
        labels = torch.stack(labels).split([x.shape[1] for x in logits], dim=1)
        expected = sum(
            loss(x[group].reshape(-1, K), y[group].reshape(-1))
            for loss, group in zip(single, groups, strict=True)
            for x, y in zip(logits, labels, strict=True)
        )
        torch.testing.assert_close(found, expected / len(groups))
    assert torch.equal(model.ghm_c[0].acc_sum, single[0].acc_sum)
    assert any((y < K).any() for y in labels)


def test_iou_targets(inputs):
    model = small_fcos(ghm_c=GHMCLoss(), ghm_scope="batch", cls_targets="iou")
    with torch.no_grad():
        model.head.bbox_pred.bias.fill_(0.4)  # distances; at 0 no box has an area
    calls, original = [], model.losses
    model.losses = lambda *args: calls.append(args) or original(*args)
    with EventStorage():
        found = model(inputs)["loss_fcos_cls"]
    anchors, logits, labels, deltas, gt_boxes, _ = calls[-1]
    x, y, d = torch.cat(logits, 1), torch.stack(labels), torch.cat(deltas, 1)
    targets = torch.zeros_like(x)
    points = torch.cat([a.tensor for a in anchors])
    for n, i in (y < K).nonzero().tolist():
        box = model.box2box_transform.apply_deltas(d[n, i][None], points[i][None])
        targets[n, i, y[n, i]] = pairwise_iou(Boxes(box), Boxes(gt_boxes[n][i][None])).item()
    assert targets.unique().numel() > 10 and 0 < targets.max() < 1
    torch.testing.assert_close(found, GHMCLoss()(x.flatten(0, 1), targets.flatten(0, 1)))
    with pytest.raises(ValueError, match="cls_targets must be one of .*, got 'giou'"):
        small_fcos(ghm_c=None, cls_targets="giou")


def test_inference_is_bit_equal_to_stock_and_leaves_the_counts_alone(inputs):
    stock = calibrated(small_fcos(FCOS), inputs)
    ours = same_weights(stock, small_fcos(ghm_c=GHMCLoss(), seed=1))
    assert_same_detections(stock, ours, inputs)
    assert ours.ghm_c[0].acc_sum.sum() == 0


def test_nan_pixels_are_a_clear_error():
    inputs = batch(*TWO_IMAGES)
    inputs[0]["image"][0, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="logits"):
        step(small_fcos(ghm_c=GHMCLoss()), inputs)


def test_it_learns(inputs):
    """The classes' scores at points of objects rise against those at points of background."""
    model = small_fcos(ghm_c=GHMCLoss(bias_correction=True))
    seen, original = [], model.losses
    model.losses = lambda *args: seen.append(args[1:3]) or original(*args)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    margins = []
    for _ in range(15):
        step(model, inputs)
        logits, labels = torch.cat(seen[-1][0], dim=1).detach(), torch.stack(seen[-1][1])
        positive = labels < K
        own = logits[positive].gather(1, labels[positive].unsqueeze(1))
        margins.append((own.mean() - logits[~positive].mean()).item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    assert abs(margins[0]) < 0.1 and margins[-1] > 0.3
