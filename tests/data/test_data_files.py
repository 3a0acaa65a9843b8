"""Each small annotation file through check, look, split, registration, loader and evaluation."""

import json
import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from ghm_d2.cli import check_data, look, split_data
from ghm_d2.data import register_coco_dataset, register_datasets
from ghm_d2.data.annotations import Uses
from ghm_d2.data.readable import ReadableMapper, UnusableData
from ghm_d2.data.registration import log_more_objects_than
from ghm_d2.engine import GHMTrainer, main
from ghm_d2.engine.evaluation import AllThresholdsCOCOEvaluator
from ghm_d2.errors import UserError
from tests.data_files import CASES, MASK_CASES, Case, every, one, rle
from tests.detectors import small_config
from tests.tiny import RETINANET, coco_content, forget_program, one_sentence, tiny_pairs, write_coco

BOXES = Uses(masks="", keypoints=False)
MASK_RCNN = str(Path(__file__).parents[2] / "configs" / "ghm_faster_rcnn_R_50.yaml")


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


def perfect_ap(name, records, folder, **options):
    """AP of predictions that are the ground truth itself."""
    evaluator = AllThresholdsCOCOEvaluator(
        name, tasks=("bbox",), output_dir=str(folder), allow_cached_coco=False, **options
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
def test_check_look_and_split(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(look, "draw_histograms", lambda *_: None)  # half of the time
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


TRAINED = (
    "crowd null", "image ids mixed", "polygon flat", "masks of another size", "keypoints odd",
    "names of another machine",
)  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_training_and_evaluation(tmp_path, name):
    case = CASES[name]
    pairs = [
        "{}={},{}".format(part, *case.write(tmp_path / part, part)) for part in ("mine", "other")
    ]
    out = tmp_path / "out"
    options = tiny_pairs(OUTPUT_DIR=out, MODEL__RETINANET__SCORE_THRESH_TEST=0.0)
    main(["--config-file", RETINANET, "--dataset", *pairs, *options])
    results = json.loads((out / "inference" / "results.json").read_text())
    assert 0 <= results["bbox/AP"] <= 100
    forget_program()
    options = [*options, "MODEL.WEIGHTS", str(out / "model_final.pth")]
    main(["--config-file", RETINANET, "--eval-only", "--dataset", pairs[1], *options])
    assert json.loads((out / "inference" / "results.json").read_text()) == results


def test_odd_keypoints_stop_a_keypoint_head(tmp_path, capsys):
    file, images = CASES["keypoints odd"].write(tmp_path)
    argv = ["--config-file", MASK_RCNN, "--dataset", f"case={file},{images}"]
    argv += tiny_pairs(MODEL__KEYPOINT_ON=True, OUTPUT_DIR=tmp_path / "out")
    sentence = one_sentence(main, argv, capsys, "train_net.py")
    assert "the keypoints of annotation 1 are not" in sentence and "KEYPOINT_ON False" in sentence


@pytest.mark.parametrize("annotations", [[], None])
def test_a_test_set_without_annotations(tmp_path, capsys, annotations):
    change = Case(lambda content: content.update(annotations=annotations))
    file, images = change.write(tmp_path)
    assert code_of(check_data.main, file, images, "--unlabelled") == 0
    assert "No problem found." in capsys.readouterr().out
    cfg = tiny_pairs(OUTPUT_DIR=tmp_path / "out", MODEL__RETINANET__SCORE_THRESH_TEST=0.0)
    torch.save({"model": small_weights(cfg)}, tmp_path / "weights.pth")
    main(
        ["--config-file", RETINANET, "--eval-only", "--dataset", f"case={file},{images}", *cfg]
        + ["MODEL.WEIGHTS", str(tmp_path / "weights.pth")]
    )
    found = json.loads((tmp_path / "out" / "inference" / "coco_instances_results.json").read_text())
    assert {row["image_id"] for row in found} == set(range(1, 7))


def small_weights(pairs):
    """Of a detector of three classes."""
    cfg = small_config("ghm_retinanet_R_50", *pairs, "MODEL.RETINANET.NUM_CLASSES", "3")
    return GHMTrainer.build_model(cfg).state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_of_broken_images_stops(tmp_path, capsys, workers):
    file, images = CASES["clean"].write(tmp_path)
    for image in images.iterdir():
        image.write_bytes(image.read_bytes()[:2000])  # the header is whole
    argv = ["--config-file", RETINANET, "--dataset", f"case={file},{images}"]
    argv += tiny_pairs(OUTPUT_DIR=tmp_path / "out", DATALOADER__NUM_WORKERS=workers)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert "all of the 6 images cannot be used, the last " in error and "truncated" in error


def test_a_fault_of_annotations_is_not_the_disk_s(tmp_path):
    file, images = Case(every(segmentation=rle)).write(tmp_path)
    register_datasets([f"case={file},{images}"])
    cfg = small_config("ghm_faster_rcnn_R_50", *tiny_pairs(MODEL__MASK_ON=True))
    mapper = ReadableMapper(DatasetMapper(cfg, True), is_train=True)
    with pytest.raises(UnusableData, match="annotations of .*0.png cannot be used .*mask_format"):
        mapper(DatasetCatalog.get("case")[0])


def test_many_objects_are_named_and_all_of_them_count(tmp_path, caplog):
    def many(content):
        content["annotations"] = [
            {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [i % 20 * 3, i // 20 * 4, 2, 3]}
            for i in range(300)
        ]

    file, images = Case(many).write(tmp_path)
    register_datasets([f"case={file},{images}"])
    log_more_objects_than(100, "case")
    assert "an image of case has 300 objects" in caplog.text
    assert "give TEST.DETECTIONS_PER_IMAGE 300" in caplog.text
    caplog.clear()
    log_more_objects_than(300, "case")
    assert not caplog.text
    records = DatasetCatalog.get("case")
    few = perfect_ap("case", records, tmp_path / "out")
    assert few["AP"] == pytest.approx(34, abs=2)
    all_of_them = perfect_ap("case", records, tmp_path / "out", max_dets_per_image=300)
    assert all_of_them["AP"] == pytest.approx(100)
    assert perfect_ap("case", records, tmp_path / "out", max_dets_per_image=10)["AP"] == few["AP"]


def test_the_trainer_s_evaluator_follows_the_config(tmp_path):
    register_datasets([f"case={write_coco(tmp_path)}"])
    cfg = small_config("ghm_retinanet_R_50", *tiny_pairs(OUTPUT_DIR=tmp_path))
    cfg.DATASETS.TEST, cfg.TEST.DETECTIONS_PER_IMAGE = ("case",), 250
    assert GHMTrainer.build_evaluator(cfg, "case")._max_dets_per_image == [1, 10, 250]


def test_images_that_two_sets_share(tmp_path, caplog):
    first = write_coco(tmp_path / "a", "a")
    second = write_coco(tmp_path / "b", "b")
    for i in (2, 3, 4, 5):  # two images of b are still those of a
        file = tmp_path / "b" / "images" / f"{i}.png"
        file.write_bytes(file.read_bytes() + bytes([i]))
    (tmp_path / "b" / "images" / "0.png").rename(tmp_path / "b" / "images" / "new.png")
    content = coco_content()
    content["images"][0]["file_name"] = "new.png"
    (tmp_path / "b" / "b.json").write_text(json.dumps(content))
    register_datasets([f"a={first}", f"b={second}"])
    assert "2 of the 6 images of b have the same content as images of a" in caplog.text
    assert "the first: new.png" in caplog.text


def test_copies_within_a_set_are_worth_knowing(tmp_path, capsys):
    file, images = CASES["clean"].write(tmp_path)
    (images / "5.png").write_bytes((images / "0.png").read_bytes())
    assert code_of(check_data.main, file, images) == 0
    assert "1 images have the same content as another one" in capsys.readouterr().out


def test_another_process_reads_the_same(tmp_path):
    for name in ("names with backslashes", "image ids mixed", "sizes missing", "gzip"):
        file, images = CASES[name].write(tmp_path / name.replace(" ", "_"))
        (dataset,) = register_datasets([f"case={file},{images}"], uses=BOXES)
        records = DatasetCatalog.get("case")
        sent = pickle.loads(pickle.dumps(dataset))
        assert sent.data is None
        forget_program()
        register_coco_dataset(sent)
        assert DatasetCatalog.get("case") == records
        assert MetadataCatalog.get("case").get("json_file") is None
        forget_program()


def test_masks_are_not_compared_with_objects_that_have_none(tmp_path):
    file, images = Case(one(segmentation=[])).write(tmp_path)
    register_datasets([f"case={file},{images}"], uses=Uses("polygon"))
    evaluator = AllThresholdsCOCOEvaluator("case", output_dir=str(tmp_path))
    assert evaluator._tasks_from_predictions([{"segmentation": {}, "bbox": []}]) == ["bbox"]
