"""GHM-C: value, gradient and properties, against the float64 oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghm_d2.losses import GHMCLoss, sigmoid_examples
from tests import reference as ref

ACTIVATIONS = ["sigmoid", "softmax"]
seeds = st.integers(0, 2**32 - 1)


def dense(labels, classes):
    """Integer labels without ignored ones as a dense (R, K) target."""
    return (labels[:, None] == np.arange(classes)).astype(np.float32)


def example_weights(loss_fn, evaluate, logits, labels, weight=None):
    """beta_i / N of each sigmoid example, recovered from the gradient."""
    _, grad = evaluate(loss_fn, logits, labels, weight, dtype=torch.float64)
    return grad / ref.sigmoid_examples(logits, labels).gradient


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("decay_empty_bins", [False, True])
@pytest.mark.parametrize("normalize_by", ["valid_bins", "all_bins"])
@pytest.mark.parametrize("momentum", [0.0, 0.75])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_oracle_over_several_calls(
    activation, momentum, normalize_by, decay_empty_bins, bias_correction, evaluate
):
    settings = {
        "bins": 20,
        "momentum": momentum,
        "loss_weight": 1.7,
        "activation": activation,
        "normalize_by": normalize_by,
        "decay_empty_bins": decay_empty_bins,
        "bias_correction": bias_correction,
    }
    loss_fn, oracle = GHMCLoss(**settings), ref.ghm_c(**settings)
    rng = np.random.default_rng(3)
    # few rows at times, so that regions are empty in one call and filled in another
    for rows in (60, 2, 25, 1, 60):
        x, labels = ref.draw_logits(rng, rows, 4, 20, activation=activation)
        weight = (rng.random(rows) < 0.8) * rng.uniform(0.1, 3, rows)
        loss, grad = evaluate(loss_fn, x, labels, weight)
        expected, expected_grad = oracle(x, labels, weight)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-8)
        if momentum:
            np.testing.assert_allclose(loss_fn.acc_sum.numpy(), oracle.counts.sums, rtol=1e-5)


@pytest.mark.parametrize("classes", [1, 80])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_oracle_with_one_class_and_with_many(activation, classes, evaluate):
    x, labels = ref.draw_logits(np.random.default_rng(4), 40, classes, activation=activation)
    loss, grad = evaluate(GHMCLoss(activation=activation), x, labels)
    expected, expected_grad = ref.ghm_c(activation=activation)(x, labels)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bins", [1, 30])
def test_both_ends_of_the_range_belong_to_a_region(bins, evaluate):
    # float32 gradient norms of exactly 0 and exactly 1
    x, labels = np.array([[200.0, -200.0]], dtype=np.float32), np.array([1])
    loss, grad = evaluate(GHMCLoss(bins, 0.0), x, labels)
    assert loss == pytest.approx(200.0)  # two losses of 200 in one region of two
    np.testing.assert_allclose(grad, [[0.5, -0.5]])


@pytest.mark.parametrize(("bins", "region"), [(2, 1), (10, 5), (30, 15), (3, 1)])
def test_a_gradient_norm_on_an_edge_belongs_to_the_region_above(bins, region):
    loss_fn = GHMCLoss(bins, 0.5)
    loss_fn(torch.zeros(3, 2), torch.tensor([0, 1, 2]))  # g = 0.5 exactly
    expected = torch.zeros(bins)
    expected[region] = 3.0
    assert torch.equal(loss_fn.acc_sum, expected)


@pytest.mark.parametrize("bins", [10, 20, 30, 40])
def test_float32_decides_next_to_an_edge_as_in_the_published_code(bins):
    # there g is compared with j / M, both float32; g * M would round up to j from below at
    # 17/20, j * (1 / M) would be another float32 than j / M at 3/30
    edges = np.arange(bins + 1, dtype=np.float32) / np.float32(bins)
    centre = np.log(edges[1:-1] / (1 - edges[1:-1]))
    step = np.spacing(np.maximum(np.abs(centre), np.float32(0.1)))
    near = centre[:, None] + step[:, None] * np.arange(-32, 32, dtype=np.float32)
    x = torch.from_numpy(near.reshape(-1, 1))
    g = x.sigmoid().numpy()
    expected = [np.count_nonzero((g >= edges[j]) & (g < edges[j + 1])) for j in range(bins)]
    loss_fn = GHMCLoss(bins, 0.5)
    loss_fn(x, torch.ones(len(x), dtype=torch.int64))
    assert loss_fn.acc_sum.tolist() == [count / 2 for count in expected]


@pytest.mark.parametrize("label_type", [torch.float32, torch.int64, torch.bool])
def test_dense_labels_equal_integer_labels(label_type, evaluate):
    x, labels = ref.draw_logits(np.random.default_rng(5), 50, 4, ignored=0)
    expected, expected_grad = evaluate(GHMCLoss(), x, labels)
    loss, grad = evaluate(GHMCLoss(), x, torch.from_numpy(dense(labels, 4)).to(label_type))
    assert loss == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-6)


def test_dense_labels_may_mark_several_classes_of_a_row(evaluate):
    rng = np.random.default_rng(6)
    x, t = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 2, (40, 5))
    keep = ref.rows_off_edges(ref.sigmoid_examples(x, t), 30, 2e-6)
    loss, grad = evaluate(GHMCLoss(), x[keep], t[keep])
    expected, expected_grad = ref.ghm_c()(x[keep], t[keep])
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-8)


def test_weight_may_drop_single_examples(evaluate):
    rng = np.random.default_rng(7)
    x, labels = ref.draw_logits(rng, 40, 5)
    weight = rng.choice([0.0, 0.5, 2.0], size=x.shape)
    loss, grad = evaluate(GHMCLoss(), x, labels, weight)
    expected, expected_grad = ref.ghm_c()(x, labels, weight)
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("weight_type", [torch.bool, torch.int64, torch.float16])
def test_weight_of_any_type_is_a_mask(weight_type, evaluate):
    x, labels = ref.draw_logits(np.random.default_rng(8), 30, 3)
    weight = torch.arange(30).remainder(3).clamp(max=1)
    expected = evaluate(GHMCLoss(), x, labels, weight.float())
    loss, grad = evaluate(GHMCLoss(), x, labels, weight.to(weight_type))
    assert loss == expected[0]
    np.testing.assert_array_equal(grad, expected[1])


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pooled_is_one_histogram_over_all_tensors(activation, with_weights):
    rng = np.random.default_rng(9)
    loss_fn, oracle = GHMCLoss(activation=activation), ref.ghm_c(activation=activation)
    for _ in range(3):
        parts = [ref.draw_logits(rng, rows, 4, activation=activation) for rows in (40, 9, 0, 1)]
        weights = [rng.integers(0, 2, len(x)) for x, _ in parts] if with_weights else None
        xs = [torch.tensor(x).requires_grad_() for x, _ in parts]
        labels = [torch.tensor(t) for _, t in parts]
        tensors = weights and [torch.tensor(w) for w in weights]
        loss = loss_fn.forward_pooled(xs, labels, tensors)
        loss.backward()
        if with_weights:
            parts = [(x, t, w) for (x, t), w in zip(parts, weights, strict=True)]
        expected, grads = oracle.pooled(parts)
        assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-5)
        for x, grad in zip(xs, grads, strict=True):
            np.testing.assert_allclose(x.grad.numpy(), grad, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(loss_fn.acc_sum.numpy(), oracle.counts.sums, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_with_frozen_counts(activation):
    rng = np.random.default_rng(10)
    loss_fn = GHMCLoss(activation=activation).double()
    for _ in range(2):
        x, labels = ref.draw_logits(
            rng, 15, 3, activation=activation, dtype=np.float64, margin=1e-4
        )
        inputs, labels = torch.tensor(x).requires_grad_(), torch.tensor(labels)
        loss_fn.train()(inputs, labels)
        loss_fn.eval()
        # the call's own counts enter the weights too; no step of 1e-6 crosses an edge
        assert torch.autograd.gradcheck(lambda v: loss_fn(v, labels), inputs)  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_low_precision_equals_float32_on_the_same_values(activation, dtype):
    rng = np.random.default_rng(11)
    x, labels = ref.draw_logits(rng, 300, 4, activation=activation)
    low = torch.tensor(x).to(dtype).requires_grad_()
    high, labels = low.detach().float().requires_grad_(), torch.tensor(labels)
    low_fn, high_fn = GHMCLoss(activation=activation), GHMCLoss(activation=activation)
    for _ in range(2):
        loss, expected = low_fn(low, labels), high_fn(high, labels)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.equal(low.grad, high.grad.to(dtype))
    assert torch.equal(low_fn.acc_sum, high_fn.acc_sum)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_changes_nothing(activation):
    x, labels = ref.draw_logits(np.random.default_rng(12), 100, 4, activation=activation)
    plain, inside = (torch.tensor(x).requires_grad_() for _ in range(2))
    labels = torch.tensor(labels)
    expected = GHMCLoss(activation=activation)(plain, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = GHMCLoss(activation=activation)(inside, labels)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert torch.equal(inside.grad, plain.grad)


def test_half_survives_count_ratios_above_its_range():
    # 300 000 easy examples and one hard one: a ratio of 3e5, where half ends at 65504
    logits = torch.full((300_000, 1), -6.0, dtype=torch.float16)
    logits[0] = 2.0
    logits.requires_grad_()
    labels = torch.ones(300_000, dtype=torch.int64)
    loss = GHMCLoss(momentum=0.0).half()(logits, labels)
    loss.backward()
    easy, hard = np.log1p(np.exp(-6.0)), np.log1p(np.exp(2.0))
    assert loss.item() == pytest.approx((easy * 299_999 / 299_999 + hard) / 2, rel=1e-5)
    assert logits.grad[0].item() == pytest.approx(ref.sigmoid(np.array(2.0)) / 2, rel=1e-3)


@given(seed=seeds, rows=st.integers(1, 30), classes=st.integers(1, 5), bins=st.integers(1, 40))
def test_sum_of_beta_is_n(evaluate, seed, rows, classes, bins):
    x, labels = ref.draw_logits(np.random.default_rng(seed), rows, classes, bins, ignored=0)
    weights = example_weights(GHMCLoss(bins, 0.0), evaluate, x, labels)
    assert weights.sum() == pytest.approx(1.0, rel=1e-5)  # beta_i / N
    # dividing by all regions: the share of the regions that hold an example
    counts = ref.region_counts(ref.sigmoid_examples(x, labels).gradient_norm, bins)
    all_bins = GHMCLoss(bins, 0.0, normalize_by="all_bins")
    share = np.count_nonzero(counts) / bins
    assert example_weights(all_bins, evaluate, x, labels).sum() == pytest.approx(share, rel=1e-5)


@given(seed=seeds, rows=st.integers(1, 30), classes=st.integers(1, 5))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_region_is_the_mean_cross_entropy(evaluate, activation, seed, rows, classes):
    x, labels = ref.draw_logits(
        np.random.default_rng(seed), rows, classes, 1, activation=activation, ignored=0
    )
    loss, grad = evaluate(GHMCLoss(1, 0.0, activation=activation), x, labels)
    v = torch.tensor(x, dtype=torch.float64).requires_grad_()  # PyTorch's own loses digits
    if activation == "softmax":
        mean = torch.nn.functional.cross_entropy(v, torch.tensor(labels))
    else:
        target = torch.from_numpy(dense(labels, classes)).double()
        mean = torch.nn.functional.binary_cross_entropy_with_logits(v, target)
    mean.backward()
    # float32 holds a probability near 1, and so the loss of an easy row, to 1e-7.
    assert loss == pytest.approx(mean.item(), rel=1e-5, abs=2e-7)
    np.testing.assert_allclose(grad, v.grad.numpy(), rtol=1e-5, atol=1e-7)


@given(seed=seeds, rows=st.integers(2, 40))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_order_of_the_rows_does_not_matter(evaluate, activation, seed, rows):
    rng = np.random.default_rng(seed)
    x, labels = ref.draw_logits(rng, rows, 3, activation=activation)
    order = rng.permutation(rows)
    loss, grad = evaluate(GHMCLoss(activation=activation), x, labels)
    moved, moved_grad = evaluate(GHMCLoss(activation=activation), x[order], labels[order])
    assert moved == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(moved_grad, grad[order], rtol=1e-5, atol=1e-9)


@given(seed=seeds, rows=st.integers(2, 40), by=st.sampled_from(["label", "weight"]))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_ignored_row_is_a_removed_row(evaluate, activation, seed, rows, by):
    rng = np.random.default_rng(seed)
    x, labels = ref.draw_logits(rng, rows, 3, activation=activation, ignored=0)
    drop = rng.random(rows) < 0.4
    weight = None
    removed, ignored = GHMCLoss(activation=activation), GHMCLoss(activation=activation)
    expected, expected_grad = evaluate(removed, x[~drop], labels[~drop])
    if by == "label":
        labels[drop] = -1
    else:
        weight = np.where(drop, 0.0, rng.uniform(0.01, 9, rows))
    loss, grad = evaluate(ignored, x, labels, weight)
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad[~drop], expected_grad, rtol=1e-5, atol=1e-9)
    assert not grad[drop].any()
    assert torch.equal(ignored.acc_sum, removed.acc_sum)


@given(seed=seeds, rows=st.integers(1, 30))
def test_row_weight_is_the_same_as_the_weight_of_every_example(evaluate, seed, rows):
    rng = np.random.default_rng(seed)
    x, labels = ref.draw_logits(rng, rows, 3)
    weight = rng.choice([0.0, 0.3, 4.0], size=rows)
    loss, grad = evaluate(GHMCLoss(), x, labels, weight)
    full, full_grad = evaluate(GHMCLoss(), x, labels, np.repeat(weight[:, None], 3, axis=1))
    assert full == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(full_grad, grad, rtol=1e-6)


@given(seed=seeds, loss_weight=st.floats(0, 100))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_in_loss_weight(evaluate, activation, seed, loss_weight):
    x, labels = ref.draw_logits(np.random.default_rng(seed), 20, 3, activation=activation)
    loss, grad = evaluate(GHMCLoss(activation=activation), x, labels)
    scaled_fn = GHMCLoss(loss_weight=loss_weight, activation=activation)
    scaled, scaled_grad = evaluate(scaled_fn, x, labels)
    assert scaled == pytest.approx(loss_weight * loss, rel=1e-5)
    np.testing.assert_allclose(scaled_grad, loss_weight * grad, rtol=1e-5, atol=1e-9)


def test_large_logits_keep_the_digits_of_float64():
    # softplus returns its argument above a threshold of 20
    x, labels = np.array([[20.5, -20.5], [3.0, 30.0]]), np.array([2, 0])
    loss, _ = sigmoid_examples(torch.from_numpy(x), torch.from_numpy(labels))
    np.testing.assert_allclose(loss.numpy(), ref.sigmoid_examples(x, labels).loss, rtol=1e-15)


# Layouts, soft targets, ignored labels, class weights: the same examples in another form.

LAYOUTS = {
    "(B, N, K)": ((3, 10), {}),
    "(N, K, H, W)": ((2, 3, 5), {"class_dim": 1}),
    "(N, K, H, W) from behind": ((2, 3, 5), {"class_dim": -3}),
    "(K, R)": ((30,), {"class_dim": 0}),
}


def in_layout(x, rows, class_dim=-1):
    """(R, K) as the layout of `rows` with the classes along `class_dim`."""
    return np.moveaxis(x.reshape(*rows, -1), -1, class_dim)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("masked", [None, "rows", "examples"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_the_plain_one_rearranged(evaluate, layout, activation, masked, dtype):
    rows, settings = LAYOUTS[layout]
    rng = np.random.default_rng(20)
    x, labels = ref.draw_logits(rng, 30, 4, activation=activation)
    weight = None
    if masked:
        whole = masked == "examples" and activation == "sigmoid"
        weight = rng.integers(0, 2, x.shape if whole else 30).astype(np.float32)
    arranged = weight
    if weight is not None:
        arranged = in_layout(weight, rows, **settings) if weight.ndim == 2 else weight.reshape(rows)
    expected_loss, expected = ref.ghm_c(activation=activation)(x, labels, weight)
    loss, grad = evaluate(
        GHMCLoss(activation=activation, **settings),
        in_layout(x, rows, **settings),
        labels.reshape(rows),
        arranged,
        dtype=dtype,
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    np.testing.assert_allclose(grad, in_layout(expected, rows, **settings), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_labels_in_a_layout(evaluate, layout):
    rows, settings = LAYOUTS[layout]
    x, labels = ref.draw_logits(np.random.default_rng(21), 30, 4, ignored=0)
    t = dense(labels, 4)
    expected_loss, expected = ref.ghm_c()(x, t)
    loss, grad = evaluate(
        GHMCLoss(**settings), in_layout(x, rows, **settings), in_layout(t, rows, **settings)
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    np.testing.assert_allclose(grad, in_layout(expected, rows, **settings), rtol=1e-4, atol=1e-7)


def draw_soft(rng, rows, classes, bins=30, margin=1e-5):
    """Logits and soft targets whose gradient norms lie beside no edge; some are 0 or 1."""
    x = rng.normal(-1, 2, size=(4 * rows, classes)).astype(np.float32)
    t = rng.random((4 * rows, classes)).astype(np.float32)
    t[rng.random(t.shape) < 0.4] = 0
    t[rng.random(t.shape) < 0.1] = 1
    good = ref.rows_off_edges(ref.sigmoid_examples(x, t), bins, margin)
    return x[good][:rows], t[good][:rows]


SOFT = pytest.mark.parametrize(
    "switches",
    [
        {},
        {"momentum": 0.0, "normalize_by": "all_bins"},
        {"decay_empty_bins": True, "bias_correction": True, "loss_weight": 3.0},
        {"bins": 7},
    ],
    ids=str,
)


@SOFT
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_soft_targets(evaluate, switches, weighted, dtype):
    rng = np.random.default_rng(22)
    loss_fn, oracle = GHMCLoss(**switches), ref.ghm_c(**switches)
    for rows in (40, 3, 40):
        x, t = draw_soft(rng, 4 * rows, 3, switches.get("bins", 30))
        if dtype == torch.float16:
            x = x.astype(np.float16).astype(np.float32)
            good = ref.rows_off_edges(ref.sigmoid_examples(x, t), switches.get("bins", 30), 1e-5)
            x, t = x[good], t[good]
        weight = rng.integers(0, 2, x.shape).astype(np.float32) if weighted else None
        loss, grad = evaluate(loss_fn, x, t, weight, dtype=dtype)
        expected_loss, expected = oracle(x, t, weight)
        assert loss == pytest.approx(expected_loss, rel=2e-5)
        low = dtype == torch.float16
        np.testing.assert_allclose(grad, expected, rtol=2e-3 if low else 1e-4, atol=1e-7)
        np.testing.assert_allclose(loss_fn.acc_sum, oracle.counts.sums, rtol=1e-6)


def test_soft_targets_of_zero_and_one_are_the_hard_ones(evaluate):
    x, labels = ref.draw_logits(np.random.default_rng(23), 40, 4, ignored=0)
    hard = dense(labels, 4)
    almost = hard.astype(np.float64)
    almost[0, 0] = abs(almost[0, 0] - 1e-12)  # one soft target: no kernel
    expected = evaluate(GHMCLoss(), x, labels)
    found = evaluate(GHMCLoss(), x, almost)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("soft", [False, True])
def test_logits_of_one_class_need_no_axis(evaluate, soft):
    rng = np.random.default_rng(24)
    x, t = draw_soft(rng, 40, 1)
    if not soft:
        t = (t > 0.5).astype(np.int64)
        good = ref.rows_off_edges(ref.sigmoid_examples(x, t), 30, 1e-5)
        x, t = x[good], t[good]
    weight = rng.integers(0, 2, len(x)).astype(np.float32)
    expected_loss, expected = ref.ghm_c()(x, t, weight[:, None])
    loss, grad = evaluate(GHMCLoss(), x[:, 0], t[:, 0], weight)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    np.testing.assert_allclose(grad, expected[:, 0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("ignore_index", [255, -100, 2, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_ignored_label(evaluate, activation, ignore_index, dtype):
    x, labels = ref.draw_logits(np.random.default_rng(25), 40, 4, activation=activation)
    labels[labels == -1] = ignore_index
    loss_fn = GHMCLoss(activation=activation, ignore_index=ignore_index)
    oracle = ref.ghm_c(activation=activation, ignored=ignore_index)
    loss, grad = evaluate(loss_fn, x, labels, dtype=dtype)
    expected_loss, expected = oracle(x, labels)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(loss_fn.acc_sum, oracle.counts.sums, rtol=1e-6)


@pytest.mark.parametrize("ignore_index", [255, -1])
@pytest.mark.parametrize("kind", [np.int64, np.float32])
def test_ignored_entries_of_dense_labels(evaluate, ignore_index, kind):
    rng = np.random.default_rng(26)
    x, labels = ref.draw_logits(rng, 40, 4, ignored=0)
    t = dense(labels, 4).astype(kind)
    t[rng.random(t.shape) < 0.2] = ignore_index
    loss, grad = evaluate(GHMCLoss(ignore_index=ignore_index), x, t)
    expected_loss, expected = ref.ghm_c(ignored=ignore_index)(x, t)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("density", ["unit_region", "exact"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_class_weights_multiply_the_loss_and_leave_the_counts(
    evaluate, activation, density, as_tensor
):
    rng = np.random.default_rng(27)
    factors = [0.0, 0.5, 1.0, 4.0]
    momentum = 0.0 if density == "exact" else 0.75
    settings = {"activation": activation, "momentum": momentum, "density": density}
    loss_fn = GHMCLoss(class_weight=torch.tensor(factors) if as_tensor else factors, **settings)
    oracle = ref.ghm_c(
        class_weight=np.array(factors + [1.0] * (activation == "softmax")), **settings
    )
    plain = ref.ghm_c(**settings)
    for rows in (40, 5):
        x, labels = ref.draw_logits(rng, rows, 4, activation=activation)
        loss, grad = evaluate(loss_fn, x, labels)
        expected_loss, expected = oracle(x, labels)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-7)
        plain(x, labels)
        np.testing.assert_allclose(loss_fn.acc_sum, plain.counts.sums, rtol=1e-6)


def test_a_class_weight_of_the_background(evaluate):
    x, labels = ref.draw_logits(np.random.default_rng(28), 40, 4, activation="softmax")
    factors = np.array([1.0, 2.0, 3.0, 4.0, 0.1])
    loss, _ = evaluate(GHMCLoss(activation="softmax", class_weight=factors.tolist()), x, labels)
    expected, _ = ref.ghm_c(activation="softmax", class_weight=factors)(x, labels)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_class_weights_are_settings_and_no_state():
    loss_fn = GHMCLoss(class_weight=[1, 2, 3])
    assert list(loss_fn.state_dict()) == ["acc_sum"]
    assert loss_fn.half().class_weight.tolist() == [1.0, 2.0, 3.0]
    assert loss_fn.class_weight.dtype == torch.float32
    assert "class_weight=[1.0, 2.0, 3.0]" in repr(loss_fn)
    assert "ignore_index=255, " in repr(GHMCLoss(ignore_index=255, class_weight=[1.0]))


@given(
    seed=st.integers(0, 2**16),
    class_dim=st.sampled_from([-1, 0, 1]),
    ignore_index=st.sampled_from([None, 255, -7]),
    soft=st.booleans(),
    weighted=st.booleans(),
    class_weighted=st.booleans(),
    normalize_by=st.sampled_from(["valid_bins", "all_bins"]),
    decay=st.booleans(),
    correction=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_every_switch_together(
    evaluate, seed, class_dim, ignore_index, soft, weighted, class_weighted, normalize_by, decay,
    correction, dtype,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    settings = {
        "normalize_by": normalize_by,
        "decay_empty_bins": decay,
        "bias_correction": correction,
    }
    factors = rng.uniform(0, 3, 3).tolist() if class_weighted else None
    layout = {"class_dim": class_dim, "ignore_index": ignore_index, "class_weight": factors}
    loss_fn = GHMCLoss(**layout, **settings)
    ignored = -1 if ignore_index is None else ignore_index
    oracle = ref.ghm_c(class_weight=factors, ignored=ignored, **settings)
    for rows in (12, 2, 12):
        if soft:
            x, t = draw_soft(rng, rows, 3)
            if ignore_index is not None:
                t[rng.random(t.shape) < 0.2] = ignore_index
        else:
            x, t = ref.draw_logits(rng, rows, 3)
            t[t == -1] = ignored
        weight = rng.integers(0, 2, rows).astype(np.float32) if weighted else None
        arranged = np.moveaxis(t, -1, class_dim) if soft else t
        loss, grad = evaluate(loss_fn, np.moveaxis(x, -1, class_dim), arranged, weight, dtype=dtype)
        expected_loss, expected = oracle(x, t, weight)
        assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-7)
        np.testing.assert_allclose(np.moveaxis(grad, class_dim, -1), expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(loss_fn.acc_sum, oracle.counts.sums, rtol=1e-6)
