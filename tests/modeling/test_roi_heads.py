"""The harmonised box heads: stock equality and values against the losses."""

import copy
import math

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from ghm_d2.losses import GHMCLoss, GHMRLoss
from ghm_d2.model_zoo.stock import (
    build_stock_model,
    stock_config,
    stock_obstacle,
    stock_weights,
)
from ghm_d2.modeling import GHMFastRCNNOutputLayers
from tests.detectors import (
    TWO_IMAGES,
    assert_same_detections,
    batch,
    calibrated,
    same_weights,
    small_config,
    small_model,
    step,
)

FASTER = "ghm_faster_rcnn_R_50_ghm_c"
OFF = (
    "MODEL.GHM.ROI_BOX_HEAD.CLS.ENABLED", False,
    "MODEL.GHM.ROI_BOX_HEAD.REG.ENABLED", False,
)  # fmt: skip
STOCK = ("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.PROPOSAL_GENERATOR.NAME", "RPN")
K, R = 4, 60
MASK, CASCADE = "ghm_mask_rcnn_R_50", "ghm_cascade_rcnn_R_50"
STOCK_CASCADE = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.PROPOSAL_GENERATOR.NAME", "RPN")


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


@pytest.mark.parametrize("name", [FASTER, "ghm_faster_rcnn_R_50"])
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


def with_masks(inputs):
    """Each object fills its box."""
    for x in inputs:
        boxes = x["instances"].gt_boxes.tensor.tolist()
        corners = [np.array([a, b, c, b, c, d, a, d]) for a, b, c, d in boxes]
        x["instances"].gt_masks = PolygonMasks([[polygon] for polygon in corners])
    return inputs


@pytest.mark.parametrize(
    ("name", "stock_names", "opts"),
    [
        (FASTER, STOCK, ()),
        (MASK, STOCK, ()),
        (CASCADE, STOCK_CASCADE, ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)),
    ],
    ids=["faster", "mask", "cascade"],
)
def test_off_is_stock_from_the_same_seed(name, stock_names, opts):
    """Parameters, losses and log of the same seed, and with GHM on the same detections."""
    inputs = with_masks(batch(*TWO_IMAGES))
    stock = small_model(name, *stock_names, *opts)
    ours = small_model(name, *OFF, *opts)
    a, b = stock.state_dict(), ours.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    torch.manual_seed(5)  # proposals are sampled at random
    a, log_a = step(stock, inputs)
    torch.manual_seed(5)
    b, log_b = step(ours, inputs)
    assert a == b and log_a == log_b
    keep_all = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    stock = calibrated(small_model(name, *stock_names, *opts, *keep_all), inputs)
    ours = same_weights(stock, small_model(name, *opts, *keep_all, seed=1))
    assert_same_detections(stock, ours, inputs)
    if name == MASK:
        with torch.no_grad():
            found = [model(inputs)[0]["instances"].pred_masks for model in (stock, ours)]
        assert found[0].any() and torch.equal(*found)


def test_mask_rcnn_trains_with_the_mask_loss_of_detectron2():
    inputs = with_masks(batch(*TWO_IMAGES))
    stock = small_model(MASK, *STOCK)
    ours = same_weights(stock, small_model(MASK, seed=1))
    torch.manual_seed(5)
    a, _ = step(stock, inputs)
    torch.manual_seed(5)
    b, _ = step(ours, inputs)
    assert a.keys() == b.keys() and "loss_mask" in a
    assert {name for name in a if a[name] != b[name]} == {"loss_box_reg"}
    assert all(math.isfinite(v) and v > 0 for v in b.values())


def test_every_cascade_stage_has_its_own_losses_and_counts():
    inputs = batch(*TWO_IMAGES)
    model = small_model(CASCADE, "MODEL.GHM.ROI_BOX_HEAD.CLS.ENABLED", True)
    stages = list(model.roi_heads.box_predictor)
    single = [(GHMCLoss(30, 0.75, 0.25, activation="softmax"), GHMRLoss(0.02, 10, 0.7, 0.25))] * 3
    single = [copy.deepcopy(pair) for pair in single]
    calls = []
    for stage in stages:
        original = stage.losses
        stage.losses = lambda *args, f=original: calls.append(args) or f(*args)
    for _ in range(2):
        calls.clear()
        losses, _ = step(model, inputs)
        names = [f"{n}_stage{k}" for k in range(3) for n in ("loss_cls", "loss_box_reg")]
        assert set(losses) == {*names, "loss_rpn_cls", "loss_rpn_loc"}
        for k, ((scores, deltas), proposals) in enumerate(calls):
            labels = torch.cat([x.gt_classes for x in proposals])
            foreground = labels < 3
            target = stages[k].box2box_transform.get_deltas(
                torch.cat([x.proposal_boxes.tensor for x in proposals])[foreground],
                torch.cat([x.gt_boxes.tensor for x in proposals])[foreground],
            )
            c, r = single[k]
            torch.testing.assert_close(losses[f"loss_cls_stage{k}"], c(scores, labels))
            loss = r(deltas[foreground], target)
            torch.testing.assert_close(losses[f"loss_box_reg_stage{k}"], loss)
    for stage, (c, r) in zip(stages, single, strict=True):
        assert torch.equal(stage.ghm_c.acc_sum, c.acc_sum)
        assert torch.equal(stage.ghm_r.acc_sum, r.acc_sum)
    assert not torch.equal(stages[0].ghm_c.acc_sum, stages[2].ghm_c.acc_sum)
    losses, _ = step(model, batch([], []))
    assert all(math.isfinite(v) for v in losses.values())


def test_cascade_weights_load_in_stock_and_the_other_way_round():
    cfg = small_config(CASCADE)
    stock = stock_config(cfg)
    assert stock.MODEL.ROI_HEADS.NAME == "CascadeROIHeads"
    model = build_stock_model(stock, cfg.MODEL.GHM)
    weights = stock_weights(small_model(CASCADE).state_dict(), model)
    model.load_state_dict(weights)
    assert stock_obstacle(cfg, model) is None
