"""ImageNet weights in torchvision's layout: the same activations in Detectron2's backbone."""

import logging
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from ghm_d2 import add_ghm_config
from ghm_d2.checkpoint import RestrictedCheckpointer, load_file
from ghm_d2.checkpoint.resnet import read_resnet
from ghm_d2.checkpoint.torchvision import _convert, convert_torchvision
from ghm_d2.cli import convert_torchvision as tool
from ghm_d2.errors import UserError
from tests.foreign import torchvision_resnet

ROOT = Path(__file__).resolve().parents[2]


def randomised(name, **kwargs):
    """A torchvision model whose batch norms do something, in eval mode."""
    model = getattr(torchvision.models, name)(weights=None, **kwargs).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.3, 0.8)
            nn.init.normal_(norm.bias, std=0.1)
    return model


def detector(needed):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "ghm_retinanet_R_50.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.FPN.OUT_CHANNELS = "cpu", 8
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    for key, value in needed.items():
        cfg.merge_from_list([key, value])
    model = build_model(cfg).eval()
    RestrictedCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_activations(tmp_path, name, suffix):
    if name != "resnet50" and suffix == ".pth":
        return
    source = randomised(name)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    needed = convert_torchvision(str(tmp_path / "weights.pth"), str(tmp_path / f"out{suffix}"))
    model = detector(needed)
    # The whole way from a picture: torchvision's normalisation of RGB in 0 .. 1 there.
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    x = torchvision.transforms.functional.normalize(image / 255, mean, std)[None]
    assert needed["INPUT.FORMAT"] == "RGB"
    with torch.no_grad():
        found = model.backbone.bottom_up(model.preprocess_image([{"image": image}]).tensor)
        x = source.maxpool(source.relu(source.bn1(source.conv1(x))))
        for i in range(1, 5):
            x = getattr(source, f"layer{i}")(x)
            scale = x.abs().max().item()
            assert scale > 0.1
            torch.testing.assert_close(found[f"res{i + 1}"], x, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("name", "depth", "groups", "width"),
    [
        ("resnet34", 34, 1, 64),
        ("resnet101", 101, 1, 64),
        ("resnet152", 152, 1, 64),
        ("wide_resnet50_2", 50, 1, 128),
        ("resnext101_32x8d", 101, 32, 8),
        ("resnext101_64x4d", 101, 64, 4),
    ],
)
def test_architectures(name, depth, groups, width):
    with torch.device("meta"):
        state = getattr(torchvision.models, name)(weights=None).state_dict()
    architecture = read_resnet(state)
    settings = architecture.settings()
    assert settings["MODEL.RESNETS.DEPTH"] == depth
    assert (settings["MODEL.RESNETS.NUM_GROUPS"], settings["MODEL.RESNETS.WIDTH_PER_GROUP"]) == (
        groups,
        width,
    )
    assert settings["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    kept = [x for x in state if not x.startswith("fc.") and not x.endswith("tracked")]
    assert len(_convert(state, architecture)) == len(kept)


@pytest.fixture
def convert(tmp_path):
    def run(content):
        torch.save(content, tmp_path / "weights.pth")
        return convert_torchvision(str(tmp_path / "weights.pth"), str(tmp_path / "out.pkl"))

    return run


def test_wrapped_files(convert, tmp_path, caplog):
    state = torchvision_resnet(groups=4, width=3, planes=8)
    wanted = convert(state)
    assert wanted["MODEL.RESNETS.NUM_GROUPS"] == 4 and wanted["MODEL.RESNETS.WIDTH_PER_GROUP"] == 3
    bare = load_file(tmp_path / "out.pkl")["model"]
    assert (bare["res4.2.conv3.norm.bias"] == state["layer3.2.bn3.bias"].numpy()).all()
    parallel = {f"module.{name}": x for name, x in state.items()}
    for content in ({"state_dict": state}, {"model": parallel, "optimizer": {}, "epoch": 3}):
        assert convert(content) == wanted
        model = load_file(tmp_path / "out.pkl")["model"]
        assert all((model[name] == x).all() for name, x in bare.items())
    assert "2 entries besides the weights left out: epoch, optimizer" in caplog.text
    with caplog.at_level(logging.WARNING):
        convert({**state, "fc.weight": torch.ones(5, 2), "fc.bias": torch.ones(5)})
    assert "2 tensors of the classifier left out" in caplog.text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layer2.1.conv2.weight": None}, "the tensor layer2.1.conv2.weight is missing."),
        ({"layer4.0.bn1.bias": torch.ones(1)}, r"layer4.0.bn1.bias has the shape \(1,\) instead"),
        ({"conv1.weight": torch.ones(4, 3, 3, 3)}, "stem's convolution is 3 x 3"),
        ({"layer1.0.se.weight": torch.ones(1)}, "layer1.0.se.weight does not belong"),
        ({"layer3.6.conv1.weight": torch.ones(1)}, "3-4-7-3 bottleneck blocks"),
        ({"bn1.weight": "x"}, "bn1.weight is a str among the weights"),
    ],
)
def test_what_is_refused(convert, tmp_path, change, sentence):
    state = {**torchvision_resnet(), **change}
    with pytest.raises(UserError, match=sentence) as error:
        convert({name: x for name, x in state.items() if x is not None})
    assert "weights.pth cannot be converted" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out.pkl").exists()


def test_other_networks_are_refused(convert):
    for name, sentence in (
        ("densenet121", "its backbone is no ResNet"),
        ("mobilenet_v2", "its backbone is no ResNet"),
    ):
        with torch.device("meta"):
            state = getattr(torchvision.models, name)(weights=None).state_dict()
        with pytest.raises(UserError, match=sentence):
            convert({x: torch.ones(1) for x in state})


def test_command_line(tmp_path, capsys):
    source, output = str(tmp_path / "weights.pth"), str(tmp_path / "new" / "out.pkl")
    torch.save(torchvision_resnet(), source)
    tool.main([source, output])
    text = capsys.readouterr().out
    assert f'MODEL.WEIGHTS "{output}" INPUT.FORMAT "RGB"' in text
    assert 'MODEL.PIXEL_MEAN "[123.675, 116.28, 103.53]"' in text
    with pytest.raises(SystemExit) as stop:
        tool.main([str(tmp_path / "gone.pth"), output])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("ghm-d2 convert-torchvision: error: ") and "gone.pth" in error
