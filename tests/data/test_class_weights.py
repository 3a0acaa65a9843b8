"""CLASS_WEIGHT by number, by name and balanced, down to the loss."""

import itertools
from collections import Counter

import pytest

from ghm_d2.data import register_datasets
from ghm_d2.data.class_weights import class_weights
from ghm_d2.data.loader import build_train_loader
from ghm_d2.engine import main
from ghm_d2.engine.setup import build_config
from ghm_d2.modeling.build import build_losses
from tests.detectors import small_config
from tests.tiny import RETINANET, coco_content, forget_program, one_sentence, tiny_pairs, write_coco

KEY = "MODEL.GHM.RETINANET.CLS.CLASS_WEIGHT"


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


def weights(tmp_path, text, content=None):
    data = write_coco(tmp_path, content=content)
    cfg, _ = build_config(
        RETINANET, [*tiny_pairs(OUTPUT_DIR=tmp_path), KEY, text], [f"w={data}"], log_to_file=False
    )
    return cfg.MODEL.GHM.RETINANET.CLS.CLASS_WEIGHT, build_losses(cfg, "RETINANET")["ghm_c"]


def test_names_numbers_and_balance_reach_the_loss(tmp_path):
    assert weights(tmp_path, "1 2.5 0")[1].class_weight.tolist() == [1, 2.5, 0]
    assert weights(tmp_path, "cup=3, disc = 0.5")[1].class_weight.tolist() == [0.5, 1, 3]
    assert weights(tmp_path, "")[1].class_weight is None
    content = coco_content()
    rows = content["annotations"]
    rows[0]["iscrowd"] = 1  # counts for nothing
    content["annotations"] = [row for row in rows if row["category_id"] != 2 or row["id"] == 2]
    # 3 discs without the crowd, 1 bar, 4 cups
    stored, loss = weights(tmp_path, "balanced", content)
    numbers = [float(word) for word in stored.split()]
    assert numbers == pytest.approx([8 / 9, 8 / 3, 2 / 3], abs=1e-4)
    assert loss.class_weight.tolist() == pytest.approx(numbers)


def test_a_class_without_objects_counts_as_any_other():
    found = class_weights("balanced", ("a", "b", "c"), Counter({0: 6, 1: 3}), "KEY")
    assert found == [0.5, 1, 1]


def test_both_heads_have_it():
    cfg = small_config("ghm_faster_rcnn_R_50_ghm_c", *tiny_pairs())
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.GHM.ROI_BOX_HEAD.CLS.CLASS_WEIGHT = "1 2"
    cfg.MODEL.GHM.ROI_BOX_HEAD.CLS.ENABLED = True
    assert build_losses(cfg, "ROI_BOX_HEAD")["ghm_c"].class_weight.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 2", "for each of the 3 classes, with spaces"),
        ("1 2 -1", "got '1 2 -1'"),
        ("1 2 x", "got '1 2 x'"),
        ("[1, 2, 3]", "is of type str"),
        ("cub=2", "cub is not a class (similar: cup)"),
        ("cup", "got 'cup'"),
        ("cup=many", "got 'cup=many'"),
        ("balanced, cup=2", "got 'balanced'"),
    ],
)
def test_mistakes(tmp_path, capsys, text, words):
    pairs = [*tiny_pairs(OUTPUT_DIR=tmp_path / "o"), KEY, text]
    argv = ["--config-file", RETINANET, "--dataset", f"a={write_coco(tmp_path)}", *pairs]
    sentence = one_sentence(main, argv, capsys, "train_net.py")
    assert words in sentence and "CLASS_WEIGHT" in sentence


def test_a_baseline_has_none():
    cfg = small_config("ghm_retinanet_R_50", *tiny_pairs())
    cfg.MODEL.GHM.RETINANET.CLS.update(CLASS_WEIGHT="1 1 1", LOSS_TYPE="ohem")
    with pytest.raises(ValueError, match="CLASS_WEIGHT works with GHM-C alone"):
        build_losses(cfg, "RETINANET")


def test_detectron2_s_sampler_repeats_images_of_a_rare_class(tmp_path):
    content = coco_content(12)
    for row in content["annotations"]:
        row["category_id"] = 3 if row["image_id"] == 1 else 1
    content["categories"] = [row for row in content["categories"] if row["id"] != 2]
    register_datasets([f"rare={write_coco(tmp_path, content=content, images=12)}"])
    cfg = small_config(
        "ghm_retinanet_R_50", *tiny_pairs(), "DATASETS.TRAIN", ("rare",),
        "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler",
        "DATALOADER.REPEAT_THRESHOLD", 0.33,
    )  # fmt: skip
    batches = itertools.islice(build_train_loader(cfg, lambda record: record), 200)
    drawn = Counter(record["image_id"] for batch in batches for record in batch)
    others = (drawn.total() - drawn[1]) / 11
    assert drawn[1] / others == pytest.approx((0.33 * 12) ** 0.5, rel=0.15)
