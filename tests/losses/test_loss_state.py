"""The running counts: when they are written, how they are saved, what they count."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.utils.checkpoint

from ghm_d2.losses import ASL1Loss, CrossEntropyLoss, GHMCLoss, GHMRLoss, OHEMLoss
from ghm_d2.losses.base import observed
from ghm_d2.losses.functional import count_unit_regions
from tests import reference as ref


def cls_call(rng, rows=30, bins=30, activation="sigmoid"):
    x, labels = ref.draw_logits(rng, rows, 3, bins, activation=activation)
    return torch.tensor(x).requires_grad_(), torch.tensor(labels)


def softmax_call(rng, rows=30, bins=30):
    return cls_call(rng, rows, bins, "softmax")


def box_call(rng, rows=30, bins=10):
    pred, target = ref.draw_boxes(rng, rows, bins)
    return torch.tensor(pred).requires_grad_(), torch.tensor(target)


def softmax_loss(*args, **kwargs):
    return GHMCLoss(*args, activation="softmax", **kwargs)


KINDS = pytest.mark.parametrize(
    ("make", "call"),
    [(GHMCLoss, cls_call), (softmax_loss, softmax_call), (GHMRLoss, box_call)],
    ids=["ghm_c", "ghm_c_softmax", "ghm_r"],
)
_SWITCHES = [
    {},
    {"momentum": 0.0},
    {"bias_correction": True},
    {"decay_empty_bins": True},
    {"decay_empty_bins": True, "bias_correction": True, "normalize_by": "all_bins"},
]


def _with(switches):
    return pytest.mark.parametrize("switches", switches, ids=lambda s: "-".join(s) or "default")


SWITCHES = _with([*_SWITCHES, {"loss_weight": "auto"}])
# The weight of "auto" is one for a step: levels are no longer single calls.
OF_COUNTS = _with(_SWITCHES)


@KINDS
def test_the_buffer_is_float32_and_saved(make, call):
    loss_fn = make(bins=7)
    assert loss_fn.acc_sum.dtype == torch.float32 and loss_fn.acc_sum.shape == (7,)
    assert not loss_fn.acc_sum.any()
    loss_fn(*call(np.random.default_rng(0), bins=7))
    assert torch.equal(loss_fn.state_dict()["acc_sum"], loss_fn.acc_sum)
    assert loss_fn.acc_sum.any()
    assert not list(loss_fn.parameters())


@KINDS
@pytest.mark.parametrize("move", ["half", "bfloat16", "double"])
def test_casting_the_model_leaves_the_buffer_in_float32(make, call, move):
    plain, cast = make(), getattr(torch.nn.ModuleDict({"loss": make()}), move)()["loss"]
    rng = np.random.default_rng(1)
    for _ in range(3):
        inputs = call(rng)
        assert torch.equal(plain(*inputs), cast(*inputs))
    assert cast.acc_sum.dtype == torch.float32
    assert torch.equal(plain.acc_sum, cast.acc_sum)
    # and once more when the counts are there already
    getattr(cast, move)()
    assert torch.equal(plain.acc_sum, cast.acc_sum)


@KINDS
@SWITCHES
def test_eval_writes_nothing_and_equals_the_training_call(make, call, switches):
    rng = np.random.default_rng(2)
    loss_fn = make(**switches)
    for rows in (30, 2, 30):
        inputs = call(rng, rows)
        before = copy.deepcopy(loss_fn.state_dict())
        loss_fn.eval()
        losses = [loss_fn(*inputs), loss_fn(*inputs)]
        grads = [torch.autograd.grad(loss, inputs[0])[0] for loss in losses]
        after = loss_fn.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        trained = loss_fn.train()(*inputs)
        (grad,) = torch.autograd.grad(trained, inputs[0])
        assert torch.equal(losses[0], trained) and torch.equal(losses[1], trained)
        assert torch.equal(grads[0], grad) and torch.equal(grads[1], grad)


@KINDS
@SWITCHES
def test_a_saved_state_continues_exactly(make, call, switches):
    rng = np.random.default_rng(3)
    whole = make(**switches)
    for rows in (30, 3):
        whole(*call(rng, rows))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = make(**switches)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for rows in (3, 30):
        inputs = call(rng, rows)
        assert torch.equal(resumed(*inputs), whole(*inputs))
    assert torch.equal(resumed.acc_sum, whole.acc_sum)


@KINDS
@SWITCHES
def test_a_call_without_examples_is_zero_and_changes_nothing(make, call, switches):
    rng = np.random.default_rng(5)
    loss_fn, other = make(**switches), make(**switches)
    inputs = call(rng)
    loss_fn(*inputs), other(*inputs)
    before = copy.deepcopy(loss_fn.state_dict())
    for rows, weight in ((0, None), (0, torch.zeros(0)), (4, torch.zeros(4))):
        predictions, targets = call(rng, rows)
        loss = loss_fn(predictions, targets, weight)
        loss.backward()
        assert loss.shape == () and loss.item() == 0
        assert predictions.grad.shape == predictions.shape and not predictions.grad.any()
        assert all(torch.equal(before[k], v) for k, v in loss_fn.state_dict().items())
    following = call(rng)
    assert torch.equal(loss_fn(*following), other(*following))


@pytest.mark.parametrize("make", [GHMCLoss, softmax_loss])
def test_all_labels_ignored_is_a_call_without_examples(make):
    logits = torch.randn(5, 4, requires_grad=True)
    loss_fn = make()
    loss = loss_fn(logits, torch.full((5,), -1))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any() and not loss_fn.acc_sum.any()


@KINDS
def test_pooling_one_tensor_is_the_plain_call_and_pooling_none_is_zero(make, call):
    pooled, plain = make(), make()
    rng = np.random.default_rng(6)
    predictions, targets = call(rng)
    loss = plain(predictions, targets)
    assert torch.equal(pooled.forward_pooled([predictions], [targets]), loss)
    assert torch.equal(pooled.acc_sum, plain.acc_sum)
    empty = [call(rng, 0) for _ in range(2)]
    loss = pooled.forward_pooled([p for p, _ in empty], [t for _, t in empty])
    loss.backward()
    assert loss.shape == () and loss.item() == 0 and torch.equal(pooled.acc_sum, plain.acc_sum)


@KINDS
def test_pooling_in_eval_mode_writes_nothing(make, call):
    rng = np.random.default_rng(7)
    loss_fn = make()
    loss_fn(*call(rng))
    before = loss_fn.acc_sum.clone()
    parts = [call(rng, rows) for rows in (9, 2)]
    pooled = [list(column) for column in zip(*parts, strict=True)]
    loss = loss_fn.eval().forward_pooled(*pooled)
    assert torch.equal(loss_fn.acc_sum, before)
    assert torch.equal(loss_fn.train().forward_pooled(*pooled), loss)


# One call of `n` examples in region 0 (g = 0), of `n` in the last one (g = 1): exact counts.
def ends(low, high):
    pred = torch.tensor([0.0] * low + [1e6] * high, requires_grad=True)
    return pred, torch.zeros(low + high)


@pytest.mark.parametrize(("decay", "kept"), [(False, 4.0), (True, 1.0)])
def test_only_decay_lowers_the_count_of_an_empty_region(decay, kept):
    loss_fn = GHMRLoss(momentum=0.5, decay_empty_bins=decay)
    for call in (ends(8, 2), ends(0, 2), ends(0, 2)):
        loss_fn(*call)
    expected = torch.zeros(10)
    expected[0], expected[-1] = kept, 1.75
    assert torch.equal(loss_fn.acc_sum, expected)


def test_first_loss_is_too_large_without_bias_correction():
    # the average starts at zero, so the first weight is 1 / (1 - alpha) too large
    inputs = ends(6, 4)
    plain = GHMRLoss(momentum=0.0)(*inputs).item()
    assert GHMRLoss(momentum=0.75)(*inputs).item() == pytest.approx(plain / 0.25, rel=1e-6)


@KINDS
@pytest.mark.parametrize("decay", [False, True])
def test_bias_correction_starts_a_constant_stream_at_its_steady_value(make, call, decay):
    inputs = call(np.random.default_rng(8))
    steady = make(momentum=0.0)(*inputs).item()
    loss_fn = make(momentum=0.9, bias_correction=True, decay_empty_bins=decay)
    for _ in range(5):
        assert loss_fn(*inputs).item() == pytest.approx(steady, rel=1e-5)


def test_bias_correction_counts_the_updates_of_each_region():
    # region 0 is seen in the first call alone, the last region in all three
    def run(decay):
        loss_fn = GHMRLoss(momentum=0.5, bias_correction=True, decay_empty_bins=decay)
        for call in (ends(8, 2), ends(0, 2), ends(0, 2)):
            loss_fn(*call)
        pred, target = ends(4, 2)
        with torch.no_grad():
            pred[:4] = 0.002  # g = 0.0995: still region 0, but with a gradient
        loss_fn.eval()(pred, target).backward()
        slope = ref.asl1_examples(pred.detach(), target, mu=0.02).gradient
        return pred.grad[0].item() / slope[0]

    # without decay: S = (4 + 4) / 2 = 4, two updates; with it: S = (1 + 4) / 2 = 2.5, four
    assert run(False) == pytest.approx(0.75 / (4 * 2), rel=1e-5)
    assert run(True) == pytest.approx((15 / 16) / (2.5 * 2), rel=1e-5)


@KINDS
def test_sync_in_a_single_process_changes_nothing(make, call):
    rng = np.random.default_rng(9)
    alone, synced = make(), make(sync=True)
    for _ in range(2):
        inputs = call(rng)
        assert torch.equal(synced(*inputs), alone(*inputs))
    assert torch.equal(synced.acc_sum, alone.acc_sum)


def test_a_copy_has_its_own_counts():
    loss_fn = GHMRLoss()
    twin = copy.deepcopy(loss_fn)
    loss_fn(*ends(3, 3))
    assert not twin.acc_sum.any()


def test_counts_are_exact_above_two_to_the_24():
    n = 2**24 + 6  # a float32 sum of ones stops at 2^24
    loss_fn = GHMRLoss(bins=1, momentum=0.75)
    loss = loss_fn(torch.zeros(1).expand(n), torch.zeros(1).expand(n))
    assert loss_fn.acc_sum.item() == n / 4  # exact in float32
    assert loss.item() == 0


def test_counts_of_logits_are_exact_above_two_to_the_24():
    n = 2**24 + 6
    loss_fn = GHMCLoss(bins=2, momentum=0.75)
    loss_fn(torch.full((n, 1), -5.0), torch.ones(1, dtype=torch.int64).expand(n))
    assert loss_fn.acc_sum.tolist() == [n / 4, 0.0]


@pytest.mark.parametrize("density", ["unit_region", "exact"])
def test_the_observer_sees_arguments_counts_and_weights_of_each_call(density):
    momentum = 0.0 if density == "exact" else 0.5
    loss_fn = GHMCLoss(bins=4, momentum=momentum, loss_weight=7.0, density=density)
    seen = []
    logits, labels = torch.tensor([[0.0], [-9.0], [-9.0]]), torch.tensor([1, 1, 1])
    with observed(lambda *args: seen.append(args)):
        loss_fn.forward_pooled([logits], [labels])
    loss_fn.forward_pooled([logits], [labels])  # no longer observed
    ((module, predictions, targets, weights, counts, region_weights),) = seen
    assert module is loss_fn and predictions[0] is logits and targets[0] is labels
    assert weights == [None]
    if density == "exact":
        assert counts is None and region_weights is None
    else:  # S = R / 2, two regions are filled; without loss_weight
        assert counts.tolist() == [2, 0, 1, 0] and counts.dtype == torch.int64
        assert region_weights.tolist() == [0.5, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("decay", [False, True])
def test_counts_kept_without_bias_correction_load_as_steady_averages(decay):
    plain = GHMRLoss(momentum=0.5)
    plain(*ends(8, 0))
    loss_fn = GHMRLoss(momentum=0.5, bias_correction=True, decay_empty_bins=decay)
    loss_fn.load_state_dict(plain.state_dict())
    # 4 examples on average in region 0 and none in the last, which starts from nothing
    pred, target = ends(4, 2)
    loss_fn(pred, target)
    expected = torch.zeros(10)
    expected[0], expected[-1] = 4.0, 1.0
    assert torch.equal(loss_fn.acc_sum, expected)
    weights = []
    with observed(lambda *args: weights.append(args[-1])):
        loss_fn.eval()(pred, target)
    # region 0: S = 4 as it stands; the last one: S = 0.5 * 1 + 0.5 * 2 after two updates
    assert weights[0][0].item() == pytest.approx(1 / (4 * 2))
    assert weights[0][-1].item() == pytest.approx(1 / (1.5 / 0.75 * 2))


def test_counts_with_bias_correction_load_with_their_number_of_updates():
    first = GHMRLoss(momentum=0.5, bias_correction=True)
    first(*ends(8, 2))
    second = GHMRLoss(momentum=0.5, bias_correction=True)
    second.load_state_dict(first.state_dict())
    assert second.num_updates.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert second.num_updates.dtype == torch.int64


def test_region_counts_without_bincount():
    # what a CUDA device and torch.compile do
    region = torch.tensor([[0, 3, 3], [4, 2, 3]])  # 4: does not count
    expected = count_unit_regions(region, 4)
    assert expected.tolist() == [1, 0, 1, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        counts = count_unit_regions(region, 4)
    assert counts.tolist() == [1, 0, 1, 3] and counts.dtype == torch.int64


@pytest.mark.parametrize(
    ("loss_fn", "text"),
    [
        (
            GHMCLoss(),
            "activation='sigmoid', bins=30, momentum=0.75, loss_weight=1.0, "
            "normalize_by='valid_bins', decay_empty_bins=False, bias_correction=False, "
            "sync=False, density='unit_region'",
        ),
        (
            GHMRLoss(0.05, 7, 0, 10, sync=False, density="exact"),
            "mu=0.05, bins=7, momentum=0.0, loss_weight=10.0, normalize_by='valid_bins', "
            "decay_empty_bins=False, bias_correction=False, sync=False, density='exact'",
        ),
        (CrossEntropyLoss(), "loss_weight=1.0"),
        (OHEMLoss(), "loss_weight=1.0, negatives_per_positive=3"),
        (ASL1Loss(), "mu=0.02, loss_weight=1.0"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_printing_a_loss_shows_its_settings(loss_fn, text):
    assert repr(loss_fn) == f"{type(loss_fn).__name__}({text})"


@KINDS
def test_a_second_process_with_the_same_examples_doubles_the_counts_alone(make, call, monkeypatch):
    alone, synced, unsynced = make(), make(sync=True), make()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.mul_(2))
    inputs = call(np.random.default_rng(9))
    expected = alone(*inputs)
    assert torch.equal(unsynced(*inputs), expected)
    # every region is twice as full, and each process returns twice its share
    torch.testing.assert_close(synced(*inputs), expected, rtol=1e-6, atol=0)
    assert torch.equal(unsynced.acc_sum, alone.acc_sum)
    assert torch.equal(synced.acc_sum, 2 * alone.acc_sum)


# Which calls are training steps: training mode, gradients enabled, not a repetition.

DOUBLE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)


def typed(inputs, dtype):
    x, target = inputs
    return x.detach().to(dtype).requires_grad_(), target


@KINDS
@SWITCHES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_validation_pass_in_training_mode_writes_nothing(make, call, switches, mode):
    rng = np.random.default_rng(10)
    loss_fn = make(**switches)
    loss_fn(*call(rng))
    before = copy.deepcopy(loss_fn.state_dict())
    inputs = call(rng)
    with mode():
        losses = [loss_fn(*inputs) for _ in range(4)]
    assert all(torch.equal(before[name], x) for name, x in loss_fn.state_dict().items())
    # and its value is that of the step that would follow
    expected = loss_fn(*inputs)
    assert all(torch.equal(loss, expected) for loss in losses)


def checkpointed(loss_fn, inputs, **settings):
    """Loss and gradient behind a layer, both repeated by activation checkpointing."""
    x, target = inputs

    def work(x):
        return loss_fn(torch.tanh(x * 1.5), target) + loss_fn(torch.tanh(x * 0.5), target)

    loss = torch.utils.checkpoint.checkpoint(work, x, **settings) if settings else work(x)
    loss.backward()
    return loss.detach(), x.grad


@KINDS
@SWITCHES
@DOUBLE
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_recomputation_keeps_the_weights_and_writes_nothing(
    make, call, switches, dtype, early_stop
):
    plain, repeated = make(**switches), make(**switches)
    rng = np.random.default_rng(11)
    for _ in range(3):
        inputs = call(rng)
        expected = checkpointed(plain, typed(inputs, dtype))
        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            found = checkpointed(repeated, typed(inputs, dtype), use_reentrant=False)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        for name, x in plain.state_dict().items():
            assert torch.equal(repeated.state_dict()[name], x), name


@KINDS
@DOUBLE
def test_each_level_in_a_checkpoint_of_its_own(make, call, dtype):
    # repeated in the reverse order
    def run(**settings):
        loss_fn, rng, total, inputs = make(), np.random.default_rng(12), 0.0, []
        for rows in (20, 7, 3):
            x, target = typed(call(rng, rows), dtype)
            inputs.append(x)
            if settings:
                total += torch.utils.checkpoint.checkpoint(
                    lambda x, target=target: loss_fn(x * 1.25, target), x, **settings
                )
            else:
                total += loss_fn(x * 1.25, target)
        total.backward()
        return [x.grad for x in inputs], loss_fn.acc_sum

    (expected, counts), (found, others) = run(), run(use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(counts, others)


@KINDS
@DOUBLE
def test_the_reentrant_kind_is_refused_in_words(make, call, dtype):
    loss_fn = make()
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        checkpointed(loss_fn, typed(call(np.random.default_rng(13)), dtype), use_reentrant=True)
    assert not loss_fn.acc_sum.any()


@KINDS
def test_the_reentrant_kind_is_right_where_nothing_is_written(make, call):
    loss_fn, inputs = make(), call(np.random.default_rng(13))
    loss_fn(*inputs)
    loss_fn.eval()
    expected = checkpointed(loss_fn, typed(inputs, torch.float32))
    found = checkpointed(loss_fn, typed(inputs, torch.float32), use_reentrant=True)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@KINDS
def test_a_recomputation_is_not_observed(make, call):
    seen = []
    with observed(lambda *arguments: seen.append(1)):
        inputs = typed(call(np.random.default_rng(14)), torch.float32)
        checkpointed(make(), inputs, use_reentrant=False)
    assert len(seen) == 2


@KINDS
@SWITCHES
def test_weights_of_other_losses_load_strictly(make, call, switches):
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "loss": make(**switches)})
    model["loss"](*call(np.random.default_rng(15)))
    before = copy.deepcopy(model["loss"].state_dict())
    others = {k: v + 1 for k, v in model.state_dict().items() if k.startswith("layer")}
    model.load_state_dict(others)
    assert torch.equal(model["layer"].weight, others["layer.weight"])
    assert all(torch.equal(before[k], v) for k, v in model["loss"].state_dict().items())
    del others["layer.bias"]  # what is really missing is still said
    with pytest.raises(RuntimeError, match="layer.bias"):
        model.load_state_dict(others)


@KINDS
@SWITCHES
def test_reset_parameters_starts_anew(make, call, switches):
    rng = np.random.default_rng(16)
    used, fresh = make(**switches), make(**switches)
    used(*call(rng)), used(*call(rng))
    used.reset_parameters()
    inputs = call(rng)
    assert torch.equal(used(*inputs), fresh(*inputs))
    for name, x in fresh.state_dict().items():
        assert torch.equal(used.state_dict()[name], x)


@KINDS
def test_outside_training_steps_no_process_waits_for_another(make, call, monkeypatch):
    def wait(counts):
        raise AssertionError("a process that validates alone would hang here")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", wait)
    loss_fn, alone, inputs = make(sync=True), make(), call(np.random.default_rng(17))
    expected = alone(*inputs)
    with torch.no_grad():
        # each process is taken to have these examples
        torch.testing.assert_close(loss_fn(*inputs), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss_fn.eval()(*inputs), expected, rtol=1e-6, atol=0)
    with pytest.raises(AssertionError, match="validates alone"):
        loss_fn.train()(*inputs)


# Levels: one call for several tensors, each with a histogram of its own.


@KINDS
@OF_COUNTS
@DOUBLE
def test_levels_at_once_are_single_calls_one_after_the_other(make, call, switches, dtype):
    at_once, single, rng = make(**switches), make(**switches), np.random.default_rng(18)
    for rows in ((30, 9, 0, 2), (0, 40, 3, 1)):
        parts = [typed(call(rng, n), dtype) for n in rows]
        masks = [None, None, None, torch.zeros(rows[3])]  # the last level counts nothing
        twins = [typed(part, dtype) for part in parts]
        seen, seen_singly = [], []
        with observed(lambda *arguments, seen=seen: seen.append(arguments[4:])):
            loss = at_once.forward_levels(*zip(*parts, strict=True), masks)
        with observed(lambda *arguments, seen=seen_singly: seen.append(arguments[4:])):
            losses = [single(*twin, mask) for twin, mask in zip(twins, masks, strict=True)]
        torch.testing.assert_close(loss, sum(losses), rtol=1e-6, atol=0)
        loss.backward()
        sum(losses).backward()
        for (x, _), (twin, _) in zip(parts, twins, strict=True):
            assert torch.equal(x.grad, twin.grad)
        for name, value in single.state_dict().items():
            assert torch.equal(at_once.state_dict()[name], value), name
        for own, other in zip(seen, seen_singly, strict=True):
            assert all(map(torch.equal, own, other))


@KINDS
def test_processes_meet_once_for_all_levels(make, call, monkeypatch):
    met = []

    def all_reduce(counts):
        assert counts.is_contiguous()  # gloo would add up something else
        met.append(counts.mul_(2))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    rng = np.random.default_rng(19)
    make(sync=True).forward_levels(*zip(*(call(rng, n) for n in (20, 7, 3)), strict=True))
    assert len(met) == 1 and len(met[0]) == 3


@KINDS
def test_a_refused_level_leaves_the_counts_of_all_alone(make, call):
    loss_fn, rng = make(), np.random.default_rng(20)
    (a, t), (b, u) = call(rng), call(rng)
    with pytest.raises(ValueError, match="must be finite"):
        loss_fn.forward_levels([a, b * torch.nan], [t, u])
    assert not loss_fn.acc_sum.any()
