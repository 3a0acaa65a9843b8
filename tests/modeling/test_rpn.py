"""GHMRPN: stock equality and values against the losses."""

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from ghm_d2.losses import GHMCLoss, GHMRLoss
from tests.detectors import TWO_IMAGES, batch, same_weights, small_model, step

FASTER = "ghm_faster_rcnn_R_50"
ON = ("MODEL.GHM.RPN.CLS.ENABLED", True, "MODEL.GHM.RPN.REG.ENABLED", True)


def rpn(*opts):
    return small_model(FASTER, *opts).proposal_generator


def arguments(module, seed=0, positives=9):
    """Random predictions and labels of two levels and two images for ``RPN.losses``."""
    g = torch.Generator().manual_seed(seed)
    sizes = [40, 12]
    corner = torch.rand(sum(sizes), 2, generator=g) * 60
    boxes = torch.cat([corner, corner + 8 + torch.rand(sum(sizes), 2, generator=g) * 30], dim=1)
    anchors = [Boxes(b) for b in boxes.split(sizes)]
    logits = [torch.randn(2, n, generator=g, requires_grad=True) for n in sizes]
    deltas = [torch.randn(2, n, 4, generator=g, requires_grad=True) for n in sizes]
    labels = []
    for _ in range(2):
        label = torch.full((sum(sizes),), -1)
        order = torch.randperm(sum(sizes), generator=g)
        label[order[:positives]] = 1
        label[order[positives:35]] = 0
        labels.append(label.to(torch.int8))
    gt_boxes = [boxes + torch.rand(boxes.shape, generator=g) * 6 - 3 for _ in range(2)]
    return anchors, logits, labels, deltas, gt_boxes


def losses_of(module, args):
    with EventStorage():
        return module.losses(*args)


def test_off_gives_exactly_the_stock_losses():
    ours, stock = rpn(), rpn("MODEL.PROPOSAL_GENERATOR.NAME", "RPN")
    args = arguments(ours)
    assert losses_of(ours, args) == losses_of(stock, args)


@pytest.mark.parametrize("part", ["CLS", "REG"])
def test_one_part_off_keeps_its_stock_loss(part):
    ours = rpn(*ON, f"MODEL.GHM.RPN.{part}.ENABLED", False)
    args = arguments(ours)
    a, b = losses_of(ours, args), losses_of(rpn("MODEL.PROPOSAL_GENERATOR.NAME", "RPN"), args)
    kept, replaced = ("loss_rpn_cls", "loss_rpn_loc")[:: 1 if part == "CLS" else -1]
    assert a[kept] == b[kept] and a[replaced] != b[replaced]


def test_values_are_those_of_the_losses_over_the_sampled_anchors():
    weight = (
        "MODEL.GHM.RPN.CLS.LOSS_WEIGHT", 1.0,
        "MODEL.GHM.RPN.REG.LOSS_WEIGHT", 1.0,
    )  # fmt: skip
    module = rpn(*ON, *weight)
    anchors, logits, labels, deltas, gt_boxes = args = arguments(module)
    c, r = GHMCLoss(30, 0.75), GHMRLoss(0.02, 10, 0.7)
    x, t, d, target = [], [], [], []
    flat_logits, flat_deltas = torch.cat(logits, 1), torch.cat(deltas, 1)
    all_anchors = Boxes.cat(anchors).tensor
    for n in range(2):
        for i, label in enumerate(labels[n].tolist()):
            if label >= 0:
                x.append(flat_logits[n, i])
                t.append(float(label))
            if label == 1:
                d.append(flat_deltas[n, i])
                pair = all_anchors[i : i + 1], gt_boxes[n][i : i + 1]
                target.append(module.box2box_transform.get_deltas(*pair)[0])
    for _ in range(2):
        out = losses_of(module, args)
        expected = c(torch.stack(x)[:, None], torch.tensor(t)[:, None])
        torch.testing.assert_close(out["loss_rpn_cls"], expected)
        torch.testing.assert_close(out["loss_rpn_loc"], r(torch.stack(d), torch.stack(target)))


def test_stock_loss_weights_still_apply():
    plain, scaled = rpn(*ON), rpn(*ON, "MODEL.RPN.LOSS_WEIGHT", 3.0)
    args = arguments(plain)
    a, b = losses_of(plain, args), losses_of(scaled, args)
    for name in a:
        torch.testing.assert_close(b[name], 3 * a[name])


def test_no_positive_gives_a_zero_box_loss_on_the_graph():
    module = rpn(*ON)
    args = arguments(module, positives=0)
    out = losses_of(module, args)
    sum(out.values()).backward()
    assert out["loss_rpn_loc"] == 0 and out["loss_rpn_cls"] > 0
    assert all(d.grad.abs().sum() == 0 for d in args[3])
    assert all(x.grad.abs().sum() > 0 for x in args[1])


def test_whole_model_off_equals_stock():
    inputs = batch(*TWO_IMAGES)
    stock = small_model(FASTER, "MODEL.PROPOSAL_GENERATOR.NAME", "RPN")
    ours = same_weights(stock, small_model(FASTER, seed=1))
    torch.manual_seed(3)
    a, _ = step(stock, inputs)
    torch.manual_seed(3)
    b, _ = step(ours, inputs)
    assert a["loss_rpn_cls"] == b["loss_rpn_cls"] and a["loss_rpn_loc"] == b["loss_rpn_loc"]
