"""Gradient statistics: values against the oracle, when they are taken, and what they cost."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import TrainerBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from ghm_d2 import add_ghm_config
from ghm_d2.analysis import statistics
from ghm_d2.analysis.hook import GradientStatistics, build_gradient_statistics
from ghm_d2.analysis.statistics import measure, summarize
from ghm_d2.engine.pictures import plot_training
from ghm_d2.errors import UserError
from ghm_d2.losses import GHMCLoss, GHMRLoss, base
from ghm_d2.losses.base import HarmonizedLoss, observed
from ghm_d2.modeling import validate_ghm_config
from ghm_d2.run_folder import RunFolder
from tests import reference
from tests.detectors import NUM_CLASSES, TWO_IMAGES, batch, small_model


def oracle(loss, calls, counter):
    """What `measure` must return for one call: plain numbers, from the float64 reference.

    `counter` is the RunningCounts of the loss, None with the exact density.
    """
    kind = {"mu": loss.mu} if isinstance(loss, GHMRLoss) else {}
    name = "asl1" if kind else loss.activation
    examples = getattr(reference, f"{name}_examples")
    parts = [examples(*(None if a is None else a.numpy() for a in call), **kind) for call in calls]
    both = list(zip(calls, parts, strict=True))
    g = np.concatenate([part.gradient_norm[part.keep] for part in parts])
    plain = np.concatenate([part.loss[part.keep] for part in parts])
    positive = np.concatenate([positives(name, *call[:2])[part.keep] for call, part in both])
    region = reference.region_of(g, loss.bins)
    counts = reference.region_counts(g, loss.bins)
    if counter is None:
        weights = 1 / reference.exact_density(g, 1 / loss.bins) if len(g) else g
    else:
        weights = counter.region_weights(counts, write=True)[region]
    third = np.where(g < 1 / 3, 0, np.where(g < 2 / 3, 1, 2))
    gradient = np.zeros((loss.bins, 3))
    np.add.at(gradient, (region, third), weights * g)
    return {
        "counts": counts,
        "gradient": gradient,
        "num_examples": len(g),
        "plain_sum": plain.sum(),
        "num_positives": positive.sum(),
        "positive_sum": plain[positive].sum(),
        "harmonized_sum": (weights * plain).sum(),
        "largest_weight": len(g) * weights.max(initial=0),
    }


def positives(name, prediction, target):
    x, t = prediction.numpy(), target.numpy()
    if name == "asl1":
        return np.zeros(x.shape, dtype=bool)
    if name == "softmax":
        return t < x.shape[1] - 1
    return t == 1 if t.ndim == 2 else t[:, None] == np.arange(x.shape[1])


def assert_equals_oracle(found, expected):
    for key, value in expected.items():
        np.testing.assert_allclose(getattr(found, key).numpy(), value, rtol=2e-5, err_msg=key)


def counter_of(loss):
    switches = ("normalize_by", "decay_empty_bins", "bias_correction")
    return reference.RunningCounts(
        loss.bins, loss.momentum, **{name: getattr(loss, name) for name in switches}
    )


LOSSES = {
    "sigmoid": lambda: GHMCLoss(loss_weight=3.0),
    "sigmoid, other switches": lambda: GHMCLoss(
        bins=7, normalize_by="all_bins", bias_correction=True, decay_empty_bins=True
    ),
    "softmax": lambda: GHMCLoss(activation="softmax"),
    "regression": lambda: GHMRLoss(mu=0.1, loss_weight=10.0),
    "exact": lambda: GHMCLoss(bins=11, momentum=0.0, density="exact"),
}


def draw(loss, rng, rows):
    if isinstance(loss, GHMRLoss):
        arrays = reference.draw_boxes(rng, rows, loss.bins, loss.mu)
    else:
        arrays = reference.draw_logits(rng, rows, 5, loss.bins, activation=loss.activation)
    return [torch.from_numpy(a) for a in arrays]


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_measure_against_the_oracle(make, pieces, monkeypatch):
    """Several steps, each of several tensors (one of them empty), some with weights."""
    if pieces:
        monkeypatch.setattr(statistics, "_PIECE", 64)
    loss = make()
    counter = None if loss.density == "exact" else counter_of(loss)
    rng = np.random.default_rng(3)
    seen = []
    for rows in (120, 40, 5):
        first, second = draw(loss, rng, rows), draw(loss, rng, 31)
        mask = torch.from_numpy(rng.integers(0, 2, 31)).float()
        empty = [a[:0] for a in first]
        calls = [(*first, None), (*empty, None), (*second, mask)]
        with observed(lambda *arguments: seen.append(measure(*arguments))):
            value = loss.forward_pooled(*map(list, zip(*calls, strict=True)))
        assert_equals_oracle(seen[-1], oracle(loss, calls, counter))
        expected = loss.loss_weight * seen[-1].harmonized_sum.item()
        assert value.item() == pytest.approx(expected, rel=2e-5)


def test_dense_labels_and_no_example():
    loss, counter = GHMCLoss(), counter_of(GHMCLoss())
    seen = []
    logits, labels = draw(loss, np.random.default_rng(0), 50)
    dense = torch.nn.functional.one_hot(labels.clamp(min=0), 6)[:, :5]
    with observed(lambda *arguments: seen.append(measure(*arguments))):
        loss(logits, dense)
        loss(logits, torch.full_like(labels, -1))
    assert_equals_oracle(seen[0], oracle(loss, [(logits, dense, None)], counter))
    summary = summarize([[seen[1]]])
    assert (summary["examples"], summary["harmonized_loss"]) == (0, 0.0)
    for key in ("plain_loss", "gradient_share_easy", "non_empty_regions", "largest_weight"):
        assert summary[key] is None
    assert summary["calls"] == [{"counts": [0] * 30, "gradient_share": [0.0] * 30}]


def test_the_summary_of_levels_and_copies():
    """Two copies of a loss with two calls each, by hand; g is 0.125 (easy) or 0.875 (hard)."""
    one = torch.tensor(1.0, dtype=torch.float64)

    def call(counts, easy, hard, plain, largest):
        gradient = torch.zeros(2, 3, dtype=torch.float64)
        gradient[0, 0], gradient[1, 2] = easy, hard
        counts = torch.tensor(counts)
        return statistics.CallStatistics(
            counts, gradient, counts.sum(), one * plain, counts[1], one, one * 3, one * largest
        )

    copies = [
        [call([8, 2], 1.0, 4.0, 2.0, 5.0), call([3, 0], 1.0, 0.0, 1.0, 1.0)],
        [call([5, 1], 2.0, 2.0, 3.0, 7.0), call([0, 0], 0.0, 0.0, 0.0, 0.0)],
    ]
    assert summarize(copies) == {
        "examples": 19,
        "plain_loss": pytest.approx(6 / 19),
        "plain_loss_positives": pytest.approx(4 / 3),
        "harmonized_loss": 6.0,
        "gradient_share_easy": 0.4,
        "gradient_share_medium": 0.0,
        "gradient_share_hard": 0.6,
        "non_empty_regions": pytest.approx(5 / 3),
        "largest_weight": 7.0,
        "calls": [
            {"counts": [13, 3], "gradient_share": pytest.approx([0.3, 0.6])},
            {"counts": [3, 0], "gradient_share": pytest.approx([0.1, 0.0])},
        ],
    }


class Net(torch.nn.Module):
    """Both losses on a layer; the box loss sees positives in every second step alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 4)
        self.ghm_c = torch.nn.ModuleList([GHMCLoss()])
        self.ghm_r = GHMRLoss()
        self.observed = []

    def forward(self, iteration):
        self.observed.append(bool(base._observers))
        x = self.layer(torch.linspace(-3, 3, 80).view(20, 4) + iteration / 50)
        boxes = x[: 10 * (iteration % 2)]
        return self.ghm_c[0](x, torch.arange(20) % 5) + self.ghm_r(boxes, boxes.detach() + 0.1)


class Trainer(TrainerBase):
    def __init__(self, model, hooks, max_iter):
        super().__init__()
        self.model, self.ops = model, []
        self.register_hooks(hooks)
        self.train(0, max_iter)

    def run_step(self):
        with CountOperations() as count:
            self.model(self.iter).backward()
        self.ops.append(count.ops)
        self.storage.put_scalar("total_loss", 1.0)


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        return func(*args, **(kwargs or {}))


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_period_files_and_cost(tmp_path):
    """Each 20th and the last step are observed; all others run as without the hook."""
    net = Net()
    hook = GradientStatistics(net, 20, str(tmp_path / "statistics.jsonl"))
    assert list(hook.losses) == ["ghm_c", "ghm_r"]
    json_log = JSONWriter(str(tmp_path / "metrics.json"))
    writer = PeriodicWriter([json_log, TensorboardXWriter(str(tmp_path))], 20)
    trainer = Trainer(net, [hook, writer], 45)
    assert [i for i, seen in enumerate(net.observed) if seen] == [19, 39, 44]

    bare = Trainer(Net(), [], 45)
    extra = {i: a - b for i, (a, b) in enumerate(zip(trainer.ops, bare.ops, strict=True)) if a != b}
    assert set(extra) == {19, 39, 44} and min(extra.values()) > 0

    found = lines(tmp_path / "statistics.jsonl")
    assert [(row["iteration"], row["loss"]) for row in found] == [
        (i, name) for i in (19, 39, 44) for name in ("ghm_c", "ghm_r")
    ]
    metrics = RunFolder(tmp_path).metrics
    assert set(metrics) == {19, 39, 44}
    cls = {row["iteration"]: row for row in found if row["loss"] == "ghm_c"}
    assert cls[39]["examples"] == 80
    for key in ("plain_loss", "gradient_share_easy", "non_empty_regions", "largest_weight"):
        assert metrics[39][f"ghm_c/{key}"] == pytest.approx(cls[39][key], rel=1e-5)
    assert "ghm_r/plain_loss" in metrics[39]
    assert "ghm_r/plain_loss" not in metrics[44]  # no positive was met
    assert found[-1]["examples"] == 0 and found[-1]["plain_loss"] is None

    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert [e.step for e in events.Scalars("ghm_c/plain_loss")] == [19, 39, 44]
    bars = events.Histograms("ghm_c/log10_examples")[1].histogram_value
    counts = np.array(cls[39]["calls"][0]["counts"])
    np.testing.assert_allclose(bars.bucket, np.log10(1 + counts), rtol=1e-6)
    np.testing.assert_allclose(bars.bucket_limit, np.arange(1, 31) / 30)
    shares = events.Histograms("ghm_c/gradient_share")[1].histogram_value.bucket
    np.testing.assert_allclose(shares, cls[39]["calls"][0]["gradient_share"], rtol=1e-5)
    plot_training(metrics, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_observing_changes_nothing(tmp_path):
    plain, observed = Net(), Net()
    hook = GradientStatistics(observed, 1, str(tmp_path / "s.jsonl"))
    Trainer(plain, [], 6)
    Trainer(observed, [hook], 6)
    for (name, a), b in zip(
        plain.state_dict().items(), observed.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert torch.equal(plain.layer.weight.grad, observed.layer.weight.grad)
    assert len(lines(tmp_path / "s.jsonl")) == 12


def test_no_observer_is_left_after_an_error(tmp_path):
    net = Net()
    hook = GradientStatistics(net, 1, str(tmp_path / "s.jsonl"))
    net.layer.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="finite"):
        Trainer(net, [hook], 3)
    assert not base._observers


@pytest.fixture
def captured(monkeypatch):
    """The arguments of every harmonised loss, by module, in the order of the histograms."""
    calls = defaultdict(list)
    original = HarmonizedLoss._forward

    def spy(self, predictions, targets, weights, pooled, divisor=None):
        none = [None] * len(predictions)
        zipped = zip(predictions, targets, weights or none, strict=True)
        each = [tuple(a if a is None else a.detach() for a in x) for x in zipped]
        calls[self] += [each] if pooled else [[x] for x in each]
        return original(self, predictions, targets, weights, pooled, divisor)

    monkeypatch.setattr(HarmonizedLoss, "_forward", spy)
    return calls


def observed_step(model, inputs, file):
    """One step under the hook: its lines, and what it logged."""
    hook = GradientStatistics(model, 1, str(file))
    with EventStorage() as storage:
        hook.trainer = type("T", (), {"iter": 0, "max_iter": 9, "storage": storage})
        hook.before_step()
        model(inputs)
        hook.after_step()
    return {row["loss"]: row for row in lines(file)}, storage.latest()


SCOPES = {
    "level": ("MODEL.GHM.RETINANET.SCOPE", "level", "SOLVER.IMS_PER_BATCH", 4),
    "batch": ("MODEL.GHM.RETINANET.SCOPE", "batch", "SOLVER.IMS_PER_BATCH", 4),
}
CALLS = {"level": 5, "batch": 1}


@pytest.mark.parametrize("scope", SCOPES)
def test_retinanet_with_levels_and_groups(scope, captured, tmp_path):
    """Four images in two groups: the levels are reported apart, the groups together."""
    model = small_model("ghm_retinanet_R_50", *SCOPES[scope])
    inputs = batch(*TWO_IMAGES, *TWO_IMAGES[::-1])
    found, logged = observed_step(model, inputs, tmp_path / "s.jsonl")
    assert set(found) == {"ghm_c", "ghm_r"}
    for name, row in found.items():
        copies = list(getattr(model, name))
        assert len(copies) == 2
        expected = []
        for loss in copies:
            counter = counter_of(loss)
            expected.append([oracle(loss, call, counter) for call in captured[loss]])
        flat = [call for calls in expected for call in calls]
        total = sum(call["gradient"].sum() for call in flat)
        examples = sum(call["num_examples"] for call in flat)
        assert row["examples"] == examples
        assert len(row["calls"]) == CALLS[scope]
        plain = sum(call["plain_sum"] for call in flat) / examples
        assert row["plain_loss"] == pytest.approx(plain, rel=1e-4)
        assert logged[f"{name}/plain_loss"][0] == pytest.approx(plain, rel=1e-4)
        number = sum(call["num_positives"] for call in flat)
        if name == "ghm_c":
            own = sum(call["positive_sum"] for call in flat) / number
            assert row["plain_loss_positives"] == pytest.approx(own, rel=1e-4)
        else:
            assert row["plain_loss_positives"] is None and number == 0
        harmonized = sum(call["harmonized_sum"] for call in flat) / 2
        assert row["harmonized_loss"] == pytest.approx(harmonized, rel=1e-4)
        shares = [row[f"gradient_share_{k}"] for k in ("easy", "medium", "hard")]
        expected_shares = sum(call["gradient"].sum(0) for call in flat) / total
        np.testing.assert_allclose(shares, expected_shares, rtol=1e-4, atol=1e-7)
        largest = max(call["largest_weight"] for call in flat)
        assert row["largest_weight"] == pytest.approx(largest, rel=1e-4)
        filled = [np.count_nonzero(c["counts"]) for c in flat if c["num_examples"]]
        assert row["non_empty_regions"] == pytest.approx(np.mean(filled), rel=1e-5)
        for level, call in enumerate(row["calls"]):
            assert call["counts"] == sum(c[level]["counts"] for c in expected).tolist()
            share = sum(c[level]["gradient"].sum(1) for c in expected) / total
            np.testing.assert_allclose(call["gradient_share"], share, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_two_stages(sigmoid, captured, tmp_path):
    model = small_model(
        "ghm_faster_rcnn_R_50_ghm_c",
        *("MODEL.GHM.RPN.CLS.ENABLED", True, "MODEL.GHM.RPN.REG.ENABLED", True),
        *("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", sigmoid),
    )
    found, _ = observed_step(model, batch(*TWO_IMAGES), tmp_path / "s.jsonl")
    rpn, head = model.proposal_generator, model.roi_heads.box_predictor
    modules = {
        "proposal_generator.ghm_c": rpn.ghm_c,
        "proposal_generator.ghm_r": rpn.ghm_r,
        "roi_heads.box_predictor.ghm_c": head.ghm_c,
        "roi_heads.box_predictor.ghm_r": head.ghm_r,
    }
    assert set(found) == set(modules)
    for name, loss in modules.items():
        (call,) = captured[loss]
        expected = oracle(loss, call, counter_of(loss))
        assert found[name]["examples"] == expected["num_examples"] > 0
        plain = expected["plain_sum"] / expected["num_examples"]
        assert found[name]["plain_loss"] == pytest.approx(plain, rel=1e-4)
        assert found[name]["calls"][0]["counts"] == expected["counts"].tolist()
    rows = sum(x.shape[0] for x, _, _ in captured[head.ghm_c][0])
    assert found["roi_heads.box_predictor.ghm_c"]["examples"] == rows * (
        NUM_CLASSES if sigmoid else 1
    )


def test_when_there_is_a_hook(tmp_path, monkeypatch):
    hook = build_gradient_statistics(Net(), 100, str(tmp_path))
    assert (hook.period, hook.file) == (100, str(tmp_path / "gradient_statistics.jsonl"))
    assert build_gradient_statistics(torch.nn.Linear(1, 1), 100, "") is None
    wrapped = torch.nn.Sequential()
    wrapped.module = Net()  # as DistributedDataParallel names it
    assert list(build_gradient_statistics(wrapped, 100, "").losses) == ["ghm_c", "ghm_r"]
    assert build_gradient_statistics(Net(), 0, "") is None
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert build_gradient_statistics(Net(), 40, "") is None


@pytest.mark.parametrize("period", [-20, 5, 30])
def test_the_period_fits_the_writers(period):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.MODEL.GHM.STATISTICS_PERIOD = period
    with pytest.raises(UserError, match=f"STATISTICS_PERIOD must be .* multiple of 20.* {period}"):
        validate_ghm_config(cfg)
