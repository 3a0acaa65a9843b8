"""Focal loss, cross entropy, OHEM, smooth L1 and its authentic form, alone and in models."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.structures import Boxes
from fvcore.nn import sigmoid_focal_loss, smooth_l1_loss

from ghm_d2 import add_ghm_config
from ghm_d2.errors import UserError
from ghm_d2.losses import (
    ASL1Loss,
    CrossEntropyLoss,
    FocalLoss,
    OHEMLoss,
    SmoothL1Loss,
    cross_entropy_loss,
    focal_loss,
    ohem_loss,
)
from ghm_d2.modeling import validate_ghm_config
from tests import reference
from tests.detectors import NUM_CLASSES, TWO_IMAGES, batch, small_model, step
from tests.modeling.test_retinanet import by_level, captured
from tests.modeling.test_rpn import arguments, losses_of

K = 4
CLS = "MODEL.GHM.RETINANET.CLS"
REG = "MODEL.GHM.RETINANET.REG"


def examples(seed: int, rows: int = 60):
    """Logits and labels: about one row in six positive, one in six ignored."""
    random = np.random.default_rng(seed)
    logits = random.normal(-1, 3, (rows, K))
    labels = random.choice([K] * 8 + [-1, -1, *range(K)], rows)
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["cross_entropy", "ohem"])
def test_loss_and_gradient_are_the_oracles(evaluate, name, seed, dtype):
    logits, labels = examples(seed)
    if name == "ohem":
        module, expected = OHEMLoss(2.5, 3), reference.ohem(logits, labels, 3)
    else:
        module, expected = CrossEntropyLoss(2.5), reference.cross_entropy(logits, labels)
    loss, gradient = evaluate(module, logits, labels, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert loss == pytest.approx(2.5 * expected[0], rel=tolerance)
    np.testing.assert_allclose(gradient, 2.5 * expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.0), (0.25, 3.5)])
def test_focal_loss_is_the_oracles(evaluate, alpha, gamma, with_scores, dtype):
    logits, labels = examples(7)
    scores = np.random.default_rng(8).random(len(labels)) if with_scores else None
    expected = reference.focal(logits, labels, scores, alpha=alpha, gamma=gamma)
    loss, gradient = evaluate(FocalLoss(alpha, gamma, 2.5), logits, labels, scores, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert loss == pytest.approx(2.5 * expected[0], rel=tolerance)
    np.testing.assert_allclose(gradient, 2.5 * expected[1], rtol=10 * tolerance, atol=tolerance)


def test_focal_loss_without_its_modulation_is_cross_entropy():
    logits, labels = (torch.tensor(x) for x in examples(3))
    expected = cross_entropy_loss(logits, labels) * (labels >= 0).sum()
    assert focal_loss(logits, labels, alpha=-1, gamma=0).item() == pytest.approx(expected.item())


def test_focal_loss_is_detectron2s():
    logits, labels = (torch.tensor(x) for x in examples(4))
    counted = labels >= 0
    one_hot = torch.nn.functional.one_hot(labels[counted], K + 1)[:, :-1].to(logits)
    expected = sigmoid_focal_loss(logits[counted], one_hot, 0.3, 1.5, "sum")
    assert focal_loss(logits, labels, alpha=0.3, gamma=1.5).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("loss", [cross_entropy_loss, ohem_loss, focal_loss])
def test_scores_are_the_targets_of_the_own_classes(loss):
    """No gradient where the prediction is the score; ignored rows and negatives have none."""
    labels = torch.tensor([0, 1, 2, -1])
    scores = torch.tensor([0.3, 0.8, 0.5, 0.5], dtype=torch.float64)
    wanted = torch.tensor([[0.3, 1e-9], [1e-9, 0.8], [1e-9, 1e-9], [0.6, 0.4]]).double()
    logits = torch.logit(wanted).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, labels, scores=scores), logits)
    assert gradient.abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(loss(logits, labels), logits)
    assert gradient[0, 0] < -1e-2 and gradient[1, 1] < -1e-3


@pytest.mark.parametrize("beta", [0.0, 1 / 9])
def test_smooth_l1_is_detectron2s(beta):
    pred, target = torch.randn(2, 30, 4, dtype=torch.float64) * 0.2
    expected = 3 * smooth_l1_loss(pred, target, beta, "sum")
    torch.testing.assert_close(SmoothL1Loss(beta, 3.0)(pred, target), expected)


def test_cross_entropy_by_hand():
    # ln 2 for each of two classes in each of the two rows that count
    logits = torch.zeros(3, 2)
    assert cross_entropy_loss(logits, torch.tensor([0, 2, -1])) == pytest.approx(2 * np.log(2))


def test_ohem_keeps_the_hardest_of_the_negatives():
    # One positive and five negatives of one class: 3, 2 and 1 are the hardest.
    logits = torch.tensor([[0.0], [1.0], [-5.0], [3.0], [-4.0], [2.0], [9.0]], requires_grad=True)
    labels = torch.tensor([0, 1, 1, 1, 1, 1, -1])
    loss = ohem_loss(logits, labels)
    loss.backward()
    kept = [0, 1, 3, 5]
    assert logits.grad.flatten().nonzero().flatten().tolist() == kept
    softplus = [np.log1p(np.exp(x)) for x in (0.0, 1.0, 3.0, 2.0)]
    assert loss.item() == pytest.approx(sum(softplus) / 4)
    one = ohem_loss(logits, labels, negatives_per_positive=1)
    assert one.item() == pytest.approx((softplus[0] + softplus[2]) / 2)


def test_ohem_with_fewer_negatives_than_it_may_keep_is_cross_entropy():
    logits, labels = examples(1)
    x, y = torch.tensor(logits), torch.tensor(labels)
    assert ohem_loss(x, y, 1000) == pytest.approx(cross_entropy_loss(x, y).item())


def test_ohem_without_positives_keeps_a_few_negatives():
    logits = torch.arange(8.0).view(8, 1)
    expected = np.log1p(np.exp([7.0, 6.0, 5.0])).mean()
    assert ohem_loss(logits, torch.ones(8).long()) == pytest.approx(expected)


@pytest.mark.parametrize("loss", [cross_entropy_loss, focal_loss, ohem_loss])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_that_counts_gives_zero_on_the_graph(loss, rows):
    logits = torch.randn(rows, 2, requires_grad=True)
    value = loss(logits, torch.full((rows,), -1))
    value.backward()
    assert value == 0 and logits.grad.abs().sum() == 0


@pytest.mark.parametrize("loss", [cross_entropy_loss, focal_loss, ohem_loss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    logits, labels = examples(2)
    x, y = torch.tensor(logits).to(dtype), torch.tensor(labels)
    assert loss(x, y).dtype == torch.float32
    assert loss(x, y) == loss(x.float(), y)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_asl1_is_the_sum_of_the_oracle(evaluate, weight):
    random = np.random.default_rng(0)
    pred, target = random.normal(size=(2, 20, 4)) * 0.1
    value, gradient = reference.asl1(pred, target, mu=0.05)
    loss, grad = evaluate(ASL1Loss(0.05, weight), pred, target, dtype=torch.float64)
    assert loss == pytest.approx(weight * value, rel=1e-12)
    np.testing.assert_allclose(grad, weight * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_entropy_loss(torch.zeros(3), torch.zeros(3).long()), "logits must be 2-d"),
        (lambda: cross_entropy_loss(torch.zeros(3, 2).long(), torch.zeros(3)), "logits must be a"),
        (lambda: ohem_loss(torch.zeros(3, 2), torch.zeros(3)), r"labels must be integers.*\(3,\)"),
        (lambda: ohem_loss(torch.zeros(3, 2), torch.zeros(2).long()), "labels must be integers"),
        (lambda: ohem_loss(torch.zeros(1, 2), torch.tensor([3])), r"labels must lie in \[-1, 2\]"),
        (lambda: ohem_loss(torch.zeros(3, 2), [0, 1, 2]), r"shape \(3,\), got list"),
        (lambda: cross_entropy_loss(torch.zeros(1, 2), torch.tensor([-2])), "labels must lie in"),
        (lambda: ohem_loss(torch.zeros(1, 2), torch.tensor([0]), 0), "negatives_per_positive must"),
        (lambda: OHEMLoss(negatives_per_positive=1.5), "negatives_per_positive must be a whole"),
        (lambda: CrossEntropyLoss(-1.0), "loss_weight must be"),
        (lambda: ASL1Loss(mu=0.0), "mu must be"),
        (lambda: ASL1Loss(mu="auto"), "mu must be"),
        (lambda: FocalLoss(gamma=-1), "gamma must be"),
        (lambda: SmoothL1Loss(beta=-1), "beta must be"),
        (
            lambda: focal_loss(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([1.5])),
            r"scores must lie in \[0, 1\]",
        ),
        (
            lambda: focal_loss(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0.5, 1])),
            r"scores must have shape \(1,\), got \(2,\)",
        ),
        (lambda: ASL1Loss()(torch.zeros(2, 4), torch.zeros(2, 3)), "target must have pred's"),
    ],
)
def test_misuse_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# In the models


@pytest.fixture(scope="module")
def inputs():
    return batch(*TWO_IMAGES)


@pytest.mark.parametrize("name", ["cross_entropy", "ohem"])
@pytest.mark.parametrize("reg", ["ghm_r", "asl1", "off"])
def test_retinanet_takes_the_baseline_over_all_anchors(inputs, name, reg):
    pairs = [f"{REG}.ENABLED", False] if reg == "off" else [f"{REG}.LOSS_TYPE", reg]
    model = small_model(
        "ghm_retinanet_R_50", f"{CLS}.LOSS_TYPE", name, f"{CLS}.LOSS_WEIGHT", 20.0, *pairs
    )
    args, losses = captured(model, inputs)
    levels = by_level((*args, model.box2box_transform), slice(0, 2))
    logits = torch.cat([x for x, _, _, _ in levels]).detach().numpy()
    labels = torch.cat([y for _, y, _, _ in levels]).numpy()
    assert set(labels) == {-1, *range(2), NUM_CLASSES}
    oracle = {"cross_entropy": reference.cross_entropy, "ohem": lambda *a: reference.ohem(*a, 3)}
    expected = 20 * oracle[name](logits, labels)[0]
    assert losses["loss_cls"].item() == pytest.approx(expected, rel=1e-5)


def test_retinanet_normalises_asl1_as_smooth_l1(inputs):
    pairs = (f"{REG}.LOSS_TYPE", "asl1", f"{REG}.LOSS_WEIGHT", 2.0, f"{REG}.MU", 0.05)
    model = small_model("ghm_retinanet_R_50", *pairs)
    for _ in range(2):  # the normaliser is a moving average
        args, losses = captured(model, inputs)
        levels = by_level((*args, model.box2box_transform), slice(0, 2))
        pred = torch.cat([d for _, _, d, _ in levels]).detach().numpy()
        target = torch.cat([t for _, _, _, t in levels]).numpy()
        assert len(pred) > 5
        expected = 2 * reference.asl1(pred, target, mu=0.05)[0] / model.loss_normalizer
        assert losses["loss_box_reg"].item() == pytest.approx(expected, rel=1e-5)


def test_focal_and_smooth_l1_with_factors_are_detectron2s_times_these(inputs):
    off = (f"{CLS}.ENABLED", False, f"{REG}.ENABLED", False)
    on = (
        f"{CLS}.LOSS_TYPE", "focal", f"{CLS}.LOSS_WEIGHT", 4.0,
        f"{REG}.LOSS_TYPE", "smooth_l1", f"{REG}.LOSS_WEIGHT", 3.0,
    )  # fmt: skip
    plain, weighted = (small_model("ghm_retinanet_R_50", *pairs) for pairs in (off, on))
    for _ in range(2):
        expected, found = step(plain, inputs)[0], step(weighted, inputs)[0]
        torch.testing.assert_close(found["loss_cls"], 4 * expected["loss_cls"])
        torch.testing.assert_close(found["loss_box_reg"], 3 * expected["loss_box_reg"])


@pytest.mark.parametrize("name", ["focal", "cross_entropy", "ohem", "ghm_c"])
def test_iou_targets(inputs, name):
    """The loss of scores that are the IoUs of the decoded boxes, computed plainly."""
    pairs = (f"{CLS}.LOSS_TYPE", name, f"{CLS}.TARGETS", "iou", f"{CLS}.LOSS_WEIGHT", 2.0)
    model = small_model("ghm_retinanet_R_50", *pairs, "MODEL.GHM.RETINANET.SCOPE", "batch")
    with torch.no_grad():
        model.head.bbox_pred.bias.normal_(0, 0.3)  # or every box is its anchor
    (anchors, logits, labels, deltas, gt_boxes), losses = captured(model, inputs)
    x, d = torch.cat(logits, 1).detach().double(), torch.cat(deltas, 1).detach().double()
    labels, all_anchors = torch.stack(labels), torch.cat([a.tensor for a in anchors]).double()
    scores = torch.zeros(labels.shape, dtype=torch.float64)
    for n, i in ((labels >= 0) & (labels < NUM_CLASSES)).nonzero().tolist():
        box = model.box2box_transform.apply_deltas(d[n, i][None], all_anchors[i][None])[0]
        scores[n, i] = iou(box.tolist(), gt_boxes[n][i].tolist())
    assert len(scores[scores > 0].unique()) > 20
    x, y, scores = (v.flatten(0, 1).numpy() for v in (x, labels, scores))
    dense = np.zeros_like(x)
    for row in ((y >= 0) & (y < NUM_CLASSES)).nonzero()[0]:
        dense[row, y[row]] = scores[row]
    if name == "focal":
        expected = reference.focal(x, y, scores)[0] / model.loss_normalizer
    elif name == "cross_entropy":
        expected = reference.cross_entropy(x, y, dense)[0]
    elif name == "ohem":
        expected = reference.ohem(x, y, 3, dense)[0]
    else:
        expected = reference.ghm_c()(x, np.where(y[:, None] == -1, -1.0, dense))[0]
    assert losses["loss_cls"].item() == pytest.approx(2 * expected, rel=1e-4)


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return common / (sum(areas) - common)


def test_baselines_keep_no_counts_and_train(inputs):
    model = small_model(
        "ghm_retinanet_R_50", f"{CLS}.LOSS_TYPE", "ohem", f"{REG}.LOSS_TYPE", "asl1"
    )
    assert not any("acc_sum" in name for name in model.state_dict())
    losses, log = step(model, inputs)
    assert all(0 < v < float("inf") for v in losses.values())
    assert model.head.cls_score.weight.grad.abs().sum() > 0
    assert model.head.bbox_pred.weight.grad.abs().sum() > 0
    assert log["num_pos_anchors"][0] > 0


def test_rpn_normalises_asl1_as_its_smooth_l1():
    rpn = small_model(
        "ghm_faster_rcnn_R_50_ghm_c",
        "MODEL.GHM.RPN.REG.ENABLED", True,
        "MODEL.GHM.RPN.REG.LOSS_TYPE", "asl1",
        "MODEL.GHM.RPN.REG.LOSS_WEIGHT", 1.0,
    ).proposal_generator  # fmt: skip
    anchors, _, labels, deltas, gt_boxes = args = arguments(rpn)
    all_anchors, flat = Boxes.cat(anchors).tensor, torch.cat(deltas, dim=1)
    pred, target = [], []
    for n, i in torch.stack(labels).eq(1).nonzero().tolist():
        pair = all_anchors[i : i + 1], gt_boxes[n][i : i + 1]
        pred.append(flat[n, i].detach())
        target.append(rpn.box2box_transform.get_deltas(*pair)[0])
    value = reference.asl1(torch.stack(pred).numpy(), torch.stack(target).numpy(), mu=0.02)[0]
    loss = losses_of(rpn, args)["loss_rpn_loc"].item()
    assert loss == pytest.approx(value / (rpn.batch_size_per_image * 2), rel=1e-5)


@pytest.mark.parametrize("agnostic", [False, True])
def test_box_head_normalises_asl1_as_its_smooth_l1(agnostic):
    predictor = small_model(
        "ghm_faster_rcnn_R_50_ghm_c",
        "MODEL.GHM.ROI_BOX_HEAD.REG.LOSS_TYPE", "asl1",
        "MODEL.GHM.ROI_BOX_HEAD.REG.LOSS_WEIGHT", 1.0,
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic,
    ).roi_heads.box_predictor  # fmt: skip
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(12, 2, generator=random) * 50
    boxes = torch.cat([corner, corner + 10 + torch.rand(12, 2, generator=random) * 30], dim=1)
    truth = boxes + torch.rand(12, 4, generator=random)
    classes = torch.tensor([0, 1, 2, 3] * 3)  # 3 is background
    deltas = torch.randn(12, 4 if agnostic else 12, generator=random)
    loss = predictor.box_reg_loss(boxes, truth, deltas, classes)
    target = predictor.box2box_transform.get_deltas(boxes, truth)
    rows = [i for i in range(12) if classes[i] < 3]
    start = [0 if agnostic else 4 * classes[i] for i in rows]
    pred = torch.stack([deltas[i, s : s + 4] for i, s in zip(rows, start, strict=True)])
    value = reference.asl1(pred.numpy(), target[rows].numpy(), mu=0.02)[0]
    assert loss.item() == pytest.approx(value / 12, rel=1e-5)


@pytest.mark.parametrize(
    ("base", "pairs", "names"),
    [
        ("ghm_retinanet_R_50", [f"{CLS}.LOSS_TYPE", "focus"], [f"{CLS}.LOSS_TYPE", "ohem"]),
        ("ghm_retinanet_R_50", [f"{REG}.LOSS_TYPE", "l1"], [f"{REG}.LOSS_TYPE", "asl1"]),
        (
            "ghm_retinanet_R_50",
            [f"{CLS}.LOSS_TYPE", "ohem", f"{CLS}.LOSS_WEIGHT", -1.0],
            [f"{CLS}.LOSS_WEIGHT"],
        ),
        ("ghm_retinanet_R_50", [f"{REG}.LOSS_TYPE", "asl1", f"{REG}.MU", 0.0], [f"{REG}.MU"]),
        ("ghm_retinanet_R_50", [f"{REG}.LOSS_TYPE", "asl1", f"{REG}.MU", "auto"], [f"{REG}.MU"]),
        (
            "ghm_retinanet_R_50",
            [f"{CLS}.LOSS_TYPE", "focal", "MODEL.RETINANET.FOCAL_LOSS_GAMMA", -1.0],
            ["MODEL.RETINANET.FOCAL_LOSS_GAMMA"],
        ),
        (
            "ghm_faster_rcnn_R_50_ghm_c",
            [
                "MODEL.GHM.ROI_BOX_HEAD.REG.LOSS_TYPE", "asl1",
                "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou",
            ],
            ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "MODEL.GHM.ROI_BOX_HEAD.REG.ENABLED"],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_naming_the_keys(base, pairs, names):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(f"configs/{base}.yaml")
    cfg.merge_from_list(pairs)
    with pytest.raises(UserError) as error:
        validate_ghm_config(cfg)
    assert all(name in str(error.value) for name in names)
