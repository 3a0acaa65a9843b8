"""configs/lazy: the same detectors as in YAML, and every backbone of Detectron2 under GHM."""

import sys
import types
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from omegaconf import ListConfig, OmegaConf
from torch import nn

from ghm_d2 import add_ghm_config
from tests.detectors import TWO_IMAGES, batch, step

CONFIGS = sorted(Path("configs/lazy").glob("*.py"))
SAME = ("ghm_retinanet_R_50", "ghm_faster_rcnn_R_50", "ghm_faster_rcnn_R_50_ghm_c")
PLAIN = (bool, int, float, str, list, tuple, dict, type(None), ListConfig)


def load(name):
    return LazyConfig.load(f"configs/lazy/{name}.py")


def load_yaml(name):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(f"configs/{name}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def plain(value):
    """Without the kinds of sequences, which YAML and Python choose differently."""
    if isinstance(value, list | tuple | ListConfig):
        return [plain(x) for x in value if not isinstance(x, nn.Module)]
    if isinstance(value, dict):  # of loss weights, where 1 is the default
        return {k: plain(v) for k, v in value.items() if v != 1}
    return value


def settings(model):
    """Every attribute of every module that is a plain value."""
    return {
        f"{path}.{name}": plain(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, PLAIN) and not name.startswith("_")
    }


@pytest.mark.parametrize("name", SAME)
def test_yaml_and_lazy_give_equal_models(name):
    torch.manual_seed(3)
    yaml = build_model(load_yaml(name)).train()
    torch.manual_seed(3)
    lazy = instantiate(load(name).model).train()
    assert str(yaml) == str(lazy)
    assert settings(yaml) == settings(lazy)
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        a, b = dict(tensors(yaml)), dict(tensors(lazy))
        assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
        assert all(a[k].requires_grad == b[k].requires_grad for k in a)
    inputs = batch(*TWO_IMAGES, size=64)
    results = []
    for model in (yaml, lazy):
        torch.manual_seed(5)  # proposals are sampled at random
        with EventStorage() as storage:  # with a graph: the counts follow training steps alone
            losses = {name: loss.item() for name, loss in model(inputs).items()}
            results.append((losses, storage.latest()))
    assert results[0] == results[1] and all(v > 0 for v in results[0][0].values())
    a, b = dict(yaml.named_buffers()), dict(lazy.named_buffers())
    assert any("acc_sum" in k and v.any() for k, v in a.items())
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", SAME)
def test_yaml_and_lazy_give_the_same_recipe(name):
    yaml, lazy = load_yaml(name), load(name)
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    lazy.optimizer.params.model = model
    clip, yaml.SOLVER.CLIP_GRADIENTS.ENABLED = yaml.SOLVER.CLIP_GRADIENTS, False
    a, b = build_optimizer(yaml, model), instantiate(lazy.optimizer)
    assert type(a) is type(b)
    groups = [optimizer.state_dict()["param_groups"] for optimizer in (a, b)]
    for group in groups[0] + groups[1]:
        group.pop("foreach")  # how it is computed, not what
    assert groups[0] == groups[1]
    assert (clip.CLIP_TYPE, lazy.train.clip_gradients) == (
        "full_model",
        {"max_norm": clip.CLIP_VALUE, "norm_type": clip.NORM_TYPE},
    )
    schedule, multiplier = build_lr_scheduler(yaml, a), instantiate(lazy.lr_multiplier)
    at = [0, 1, 250, 499, 500, 59999, 60000, 79999, 80000, 89999]
    expected = [schedule._multiplier(i / yaml.SOLVER.MAX_ITER) for i in at]
    assert [multiplier(i / lazy.train.max_iter) for i in at] == pytest.approx(expected)
    assert lazy.train.max_iter == yaml.SOLVER.MAX_ITER
    assert lazy.train.init_checkpoint == yaml.MODEL.WEIGHTS
    assert lazy.train.statistics_period == yaml.MODEL.GHM.STATISTICS_PERIOD
    loader = lazy.dataloader
    assert loader.train.total_batch_size == yaml.SOLVER.IMS_PER_BATCH
    assert (loader.train.dataset.names,) == yaml.DATASETS.TRAIN
    assert (loader.test.dataset.names,) == yaml.DATASETS.TEST
    mapper = loader.train.mapper
    assert mapper.image_format == yaml.INPUT.FORMAT and not mapper.use_instance_mask
    resize = mapper.augmentations[0]
    assert tuple(resize.short_edge_length) == yaml.INPUT.MIN_SIZE_TRAIN
    assert resize.max_size == yaml.INPUT.MAX_SIZE_TRAIN
    assert loader.test.mapper.augmentations[0].short_edge_length == yaml.INPUT.MIN_SIZE_TEST


class DropPath(nn.Identity):
    def __init__(self, rate):
        super().__init__()


class Mlp(nn.Sequential):
    def __init__(self, in_features, hidden_features, out_features=None, act_layer=nn.GELU):
        super().__init__(
            nn.Linear(in_features, hidden_features),
            act_layer(),
            nn.Linear(hidden_features, out_features or in_features),
        )


@pytest.fixture
def timm(monkeypatch):
    """Detectron2 takes two small layers from timm; where it is absent, stand-ins."""
    try:
        import timm.models.layers  # noqa: F401
    except ImportError:
        layers = types.ModuleType("timm.models.layers")
        layers.DropPath, layers.Mlp = DropPath, Mlp
        for name in ("timm", "timm.models"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "timm.models.layers", layers)


# What makes each backbone small.
TINY = {
    "ghm_fcos_R_50": {},
    "ghm_retinanet_RegNetX_4GF": {
        "bottom_up.stem_width": 8,
        "bottom_up.depth": 8,  # the widths double from 8 to 64: four stages
        "bottom_up.w_a": 8.0,
        "bottom_up.w_0": 8,
        "bottom_up.w_m": 2.0,
        "bottom_up.group_width": 8,
    },
    "ghm_retinanet_Swin_B": {
        "bottom_up.embed_dim": 8,
        "bottom_up.depths": [1, 1, 1, 1],
        "bottom_up.num_heads": [1, 2, 2, 2],
    },
    "ghm_retinanet_MViTv2_T": {
        "bottom_up.embed_dim": 8,
        "bottom_up.depth": 4,
        "bottom_up.last_block_indexes": [0, 1, 2, 3],
    },
    "ghm_retinanet_ViTDet_B": {
        "net.embed_dim": 16,
        "net.depth": 2,
        "net.num_heads": 2,
        "net.window_size": 2,
        "net.window_block_indexes": [0],
        "square_pad": 128,
    },
}


def tiny(name):
    """The config's model with a small backbone, head and batch."""
    cfg = load(name)
    cfg.dataloader.train.total_batch_size = 2
    for key, value in TINY[name].items():
        OmegaConf.update(cfg.model.backbone, key, value)
    cfg.model.backbone.out_channels = cfg.model.backbone.top_block.in_channels = 16
    cfg.model.head.update(
        input_shape=[ShapeSpec(channels=16)] * 5, conv_dims=[16], norm="", num_classes=80
    )
    return cfg


def test_every_config_is_trained_here():
    assert {*TINY, *SAME} == {path.stem for path in CONFIGS}


@pytest.mark.parametrize("name", TINY)
def test_tiny_versions_train(name, timm):
    cfg = tiny(name)
    model = instantiate(cfg.model).train()
    inputs = batch(*TWO_IMAGES)
    before = [p.detach().clone() for p in model.parameters()]
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    losses, _ = step(model, inputs)
    optimizer.step()
    assert all(0 < v < 1e4 for v in losses.values())
    trained = (
        [p for p in model.backbone.bottom_up.parameters() if p.requires_grad]
        if hasattr(model.backbone, "bottom_up")
        else list(model.backbone.net.parameters())
    )
    assert trained and all(p.grad is not None for p in trained)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(model.ghm_c) == 1 and model.ghm_c[0].acc_sum.sum() > 0
    with torch.no_grad():
        assert len(model.eval()(inputs)) == 2
