"""Numbers at their limits: precision, huge logits, one example, 10^8 of them; fused and eager."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghm_d2.losses import GHMCLoss, GHMRLoss, fused

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOMENTA = (0.0, 0.9, 0.999)


def softmax_loss(**settings):
    return GHMCLoss(activation="softmax", **settings)


MODULES = {"sigmoid": GHMCLoss, "softmax": softmax_loss, "boxes": GHMRLoss}
KINDS = pytest.mark.parametrize("kind", MODULES)


def eager():
    return mock.patch.object(fused, "_has_kernel", return_value=False)


def run(loss_fn, inputs, weight=None):
    """Loss and gradient of one call."""
    x = inputs[0].clone().requires_grad_()
    loss = loss_fn(x, inputs[1], weight)
    loss.backward()
    return loss.detach(), x.grad


def both_paths(kind, inputs, weight=None, calls=1, **settings):
    """Loss and gradient of the last call, after fused and eager path were found to agree."""
    with_kernels, without = MODULES[kind](**settings), MODULES[kind](**settings)
    for _ in range(calls):
        loss, gradient = run(with_kernels, inputs, weight)
        with eager():
            expected, expected_gradient = run(without, inputs, weight)
    assert torch.equal(with_kernels.acc_sum, without.acc_sum)
    low = inputs[0].dtype in (torch.float16, torch.bfloat16)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=1e-2 if low else 1e-5, atol=1e-6 if low else 1e-8
    )
    return loss, gradient


def draw(kind, rows, classes, scale, dtype, seed):
    """Predictions of about the size `scale` and targets, a third of them ignored or background."""
    g = torch.Generator().manual_seed(seed)
    if kind == "boxes":
        pred, target = torch.randn(2, rows, 4, generator=g)
        return (pred * scale).to(dtype), (target * scale).to(dtype)
    columns = classes + (kind == "softmax")
    labels = torch.randint(-1, classes + 1, (rows,), generator=g)
    return (torch.randn(rows, columns, generator=g) * scale).to(dtype), labels


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs_in", [torch.float32, torch.float16, torch.float64], ids=str)
def test_autocast_changes_nothing(kind, dtype, inputs_in):
    inputs = draw(kind, 60, 3, 3.0, inputs_in, 1)
    expected = run(MODULES[kind](), inputs)
    with torch.autocast("cpu", dtype=dtype):
        loss = run(MODULES[kind](), inputs)
    assert loss[0].dtype == (torch.float64 if inputs_in == torch.float64 else torch.float32)
    assert torch.equal(loss[0], expected[0]) and torch.equal(loss[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand(dtype):
    # both classes of one row: one right without doubt and one wrong without doubt
    logits = torch.tensor([[1e4, -1e4], [-1e4, -1e4], [-1e4, -1e4]], dtype=dtype)
    wrong = -logits[1, 0].item()  # what the dtype makes of 10^4
    loss, gradient = both_paths("sigmoid", (logits, torch.tensor([0, 0, 2])), momentum=0.0)
    # g is 0 for five examples and 1 for one; two regions, each weighs its mean
    assert loss.item() == pytest.approx(wrong / 2, rel=1e-6)
    assert gradient[1, 0].item() == pytest.approx(-0.5) and gradient.count_nonzero() == 1
    loss, gradient = both_paths("softmax", (logits, torch.tensor([0, 0, 1])), momentum=0.0)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    loss, _ = both_paths("softmax", (logits[:1], torch.tensor([1])), momentum=0.0)
    assert loss.item() == pytest.approx(2 * wrong, rel=1e-6)
    pred = torch.tensor([[1e4, -1e4, 0.0, 0.0]], dtype=dtype)
    loss, gradient = both_paths("boxes", (pred, torch.zeros_like(pred)), momentum=0.0)
    assert loss.item() == pytest.approx((wrong - 0.02) / 2, rel=1e-5)
    torch.testing.assert_close(gradient, torch.tensor([[0.25, -0.25, 0.0, 0.0]], dtype=dtype))


@KINDS
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("rows", [1, 700])
def test_all_examples_in_one_region_have_the_mean_loss(kind, momentum, rows):
    """Also a single one, with a single class; the average starts at 0, so it shows in the value."""
    if kind == "boxes":
        pred = torch.full((rows, 1), 0.02)
        inputs, each = (pred, torch.zeros(rows, 1)), 0.02 * (2**0.5 - 1)
    elif kind == "sigmoid":
        inputs = (torch.full((rows, 1), -2.0), torch.ones(rows, dtype=torch.int64))
        each = 0.126928
    else:
        inputs = (torch.tensor([[2.0, 0.0]]).repeat(rows, 1), torch.zeros(rows, dtype=torch.int64))
        each = 0.126928
    for calls in (1, 3):
        loss, gradient = both_paths(kind, inputs, calls=calls, momentum=momentum)
        filled = 1 - momentum**calls
        assert loss.item() == pytest.approx(each / filled, rel=2e-5)
        corrected, _ = both_paths(
            kind, inputs, calls=calls, momentum=momentum, bias_correction=True
        )
        assert corrected.item() == pytest.approx(each, rel=2e-5)
        assert torch.isfinite(gradient).all() and gradient.count_nonzero()


ARGUMENTS = {
    "kind": st.sampled_from(sorted(MODULES)),
    "rows": st.integers(0, 12),
    "classes": st.integers(1, 4),
    "dtype": st.sampled_from(DTYPES),
    "scale": st.sampled_from([0.0, 1e-3, 0.1, 3.0, 300.0]),
    "bins": st.integers(1, 40),
    "momentum": st.sampled_from(MOMENTA),
    "normalize_by": st.sampled_from(["valid_bins", "all_bins"]),
    "decay_empty_bins": st.booleans(),
    "bias_correction": st.booleans(),
    "weighted": st.sampled_from(["no", "rows", "examples"]),
    "seed": st.integers(0, 2**31),
}


@given(**ARGUMENTS)
def test_whatever_comes(kind, rows, classes, dtype, scale, weighted, seed, **settings):
    """Finite, not negative, 0 without examples, blind to order; fused and eager agree."""
    inputs = draw(kind, rows, classes, scale, dtype, seed)
    g = torch.Generator().manual_seed(seed)
    shape = inputs[0].shape if weighted == "examples" and kind != "softmax" else (rows,)
    weight = None if weighted == "no" else torch.randint(0, 2, shape, generator=g).float()
    loss, gradient = both_paths(kind, inputs, weight, calls=2, **settings)
    assert torch.isfinite(loss) and loss >= 0 and torch.isfinite(gradient).all()

    counted = torch.ones(inputs[0].shape[:1] if kind == "softmax" else inputs[0].shape)
    if kind != "boxes":
        counted[inputs[1] < 0] = 0
    if weight is not None:
        counted *= weight if weight.shape == counted.shape else weight[:, None]
    if not counted.any():
        assert loss == 0 and not gradient.any()

    order = torch.randperm(rows, generator=g)
    moved = weight if weight is None else weight[order]
    other = MODULES[kind](**settings)
    for _ in range(2):
        again, again_gradient = run(other, (inputs[0][order], inputs[1][order]), moved)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(again_gradient, gradient[order], rtol=1e-2, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigmoid", "boxes"])
def test_counts_of_a_hundred_million_are_exact(kind):
    rows = 1_000_004  # times 100 / 4 is even, so that float32 holds it
    one = torch.full((1, 1), -5.0 if kind == "sigmoid" else 0.0, dtype=torch.float16)
    x = one.expand(rows, 100)
    target = torch.full((1,), 100).expand(rows) if kind == "sigmoid" else x
    loss_fn = MODULES[kind](bins=2, momentum=0.75)
    with torch.no_grad():
        loss = loss_fn(x, target)
    assert loss_fn.acc_sum.tolist() == [rows * 100 / 4, 0.0]
    expected = 4 * torch.nn.functional.softplus(torch.tensor(-5.0)).item()
    assert loss.item() == pytest.approx(expected if kind == "sigmoid" else 0.0, rel=1e-4)
