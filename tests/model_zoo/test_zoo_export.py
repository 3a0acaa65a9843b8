"""Export of a finished training: what is written, what stock Detectron2 finds with it, refusals."""

import hashlib
import json
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from ghm_d2 import add_ghm_config, model_zoo
from ghm_d2.checkpoint import load_file
from ghm_d2.cli.export_zoo import main as export_zoo
from ghm_d2.engine import main
from ghm_d2.errors import UserError
from ghm_d2.model_zoo.export import export_run
from ghm_d2.model_zoo.finished_run import read_finished_run
from ghm_d2.model_zoo.stock import (
    build_stock_model,
    stock_config,
    stock_obstacle,
    stock_weights,
)
from tests.detectors import NUM_CLASSES, TWO_IMAGES, batch, small_config, small_model
from tests.tiny import ROOT, forget_program, tiny_pairs, write_coco

CONFIGS = {"retinanet": "ghm_retinanet_R_50", "faster_rcnn": "ghm_faster_rcnn_R_50_ghm_c"}
# Random weights find something at a threshold of 0 alone.
EXTRA = {
    "retinanet": {"MODEL__RETINANET__SCORE_THRESH_TEST": 0.0},
    "faster_rcnn": {
        "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0,
        "MODEL__ROI_BOX_HEAD__FC_DIM": 16,
        "MODEL__PROPOSAL_GENERATOR__NAME": "GHMRPN",
        "MODEL__GHM__RPN__CLS__ENABLED": True,
        "MODEL__GHM__RPN__REG__ENABLED": True,
    },
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command line of each training, its OUTPUT_DIR last."""
    folder = tmp_path_factory.mktemp("runs")
    data = [f"{name}={write_coco(folder / 'data', name)}" for name in ("first", "second")]
    return {
        kind: [
            *["--config-file", str(ROOT / "configs" / f"{config}.yaml"), "--dataset", *data],
            *tiny_pairs(SOLVER__MAX_ITER=5, **EXTRA[kind]),
            *["OUTPUT_DIR", str(folder / kind)],
        ]
        for kind, config in CONFIGS.items()
    }


@pytest.fixture(scope="module")
def finished(words):
    """OUTPUT_DIR of each training; not to be changed."""
    folders = {}
    for kind, argv in words.items():
        main(argv)
        forget_program()
        folders[kind] = argv[-1]
    return folders


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the RetinaNet's OUTPUT_DIR, to be damaged."""
    return shutil.copytree(finished["retinanet"], tmp_path / "run")


STOCK = """
import sys, torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

class Strict(DetectionCheckpointer):
    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        assert not any(incompatible), incompatible
        return incompatible

config, weights, inputs, outputs, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
cfg = get_cfg()
cfg.merge_from_file(config, allow_unsafe=False)
cfg.MODEL.DEVICE = "cpu"
model = build_model(cfg).eval()
Strict(model).load(weights)
with torch.no_grad():
    found = [x["instances"].get_fields() for x in model(torch.load(inputs, weights_only=False))]
torch.save([(x["pred_boxes"].tensor, x["scores"], x["pred_classes"]) for x in found], outputs)
assert not any(name.startswith("ghm_d2") for name in sys.modules)
print(type(model).__name__)
"""


@pytest.mark.parametrize("kind", CONFIGS)
def test_stock_detectron2_finds_the_same(finished, tmp_path, monkeypatch, kind):
    folder = export_run(finished[kind], tmp_path / "zoo")
    assert folder == tmp_path / "zoo" / CONFIGS[kind] / "1"
    (weights,) = folder.glob("*.pkl")
    inputs = [{"image": x["image"]} for x in batch(*TWO_IMAGES)]
    torch.save(inputs, tmp_path / "inputs.pt")
    argv = [folder / "config_stock.yaml", weights, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *map(str, argv), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == {"retinanet": "RetinaNet"}.get(kind, "GeneralizedRCNN")

    monkeypatch.setenv("GHM_D2_ZOO", str(tmp_path / "zoo"))
    model = model_zoo.get(f"{CONFIGS[kind]}.yaml", trained=True, device="cpu").eval()
    trained = torch.load(f"{finished[kind]}/model_final.pth")["model"]
    model.load_state_dict(trained)  # the checkpoint itself, GHM statistics included
    with torch.no_grad():
        expected = [x["instances"] for x in model(inputs)]
    found = torch.load(tmp_path / "outputs.pt")
    for (boxes, scores, classes), x in zip(found, expected, strict=True):
        assert len(scores) > 0
        assert torch.equal(boxes, x.pred_boxes.tensor)
        assert torch.equal(scores, x.scores) and torch.equal(classes, x.pred_classes)


def test_what_is_written(finished, tmp_path):
    zoo = tmp_path / "zoo"
    folder = export_run(finished["retinanet"], zoo, 7)
    names = sorted(file.name for file in folder.iterdir())
    assert names[:3] == ["config.yaml", "config_stock.yaml", "metrics.json"]
    md5 = hashlib.md5((folder / names[3]).read_bytes()).hexdigest()
    assert names[3:] == [f"model_final_{md5[:6]}.pkl"]
    assert [p.name for p in folder.parent.iterdir()] == ["7"]

    (entry,) = json.loads((zoo / "index.json").read_text())["models"]
    sha256 = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}
    assert (entry["name"], entry["id"], entry["weights"]) == (CONFIGS["retinanet"], 7, names[3])
    assert (entry["md5"], entry["sha256"]) == (md5, sha256[names[3]])
    assert (entry["config_sha256"], entry["stock"]) == (sha256["config.yaml"], True)
    rows = rows_of(Path(finished["retinanet"]))
    assert entry["seconds_per_iteration"] == median(r["time"] for r in rows if "time" in r) > 0
    ap = next(row["bbox/AP"] for row in rows if "bbox/AP" in row)
    assert entry["box_ap"] == {"second": round(ap, 2)}
    assert entry["seconds_per_image"] > 0 and entry["memory_mib"] is None
    assert (entry["train_data"], entry["classes"]) == (["first"], ["disc", "bar", "cup"])
    assert (entry["iterations"], entry["images_per_batch"]) == (5, 2)
    assert entry["versions"]["torch"] == torch.__version__
    assert "thread" in entry["hardware"] and len(entry["commit"]) >= 40

    full, stock = ((folder / name).read_text() for name in names[:2])
    assert "GHMRetinaNet" in full and "full_model" in full
    assert "GHM:" not in stock and "GHMRetinaNet" not in stock and "full_model" not in stock
    assert f"WEIGHTS: {names[3]}" in stock
    # Nothing of the machine that trained.
    assert str(tmp_path.parent) not in full + stock + (zoo / "index.json").read_text()
    assert "DEVICE: cuda" in full


def test_weights_name_nothing_that_a_numpy_version_lacks(finished, tmp_path):
    (weights,) = export_run(finished["retinanet"], tmp_path).glob("*.pkl")
    operations = list(pickletools.genops(weights.read_bytes()))
    named = sorted(argument for opcode, argument, _ in operations if opcode.name == "GLOBAL")
    assert named == ["numpy dtype", "numpy ndarray"]
    first, second = load_file(weights)["model"], pickle.loads(weights.read_bytes())["model"]
    assert all(array.flags.writeable for array in second.values())
    assert all(np.array_equal(first[name], second[name]) for name in second)
    assert not any(opcode.name == "STACK_GLOBAL" for opcode, _, _ in operations)


def test_nothing_is_overwritten(finished, tmp_path):
    first = export_run(finished["retinanet"], tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"R_50/1 exists already: choose another --id"):
        export_run(finished["retinanet"], tmp_path, 1)
    shutil.rmtree(first)  # listed still
    with pytest.raises(UserError, match="exists already"):
        export_run(finished["retinanet"], tmp_path, 1)
    assert (tmp_path / "index.json").read_bytes() == before[tmp_path / "index.json"]
    assert export_run(finished["retinanet"], tmp_path).name == "2"
    (tmp_path / "index.json").rename(tmp_path / "lost.json")  # not listed, but there
    with pytest.raises(UserError, match=r"R_50/2 exists already"):
        export_run(finished["retinanet"], tmp_path, 2)
    (tmp_path / "lost.json").rename(tmp_path / "index.json")
    assert export_run(finished["faster_rcnn"], tmp_path, name="own/name").name == "3"
    assert (tmp_path / "own" / "name" / "3" / "config.yaml").exists()


def test_an_evaluation_afterwards_changes_nothing(words, finished, tmp_path):
    """It replaces config.yaml and results.json."""
    run = shutil.copytree(finished["retinanet"], tmp_path / "run")
    before = read_finished_run(run)
    argv = [*words["retinanet"][:-1], str(run), "MODEL.WEIGHTS", str(run / "model_final.pth")]
    main([*argv, "--eval-only", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "7"])
    forget_program()
    after = read_finished_run(run)
    assert "TOPK_CANDIDATES_TEST: 7" in (run / "config.yaml").read_text()
    assert after.cfg == before.cfg and after.cfg.MODEL.WEIGHTS == ""
    assert after.seconds_per_image == before.seconds_per_image


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]


def write_rows(run, rows):
    (run / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_folder_that_was_trained_into_twice(run):
    rows = rows_of(run)
    earlier = [{**row, "time": 1e3, "bbox/AP": 99.0} for row in rows]
    write_rows(run, earlier + rows)
    found = read_finished_run(run)
    assert found.seconds_per_iteration < 1e3 and found.box_ap["second"] != 99.0
    write_rows(run, rows + [{"iteration": 1, "total_loss": 1.0}])
    with pytest.raises(UserError, match="done 2 of 5 iterations"):
        read_finished_run(run)


def test_memory_and_several_test_sets(run):
    record = json.loads((run / "training.json").read_text())
    record["config"] = record["config"].replace("TEST:\n  - second", "TEST:\n  - a\n  - b")
    (run / "training.json").write_text(json.dumps(record))
    ap = {"iteration": 5, "a/bbox/AP": 12.345, "b/bbox/AP": float("nan")}
    ap["inference/memory_mib"] = 812.0
    write_rows(run, [row for row in rows_of(run) if "bbox/AP" not in row] + [ap])
    found = read_finished_run(run)
    assert (found.memory_mib, found.box_ap) == (812, {"a": 12.35, "b": None})


def drop(name):
    return lambda run: (run / name).unlink()


def put(name, content):
    return lambda run: (run / name).write_bytes(content)


def only_rows(keep):
    return lambda run: write_rows(run, [row for row in rows_of(run) if keep(row)])


def earlier_checkpoint(run):
    torch.save({"model": {}, "iteration": 3}, run / "model_final.pth")


def no_training(run):
    torch.save({"model": {}}, run / "model_final.pth")


def unknown_key(run):
    record = json.loads((run / "training.json").read_text())
    record["config"] = "UNKNOWN: 1\n" + record["config"]
    (run / "training.json").write_text(json.dumps(record))


def other_weights(run):
    checkpoint = torch.load(run / "model_final.pth")
    checkpoint["model"]["head.bbox_pred.bias"] = torch.zeros(4)
    torch.save(checkpoint, run / "model_final.pth")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shutil.rmtree, "there is no folder"),
        (drop("model_final.pth"), "model_final.pth does not exist: the training is not finished"),
        (drop("metrics.json"), "metrics.json cannot be read (No such file or directory)"),
        (only_rows(lambda row: "total_loss" not in row), "has done 0 of 5 iterations"),
        (only_rows(lambda row: "bbox/AP" not in row), "no evaluation of its final weights"),
        (put("metrics.json", b""), "has done 0 of 5 iterations"),
        (put("model_final.pth", b"PK\x03\x04 cut off"), "not a file of weights, or a damaged one"),
        (put("model_final.pth", b""), "not a file of weights, or a damaged one"),
        (no_training, "is not a checkpoint of a training (it has no iteration)"),
        (put("training.json", b"{"), "training.json is not a complete JSON file"),
        (put("training.json", b'{"config": "[1"}'), "is damaged (it is not valid YAML"),
        (put("training.json", b'{"config": "A: 1"}'), "does not say for how many iterations"),
        (unknown_key, "is not one of this version (Non-existent config key"),
        (earlier_checkpoint, "is of iteration 4 and not of the last one, 5"),
        (other_weights, "head.bbox_pred.bias is missing, not expected or of another shape (1 such"),
        (drop("training.json"), "does not say which config it was trained with: give --name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(run, tmp_path, capsys, damage, sentence):
    """One sentence, exit code 2, nothing written."""
    damage(run)
    with pytest.raises(SystemExit) as stop:
        export_zoo(["--run", str(run), "--zoo", str(tmp_path / "zoo")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("ghm-d2 export-zoo: error: ") and error.count("\n") == 1
    assert sentence in error
    assert not [p for p in (tmp_path / "zoo").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model_id": 0}, "the id must be at least 1"),
        ({"name": "../out"}, "must be words joined by slashes"),
        ({"name": ""}, "must be words joined by slashes"),
    ],
)
def test_bad_names(finished, tmp_path, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        export_run(finished["retinanet"], tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_command_says_what_it_wrote(finished, tmp_path, capsys):
    words = ["--run", finished["retinanet"], "--zoo", str(tmp_path), "--id", "4", "--name", "a/b"]
    export_zoo(words)
    files = capsys.readouterr().out.split()
    assert sorted(files) == sorted(str(p) for p in (tmp_path / "a" / "b" / "4").iterdir())
    assert len(files) == 4


def test_run_without_record(run, tmp_path, caplog):
    """Of an earlier version: what is not known stays empty, and that is said."""
    (run / "training.json").unlink()
    rows = [{k: v for k, v in row.items() if "inference/" not in k} for row in rows_of(run)]
    write_rows(run, rows)
    (run / "metrics.json").write_text((run / "metrics.json").read_text() + '{"cut o')
    export_run(run, tmp_path / "zoo", name="old")
    (entry,) = json.loads((tmp_path / "zoo" / "index.json").read_text())["models"]
    assert entry["hardware"] is entry["commit"] is entry["seconds_per_image"] is None
    assert "stay unknown" in caplog.text and "metrics.json: 1 damaged line" in caplog.text


PYTHON_CONFIG = """\
dataloader:
  test: {dataset: {names: second}}
  train: {dataset: {names: [first]}, total_batch_size: 2}
model: {_target_: ghm_d2.modeling.GHMRetinaNet}
train: {max_iter: 5, output_dir: /home/somebody/out, device: cpu}
"""


def test_run_of_a_python_config(run, tmp_path, monkeypatch, caplog):
    record = json.loads((run / "training.json").read_text())
    record |= {"config": PYTHON_CONFIG, "config_file": str(ROOT / "configs/lazy/ghm_x.py")}
    (run / "training.json").write_text(json.dumps(record))
    folder = export_run(run, tmp_path / "zoo")
    assert folder == tmp_path / "zoo" / "lazy" / "ghm_x" / "1"
    assert not (folder / "config_stock.yaml").exists() and "is a Python config" in caplog.text
    text = (folder / "config.yaml").read_text()
    assert "GHMRetinaNet" in text and "somebody" not in text
    (entry,) = json.loads((tmp_path / "zoo" / "index.json").read_text())["models"]
    assert (entry["python"], entry["stock"], entry["images_per_batch"]) == (True, False, 2)
    assert (entry["train_data"], list(entry["box_ap"])) == (["first"], ["second"])
    monkeypatch.setenv("GHM_D2_ZOO", str(tmp_path / "zoo"))
    weights = load_file(model_zoo.get_checkpoint_url("lazy/ghm_x.yaml"))["model"]
    assert "head.cls_score.weight" in weights and not any("ghm_" in name for name in weights)
    with pytest.raises(model_zoo.ZooError, match="was trained with a Python config"):
        model_zoo.get("lazy/ghm_x.yaml", trained=True)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/gone/checkout/configs/quickstart/ghm_retinanet_quickstart.yaml",
         "quickstart/ghm_retinanet_quickstart"),
        ("/site-packages/ghm_d2/configs/mmdet/ghm_retinanet_R_50.yaml",
         "mmdet/ghm_retinanet_R_50"),
        ("/gone/configs/lazy/ghm_fcos_R_50.py", "lazy/ghm_fcos_R_50"),
        ("/gone/configs/ghm_retinanet_R_50.yaml", "ghm_retinanet_R_50"),
        ("/home/somebody/mine/cells.yaml", "cells"),
        ("cells.yaml", "cells"),
    ],
)  # fmt: skip
def test_name_wherever_the_checkout_lies(run, tmp_path, file, name):
    record = json.loads((run / "training.json").read_text())
    (run / "training.json").write_text(json.dumps(record | {"config_file": file}))
    assert export_run(run, tmp_path / "zoo") == tmp_path / "zoo" / name / "1"


def test_detector_that_stock_detectron2_lacks():
    cfg = small_config("ghm_retinanet_R_50")
    ours, stock = small_model("ghm_retinanet_R_50"), small_config("ghm_retinanet_R_50")
    stock.MODEL.META_ARCHITECTURE = "RetinaNet"
    assert stock_obstacle(cfg, torch.nn.Identity()) is None
    assert stock_obstacle(cfg, ours) == "GHMRetinaNet"
    cfg.MODEL.GHM.CLIP_BEFORE_NMS = True
    assert stock_obstacle(cfg, torch.nn.Identity()) == "MODEL.GHM.CLIP_BEFORE_NMS"


def test_backbone_that_stock_detectron2_lacks():
    """Its settings lie in MODEL.GHM, which the stock config lacks; all weights come out."""
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "ghm_retinanet_MobileNetV2.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    trained = build_model(cfg)
    stock = stock_config(cfg)
    model = build_stock_model(stock, cfg.MODEL.GHM)
    assert type(model).__name__ == "RetinaNet" and "GHM" not in stock.MODEL
    assert stock_obstacle(cfg, model) == f"the backbone {cfg.MODEL.BACKBONE.NAME}"
    assert model.load_state_dict(stock_weights(trained.state_dict(), model)).missing_keys == []


def test_stock_config_keeps_the_rest():
    cfg = small_config("ghm_faster_rcnn_R_50_ghm_c", "MODEL.PROPOSAL_GENERATOR.NAME", "GHMRPN")
    cfg.freeze()
    stock = stock_config(cfg)
    assert stock.MODEL.PROPOSAL_GENERATOR.NAME == "RPN"
    assert stock.MODEL.ROI_HEADS.NAME == "StandardROIHeads"
    assert stock.MODEL.ROI_HEADS.NUM_CLASSES == NUM_CLASSES
    assert not stock.SOLVER.CLIP_GRADIENTS.ENABLED and cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    model = small_model("ghm_faster_rcnn_R_50_ghm_c")
    kept = stock_weights(model.state_dict(), type(model)(**parts_without_losses(model)))
    assert not any("ghm_" in name for name in kept) and len(kept) > 100


def parts_without_losses(model):
    predictor = model.roi_heads.box_predictor
    predictor.ghm_c = predictor.ghm_r = None
    return {
        "backbone": model.backbone,
        "proposal_generator": model.proposal_generator,
        "roi_heads": model.roi_heads,
        "pixel_mean": [0.0, 0.0, 0.0],
        "pixel_std": [1.0, 1.0, 1.0],
    }
