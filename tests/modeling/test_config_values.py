"""Every key of MODEL.GHM, present and future, refuses wrong types and values by its name."""

import functools
import math
import pickle

import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from ghm_d2.engine import checks
from ghm_d2.engine.selection import check_selection
from ghm_d2.engine.value_checks import check_values
from ghm_d2.engine.writers import check_writers
from ghm_d2.errors import UserError
from ghm_d2.modeling import build_losses, validate_ghm_config
from tests.detectors import small_config


def leaves(node, prefix="MODEL.GHM"):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


KEYS = dict(leaves(small_config("ghm_retinanet_R_50").MODEL.GHM))
# What no key of a type allows. A new key for which such a value makes sense belongs in ALLOWED.
OUT_OF_RANGE = {
    bool: (),  # both values are in range
    int: (-1, -(10**9)),
    float: (-1.0, math.nan, math.inf, -math.inf),
    str: ("no such thing",),
    tuple: (("no such thing",), (1,)),
}
ALLOWED: dict[str, tuple] = {}
OTHER_TYPES = ("three", 3, 2.5, True, None, [1], {"a": 1})
PARTS = ("RETINANET", "RPN", "ROI_BOX_HEAD", "TORCHVISION")


def config(key):
    """A config whose detector uses the key, with every loss on."""
    part = key.split(".")[2]
    return _config(part if part in PARTS else PARTS[0]).clone()


@functools.cache
def _config(part):
    if part == "TORCHVISION":
        return small_config("ghm_retinanet_MobileNetV2")
    if part == "RETINANET":
        return small_config("ghm_retinanet_R_50")
    cfg = small_config("ghm_faster_rcnn_R_50_ghm_c", "MODEL.PROPOSAL_GENERATOR.NAME", "GHMRPN")
    cfg.MODEL.GHM[part].CLS.ENABLED = cfg.MODEL.GHM[part].REG.ENABLED = True
    return cfg


def check_training(cfg):
    """Of keys whose range depends on the rest of the config."""
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD = ("coco_2017_val",), 1
    cfg.MODEL.GHM.TRAINING.SAVE_BEST = True
    check_values(cfg, eval_only=False, world_size=1)
    check_selection(cfg)
    check_writers(cfg)


def put(cfg, key, value):
    *parents, leaf = key.split(".")
    node = cfg
    for name in parents:
        node = node[name]
    dict.__setitem__(node, leaf, value)  # as code does, past Detectron2's own check


@pytest.mark.parametrize("part", PARTS)
def test_defaults_are_valid(part):
    validate_ghm_config(config(f"MODEL.GHM.{part}"))


@pytest.mark.parametrize("key", KEYS)
def test_other_types_are_refused(key):
    for value in OTHER_TYPES:
        if type(value) is type(KEYS[key]) or (type(value), type(KEYS[key])) == (int, float):
            continue
        cfg = config(key)
        put(cfg, key, value)
        with pytest.raises(UserError) as error:
            validate_ghm_config(cfg)
        assert key in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize("key", [k for k, v in KEYS.items() if OUT_OF_RANGE[type(v)]])
def test_values_out_of_range_are_refused(key):
    for value in OUT_OF_RANGE[type(KEYS[key])]:
        if value in ALLOWED.get(key, ()):
            continue
        cfg = config(key)
        put(cfg, key, value)
        with pytest.raises(UserError) as error:
            validate_ghm_config(cfg)
            build_backbone(cfg)  # knows the layers of its network only once it is built
            if ".TRAINING." in key:
                check_training(cfg)
        assert key in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part", PARTS[:3])
def test_mu_is_a_number_or_auto(part, tmp_path):
    """By every way into a config, and back again."""
    key = f"MODEL.GHM.{part}.REG.MU"
    cfg = config(key)
    cfg.merge_from_list([key, "auto", key, "0.3", key, "auto"])
    validate_ghm_config(cfg)
    losses = build_losses(cfg, part)
    assert losses["ghm_r"].follows
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())
    other = config(key)
    other.merge_from_file(str(file))
    assert yaml.safe_load(other.dump()) == yaml.safe_load(cfg.dump())
    assert "MU: auto" in other.dump()
    frozen = other.clone()
    frozen.freeze()
    assert type(frozen) is type(cfg) and pickle.loads(pickle.dumps(frozen)) == other
    other.merge_from_list([key, 0.1])
    assert build_losses(other, part)["ghm_r"].mu == 0.1
    cfg.merge_from_list([key, "Auto"])
    with pytest.raises(UserError, match=rf"{key} must be of type float or .auto., .*'Auto'"):
        validate_ghm_config(cfg)


@pytest.mark.parametrize("part", PARTS[:3])
@pytest.mark.parametrize("loss", ["CLS", "REG"])
def test_a_loss_weight_is_a_number_or_auto(part, loss):
    key, kinds = f"MODEL.GHM.{part}.{loss}.LOSS_WEIGHT", {"REG": ("ghm_r", "smooth_l1", "asl1")}
    if part == "RETINANET":
        kinds["CLS"] = ("ghm_c", "focal", "cross_entropy", "ohem")
    for kind in kinds.get(loss, ("ghm_c",)):
        cfg = config(key)
        if loss in kinds:
            cfg.merge_from_list([f"MODEL.GHM.{part}.{loss}.LOSS_TYPE", kind])
        cfg.merge_from_list([key, "auto"])
        validate_ghm_config(cfg)
        name = kind if kind.startswith("ghm") else f"{loss.lower()}_baseline"
        loss_fn = build_losses(cfg, part)[name]
        constant = {"focal": 4.0, "smooth_l1": 1.0}.get(kind)
        assert loss_fn.loss_weight == (constant or 1.0) and (constant or loss_fn.follows_weight)
        cfg.merge_from_list([key, "Auto"])
        with pytest.raises(UserError, match=rf"{key} must be of type float or .auto., .*'Auto'"):
            validate_ghm_config(cfg)


def test_given_keys_of_a_loss_that_is_off_are_named(caplog):
    cfg = small_config("ghm_faster_rcnn_R_50")
    node = "MODEL.GHM.ROI_BOX_HEAD"
    given = {f"{node}.CLS.BINS", f"{node}.CLS.ENABLED", f"{node}.REG.BINS", "SOLVER.MAX_ITER"}
    checks._name_keys_without_effect(cfg, given)
    assert caplog.messages == [f"{node}.CLS.BINS has no effect: {node}.CLS.ENABLED is False."]
