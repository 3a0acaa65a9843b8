"""GHMROIHeads and GHMFastRCNNOutputLayers: stock equality and values against the losses."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from ghm_d2.losses import GHMCLoss, GHMRLoss
from ghm_d2.modeling import GHMFastRCNNOutputLayers
from tests.detectors import (
    TWO_IMAGES,
    assert_same_detections,
    batch,
    calibrated,
    same_weights,
    small_model,
    step,
)

FASTER = "ghm_faster_rcnn_R_50"
OFF = (
    "MODEL.GHM.ROI_BOX_HEAD.CLS.ENABLED", False,
    "MODEL.GHM.ROI_BOX_HEAD.REG.ENABLED", False,
)  # fmt: skip
STOCK = ("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.PROPOSAL_GENERATOR.NAME", "RPN")
K, R = 4, 60


def layers(agnostic=False, sigmoid=False, **kwargs):
    torch.manual_seed(0)
    kwargs.setdefault("ghm_c", GHMCLoss(activation="sigmoid" if sigmoid else "softmax"))
    kwargs.setdefault("ghm_r", GHMRLoss(loss_weight=2.0))
    return GHMFastRCNNOutputLayers(
        ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransform((10.0, 10, 5, 5)),
        num_classes=K,
        cls_agnostic_bbox_reg=agnostic,
        use_sigmoid_ce=sigmoid,
        **kwargs,
    ).train()


def proposals(foreground=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(R, 2, generator=g) * 50
    boxes = torch.cat([corner, corner + 10 + torch.rand(R, 2, generator=g) * 40], dim=1)
    x = Instances((128, 128))
    x.proposal_boxes = Boxes(boxes)
    x.gt_boxes = Boxes(boxes + torch.rand(R, 4, generator=g) * 4 - 2)
    x.gt_classes = torch.full((R,), K)
    x.gt_classes[:foreground] = torch.arange(foreground) % K
    return [x]


def predictions(module, seed=1):
    features = torch.randn(R, 8, generator=torch.Generator().manual_seed(seed))
    return module(features * 30)


def losses_of(module, props):
    with EventStorage():
        return module.losses(predictions(module), props)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_values_are_those_of_the_losses_on_plainly_gathered_examples(agnostic, sigmoid):
    module = layers(agnostic, sigmoid)
    c = GHMCLoss(activation="sigmoid" if sigmoid else "softmax")
    r = GHMRLoss(loss_weight=2.0)
    props = proposals()
    scores, deltas = predictions(module)
    labels = props[0].gt_classes
    rows = [
        deltas[i] if agnostic else deltas[i].view(K, 4)[labels[i]]
        for i in range(R)
        if labels[i] < K
    ]
    foreground = labels < K
    target = module.box2box_transform.get_deltas(
        props[0].proposal_boxes.tensor[foreground], props[0].gt_boxes.tensor[foreground]
    )
    for _ in range(2):
        out = losses_of(module, props)
        torch.testing.assert_close(out["loss_cls"], c(scores[:, :K] if sigmoid else scores, labels))
        torch.testing.assert_close(out["loss_box_reg"], r(torch.stack(rows), target))
    torch.testing.assert_close(module.ghm_c.acc_sum, c.acc_sum)
    torch.testing.assert_close(module.ghm_r.acc_sum, r.acc_sum)


def test_stock_loss_weights_still_apply():
    plain = losses_of(layers(), proposals())
    scaled = losses_of(layers(loss_weight={"loss_cls": 3.0, "loss_box_reg": 0.5}), proposals())
    torch.testing.assert_close(scaled["loss_cls"], 3 * plain["loss_cls"])
    torch.testing.assert_close(scaled["loss_box_reg"], 0.5 * plain["loss_box_reg"])


@pytest.mark.parametrize("agnostic", [False, True])
def test_no_foreground_gives_a_zero_box_loss_on_the_graph(agnostic):
    module = layers(agnostic)
    out = losses_of(module, proposals(foreground=0))
    sum(out.values()).backward()
    assert out["loss_box_reg"] == 0 and 0 < out["loss_cls"] < float("inf")
    assert module.bbox_pred.weight.grad.abs().sum() == 0
    assert module.cls_score.weight.grad.abs().sum() > 0


def test_no_proposals_at_all():
    module = layers()
    with EventStorage():
        out = module.losses((torch.zeros(0, K + 1), torch.zeros(0, K * 4)), [])
    assert out["loss_cls"] == 0 and out["loss_box_reg"] == 0


def test_sigmoid_starts_at_the_prior():
    probability = layers(sigmoid=True, prior_prob=0.05).cls_score.bias.sigmoid()
    torch.testing.assert_close(probability, torch.full((K + 1,), 0.05))
    assert (layers(sigmoid=False).cls_score.bias == 0).all()
    assert (layers(sigmoid=True, ghm_c=None).cls_score.bias == 0).all()


def test_activation_must_match():
    with pytest.raises(ValueError, match="activation 'sigmoid'"):
        layers(sigmoid=True, ghm_c=GHMCLoss(activation="softmax"))


def test_fed_loss_is_refused():
    with pytest.raises(ValueError, match="use_fed_loss"):
        layers(
            sigmoid=True,
            use_fed_loss=True,
            get_fed_loss_cls_weights=lambda: torch.ones(K),
        )


def test_off_gives_exactly_the_stock_losses():
    inputs = batch(*TWO_IMAGES)
    stock = small_model(FASTER, *STOCK)
    ours = same_weights(stock, small_model(FASTER, *OFF, seed=1))
    for _ in range(2):
        torch.manual_seed(5)  # proposals are sampled at random
        a, log_a = step(stock, inputs)
        torch.manual_seed(5)
        b, log_b = step(ours, inputs)
        assert a == b and log_a == log_b


@pytest.mark.parametrize("sigmoid", [False, True])
def test_inference_is_bit_equal_to_stock(sigmoid):
    inputs = batch(*TWO_IMAGES)
    opts = (
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
        "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", sigmoid,
    )  # fmt: skip
    stock = calibrated(small_model(FASTER, *STOCK, *opts), inputs)
    ours = same_weights(stock, small_model(FASTER, *opts, seed=1))
    assert_same_detections(stock, ours, inputs)


@pytest.mark.parametrize("name", [FASTER, "ghm_r_faster_rcnn_R_50"])
@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True),
        ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
        ("MODEL.GHM.RPN.CLS.ENABLED", True, "MODEL.GHM.RPN.REG.ENABLED", True),
    ],
    ids=["softmax", "sigmoid", "agnostic", "rpn"],
)
def test_whole_model_trains(name, opts):
    model = small_model(name, *opts)
    losses, _ = step(model, batch(*TWO_IMAGES))
    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert all(math.isfinite(v) and v > 0 for v in losses.values())
    losses, _ = step(model, batch([], []))
    assert all(math.isfinite(v) for v in losses.values())
