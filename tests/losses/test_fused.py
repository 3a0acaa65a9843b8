"""The CPU kernels against the eager path, which the oracle's tests hold to the formulas."""

import threading

import pytest
import torch

from ghm_d2.losses import GHMCLoss, GHMRLoss, kernels
from ghm_d2.losses.functional import (
    count_unit_regions,
    harmonized_sum,
    regression_examples,
    sigmoid_examples,
    unit_region_index,
)
from ghm_d2.losses.kernels.cpu_blocks import BLOCK, Blocks
from ghm_d2.losses.kernels.cpu_regions import region_finder

MU = 0.02
HALVES = [torch.float32, torch.float16, torch.bfloat16]
# One example, part of a block, and several blocks with a part at the end.
# The third has blocks of an odd length, the last one work for two threads.
SHAPES = [(1, 1), (37, 3), (65_537, 3), (2 * BLOCK // 8 + 5, 8)]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _kernels_take_any_size(monkeypatch):
    monkeypatch.setattr(kernels, "FEWEST", 0)


def classification(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=g) * 4).to(dtype)
    labels = torch.randint(-1, shape[1] + 1, shape[:1], generator=g)
    return logits, labels


def sigmoid_kernel(logits, labels, keep, bins):
    """The kernel alone; its second derivative is tested through the modules."""
    return kernels.sigmoid_kernel([(logits, labels, keep)], bins, None)


def regression_kernel(pred, target, keep, mu, bins):
    return kernels.regression_kernel([(pred, target, keep)], mu, bins, None)


def eager_sigmoid(logits, labels, valid, bins, weights):
    """Counts, weighted loss and its gradient, in float64 from the rounded inputs."""
    x = logits.double().requires_grad_()
    loss, norm = sigmoid_examples(x, labels)
    region = unit_region_index(norm.float(), valid, bins)
    total = harmonized_sum(loss, region, weights)
    total.backward()
    return count_unit_regions(region, bins), total.detach(), x.grad


def check(kernel, expected, weights, dtype, off_by=0):
    """``off_by``: examples that may lie in a neighbour region, beside its edge."""
    counts, total, grad = expected
    (found,) = kernel.counts(weights.numel())
    assert found.dtype == torch.int64
    assert (found.cpu() - counts).abs().sum() <= 2 * off_by
    weights = weights.to(found.device)[None]
    one = torch.ones((), device=found.device)

    def both():
        loss, (gradient,) = kernel.loss(weights), kernel.gradient(weights, one)
        return loss.cpu(), gradient.cpu()

    got, gradient = both()
    assert gradient.dtype == dtype
    torch.testing.assert_close(got.double(), total, rtol=1e-5, atol=1e-6)
    if not off_by:
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(gradient.double().view_as(grad), grad, rtol=tolerance, atol=1e-6)
    # Once more without what counting kept, as a second backward pass does.
    again, second = both()
    torch.testing.assert_close(again, got, rtol=1e-6, atol=0)
    torch.testing.assert_close(second, gradient, rtol=1e-6, atol=0)


def smooth_weights(bins):
    """Close for neighbours, so that an example on the wrong side of an edge changes little."""
    return 1 + torch.linspace(0, 1, bins)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigmoid_equals_eager(shape, dtype, threads):
    logits, labels = classification(shape, dtype)
    weights = torch.rand(30, generator=torch.Generator().manual_seed(1))
    valid = (labels >= 0).unsqueeze(1)
    expected = eager_sigmoid(logits, labels, valid, 30, weights)
    kernel = sigmoid_kernel(logits.requires_grad_(), labels, None, 30)
    check(kernel, expected, weights, dtype)


@pytest.mark.parametrize("bins", [1, 2, 7, 22, 97, 1000])
def test_any_number_of_regions(bins):
    logits, labels = classification((4000, 20))
    weights = smooth_weights(bins)
    expected = eager_sigmoid(logits, labels, (labels >= 0).unsqueeze(1), bins, weights)
    kernel = sigmoid_kernel(logits.requires_grad_(), labels, None, bins)
    # float64 and float32 may disagree beside an edge; of many regions, some norm is beside one.
    check(kernel, expected, weights, logits.dtype, off_by=0 if bins < 50 else 5)


@pytest.mark.parametrize("rows", [True, False])
def test_dropped_examples_even_with_nan(rows):
    logits, labels = classification((5000, 8))
    g = torch.Generator().manual_seed(2)
    keep = torch.rand((5000, 1) if rows else (5000, 8), generator=g) > 0.3
    valid = (labels >= 0).unsqueeze(1) & keep
    weights = torch.rand(30, generator=g)
    expected = eager_sigmoid(logits, labels, valid, 30, weights)
    spoiled = torch.where(valid, logits, torch.nan)
    check(
        sigmoid_kernel(spoiled.requires_grad_(), labels, keep, 30),
        expected,
        weights,
        logits.dtype,
    )


def test_dense_labels():
    logits, labels = classification((5000, 8))
    dense = (torch.rand(5000, 8, generator=torch.Generator().manual_seed(3)) > 0.9).float()
    weights = torch.rand(30)
    expected = eager_sigmoid(logits, dense, None, 30, weights)
    check(
        sigmoid_kernel(logits.requires_grad_(), dense, None, 30),
        expected,
        weights,
        logits.dtype,
    )


def test_large_logits():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [30.0, -30.0]])
    labels = torch.tensor([0, 0, 2])
    weights = torch.rand(30)
    expected = eager_sigmoid(logits, labels, None, 30, weights)
    check(
        sigmoid_kernel(logits.requires_grad_(), labels, None, 30),
        expected,
        weights,
        logits.dtype,
    )


def test_losses_of_tiny_gradients_keep_their_digits():
    logits = torch.full((1000, 4), -18.0)
    labels = torch.full((1000,), 4)
    weights = torch.ones(30)
    expected = eager_sigmoid(logits, labels, None, 30, weights)
    got = sigmoid_kernel(logits, labels, None, 30).loss(weights[None])
    torch.testing.assert_close(got.double(), expected[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [1, 1000, 2 * BLOCK + 77])
@pytest.mark.parametrize("masked", [False, True])
def test_regression_equals_eager(size, dtype, masked, threads):
    g = torch.Generator().manual_seed(0)
    pred = (torch.randn(size, generator=g) * 0.1).to(dtype)
    target = torch.randn(size, generator=g) * 0.1
    keep = torch.rand(size, generator=g) > 0.3 if masked else None
    weights = torch.rand(10, generator=g)
    x = pred.double().requires_grad_()
    loss, norm = regression_examples(x, target.double(), MU)
    region = unit_region_index(norm.float(), keep, 10)
    total = harmonized_sum(loss, region, weights)
    total.backward()
    expected = count_unit_regions(region, 10), total.detach(), x.grad
    spoiled = pred if keep is None else torch.where(keep, pred, torch.nan)
    check(
        regression_kernel(spoiled.clone().requires_grad_(), target, keep, MU, 10),
        expected,
        weights,
        dtype,
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mu_may_be_a_tensor(dtype):
    pred, target = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.1
    weights, one = torch.rand(1, 10), torch.ones(())
    found = []
    for mu in (0.125, torch.tensor(0.125)):
        kernel = regression_kernel(pred.clone().requires_grad_(), target, None, mu, 10)
        results = kernel.counts(10), kernel.loss(weights), kernel.gradient(weights, one)[0]
        found.append(results)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_mu_overwritten_before_the_backward_pass():
    mu = torch.tensor(0.125)
    pred = torch.randn(9, requires_grad=True)
    kernel = regression_kernel(pred, torch.zeros(9), None, mu, 10)
    kernel.counts(10)
    loss = kernel.weighted_sum(torch.ones(1, 10))
    mu += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_worker_keeps_to_one_core(threads):
    # Asked for 2 threads each, the workers of 2 cores would wait for one another.
    blocks = Blocks(3 * BLOCK)
    assert set(blocks.map(lambda _: torch.get_num_threads())) == {1}
    assert torch.get_num_threads() == threads


def test_modules_use_the_kernels(monkeypatch):
    used = []
    fused = kernels.FusedExamples
    original = fused.weighted_sum
    monkeypatch.setattr(fused, "weighted_sum", lambda *a: used.append(1) or original(*a))
    GHMCLoss()(*classification((10, 3)))
    GHMRLoss()(torch.randn(5, 4), torch.randn(5, 4))
    assert len(used) == 2
    GHMCLoss()(classification((10, 3))[0].double(), classification((10, 3))[1])
    assert len(used) == 2  # float64 takes the eager path


def test_few_examples_are_left_to_whole_tensor_operations(monkeypatch):
    monkeypatch.undo()
    few, enough = (classification((rows, 8)) for rows in (1023, 1024))
    assert sigmoid_kernel(*few, None, 30) is None
    assert sigmoid_kernel(*enough, None, 30) is not None
    halves = [(x[::2], y[::2], None) for x, y in [enough] * 2]  # together they are enough
    assert kernels.sigmoid_kernel(halves, 30, None) is not None


def test_backward_scales_and_a_retained_graph_can_be_walked_again():
    logits, labels = classification((300, 5))
    logits.requires_grad_()
    loss = GHMCLoss()(logits, labels)
    (first,) = torch.autograd.grad(3 * loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, kept)  # the second pass does not write into what the first gave away
    torch.testing.assert_close(first, 3 * second)


def test_logits_that_are_not_contiguous():
    logits, labels = classification((300, 6))
    a = logits[:, :5].clone().requires_grad_()
    b = logits.clone().requires_grad_()
    labels = labels.clamp(max=5)
    GHMCLoss()(a, labels).backward()
    GHMCLoss()(b[:, :5], labels).backward()
    assert torch.equal(a.grad, b.grad[:, :5])


def test_without_grad_no_gradient_is_kept():
    logits, labels = classification((300, 5))
    with torch.no_grad():
        assert not GHMCLoss()(logits.requires_grad_(), labels).requires_grad


def test_blocks_cover_everything_once(threads):
    for size in (1, BLOCK, BLOCK + 1, 100_000, 2_000_001, 5 * BLOCK - 3):
        blocks = Blocks(size)
        shares = blocks.map(list)
        assert len(shares) <= threads
        assert [n for share in shares for n in share] == list(range(len(blocks.lengths)))
        positions = torch.arange(size)
        assert torch.equal(torch.cat(blocks.split([positions])), positions)
        lengths = [len(block) for block in blocks.split([positions])]
        assert max(lengths) <= BLOCK
        for number, length in enumerate(lengths):
            scratch = blocks.scratch(2)(number)
            assert [len(buffer) for buffer in scratch.buffers] == [length] * 2
            assert [len(half) for half in (*scratch.halves, scratch.pairs)] == [length // 2] * 3
        cut = blocks.cut([positions[:: max(size // 1000, 1)]])
        found = [part + number * blocks.length for number, part in enumerate(cut)]
        assert torch.equal(torch.cat(found), positions[:: max(size // 1000, 1)])


# size: (length, number of blocks, threads) with one thread and with two
CUTS = {
    0: ((1, 0, 1), (1, 0, 1)),
    1: ((1, 1, 1), (1, 1, 1)),
    100_000: ((50_000, 2, 1), (25_000, 4, 1)),  # few: below the 2^15 that PyTorch deals itself
    1 << 17: ((1 << 16, 2, 1), (26_215, 5, 1)),
    (1 << 17) + 1: ((43_691, 3, 1), (43_691, 3, 1)),  # at least 2^16, but for equal lengths
    (1 << 20) - 1: ((116_509, 9, 1), (116_509, 9, 1)),  # not worth a second thread
    1 << 20: ((1 << 17, 8, 1), (1 << 16, 16, 2)),  # eight for each thread
    2_000_001: ((222_223, 9, 1), (111_112, 18, 2)),
    10 << 19: ((1 << 19, 10, 1), (327_680, 16, 2)),  # at most BLOCK
}


@pytest.mark.parametrize("size", CUTS)
def test_length_of_the_blocks(size, threads):
    blocks = Blocks(size)
    assert (blocks.length, len(blocks.lengths), blocks.threads) == CUTS[size][threads - 1]


def test_long_tensors_alone_are_dealt_to_the_pool(threads):
    def work(numbers):
        return threading.current_thread().name.startswith("ghm_d2"), torch.is_grad_enabled()

    assert Blocks(4 * BLOCK).map(work) == [(threads == 2, False)] * threads
    assert Blocks(1 << 17).map(work) == [(False, False)]
    assert torch.get_num_threads() == threads and torch.is_grad_enabled()


def test_without_gradient_the_loss_is_the_same():
    logits, labels = classification((3000, 8))
    weights = torch.rand(30)
    with_gradient, without = (
        sigmoid_kernel(logits.clone().requires_grad_(wanted), labels, None, 30)
        for wanted in (True, False)
    )
    assert torch.equal(with_gradient.counts(30), without.counts(30))
    assert torch.equal(with_gradient.loss(weights[None]), without.loss(weights[None]))


def test_the_quick_way_to_a_region_is_taken_where_it_is_exact():
    # a product with a power of two is; 17/20 * 20 is rounded up from below
    assert region_finder(16).floor_is_exact and not region_finder(20).floor_is_exact
