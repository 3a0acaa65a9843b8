"""Each misuse of the losses is a ValueError that names the argument."""

import math

import pytest
import torch

from ghm_d2.losses import GHMCLoss, GHMRLoss, authentic_smooth_l1_loss

NAN, INF = math.nan, math.inf
MODULES = pytest.mark.parametrize("make", [GHMCLoss, GHMRLoss])
ACTIVATIONS = pytest.mark.parametrize("activation", ["sigmoid", "softmax"])


def refuses(name):
    return pytest.raises(ValueError, match=rf"\b{name}\b")


@MODULES
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bins", 0),
        ("bins", -3),
        ("bins", 10.0),
        ("bins", True),
        ("bins", "10"),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("momentum", NAN),
        ("loss_weight", -1.0),
        ("loss_weight", NAN),
        ("normalize_by", "bins"),
        ("normalize_by", None),
        ("density", "approximate"),
    ],
)
def test_constructor(make, name, value):
    with refuses(name):
        make(**{name: value})


@pytest.mark.parametrize("activation", ["tanh", "", None])
def test_unknown_activation(activation):
    with refuses("activation"):
        GHMCLoss(activation=activation)


@pytest.mark.parametrize("mu", [0.0, -0.02, NAN])
def test_mu(mu):
    with refuses("mu"):
        GHMRLoss(mu=mu)
    with refuses("mu"):
        authentic_smooth_l1_loss(torch.zeros(2), torch.zeros(2), mu)


def test_unknown_reduction():
    with refuses("reduction"):
        authentic_smooth_l1_loss(torch.zeros(2), torch.zeros(2), reduction="average")


def classification(activation, **changes):
    """Four rows of three columns; -1 ... K are all there."""
    top = 2 if activation == "softmax" else 3
    labels = torch.tensor([0, top, -1, 1])
    call = {"logits": torch.randn(4, 3), "labels": labels, "weight": None, **changes}
    loss_fn = GHMCLoss(activation=activation)
    return loss_fn, lambda: loss_fn(call["logits"], call["labels"], call["weight"])


def assert_refused(name, loss_fn, call):
    with refuses(name):
        call()
    assert not loss_fn.acc_sum.any(), "a refused call must leave the running counts alone"


@ACTIVATIONS
@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(4, 3, dtype=torch.int64),
        torch.zeros(4, 3, dtype=torch.bool),
        torch.zeros(4, 3, dtype=torch.complex64),
        torch.zeros(4),
        torch.zeros(4, 3, 1),
        torch.tensor(0.0),
    ],
    ids=lambda x: f"{x.dtype}{list(x.shape)}",
)
def test_logits_type_and_dimensions(activation, logits):
    assert_refused("logits", *classification(activation, logits=logits))


@ACTIVATIONS
@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(4, 2, dtype=torch.int64),
        torch.zeros(3, 4, dtype=torch.int64),
        torch.zeros(4, 3, 1, dtype=torch.int64),
        torch.tensor(0),
        torch.zeros(4),
        torch.tensor([0, 4, 1, 1]),
        torch.tensor([0, -2, 1, 1]),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}{t.flatten()[:4].tolist()}",
)
def test_integer_labels(activation, labels):
    assert_refused("labels", *classification(activation, labels=labels))


def test_the_largest_label_is_k():
    for activation, beyond in (("sigmoid", 4), ("softmax", 3)):
        labels = torch.tensor([0, beyond, 1, 1])
        assert_refused("labels", *classification(activation, labels=labels))
        labels[1] -= 1
        _, call = classification(activation, labels=labels)
        assert torch.isfinite(call())


@pytest.mark.parametrize("value", [-1.0, -0.1, 1.01, 2.0, NAN, INF])
def test_dense_labels_lie_between_zero_and_one(value):
    labels = torch.zeros(4, 3)
    labels[1, 2] = value
    assert_refused("labels", *classification("sigmoid", labels=labels))


def test_dense_labels_do_not_suit_softmax():
    assert_refused("labels", *classification("softmax", labels=torch.zeros(4, 3)))
    labels = torch.zeros(4, 3, dtype=torch.int64)
    assert_refused("labels", *classification("softmax", labels=labels))


BAD_WEIGHTS = [
    torch.ones(5),
    torch.ones(1),
    torch.ones(4, 1),
    torch.ones(3, 4),
    torch.tensor(1.0),
    torch.tensor([1.0, -1.0, 1.0, 1.0]),
    torch.tensor([1.0, NAN, 1.0, 1.0]),
]
WEIGHTS = pytest.mark.parametrize(
    "weight", BAD_WEIGHTS, ids=lambda w: f"{list(w.shape)}{w.flatten()[:4].tolist()}"
)


@ACTIVATIONS
@WEIGHTS
def test_weight_of_ghm_c(activation, weight):
    assert_refused("weight", *classification(activation, weight=weight))


@WEIGHTS
def test_weight_of_ghm_r(weight):
    loss_fn = GHMRLoss()
    pred, target = torch.randn(4, 3), torch.zeros(4, 3)
    assert_refused("weight", loss_fn, lambda: loss_fn(pred, target, weight))


def refused_or_finite(name, loss_fn, call, predictions):
    """Either a ValueError naming the argument, or a finite loss with finite gradients."""
    try:
        loss = call()
    except ValueError as error:
        assert name in str(error)
    else:
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(predictions.grad).all()
    assert torch.isfinite(loss_fn.acc_sum).all()


@ACTIVATIONS
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_that_are_not_finite(activation, value, dtype):
    logits = torch.randn(4, 3)
    logits[0, 1] = value
    logits = logits.to(dtype).requires_grad_()
    loss_fn, call = classification(activation, logits=logits)
    refused_or_finite("logits", loss_fn, call, logits)


@ACTIVATIONS
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("by", ["label", "weight"])
def test_ignored_logits_need_not_be_finite(activation, value, by):
    # an ignored row is a removed row, whatever it holds
    clean = torch.randn(4, 3)
    logits, kept = clean.clone(), torch.tensor([True, True, False, True])
    logits[2] = value
    logits.requires_grad_()
    labels, weight = torch.tensor([0, 1, 1, 2]), kept.float()
    if by == "label":
        labels[2], weight = -1, None
    loss_fn = GHMCLoss(activation=activation)
    loss = loss_fn(logits, labels, weight)
    loss.backward()
    expected = GHMCLoss(activation=activation)(clean[kept], labels[kept])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.isfinite(logits.grad).all() and not logits.grad[2].any()


@ACTIVATIONS
def test_nan_logits_are_refused_where_they_count(activation):
    # a NaN has no region: no finite loss could be right
    logits = torch.randn(4, 3)
    logits[0, 1] = NAN
    assert_refused("logits", *classification(activation, logits=logits))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["pred", "target"])
def test_boxes_that_are_not_finite(name, value):
    tensors = {"pred": torch.randn(2, 4), "target": torch.randn(2, 4)}
    tensors[name][0, 1] = value
    pred = tensors["pred"].requires_grad_()
    loss_fn = GHMRLoss()
    refused_or_finite(name, loss_fn, lambda: loss_fn(pred, tensors["target"]), pred)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["pred", "target"])
def test_dropped_boxes_need_not_be_finite(name, value):
    # such as the infinite target of a zero-size box
    clean = {"pred": torch.randn(2, 4), "target": torch.randn(2, 4)}
    tensors = {key: tensor.clone() for key, tensor in clean.items()}
    tensors[name][0, 1] = value
    pred = tensors["pred"].requires_grad_()
    loss = GHMRLoss()(pred, tensors["target"], torch.tensor([0.0, 1.0]))
    loss.backward()
    expected = GHMRLoss()(clean["pred"][1:], clean["target"][1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.isfinite(pred.grad).all() and not pred.grad[0].any()


@pytest.mark.parametrize("name", ["pred", "target"])
def test_nan_boxes_are_refused_where_they_count(name):
    tensors = {"pred": torch.randn(2, 4), "target": torch.randn(2, 4)}
    tensors[name][0, 1] = NAN
    loss_fn = GHMRLoss()
    assert_refused(name, loss_fn, lambda: loss_fn(tensors["pred"], tensors["target"]))


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (5, 4), (4, 1), (4,), (16,)])
def test_target_of_another_shape(shape):
    loss_fn = GHMRLoss()
    assert_refused("target", loss_fn, lambda: loss_fn(torch.zeros(4, 4), torch.zeros(shape)))
    with refuses("target"):
        authentic_smooth_l1_loss(torch.zeros(4, 4), torch.zeros(shape))


def test_boxes_must_be_floating():
    loss_fn = GHMRLoss()
    whole = torch.zeros(4, 4, dtype=torch.int64)
    assert_refused("pred", loss_fn, lambda: loss_fn(whole, torch.zeros(4, 4)))
    assert_refused("target", loss_fn, lambda: loss_fn(torch.zeros(4, 4), whole))


@pytest.mark.parametrize("name", ["labels", "weights"])
def test_pooled_lists_of_different_length(name):
    lists = {
        "logits": [torch.zeros(2, 3)] * 2,
        "labels": [torch.zeros(2, dtype=torch.int64)] * 2,
        "weights": [torch.ones(2)] * 2,
    }
    lists[name] = lists[name][:1]
    loss_fn = GHMCLoss()
    # the argument may be named with or without its plural ending
    with pytest.raises(ValueError, match=name.removesuffix("s")):
        loss_fn.forward_pooled(*lists.values())
    assert not loss_fn.acc_sum.any()


def test_one_bad_tensor_refuses_the_whole_pool():
    loss_fn = GHMCLoss()
    good, bad = torch.tensor([0, 1]), torch.tensor([0, 9])
    with refuses("labels"):
        loss_fn.forward_pooled([torch.zeros(2, 3)] * 2, [good, bad])
    assert not loss_fn.acc_sum.any()


@MODULES
@pytest.mark.parametrize("name", ["decay_empty_bins", "bias_correction", "sync"])
@pytest.mark.parametrize("value", [1, 0, None, "yes"])
def test_switches_are_true_or_false(make, name, value):
    with refuses(name):
        make(**{name: value})


@MODULES
@pytest.mark.parametrize("value", [math.inf, True, "1"])
def test_loss_weight_is_a_finite_number(make, value):
    with refuses("loss_weight"):
        make(loss_weight=value)


@pytest.mark.parametrize("value", [math.inf, True, "1"])
def test_mu_is_a_finite_number(value):
    with refuses("mu"):
        GHMRLoss(mu=value)


@MODULES
def test_momentum_is_a_number(make):
    for value in (False, "0"):
        with refuses("momentum"):
            make(momentum=value)


@MODULES
def test_the_ends_of_each_range_are_allowed(make):
    loss_fn = make(bins=1, momentum=0, loss_weight=0)
    assert (loss_fn.bins, loss_fn.momentum, loss_fn.loss_weight) == (1, 0.0, 0.0)


def test_what_is_no_tensor():
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="logits must be a floating-point tensor, got list"):
        GHMCLoss()([[0.0] * 3] * 2, labels)
    with pytest.raises(ValueError, match="labels must be a tensor, got list"):
        GHMCLoss()(logits, [0, 3])
    with pytest.raises(ValueError, match="weight must be a tensor or None, got list"):
        GHMCLoss()(logits, labels, [1.0, 1.0])
    with pytest.raises(ValueError, match="pred must be a floating-point tensor, got ndarray"):
        GHMRLoss()(logits.numpy(), logits)


def test_messages_say_what_came_and_what_is_allowed():
    logits, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    cases = [
        (logits, labels[:2], None, r"labels must have shape \(4,\) or \(4, 3\), got \(2,\)"),
        (logits, labels[:, None], None, r"shape \(4,\) or \(4, 3\), got \(4, 1\)"),
        (logits, labels + 4, None, r"lie in \[-1, 3\] \(-1 = ignored, 3 = background\)"),
        (logits, labels, torch.ones(3), r"weight must have shape \(4,\) or \(4, 3\), got \(3,\)"),
    ]
    for *call, message in cases:
        with pytest.raises(ValueError, match=message):
            GHMCLoss()(*call)
    softmax = GHMCLoss(activation="softmax")
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), got \(2,\)"):
        softmax(logits, labels[:2])
    with pytest.raises(ValueError, match=r"lie in \[-1, 2\] \(-1 = ignored, 2 = background\)"):
        softmax(logits, labels + 3)
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\), got \(3,\)"):
        softmax(logits, labels, torch.ones(3))
    with pytest.raises(ValueError, match=r"each of the 2 preds, got 1 and 2"):
        GHMRLoss().forward_pooled([logits] * 2, [logits])
    with pytest.raises(ValueError, match=r"each of the 2 preds, got 1 and 1"):
        GHMRLoss().forward_pooled([logits] * 2, [logits], [None])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integer_labels_of_any_width(dtype):
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 3, 1, 2])
    for activation, index in (("sigmoid", labels), ("softmax", labels.clamp(max=2))):
        expected = GHMCLoss(activation=activation)(logits, index)
        assert torch.equal(GHMCLoss(activation=activation)(logits, index.to(dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_labels_of_rows_are_integers(dtype):
    for activation in ("sigmoid", "softmax"):
        assert_refused("labels", *classification(activation, labels=torch.zeros(4).to(dtype)))


@pytest.mark.parametrize("by", ["label", "weight"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_dropped_examples_need_not_be_finite_without_a_kernel(by, value):
    # float64 takes the eager path, where 0 times NaN must not happen
    clean, kept = torch.randn(4, 3, dtype=torch.float64), torch.tensor([True, True, False, True])
    logits = clean.clone()
    logits[2] = value
    logits.requires_grad_()
    labels, weight = torch.tensor([0, 1, 1, 3]), kept.float()
    if by == "label":
        labels[2], weight = -1, None
    loss = GHMCLoss()(logits, labels, weight)
    loss.backward()
    expected = GHMCLoss()(clean[kept], labels[kept])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.isfinite(logits.grad).all() and not logits.grad[2].any()
    if by == "weight":
        boxes = GHMRLoss()(logits.detach(), torch.zeros_like(clean), weight)
        expected = GHMRLoss()(clean[kept], torch.zeros_like(clean[kept]))
        assert boxes.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_dim", 1.0),
        ("class_dim", None),
        ("ignore_index", "255"),
        ("ignore_index", 0.5),
        ("class_weight", 2.0),
        ("class_weight", [[1.0, 1.0, 1.0]]),
        ("class_weight", torch.ones(1, 3)),
        ("class_weight", [1.0, -1.0, 1.0]),
        ("class_weight", [1.0, NAN, 1.0]),
        ("class_weight", "abc"),
    ],
)
def test_layout_and_class_weights(name, value):
    with refuses(name):
        GHMCLoss(**{name: value})


@ACTIVATIONS
@pytest.mark.parametrize("count", [1, 5, 0])
def test_as_many_class_weights_as_classes(activation, count):
    _, call = classification(activation)
    loss_fn = GHMCLoss(activation=activation, class_weight=[1.0] * count)
    with pytest.raises(ValueError, match=f"class_weight must have .*3 values .*got {count}"):
        loss_fn(torch.randn(4, 3), torch.tensor([0, 1, -1, 2]))


@pytest.mark.parametrize("class_dim", [2, -3])
def test_the_class_axis_exists(class_dim):
    with pytest.raises(ValueError, match=rf"class_dim must be an axis .*\(4, 3\), got {class_dim}"):
        GHMCLoss(class_dim=class_dim)(torch.randn(4, 3), torch.zeros(4).long())


def test_labels_beside_another_ignored_one():
    loss_fn = GHMCLoss(ignore_index=255)
    logits = torch.randn(4, 3)
    for bad in (-1, 4, 254):
        with pytest.raises(ValueError, match=r"lie in \[0, 3\] .* or be 255 \(ignored\)"):
            loss_fn(logits, torch.tensor([0, 255, 3, bad]))
    assert torch.isfinite(loss_fn(logits, torch.tensor([0, 255, 3, 1], dtype=torch.uint8)))


# A loss is used by name in messages about what PyTorch would report from deep inside.
def losses_of(kind, rows=6):
    if kind == "boxes":
        return GHMRLoss(), torch.randn(rows, 4), torch.randn(rows, 4)
    return GHMCLoss(activation=kind), torch.randn(rows, 3), torch.arange(rows) % 3


KINDS = pytest.mark.parametrize("kind", ["sigmoid", "softmax", "boxes"])


@KINDS
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.hessian(f)(x),
        lambda f, x: torch.func.jacrev(f)(x),
    ],
    ids=["grad", "vmap", "jvp", "hessian", "jacrev"],
)
def test_transforms_are_refused_in_words(kind, transform):
    loss_fn, x, target = losses_of(kind)
    with pytest.raises(ValueError, match="must be a plain tensor, got one inside a transform"):
        transform(lambda x: loss_fn(x, target), x)
    assert not loss_fn.acc_sum.any()


@KINDS
def test_a_batched_target_or_weight_is_refused_in_words(kind):
    loss_fn, x, target = losses_of(kind)
    with pytest.raises(ValueError, match="inside a transform of torch.func"):
        torch.func.vmap(lambda t: loss_fn(x, t))(torch.stack([target, target]))
    with pytest.raises(ValueError, match="weight .*inside a transform of torch.func"):
        torch.func.vmap(lambda w: loss_fn(x, target, w))(torch.ones(2, len(x)))


@KINDS
def test_a_trace_is_refused_in_words(kind):
    loss_fn, x, target = losses_of(kind)
    with pytest.raises(ValueError, match="must not be traced"):
        torch.jit.trace(loss_fn, (x, target))


@KINDS
@pytest.mark.parametrize("density", ["unit_region", "exact"])
def test_meta_tensors_have_a_loss_without_a_value(kind, density):
    make, momentum = (GHMRLoss, {}) if kind == "boxes" else (GHMCLoss, {"activation": kind}), 0.0
    make, settings = make
    with torch.device("meta"):
        loss_fn = make(momentum=momentum, density=density, **settings)
        _, x, target = losses_of(kind)
    x.requires_grad_()
    loss = loss_fn(x, target)
    loss.backward()
    assert loss.is_meta and loss.shape == () and x.grad.shape == x.shape
    loss_fn.raise_deferred_errors()


@KINDS
def test_a_module_from_the_meta_device_is_filled_by_reset_parameters(kind):
    settings = {} if kind == "boxes" else {"activation": kind, "class_weight": [1.0, 2.0, 3.0]}
    make = GHMRLoss if kind == "boxes" else GHMCLoss
    with torch.device("meta"):
        loss_fn = make(bias_correction=True, **settings)
    loss_fn.to_empty(device="cpu")
    for buffer in loss_fn.buffers():
        buffer.fill_(7)  # what memory may hold
    loss_fn.reset_parameters()
    _, x, target = losses_of(kind)
    fresh = make(bias_correction=True, **settings)
    assert torch.equal(loss_fn(x, target), fresh(x, target))
    assert torch.equal(loss_fn.acc_sum, fresh.acc_sum)


@KINDS
def test_fake_tensors_have_a_loss_without_a_value(kind):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        loss_fn, x, target = losses_of(kind)
        loss = loss_fn(x.requires_grad_(), target)
        loss.backward()
    assert loss.shape == () and x.grad.shape == x.shape


@KINDS
def test_another_device_than_that_of_the_loss_is_named(kind):
    loss_fn, x, target = losses_of(kind)
    name = "pred" if kind == "boxes" else "logits"
    with pytest.raises(
        ValueError, match=rf"\b{name} must be on the device of the loss, cpu, got m"
    ):
        loss_fn(x.to("meta"), target.to("meta"))
    name = "target" if kind == "boxes" else "labels"
    with pytest.raises(ValueError, match=rf"\b{name} must be on the device of the loss"):
        loss_fn(x, target.to("meta"))
