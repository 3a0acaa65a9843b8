"""Numbers at their limits: precision, huge logits, one example, 10^8 of them; fused and eager."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghm_d2.losses import GHMCLoss, GHMRLoss, kernels
from tests import reference as ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOMENTA = (0.0, 0.9, 0.999)


def softmax_loss(**settings):
    return GHMCLoss(activation="softmax", **settings)


MODULES = {"sigmoid": GHMCLoss, "softmax": softmax_loss, "boxes": GHMRLoss}
KINDS = pytest.mark.parametrize("kind", MODULES)


def eager():
    return mock.patch.object(kernels, "_has_kernel", return_value=False)


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


SCALES = (1.0, 2.0**8, 2.0**16)


class TestLossScale:
    """A GradScaler multiplies the loss: the gradient must be rounded after that, never before."""

    def expected(self, kind, x, target, **settings):
        """Loss and unrounded gradient of the float64 oracle, from the rounded inputs."""
        make = ref.ghm_r if kind == "boxes" else ref.ghm_c
        if kind == "softmax":
            settings["activation"] = "softmax"
        return make(**settings)(x.double().numpy(), target.numpy())

    def check(self, kind, x, target, scale, **settings):
        found = x.detach().clone().requires_grad_()
        loss = MODULES[kind](**settings)(found, target)
        (loss * scale).backward()
        value, gradient = self.expected(kind, x, target, **settings)
        assert loss.item() == pytest.approx(value, rel=1e-4)
        expected = torch.from_numpy(gradient * scale)
        # To the last digit of what the type holds, and not a zero where it holds something else.
        rounding = torch.finfo(x.dtype)
        torch.testing.assert_close(
            found.grad.double(),
            expected,
            rtol=max(rounding.eps, 2e-5),
            atol=rounding.smallest_normal * max(rounding.eps, 1e-30),
        )

    @KINDS
    @pytest.mark.parametrize("path", ["kernel", "eager"])
    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_against_the_oracle(self, kind, path, scale, dtype):
        rng = np.random.default_rng(4)
        precise = {torch.float16: np.float16}.get(dtype, np.float32)
        if kind == "boxes":
            x, target = ref.draw_boxes(rng, 400, 10, dtype=precise, margin=1e-4)
            target = torch.from_numpy(target)
        else:
            x, labels = ref.draw_logits(rng, 400, 5, activation=kind, dtype=precise, margin=1e-5)
            target = torch.from_numpy(labels)
        x = torch.from_numpy(x).to(dtype)
        if dtype == torch.bfloat16:  # rounded across an edge: the counts would differ
            keep = self.off_edges(kind, x, target)
            x, target = x[keep], target[keep]
        with eager() if path == "eager" else mock.patch.dict({}):
            self.check(kind, x, target, scale, momentum=0.0)

    def off_edges(self, kind, x, target):
        arrays = x.double().numpy(), target.numpy()
        if kind == "boxes":
            return torch.from_numpy(
                ref.rows_off_edges(ref.asl1_examples(*arrays, mu=0.02), 10, 1e-5)
            )
        examples = getattr(ref, f"{kind}_examples")(*arrays)
        return torch.from_numpy(ref.rows_off_edges(examples, 30, 1e-5))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("path", ["kernel", "eager"])
    def test_the_background_at_the_start(self, dtype, path):
        # 1.6 million easy negatives at the prior: each gradient is far below half of 2^-24
        logits = torch.full((20_000, 80), -4.595, dtype=dtype, requires_grad=True)
        loss_fn = GHMCLoss(momentum=0.0)
        with eager() if path == "eager" else mock.patch.dict({}):
            (loss_fn(logits, torch.full((20_000,), 80)) * 65536).backward()
        expected = torch.sigmoid(logits.detach().double())[0, 0].item()  # one region: mean of g
        total = logits.grad.double().sum().item() / 65536
        assert total == pytest.approx(expected, rel=1e-2)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_ten_million_examples(self, dtype):
        logits = torch.full((10_000_000, 1), -4.595, dtype=dtype, requires_grad=True)
        (GHMCLoss(momentum=0.0)(logits, torch.ones(10_000_000).long()) * 65536).backward()
        expected = torch.sigmoid(logits.detach()[0].double()).item()
        total = logits.grad.double().sum().item() / 65536
        assert total == pytest.approx(expected, rel=1e-2)


class TestSecondDerivatives:
    """The weights are constants of each call, in the second derivative as in the first."""

    def hessian(self, kind, x, target, momentum=0.0):
        def loss(x):
            return MODULES[kind](momentum=momentum)(x, target)

        return torch.autograd.functional.hessian(loss, x)

    @KINDS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_hessian_equals_that_of_float64(self, kind, dtype):
        x, target = draw(kind, 6, 3, 0.05 if kind == "boxes" else 2.0, dtype, 5)
        found = self.hessian(kind, x, target)
        exact = self.hessian(kind, x.double(), target.double() if kind == "boxes" else target)
        assert exact.abs().max() > 1e-3
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), exact, rtol=8 * eps, atol=8 * eps)

    @pytest.mark.parametrize("kind", ["sigmoid", "boxes"])
    def test_hessian_is_that_of_the_formulas(self, kind):
        # one region: every weight is 1 / N
        x, target = draw(kind, 5, 3, 0.05 if kind == "boxes" else 2.0, torch.float32, 6)
        make = GHMRLoss if kind == "boxes" else GHMCLoss
        found = torch.autograd.functional.hessian(
            lambda x: make(bins=1, momentum=0.0)(x, target), x
        )
        if kind == "boxes":
            d = (x - target).double()
            second, kept = 0.02**2 / (d * d + 0.02**2) ** 1.5, torch.ones_like(d)
        else:
            p = x.double().sigmoid()
            second, kept = p * (1 - p), (target >= 0).unsqueeze(1).expand_as(p).double()
        expected = torch.diag((second * kept / kept.sum()).flatten())
        torch.testing.assert_close(
            found.double().reshape(expected.shape), expected, rtol=1e-4, atol=1e-6
        )

    @KINDS
    def test_a_gradient_penalty(self, kind):
        def penalised(dtype):
            x, target = draw(kind, 40, 3, 0.05 if kind == "boxes" else 2.0, torch.float32, 7)
            x = x.to(dtype).requires_grad_()
            target = target.to(dtype) if kind == "boxes" else target
            loss = MODULES[kind]()(x, target)
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss**2 + gradient.pow(2).sum()).backward()
            return x.grad.double()

        torch.testing.assert_close(
            penalised(torch.float32), penalised(torch.float64), rtol=1e-3, atol=1e-5
        )

    @KINDS
    def test_gradgradcheck(self, kind):
        x, target = draw(kind, 5, 2, 0.05 if kind == "boxes" else 2.0, torch.float64, 8)
        loss_fn = MODULES[kind]().eval()
        assert torch.autograd.gradcheck(lambda x: loss_fn(x, target), (x.requires_grad_(),))
        assert torch.autograd.gradgradcheck(lambda x: loss_fn(x, target), (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_that_want_a_gradient_get_it(dtype):
    # such as a teacher that learns too: both sides of the difference move
    pred, target = draw("boxes", 20, 0, 0.05, dtype, 9)
    pred, target = pred.requires_grad_(), target.requires_grad_()
    GHMRLoss()(pred, target).backward()
    torch.testing.assert_close(target.grad, -pred.grad)
    soft = torch.rand(20, 3, dtype=dtype).requires_grad_()
    logits = torch.randn(20, 3, dtype=dtype)
    GHMCLoss(momentum=0.0, bins=1)(logits, soft).backward()
    # d BCE(x, t) / dt = -x, times 1 / N
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # of the weights
    torch.testing.assert_close(soft.grad, -logits / 60, rtol=4 * eps, atol=4 * eps)


def test_logits_overwritten_after_the_loss_are_noticed():
    logits = torch.randn(50, 3, dtype=torch.float16, requires_grad=True)
    x = logits * 1
    loss = GHMCLoss()(x, torch.arange(50) % 3)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
