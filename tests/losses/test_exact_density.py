"""The exact gradient density: by sorting it must equal its O(N^2) definition."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ghm_d2.losses import GHMCLoss, GHMRLoss, exact_gradient_density
from tests import reference as ref

seeds = st.integers(0, 2**32 - 1)


@given(
    # multiples of 1/64 and windows of 2/64 ... 1: ties and window ends are exact in binary
    steps=st.lists(st.integers(0, 64), min_size=1, max_size=60),
    half=st.integers(1, 32),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_the_definition_with_ties_and_at_window_ends(steps, half, dtype):
    g = np.array(steps) / 64
    density = exact_gradient_density(torch.tensor(g, dtype=dtype), 2 * half / 64)
    np.testing.assert_allclose(density.numpy(), ref.exact_density(g, 2 * half / 64), rtol=1e-6)


@given(seed=seeds, n=st.integers(1, 200), epsilon=st.floats(1e-3, 1))
def test_equals_the_definition_anywhere(seed, n, epsilon):
    g = np.random.default_rng(seed).beta(0.3, 0.6, size=n)
    assume(ref.density_is_robust(g, epsilon, 1e-12))
    density = exact_gradient_density(torch.tensor(g), epsilon)
    np.testing.assert_allclose(density.numpy(), ref.exact_density(g, epsilon), rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2), (0,), (0, 5)])
def test_keeps_the_shape(shape):
    g = np.random.default_rng(1).random(shape)
    density = exact_gradient_density(torch.tensor(g), 0.1)
    assert density.shape == shape
    np.testing.assert_allclose(density.numpy(), ref.exact_density(g, 0.1), rtol=1e-6)


def test_order_does_not_matter_and_the_input_is_left_alone():
    g = torch.rand(100, dtype=torch.float64)
    kept, order = g.clone(), torch.randperm(100)
    density = exact_gradient_density(g, 0.05)
    assert torch.equal(g, kept)
    assert torch.equal(exact_gradient_density(g[order], 0.05), density[order])


def test_a_uniform_distribution_has_density_n():
    g = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    density = exact_gradient_density(g, 0.1)
    np.testing.assert_allclose(density.numpy(), 10_000, rtol=2e-3)


@pytest.mark.parametrize("bad", [float("nan"), -0.01, 1.01, float("inf")])
def test_refuses_what_is_no_gradient_norm(bad):
    with pytest.raises(ValueError, match="gradient_norm"):
        exact_gradient_density(torch.tensor([0.5, bad]), 0.1)


@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan")])
def test_refuses_an_empty_window(bad):
    with pytest.raises(ValueError, match="epsilon"):
        exact_gradient_density(torch.tensor([0.5]), bad)


def robust_logits(rng, activation, bins):
    """Logits whose density no rounding of float32 can change."""
    examples = {"sigmoid": ref.sigmoid_examples, "softmax": ref.softmax_examples}[activation]
    while True:
        x, labels = ref.draw_logits(rng, 30, 3, activation=activation)
        if ref.density_is_robust(examples(x, labels).gradient_norm, 1 / bins):
            return x, labels


@pytest.mark.parametrize("bins", [1, 10, 30])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_ghm_c_with_the_exact_density(activation, bins, evaluate):
    rng = np.random.default_rng(2)
    x, labels = robust_logits(rng, activation, bins)
    weight = rng.integers(0, 4, len(x)).clip(max=1)
    switches = {"bins": bins, "momentum": 0, "activation": activation, "density": "exact"}
    loss, grad = evaluate(GHMCLoss(loss_weight=3, **switches), x, labels, weight)
    expected, expected_grad = ref.ghm_c(loss_weight=3, **switches)(x, labels, weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bins", [1, 10])
def test_ghm_r_with_the_exact_density(bins, evaluate):
    rng = np.random.default_rng(3)
    robust = False
    while not robust:
        pred, target = ref.draw_boxes(rng, 12)
        g = ref.asl1_examples(pred, target, mu=0.02).gradient_norm
        robust = ref.density_is_robust(g, 1 / bins, 1e-5)
    weight = np.array([[1, 0, 2, 1]] * 12)
    switches = {"bins": bins, "momentum": 0, "density": "exact"}
    loss, grad = evaluate(GHMRLoss(loss_weight=10, **switches), pred, target, weight)
    expected, expected_grad = ref.ghm_r(loss_weight=10, **switches)(pred, target, weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-8)


def test_pooled_density_is_that_of_all_tensors_together():
    x, labels = (torch.tensor(a) for a in robust_logits(np.random.default_rng(4), "sigmoid", 30))
    loss_fn = GHMCLoss(momentum=0, density="exact")
    pooled = loss_fn.forward_pooled(list(x.split([20, 10])), list(labels.split([20, 10])))
    assert pooled.item() == pytest.approx(loss_fn(x, labels).item(), rel=1e-5)


def test_no_examples_is_zero_and_on_the_graph():
    logits = torch.randn(4, 3, requires_grad=True)
    loss = GHMCLoss(momentum=0, density="exact")(logits, torch.full((4,), -1))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_eval_mode_equals_training_mode():
    x, labels = (torch.tensor(a) for a in robust_logits(np.random.default_rng(5), "sigmoid", 30))
    loss_fn = GHMCLoss(momentum=0, density="exact")
    assert torch.equal(loss_fn(x, labels), loss_fn.eval()(x, labels))


@pytest.mark.parametrize("make", [GHMCLoss, GHMRLoss])
@pytest.mark.parametrize(
    ("name", "value"),
    [("momentum", 0.7), ("decay_empty_bins", True), ("bias_correction", True), ("sync", True)],
)
def test_excludes_what_needs_unit_regions(make, name, value):
    with pytest.raises(ValueError, match=name):
        make(density="exact", **{"momentum": 0.0, name: value})


def test_refuses_a_window_wider_than_the_range():
    with pytest.raises(ValueError, match=r"epsilon must lie in \(0, 1\], got 1.01"):
        exact_gradient_density(torch.tensor([0.5]), 1.01)
    assert exact_gradient_density(torch.tensor([0.5]), 1).tolist() == [1.0]


def test_both_ends_of_the_range_are_gradient_norms():
    # -0.0 and 0.0 are one value, although their bit patterns sort apart
    g = torch.tensor([0.0, 1.0, -0.0, 1.0, 0.5])
    expected = ref.exact_density(g.numpy(), 0.2)
    np.testing.assert_allclose(exact_gradient_density(g, 0.2).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_density_is_float32_at_least(dtype):
    g = torch.rand(50).to(dtype)
    density = exact_gradient_density(g, 0.25)
    assert density.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = exact_gradient_density(g if dtype == torch.float64 else g.float(), 0.25)
    assert torch.equal(density, wide)


def test_norms_that_are_not_valid_count_nowhere_and_may_be_anything():
    g = np.random.default_rng(6).random((8, 5))
    valid = np.random.default_rng(7).random((8, 5)) > 0.3
    spoiled = torch.from_numpy(np.where(valid, g, np.nan))
    density = exact_gradient_density(spoiled, 0.1, torch.from_numpy(valid)).numpy()
    np.testing.assert_allclose(density[valid], ref.exact_density(g[valid], 0.1), rtol=1e-6)
    assert (density[~valid] == 1).all()


def test_pooling_nothing_with_the_exact_density_is_zero():
    assert GHMCLoss(momentum=0, density="exact").forward_pooled([], []).item() == 0
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = GHMCLoss(momentum=0, density="exact")(logits, torch.zeros(0).long())
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 3)


def test_a_window_is_closed_below_and_open_above():
    # [0, 0.5) holds 0.25 alone, [0.25, 0.75) both; both are 0.5 long
    for dtype in (torch.float32, torch.float64):
        density = exact_gradient_density(torch.tensor([0.25, 0.5], dtype=dtype), 0.5)
        assert density.tolist() == [2.0, 4.0]
