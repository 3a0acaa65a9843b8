"""mmdetection's RetinaNets: the golden outputs, the way there and back, and what is refused."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghm_d2 import add_ghm_config
from ghm_d2.checkpoint import RestrictedCheckpointer, load_file
from ghm_d2.checkpoint import mmdet as converter
from ghm_d2.checkpoint.mmdet import convert_from_mmdet, convert_to_mmdet
from ghm_d2.checkpoint.mmdet_network import read_retinanet
from ghm_d2.checkpoint.mmdet_settings import BACKBONES, read_settings
from ghm_d2.cli import convert_mmdet as tool
from ghm_d2.errors import UserError
from tests.foreign import mmdet_retinanet

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "mmdet"


def load_config(file):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(str(file), allow_unsafe=False)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.fixture
def write(tmp_path):
    """Save a state dict as mmdetection does; returns the file's name."""

    def run(state, **beside):
        path = tmp_path / "foreign.pth"
        torch.save({"meta": {}, "state_dict": state, **beside}, path)
        return str(path)

    return run


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "out" / "converted.pth")


def equal_states(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def mmdet_model(config_file):
    """The model of a config of mmdetection, which is a Python file."""
    found = {}
    exec(Path(config_file).read_text(), found)
    return found["model"]


# The golden file: outputs of mmdetection 3.3.0 itself.


@pytest.fixture(scope="module")
def golden(shared_dir):
    stem = shared_dir / "golden" / "mmdet_retinanet_r50_small"
    if not stem.with_suffix(".pth").is_file():
        pytest.skip(f"no {stem.name} among the reference material")
    with np.load(stem.with_suffix(".npz")) as file:
        return str(stem.with_suffix(".pth")), {k: torch.from_numpy(file[k]) for k in file}


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    """The golden model in Detectron2, its raw outputs, its detections, its file."""
    file = str(tmp_path_factory.mktemp("golden") / "golden.pth")
    cfg = load_config(convert_from_mmdet(golden[0], file))
    model = build_model(cfg).eval()
    RestrictedCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    raw = []
    model.head.register_forward_hook(lambda *x: raw.append(x[-1]))
    return model, raw, file


def detect(model, golden):
    with torch.no_grad():
        return model([{"image": golden[1]["image_rgb"]}])[0]["instances"]


def test_golden_raw_outputs(golden, converted):
    model, raw, _ = converted
    detect(model, golden)
    for kind, levels, size in zip(("cls", "reg"), raw[-1], (80, 4), strict=True):
        assert len(levels) == 5
        for level, found in enumerate(levels):
            # (ratio, size, K) there, (size, ratio, K) here.
            wanted = golden[1][f"{kind}{level}"].unflatten(1, (3, 3, size))
            wanted = wanted.transpose(1, 2).flatten(1, 3)
            scale = wanted.abs().max().item()
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * scale)


def test_golden_detections(golden, converted):
    found, wanted = detect(converted[0], golden), golden[1]
    assert len(found) == len(wanted["boxes"]) == 100
    torch.testing.assert_close(found.scores, wanted["scores"], rtol=0, atol=1e-4)
    # In order up to ties: each box is found among those whose scores differ by no more than that.
    for box, score, label in zip(wanted["boxes"], wanted["scores"], wanted["labels"], strict=True):
        tied = (found.scores - score).abs() <= 1e-4
        same = (found.pred_boxes.tensor - box).abs().amax(1) <= 1e-2
        assert (tied & same & (found.pred_classes == label)).any()


def test_golden_detections_need_clipping_before_nms(golden, converted):
    model = converted[0]
    model.clip_before_nms = False
    try:
        boxes = detect(model, golden).pred_boxes.tensor
    finally:
        model.clip_before_nms = True
    distance = (boxes[None] - golden[1]["boxes"][:, None]).abs().amax(-1)
    assert (distance.amin(1) <= 1e-2).sum() < 90


def test_golden_round_trip(golden, converted, output):
    model = mmdet_model(convert_to_mmdet(converted[2], output))
    assert (model["backbone"]["depth"], model["bbox_head"]["num_classes"]) == (50, 80)
    equal_states(load_file(output)["state_dict"], load_file(golden[0])["state_dict"])


# Networks of other shapes.

NETWORKS = {
    "r50": {},
    "r101": {"depth": 101, "convs": 1},
    "resnext": {"groups": 4, "width": 2, "planes": 8, "stem": 6, "fpn": 12},
    "no loss buffers": {"bins": None, "classes": 1, "convs": 4},
    "other bins": {"bins": (12, 5)},
}


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_is_bit_equal(write, tmp_path, name, suffix):
    state = mmdet_retinanet(**NETWORKS[name])
    there, back = str(tmp_path / f"there{suffix}"), str(tmp_path / "back.pth")
    config = convert_from_mmdet(write(state), there)
    convert_to_mmdet(there, back, load_config(config))
    equal_states(load_file(back)["state_dict"], state)


@pytest.mark.parametrize("name", NETWORKS)
def test_written_config_builds_a_model_that_takes_every_tensor(write, output, name):
    state = mmdet_retinanet(**NETWORKS[name])
    cfg = load_config(convert_from_mmdet(write(state), output))
    model = build_model(cfg)
    found = RestrictedCheckpointer(model)._load_model(load_file(output))
    assert not found.unexpected_keys and not found.incorrect_shapes
    # Without buffers of the losses the counts stay at 0: nothing is missing.
    assert not found.missing_keys
    layer = model.backbone.bottom_up.res3[0].conv2
    assert torch.equal(layer.norm.running_var, state["backbone.layer2.0.bn2.running_var"])
    assert torch.equal(layer.weight, state["backbone.layer2.0.conv2.weight"])
    if "bbox_head.loss_cls.acc_sum" in state:
        assert torch.equal(model.ghm_c[0].acc_sum, state["bbox_head.loss_cls.acc_sum"])


def test_from_a_trained_detectron2_model(write, output, tmp_path, caplog):
    """Norms with counters, running counts of several groups, a trainer beside the weights."""
    cfg = load_config(convert_from_mmdet(write(mmdet_retinanet()), output))
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.GHM.RETINANET.IMAGES_PER_HISTOGRAM = 2
    model = build_model(cfg)
    RestrictedCheckpointer(model).load(output)
    model.backbone.bottom_up.stem.conv1.norm.num_batches_tracked.fill_(77)
    trained, back = str(tmp_path / "trained.pth"), str(tmp_path / "back.pth")
    torch.save({"model": model.state_dict(), "trainer": {}, "iteration": 3}, trained)
    with caplog.at_level(logging.WARNING):
        written = mmdet_model(convert_to_mmdet(trained, back, cfg))
    assert "2 entries besides the weights left out: iteration, trainer" in caplog.text
    groups = len(model.ghm_c)
    assert groups > 1 and f"{2 * (groups - 1)} buffers of the losses left out" in caplog.text
    state = load_file(back)["state_dict"]
    assert state["backbone.bn1.num_batches_tracked"] == 77
    original = mmdet_retinanet()
    assert state.keys() == original.keys()
    assert torch.equal(state["bbox_head.loss_cls.edges"], original["bbox_head.loss_cls.edges"])
    assert written["neck"]["relu_before_extra_convs"] is False
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    other = str(tmp_path / "other.pth")
    written = mmdet_model(convert_to_mmdet(trained, other, cfg))
    assert written["neck"]["relu_before_extra_convs"] is True
    back_again = load_config(convert_from_mmdet(other, str(tmp_path / "again.pth")))
    assert back_again.MODEL.BACKBONE.NAME == cfg.MODEL.BACKBONE.NAME


@pytest.mark.parametrize(
    ("file", "network", "ap"),
    [
        ("ghm_retinanet_R_50", {}, 37.0),
        ("ghm_retinanet_R_101", {"depth": 101}, 39.1),
        ("ghm_retinanet_X_101_32x4d", {"depth": 101, "groups": 32, "width": 4}, 40.7),
        ("ghm_retinanet_X_101_64x4d", {"depth": 101, "groups": 64, "width": 4}, 41.4),
    ],
)
def test_configs_fit_the_published_networks(file, network, ap):
    with torch.device("meta"):
        state = mmdet_retinanet(
            stem=64, planes=64, fpn=256, convs=4, classes=80, bins=None, **network
        )
    architecture = read_retinanet(state, read_settings({}))
    converter._to_detectron2(state, architecture)
    cfg = load_config(CONFIGS / f"{file}.yaml")
    converter._check_config(cfg, architecture.config())
    assert cfg.TEST.EXPECTED_RESULTS == [["bbox", "AP", ap, 0.2]]
    name = Path(cfg.MODEL.WEIGHTS).stem
    published = f"https://download.openmmlab.com/mmdetection/v2.0/ghm/{name[:-18]}/{name}.pth"
    assert published in (CONFIGS / f"{file}.yaml").read_text()


# The config text inside a checkpoint.

TEXT_3 = """
data_preprocessor = 1 + 1
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(mean=[1, 2, 3], std=[4, 5, 6], bgr_to_rgb=False),
    backbone=dict(type='ResNet', depth=50, style='caffe'),
    neck=dict(type='FPN', add_extra_convs='on_input', num_outs=5),
    bbox_head=dict(
        type='RetinaHead',
        anchor_generator=dict(type='AnchorGenerator', octave_base_scale=3, scales_per_octave=2,
                              ratios=[1.0, 2.0], strides=[8, 16, 32, 64, 128]),
        bbox_coder={'type': 'DeltaXYWHBBoxCoder', 'target_means': [.0, .0, .0, .0],
                    'target_stds': [0.5, 0.5, 0.25, 0.25]},
        loss_cls=dict(type='FocalLoss', use_sigmoid=True)),
    test_cfg=dict(nms_pre=500, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.6),
                  max_per_img=50))
"""
TEXT_1 = """
model = dict(type='RetinaNet', backbone=dict(type='ResNet', style='pytorch'),
             neck=dict(type='FPN', add_extra_convs=True, num_outs=5),
             bbox_head=dict(type='RetinaHead', num_classes=81, octave_base_scale=4,
                            scales_per_octave=1, anchor_ratios=[1.0],
                            anchor_strides=[8, 16, 32, 64, 128], target_stds=[1.0, 1.0, 0.5, 0.5],
                            loss_cls=dict(type='GHMC', bins=30)))
test_cfg = dict(nms_pre=900, score_thr=0.02, nms=dict(type='nms', iou_thr=0.4), max_per_img=80)
img_norm_cfg = dict(mean=[9.0, 8.0, 7.0], std=[1.0, 1.0, 1.0], to_rgb=True)
"""


def test_settings_of_version_3(write, output):
    path = write(mmdet_retinanet(anchors=4, bins=None), meta={"cfg": TEXT_3})
    cfg = load_config(convert_from_mmdet(path, output))
    assert cfg.INPUT.FORMAT == "BGR" and cfg.MODEL.RESNETS.STRIDE_IN_1X1 is True
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS == [[1.0, 2.0]]
    assert np.allclose(cfg.MODEL.ANCHOR_GENERATOR.SIZES[1], [48.0, 48.0 * 2**0.5])
    node = cfg.MODEL.RETINANET
    assert tuple(node.BBOX_REG_WEIGHTS) == (2.0, 2.0, 4.0, 4.0)
    assert (node.TOPK_CANDIDATES_TEST, node.SCORE_THRESH_TEST, node.NMS_THRESH_TEST) == (
        500,
        0.1,
        0.6,
    )
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 50
    assert not cfg.MODEL.GHM.RETINANET.CLS.ENABLED and not cfg.MODEL.GHM.RETINANET.REG.ENABLED


def test_settings_of_version_1(write, output):
    path = write(mmdet_retinanet(anchors=1), meta={"config": TEXT_1})
    cfg = load_config(convert_from_mmdet(path, output))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[32.0], [64.0], [128.0], [256.0], [512.0]]
    assert tuple(cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS) == (1.0, 1.0, 2.0, 2.0)
    assert (cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST, cfg.TEST.DETECTIONS_PER_IMAGE) == (900, 80)
    assert (cfg.MODEL.RETINANET.SCORE_THRESH_TEST, cfg.MODEL.RETINANET.NMS_THRESH_TEST) == (
        0.02,
        0.4,
    )
    assert cfg.MODEL.PIXEL_MEAN == [9.0, 8.0, 7.0] and cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.GHM.RETINANET.CLS.ENABLED


def test_anchors_change_places(write, output):
    """Two ratios and three sizes: the channels of anchor (r, s) go to (s, r)."""
    text = TEXT_3.replace("scales_per_octave=2", "scales_per_octave=3")
    state = mmdet_retinanet(anchors=6, classes=5)
    convert_from_mmdet(write(state, meta={"cfg": text}), output)
    model = load_file(output)["model"]
    for r in range(2):
        for s in range(3):
            for old, new, k in (("retina_cls", "cls_score", 5), ("retina_reg", "bbox_pred", 4)):
                for part in ("weight", "bias"):
                    a, b = state[f"bbox_head.{old}.{part}"], model[f"head.{new}.{part}"]
                    assert torch.equal(a[(3 * r + s) * k :][:k], b[(2 * s + r) * k :][:k])


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("type='RetinaHead'", "type='GARetinaHead'", "bbox_head.type = 'GARetinaHead'"),
        ("'FocalLoss'", "'CrossEntropyLoss'", "bbox_head.loss_cls.type = 'CrossEntropyLoss'"),
        ("type='ResNet'", "type='ResNetV1d'", "backbone.type = 'ResNetV1d'"),
        ("'on_input'", "'on_output'", "neck.add_extra_convs = 'on_output'"),
        ("num_outs=5", "norm_cfg=dict(type='BN')", "neck.norm_cfg = {'type': 'BN'}"),
        ("128]),", "128], centers=[(0, 0)]),", "anchor_generator.centers = [[0, 0]]"),
        ("128]),", "256]),", "the strides [8, 16, 32, 64, 256]"),
        ("nms=dict(type='nms'", "nms=dict(type='soft_nms'", "test_cfg.nms.type = 'soft_nms'"),
        ("strides=[8,", "strides=['a',", "cannot be understood"),
        ("scales_per_octave=2", "scales_per_octave=1000000000", "1000000000 anchor sizes"),
        ("octave_base_scale=3", "octave_base_scale=" + "9" * 4000, "cannot be understood"),
        ("style='caffe'", f"style='\\x1b[2J{'x' * 10**6}'", "backbone.style = '\\x1b[2Jxxx"),
        ("style='caffe'", "style='caffe'," + "#" * 2**20, "its config text is too long"),
        ("octave_base_scale=3", "octave_base_scale='3'", "cannot be understood"),
        ("scales_per_octave=2", "scales_per_octave=0", "do not fit 0 anchors"),
        ("ratios=[1.0, 2.0]", "ratios=[1.0, 2.0, 3.0]", "do not fit 6 anchors"),
    ],
)
def test_settings_that_are_refused(write, output, old, new, sentence):
    assert old in TEXT_3
    path = write(mmdet_retinanet(anchors=4), meta={"cfg": TEXT_3.replace(old, new)})
    assert sentence in refused(path, output)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("os.mkdir({made!r})", "computes model by code, which is not run"),
        ("dict(type=os.mkdir({made!r}))", "computes model by code, which is not run"),
        ("(", "no config text in it can be read"),
    ],
)
def test_a_config_text_is_not_run_and_that_is_said(write, output, tmp_path, caplog, model, said):
    made = tmp_path / "made"
    text = f"import os\nmodel = {model.format(made=str(made))}\n"
    convert_from_mmdet(write(mmdet_retinanet(), meta={"cfg": text}), output)
    assert not made.exists() and said in caplog.text


# Mistakes.


def refused(path, output, reverse=False, cfg=None):
    with pytest.raises(UserError) as error:
        (convert_to_mmdet if reverse else convert_from_mmdet)(path, output, cfg)
    assert "\n" not in str(error.value) and not Path(output).exists()
    return str(error.value)


def without(state, part):
    return {name: x for name, x in state.items() if part not in name}


def test_what_is_no_retinanet(write, output):
    state = mmdet_retinanet()
    for change, sentence in (
        ({"rpn_head.rpn_cls.weight": torch.ones(1)}, "a two-stage detector"),
        ({"backbone.conv1.weight": torch.ones(4, 3, 3, 3)}, "stem's convolution is 3 x 3"),
        ({"backbone.layer1.3.conv1.weight": torch.ones(4, 3, 3, 3)}, "4-4-6-3 bottleneck blocks"),
        ({"bbox_head.retina_reg.weight": torch.ones(32, 8, 3, 3)}, "do not fit 9 anchors"),
        ({"bbox_head.retina_cls.weight": torch.ones(28, 8, 3, 3)}, "do not fit 9 anchors"),
        ({"bbox_head.loss_cls.edges": torch.linspace(0, 2, 31)}, "borders of equal regions"),
        ({"bbox_head.loss_cls.edges": torch.ones(0)}, "borders of equal regions"),
        (
            {"bbox_head.cls_convs.0.gn.weight": torch.ones(8)},
            "norms (norm_cfg of its bbox_head; the tensor",
        ),
    ):
        assert sentence in refused(write({**state, **change}), output)
    for part, sentence in (
        ("retina_", "not a RetinaNet's, which has retina_cls and retina_reg, but has cls_convs"),
        ("neck.", "but holds backbone, bbox_head"),
        ("backbone.layer", "its backbone is no ResNet"),
    ):
        assert sentence in refused(write(without(state, part)), output)
    assert "holds nothing" in refused(write({}), output)
    assert "tensors belong" in refused(write({"a": "b"}), output)
    assert "tensors by names" in refused(write([1]), output)


MUTABLE = [x for x in mmdet_retinanet() if not x.endswith(("tracked", "edges", "acc_sum"))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_checkpoints(write, output, data):
    state = mmdet_retinanet()
    name = data.draw(st.sampled_from(MUTABLE))
    kind = data.draw(st.sampled_from(["missing", "extra", "longer", "flat", "empty", "text"]))
    x = state.pop(name)
    if kind == "extra":
        state |= {name: x, f"{name}.more": x}
    elif kind != "missing":
        changed = {"longer": torch.cat([x, x[:1]]), "flat": x[None], "empty": x[:0], "text": "x"}
        state[name] = changed[kind]
    error = refused(write(state), output)
    assert error.startswith(str(Path(output).parents[1] / "foreign.pth"))
    if kind in ("extra", "text"):
        assert name in error


def test_fuzzed_reverse(write, output, tmp_path):
    there, back = str(tmp_path / "there.pth"), str(tmp_path / "back.pth")
    convert_from_mmdet(write(mmdet_retinanet()), there)
    original = load_file(there)["model"]
    for name in list(original)[:: len(original) // 12]:
        for change in (None, original[name][None], original[name][:0]):
            state = {**original, name: change} if change is not None else without(original, name)
            torch.save({"model": state}, there)
            assert name in refused(there, back, reverse=True)
    torch.save({"model": without(original, "head.")}, there)
    assert "not a RetinaNet of Detectron2" in refused(there, back, reverse=True)
    assert "loads no .pkl" in refused(there, str(tmp_path / "x.pkl"), reverse=True)


# The config that goes with a way back: everything that the way there reads.

LIST = st.lists(st.sampled_from([0.25, 0.5, 0.7, 1.0, 1.5, 2.0, 3.1]), min_size=1, max_size=3)
SHARES = st.floats(0.01, 0.99).map(lambda x: round(x, 3))


@st.composite
def configs(draw):
    """A config of a narrow RetinaNet, with most of its settings at random."""
    width, groups = draw(st.sampled_from([(4, 1), (8, 1), (2, 2), (3, 4)]))
    per_level = draw(st.booleans())
    ratios, scales = draw(LIST), draw(LIST)
    sizes = [[8.0 * 2**level * 4 * x for x in scales] for level in range(5)]
    numbers = st.lists(st.floats(0.5, 200), min_size=3, max_size=3)
    planes = width if groups == 1 else draw(st.sampled_from([4, 6]))
    cfg = get_cfg()
    add_ghm_config(cfg)
    for key, value in {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": "GHMRetinaNet",
        "MODEL.BACKBONE.NAME": draw(st.sampled_from(BACKBONES)),
        "MODEL.BACKBONE.FREEZE_AT": draw(st.integers(0, 3)),
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.NORM": draw(st.sampled_from(["BN", "FrozenBN", "SyncBN"])),
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL.RESNETS.STEM_OUT_CHANNELS": draw(st.sampled_from([4, 6])),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 4 * planes,
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width,
        "MODEL.RESNETS.STRIDE_IN_1X1": draw(st.booleans()),
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": draw(st.sampled_from([4, 8])),
        "MODEL.ANCHOR_GENERATOR.SIZES": sizes,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [ratios] * (5 if per_level else 1),
        "MODEL.ANCHOR_GENERATOR.OFFSET": draw(st.sampled_from([0.0, 0.5, 0.25])),
        "MODEL.RETINANET.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
        "MODEL.RETINANET.NUM_CLASSES": draw(st.integers(1, 4)),
        "MODEL.RETINANET.NUM_CONVS": draw(st.integers(1, 3)),
        "MODEL.RETINANET.BBOX_REG_WEIGHTS": draw(
            st.lists(st.sampled_from([1.0, 2.0, 5.0, 10.0, 0.3]), min_size=4, max_size=4)
        ),
        "MODEL.RETINANET.SCORE_THRESH_TEST": draw(SHARES),
        "MODEL.RETINANET.NMS_THRESH_TEST": draw(SHARES),
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": draw(st.integers(1, 5000)),
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": draw(st.sampled_from([0.0, 0.1])),
        "TEST.DETECTIONS_PER_IMAGE": draw(st.integers(1, 500)),
        "INPUT.FORMAT": draw(st.sampled_from(["RGB", "BGR"])),
        "MODEL.PIXEL_MEAN": draw(numbers),
        "MODEL.PIXEL_STD": draw(numbers),
        "MODEL.GHM.CLIP_BEFORE_NMS": True,
        "MODEL.GHM.RETINANET.CLS.ENABLED": draw(st.booleans()),
        "MODEL.GHM.RETINANET.REG.ENABLED": draw(st.booleans()),
        "MODEL.GHM.RETINANET.CLS.BINS": draw(st.integers(2, 40)),
        "MODEL.GHM.RETINANET.REG.BINS": draw(st.integers(2, 40)),
    }.items():
        cfg.merge_from_list([key, value])
    return cfg


@settings(suppress_health_check=list(HealthCheck), max_examples=40)
@given(cfg=configs())
def test_reverse_then_forward_gives_the_same_config(tmp_path_factory, cfg):
    folder = tmp_path_factory.mktemp("random")
    start, there, back = (str(folder / f"{name}.pth") for name in ("start", "there", "back"))
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, start)
    mmdet_model(convert_to_mmdet(start, there, cfg))
    config_file = convert_from_mmdet(there, back)
    found = load_config(config_file)
    written = yaml.safe_load(Path(config_file).read_text())
    written.pop("VERSION")
    written["MODEL"].pop("WEIGHTS")
    seen = 0

    def compare(node, path=()):
        nonlocal seen
        for key, value in node.items():
            if isinstance(value, dict):
                compare(value, (*path, key))
                continue
            a, b = (converter.get(x, ".".join((*path, key))) for x in (found, cfg))
            if key == "ASPECT_RATIOS":
                a, b = a[:1], b[:1]
            assert converter._same(a, b), (path, key, a, b)
            seen += 1

    compare(written)
    assert seen >= 25
    for part in ("CLS", "REG"):
        a, b = (x.MODEL.GHM.RETINANET[part] for x in (found, cfg))
        assert a.ENABLED == b.ENABLED and (a.BINS == b.BINS or not b.ENABLED)
    again = load_file(back)["model"]
    names = [x for x in model.state_dict() if not x.endswith("num_batches_tracked")]
    assert all(torch.equal(again[name], model.state_dict()[name]) for name in names)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[32.0], [64.0], [128.0], [256.0], [400.0]], "multiples"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]] * 4 + [[2.0]], "the same at each level"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[32.0], [64.0]], "of 2 levels"),
        ("MODEL.FPN.NORM", "GN", "MODEL.FPN.NORM = 'GN'"),
        ("MODEL.FPN.FUSE_TYPE", "avg", "MODEL.FPN.FUSE_TYPE = 'avg'"),
        ("MODEL.RETINANET.NORM", "BN", "MODEL.RETINANET.NORM = 'BN'"),
        ("MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.NORM = 'GN'"),
        ("MODEL.RESNETS.RES5_DILATION", 2, "MODEL.RESNETS.RES5_DILATION = 2"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.NAME = "),
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.META_ARCHITECTURE = "),
        ("MODEL.GHM.RETINANET.REG.MU", "auto", "MODEL.GHM.RETINANET.REG.MU = 'auto'"),
        ("MODEL.RETINANET.NUM_CLASSES", 7, "MODEL.RETINANET.NUM_CLASSES is 7 in the config"),
    ],
)
def test_what_mmdetection_cannot_express_is_named(write, output, tmp_path, key, value, part):
    there = str(tmp_path / "there.pth")
    cfg = load_config(convert_from_mmdet(write(mmdet_retinanet()), there))
    if key == "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS":
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8.0 * 2**i] for i in range(5)]
    cfg.merge_from_list([key, value])
    assert part in refused(there, output, reverse=True, cfg=cfg)
    assert not Path(output).with_suffix(".py").exists()


NORMS = {
    "MODEL.FPN.NORM": "backbone.fpn_lateral3.norm.weight",
    "MODEL.RETINANET.NORM": "head.cls_subnet.1.weight",
}


@pytest.mark.parametrize("key", NORMS)
def test_norms_are_named_as_the_cause(write, output, tmp_path, key):
    """Without the config, too: by their tensors."""
    there = str(tmp_path / "there.pth")
    cfg = load_config(convert_from_mmdet(write(mmdet_retinanet()), there))
    for norm in ("BN", "GN") if key == "MODEL.FPN.NORM" else ("GN",):
        cfg.merge_from_list([key, norm, "MODEL.FPN.OUT_CHANNELS", 32])
        state = build_model(cfg).state_dict()
        assert NORMS[key] in state
        torch.save({"model": state}, there)
        error = refused(there, output, reverse=True)
        assert f"norms ({key}; the tensor " in error
    cfg = load_config(convert_from_mmdet(write(mmdet_retinanet()), str(tmp_path / "x.pth")))
    cfg.merge_from_list(["MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.RES2_OUT_CHANNELS", 128])
    cfg.merge_from_list(
        ["MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 32]
    )
    torch.save({"model": build_model(cfg).state_dict()}, there)
    assert "norms (MODEL.RESNETS.NORM; " in refused(there, output, reverse=True)


def test_config_file_that_does_not_fit(write, output, tmp_path):
    path = write(mmdet_retinanet())
    cfg = load_config(convert_from_mmdet(path, str(tmp_path / "x.pth")))
    assert convert_from_mmdet(path, output, cfg) is None
    assert Path(output).exists() and not Path(output).with_suffix(".yaml").exists()
    Path(output).unlink()
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.GHM.CLIP_BEFORE_NMS = 101, False
    error = refused(path, output, cfg=cfg)
    assert "MODEL.RESNETS.DEPTH is 101 in the config and 50 in the checkpoint (2 such" in error


def test_no_file_is_written_over(write, output, tmp_path):
    path = write(mmdet_retinanet())
    assert "is the file to convert" in refused_same(path)
    Path(output).parent.mkdir()
    Path(output).with_suffix(".yaml").write_text("mine")
    assert "converted.yaml exists already" in refused(path, output)
    assert Path(output).with_suffix(".yaml").read_text() == "mine"
    assert "cannot be written" in refused(path, "/dev/null/x.pth")


def refused_same(path):
    before = Path(path).read_bytes()
    with pytest.raises(UserError) as error:
        convert_from_mmdet(path, path)
    assert Path(path).read_bytes() == before
    return str(error.value)


# The command line.


def test_command_line(write, output, tmp_path, capsys):
    path, back = write(mmdet_retinanet()), str(tmp_path / "back.pth")
    tool.main([path, output])
    config = str(Path(output).with_suffix(".yaml"))
    text = capsys.readouterr().out
    assert f"--eval-only --config-file {config} MODEL.WEIGHTS {output}" in text
    assert yaml.safe_load(Path(config).read_text())["MODEL"]["WEIGHTS"] == output
    tool.main([output, back, "--reverse", "--config-file", config])
    assert f"and {Path(back).with_suffix('.py')}, mmdet" in capsys.readouterr().out
    equal_states(load_file(back)["state_dict"], load_file(path)["state_dict"])
    for argv in (["gone.pth", back], [path, output, "--config-file", "gone.yaml"]):
        with pytest.raises(SystemExit) as stop:
            tool.main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "does not exist" in error
        assert error.startswith("ghm-d2 convert-mmdet: error: ")
