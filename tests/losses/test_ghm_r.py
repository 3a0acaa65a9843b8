"""GHM-R and the authentic smooth L1 loss: value, gradient and properties, against the oracle."""

import copy

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st

from ghm_d2.losses import GHMRLoss, authentic_smooth_l1_loss
from tests import reference as ref

seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("decay_empty_bins", [False, True])
@pytest.mark.parametrize("normalize_by", ["valid_bins", "all_bins"])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_equals_the_oracle_over_several_calls(
    momentum, normalize_by, decay_empty_bins, bias_correction, evaluate
):
    settings = {
        "mu": 0.05,
        "bins": 8,
        "momentum": momentum,
        "loss_weight": 10.0,
        "normalize_by": normalize_by,
        "decay_empty_bins": decay_empty_bins,
        "bias_correction": bias_correction,
    }
    loss_fn, oracle = GHMRLoss(**settings), ref.ghm_r(**settings)
    rng = np.random.default_rng(3)
    for rows in (40, 1, 10, 1, 40):
        pred, target = ref.draw_boxes(rng, rows, 8, 0.05)
        weight = (rng.random((rows, 4)) < 0.8) * rng.uniform(0.1, 3, (rows, 4))
        loss, grad = evaluate(loss_fn, pred, target, weight)
        expected, expected_grad = oracle(pred, target, weight)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-8)
        if momentum:
            np.testing.assert_allclose(loss_fn.acc_sum.numpy(), oracle.counts.sums, rtol=1e-5)


@pytest.mark.parametrize("mu", [1e-3, 0.02, 1.0])
def test_equals_the_oracle_for_any_mu(mu, evaluate):
    # errors of a size that float32 still resolves at the smallest mu
    rng = np.random.default_rng(4)
    pred = rng.normal(0, 2 * mu, (60, 4)).astype(np.float32)
    target = np.zeros_like(pred)
    keep = ref.rows_off_edges(ref.asl1_examples(pred, target, mu=mu), 10, 1e-5)
    loss, grad = evaluate(GHMRLoss(mu), pred[keep], target[keep])
    expected, expected_grad = ref.ghm_r(mu=mu)(pred[keep], target[keep])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", [(48,), (12, 4), (2, 6, 4), (3, 2, 2, 4)])
def test_any_shape_gives_the_same_loss(shape, evaluate):
    pred, target = ref.draw_boxes(np.random.default_rng(5), 12)
    expected, expected_grad = evaluate(GHMRLoss(), pred, target)
    loss, grad = evaluate(GHMRLoss(), pred.reshape(shape), target.reshape(shape))
    assert loss == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(grad, expected_grad.reshape(shape), rtol=1e-6)


def test_exact_and_huge_predictions_belong_to_a_region(evaluate):
    # gradient norms of exactly 0 and, in float32, exactly 1
    pred, target = np.array([[0.5, 1e6]], dtype=np.float32), np.array([[0.5, 0.0]], np.float32)
    loss, grad = evaluate(GHMRLoss(momentum=0.0), pred, target)
    assert loss == pytest.approx(1e6 / 2)
    np.testing.assert_allclose(grad, [[0.0, 0.5]])


@pytest.mark.parametrize("with_weights", [False, True])
def test_pooled_is_one_histogram_over_all_tensors(with_weights):
    rng = np.random.default_rng(9)
    loss_fn, oracle = GHMRLoss(), ref.ghm_r()
    for _ in range(3):
        parts = [ref.draw_boxes(rng, rows) for rows in (20, 5, 0, 1)]
        weights = [rng.integers(0, 2, len(p)) for p, _ in parts] if with_weights else None
        preds = [torch.tensor(p).requires_grad_() for p, _ in parts]
        targets = [torch.tensor(t) for _, t in parts]
        tensors = weights and [torch.tensor(w) for w in weights]
        loss = loss_fn.forward_pooled(preds, targets, tensors)
        loss.backward()
        if with_weights:
            parts = [(p, t, w) for (p, t), w in zip(parts, weights, strict=True)]
        expected, grads = oracle.pooled(parts)
        assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-5)
        for pred, grad in zip(preds, grads, strict=True):
            np.testing.assert_allclose(pred.grad.numpy(), grad, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(loss_fn.acc_sum.numpy(), oracle.counts.sums, rtol=1e-5)


def test_gradcheck_with_frozen_counts():
    rng = np.random.default_rng(10)
    loss_fn = GHMRLoss().double()
    for _ in range(2):
        pred, target = ref.draw_boxes(rng, 15, dtype=np.float64, margin=1e-3)
        inputs, target = torch.tensor(pred).requires_grad_(), torch.tensor(target)
        loss_fn.train()(inputs, target)
        loss_fn.eval()
        # the call's own counts enter the weights too; no step of 1e-6 crosses an edge
        assert torch.autograd.gradcheck(lambda v: loss_fn(v, target), inputs)  # noqa: B023


def test_no_gradient_reaches_the_target():
    pred, target = (torch.tensor(a) for a in ref.draw_boxes(np.random.default_rng(1), 9))
    loss = GHMRLoss()(pred.requires_grad_(), target)
    loss.backward()
    assert target.grad is None and pred.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_equals_float32_on_the_same_values(dtype):
    pred, target = (torch.tensor(a) for a in ref.draw_boxes(np.random.default_rng(11), 200))
    low = pred.to(dtype).requires_grad_()
    high = low.detach().float().requires_grad_()
    low_fn, high_fn = GHMRLoss(), GHMRLoss()
    for _ in range(2):
        loss, expected = low_fn(low, target), high_fn(high, target)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.equal(low.grad, high.grad.to(dtype))
    assert torch.equal(low_fn.acc_sum, high_fn.acc_sum)
    # both low: the subtraction itself must not happen in low precision
    both_low, both_high = GHMRLoss()(low, target.to(dtype)), GHMRLoss()(high, target.to(dtype))
    assert torch.equal(both_low, both_high)


def test_autocast_changes_nothing():
    pred, target = (torch.tensor(a) for a in ref.draw_boxes(np.random.default_rng(12), 100))
    plain, inside = (pred.clone().requires_grad_() for _ in range(2))
    expected = GHMRLoss()(plain, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = GHMRLoss()(inside, target)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert torch.equal(inside.grad, plain.grad)


@given(seed=seeds, rows=st.integers(1, 30), bins=st.integers(1, 30))
def test_sum_of_beta_is_n(evaluate, seed, rows, bins):
    pred, target = ref.draw_boxes(np.random.default_rng(seed), rows, bins)
    slope = ref.asl1_examples(pred, target, mu=0.02).gradient
    pred, target = pred[slope.all(axis=1)], target[slope.all(axis=1)]
    slope = slope[slope.all(axis=1)]
    if slope.size:
        _, grad = evaluate(GHMRLoss(0.02, bins, 0.0), pred, target, dtype=torch.float64)
        assert (grad / slope).sum() == pytest.approx(1.0, rel=1e-5)  # beta_i / N


@given(seed=seeds, rows=st.integers(1, 30))
def test_one_region_is_the_mean_authentic_smooth_l1(evaluate, seed, rows):
    pred, target = ref.draw_boxes(np.random.default_rng(seed), rows, 1)
    loss, grad = evaluate(GHMRLoss(bins=1, momentum=0.0), pred, target)
    v = torch.tensor(pred).requires_grad_()
    mean = authentic_smooth_l1_loss(v, torch.tensor(target), 0.02, reduction="mean")
    mean.backward()
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    np.testing.assert_allclose(grad, v.grad.numpy(), rtol=1e-5, atol=1e-9)


@given(seed=seeds, rows=st.integers(2, 40))
def test_order_of_the_rows_does_not_matter(evaluate, seed, rows):
    rng = np.random.default_rng(seed)
    pred, target = ref.draw_boxes(rng, rows)
    order = rng.permutation(rows)
    loss, grad = evaluate(GHMRLoss(), pred, target)
    moved, moved_grad = evaluate(GHMRLoss(), pred[order], target[order])
    assert moved == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(moved_grad, grad[order], rtol=1e-5, atol=1e-9)


@given(seed=seeds, rows=st.integers(2, 40), per_row=st.booleans())
def test_a_dropped_row_is_a_removed_row(evaluate, seed, rows, per_row):
    rng = np.random.default_rng(seed)
    pred, target = ref.draw_boxes(rng, rows)
    drop = rng.random(rows) < 0.4
    removed, dropped = GHMRLoss(), GHMRLoss()
    expected, expected_grad = evaluate(removed, pred[~drop], target[~drop])
    weight = np.where(drop, 0.0, rng.uniform(0.01, 9, rows))
    if not per_row:
        weight = np.repeat(weight[:, None], 4, axis=1)
    loss, grad = evaluate(dropped, pred, target, weight)
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad[~drop], expected_grad, rtol=1e-5, atol=1e-9)
    assert not grad[drop].any()
    assert torch.equal(dropped.acc_sum, removed.acc_sum)


@given(seed=seeds, loss_weight=st.floats(0, 100))
def test_linear_in_loss_weight(evaluate, seed, loss_weight):
    pred, target = ref.draw_boxes(np.random.default_rng(seed), 20)
    loss, grad = evaluate(GHMRLoss(), pred, target)
    scaled, scaled_grad = evaluate(GHMRLoss(loss_weight=loss_weight), pred, target)
    assert scaled == pytest.approx(loss_weight * loss, rel=1e-5)
    np.testing.assert_allclose(scaled_grad, loss_weight * grad, rtol=1e-5, atol=1e-9)


@given(seed=seeds, mu=st.floats(2**-10, 10, width=32), tensor=st.booleans())
def test_authentic_smooth_l1_value_and_gradient(seed, mu, tensor):
    rng = np.random.default_rng(seed)
    pred, target = rng.normal(size=(2, 7, 4))
    expected = ref.asl1_examples(pred, target, mu=mu)
    mu = torch.tensor(mu, requires_grad=True) if tensor else mu  # but its gradient is not taken
    v, t = torch.tensor(pred).requires_grad_(), torch.tensor(target)
    none = authentic_smooth_l1_loss(v, t, mu)
    np.testing.assert_allclose(none.detach().numpy(), expected.loss, rtol=1e-9, atol=1e-12)
    total = authentic_smooth_l1_loss(v, t, mu, reduction="sum")
    total.backward()
    assert total.item() == pytest.approx(expected.loss.sum())
    np.testing.assert_allclose(v.grad.numpy(), expected.gradient, rtol=1e-9)
    mean = authentic_smooth_l1_loss(v, t, mu, reduction="mean")
    assert mean.item() == pytest.approx(expected.loss.mean())


@pytest.mark.parametrize(
    "mu",
    [torch.zeros(()), torch.ones(1), torch.tensor(0.1).double(), torch.tensor(1)],
    ids=["zero", "of an axis", "float64", "integer"],
)
def test_a_tensor_that_is_no_mu(mu):
    with pytest.raises(ValueError, match="^mu must be"):
        authentic_smooth_l1_loss(torch.zeros(3), torch.zeros(3), mu)


def test_authentic_smooth_l1_is_smooth_at_zero():
    v = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = authentic_smooth_l1_loss(v, torch.zeros(3), reduction="sum")
    loss.backward()
    assert loss.item() == 0 and torch.equal(v.grad, torch.zeros_like(v))
    near = torch.full((1,), 1e-4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: authentic_smooth_l1_loss(x, torch.zeros(1)), near)


# mu "auto"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", ["unit_region", "exact"])
def test_a_following_mu_equals_the_oracle_over_several_calls(density, dtype, evaluate):
    settings = {"mu": "auto", "momentum": 0.0 if density == "exact" else 0.7, "density": density}
    loss_fn, oracle = GHMRLoss(**settings), ref.ghm_r(**settings)
    rng = np.random.default_rng(3)
    widths = []
    # the first so narrow and the last so wide that an end of the range is met
    for rows, size in ((40, 1e-3), (30, 1.0), (1, 0.3), (0, 1.0), (20, 0.1), (40, 20.0)):
        for _ in range(200):  # until no example lies where rounding decides
            pred = rng.normal(0, size, (rows, 4)).astype(np.float32)
            target, weight = np.zeros_like(pred), rng.integers(0, 2, (rows, 4))
            trial = copy.deepcopy(oracle)
            expected, expected_grad = trial(pred, target, weight)
            g = ref.asl1_examples(pred, target, mu=trial.mu).gradient_norm
            robust = ref.edge_distance(g, 10).min(initial=1) > 1e-5
            if robust and (density == "unit_region" or ref.density_is_robust(g, 0.1)):
                break
        oracle = trial
        loss, grad = evaluate(loss_fn, pred, target, weight, dtype=dtype)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-7)
        assert loss_fn.running_median.item() == pytest.approx(oracle.average, rel=1e-5)
        assert loss_fn.mu.item() == pytest.approx(oracle.mu, rel=1e-5)
        widths.append(oracle.mu)
    assert (widths[0], widths[-1]) == (0.01, 0.5) and len(set(widths)) == 5


def test_a_following_mu_of_tensors_that_share_one_step():
    rng = np.random.default_rng(9)
    for call in ("forward_pooled", "forward_levels"):
        loss_fn, oracle = GHMRLoss("auto"), ref.ghm_r(mu="auto")
        parts = [rng.normal(0, size, (9, 4)) for size in (0.1, 0.5, 2.0)]
        tensors = [torch.tensor(p) for p in parts]
        getattr(loss_fn, call)(tensors, [torch.zeros_like(x) for x in tensors])
        oracle.pooled([(p, np.zeros_like(p)) for p in parts])
        assert loss_fn.mu.item() == pytest.approx(oracle.mu, rel=1e-5)


def test_training_steps_alone_move_the_following_mu():
    pred, target = torch.randn(20, 4), torch.zeros(20, 4)
    loss_fn = GHMRLoss("auto")
    before = loss_fn(pred, target)
    kept = loss_fn.running_median.clone()
    with torch.no_grad():
        loss_fn(pred * 9, target)
    loss_fn.eval()
    assert loss_fn(pred * 9, target) != before
    assert torch.equal(loss_fn.running_median, kept)
    with pytest.raises(ValueError, match="finite"):
        loss_fn.train()(pred.masked_fill(pred > 0, torch.nan), target)
    assert torch.equal(loss_fn.running_median, kept)
    loss_fn.reset_parameters()
    assert loss_fn(pred, target) == before


def test_a_repeated_forward_pass_leaves_the_following_mu():
    pred, target = torch.randn(20, 4, requires_grad=True), torch.zeros(20, 4)
    plain, repeated = GHMRLoss("auto"), GHMRLoss("auto")
    for size in (1.0, 0.2):
        x = pred * size
        (expected,) = torch.autograd.grad(plain(x, target), pred)
        again = torch.utils.checkpoint.checkpoint(
            lambda v, f=size: repeated(v * f, target), pred, use_reentrant=False
        )
        (gradient,) = torch.autograd.grad(again, pred)
        torch.testing.assert_close(gradient, expected)
        assert torch.equal(plain.running_median, repeated.running_median)


def test_the_following_mu_is_saved_and_a_checkpoint_without_it_is_taken():
    loss_fn, other = GHMRLoss("auto"), GHMRLoss("auto")
    loss_fn(torch.randn(20, 4), torch.zeros(20, 4))
    other.load_state_dict(loss_fn.state_dict())
    assert other.mu == loss_fn.mu and list(other.state_dict()) == ["acc_sum", "running_median"]
    other.load_state_dict(GHMRLoss().state_dict())
    assert other.running_median == loss_fn.running_median
    assert "mu='auto'" in repr(other) and "running_median" not in GHMRLoss().state_dict()
    assert other.half().running_median.dtype == torch.float32


@pytest.mark.parametrize("mu", ["Auto", "", 0.0, None, True])
def test_a_width_that_is_none_is_refused(mu):
    with pytest.raises(ValueError, match="mu must be"):
        GHMRLoss(mu)


def test_kernels_take_the_following_mu():
    """More coordinates than the whole-tensor operations get on a CPU."""
    pred, target = torch.randn(3000, 4, requires_grad=True), torch.zeros(3000, 4)
    fused, eager = GHMRLoss("auto"), GHMRLoss("auto")
    for size in (0.1, 0.3):
        (found,) = torch.autograd.grad(fused(pred * size, target), pred)
        (expected,) = torch.autograd.grad(eager(pred.double() * size, target), pred)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        assert torch.equal(fused.mu, eager.mu) and fused.mu > 0.1
