"""Every config file loads with safe YAML, builds, and holds the published recipe."""

from pathlib import Path

import pytest
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from ghm_d2 import add_ghm_config
from ghm_d2.errors import UserError
from ghm_d2.modeling import validate_ghm_config
from tests.detectors import small_model

CONFIGS = sorted(Path("configs").rglob("*.yaml"))
MODELS = [p for p in CONFIGS if not p.name.startswith("Base-")]
PUBLISHED = [p for p in MODELS if p.parent == Path("configs")]


def load(path):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(str(path), allow_unsafe=False)
    return cfg


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_safe_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("path", MODELS, ids=str)
def test_builds(path):
    cfg = load(path)
    cfg.MODEL.DEVICE = "cpu"
    validate_ghm_config(cfg)
    model = build_model(cfg)
    assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE
    if "ghm_" in path.name:
        assert any("acc_sum" in name for name in model.state_dict())


@pytest.mark.parametrize("path", PUBLISHED, ids=str)
def test_published_recipe(path):
    cfg = load(path)
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY) == (16, 0.01, 1e-4)
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (90000, (60000, 80000), 500)
    clip = solver.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE) == (
        True,
        "full_model",
        35.0,
        2.0,
    )
    assert cfg.INPUT.MIN_SIZE_TRAIN == ((320,) if "MobileNet" in path.name else (800,))
    assert "ImageNetPretrained" in cfg.MODEL.WEIGHTS or "32x4d" in cfg.MODEL.WEIGHTS


def test_published_losses():
    cfg = load("configs/ghm_retinanet_R_101.yaml")
    node = cfg.MODEL.GHM.RETINANET
    assert (node.CLS.BINS, node.CLS.MOMENTUM, node.CLS.LOSS_WEIGHT) == (30, 0.75, 1.0)
    assert (node.REG.MU, node.REG.BINS, node.REG.MOMENTUM, node.REG.LOSS_WEIGHT) == (
        0.02,
        10,
        0.7,
        10.0,
    )
    assert (node.SCOPE, node.IMAGES_PER_HISTOGRAM, cfg.MODEL.GHM.SYNC) == ("level", 2, False)


def test_paper_two_stage_switches():
    """GHM-R alone where no name says GHM-C."""
    two_stage = [path for path in PUBLISHED if "rcnn" in path.name]
    assert len(two_stage) >= 6
    for path in two_stage:
        ghm = load(path).MODEL.GHM
        assert ghm.ROI_BOX_HEAD.REG.ENABLED
        assert ghm.ROI_BOX_HEAD.CLS.ENABLED == path.stem.endswith("_ghm_c"), path
        assert not ghm.RPN.CLS.ENABLED and not ghm.RPN.REG.ENABLED


def test_the_former_name_of_a_config_is_the_same_config():
    assert load("configs/ghm_r_faster_rcnn_R_50.yaml") == load("configs/ghm_faster_rcnn_R_50.yaml")


SL1 = {"RETINANET.SMOOTH_L1_LOSS_BETA": 1 / 9, "GHM.RETINANET.REG.ENABLED": False}
TWO_STAGE = {
    "RPN.SMOOTH_L1_BETA": 1 / 9,
    "ROI_BOX_HEAD.SMOOTH_L1_BETA": 1.0,
}
HEAD_OFF = {"GHM.ROI_BOX_HEAD.REG.ENABLED": False}
RPN_ON = {"GHM.RPN.REG.ENABLED": True}
CE = {"GHM.RETINANET.CLS.LOSS_TYPE": "cross_entropy", "GHM.RETINANET.CLS.LOSS_WEIGHT": 20.0}
# What each baseline changes of ghm_retinanet_R_50.yaml or ghm_faster_rcnn_R_50.yaml, under MODEL.
BASELINES = {
    "ce_sl1_retinanet_R_50": SL1 | CE,
    "ohem_sl1_retinanet_R_50": SL1 | {"GHM.RETINANET.CLS.LOSS_TYPE": "ohem"},
    "focal_sl1_retinanet_R_50": SL1 | {"GHM.RETINANET.CLS.ENABLED": False},
    "ghm_c_sl1_retinanet_R_50": SL1,
    "ghm_c_asl1_retinanet_R_50": {
        "GHM.RETINANET.REG.LOSS_TYPE": "asl1",
        "GHM.RETINANET.REG.LOSS_WEIGHT": 1.0,
    },
    "sl1_faster_rcnn_R_50": TWO_STAGE | HEAD_OFF,
    "ghm_r_rpn_faster_rcnn_R_50": TWO_STAGE | HEAD_OFF | RPN_ON,
    "ghm_r_box_head_faster_rcnn_R_50": TWO_STAGE,
    "ghm_r_both_faster_rcnn_R_50": TWO_STAGE | RPN_ON,
}


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_every_baseline_is_listed():
    assert set(BASELINES) == {p.stem for p in CONFIGS if p.parent.name == "baselines"}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_differ_from_the_main_config_in_the_loss_alone(name):
    main = "ghm_retinanet_R_50" if "retinanet" in name else "ghm_faster_rcnn_R_50"
    before = dict(leaves(load(f"configs/{main}.yaml")))
    after = dict(leaves(load(f"configs/baselines/{name}.yaml")))
    changed = {key: value for key, value in after.items() if value != before[key]}
    assert changed == {f"MODEL.{key}": value for key, value in BASELINES[name].items()}


@pytest.mark.parametrize(
    ("name", "stock", "more"),
    [
        ("ghm_mask_rcnn_R_50", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", {}),
        (
            "ghm_cascade_rcnn_R_50",
            "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
            {"MASK_ON": False, "ROI_MASK_HEAD.NUM_CONV": 0},
        ),
    ],
)
def test_the_detector_is_that_of_detectron2(name, stock, more):
    ours = dict(leaves(load(f"configs/{name}.yaml").MODEL))
    stock = dict(leaves(model_zoo.get_config(stock).MODEL))
    changed = {key: ours[key] for key in stock if ours[key] != stock[key]}
    heads = f"GHM{stock['ROI_HEADS.NAME'].removeprefix('Standard')}"
    assert changed == {"ROI_HEADS.NAME": heads, "PROPOSAL_GENERATOR.NAME": "GHMRPN"} | more


def test_upstream_nodes_get_no_keys():
    plain, extended = get_cfg(), get_cfg()
    add_ghm_config(extended)
    assert extended.MODEL.pop("GHM") is not None
    assert plain.dump() == extended.dump()


BAD = [
    ("RETINANET.CLS.BINS", 0),
    ("RETINANET.CLS.MOMENTUM", 1.0),
    ("RETINANET.CLS.LOSS_WEIGHT", -1.0),
    ("RETINANET.CLS.NORMALIZE_BY", "bins"),
    ("RETINANET.CLS.DENSITY", "approximate"),
    ("RETINANET.REG.BINS", -3),
    ("RETINANET.REG.MOMENTUM", -0.1),
    ("RETINANET.REG.MU", 0.0),
    ("RETINANET.SCOPE", "image"),
    ("RETINANET.IMAGES_PER_HISTOGRAM", -1),
    ("RPN.CLS.BINS", 0),
    ("RPN.REG.MU", -1.0),
    ("ROI_BOX_HEAD.CLS.MOMENTUM", 2.0),
    ("ROI_BOX_HEAD.REG.LOSS_WEIGHT", float("nan")),
    ("ROI_BOX_HEAD.PRIOR_PROB", 1.0),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=[key for key, _ in BAD])
@pytest.mark.parametrize("enabled", [True, False])
def test_out_of_range_value_names_its_key(key, value, enabled):
    name = "ghm_retinanet_R_50" if key.startswith("RETINANET") else "ghm_faster_rcnn_R_50"
    cfg = load(f"configs/{name}.yaml")
    for part in ("RETINANET", "RPN", "ROI_BOX_HEAD"):
        cfg.MODEL.GHM[part].CLS.ENABLED = cfg.MODEL.GHM[part].REG.ENABLED = enabled
    cfg.merge_from_list([f"MODEL.GHM.{key}", value])
    with pytest.raises(UserError, match=f"MODEL.GHM.{key}") as error:
        validate_ghm_config(cfg)
    assert repr(value) in str(error.value)


FED_LOSS = ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True, "MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True]


@pytest.mark.parametrize(
    ("name", "opts", "both"),
    [
        (
            "ghm_retinanet_R_50",
            ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou"],
            ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "MODEL.GHM.RETINANET.REG.ENABLED"],
        ),
        (
            "ghm_faster_rcnn_R_50",
            ["MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou", "MODEL.GHM.RPN.REG.ENABLED", True],
            ["MODEL.RPN.BBOX_REG_LOSS_TYPE", "MODEL.GHM.RPN.REG.ENABLED"],
        ),
        (
            "ghm_faster_rcnn_R_50",
            ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "ciou"],
            ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "MODEL.GHM.ROI_BOX_HEAD.REG.ENABLED"],
        ),
        (
            "ghm_faster_rcnn_R_50_ghm_c",
            FED_LOSS,
            ["MODEL.ROI_BOX_HEAD.USE_FED_LOSS", "MODEL.GHM.ROI_BOX_HEAD.CLS.ENABLED"],
        ),
        (
            "ghm_cascade_rcnn_R_50",
            [*FED_LOSS, "MODEL.GHM.ROI_BOX_HEAD.CLS.ENABLED", True],
            ["MODEL.ROI_BOX_HEAD.USE_FED_LOSS", "MODEL.GHM.ROI_BOX_HEAD.CLS.ENABLED"],
        ),
        (
            "ghm_cascade_rcnn_R_50",
            ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"],
            ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "MODEL.GHM.ROI_BOX_HEAD.REG.ENABLED"],
        ),
        (
            "ghm_cascade_rcnn_R_50",
            ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False],
            ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "MODEL.ROI_HEADS.NAME"],
        ),
        (
            "ghm_cascade_rcnn_R_50",
            ["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.6, 0.6, 0.7)],
            ["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "MODEL.ROI_HEADS.IOU_THRESHOLDS"],
        ),
    ],
)
def test_exclusive_keys_are_refused_by_naming_both(name, opts, both):
    cfg = load(f"configs/{name}.yaml")
    cfg.merge_from_list(opts)
    with pytest.raises(UserError) as error:
        validate_ghm_config(cfg)
    assert all(key in str(error.value) for key in both)


ROTATED = {"MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator"}
STOCK_RPN = {"MODEL.PROPOSAL_GENERATOR.NAME": "RPN"}
GHM_RPN = {"MODEL.PROPOSAL_GENERATOR.NAME": "GHMRPN"}
STOCK_HEADS = {"MODEL.ROI_HEADS.NAME": "StandardROIHeads"}


@pytest.mark.parametrize(
    ("name", "opts", "both"),
    [
        ("ghm_retinanet_R_50", ROTATED, (*ROTATED, "MODEL.META_ARCHITECTURE GHMRetinaNet")),
        (
            "ghm_faster_rcnn_R_50",
            ROTATED | STOCK_RPN,
            (*ROTATED, "MODEL.ROI_HEADS.NAME GHMROIHeads"),
        ),
        (
            "ghm_cascade_rcnn_R_50",
            ROTATED | STOCK_RPN,
            (*ROTATED, "MODEL.ROI_HEADS.NAME GHMCascadeROIHeads"),
        ),
        (
            "ghm_faster_rcnn_R_50",
            ROTATED | GHM_RPN | STOCK_HEADS,
            (*ROTATED, "MODEL.PROPOSAL_GENERATOR.NAME GHMRPN"),
        ),
        (
            "ghm_faster_rcnn_R_50",
            {"MODEL.PROPOSAL_GENERATOR.NAME": "RRPN"},
            ("MODEL.PROPOSAL_GENERATOR.NAME RRPN", "MODEL.ROI_HEADS.NAME GHMROIHeads"),
        ),
        (
            "ghm_faster_rcnn_R_50",
            GHM_RPN | {"MODEL.ROI_HEADS.NAME": "RROIHeads"},
            ("MODEL.ROI_HEADS.NAME RROIHeads", "MODEL.PROPOSAL_GENERATOR.NAME GHMRPN"),
        ),
        (
            "ghm_faster_rcnn_R_50",
            STOCK_RPN | {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignRotated"},
            ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "MODEL.ROI_HEADS.NAME GHMROIHeads"),
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("enabled", [True, False])
def test_rotated_boxes_are_refused_by_naming_both(name, opts, both, enabled):
    cfg = load(f"configs/{name}.yaml")
    cfg.merge_from_list([word for pair in opts.items() for word in pair])
    for part in ("RETINANET", "RPN", "ROI_BOX_HEAD"):
        cfg.MODEL.GHM[part].CLS.ENABLED = cfg.MODEL.GHM[part].REG.ENABLED = enabled
    with pytest.raises(UserError) as error:
        validate_ghm_config(cfg)
    assert all(key in str(error.value) for key in both)


@pytest.mark.parametrize("name", ["ghm_retinanet_R_50", "ghm_faster_rcnn_R_50"])
def test_rotated_boxes_are_refused_before_a_network_is_built(name):
    with pytest.raises(UserError, match="RotatedAnchorGenerator"):
        small_model(name, *next(iter(ROTATED.items())))


def test_stock_detectors_of_rotated_boxes_are_left_alone():
    cfg = load("configs/ghm_faster_rcnn_R_50.yaml")
    stock = ROTATED | {"MODEL.PROPOSAL_GENERATOR.NAME": "RRPN", "MODEL.ROI_HEADS.NAME": "RROIHeads"}
    cfg.merge_from_list([word for pair in stock.items() for word in pair])
    validate_ghm_config(cfg)
