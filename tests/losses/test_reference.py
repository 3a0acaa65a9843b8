"""The oracle against hand-computed cases, numerical gradients and the published loss values."""

import math
from pathlib import Path

import numpy as np
import pytest

from tests import reference as ref

DATA = Path(__file__).parents[1] / "data"


def numerical_gradient(f, x, step=1e-6):
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        grad[i] = (f(up) - f(down)) / (2 * step)
    return grad


def test_sigmoid_examples_by_hand():
    e = ref.sigmoid_examples(np.array([[0.0, math.log(3)], [0.0, 0.0], [5.0, 5.0]]), [1, 2, -1])
    np.testing.assert_allclose(e.gradient_norm[0], [0.5, 0.25])
    np.testing.assert_allclose(e.loss[0], [math.log(2), math.log(4 / 3)])
    np.testing.assert_allclose(e.gradient[0], [0.5, -0.25])
    np.testing.assert_allclose(e.gradient[1], [0.5, 0.5])
    assert e.keep.tolist() == [[True, True], [True, True], [False, False]]


def test_softmax_examples_by_hand():
    e = ref.softmax_examples(np.log([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]]), [1, -1])
    np.testing.assert_allclose(e.gradient_norm[0], 0.75)
    np.testing.assert_allclose(e.loss[0], math.log(4))
    np.testing.assert_allclose(e.gradient[0], [0.125, -0.75, 0.625])
    assert e.keep.tolist() == [True, False]


def test_asl1_examples_by_hand():
    e = ref.asl1_examples([[3.0, -4.0]], [[0.0, -1.0]], mu=4.0)
    np.testing.assert_allclose(e.loss, [[1.0, 1.0]])
    np.testing.assert_allclose(e.gradient_norm, [[0.6, 0.6]])
    np.testing.assert_allclose(e.gradient, [[0.6, -0.6]])


def test_regions_are_half_open_and_the_last_one_closed():
    g = np.array([0.0, 0.24, 0.25, 0.5, 0.75, 0.99, 1.0])
    assert ref.region_counts(g, 4).tolist() == [2, 1, 1, 3]


def test_exact_density_by_hand():
    # eps = 0.5: windows [g - 0.25, g + 0.25); lengths 0.25, 0.5, 0.5, 0.25
    density = ref.exact_density(np.array([0.0, 0.25, 0.5, 1.0]), 0.5)
    np.testing.assert_allclose(density, [1 / 0.25, 2 / 0.5, 2 / 0.5, 1 / 0.25])


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        # counts (4, 0), then (2, 6): weights of the second call, alpha = 0.5
        ({}, [1 / (2 * 2), 1 / (3 * 2)]),
        ({"normalize_by": "all_bins"}, [1 / (2 * 3), 1 / (3 * 3)]),
        # region 1 is corrected by 1 - 0.5 without the first update, by 1 - 0.25 with it
        ({"bias_correction": True}, [0.75 / (2 * 2), 0.5 / (3 * 2)]),
        ({"bias_correction": True, "decay_empty_bins": True}, [0.75 / 4, 0.75 / 6]),
    ],
)
def test_running_counts_by_hand(switches, expected):
    counts = ref.RunningCounts(3, 0.5, **switches)
    counts.region_weights(np.array([4, 0, 0]), write=True)
    weights = counts.region_weights(np.array([2, 6, 0]), write=True)
    np.testing.assert_allclose(weights, [*expected, 0.0])
    np.testing.assert_allclose(counts.sums, [2.0, 3.0, 0.0])


def test_only_decay_lowers_an_empty_region():
    for decay, kept in ((False, 2.0), (True, 1.0)):
        counts = ref.RunningCounts(2, 0.5, decay_empty_bins=decay)
        counts.region_weights(np.array([4, 0]), write=True)
        counts.region_weights(np.array([0, 4]), write=True)
        np.testing.assert_allclose(counts.sums, [kept, 2.0])


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_closed_form_gradient_of_ghm_c(activation):
    x, labels = ref.draw_logits(
        np.random.default_rng(1), 12, 3, activation=activation, dtype=np.float64, margin=1e-4
    )
    loss = ref.ghm_c(activation=activation)
    loss(x, labels)
    loss.training = False
    expected = numerical_gradient(lambda v: loss(v, labels)[0], x)
    np.testing.assert_allclose(loss(x, labels)[1], expected, rtol=1e-6, atol=1e-9)


def test_closed_form_gradient_of_ghm_r():
    pred, target = ref.draw_boxes(np.random.default_rng(1), 12, dtype=np.float64, margin=1e-3)
    loss = ref.ghm_r()
    loss(pred, target)
    loss.training = False
    expected = numerical_gradient(lambda v: loss(v, target)[0], pred)
    np.testing.assert_allclose(loss(pred, target)[1], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["momentum", "no_momentum"])
def test_oracle_reproduces_the_published_losses(name):
    with np.load(DATA / f"ghm_official_{name}.npz") as file:
        z = dict(file)
    classes = int(z["meta_K"])
    cls = ref.ghm_c(bins=int(z["meta_bins_cls"]), momentum=float(z["meta_momentum_cls"]))
    box = ref.ghm_r(
        mu=float(z["meta_mu"]),
        bins=int(z["meta_bins_box"]),
        momentum=float(z["meta_momentum_box"]),
        loss_weight=float(z["meta_loss_weight_box"]),
    )
    for i in range(int(z["meta_iters"])):
        for level in range(len(z["meta_levels"])):
            key = f"it{i}_l{level}_"
            labels = z[key + "labels"]
            loss, grad = cls(z[key + "logits"], labels)
            np.testing.assert_allclose(loss, z[key + "loss_cls"], rtol=1e-5)
            np.testing.assert_allclose(grad, z[key + "grad_logits"], rtol=1e-5, atol=1e-9)
            positive = (labels >= 0) & (labels < classes)
            loss, grad = box(z[key + "deltas"], z[key + "targets"], positive)
            np.testing.assert_allclose(loss, z[key + "loss_box"], rtol=1e-5)
            np.testing.assert_allclose(grad, z[key + "grad_deltas"], rtol=1e-5, atol=1e-9)
            if name == "momentum":
                np.testing.assert_allclose(cls.counts.sums, z[key + "acc_cls"], rtol=1e-5)
                np.testing.assert_allclose(box.counts.sums, z[key + "acc_box"], rtol=1e-5)
