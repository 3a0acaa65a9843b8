"""The best model, early stopping, validation loss, averaged weights and accumulation, by config.

Each runs through a YAML and through a Python config; a resumed training is the undisturbed one.
"""

import contextlib
import copy
import json
import shutil

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage
from torch import nn

from ghm_d2 import add_ghm_config
from ghm_d2.engine import GHMTrainer, main
from ghm_d2.engine.averaging import AveragedWeights
from ghm_d2.engine.selection import mode_of
from ghm_d2.engine.settings import read_settings
from ghm_d2.engine.step import CheckedTrainer
from ghm_d2.losses import GHMRLoss
from tests.engine.test_guards import at_iteration
from tests.engine.test_resume import final, same, stop_at
from tests.kinds import KINDS, Kind, metrics
from tests.tiny import forget_program, write_coco

EVERYTHING = {
    "images": 4,
    "parts": 2,
    "ema": 0.9,
    "validation_loss": True,
    "save_best": True,
    "patience": 9,
    "metric": "validation/total_loss",
}


@pytest.fixture(autouse=True)
def clean_up(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", lambda: "")
    yield
    forget_program()


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    return Kind(request.param, tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [f"{name}={write_coco(folder, name)}" for name in ("first", "second")]


@pytest.fixture
def run(kind, data, tmp_path):
    """Trains into tmp_path/NAME as a program of its own, and tests every two iterations."""

    def train(name, *words, sets=2, **values):
        forget_program()
        words = [*words, *(w for text in data[:sets] for w in ("--dataset", text))]
        values = {"output": tmp_path / name, "max_iter": 6, "period": 2} | values
        main(kind.argv(*words, **{"eval_period": 2, **values}))

    return train


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr("ghm_d2.engine.run.summarize_training", lambda *args, **kwargs: None)


@pytest.fixture
def fails(run, capsys):
    """As run; the sentence with which it ends."""

    def train(*words, **values):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*words, **values)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return train


def scripted(monkeypatch, figures):
    """Evaluations give these AP, in the order of the iterations 2, 4, 6 ..."""

    def test(cls, cfg, model, evaluators=None):
        done = GHMTrainer.seen.iter + (GHMTrainer.seen.iter < GHMTrainer.seen.max_iter)
        return {"bbox": {"AP": figures[done // 2 - 1]}}

    build_hooks = GHMTrainer.build_hooks
    monkeypatch.setattr(GHMTrainer, "test", classmethod(test))

    def noted(trainer):
        monkeypatch.setattr(GHMTrainer, "seen", trainer, raising=False)
        return build_hooks(trainer)

    monkeypatch.setattr(GHMTrainer, "build_hooks", noted)


def best(folder):
    return torch.load(folder / "model_best.pth", weights_only=True)


def evaluations(folder):
    """The figures of all evaluations, by iteration; losses of the training are smoothed."""
    found = {}
    for row in metrics(folder):
        figures = {k: v for k, v in row.items() if k.startswith(("bbox/", "validation/"))}
        if figures:
            found.setdefault(row["iteration"], {}).update(figures)
    return found


def test_resumed_with_everything_is_undisturbed(run, tmp_path, monkeypatch, without_pictures):
    run("whole", **EVERYTHING)
    for name in ("model_0000001.pth", "model_0000003.pth"):
        parts = stop_at(tmp_path / "whole", tmp_path / name, name)
        shutil.copy(tmp_path / "whole" / "model_best.pth", parts)  # of a later iteration
        run(name, "--resume", **EVERYTHING)
        same(final(tmp_path / "whole"), final(parts))
        same(best(tmp_path / "whole"), best(parts))
    whole = evaluations(tmp_path / "whole")
    losses = {i: row["validation/total_loss"] for i, row in whole.items()}
    assert list(losses) == [1, 3, 6] and len(set(losses.values())) == 3
    assert best(tmp_path / "whole")["iteration"] == min(losses, key=losses.get)
    for i, row in evaluations(parts).items():  # from the repeated one on
        assert row["validation/total_loss"] == losses[i]


def test_the_best_model_is_kept_and_resumed_from_never(run, tmp_path, monkeypatch):
    scripted(monkeypatch, [10.0, 40.0, 30.0])
    run("out", save_best=True)
    kept = best(tmp_path / "out")
    assert kept["iteration"] == 3 and set(kept) == {"model", "ghm_d2", "iteration"}
    same(kept["model"], torch.load(tmp_path / "out" / "model_0000003.pth")["model"])
    assert kept["ghm_d2"]["classes"] == ["disc", "bar", "cup"]
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_final.pth"
    run("out", "--overwrite")
    assert not (tmp_path / "out" / "model_best.pth").exists()  # this training has kept none


def test_a_training_that_gets_no_better_stops(run, fails, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [10.0, 40.0, 40.0, float("nan"), 50.0, 60.0])
    run("long", max_iter=12, save_best=True)
    capsys.readouterr()
    run("short", max_iter=12, patience=2, save_best=True)
    text = capsys.readouterr().out
    assert "Trained to iteration 8" in text
    reason = "bbox/AP has not improved on 40, reached after 4 iterations, in 2 evaluations"
    assert f"It stopped early: {reason}." in text
    assert final(tmp_path / "short")["iteration"] == 7
    assert best(tmp_path / "short")["iteration"] == 3
    assert not (tmp_path / "short" / "model_0000009.pth").exists()
    error = fails("short", "--resume", max_iter=12, patience=2, save_best=True)
    assert f"stopped early, {reason}: give a larger" in error

    run("short", "--resume", max_iter=12, patience=3, save_best=True)
    for each in (final, best):
        # Only the patience's own figures differ from a training without it.
        a, b = each(tmp_path / "long"), each(tmp_path / "short")
        b.get("trainer", {"hooks": {}})["hooks"].pop("EarlyStopping", None)
        same(a, b)


def test_the_step_that_was_stopped_after_is_looked_at_again(run, tmp_path, monkeypatch):
    """Killed between a checkpoint and the end of the evaluation behind it."""
    scripted(monkeypatch, [40.0, 30.0, 20.0])
    run("whole", max_iter=8, patience=1)
    assert final(tmp_path / "whole")["iteration"] == 3
    stop_at(tmp_path / "whole", tmp_path / "parts", "model_0000003.pth")
    run("parts", "--resume", max_iter=8, patience=1)
    same(final(tmp_path / "whole"), final(tmp_path / "parts"))


def test_an_average_of_the_weights_is_evaluated_and_saved(run, tmp_path, monkeypatch):
    steps, tested = [], []
    test = GHMTrainer.test.__func__
    update = AveragedWeights.after_step

    def note(hook):
        update(hook)
        steps.append({k: p.detach().double().clone() for k, p in hook._trained.named_parameters()})

    def noted(cls, cfg, model, evaluators=None):
        tested.append({k: p.detach().clone() for k, p in model.named_parameters()})
        return test(cls, cfg, model, evaluators)

    monkeypatch.setattr(AveragedWeights, "after_step", note)
    monkeypatch.setattr(GHMTrainer, "test", classmethod(noted))
    run("out", ema=0.3)
    saved = final(tmp_path / "out")
    average = steps[0]
    for n, weights in enumerate(steps[1:], start=1):
        decay = min(0.3, (1 + n) / (10 + n))
        average = {k: decay * a + (1 - decay) * weights[k] for k, a in average.items()}
    assert any((steps[-1][k] - a).abs().max() > 1e-6 for k, a in average.items())
    for k, a in average.items():
        torch.testing.assert_close(saved["model"][k].double(), a, rtol=1e-5, atol=1e-7)
        assert torch.equal(tested[-1][k], saved["model"][k])
    hook = saved["trainer"]["hooks"]["AveragedWeights"]
    same(hook["weights"], {k: x.float() for k, x in steps[-1].items()})
    assert hook["updates"] == 6


def test_averaged_weights_are_resumed_as_such(run, fails, tmp_path, without_pictures):
    run("out", ema=0.9, max_iter=2)
    assert (
        "EMA_DECAY the value that it had" in (error := fails("out", "--resume", max_iter=4))
        or "train.ema_decay the value that it had" in error
    )


class Line(nn.Module):
    """Predicts w * x; its boxes are four numbers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, 1.0, 2.0, 3.0]))
        self.loss = GHMRLoss(mu=0.02, bins=10, momentum=0.5)

    def forward(self, batch):
        x = torch.stack([each["x"] for each in batch])
        return {"loss_box": self.loss(self.w * x, torch.ones_like(x)), "loss_w": self.w.sum()}


def test_accumulated_gradients_are_the_mean_of_the_parts():
    batch = [{"x": torch.linspace(0.1 * i, 2.0, 4)} for i in range(6)]
    model, own = Line(), Line()
    trainer = CheckedTrainer(model, [batch], torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.check = Watched()
    trainer.accumulation_steps, trainer.iter = 3, 0
    with EventStorage() as storage:
        trainer.run_step()
    sums, values = torch.zeros(4), []
    for start in (0, 2, 4):
        losses = own(batch[start : start + 2])  # one after the other: the counts go on
        (grad,) = torch.autograd.grad(sum(losses.values()), own.w)
        sums, values = sums + grad / 3, [*values, losses["loss_box"].item()]
    torch.testing.assert_close(model.w.grad, sums)
    assert torch.equal(model.loss.acc_sum, own.loss.acc_sum) and own.loss.acc_sum.any()
    assert storage.latest()["loss_box"][0] == pytest.approx(sum(values) / 3, rel=1e-6)
    assert trainer.check.calls == [2, "f", False, 2, "f", False, 2, "f", True]


class Watched:
    """Notes what the finite check is shown."""

    def __init__(self):
        self.calls = []

    def guard(self, iteration):
        return contextlib.nullcontext()

    def before_forward(self, part):
        self.calls.append(len(part))

    def after_forward(self, losses):
        self.calls.append("f")

    def after_backward(self, averaged):
        self.calls.append(averaged)


def test_the_validation_loss_is_the_mean_over_images_and_changes_nothing(
    run, tmp_path, monkeypatch, without_pictures
):
    models, seen = [], {}
    test = GHMTrainer.test.__func__

    def noted(cls, cfg, model, evaluators=None):
        model.loss_normalizer = 7.0
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = (copy.deepcopy(model.state_dict()), torch.get_rng_state())
        results = test(cls, cfg, model, evaluators)
        same(before, (model.state_dict(), torch.get_rng_state()))
        assert model.loss_normalizer == 7.0 and model.training
        assert all((p.grad == 1).all() for p in model.parameters())
        loader = cls.build_test_loader(cfg, "second")
        models.append((copy.deepcopy(model), [image for batch in loader for image in batch]))
        seen.update(results["validation"])
        return results

    monkeypatch.setattr(GHMTrainer, "test", classmethod(noted))
    run("out", max_iter=2, validation_loss=True)
    model, images = models[-1]
    losses = []
    for image in images:
        alone = copy.deepcopy(model).train()  # whatever the last image did is forgotten
        for module in alone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        with torch.no_grad(), EventStorage():
            losses.append({k: float(v) for k, v in alone([image]).items()})
    assert len(losses) == 6
    for name in losses[0]:
        mean = sum(each[name] for each in losses) / 6
        assert seen[name] == pytest.approx(mean, rel=1e-5)
    assert seen["total_loss"] == pytest.approx(seen["loss_cls"] + seen["loss_box_reg"], rel=1e-5)
    assert 0 < seen["ghm_c/plain_loss"] < seen["ghm_c/plain_loss_positives"]
    row = metrics(tmp_path / "out")[-1]
    assert row["validation/total_loss"] == seen["total_loss"]
    written = json.loads((tmp_path / "out" / "inference" / "results.json").read_text())
    assert written["validation/ghm_r/plain_loss"] == seen["ghm_r/plain_loss"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"save_best": True, "eval_period": 0}, "needs evaluations during the training"),
        ({"patience": 2, "sets": 1}, "needs test data to compare models by"),
        ({"save_best": True, "metric": "bbox/AP51"}, "not a metric of these evaluations (similar:"),
        ({"save_best": True, "metric": "segm/AP"}, "is not a metric of these evaluations"),
        ({"patience": 1, "metric": "validation/total_loss"}, "needs "),
        ({"patience": -1}, "must be at least 0, got -1"),
        ({"parts": 0}, "must be at least 1, got 0"),
        ({"parts": 3}, "3 does not divide the 2 images"),
        ({"ema": 1.0}, "must be at least 0 and less than 1, got 1.0"),
        ({"ema": -0.5}, "must be at least 0 and less than 1, got -0.5"),
    ],
)
def test_mistakes_are_named_before_training(fails, kind, tmp_path, values, words):
    error = fails("out", **values)
    key = next(k for k in ("metric", "save_best", "patience", "parts", "ema") if k in values)
    assert words in error and kind.key(key) in error
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_gradient_statistics_are_those_of_one_part(run, tmp_path, without_pictures):
    run("out", max_iter=1, images=4, parts=2, eval_period=0)
    lines = (tmp_path / "out" / "gradient_statistics.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["calls"]) for line in lines] == [5, 5]  # the levels


def test_a_loss_in_a_later_part_that_is_not_finite_stops(kind, run, tmp_path, monkeypatch, capsys):
    """The batch that is saved is that part alone."""
    forward = GHMRLoss.forward_levels

    calls = []

    def spoilt(loss, *arguments):
        value = forward(loss, *arguments)
        calls.append(loss)
        return value * float("nan") if len(calls) == 4 else value

    monkeypatch.setattr(GHMRLoss, "forward_levels", spoilt)
    with pytest.raises(SystemExit) as stop:
        run("out", images=4, parts=2, eval_period=0)
    assert stop.value.code == 3
    assert "iteration 1: loss_box_reg is nan" in capsys.readouterr().err
    (file,) = (tmp_path / "out" / "not_finite").iterdir()
    assert len(torch.load(file, weights_only=True)["batch"]) == 2


def test_a_test_set_of_unreadable_images_is_refused(fails, data, tmp_path, monkeypatch):
    sets = ["--dataset", data[0], "--dataset", f"broken={write_coco(tmp_path, 'broken')}"]
    at_iteration(
        monkeypatch,
        0,
        lambda trainer: [f.write_bytes(b"") for f in (tmp_path / "images").iterdir()],
    )
    error = fails("out", *sets, sets=0, max_iter=1)
    assert "none of the 6 images of broken could be read, the first" in error


@pytest.mark.parametrize(
    ("test", "metric", "mode"),
    [
        (("a",), "bbox/AP-glossy", "max"),
        (("a",), "validation/total_loss", "min"),
        (("validation", "b"), "validation/bbox/AP", "max"),
        (("validation", "b"), "validation/validation/loss_cls", "min"),
        (("a", "b"), "b/validation/ghm_c/plain_loss", "min"),
    ],
)
def test_the_lowest_loss_and_the_highest_figure_are_the_best(test, metric, mode):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.DATASETS.TEST, cfg.MODEL.GHM.TRAINING.VAL_METRIC = test, metric
    assert mode_of(read_settings(cfg)) == mode
