"""`loss_weight="auto"`: gradients as large as those of a reference loss."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from detectron2.utils.events import EventStorage

from ghm_d2.analysis.hook import LossWeights
from ghm_d2.checkpoint import checkpointer
from ghm_d2.engine.forward_state import ForwardState
from ghm_d2.losses import (
    ASL1Loss,
    CrossEntropyLoss,
    FocalLoss,
    GHMCLoss,
    GHMRLoss,
    OHEMLoss,
    SmoothL1Loss,
    authentic_smooth_l1_loss,
    cross_entropy_loss,
    ohem_loss,
)
from ghm_d2.losses.functional import focal_gradient, focal_gradient_norm
from tests import reference as ref
from tests.detectors import NUM_CLASSES, TWO_IMAGES, batch, small_model

K = 3


def cls_call(rng, rows=60):
    """Logits far from the edges of 30 regions, and labels: about one row in six ignored."""
    x, _ = ref.draw_logits(rng, rows, K, 30)
    return x, rng.choice([-1, *range(K), K, K], rows)


def weight_at(name, logits, labels):
    """The oracle's figures of one call of a baseline: reference, divisor, own gradient."""
    norm = np.abs(4 * ref.focal(logits, labels)[1]).sum()
    own = {"ce": lambda: ref.cross_entropy(logits, labels), "ohem": lambda: ref.ohem(*call, 3)}
    call = logits, labels
    positives = np.count_nonzero((labels >= 0) & (labels < K))
    return norm, max(positives, 1), np.abs(own[name]()[1]).sum()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [-1.0, 0.25])
def test_the_gradient_of_focal_loss_is_the_oracles(alpha, gamma):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 6, (50, K)), rng.integers(-1, K + 1, 50)
    alpha_of = {"alpha": alpha if alpha >= 0 else 0.5, "gamma": gamma}
    factor = 1 if alpha >= 0 else 2
    expected = factor * np.abs(ref.focal(logits, labels, **alpha_of)[1]).sum()
    x, y = torch.tensor(logits), torch.tensor(labels)
    norm, positives, rows = focal_gradient_norm(x, y, None, alpha, gamma).tolist()
    assert norm == pytest.approx(expected, rel=1e-5)
    assert (positives, rows) == (((labels >= 0) & (labels < K)).sum(), (labels >= 0).sum())
    dense = torch.nn.functional.one_hot(y.clamp(min=0), K + 1)[:, :-1].double()
    found = focal_gradient_norm(x, dense, (y >= 0).unsqueeze(1), alpha, gamma)
    assert found.tolist() == pytest.approx([norm, positives, rows], rel=1e-6)


def test_the_gradient_with_soft_targets_is_autograds():
    x = torch.linspace(-8, 8, 41, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(x, t, reduction="none")
    loss = (0.25 * t + 0.75 * (1 - t)) * (x.sigmoid() - t).abs() ** 2 * bce
    (expected,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(focal_gradient(x, t, 0.25, 2.0), expected.abs())


def test_masks_drop_logits_and_their_nan():
    rng = np.random.default_rng(1)
    x, y = torch.tensor(rng.normal(0, 3, (40, K))), torch.tensor(rng.integers(0, K + 1, 40))
    keep = torch.tensor(rng.random((40, K)) < 0.7)
    every = focal_gradient(x, torch.nn.functional.one_hot(y, K + 1)[:, :-1], 0.25, 2.0)
    own = keep.gather(1, y.clamp(max=K - 1).unsqueeze(1)).squeeze(1) & (y < K)
    expected = [every[keep].sum().item(), own.sum().item(), keep.any(1).sum().item()]
    found = focal_gradient_norm(x.masked_fill(~keep, torch.nan), y, keep, 0.25, 2.0)
    assert found.tolist() == pytest.approx(expected)


def test_a_sample_is_near_the_sum_and_has_every_positive():
    rng = np.random.default_rng(2)
    rows = 30000
    x = torch.tensor(rng.normal(-4, 1, (rows, K)))
    y = torch.where(torch.arange(rows) % 1000 == 7, 1, K)
    x[::9] -= 3  # one anchor in nine is harder: a fixed step would meet all of these or none
    whole = focal_gradient_norm(x, y, None, 0.25, 2.0)
    part = focal_gradient_norm(x, y, None, 0.25, 2.0, share=1 / 9)
    assert part[1] == whole[1] == 30 and part[2] == pytest.approx(rows)
    assert part[0] == pytest.approx(whole[0].item(), rel=0.05) and part[0] != whole[0]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("masked", [False, True])
def test_ghm_c_follows_the_oracle(activation, masked, evaluate):
    settings = {"loss_weight": "auto", "activation": activation, "bias_correction": True}
    loss_fn, oracle = GHMCLoss(**settings), ref.ghm_c(**settings)
    rng = np.random.default_rng(3)
    for rows in (60, 0, 7, 60, 30):
        x, _ = ref.draw_logits(rng, rows, K, 30, activation=activation)
        last = x.shape[1] - (activation == "softmax")
        y = rng.choice([-1, *range(last), last], rows) if rows else np.zeros(0, np.int64)
        weight = [rng.integers(0, 2, rows)] if masked else []
        expected, expected_grad = oracle(x, y, *weight)
        loss, grad = evaluate(loss_fn, x, y, *weight)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mu", [0.1, "auto"])
def test_ghm_r_follows_the_oracle(mu, masked, evaluate):
    loss_fn = GHMRLoss(mu, loss_weight="auto", reference=SmoothL1Loss(0.3, 1.5))
    oracle = ref.ghm_r(mu=mu, loss_weight="auto")

    def smooth_l1(call, part):
        d = np.abs(np.subtract(*call[:2], dtype=np.float64))
        return 1.5 * np.minimum(d / 0.3, 1)[part.keep].sum(), part.keep.sum() / 4

    oracle.reference = smooth_l1
    rng = np.random.default_rng(4)
    for rows in (20, 0, 5, 30):
        pred, target = ref.draw_boxes(rng, rows, 10)
        weight = [rng.integers(0, 2, (rows, 4))] if masked else []
        expected, expected_grad = oracle(pred, target, *weight)
        loss, grad = evaluate(loss_fn, pred, target, *weight)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-3, atol=1e-6)


def test_a_divisor_takes_the_place_of_the_positives():
    pred, target = torch.randn(8, 4), torch.zeros(8, 4)
    own, given = GHMRLoss(loss_weight="auto"), GHMRLoss(loss_weight="auto")
    assert given(pred, target, divisor=32).item() == pytest.approx(own(pred, target).item() / 4)


@pytest.mark.parametrize("name", ["ce", "ohem"])
def test_classification_baselines_follow_the_oracle(name, evaluate):
    make, plain = {
        "ce": (CrossEntropyLoss, cross_entropy_loss),
        "ohem": (OHEMLoss, ohem_loss),
    }[name]
    loss_fn, following = make(loss_weight="auto"), ref.FollowingWeight()
    rng = np.random.default_rng(5)
    for rows in (60, 0, 20, 60):
        x, y = cls_call(rng, rows) if rows else (np.zeros((0, K)), np.zeros(0, np.int64))
        factor = following(weight_at(name, x, y), write=True)
        loss, grad = evaluate(loss_fn, x, y)
        expected, expected_grad = evaluate(plain, x, y)
        np.testing.assert_allclose(loss, factor * expected, rtol=1e-5)
        np.testing.assert_allclose(grad, factor * expected_grad, rtol=1e-4, atol=1e-9)
        assert loss_fn.loss_weight.item() == pytest.approx(factor, rel=1e-5)


def test_asl1_has_the_gradient_of_its_reference():
    pred, target = torch.randn(50, 4, requires_grad=True), torch.zeros(50, 4)
    loss_fn = ASL1Loss(0.5, "auto", SmoothL1Loss(0.1))
    (grad,) = torch.autograd.grad(loss_fn(pred, target), pred)
    (expected,) = torch.autograd.grad(SmoothL1Loss(0.1)(pred, target), pred)
    assert grad.abs().sum().item() == pytest.approx(expected.abs().sum().item(), rel=1e-5)


def test_references_themselves_have_a_constant():
    assert FocalLoss(loss_weight="auto").loss_weight == 4.0
    assert SmoothL1Loss(loss_weight="auto").loss_weight == 1.0


BASELINES = {
    "ce": (lambda: CrossEntropyLoss("auto"), cross_entropy_loss, cls_call),
    "ohem": (lambda: OHEMLoss("auto"), ohem_loss, cls_call),
    "asl1": (
        lambda: ASL1Loss(0.02, "auto"),
        lambda x, y: authentic_smooth_l1_loss(x, y, 0.02, "sum"),
        lambda rng, rows=60: (rng.normal(0, 1, (rows, 4)), np.zeros((rows, 4))),
    ),
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_write_in_training_steps_alone_and_resume(name):
    make, _, call = BASELINES[name]
    loss_fn, rng = make(), np.random.default_rng(6)
    first, second, third = (tuple(map(torch.tensor, call(rng, n))) for n in (60, 30, 60))
    loss_fn(*first)
    kept = copy.deepcopy(loss_fn.state_dict())
    assert list(kept) == ["running_gradients"]
    resumed = make()
    resumed.load_state_dict(kept)
    with torch.no_grad():
        loss_fn(*second)
    loss_fn.eval()
    evaluated = loss_fn(*second)
    assert torch.equal(loss_fn.running_gradients, kept["running_gradients"])
    assert torch.equal(loss_fn.train()(*second), evaluated)
    assert torch.equal(resumed(*second), evaluated)
    assert not torch.equal(loss_fn.running_gradients, kept["running_gradients"])
    before = loss_fn.running_gradients.clone()
    loss_fn(third[0] * torch.nan, third[1])
    assert torch.equal(loss_fn.running_gradients, before)
    assert loss_fn(*third).isfinite()
    assert loss_fn.half().running_gradients.dtype == torch.float32
    loss_fn.load_state_dict({})  # of a checkpoint without it
    loss_fn.reset_parameters()
    assert torch.equal(loss_fn(*first), make()(*first))


@pytest.mark.parametrize("name", BASELINES)
def test_a_repeated_forward_pass_of_a_baseline_keeps_its_weight(name):
    """Also where the averages have moved on since."""
    make, _, call = BASELINES[name]
    x, y = map(torch.tensor, call(np.random.default_rng(7)))
    x.requires_grad_()

    def run(**settings):
        loss_fn, total = make(), 0.0
        for size in (1.0, 0.2):
            if settings:
                total += torch.utils.checkpoint.checkpoint(
                    lambda v, f=size: loss_fn(v * f, y), x, **settings
                )
            else:
                total += loss_fn(x * size, y)
        return torch.autograd.grad(total, x)[0], loss_fn.running_gradients

    (expected, averages), (gradient, others) = run(), run(use_reentrant=False)
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(averages, others)


def test_nothing_measured_gives_a_finite_weight():
    for loss_fn in (GHMRLoss(loss_weight="auto"), ASL1Loss(loss_weight="auto")):
        assert loss_fn(torch.zeros(0, 4), torch.zeros(0, 4)) == 0
        assert loss_fn(torch.ones(3, 4), torch.ones(3, 4)) == 0  # no gradient at all
        assert not loss_fn.running_gradients.any() and loss_fn.loss_weight == 1
        assert math.isfinite(loss_fn(torch.ones(3, 4), torch.zeros(3, 4)))


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16])
def test_half_precision(x_dtype):
    x, y = map(torch.tensor, cls_call(np.random.default_rng(8)))
    half, whole = GHMCLoss(loss_weight="auto"), GHMCLoss(loss_weight="auto")
    half(x.to(x_dtype), y), whole(x.to(x_dtype).float(), y)
    assert half.loss_weight.item() == pytest.approx(whole.loss_weight.item(), rel=1e-4)


def test_kernels_take_the_weight():
    """More logits than the whole-tensor operations get on a CPU."""
    rng = np.random.default_rng(9)
    x, y = torch.tensor(rng.normal(-3, 2, (4000, K)), dtype=torch.float32), torch.full((4000,), K)
    y[::50] = 1
    x.requires_grad_()
    fused, eager = GHMCLoss(loss_weight="auto"), GHMCLoss(loss_weight="auto")
    for _ in range(3):
        (found,) = torch.autograd.grad(fused(x, y), x)
        (expected,) = torch.autograd.grad(eager(x.double(), y), x)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("make", [GHMCLoss, GHMRLoss, FocalLoss, SmoothL1Loss, ASL1Loss, OHEMLoss])
@pytest.mark.parametrize("value", ["Auto", "", -1.0, None, True, math.nan])
def test_a_weight_that_is_none_is_refused(make, value):
    with pytest.raises(ValueError, match="loss_weight must be"):
        make(loss_weight=value)


def test_the_exact_density_is_refused():
    with pytest.raises(ValueError, match="loss_weight must be a number with density='exact'"):
        GHMCLoss(momentum=0, density="exact", loss_weight="auto")


CLS, REG = "MODEL.GHM.RETINANET.CLS", "MODEL.GHM.RETINANET.REG"
AUTO = (f"{CLS}.LOSS_WEIGHT", "auto", f"{REG}.LOSS_WEIGHT", "auto")
AUTO += (f"{CLS}.BIAS_CORRECTION", True, f"{REG}.BIAS_CORRECTION", True)


def captured(module, inputs, model=None):
    """What `module.losses` was called with in a forward pass of `model`, and what it returned."""
    calls, original = [], module.losses
    module.losses = lambda *args: calls.append((args, original(*args))) or calls[-1][1]
    with EventStorage():
        (model or module)(inputs)
    del module.losses
    return calls[0]


def size_of(loss, predictions):
    grads = torch.autograd.grad(loss, predictions, retain_graph=True, allow_unused=True)
    return sum(g.abs().sum().item() for g in grads if g is not None)


@pytest.mark.parametrize(
    ("cls", "reg", "scope"),
    [
        ("ghm_c", "ghm_r", "level"),
        ("ghm_c", "ghm_r", "batch"),
        ("cross_entropy", "asl1", "level"),
        ("ohem", "smooth_l1", "level"),
        ("focal", "ghm_r", "level"),
    ],
)
def test_retinanet_has_the_gradients_of_its_references(cls, reg, scope):
    pairs = f"{CLS}.LOSS_TYPE", cls, f"{REG}.LOSS_TYPE", reg, "MODEL.GHM.RETINANET.SCOPE", scope
    model = small_model("ghm_retinanet_R_50", *AUTO, *pairs)
    plain = small_model("ghm_retinanet_R_50", f"{CLS}.ENABLED", False, f"{REG}.ENABLED", False)
    args, losses = captured(model, batch(*TWO_IMAGES))
    _, logits, labels, deltas, _ = args
    with EventStorage():
        expected = plain.losses(*args)
    positives = sum(((y >= 0) & (y < NUM_CLASSES)).sum().item() for y in labels)
    # Detectron2 divides by a running number, which begins at 100.
    running = plain.loss_normalizer / positives
    found = size_of(losses["loss_cls"], logits) / size_of(expected["loss_cls"], logits)
    factor = 4 if cls == "focal" else 4 * running
    assert found == pytest.approx(factor, rel=0.05)  # a sample of the rows; middles of regions
    found = size_of(losses["loss_box_reg"], deltas) / size_of(expected["loss_box_reg"], deltas)
    factor = {"ghm_r": 2 * running, "asl1": 1, "smooth_l1": 1}[reg]
    assert found == pytest.approx(factor, rel=0.05)


def test_groups_of_images_follow_by_themselves():
    pairs = "MODEL.GHM.RETINANET.IMAGES_PER_HISTOGRAM", 1, "SOLVER.IMS_PER_BATCH", 2
    model = small_model("ghm_retinanet_R_50", *AUTO, *pairs)
    captured(model, batch(*TWO_IMAGES))
    first, second = (loss.running_gradients for loss in model.ghm_c)
    assert first[1] != second[1] and first.all() and second.all()


def test_two_stage_parts_have_the_gradients_of_detectron2s_losses():
    """But for GHM's: every g is taken to be in the middle of its region."""
    pairs = []
    for node in ("RPN.CLS", "RPN.REG", "ROI_BOX_HEAD.CLS", "ROI_BOX_HEAD.REG"):
        pairs += [f"MODEL.GHM.{node}.ENABLED", True, f"MODEL.GHM.{node}.LOSS_WEIGHT", "auto"]
        pairs += [f"MODEL.GHM.{node}.BIAS_CORRECTION", True]
    model = small_model("ghm_faster_rcnn_R_50", *pairs)
    for module in (model.proposal_generator, model.roi_heads.box_predictor):
        args, losses = captured(module, batch(*TWO_IMAGES), model)
        module.ghm_c = module.ghm_r = None
        with EventStorage():
            expected = module.losses(*args)
        predictions = [x for arg in args for x in arg if isinstance(x, torch.Tensor)]
        predictions = [x for x in predictions if x.requires_grad]
        for name, loss in losses.items():
            ratio = size_of(loss, predictions) / size_of(expected[name], predictions)
            assert ratio == pytest.approx(1, rel=0.1), name


def test_the_logs_have_the_weights():
    groups = "MODEL.GHM.RETINANET.IMAGES_PER_HISTOGRAM", 1, "SOLVER.IMS_PER_BATCH", 2
    model = small_model("ghm_retinanet_R_50", *AUTO, *groups)
    captured(model, batch(*TWO_IMAGES))
    hook, storage = LossWeights(model, 20), EventStorage()
    for iteration in (18, 19, 98):
        hook.trainer = SimpleNamespace(iter=iteration, max_iter=100, storage=storage)
        hook.after_step()
        assert ("ghm_c/loss_weight" in storage.latest()) == (iteration > 18)
    values = [loss.loss_weight.item() for loss in model.ghm_r]
    found = storage.latest()["ghm_r/loss_weight"][0]
    assert found == pytest.approx(sum(values) / 2) and values[0] != values[1]
    assert not LossWeights(small_model("ghm_retinanet_R_50"), 20).losses


def test_baselines_belong_to_what_a_forward_pass_changes():
    pairs = f"{CLS}.LOSS_TYPE", "ohem", f"{REG}.LOSS_TYPE", "asl1"
    model = small_model("ghm_retinanet_R_50", *AUTO, *pairs)
    names = {"cls_baseline.running_gradients", "reg_baseline.running_gradients"}
    state = ForwardState.of(model)
    assert names <= state.buffers.keys()
    captured(model, batch(*TWO_IMAGES))
    assert all(model.get_buffer(name).all() for name in names)
    state.restore(model)
    assert not any(model.get_buffer(name).any() for name in names)
    captured(model, batch(*TWO_IMAGES))
    checkpointer._reset_counts(model, "a.pth")
    assert not any(model.get_buffer(name).any() for name in names)
