"""The measurement of feature gradients: its losses are the detector's, its shares right."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from ghm_d2.errors import UserError
from ghm_d2.losses import GHMRLoss
from tests.detectors import NUM_CLASSES, TWO_IMAGES, batch, small_model
from tests.tiny import unregister_all, write_coco

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import feature_gradients as script  # noqa: E402
import gradient_measures as measures  # noqa: E402
import gradient_shares as shares  # noqa: E402
import gradient_variants as losses  # noqa: E402

CLS, BOX = "MODEL.GHM.RETINANET.CLS", "MODEL.GHM.RETINANET.REG"
OFF = (f"{CLS}.ENABLED", False, f"{BOX}.ENABLED", False)
BETA = ("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 1 / 9)


@pytest.fixture
def inputs():
    return [{**x, "image_id": i} for i, x in enumerate(batch(*TWO_IMAGES))]


def predictions_of(model, inputs):
    return script.predict(model, inputs, script.extract_features(model, inputs))


@pytest.mark.parametrize(
    "options, cls, box",
    [
        ((*OFF, *BETA), losses.Focal(), losses.SmoothL1()),
        ((f"{CLS}.LOSS_TYPE", "cross_entropy", f"{CLS}.LOSS_WEIGHT", 20.0), losses.CrossEntropy(),
         losses.GHMR(momentum=0.7)),
        ((), losses.GHMC(), losses.GHMR(momentum=0.7)),
        (("MODEL.GHM.RETINANET.SCOPE", "batch", f"{CLS}.BIAS_CORRECTION", True, f"{BOX}.MU", 0.1),
         losses.GHMC("batch", bias_correction=True), losses.GHMR("batch", 0.1, momentum=0.7)),
    ],
)  # fmt: skip
def test_the_losses_are_those_of_the_detector(inputs, options, cls, box):
    model = small_model("ghm_retinanet_R_50", "MODEL.GHM.RETINANET.IMAGES_PER_HISTOGRAM", 0,
                        *options)  # fmt: skip
    p = predictions_of(model, inputs)
    for _ in range(3):  # the running averages move
        with EventStorage():
            expected = model.losses(p.anchors, p.logits, list(p.labels), p.deltas, list(p.boxes))
        torch.testing.assert_close(cls(p), expected["loss_cls"])
        torch.testing.assert_close(box(p), expected["loss_box_reg"])


def test_gradients_are_those_of_a_backward_pass_and_leave_no_trace(inputs):
    model = small_model("ghm_retinanet_R_50", *OFF)
    with torch.no_grad():
        features = script.extract_features(model, inputs)
    features = [x.requires_grad_() for x in features]
    p = script.predict(model, inputs, features)
    head = torch.nn.ModuleList([model.head.cls_subnet, model.head.cls_score])
    variant = losses.GHMC(bias_correction=True)
    variant(p)
    before = {name: value.clone() for name, value in variant.state_dict().items()}
    found = [measures.measure_gradient(variant, p, p.logits, features, head) for _ in range(2)]
    assert all(torch.equal(x, before[name]) for name, x in variant.state_dict().items())
    assert found[0]["loss"] == found[1]["loss"]
    variant(p).backward()
    levels = [x.grad.norm().item() for x in features]
    assert found[0]["feature_norm_by_level"] == pytest.approx(levels, rel=1e-4)
    assert found[0]["feature_norm"] == pytest.approx(math.hypot(*levels), rel=1e-4)
    norms = [x.grad.norm().item() for x in head.parameters()]
    assert found[0]["head_norm"] == pytest.approx(math.hypot(*norms), rel=1e-4)
    expected = model.head.cls_score.weight.grad.flatten()
    torch.testing.assert_close(found[0]["direction"], expected, rtol=1e-4, atol=1e-7)


def hand_made():
    """Two levels of two anchors, three classes; the second level has no positive."""
    logits = [torch.zeros(1, 2, 3, requires_grad=True) for _ in range(2)]
    deltas = [torch.zeros(1, 2, 4, requires_grad=True) for _ in range(2)]
    anchors = [Boxes(torch.tensor([[0.0, 0, 8, 8], [4.0, 4, 12, 12]])) for _ in range(2)]
    labels, noisy = torch.tensor([[0, 3, -1, 3]]), torch.tensor([[1, 3, -1, 3]])
    boxes = torch.cat([a.tensor for a in anchors]).unsqueeze(0) + 2
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    return losses.Predictions(anchors, logits, deltas, labels, noisy, boxes, transform)


def measured(variant, p):
    # A head that is one number a level: its gradient is no concern of this test.
    scale = torch.nn.Conv2d(1, 1, 1)
    torch.nn.init.ones_(scale.weight)
    torch.nn.init.zeros_(scale.bias)
    features = [x.detach().clone().requires_grad_() for x in p.logits]
    p.logits = [x * scale.weight.view(()) + scale.bias for x in features]
    head = torch.nn.ModuleList([scale])
    return measures.measure_gradient(variant, p, p.logits, features, head)


def test_shares_of_a_hand_made_case():
    # Every logit that counts has |g| = 0.5: three of anchor 0, three of 1, three of 3.
    found = measured(losses.CrossEntropy(), hand_made())
    assert found["positives_share"] == pytest.approx(1 / 9)
    assert found["positives_share_by_level"] == pytest.approx([1 / 6, 0])
    assert found["share_by_level"] == pytest.approx([6 / 9, 3 / 9])
    assert found["share_of_levels_without_positives"] == pytest.approx(3 / 9)
    assert found["effective_examples"] == pytest.approx(9)
    assert found["wrong_label_share"] == 0
    # The wrong class and the right one of anchor 0.
    assert measured(losses.CrossEntropy(noisy=True), hand_made())[
        "wrong_label_share"
    ] == pytest.approx(2 / 9)


def test_whose_gradient_it_is_in_a_hand_made_case():
    """Nine logits of |g| = 0.5, two of them with a wrong label; |p - t| is 0.5 too."""
    found = shares.measure(losses.CrossEntropy(noisy=True), hand_made())
    assert found["by_level"] == [[0, 0], pytest.approx([2 / 9, 0]), pytest.approx([4 / 9, 3 / 9])]
    for kind, share in enumerate((0, 2 / 9, 7 / 9)):
        expected = [0.0] * shares.REGIONS
        expected[5] = pytest.approx(share)
        assert found["by_region"][kind] == expected
    assert found["effective_examples"] == pytest.approx(9)
    clean = shares.measure(losses.CrossEntropy(), hand_made())
    assert [sum(x) for x in clean["by_level"]] == pytest.approx([1 / 9, 0, 8 / 9])
    believed = shares.look(hand_made(), losses.CrossEntropy(noisy=True))
    assert believed == {"confident_negatives": 7, "p_right": 0, "p_given": 0.5, "p_true": 0.5}


def test_weights_and_regions_of_a_hand_made_case():
    found = measured(losses.GHMC("batch", momentum=0.0), hand_made())
    assert found["regions"] == [1] and found["largest_weight"] == pytest.approx([1 / 9])
    level = measured(losses.GHMC(momentum=0.0), hand_made())
    assert level["regions"] == [1, 1] and level["largest_weight"] == pytest.approx([1 / 6, 1 / 3])
    floored = losses.GHMC("batch", momentum=0.0, loss=losses.FlooredGHMC)
    assert measured(floored, hand_made())["largest_weight"] == pytest.approx([1 / 10])
    # Of its own density, the one positive weighs as much as the eight others.
    separate = measured(losses.GHMC("batch", momentum=0.0, separate=True), hand_made())
    assert separate["positives_share"] == pytest.approx(1 / 2)
    assert separate["largest_weight"] == pytest.approx([1, 1 / 8])


def test_box_targets_are_those_of_the_positives():
    p = hand_made()
    (deltas, targets), (none, _) = p.level_deltas()
    assert deltas.shape == (1, 4) and none.shape == (0, 4)
    assert targets.tolist() == [[0.25, 0.25, 0, 0]]  # moved by 2 of 8
    value = losses.GHMR("level", momentum=0.0)(p)
    torch.testing.assert_close(value, GHMRLoss(momentum=0.0, loss_weight=10.0)(deltas, targets))


def test_noise_is_the_same_each_time_and_always_wrong():
    (image,) = batch([[0.0, 0, 9, 9]] * 2000)
    first = script.noisy_instances({**image, "image_id": 3}, NUM_CLASSES).gt_classes
    again = script.noisy_instances({**image, "image_id": 3}, NUM_CLASSES).gt_classes
    other = script.noisy_instances({**image, "image_id": "3b"}, NUM_CLASSES).gt_classes
    assert torch.equal(first, again) and not torch.equal(first, other)
    wrong = first != image["instances"].gt_classes
    assert 0.08 < wrong.float().mean() < 0.12  # a shift by 1 or 2 of 3 classes is never none
    assert 0 <= first.min() and first.max() < NUM_CLASSES


def test_batches_are_compared_by_direction():
    def record(norm, *direction):
        return {"feature_norm": norm, "levels": [norm, 1.0], "direction": torch.tensor(direction)}

    found = measures.summarize([record(1.0, 2.0, 0.0), record(3.0, 0.0, 5.0)])
    assert found["levels"] == [2, 1] and found["feature_norm_cv"] == pytest.approx(2**0.5 / 2)
    assert found["cosine_between_batches"] == pytest.approx(0)
    assert found["mean_direction"].tolist() == [1, 2.5]
    same = measures.summarize([record(1.0, 2.0, 0.0), record(1.0, 3.0, 0.0)])
    assert same["cosine_between_batches"] == pytest.approx(1)


def test_script_writes_data_and_tables(tmp_path):
    data = f"tiny={write_coco(tmp_path)}"
    output = tmp_path / "out" / "gradients.json"
    opts = "MODEL.GHM.TORCHVISION.FREEZE_AT features.13 SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 1.0"
    words = ["--dataset", data, "--steps", "0", "2", "--batches", "2", "--output", str(output)]
    words += ["--opts", *opts.split(), "INPUT.MIN_SIZE_TRAIN", "(64,)", "MODEL.WEIGHTS", ""]
    try:
        script.main(words)
    finally:
        unregister_all()
    text = output.read_text()
    assert str(tmp_path) not in text
    result = json.loads(text)
    first, prior, last = result["snapshots"]
    assert (first["step"], prior["step"], last["step"]) == (0, 0, 2) and prior["prior"] == 0.1
    cls, box = first["cls"], first["box"]
    assert cls.keys() == losses.cls_variants().keys() == last["cls"].keys()
    assert box.keys() == losses.box_variants().keys()
    # The first call without correction is 1 / (1 - alpha) too large.
    for key in ("loss", "feature_norm", "head_norm"):
        plain = cls["batch"][key]
        assert plain > 0
        assert cls["batch, no correction"][key] == pytest.approx(4 * plain, rel=1e-3)
        assert cls["batch, momentum 0"][key] == pytest.approx(plain, rel=1e-3)
    assert last["cls"]["batch"]["loss"] != last["cls"]["batch, momentum 0"]["loss"]  # they moved
    assert last["cls"]["focal"]["loss"] != cls["focal"]["loss"]
    # At the prior 0.1 a background logit pulls ten times as much.
    ratio = prior["cls"]["cross entropy x 20"]["positives_share"]
    assert ratio < cls["cross entropy x 20"]["positives_share"]
    table = output.with_suffix(".md").read_text()
    assert all(f"| {name} |" in table for name in [*cls, *box])


def test_shares_of_four_trainings(tmp_path):
    data = f"tiny={write_coco(tmp_path)}"
    words = ["--dataset", data, "--steps", "0", "1", "--batches", "1", "--output", str(tmp_path)]
    words += ["--noise", "0", "0.9"]
    opts = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "MODEL.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", "2"]
    try:
        shares.main([*words, "--opts", *opts])
    finally:
        unregister_all()
    text = (tmp_path / "gradient_shares.json").read_text()
    assert str(tmp_path) not in text
    runs = json.loads(text)["trainings"]
    assert [(run["trained_by"], run["wrong_labels"]) for run in runs] == [
        ("focal", 0), ("GHM-C", 0), ("focal", 0.9), ("GHM-C", 0.9)
    ]  # fmt: skip
    for run in runs:
        for snapshot in run["snapshots"]:
            for name in ("focal", "GHM-C"):
                by_level, by_region = snapshot[name]["by_level"], snapshot[name]["by_region"]
                assert sum(map(sum, by_level)) == pytest.approx(1, abs=1e-3)
                assert [sum(x) for x in by_level] == pytest.approx(
                    [sum(x) for x in by_region], abs=1e-3
                )
    # Before the first step all detectors are one.
    assert runs[0]["snapshots"][0] == runs[1]["snapshots"][0] != runs[2]["snapshots"][0]
    assert runs[0]["snapshots"][1] != runs[1]["snapshots"][1]
    table = (tmp_path / "gradient_shares.md").read_text()
    assert table.count("## Trained by") == 4 and "| 1 | GHM-C |" in table


def test_mistakes_are_one_sentence(tmp_path):
    data = f"tiny={write_coco(tmp_path)}"
    words = ["--dataset", data, "--output", str(tmp_path / "x.json")]
    try:
        with pytest.raises(UserError, match="fetch-backbone"):
            script.main([*words, "--opts", "MODEL.WEIGHTS", str(tmp_path / "none.pth")])
        with pytest.raises(UserError, match="--batches"):
            script.main([*words, "--batches", "1"])
    finally:
        unregister_all()
