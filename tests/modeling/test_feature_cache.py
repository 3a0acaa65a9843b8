"""Feature maps of a frozen network, kept: the same values, computed once."""

import copy
import logging
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from torch import nn

from ghm_d2 import add_ghm_config
from ghm_d2.errors import UserError
from ghm_d2.modeling import TorchvisionBackbone, feature_cache
from ghm_d2.modeling.feature_cache import FeatureCache
from tests.detectors import TWO_IMAGES, batch, gradients, step

CACHE, FREEZE = "MODEL.GHM.TORCHVISION.CACHE_MB", "MODEL.GHM.TORCHVISION.FREEZE_AT"


def backbone(name="resnet18", cache_mb=0, **options):
    """Frozen, with weights and statistics that keep the maps near 1."""
    torch.manual_seed(3)
    built = TorchvisionBackbone(name, freeze_at="res5", cache_mb=cache_mb, **options)
    for key, value in built.state_dict().items():
        if key.endswith("running_var"):
            value.fill_(0.2)
        if key.endswith("layer_scale"):  # what ConvNeXt drops, all but 0 at its start
            value.fill_(0.5)
    return built.train()


class Counted(nn.Module):
    """A network of one convolution that counts the images that it computes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3, padding=1).requires_grad_(False)
        self.images = 0

    def forward(self, x):
        self.images += len(x)
        return {"a": self.layer(x), "b": x[:, :, ::2, ::2]}


def images(*seeds, shape=(1, 4, 6)):
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


# ConvNeXt drops blocks at random in training, and gives channels last maps; AlexNet does not pad.
@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "alexnet"])
@pytest.mark.parametrize("training", [True, False])
def test_the_maps_of_the_network_in_eval_mode(name, training):
    plain, kept = backbone(name).eval(), backbone(name, 100).train().train(training)
    x = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = plain(x)
    first, again, mixed = kept(x[:2]), kept(x[:2]), kept(x[[2, 0]])
    for name, maps in expected.items():
        assert maps.abs().max() > 0.01
        # A convolution may sum a batch in another order than one image.
        near = {"rtol": 0, "atol": 1e-5 * float(maps.abs().max())}
        torch.testing.assert_close(first[name], maps[:2], **near)
        assert torch.equal(first[name], again[name])
        torch.testing.assert_close(mixed[name], maps[[2, 0]], **near)
        assert torch.equal(mixed[name][1], first[name][0])


def test_a_model_that_never_trains_keeps_nothing():
    plain, kept = backbone().eval(), TorchvisionBackbone("resnet18", freeze_at="res5", cache_mb=9)
    kept.load_state_dict(plain.state_dict())
    x, images = torch.randn(1, 3, 64, 96), []
    kept.body.register_forward_hook(lambda *_: images.append(1))
    for mode in (None, False, True, False):
        if mode is not None:
            kept.train(mode)
        same(kept(x), plain(x))
    assert len(images) == 3  # twice for nothing, then once for the training and its evaluations


def test_each_image_is_computed_once():
    network, cache = Counted(), FeatureCache(1)
    for seeds, computed in (((1, 2), 2), ((2, 1), 2), ((2, 3, 3), 3), ((1,), 3)):
        x = images(*seeds)
        same(cache(network, x), {"a": network.layer(x), "b": x[:, :, ::2, ::2]})
        assert network.images == computed
    cache(network, images(1).flip(-1))
    assert network.images == 4


def test_equal_bytes_of_another_shape_are_another_image():
    network, cache = Counted(), FeatureCache(1)
    for x in (torch.ones(1, 1, 4, 6), torch.ones(1, 1, 6, 4), torch.ones(1, 1, 4, 6)):
        same(cache(network, x), {"a": network.layer(x), "b": x[:, :, ::2, ::2]})
    assert network.images == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda network: network.layer.weight.mul_(2),
        lambda network: network.load_state_dict(Counted().state_dict()),
        lambda network: setattr(network, "layer", nn.Conv2d(1, 2, 3, padding=1)),
        lambda network: setattr(network.layer.bias, "data", torch.ones(2)),
        lambda network: network.double().float(),
    ],
)
def test_other_weights_other_maps(change):
    network, cache, x = Counted(), FeatureCache(1), images(1, 2)
    cache(network, x)
    with torch.no_grad():
        change(network)
    network.requires_grad_(False)
    same(cache(network, x), {"a": network.layer(x), "b": x[:, :, ::2, ::2]})
    assert network.images == 4


def test_mixed_precision_has_maps_of_its_own():
    network, cache, x = Counted(), FeatureCache(1), images(1)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert cache(network, x)["a"].dtype == torch.bfloat16
        assert cache(network, x)["a"].dtype == torch.float32
    assert network.images == 2


def test_a_full_cache_keeps_what_it_has():
    network, x = Counted(), images(1, 2, 3, 4, shape=(1, 500, 500))  # 2.25 MB each
    cache = FeatureCache(5)
    for computed in (4, 6, 8):
        same(cache(network, x), {"a": network.layer(x), "b": x[:, :, ::2, ::2]})
        assert network.images == computed


def test_maps_of_inference_serve_a_training():
    network, cache, x = Counted(), FeatureCache(1), images(1)
    with torch.inference_mode():
        cache(network, x)
    head = nn.Conv2d(2, 1, 1)
    head(cache(network, x)["a"]).sum().backward()
    assert network.images == 1 and head.weight.grad.abs().sum() > 0


def test_what_comes_out_may_be_changed():
    network, cache, x = Counted(), FeatureCache(1), images(1)
    cache(network, x)["b"].zero_()
    same(cache(network, x), {"a": network.layer(x), "b": x[:, :, ::2, ::2]})


def test_gradients_pass_it_by():
    network, cache, x = Counted(), FeatureCache(1), images(1)
    cache(network, x)
    cache(network, x.requires_grad_())["a"].sum().backward()
    assert x.grad.abs().sum() > 0
    network.requires_grad_(True)
    cache(network, x.detach())["a"].sum().backward()
    assert network.layer.weight.grad.abs().sum() > 0


def test_traces_and_compiled_networks_compute():
    plain, kept = backbone(), backbone(cache_mb=10)
    x = torch.randn(1, 3, 64, 96)
    kept(x)
    traced = torch.jit.trace(kept.eval(), x, strict=False)
    program = torch.export.export(kept, (x,)).module()
    for y in (x, 2 * x):
        expected = plain(y)
        for run in (traced, program):
            torch.testing.assert_close(run(y), expected, rtol=1e-4, atol=1e-5)


def test_copies_and_checkpoints_hold_nothing():
    kept = backbone(cache_mb=10)
    size = len(pickle.dumps(kept))
    x = torch.randn(1, 3, 64, 96)
    maps = kept(x)
    assert kept.state_dict().keys() == backbone().state_dict().keys()
    assert len(pickle.dumps(kept)) == size
    for copied in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        same(copied(x), maps)
        same(copied(x), maps)


def test_warns_once_where_no_image_comes_back(monkeypatch, caplog):
    monkeypatch.setattr(feature_cache, "_AFTER", 20)
    network = Counted()
    with caplog.at_level(logging.WARNING):
        for cache in (FeatureCache(1), FeatureCache(1)):
            for seed in range(50):
                cache(network, images(seed))
        assert [r.getMessage()[:59] for r in caplog.records] == [
            "CACHE_MB of the backbone: the feature maps of 0 of 20 image"
        ] * 2
        caplog.clear()
        for seed in range(50):
            cache(network, images(seed % 8))
        assert not caplog.records


def config(*opts):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file("configs/ghm_retinanet_MobileNetV2.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    cfg.merge_from_list(["MODEL.RETINANET.NUM_CLASSES", 3, "SOLVER.IMS_PER_BATCH", 2, *opts])
    return cfg


def test_a_detector_learns_the_same():
    losses, grads = {}, {}
    for size in (0, 100):
        torch.manual_seed(0)
        model = build_model(config(FREEZE, "res5", CACHE, size)).train()
        for _ in range(2):  # the second from the cache
            losses[size], _ = step(model, batch(*TWO_IMAGES))
        grads[size] = gradients(model)
    torch.testing.assert_close(losses[100], losses[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads[100], grads[0], rtol=1e-3, atol=1e-5)
    assert grads[0] and not any("bottom_up" in name for name in grads[0])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            (CACHE, 100),
            f"{CACHE} must be 0 where part .* features.4.conv.0.0.weight trained: FR",
        ),
        ((CACHE, -1), f"{CACHE} must be at least 0, got -1"),
        (
            (CACHE, 100, FREEZE, "res5", "MODEL.GHM.TORCHVISION.NORM", "BN"),
            f"{CACHE} must be 0 where batch norm follows the batches, got 100: NORM must be Fro",
        ),
    ],
)
def test_misuse_names_the_key(opts, message):
    with pytest.raises(UserError, match=message):
        build_backbone(config(*opts))
