"""Each small annotation file through check, look, split, registration, loader and evaluation."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from data_files import CASES, MASK_CASES, Case
from detectors import small_config
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.structures import Boxes, BoxMode, Instances
from tiny import forget_program, one_sentence, tiny_pairs

from ghm_d2.cli import check_data, look, split_data
from ghm_d2.data import Uses, register_datasets
from ghm_d2.engine import main
from ghm_d2.engine.evaluation import AllThresholdsCOCOEvaluator
from ghm_d2.errors import UserError

BOXES = Uses(masks="", keypoints=False)
MASK_RCNN = str(Path(__file__).parents[1] / "configs" / "ghm_faster_rcnn_R_50.yaml")


@pytest.fixture(autouse=True)
def clean_up(monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    yield
    forget_program()


def code_of(command, *words):
    """Exit code of a command of ghm-d2."""
    try:
        command([str(word) for word in words])
    except SystemExit as stop:
        return stop.code
    return 0


def trained(records, cfg):
    """Objects that Detectron2's mapper hands to the model."""
    mapper = DatasetMapper(cfg, is_train=True)
    return sum(len(mapper(record)["instances"]) for record in records)


def perfect_ap(name, records, folder):
    """AP of predictions that are the ground truth itself."""
    evaluator = AllThresholdsCOCOEvaluator(
        name, tasks=("bbox",), output_dir=str(folder), allow_cached_coco=False
    )
    evaluator.reset()
    for record in records:
        rows = [a for a in record["annotations"] if not a["iscrowd"]]
        found = Instances((record["height"], record["width"]))
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in rows]
        found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        found.scores = torch.ones(len(rows))
        found.pred_classes = torch.tensor([a["category_id"] for a in rows], dtype=torch.int64)
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("name", CASES)
def test_registration_loader_and_evaluation(tmp_path, caplog, name):
    case = CASES[name]
    file, images = case.write(tmp_path)
    caplog.set_level(logging.WARNING, "ghm_d2")
    argument = [f"case={file},{images}"]
    if case.objects is None:
        with pytest.raises(UserError) as error:
            register_datasets(argument, uses=BOXES)
        text = str(error.value)
        assert re.search(case.words, text) and text.startswith(str(file)) and "\n" not in text
        return
    register_datasets(argument, uses=BOXES)
    warned = "\n".join(r.getMessage() for r in caplog.records)
    assert re.search(case.words, warned) if case.words else not warned
    records = DatasetCatalog.get("case")
    assert trained(records, small_config("ghm_retinanet_R_50", *tiny_pairs())) == case.objects
    results = perfect_ap("case", records, tmp_path / "out")
    # 24 x 30 pixels, and all that this says of sizes
    assert results["AP"] == pytest.approx(100) and results["APs"] == pytest.approx(100)


@pytest.mark.parametrize("name", CASES)
def test_check_look_and_split(tmp_path, capsys, caplog, name):
    case = CASES[name]
    file, images = case.write(tmp_path)
    code = code_of(check_data.main, file, images)
    output = capsys.readouterr()
    if case.objects is None:
        assert code == 1 and "Training refuses:" in output.out or code == 2
    elif case.words:
        assert code == 1 and "Training refuses:" not in output.out
    drawn = code_of(
        look.main,
        "--dataset",
        f"case={file},{images}",
        "--output",
        tmp_path / "look",
        "--images",
        "1",
    )
    output = capsys.readouterr()
    assert drawn == (2 if case.objects is None else 0) and "Traceback" not in output.err
    if case.objects is not None:
        summary = (tmp_path / "look" / "case_summary.txt").read_text()
        assert f"6 images, {case.objects} boxes" in summary
    takes = case.objects is not None if case.split is None else case.split
    assert code_of(split_data.main, file, "--output-dir", tmp_path / "split") == (0 if takes else 2)
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    if takes:
        parts = [
            json.loads((tmp_path / "split" / f"{n}.json").read_text()) for n in ("train", "val")
        ]
        rows = [row for part in parts for row in part["annotations"]]
        boxes = sum(not row["iscrowd"] for row in rows)
        assert boxes == (case.objects or 12) and sum(len(p["images"]) for p in parts) == 6


@pytest.mark.parametrize("name", MASK_CASES)
def test_masks(tmp_path, caplog, capsys, name):
    change, mask_format, objects, words = MASK_CASES[name]
    file, images = Case(change).write(tmp_path)
    caplog.set_level(logging.WARNING, "ghm_d2")
    pairs = tiny_pairs(
        MODEL__MASK_ON=True, INPUT__MASK_FORMAT=mask_format, OUTPUT_DIR=tmp_path / "out"
    )
    argv = ["--config-file", MASK_RCNN, "--dataset", f"case={file},{images}", *pairs]
    if objects is None:
        assert re.search(words, one_sentence(main, argv, capsys, "train_net.py"))
        return
    cfg = small_config("ghm_faster_rcnn_R_50", *pairs)
    register_datasets([f"case={file},{images}"], uses=Uses.of(cfg))
    warned = "\n".join(r.getMessage() for r in caplog.records)
    assert re.search(words, warned) if words else not warned
    records = DatasetCatalog.get("case")
    mapper = DatasetMapper(cfg, is_train=True)
    masks = [mapper(record)["instances"].gt_masks for record in records]
    assert sum(map(len, masks)) == objects
