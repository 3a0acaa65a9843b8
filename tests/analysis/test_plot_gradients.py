"""The paper's figures: their numbers, what is collected of a detector, the command line."""

import csv
import logging
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyCall, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from fvcore.nn import sigmoid_focal_loss
from omegaconf import OmegaConf
from PIL import Image

from ghm_d2 import add_ghm_config
from ghm_d2.analysis.collect import PartDistributions, collect
from ghm_d2.analysis.distributions import (
    ClassificationDistribution,
    RegressionDistribution,
    harmonizing_parameters,
    regression_gradients,
)
from ghm_d2.cli import figures as report
from ghm_d2.cli.figures import main, plot_gradients
from ghm_d2.data import (
    check_coco_dataset,
    parse_dataset,
    register_coco_dataset,
    register_datasets,
)
from ghm_d2.engine.setup import load_config
from ghm_d2.errors import UserError
from tests import reference
from tests.detectors import small_config
from tests.tiny import RETINANET, ROOT, one_sentence, tiny_pairs, unregister_all, write_coco

FIGURES = (
    "example_counts",
    "gradient_norm",
    "gradient_contribution",
    "regression_fraction",
    "regression_gradient",
)
K = 5


@pytest.fixture(autouse=True)
def clean_up():
    yield
    unregister_all()


def draw(rows, activation="sigmoid", bins=30):
    rng = np.random.default_rng(5)
    return reference.draw_logits(rng, rows, K, bins, activation=activation)


def test_classification_by_region_against_the_oracle():
    logits, labels = draw(300)
    data = ClassificationDistribution(30, alpha=0.25, gamma=2.0)
    for rows in (slice(0, 100), slice(100, 300), slice(300, 300)):
        data.add(torch.from_numpy(logits[rows]), torch.from_numpy(labels[rows]))
    x = reference.sigmoid_examples(logits, labels)
    g, region = x.gradient_norm[x.keep], reference.region_of(x.gradient_norm[x.keep], 30)
    positive = (labels[:, None] == np.arange(K))[x.keep]
    counts = reference.region_counts(g, 30)
    assert counts.min() > 0
    np.testing.assert_array_equal(data.counts, counts)
    np.testing.assert_array_equal(data.positives, np.bincount(region[positive], minlength=30))

    paper = reference.RunningCounts(30, 0.0, normalize_by="all_bins")
    beta = len(g) * paper.region_weights(counts, write=False)
    np.testing.assert_allclose(harmonizing_parameters(counts), beta, rtol=1e-12)
    # Focal loss from its definition, differentiated by autograd.
    z = torch.from_numpy(logits[labels >= 0]).double().requires_grad_()
    target = F.one_hot(torch.from_numpy(labels[labels >= 0]), K + 1)[:, :K].double()
    sigmoid_focal_loss(z, target, alpha=0.25, gamma=2.0, reduction="sum").backward()
    example = {"CE": g, "focal": z.grad.abs().flatten().numpy(), "GHM-C": beta[region] * g}
    for name, values in example.items():
        sums = np.bincount(region, values, minlength=30)
        np.testing.assert_allclose(data.gradient_norms()[name], sums / counts, rtol=1e-5)
        np.testing.assert_allclose(data.contributions()[name], sums / sums.sum(), rtol=1e-5)


def test_softmax_and_empty_regions():
    logits, labels = draw(40, "softmax", bins=200)
    data = ClassificationDistribution(200, alpha=-1, gamma=0.0, activation="softmax")
    data.add(torch.from_numpy(logits), torch.from_numpy(labels))
    x = reference.softmax_examples(logits, labels)
    g = x.gradient_norm[x.keep]
    counts = reference.region_counts(g, 200)
    np.testing.assert_array_equal(data.counts, counts)
    foreground = g[labels[x.keep] < K]
    np.testing.assert_array_equal(data.positives, reference.region_counts(foreground, 200))
    norms = data.gradient_norms()
    assert (counts == 0).any()
    for values in norms.values():
        np.testing.assert_array_equal(np.isnan(values), counts == 0)
    # With gamma 0 and no alpha, focal loss is cross entropy.
    np.testing.assert_allclose(norms["focal"], norms["CE"], rtol=1e-12)
    assert data.contributions()["GHM-C"].sum() == pytest.approx(1)


def test_boxes_by_region_and_by_error():
    mu, delta = 0.02, 1 / 9
    pred, target = reference.draw_boxes(np.random.default_rng(1), 80, 10, mu)
    data = RegressionDistribution(10, mu)
    data.add(torch.from_numpy(pred[:30]), torch.from_numpy(target[:30]))
    data.add(torch.from_numpy(pred[30:]), torch.from_numpy(target[30:]))
    g = reference.asl1_examples(pred, target, mu=mu).gradient_norm
    counts = reference.region_counts(g, 10)
    np.testing.assert_array_equal(data.counts, counts)
    np.testing.assert_allclose(data.fractions(), counts / 320)

    d = np.array([0.0, 1e-4, 0.011, 0.05, 0.2, 3.0])
    counts[-1] = 0
    found = regression_gradients(d, counts, mu, delta)
    x = torch.from_numpy(d).requires_grad_()
    F.smooth_l1_loss(x, torch.zeros_like(x), beta=delta, reduction="sum").backward()
    np.testing.assert_allclose(found["SL1"], x.grad.numpy(), rtol=1e-12)
    asl1 = reference.asl1_examples(d, np.zeros_like(d), mu=mu).gradient_norm
    np.testing.assert_allclose(found["ASL1"], asl1, rtol=1e-12)
    paper = reference.RunningCounts(10, 0.0, normalize_by="all_bins")
    beta = counts.sum() * paper.region_weights(counts, write=False)
    harmonized = np.where(asl1 >= 0.9, np.nan, beta[reference.region_of(asl1, 10)] * asl1)
    np.testing.assert_allclose(found["GHM-R"], harmonized, rtol=1e-12)
    assert np.isnan(harmonized).sum() == 3


@pytest.fixture
def records(tmp_path):
    dataset = check_coco_dataset(parse_dataset(f"plot_data={write_coco(tmp_path)}"))
    register_coco_dataset(dataset)
    return DatasetCatalog.get("plot_data")


SMALL = ("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 96)


def test_collecting_from_retinanet(records):
    """Against anchors and predictions computed step by step; the model is left as it was."""
    torch.manual_seed(0)
    cfg = small_config("ghm_retinanet_R_50", *SMALL, "MODEL.GHM.RETINANET.CLS.BINS", 12)
    model = build_model(cfg).train()
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model))
    (name, part), *others = collect(cfg, model, records).items()
    assert name == "retinanet" and not others
    assert set(vars(model)) == attributes and all(m.training for m in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key

    model.eval()
    expected = ClassificationDistribution(12)
    g_r = []
    for record in records:
        image = np.asarray(Image.open(record["file_name"]).resize((96, 96), Image.BILINEAR))
        x = torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy())
        images = model.preprocess_image([{"image": x}])
        with torch.no_grad():
            features = model.backbone(images.tensor)
            features = [features[f] for f in model.head_in_features]
            logits, deltas = model._transpose_dense_predictions(model.head(features), [3, 4])
        anchors = model.anchor_generator(features)
        truth = model_truth(record, 96 / 64)
        labels, boxes = model.label_anchors(anchors, [truth])
        expected.add(torch.cat(logits, 1)[0], labels[0])
        positive = (labels[0] >= 0) & (labels[0] < 3)
        every = torch.cat([a.tensor for a in anchors])
        target = model.box2box_transform.get_deltas(every[positive], boxes[0][positive])
        pred = torch.cat(deltas, 1)[0][positive]
        g_r.append(reference.asl1_examples(pred.numpy(), target.numpy(), mu=0.02).gradient_norm)
    assert (expected.counts > 0).sum() > 3 and expected.positives.sum() > 0
    np.testing.assert_array_equal(part.classification.counts, expected.counts)
    np.testing.assert_array_equal(part.classification.positives, expected.positives)
    np.testing.assert_allclose(part.classification.focal, expected.focal, rtol=1e-6)
    counts = reference.region_counts(np.concatenate(g_r), 10)
    np.testing.assert_array_equal(part.regression.counts, counts)


def model_truth(record, scale):
    """The annotations as the model takes them."""
    side = int(64 * scale)
    truth = Instances((side, side))
    boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
    boxes[:, 2:] += boxes[:, :2]
    truth.gt_boxes = Boxes(boxes * scale)
    truth.gt_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
    return truth


def test_any_loss_of_the_training_gives_the_same_figures(records):
    found = []
    for architecture in ("GHMRetinaNet", "RetinaNet"):
        torch.manual_seed(0)
        cfg = small_config("ghm_retinanet_R_50", *SMALL, "MODEL.META_ARCHITECTURE", architecture)
        found.append(collect(cfg, build_model(cfg), records)["retinanet"])
    np.testing.assert_array_equal(found[0].classification.counts, found[1].classification.counts)
    np.testing.assert_array_equal(found[0].regression.counts, found[1].regression.counts)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("agnostic", [False, True], ids=["per class", "class-agnostic"])
def test_collecting_from_two_stages(records, sigmoid, agnostic):
    torch.manual_seed(0)
    cfg = small_config(
        "ghm_faster_rcnn_R_50_ghm_c",
        *SMALL,
        *("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", sigmoid),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic),
    )
    model = build_model(cfg)
    sampled = {"rpn": [], "box_head": []}
    rpn, head = model.proposal_generator, model.roi_heads
    rpn_sample, head_sample = rpn.label_and_sample_anchors, head.label_and_sample_proposals

    def spy_rpn(*args):
        labels, boxes = rpn_sample(*args)
        sampled["rpn"].append(labels[0])
        return labels, boxes

    def spy_head(*args):
        proposals = head_sample(*args)
        sampled["box_head"].append(proposals[0].gt_classes)
        return proposals

    rpn.label_and_sample_anchors, head.label_and_sample_proposals = spy_rpn, spy_head
    parts = collect(cfg, model, records)
    assert list(parts) == ["rpn", "box_head"]
    labels = torch.cat(sampled["rpn"])
    assert parts["rpn"].classification.counts.sum() == (labels >= 0).sum()
    assert parts["rpn"].classification.positives.sum() == (labels == 1).sum() > 0
    assert parts["rpn"].regression.counts.sum() == 4 * (labels == 1).sum()
    classes = torch.cat(sampled["box_head"])
    assert parts["box_head"].classification.counts.sum() == len(classes) * (3 if sigmoid else 1)
    assert parts["box_head"].classification.positives.sum() == (classes < 3).sum() > 0
    assert parts["box_head"].regression.counts.sum() == 4 * (classes < 3).sum()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights of the tiny detector and data, as the command line names them."""
    folder = tmp_path_factory.mktemp("plots")
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(RETINANET)
    cfg.merge_from_list([*tiny_pairs(), "MODEL.RETINANET.NUM_CLASSES", "3"])
    torch.manual_seed(0)
    weights = folder / "model.pth"
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    return {
        "data": f"some_val={write_coco(folder, 'val')}",
        "weights": weights,
    }


def command(trained, output, *extra):
    words = ["--config-file", RETINANET, "--output", output, "--dataset", trained["data"]]
    return [*map(str, words), *tiny_pairs(MODEL__WEIGHTS=trained["weights"]), *map(str, extra)]


def table(file):
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_figures_and_tables(trained, tmp_path):
    output = tmp_path / "deep" / "figures"
    written = plot_gradients(command(trained, output, "--max-images", 4))
    expected = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg", "csv")}
    assert {file.name for file in written} == expected | {"overview.png", "overview.svg"}
    for file in written:
        assert file.parent == output and file.stat().st_size > 0
        if file.suffix == ".png":
            assert np.asarray(Image.open(file)).std() > 5  # something is drawn
        if file.suffix == ".svg":
            assert "</svg>" in file.read_text()

    # The same from the parts that are tested above.
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(RETINANET)
    cfg.merge_from_list([*tiny_pairs(), "MODEL.RETINANET.NUM_CLASSES", "3"])
    model = build_model(cfg)
    model.load_state_dict(torch.load(trained["weights"])["model"])
    records = DatasetCatalog.get("some_val")
    part = collect(cfg, model, [records[i] for i in (0, 1, 3, 4)])["retinanet"]
    counts = table(output / "example_counts.csv")
    assert [int(row["examples"]) for row in counts] == part.classification.counts.tolist()
    assert [int(row["positives"]) for row in counts] == part.classification.positives.tolist()
    assert [float(row["g_to"]) for row in counts] == pytest.approx(np.arange(1, 31) / 30)
    norms, shares = part.classification.gradient_norms(), part.classification.contributions()
    for file, values in (("gradient_norm", norms), ("gradient_contribution", shares)):
        rows = table(output / f"{file}.csv")
        for name in ("CE", "focal", "GHM-C"):
            column = [float(row[name] or "nan") for row in rows]
            np.testing.assert_allclose(column, values[name], rtol=1e-8)
    fractions = [float(row["fraction"]) for row in table(output / "regression_fraction.csv")]
    np.testing.assert_allclose(fractions, part.regression.fractions(), rtol=1e-8)
    rows = table(output / "regression_gradient.csv")
    d = np.array([float(row["abs_d"]) for row in rows])
    curves = regression_gradients(d, part.regression.counts, 0.02, 1 / 9)
    for name, values in curves.items():
        column = [float(row[name] or "nan") for row in rows]
        # At an edge of a region, the nine digits of |d| may lie on its other side.
        agree = np.isclose(column, values, rtol=1e-6, equal_nan=True)
        assert agree.mean() > 0.99


def test_two_stages_have_a_folder_each(trained, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report, "write_figures", lambda *args: drawn.update([args[1:]]) or [])
    config = str(ROOT / "configs" / "ghm_faster_rcnn_R_50_ghm_c.yaml")
    pairs = tiny_pairs(MODEL__ROI_BOX_HEAD__FC_DIM=16)
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(config)
    cfg.merge_from_list([*pairs, "MODEL.ROI_HEADS.NUM_CLASSES", "3"])
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "rcnn.pth")
    words = ["--config-file", config, "--output", str(tmp_path / "o"), *pairs]
    weights = ["MODEL.WEIGHTS", str(tmp_path / "rcnn.pth")]
    plot_gradients([*words, "--dataset", trained["data"], *weights])
    assert drawn == {
        tmp_path / "o" / "rpn": "rpn, some_val, 6 of 6 images with objects",
        tmp_path / "o" / "box_head": "box head, some_val, 6 of 6 images with objects",
    }


MISTAKES = {
    "no weights": (["MODEL.WEIGHTS", ""], "give MODEL.WEIGHTS FILE"),
    "weights that are not there": (["MODEL.WEIGHTS", "none.pth"], "none.pth does not exist"),
    "no image": (["--images", "0"], "--images must be at least 1, got 0"),
    "an unknown key": (["MODEL.GHM.BINS", "3"], "unknown key MODEL.GHM.BINS"),
    "an unknown option": (["--resume"], "unrecognized arguments: --resume"),
    "another network": (["MODEL.FPN.OUT_CHANNELS", "8"], "the weights do not fit the model"),
}


@pytest.mark.parametrize(("extra", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(trained, tmp_path, extra, message):
    with pytest.raises(UserError) as error:
        plot_gradients(command(trained, tmp_path, *extra))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_data_without_objects(trained, tmp_path):
    DatasetCatalog.register("bare_val", lambda: [{"file_name": "0.png", "image_id": 1}])
    MetadataCatalog.get("bare_val").evaluator_type = "coco"
    try:
        with pytest.raises(UserError, match="bare_val has no annotated image"):
            plot_gradients(command(trained, tmp_path, "DATASETS.TEST", "('bare_val',)"))
    finally:
        DatasetCatalog.remove("bare_val")
        MetadataCatalog.remove("bare_val")


def test_images_that_give_no_example(trained, tmp_path, monkeypatch):
    nothing = PartDistributions(ClassificationDistribution(30), RegressionDistribution(10, 0.02))
    nothing.classification.counts += 1
    monkeypatch.setattr(report, "collect", lambda *args: {"box_head": nothing})
    with pytest.raises(UserError, match="the box_head has no box examples"):
        plot_gradients(command(trained, tmp_path))


def test_no_data(trained, tmp_path):
    words = command(trained, tmp_path)
    at = words.index("--dataset")
    del words[at : at + 2]
    with pytest.raises(UserError, match="there are no images: give --dataset"):
        plot_gradients([*words, "DATASETS.TEST", "()"])


def test_an_output_that_is_a_file(trained, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output .*file cannot be made"):
        plot_gradients(command(trained, tmp_path / "file"))


def test_unreadable_images_are_counted(records, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    cfg = small_config("ghm_retinanet_R_50", *SMALL)
    model = build_model(cfg)
    broken = [{**records[0], "file_name": "none.png"}]
    collect(cfg, model, [*broken, *records])
    assert "1 images cannot be read and were left out" in caplog.text and "none.png" in caplog.text
    with pytest.raises(UserError, match="none of the images"):
        collect(cfg, model, broken)


def test_a_mistake_is_one_sentence(tmp_path, capsys):
    words = ["--output", tmp_path]
    assert "--config-file" in one_sentence(main, words, capsys, "ghm-d2 figures")


def test_a_python_config_gives_the_same_distributions(trained):
    cfg = load_config(str(RETINANET), ["MODEL.RETINANET.NUM_CLASSES", "3", *tiny_pairs()])
    model = build_model(cfg)
    model.load_state_dict(torch.load(trained["weights"])["model"])
    register_datasets([trained["data"]])
    records = DatasetCatalog.get("some_val")[:2]
    python = OmegaConf.create(flags={"allow_objects": True})
    mapper = partial(DatasetMapper, cfg, is_train=False)
    python.dataloader = {"test": {"mapper": LazyCall(mapper)()}}
    for ours in (model.ghm_c[0], model.ghm_r[0]):
        assert ours.bins in (30, 10)  # what the YAML config says, and the model holds
    found, expected = (collect(each, model, records)["retinanet"] for each in (python, cfg))
    assert found.classification.counts.tolist() == expected.classification.counts.tolist()
    assert found.regression.counts.tolist() == expected.regression.counts.tolist()
    assert found.regression.mu == expected.regression.mu
    assert found.classification.counts.sum() > 0
