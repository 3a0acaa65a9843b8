"""RestrictedCheckpointer: what Detectron2's loads, it loads alike; code and misfits are refused."""

import argparse
import errno
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import defaults

from ghm_d2.checkpoint import RestrictedCheckpointer, load_file, load_trained_weights
from ghm_d2.data import check_coco_dataset, parse_dataset, register_coco_dataset
from ghm_d2.engine import GHMTrainer
from ghm_d2.errors import UserError
from ghm_d2.files import whole_file
from ghm_d2.run_folder import RunFolder
from tests.detectors import small_config, small_model
from tests.foreign import Call
from tests.tiny import unregister_all, write_coco

RETINANET = "ghm_retinanet_R_50"


@pytest.fixture(scope="module")
def model():
    model = small_model(RETINANET, seed=1)
    model.backbone.bottom_up.stem.conv1.norm.num_batches_tracked.fill_(7)  # pycls' are not loaded
    return model


@pytest.fixture
def blank():
    """Models to load into, all with the same other weights."""
    return lambda: small_model(RETINANET, seed=2)


def arrays(model):
    return {name: x.numpy() for name, x in model.state_dict().items()}


def caffe2(model):
    """The backbone under Caffe2's names, as the ImageNet files of Detectron1 have it."""
    found = {}
    for name, x in arrays(model).items():
        if name.startswith("backbone.bottom_up.res") and "num_batches" not in name:
            name = name.removeprefix("backbone.bottom_up.").replace("shortcut", "branch1")
            for i, branch in enumerate(("branch2a", "branch2b", "branch2c"), 1):
                name = name.replace(f"conv{i}", branch)
            name = name.replace(".norm.running_mean", "_bn_rm").replace(
                ".norm.running_var", "_bn_riv"
            )
            name = name.replace(".norm.weight", "_bn_s").replace(".norm.bias", "_bn_b")
            found[name.replace(".weight", "_w").replace(".", "_")] = x
    found["res2_0_branch2a_w_momentum"] = np.zeros(3, np.float32)
    return found


def pkl(make):
    return lambda model, path: path.write_bytes(pickle.dumps(make(model), protocol=2))


FILES = {
    "zoo.pkl": pkl(lambda m: {"model": arrays(m), "__author__": "me"}),
    "heuristics.pkl": pkl(
        lambda m: {
            "model": arrays(m.backbone.bottom_up),
            "__author__": "me",
            "matching_heuristics": True,
        }
    ),
    "caffe2.pkl": pkl(caffe2),
    "blobs.pkl": pkl(lambda m: {"blobs": caffe2(m), "cfg": "text"}),
    "pycls.pyth": lambda m, path: torch.save({"model_state": m.state_dict()}, path),
    "trained.pth": lambda m, path: torch.save({"model": m.state_dict(), "iteration": 3}, path),
    "bare.pth": lambda m, path: torch.save(m.state_dict(), path),
    "legacy.pth": lambda m, path: torch.save(
        m.state_dict(), path, _use_new_zipfile_serialization=False
    ),
    "parallel.pth": lambda m, path: torch.save(
        {f"module.{k}": v for k, v in m.state_dict().items()}, path
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_loads_what_detectron2_loads(model, blank, tmp_path, name):
    FILES[name](model, tmp_path / name)
    stock, ours, untouched = blank(), blank(), blank().state_dict()
    wanted = DetectionCheckpointer(stock).load(str(tmp_path / name))
    found = RestrictedCheckpointer(ours).load(str(tmp_path / name))
    assert found.keys() == wanted.keys()
    states = stock.state_dict(), ours.state_dict()
    assert all(torch.equal(x, states[1][k]) for k, x in states[0].items())
    key = "backbone.bottom_up.res3.1.conv2.weight"
    assert torch.equal(states[1][key], model.state_dict()[key])
    assert not torch.equal(states[1][key], untouched[key])


def test_the_query_for_heuristics(model, blank, tmp_path):
    path = tmp_path / "backbone.pth"
    torch.save(model.backbone.bottom_up.state_dict(), path)
    target = blank()
    RestrictedCheckpointer(target).load(f"{path}?matching_heuristics=True")
    assert torch.equal(
        target.backbone.bottom_up.res5[0].conv1.weight,
        model.backbone.bottom_up.res5[0].conv1.weight,
    )


@pytest.mark.parametrize("name", ["x.pkl", "x.pth", "x.pyth"])
def test_code_is_refused(model, tmp_path, name):
    made, path = tmp_path / "made", tmp_path / name
    content = {"model": {}, "__author__": Call(os.mkdir, str(made))}
    path.write_bytes(pickle.dumps(content)) if name == "x.pkl" else torch.save(content, path)
    with pytest.raises(UserError, match="mkdir"):
        RestrictedCheckpointer(model).load(str(path))
    assert not made.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1, 2], "holds a list instead of tensors by their names"),
        ({"model": 3}, "holds a int instead of tensors"),
        ({"state_dict": {"w": torch.ones(1)}, "meta": {}}, r"holds state_dict \(dict\) among"),
        ({"conv1.weight": torch.ones(1)}, "no tensor in .* has the name of one in this model"),
        ({}, "no tensor in"),
    ],
)
def test_weights_that_fit_nowhere(model, tmp_path, content, sentence):
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=sentence) as error:
        RestrictedCheckpointer(model).load(str(path))
    assert "ghm-d2 convert-mmdet" in str(error.value) and str(path) in str(error.value)


OTHER_MODELS = {
    "classes": ["MODEL.RETINANET.NUM_CLASSES", 5],
    "regions": ["MODEL.GHM.RETINANET.CLS.BINS", 20],
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_classes_and_regions(blank, tmp_path, caplog, monkeypatch, name):
    """As weights to start from, what fits nowhere is named; a training is not resumed with them."""
    monkeypatch.setattr(logging.getLogger("fvcore"), "propagate", True)
    other = small_model(RETINANET, *OTHER_MODELS[name])
    path, part = tmp_path / "x.pth", {"classes": "head.cls_score", "regions": "ghm_c.0.acc_sum"}
    torch.save({"model": other.state_dict(), "trainer": {}}, path)
    model = blank()
    counts = model.ghm_c[0].acc_sum.clone()
    RestrictedCheckpointer(model).load(str(path))
    assert part[name] in caplog.text and torch.equal(model.ghm_c[0].acc_sum, counts)
    resumed = RestrictedCheckpointer(blank(), trainer=argparse.Namespace(state_dict=dict))
    with pytest.raises(UserError, match=part[name] + ".*resume with the config"):
        resumed.load(str(path))


HOSTILE = [
    {"model": {"head.cls_score.weight\x1b[2J\n": torch.ones(1)}},
    {"model": {"x" * 100_000: torch.ones(1)}},
    {"model": {"": torch.ones(1)}},
    {"model": {5: torch.ones(1)}},
    {"model": {None: torch.ones(1)}},
    {"model": {"head.cls_score.bias": np.array(["a"])}},
    {"model": {"head.cls_score.bias": np.array(1.0, np.longdouble)}},
    {"model": {"head.cls_score.bias\u202e": torch.ones(1)}, "matching_heuristics": True},
    {"model": [torch.ones(1)], "__author__": "\x1b[2J"},
    {"model": None},
    {"state": {"\x1b[2J": torch.ones(1)}},
]


@pytest.mark.parametrize("content", HOSTILE)
@pytest.mark.parametrize("name", ["x.pth", "x.pkl", "x.pyth"])
def test_hostile_names_and_values(model, tmp_path, caplog, content, name):
    path = tmp_path / name
    content = {**content, "model_state": content.get("model")}
    if name == "x.pkl":
        path.write_bytes(pickle.dumps({"__author__": "me", **content}))
    else:
        torch.save(content, path)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        RestrictedCheckpointer(model).load(str(path))
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
    assert "\x1b" not in caplog.text and "\u202e" not in caplog.text
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_weights_of_another_architecture_are_named(tmp_path, caplog, monkeypatch):
    """What both have is taken, as a start; the rest is listed."""
    for name in ("fvcore", "ghm_d2"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        caplog.set_level(logging.INFO, name)
    path = tmp_path / "x.pth"
    torch.save(small_model("ghm_faster_rcnn_R_50", seed=5).state_dict(), path)
    RestrictedCheckpointer(small_model(RETINANET)).load(str(path))
    assert "head.cls_score" in caplog.text and "roi_heads.box_predictor" in caplog.text
    assert "12 tensors of the model are not in" in caplog.text


@pytest.fixture(params=[False, True], ids=["", "bias_correction"])
def trained(request, tmp_path):
    """The file of a GHM model with two groups that has trained, and a model without any counts."""
    opts = ["SOLVER.IMS_PER_BATCH", 4, "MODEL.GHM.RETINANET.CLS.BIAS_CORRECTION", request.param]
    model = small_model(RETINANET, *opts)
    for name, x in model.named_buffers():
        if name.startswith("ghm_"):
            x.fill_(7)
    path = str(tmp_path / "trained.pth")
    torch.save({"model": model.state_dict(), "iteration": 3}, path)
    return path, lambda *more: small_model(RETINANET, *opts, *more, seed=2)


def counts(model):
    return torch.cat([x.double() for n, x in model.named_buffers() if n.startswith("ghm_")])


@pytest.fixture
def lines(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    caplog.set_level(logging.INFO, "ghm_d2")
    return lambda: [r.getMessage() for r in caplog.records if "start at 0" in r.getMessage()]


@pytest.mark.parametrize("resume", [False, True], ids=["", "nothing to resume"])
def test_weights_to_start_from_leave_their_counts_behind(trained, tmp_path, lines, resume):
    path, build = trained
    model = build()
    RestrictedCheckpointer(model, str(tmp_path)).resume_or_load(path, resume=resume)
    assert not counts(model).any()
    assert [line.partition(":")[0] for line in lines()] == [
        "the running counts of 4 losses start at 0"
    ]
    weights = torch.load(path)["model"]["head.cls_score.weight"]
    assert torch.equal(model.head.cls_score.weight, weights)


def test_loading_resuming_and_evaluating_keep_them(trained, tmp_path, lines):
    path, build = trained
    model = build()
    RestrictedCheckpointer(model).load(path)
    assert (counts(model) == 7).all()
    (tmp_path / "last_checkpoint").write_text("trained.pth")
    model = build()
    RestrictedCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert (counts(model) == 7).all()
    cfg = small_config(RETINANET, "MODEL.WEIGHTS", path, "OUTPUT_DIR", str(tmp_path))
    for resume in (False, True):
        model = build()
        load_trained_weights(model, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, resume=resume)
        assert (counts(model) == 7).all()
    assert not lines()


def test_weights_without_counts_and_a_new_model_say_nothing(tmp_path, lines):
    model = small_model(RETINANET)
    RestrictedCheckpointer(model, str(tmp_path)).resume_or_load("", resume=False)
    assert not counts(model).any() and not lines()


@pytest.mark.parametrize(("resume", "evaluate"), [(False, False), (False, True), (True, True)])
def test_other_bins_start_at_0_and_evaluate(trained, tmp_path, resume, evaluate):
    path, build = trained
    model = build("MODEL.GHM.RETINANET.CLS.BINS", 20, "MODEL.GHM.RETINANET.REG.BINS", 5)
    if evaluate:
        (tmp_path / "last_checkpoint").write_text("trained.pth")
        cfg = small_config(RETINANET, "MODEL.WEIGHTS", path, "OUTPUT_DIR", str(tmp_path))
        load_trained_weights(model, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, resume=resume)
    else:
        RestrictedCheckpointer(model, str(tmp_path)).resume_or_load(path, resume=resume)
    assert not counts(model).any()
    assert torch.equal(
        model.head.cls_score.weight, torch.load(path)["model"]["head.cls_score.weight"]
    )


def test_truncated_files(model, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="damaged one"):
        RestrictedCheckpointer(model).load(str(path))


def test_pycls_without_its_entry(model, tmp_path):
    torch.save({"model": {}}, tmp_path / "x.pyth")
    with pytest.raises(UserError, match="holds a NoneType"):
        RestrictedCheckpointer(model).load(str(tmp_path / "x.pyth"))


def test_the_trainer_uses_it(tmp_path):
    register_coco_dataset(check_coco_dataset(parse_dataset(f"checkpointer={write_coco(tmp_path)}")))
    try:
        cfg = small_config(
            RETINANET,
            "DATASETS.TRAIN", ("checkpointer",),
            "DATASETS.TEST", (),
            "OUTPUT_DIR", str(tmp_path / "out"),
            "DATALOADER.NUM_WORKERS", 0,
            "MODEL.WEIGHTS", str(tmp_path / "evil.pkl"),
        )  # fmt: skip
        trainer = GHMTrainer(cfg)
        made = tmp_path / "made"
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Call(os.mkdir, str(made))))
        with pytest.raises(UserError, match="mkdir"):
            trainer.resume_or_load(resume=False)
        assert not made.exists()
        assert trainer.checkpointer.checkpointables.keys() == {"trainer"}
        assert defaults.DetectionCheckpointer is DetectionCheckpointer
    finally:
        unregister_all()


# --- written whole, and found again ---------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """OUTPUT_DIR with the checkpoints of iterations 2, 5 and 8."""
    checkpointer = RestrictedCheckpointer(torch.nn.Linear(2, 2), str(tmp_path))
    for iteration in (2, 5, 8):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return tmp_path


def resumed(folder):
    checkpointer = RestrictedCheckpointer(torch.nn.Linear(2, 2), str(folder))
    return checkpointer.resume_or_load("", resume=True)["iteration"]


def test_what_it_writes_is_what_detectron2_writes(folder, tmp_path):
    model = torch.nn.Linear(2, 2)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir(), theirs.mkdir()
    for cls, place in ((RestrictedCheckpointer, ours), (DetectionCheckpointer, theirs)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9)
        cls(model, str(place), optimizer=optimizer).save("model_final", iteration=7)
    assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
    assert (ours / "last_checkpoint").read_text() == (theirs / "last_checkpoint").read_text()
    a, b = (torch.load(x / "model_final.pth", weights_only=True) for x in (ours, theirs))
    assert a.keys() == b.keys() and a["optimizer"] == b["optimizer"] and a["iteration"] == 7
    assert all(torch.equal(a["model"][k], v) for k, v in b["model"].items())


class Full:
    """A checkpointable that ends the disk's space in the middle of a file."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch

    def state_dict(self):
        def write(file, *args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self._monkeypatch.setattr("ghm_d2.checkpoint.files.os.fsync", write)
        return {}


def test_a_full_disk_leaves_the_checkpoints_before_it(folder, monkeypatch):
    checkpointer = RestrictedCheckpointer(
        torch.nn.Linear(2, 2), str(folder), full=Full(monkeypatch)
    )
    before = sorted(os.listdir(folder))
    for name in ("model_0000011", "model_0000008"):  # a new file, and one that is there
        with pytest.raises(
            UserError, match="cannot be written .No space left.*continue with --resume"
        ):
            checkpointer.save(name, iteration=11)
    assert sorted(os.listdir(folder)) == before and resumed(folder) == 8


def test_torch_s_error_of_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="x.pth cannot be written .No space left"):  # noqa: SIM117
        with whole_file(str(tmp_path / "x.pth")):
            with open("/dev/full", "wb", buffering=0) as full:
                torch.save({"x": torch.zeros(9)}, full)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-200]),
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
        lambda file: torch.save({"iteration": 8}, file),
    ],
    ids=["cut", "empty", "gone", "no model"],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(folder, damage, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    damage(folder / "model_0000008.pth")
    assert resumed(folder) == 5
    (warning,) = {r.getMessage() for r in caplog.records if r.name.startswith("ghm_d2")}
    assert "model_0000008.pth" in warning and warning.endswith("going back to model_0000005.pth")


def test_none_that_can_be_read_is_one_sentence(folder):
    for file in folder.glob("*.pth"):
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="no checkpoint in .*_0000008.*_0000005.*_0000002.*leave"):
        resumed(folder)


def test_which_one_is_the_newest(folder):
    """The one that last_checkpoint names, whatever an earlier training has left."""
    (folder / "last_checkpoint").write_text("model_0000005.pth")
    assert resumed(folder) == 5
    (folder / "model_0000005.pth").write_bytes(b"")
    assert resumed(folder) == 2
    for name in ("model_final.pth", ""):
        (folder / "last_checkpoint").write_text(name)
        assert resumed(folder) == 8
    RunFolder(folder).set_last_checkpoint_aside()
    with pytest.raises(KeyError, match="iteration"):
        resumed(folder)


def test_a_checkpoint_is_opened_once(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "ghm_d2.checkpoint.checkpointer.load_file",
        lambda path, **kwargs: opened.append(path) or load_file(path, **kwargs),
    )
    assert resumed(folder) == 8
    assert opened == [str(folder / "model_0000008.pth")]
    checkpointer = RestrictedCheckpointer(torch.nn.Linear(2, 2), str(folder))
    for _ in range(2):  # what was kept of the first is not given for a later file of this name
        checkpointer.resume_or_load("", resume=True)
    assert len(opened) == 3


def test_what_a_kill_leaves_is_removed(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    caplog.set_level(logging.INFO, "ghm_d2")
    before = sorted(os.listdir(folder))
    for name in ("model_0000011.pth.part", "last_checkpoint.part"):
        (folder / name).write_bytes(b"cut off")
    RunFolder(folder).remove_partial_files()
    assert sorted(os.listdir(folder)) == before
    assert "model_0000011.pth.part" in caplog.text and "last_checkpoint.part" in caplog.text
