"""The CUDA kernels against the oracle: on a GPU, or by Triton's interpreter (see conftest.py)."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ghm_d2.losses import GHMCLoss, GHMRLoss, kernels
from ghm_d2.losses.base import observed
from ghm_d2.losses.functional import Averaging, unit_region_edges, walk
from ghm_d2.modeling import DenseLoss
from ghm_d2.modeling.dense import levels_of_labels
from tests import reference as ref

# The interpreter of older versions does not know all that the kernels use.
pytest.importorskip("triton", minversion="3.4")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def _kernels_take_any_tensor(monkeypatch):
    monkeypatch.setattr(kernels, "_on_device", lambda x: True)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    from ghm_d2.losses.kernels import triton

    names = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                names.append(self.name)
                with _disable_current_modes():  # the interpreter's own copies do not count
                    self.kernel[grid](*args, **kwargs)

            return launch

    for name in ("count", "finish", "flag", "loss", "scale", "walk"):
        kernel = getattr(triton, f"{name}_kernel")
        monkeypatch.setattr(triton, f"{name}_kernel", Counted(name, kernel))
    return names


def rounded(x, dtype):
    """Values of ``dtype``, on the device, and as the oracle takes them."""
    x = torch.as_tensor(x).to(dtype)
    return x.to(DEVICE, copy=True).requires_grad_(), x.double().numpy()


def assert_equals_oracle(module, oracle, x, loss, expected, grads):
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    loss.backward()
    for own, grad in zip(x, grads, strict=True):
        assert own.grad.dtype == own.dtype
        scale = np.abs(grad).max(initial=0)
        tolerance = TOLERANCE[own.dtype]
        found = own.grad.double().cpu().numpy()
        smallest = 6e-8 if own.dtype == torch.float16 else 0
        np.testing.assert_allclose(found, grad, rtol=tolerance, atol=1e-7 * scale + smallest)
    np.testing.assert_allclose(module.acc_sum.cpu(), oracle.counts.sums, rtol=1e-6)


def off_edges(examples, bins, margin=1e-5):
    return ref.rows_off_edges(examples, bins, margin)


def draw_logits(rng, rows, columns, bins, dtype, kind="class"):
    """Logits (rows, columns) as tensors, their float64 values, and labels, off the edges."""
    spare = 2 * rows + 40
    x = torch.tensor(rng.normal(-1.5, 2.5, (spare, columns))).to(dtype)
    if kind == "class":
        labels = rng.integers(-1, columns + 1, spare)
        labels[rng.random(spare) < 0.5] = columns
    else:
        labels = rng.random((spare, columns))
        hard = rng.random((spare, columns))
        labels = np.where(hard < 0.6, 0.0, np.where(hard < 0.8, 1.0, labels)).astype(np.float32)
    examples = ref.sigmoid_examples(x.double().numpy(), labels)
    good = np.flatnonzero(off_edges(examples, bins))[:rows]
    assert len(good) == rows
    return x[torch.from_numpy(good)], labels[good]


@DTYPES
@pytest.mark.parametrize("weighted", [None, "rows", "elements"])
@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize(("rows", "columns"), [(700, 7), (45, 80), (3000, 1)])
def test_logits(dtype, weighted, kind, rows, columns):
    rng = np.random.default_rng(0)
    loss_fn, oracle = GHMCLoss().to(DEVICE), ref.ghm_c()
    for _ in range(2):  # the second call averages
        x, labels = draw_logits(rng, rows, columns, 30, dtype, kind)
        weight = None
        if weighted:
            weight = rng.random((rows, columns) if weighted == "elements" else rows) > 0.3
            weight = weight.astype(np.float32)
            # What is dropped may be anything.
            x = torch.where(torch.tensor(weight > 0).view(rows, -1), x, torch.nan)
        tensor, values = rounded(x, dtype)
        rest = [None if a is None else torch.tensor(a).to(DEVICE) for a in (labels, weight)]
        expected, grad = oracle(np.nan_to_num(values), labels, weight)
        loss = loss_fn(tensor, *rest)
        assert_equals_oracle(loss_fn, oracle, [tensor], loss, expected, [grad])


@pytest.mark.parametrize("kind", ["ghm_c", "ghm_r"])
def test_weights_that_follow(kind, launched):
    rng = np.random.default_rng(4)
    settings = {"loss_weight": "auto", "bias_correction": True}
    if kind == "ghm_c":
        loss_fn, oracle = GHMCLoss(**settings).to(DEVICE), ref.ghm_c(**settings)
    else:
        loss_fn, oracle = GHMRLoss(**settings).to(DEVICE), ref.ghm_r(**settings)
    for rows in (700, 200):
        if kind == "ghm_c":
            x, target = draw_logits(rng, rows, 7, 30, torch.float32)
            target = torch.from_numpy(target)
        else:
            x, target = map(torch.tensor, ref.draw_boxes(rng, rows))
        tensor, values = rounded(x, torch.float32)
        expected, grad = oracle(values, target.numpy())
        loss = loss_fn(tensor, target.to(DEVICE))
        assert_equals_oracle(loss_fn, oracle, [tensor], loss, expected, [grad])
    loss_fn.raise_deferred_errors()
    kept = loss_fn.running_gradients.clone()
    loss_fn(tensor.detach() * torch.nan, target.to(DEVICE))
    assert torch.equal(loss_fn.running_gradients, kept) and "finish" in launched


@DTYPES
@pytest.mark.parametrize("weighted", [None, "rows", "elements"])
@pytest.mark.parametrize("mu", ["number", "tensor", "auto"])
def test_deltas(dtype, weighted, mu):
    rng = np.random.default_rng(1)
    loss_fn, oracle = GHMRLoss().to(DEVICE), ref.ghm_r()
    if mu == "tensor":  # beside others, as in a buffer of several
        loss_fn.mu = torch.tensor([9.0, 0.02, 9.0]).to(DEVICE)[1]
    elif mu == "auto":
        loss_fn, oracle = GHMRLoss("auto").to(DEVICE), ref.ghm_r(mu="auto")
    for _ in range(2):
        pred, target = ref.draw_boxes(rng, 2500, mu=0.005 if mu == "auto" else 0.02)
        pred, target = (torch.tensor(a).to(dtype) for a in (pred, target))
        width = 0.01 if mu == "auto" else 0.02  # its lower end: the errors are that small
        examples = ref.asl1_examples(pred.double().numpy(), target.double().numpy(), mu=width)
        good = torch.from_numpy(off_edges(examples, 10))
        pred, target = pred[good][:600], target[good][:600]
        weight = None
        if weighted:
            shape = pred.shape if weighted == "elements" else pred.shape[:1]
            weight = (rng.random(shape) > 0.3).astype(np.float32)
        tensor, values = rounded(pred, dtype)
        expected, grad = oracle(values, target.double().numpy(), weight)
        kept = None if weight is None else torch.tensor(weight).to(DEVICE)
        loss = loss_fn(tensor, target.to(DEVICE), kept)
        assert_equals_oracle(loss_fn, oracle, [tensor], loss, expected, [grad])


@pytest.mark.parametrize("bins", [1, 2, 7, 20, 31, 97, 300])
def test_any_number_of_regions(bins):
    # 20 and 97 are among those where the product with a norm is rounded across an edge
    rng = np.random.default_rng(2)
    loss_fn, oracle = GHMCLoss(bins).to(DEVICE), ref.ghm_c(bins=bins)
    x, labels = draw_logits(rng, 900, 2, bins, torch.float32)
    tensor, values = rounded(x, torch.float32)
    expected, grad = oracle(values, labels)
    loss = loss_fn(tensor, torch.tensor(labels).to(DEVICE))
    assert_equals_oracle(loss_fn, oracle, [tensor], loss, expected, [grad])


def test_edges_without_division_are_those_of_a_division():
    """`_region`'s two fused multiply-adds, whose exact steps float64 holds."""
    for bins in range(1, 2048):
        number = np.arange(bins + 1, dtype=np.float32)
        inverse = np.float32(1 / bins)
        quotient = number * inverse
        rest = (number.astype(np.float64) - quotient.astype(np.float64) * bins).astype(np.float32)
        edge = quotient.astype(np.float64) + rest.astype(np.float64) * inverse.astype(np.float64)
        assert np.array_equal(edge.astype(np.float32), unit_region_edges(bins).numpy()), bins


@DTYPES
@pytest.mark.parametrize("pooled", [False, True])
def test_levels_of_any_size_in_one_launch(dtype, pooled, launched):
    rng = np.random.default_rng(3)
    loss_fn, oracle = GHMCLoss().to(DEVICE), ref.ghm_c()
    calls = [draw_logits(rng, rows, 5, 30, dtype) for rows in (1000, 0, 1, 410, 37)]
    tensors, values = zip(*(rounded(x, dtype) for x, _ in calls), strict=True)
    labels = [torch.tensor(y).to(DEVICE) for _, y in calls]
    arguments = [(x, y) for x, (_, y) in zip(values, calls, strict=True)]
    if pooled:
        expected, grads = oracle.pooled(arguments)
    else:
        losses, grads = zip(*(oracle(*each) for each in arguments), strict=True)
        expected = sum(losses)
    loss = (loss_fn.forward_pooled if pooled else loss_fn.forward_levels)(tensors, labels)
    assert launched.count("count") == 2 and launched.count("walk") == 1
    assert_equals_oracle(loss_fn, oracle, tensors, loss, expected, grads)


@pytest.mark.parametrize(
    "averaging",
    [
        Averaging(0.75),
        Averaging(0.7, "all_bins"),
        Averaging(0.9, decay_empty_bins=True),
        Averaging(0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("corrected", [False, True])
def test_the_walk_rounds_as_on_the_cpu(averaging, corrected):
    from ghm_d2.losses.kernels import triton_launch

    g = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 1 << 27, (6, 30), generator=g)
    counts[torch.rand(6, 30, generator=g) < 0.4] = 0
    counts[2] = 0
    acc_sum = torch.rand(30, generator=g) * 1e6
    updates = torch.randint(0, 9, (30,), generator=g) if corrected else None
    weights, state = walk(counts, acc_sum, updates, averaging)
    on_device = [None if x is None else x.to(DEVICE) for x in (counts, acc_sum, updates)]
    found, new = triton_launch.walk(*on_device, averaging)
    assert all(torch.equal(new[name].cpu(), value) for name, value in state.items())
    torch.testing.assert_close(found.cpu(), weights, rtol=3e-7 if corrected else 2e-7, atol=0)


BAD = {
    "label": ({"labels": [7, 0, 1]}, r"labels must lie in \[-1, 2\]"),
    "soft label": ({"labels": [[0.0, 1.5]] * 3}, r"must lie in \[0, 1\]"),
    "weight": ({"weight": [1.0, -1.0, 1.0]}, "weight must be 0 or positive"),
    "NaN weight": ({"weight": [1.0, float("nan"), 1.0]}, "weight must be 0 or positive"),
    "logit": ({"logits": [[float("nan"), 0.0]] * 3}, "logits must be finite"),
    "infinite logit": ({"logits": [[float("inf"), 0.0]] * 3}, "logits must be finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_make_the_loss_nan_and_are_named_later(case):
    changes, message = BAD[case]
    values = {"logits": [[0.5, -1.0]] * 3, "labels": [2, 2, 2], "weight": [1.0] * 3} | changes
    arguments = [torch.tensor(value).to(DEVICE) for value in values.values()]
    loss_fn = GHMCLoss().to(DEVICE)
    assert loss_fn(*arguments).isnan()
    assert not loss_fn.acc_sum.any()
    good = torch.zeros(3, 2).to(DEVICE), torch.zeros(3, dtype=torch.int64).to(DEVICE)
    assert loss_fn(*good).isfinite()  # what was refused before does not touch it
    with pytest.raises(ValueError, match=message):
        loss_fn.raise_deferred_errors()
    loss_fn.raise_deferred_errors()  # once


def test_another_ignored_label_and_narrow_labels():
    loss_fn, plain = GHMCLoss(ignore_index=255).to(DEVICE), GHMCLoss().to(DEVICE)
    x = torch.randn(40, 3).to(DEVICE)
    labels = torch.randint(0, 4, (40,))
    labels[::5] = -1
    narrow = labels.masked_fill(labels == -1, 255).to(torch.uint8)
    assert torch.equal(loss_fn(x, narrow.to(DEVICE)), plain(x, labels.to(DEVICE)))
    loss_fn.raise_deferred_errors()


@DTYPES
@pytest.mark.parametrize("factor", [1.0, 3.0, 65536.0])
def test_the_factor_of_the_backward_pass_and_a_second_pass(dtype, factor):
    rng = np.random.default_rng(5)
    x, labels = draw_logits(rng, 600, 4, 30, dtype)
    tensor, values = rounded(x, dtype)
    loss = GHMCLoss().to(DEVICE)(tensor, torch.tensor(labels).to(DEVICE))
    _, grad = ref.ghm_c()(values, labels)
    first = torch.autograd.grad(loss * factor, tensor, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, tensor)[0]
    for found, scale in ((first, factor), (second, 1.0)):
        np.testing.assert_allclose(
            found.double().cpu(), scale * grad, rtol=TOLERANCE[dtype], atol=6e-8 * scale
        )


def test_the_second_derivative():
    x = torch.randn(6, 3, requires_grad=True, device=DEVICE)
    labels = torch.tensor([0, 1, 2, 3, 3, -1]).to(DEVICE)
    loss = GHMCLoss(bins=1, momentum=0.0).to(DEVICE)(x, labels)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    p = x.detach().sigmoid()
    expected = p * (1 - p) / 15
    expected[-1] = 0
    torch.testing.assert_close(second, expected)


def test_eval_and_no_grad_write_nothing_and_give_the_same_loss():
    loss_fn = GHMCLoss().to(DEVICE)
    x, labels = torch.randn(50, 4).to(DEVICE), torch.randint(-1, 5, (50,)).to(DEVICE)
    with torch.no_grad():
        first = loss_fn(x, labels)
    second = loss_fn.eval()(x, labels)
    assert not loss_fn.acc_sum.any()
    assert torch.equal(first, second) and torch.equal(loss_fn.train()(x, labels), first)
    assert loss_fn.acc_sum.any()


def test_an_observer_sees_counts_and_labels():
    seen = []
    logits, labels = torch.tensor([[0.0], [-9.0], [-9.0]]), torch.tensor([1, 1, -1])
    with observed(lambda *arguments: seen.append(arguments)):
        GHMCLoss(4, 0.5, 7.0).to(DEVICE)(logits.to(DEVICE), labels.to(DEVICE))
    ((_, _, (targets,), _, counts, weights),) = seen
    assert targets.tolist() == [1, 1, -1] and counts.tolist() == [1, 0, 1, 0]
    assert weights.tolist() == [1.0, 0.0, 1.0, 0.0]


class Operations(TorchDispatchMode):
    """The operations of PyTorch that a device would run: no views, no bare allocation."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        quiet = ("empty", "empty_like", "detach", "view", "alias", "_unsafe_view", "lift_fresh")
        if not func.is_view and name not in quiet:
            self.names.append(name)
        assert name not in ("_local_scalar_dense", "nonzero"), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mu", ["number", "tensor"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2), (torch.float16, 2)], ids=str)
def test_device_operations_of_a_retinanet_step(dtype, most, mu, launched):
    """Both losses over five levels, counted and without a wait for the device."""
    rows = (40, 12, 4, 2, 1)
    logits = [torch.randn(2, n, 80, dtype=dtype, requires_grad=True) for n in rows]
    labels = [torch.randint(-1, 81, (sum(rows),)) for _ in range(2)]
    deltas = [torch.randn(n // 2 + 1, 4, dtype=dtype, requires_grad=True) for n in rows]
    targets = [torch.randn(n // 2 + 1, 4, dtype=dtype) for n in rows]
    masks = [torch.ones(2, n, dtype=torch.bool) for n in rows]
    if DEVICE == "cuda":
        logits, labels, deltas, targets, masks = (
            [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in xs]
            for xs in (logits, labels, deltas, targets, masks)
        )
    ghm_c = DenseLoss(GHMCLoss()).to(DEVICE)
    ghm_r = DenseLoss(GHMRLoss(loss_weight=10.0)).to(DEVICE)
    if mu == "tensor":
        ghm_r[0].mu = torch.tensor(0.1).to(DEVICE)
    ones = [torch.ones((), device=DEVICE)] * 2
    for _ in range(2):  # the first call keeps a place for what is refused
        launched.clear()
        with Operations() as forward:
            levels = levels_of_labels(labels, rows)
            losses = [ghm_c(logits, levels), ghm_r(deltas, targets, masks)]
        in_forward = forward.names + launched
        launched.clear()
        with Operations() as backward:
            gradients = torch.autograd.grad(losses, logits + deltas, ones)
        in_backward = backward.names + launched
    assert all(g.dtype == dtype for g in gradients)
    assert len(in_forward) <= 16, in_forward
    assert len(in_backward) <= most, in_backward


MIXTURES = ["weights", "many", "labels", "types", "label types", "ignored"]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_tensors_that_differ_keep_the_kernels(mixture, launched):
    """Each alike few are a launch; together they are what the oracle makes of them one by one."""
    rng = np.random.default_rng(4)
    ignored = 255 if mixture == "ignored" else None
    loss_fn, oracle = GHMCLoss(ignore_index=ignored).to(DEVICE), ref.ghm_c()
    number = 19 if mixture == "many" else 5
    tensors, labels, weights, expected = [], [], [], []
    for i in range(number):
        rows = 30 * i + 1
        half = mixture == "types" and i % 2
        kind = "soft" if mixture in ("labels", "ignored") and i % 2 else "class"
        x, y = draw_logits(rng, rows, 5, 30, torch.float16 if half else torch.float32, kind)
        weight = None
        if mixture == "weights" and i:
            weight = (rng.random((rows, 5) if i == 2 else rows) > 0.3).astype(float)
        tensor, values = rounded(x, x.dtype)
        expected.append(oracle(values, y, weight))
        y = torch.tensor(y)
        if kind == "class":
            y = y.masked_fill(y == -1, 255) if mixture == "ignored" else y
            y = y.to(torch.int32) if mixture == "label types" and i % 2 else y
        tensors.append(tensor)
        labels.append(y.to(DEVICE))
        # rows of bool, elements of double: a launch reads one type
        weights.append(None if weight is None else torch.tensor(weight).to(DEVICE))
        if weight is not None and i == 1:
            weights[-1] = weights[-1].bool()
    loss = loss_fn.forward_levels(tensors, labels, weights)
    assert {"count", "walk", "loss", "finish"} == set(launched) - {"flag"}
    losses, grads = zip(*expected, strict=True)
    assert_equals_oracle(loss_fn, oracle, tensors, loss, sum(losses), grads)
    loss_fn.raise_deferred_errors()


@pytest.mark.parametrize("empty", [0, 1])
def test_a_level_without_positives_keeps_the_kernels(empty, launched):
    preds = [torch.randn(n, 4, device=DEVICE) * 0.05 for n in (9, 5)]
    preds[empty] = torch.zeros(0, 4, device=DEVICE)
    leaves = [x.requires_grad_() for x in preds]
    GHMRLoss().to(DEVICE).forward_levels(leaves, [torch.zeros_like(x) for x in preds]).backward()
    assert launched == ["count", "walk", "loss", "finish", "scale"]
    assert all(x.grad.shape == x.shape for x in leaves)


def test_a_single_delta():
    pred = torch.tensor(0.5, requires_grad=True, device=DEVICE)
    GHMRLoss(momentum=0.0).to(DEVICE)(pred, torch.zeros((), device=DEVICE)).backward()
    expected = ref.asl1_examples(np.array([0.5]), np.zeros(1), mu=0.02).gradient
    assert pred.grad.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.skipif(kernels.compiled_loss is None, reason="PyTorch before 2.4")
@pytest.mark.parametrize(("mu", "corrected"), [("number", False), ("tensor", True)])
@DTYPES
def test_torch_compile_keeps_the_kernels(dtype, mu, corrected, launched):
    """Levels of both losses behind a layer, in one graph."""

    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ghm_c = GHMCLoss(bias_correction=corrected)
            self.ghm_r = GHMRLoss(loss_weight=10.0)
            if mu == "tensor":
                self.ghm_r.mu = torch.tensor(0.05).to(DEVICE)

        def forward(self, logits, labels, deltas, targets, weight):
            loss = self.ghm_c.forward_levels([x * 1.5 for x in logits], labels)
            return loss + self.ghm_r(deltas * 2.0, targets, weight)

    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(n, 5, generator=g).to(dtype).to(DEVICE) for n in (300, 20)]
    labels = [torch.randint(-1, 6, (n,), generator=g).to(DEVICE) for n in (300, 20)]
    deltas = (torch.randn(30, 4, generator=g) * 0.05).to(dtype).to(DEVICE)
    weight = torch.ones(30).to(DEVICE)
    plain, other = Losses().to(DEVICE), Losses().to(DEVICE)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        results = []
        for call in (plain, compiled):
            launched.clear()
            leaves = [x.clone().requires_grad_() for x in (*logits, deltas)]
            loss = call(leaves[:2], labels, leaves[2], torch.zeros_like(deltas), weight)
            grads = torch.autograd.grad(loss * 3.0, leaves)
            results.append((loss.detach(), *grads))
            assert {"count", "walk", "loss", "finish"} <= set(launched)
        torch.testing.assert_close(results[1], results[0], rtol=2 * TOLERANCE[dtype], atol=1e-6)
        for name, value in plain.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
