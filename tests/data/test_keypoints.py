"""--dataset with keypoints: what is registered, trained on and evaluated, and what is refused."""

import json
import logging
import re
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin_meta

from ghm_d2.data import check_coco_dataset, parse_dataset, register_coco_dataset
from ghm_d2.data.keypoints import check_keypoints, convert_incomplete, mirrored_pairs
from ghm_d2.engine import main
from ghm_d2.errors import UserError
from tests.tiny import ROOT, coco_content, forget_program, one_sentence, unregister_all, write_coco

NAMES = ["nose", "left_eye", "right_eye"]
CONFIG = str(Path(__file__).parents[2] / "configs" / "ghm_faster_rcnn_R_50.yaml")
SMALL = [
    "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "8", "MODEL.RESNETS.WIDTH_PER_GROUP", "4",
    "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "SEED", "1",
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.MAX_ITER", "2", "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "20",
]  # fmt: skip
THREE = ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3"]
SIGMAS = ["TEST.KEYPOINT_OKS_SIGMAS", "[0.05, 0.05, 0.05]"]


def content(names=NAMES, number=3, every=1, num_keypoints=True):
    """Every ``every``-th annotation has ``number`` keypoints inside its box."""
    made = coco_content()
    if names:
        for category in made["categories"]:
            category["keypoints"] = list(names)
    for i, annotation in enumerate(made["annotations"]):
        if i % every == 0:
            x, y, *_ = annotation["bbox"]
            annotation["keypoints"] = [v for k in range(number) for v in (x + k, y + 2 * k, 2)]
            if num_keypoints:
                annotation["num_keypoints"] = number
    return made


def checked(folder, made, name="points"):
    return check_coco_dataset(parse_dataset(f"{name}={write_coco(folder, name, made)}"))


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()
    unregister_all()


def test_pairs_are_those_of_detectron2_s_persons():
    pairs = mirrored_pairs(builtin_meta.COCO_PERSON_KEYPOINT_NAMES)
    assert pairs == builtin_meta.COCO_PERSON_KEYPOINT_FLIP_MAP


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (("L_Ear", "R_Ear", "tail"), (("L_Ear", "R_Ear"),)),
        (("eye left", "eye right"), (("eye left", "eye right"),)),
        (("rightEye", "leftEye"), (("rightEye", "leftEye"),)),
        (("bright", "left", "tail", "l"), ()),
        (("left_a", "left_b"), ()),
        ((), ()),
    ],
)
def test_pairs(names, pairs):
    assert mirrored_pairs(names) == pairs


def test_what_is_registered(tmp_path):
    dataset = checked(tmp_path, content())
    assert dataset.evaluable
    register_coco_dataset(dataset)
    metadata = MetadataCatalog.get("points")
    assert metadata.keypoint_names == NAMES and metadata.num_keypoints == 3
    assert metadata.keypoint_flip_map == (("left_eye", "right_eye"),)
    # Pixel indices become coordinates of their middle.
    first = DatasetCatalog.get("points")[0]["annotations"][0]
    assert first["keypoints"][:6] == [8.5, 10.5, 2, 9.5, 12.5, 2]


def test_annotations_without_keypoints_are_not_labelled(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    caplog.set_level(logging.INFO)
    dataset = checked(tmp_path, content(every=3))
    assert "8 annotations have no keypoints" in caplog.text
    register_coco_dataset(dataset)
    metadata = MetadataCatalog.get("points")
    assert metadata.json_file == dataset.json_file  # for boxes alone
    convert_incomplete(metadata)  # pycocotools wants keypoints of all
    assert not hasattr(metadata, "json_file")
    found = [a["keypoints"] for r in DatasetCatalog.get("points") for a in r["annotations"]]
    assert sum(values == [0.0] * 9 for values in found) == 8 and len(found) == 12


def test_files_without_keypoints_are_as_before(tmp_path):
    dataset = checked(tmp_path, content(every=100) | coco_content())
    assert dataset.keypoints.number == 0 and dataset.evaluable
    register_coco_dataset(dataset)
    assert MetadataCatalog.get("points").get("keypoint_names") is None
    assert "keypoints" not in DatasetCatalog.get("points")[0]["annotations"][0]


def change_names(made):
    made["categories"][1]["keypoints"] = ["a", "b", "c"]


def change_number(made):
    made["annotations"][2]["keypoints"] = [1, 2, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_names, "the categories 'disc' and 'bar' list different keypoints"),
        (change_number, "annotation 3 are not 9 numbers"),
    ],
)
def test_what_boxes_alone_can_do_without(tmp_path, change, words):
    made = content()
    change(made)
    register_coco_dataset(checked(tmp_path, made))
    assert len(DatasetCatalog.get("points")) == 6
    metadata = MetadataCatalog.get("points")
    assert metadata.get("keypoint_names") is None
    with pytest.raises(UserError, match=f"KEYPOINT_ON is True, but .*{words}.*KEYPOINT_ON False"):
        check_keypoints("points", metadata, 3, mirrored=False)


@pytest.mark.parametrize("values", [["x"] * 9, {"nose": 1}, [float("nan")] * 9, 7])
def test_what_is_no_list_of_numbers_trains_boxes_alone(tmp_path, values):
    made = content()
    made["annotations"][2]["keypoints"] = values
    dataset = checked(tmp_path, made)
    assert dataset.keypoints.number == 0
    assert "annotation 3 are not 9 numbers" in dataset.keypoints.fault
    register_coco_dataset(dataset)
    annotations = [a for record in DatasetCatalog.get("points") for a in record["annotations"]]
    assert len(annotations) == 12 and not any("keypoints" in a for a in annotations)


def test_numbers_as_text_are_read(tmp_path):
    made = content()
    made["annotations"][0]["keypoints"] = list(map(str, made["annotations"][0]["keypoints"]))
    dataset = checked(tmp_path, made)
    assert dataset.keypoints.number == 3 and dataset.keypoints.incomplete
    register_coco_dataset(dataset)
    first = DatasetCatalog.get("points")[0]["annotations"][0]
    assert first["keypoints"][:6] == [8.5, 10.5, 2, 9.5, 12.5, 2]


@pytest.mark.parametrize(
    ("made", "opts", "words"),
    [
        (coco_content(), THREE, "has no keypoints.*MODEL.KEYPOINT_ON False"),
        (content(), [], "NUM_KEYPOINTS 3"),
        (content(()), THREE, "does not name its keypoints.*INPUT.RANDOM_FLIP none"),
        (content(), THREE, r"KEYPOINT_OKS_SIGMAS.*\[0.05, 0.05, 0.05\]"),
    ],
    ids=["none", "number", "names", "tolerances"],
)
def test_what_a_keypoint_head_cannot_train_on(tmp_path, capsys, made, opts, words):
    pair = f"points={write_coco(tmp_path, 'points', made)}"
    test = f"val={write_coco(tmp_path, 'val', made)}"
    argv = ["--config-file", CONFIG, "--dataset", pair, test, *SMALL, *opts]
    sentence = one_sentence(main, [*argv, "OUTPUT_DIR", tmp_path / "out"], capsys, "train_net.py")
    assert re.search(words, sentence), sentence


PYTHON = f"""
from detectron2 import model_zoo
from detectron2.config import LazyConfig

_cfg = LazyConfig.load("{ROOT}/configs/lazy/ghm_faster_rcnn_R_50.py")
model, optimizer, lr_multiplier = _cfg.model, _cfg.optimizer, _cfg.lr_multiplier
dataloader, train = _cfg.dataloader, _cfg.train
_points = model_zoo.get_config("common/models/keypoint_rcnn_fpn.py").model.roi_heads
for _name in ("keypoint_in_features", "keypoint_pooler", "keypoint_head"):
    model.roi_heads[_name] = _points[_name]
model.roi_heads.keypoint_head.num_keypoints = 3
dataloader.train.mapper.use_keypoint = True
train.update(init_checkpoint="", device="cpu")
"""


@pytest.mark.parametrize(
    ("made", "opts", "words"),
    [
        (coco_content(), [], "use_keypoint is True, but .*has no keypoints.*_in_features=null"),
        (
            content(),
            ["model.roi_heads.keypoint_head.num_keypoints=17"],
            "give model.roi_heads.keypoint_head.num_keypoints=3",
        ),
        (content(()), [], "take RandomFlip out of dataloader.train.mapper.augmentations"),
        (content(), [], r"dataloader.evaluator.kpt_oks_sigmas=\"\[0.05, 0.05, 0.05\]"),
    ],
    ids=["none", "number", "names", "tolerances"],
)
def test_a_python_config_is_told_the_same(tmp_path, capsys, made, opts, words):
    (tmp_path / "points.py").write_text(PYTHON)
    pair = f"points={write_coco(tmp_path, 'points', made)}"
    test = f"val={write_coco(tmp_path, 'val', made)}"
    argv = ["--config-file", tmp_path / "points.py", "--dataset", pair, test, *opts]
    argv += [f"train.output_dir={tmp_path / 'out'}"]
    sentence = one_sentence(main, argv, capsys, "train_net.py")
    assert re.search(words, sentence), sentence


def test_a_python_config_with_faulty_keypoints_is_told_so(tmp_path, capsys):
    (tmp_path / "points.py").write_text(PYTHON)
    made = content()
    change_number(made)
    pair = f"points={write_coco(tmp_path, 'points', made)}"
    argv = ["--config-file", tmp_path / "points.py", "--dataset", pair]
    argv += [f"train.output_dir={tmp_path / 'out'}"]
    sentence = one_sentence(main, argv, capsys, "train_net.py")
    assert "use_keypoint is True, but" in sentence and "annotation 3 are not 9 numbers" in sentence


@pytest.mark.parametrize(
    ("made", "opts"),
    [
        (content(), []),
        (content(every=3, num_keypoints=False), []),
        (content(()), ["INPUT.RANDOM_FLIP", "none"]),
    ],
    ids=["complete", "some", "no names"],
)
def test_training_and_evaluation(tmp_path, made, opts):
    train = f"points={write_coco(tmp_path, 'points', made)}"
    test = f"val={write_coco(tmp_path, 'val', made)}"
    out = tmp_path / "out"
    argv = ["--config-file", CONFIG, "--dataset", train, test, *SMALL, *THREE, *SIGMAS, *opts]
    main([*argv, "OUTPUT_DIR", str(out)])
    results = json.loads((out / "inference" / "results.json").read_text())
    assert "keypoints/AP" in results and "bbox/AP" in results
    steps = map(json.loads, (out / "metrics.json").read_text().splitlines())
    assert any(step.get("loss_keypoint", 0) > 0 for step in steps)


def test_a_test_set_without_annotations(tmp_path):
    made = {key: rows for key, rows in content().items() if key != "annotations"}
    out = tmp_path / "out"
    argv = ["--config-file", CONFIG, "--eval-only", "--dataset"]
    argv += [f"val={write_coco(tmp_path, 'val', made)}", *SMALL, *THREE, "OUTPUT_DIR", str(out)]
    # Random heat maps hold NaN, which Detectron2 does not take.
    main([*argv, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0"])
    assert json.loads((out / "inference" / "coco_instances_results.json").read_text()) == []
