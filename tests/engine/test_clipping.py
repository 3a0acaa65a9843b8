"""full_model clipping against a norm computed by hand, with and without a gradient scaler."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer

from ghm_d2 import add_ghm_config
from ghm_d2.engine import build_optimizer
from tests.tiny import ROOT

CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
GRADIENTS = {"weight": [[3.0, 0.0], [0.0, 4.0]], "bias": [12.0, 0.0]}  # 2-norm 13 = |(5, 12)|


@pytest.fixture
def model():
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return layer


def config(kind, value, norm_type=2.0, enabled=True):
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = 1.0
    cfg.SOLVER.MOMENTUM = 0.0
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE = enabled, kind, value, norm_type
    return cfg


def step(cfg, model):
    """The step that is taken, with learning rate 1 from zero: minus the clipped gradient."""
    optimizer = build_optimizer(cfg, model)
    for name, gradient in GRADIENTS.items():
        getattr(model, name).grad = torch.tensor(gradient)
    optimizer.step()
    return torch.cat([-p.detach().flatten() for p in (model.weight, model.bias)])


WHOLE = torch.tensor([3.0, 0, 0, 4, 12, 0])


@pytest.mark.parametrize(
    ("norm_type", "norm"), [(2.0, 13.0), (1.0, 19.0), (math.inf, 12.0)], ids=str
)
def test_one_norm_over_all_parameters(model, norm_type, norm):
    clipped = step(config("full_model", 6.5, norm_type), model)
    torch.testing.assert_close(clipped, WHOLE * 6.5 / norm, rtol=1e-5, atol=0)


def test_small_gradients_are_left_alone(model):
    assert torch.equal(step(config("full_model", 13.5), model), WHOLE)


def test_disabled(model):
    assert torch.equal(step(config("full_model", 1.0, enabled=False), model), WHOLE)


def test_other_types_stay_detectron2s(model):
    """Its "norm" clips each parameter alone: 5 and 12 both become 2."""
    clipped = step(config("norm", 2.0), model)
    expected = torch.tensor([3 * 0.4, 0, 0, 4 * 0.4, 2, 0])
    torch.testing.assert_close(clipped, expected, rtol=1e-5, atol=0)


def test_config_is_not_changed(model):
    cfg = config("full_model", 6.5)
    before = copy.deepcopy(cfg)
    build_optimizer(cfg, model)
    assert cfg == before


def test_gradients_are_unscaled_before(model):
    """The limit holds for the true gradients, not for those times the loss scale."""
    optimizer = build_optimizer(config("full_model", 6.5), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = sum(
        (getattr(model, name) * torch.tensor(gradient)).sum()
        for name, gradient in GRADIENTS.items()
    )
    scaler.scale(loss).backward()
    assert model.bias.grad[0] == 12 * 1024
    scaler.step(optimizer)
    taken = torch.cat([-p.detach().flatten() for p in (model.weight, model.bias)])
    torch.testing.assert_close(taken, WHOLE / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_trainer_of_one_s_own_takes_every_config(model, path):
    class Trainer(DefaultTrainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            return build_optimizer(cfg, model)

    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(path)
    assert Trainer.build_optimizer(cfg, model).param_groups
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        with pytest.raises(ValueError, match="full_model"):
            DefaultTrainer.build_optimizer(cfg, model)


def test_it_is_imported_without_the_trainer():
    code = (
        "import sys; from ghm_d2.engine import build_optimizer; "
        "print([m for m in sys.modules if m in ('ghm_d2.engine.trainer', 'ghm_d2.engine.run', "
        "'detectron2.engine', 'ghm_d2.modeling')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
