"""ghm-d2 report on a small recorded run: what the page shows, what it lacks, hostile names."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from unittest.mock import MagicMock
from xml.etree import ElementTree

import numpy as np
import pytest
from detectron2.config import get_cfg
from PIL import Image

from ghm_d2.cli.report import main
from ghm_d2.config import add_ghm_config
from ghm_d2.report import write_report
from ghm_d2.report.charts import draw_confusion
from ghm_d2.report.evaluation import evaluate
from ghm_d2.report.page import differences
from ghm_d2.report.run_files import TestSet, read_run
from tests.tiny import CLASSES, coco_content

HOSTILE = ("<script>alert(1)</script>", r"$\frac{ {{ 7*7 }}", "\"'><img src=x onerror=alert(1)>")
INVISIBLE = ("\x1b[2J\u202e", "\ud800", "long " * 500)


class Page(HTMLParser):
    """The tags, the visible text, and the images of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.images, self.links = [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        assert not [name for name in values if name.startswith("on")]
        if tag == "img":
            self.images.append(values)
        if tag == "a":
            self.links.append(values["href"])

    def handle_data(self, data):
        self.words.append(data)


def record_run(folder, classes=CLASSES, shifts=(0, 0, 0, 0, 0, 30), name="val"):
    """A run whose detections of image i lie ``shifts[i]`` pixels beside the truth."""
    content = coco_content(len(shifts), classes)
    (folder / "images").mkdir(parents=True)
    for i, row in enumerate(content["images"]):
        Image.new("RGB", (64, 64), (40 * i, 90, 120)).save(folder / "images" / row["file_name"])
    (folder / "a.json").write_text(json.dumps(content))
    predictions = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": [a["bbox"][0] + shifts[a["image_id"] - 1], *a["bbox"][1:]],
            "score": 0.9 - 0.01 * a["id"],
        }
        for a in content["annotations"]
    ]
    run = folder / "run"
    (run / "inference").mkdir(parents=True)
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "GHMRetinaNet"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("train",), (name,)
    cfg.SOLVER.MAX_ITER = 60
    record = {
        "date": "2026-01-02",
        "config": cfg.dump(),
        "config_file": "/somewhere/config.yaml",
        "hardware": "an abacus",
        "versions": {"torch": "9.9"},
        "commit": "abc123",
        "datasets": {name: [str(folder / "a.json"), str(folder / "images")]},
    }
    (run / "training.json").write_text(json.dumps(record))
    metrics = [
        {"iteration": i, "total_loss": 3 - i / 60, "loss_cls": 2.0, "loss_box_reg": 1.0, "lr": 0.1,
         "ghm_c/plain_loss": 0.1, "bbox/AP": float(i), "time": 0.25}
        for i in (19, 39, 59)
    ]  # fmt: skip
    (run / "metrics.json").write_text("\n".join(map(json.dumps, metrics)))
    call = {"counts": [5, 3, 2], "gradient_share": [0.5, 0.3, 0.2]}
    shares = {f"gradient_share_{k}": 1 / 3 for k in ("easy", "medium", "hard")}
    rows = [
        {"iteration": i, "loss": loss, "calls": [call, call], **shares}
        for i in (19, 39)
        for loss in ("ghm_c", "ghm_r")
    ]
    (run / "gradient_statistics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run / "inference" / "coco_instances_results.json").write_text(json.dumps(predictions))
    results = {"bbox/AP": 71.23, "bbox/AP50": None, "bbox/AP-disc": 5.0}
    (run / "inference" / "results.json").write_text(json.dumps(results))
    return run


@pytest.fixture
def quick(monkeypatch):
    """Leaves out the drawing, which takes most of the time."""
    empty = "data:image/svg+xml;base64,"
    monkeypatch.setattr("ghm_d2.report.charts._uri", lambda figure: empty)
    monkeypatch.setattr("ghm_d2.report.charts._chart", lambda: (MagicMock(), MagicMock()))
    monkeypatch.setattr("ghm_d2.report.examples.draw_boxes", lambda pixels, *_: pixels)


def page(run, **options):
    missing = write_report(run, run / "report.html", **options)
    return Page((run / "report.html").read_text()), missing


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = record_run(tmp_path_factory.mktemp("whole"))
    return (run, *page(run))


def test_the_page_has_every_part_and_needs_no_network(whole):
    run, found, missing = whole
    assert missing == []
    text = (run / "report.html").read_text()
    assert "Not on this page" not in text and "see above" not in text
    for words in (
        "GHMRetinaNet", "60 of 60", "0.25 s (median)", "an abacus", "71.2", "torch 9.9", "abc123",
        "AP 71.2 AP50 –", "MODEL.META_ARCHITECTURE", "SOLVER.MAX_ITER 60 40000",
        "Best images", "Worst images", "ground truth", "disc (4 objects)", "ghm_c", "ghm_r",
    ):  # fmt: skip
        assert words.replace(".", " . ") in found.text.replace(".", " . ") or words in (
            found.text.replace(". ", ".")
        ), words
    # 4 curves, 3 charts for each loss, a confusion matrix, 3
    # classes, 2 x 6 images of which none is shown twice.
    assert len(found.images) == 4 + 6 + 1 + 3 + 2 * 6
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in found.images)
    assert all(link.startswith("#") for link in found.links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(found.tags)
    assert "http" not in re.sub(r"data:image/[^\"]*", "", text).replace("http-equiv", "")
    assert "default-src 'none'" in text
    for image in found.images:
        data = base64.b64decode(image["src"].partition(",")[2])
        if image["src"].startswith("data:image/svg"):
            ElementTree.fromstring(data)


def test_differences_name_what_was_changed_and_nothing_else(whole):
    settings = read_run(whole[0], {}).settings.tree
    keys = {key: (value, default) for key, value, default in differences(settings)}
    assert keys == {
        "MODEL.META_ARCHITECTURE": ("GHMRetinaNet", "GeneralizedRCNN"),
        "DATASETS.TRAIN": ("['train']", "[]"),
        "DATASETS.TEST": ("['val']", "[]"),
        "SOLVER.MAX_ITER": ("60", "40000"),
    }
    assert differences({"NEW": {"KEY": 1}, "SEED": -1}) == [("NEW.KEY", "1", "")]


def test_the_figures_are_right(tmp_path):
    run = record_run(tmp_path, shifts=(0, 0, 4, 0, 0, 30))
    (data,) = read_run(run, {}).test_sets
    result = evaluate(data)
    assert result.classes == list(CLASSES) and result.objects.tolist() == [4, 4, 4]
    # IoU 20 / 28 of a box 24 wide that lies 4 aside: found up to the threshold 0.7.
    assert result.ap.shape == (10, 3)
    means = result.ap.mean(1)
    assert means[:5] == pytest.approx([means[0]] * 5) and (np.diff(means[4:6]) < 0).all()
    np.testing.assert_allclose(result.ap, 100 * result.precision.mean(1))
    scores = {image.file.name: image for image in result.images}
    assert {name: (i.found, i.false, i.missed) for name, i in scores.items()} == {
        **{f"{i}.png": (2, 0, 0) for i in range(5)},
        "5.png": (0, 0, 2),
    }
    # The last image's detections have the lowest scores, and without them F1 is 20 / 22.
    assert result.score_threshold == pytest.approx(0.9 - 0.01 * 10)
    assert [image.score for image in result.images] == [1.0] * 5 + [0.0]
    assert result.images[-1].file.name == "5.png" and result.images[-1].shown == []


def test_what_is_found_from_the_threshold_on(tmp_path):
    """Two detections of the first image name another class, and one more lies on nothing."""
    run = record_run(tmp_path, shifts=(0, 0, 0, 0, 0, 0))
    file = run / "inference" / "coco_instances_results.json"
    found = json.loads(file.read_text())
    found[0]["category_id"], found[1]["category_id"] = 2, 3  # truly 1 and 2
    found.append({"image_id": 2, "category_id": 3, "bbox": [0, 50, 9, 9], "score": 0.85})
    found.append({"image_id": 2, "category_id": 1, "bbox": [0, 50, 9, 9], "score": 0.1})
    file.write_text(json.dumps(found))
    result = evaluate(read_run(run, {}).test_sets[0])
    assert result.score_threshold == pytest.approx(0.9 - 0.01 * 12)  # the lowest right one
    assert result.confusion.tolist() == [[3, 1, 0, 0], [0, 3, 1, 0], [0, 0, 4, 0], [0, 0, 1, 0]]
    assert (result.found.tolist(), result.false.tolist()) == ([3, 3, 4], [0, 1, 2])
    assert result.missed.tolist() == [1, 1, 0]
    assert result.precision_at_threshold.tolist() == pytest.approx([100, 75, 200 / 3])
    assert result.recall_at_threshold.tolist() == [75, 75, 100]


def test_a_table_of_many_classes_has_one_row_for_the_rest(whole):
    result = evaluate(read_run(whole[0], {}).test_sets[0])
    confusion = np.arange(26 * 26).reshape(26, 26)
    names, objects = [f"c{k}" for k in range(25)], np.arange(25)
    many = replace(result, classes=names, objects=objects, confusion=confusion)
    svg = base64.b64decode(draw_confusion(many).partition(",")[2]).decode()
    assert "<!-- 5 others -->" in svg and "<!-- c24 -->" in svg and "<!-- c4 -->" not in svg
    rest = confusion[:5, :5].sum()  # those with the fewest objects
    assert f"<!-- {rest} -->" in svg


def test_data_and_passes_are_counted_and_a_short_training_is_called_so(tmp_path, quick):
    run = record_run(tmp_path)
    record = json.loads((run / "training.json").read_text())
    record["data"] = {"train": {"images": 1288, "annotations": 4321, "sha256": "0"}}
    (run / "training.json").write_text(json.dumps(record))
    found, missing = page(run)
    assert missing == []
    assert "train (1,288 images, 4,321 objects)" in found.text
    assert "60 of 60, 0.745 passes over the training images" in found.text  # 60 x 16 / 1288
    assert "val has 6 images with 12 objects of 3 classes." in found.text
    assert "This training is short: 60 iterations, in which each image was seen 0.75" in found.text
    record["data"] = {"train": {"images": 100, "annotations": 4321, "sha256": "0"}}
    (run / "training.json").write_text(json.dumps(record))
    rows = [{"iteration": i, "total_loss": 1.0} for i in (19, 599)]
    (run / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    assert "This training is short" not in page(run)[0].text


def test_crowds_count_neither_way(tmp_path):
    run = record_run(tmp_path)
    content = json.loads((tmp_path / "a.json").read_text())
    content["annotations"][0]["iscrowd"] = 1
    (tmp_path / "a.json").write_text(json.dumps(content))
    result = evaluate(read_run(run, {}).test_sets[0])
    image = next(i for i in result.images if i.file.name == "0.png")
    assert (image.found, image.false, image.missed) == (1, 0, 0)
    assert result.objects.sum() == 11


def test_hostile_names_are_text(tmp_path):
    run = record_run(tmp_path, classes=HOSTILE, name="<b>x</b>")
    content = json.loads((tmp_path / "a.json").read_text())
    evil = "<img src=x onerror=alert(2)>$.png"
    (tmp_path / "images" / "0.png").rename(tmp_path / "images" / evil)
    content["images"][0]["file_name"] = evil
    (tmp_path / "a.json").write_text(json.dumps(content))
    found, missing = page(run)
    assert missing == []
    assert "script" not in found.tags and "b" in found.tags
    for name in (*HOSTILE, evil, "<b>x</b>"):
        assert " ".join(name.split()) in found.text
    assert all(image["src"].startswith("data:image/") for image in found.images)


@pytest.mark.parametrize("how", ["absolute", "climbing", "link"])
def test_no_image_from_outside_the_folder_is_shown(tmp_path, quick, how):
    run = record_run(tmp_path / "data")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64)).save(secret)
    if how == "link":
        (tmp_path / "data" / "images" / "0.png").unlink()
        (tmp_path / "data" / "images" / "0.png").symlink_to(secret)
    else:
        content = json.loads((tmp_path / "data" / "a.json").read_text())
        content["images"][0]["file_name"] = str(secret) if how == "absolute" else "../../secret.png"
        (tmp_path / "data" / "a.json").write_text(json.dumps(content))
    found, (said,) = page(run)
    assert "1 images of val; the first: " in said and "lies outside of" in said
    assert len(found.images) == len(page(record_run(tmp_path / "other"))[0].images) - 2


def test_invisible_and_endless_names_are_escaped_and_cut(tmp_path, capsys, quick):
    run = record_run(tmp_path, classes=INVISIBLE, name="a\x1b\ud800")
    record = json.loads((run / "training.json").read_text())
    record |= {"hardware": "\x1b]0;x\x07", "classes": ["other"], "commit": "\ud800"}
    (run / "training.json").write_text(json.dumps(record))
    main([str(run)])
    text = (run / "report.html").read_text()
    assert "\x1b" not in text and "\u202e" not in text
    for shown in (r"\x1b[2J\u202e", r"\ud800", r"\x1b]0;x\x07", r"a\x1b\ud800"):
        assert shown in text
    assert "long " * 450 not in text
    said = capsys.readouterr().out
    assert said.startswith("not on the page: names of classes: a\\x1b\\ud800 has others")
    assert said.replace("\n", "").isprintable()


PYTHON_CONFIG = """\
dataloader: {test: {dataset: {names: val}}, train: {dataset: {names: [train]}}}
model: {_target_: ghm_d2.modeling.GHMRetinaNet, num_classes: 3}
train: {max_iter: 60, device: !!python/name:torch.cpu ''}
"""


def test_a_python_config_has_a_page_too(tmp_path, quick):
    run = record_run(tmp_path)
    record = json.loads((run / "training.json").read_text()) | {"config": PYTHON_CONFIG}
    (run / "training.json").write_text(json.dumps(record))
    found, missing = page(run)
    assert missing == []
    assert "detector GHMRetinaNet trained on train tested on val iterations 60 of 60" in found.text
    assert "A Python config has no defaults" in found.text and "num_classes: 3" in found.text
    assert len(found.images) == 26


def test_whatever_the_annotations_hold_is_a_sentence(tmp_path, quick):
    run = record_run(tmp_path)
    for content in (
        "[" * 100_000, "null", "5", '{"images": 5}', '{"images": [{"id": 1}], "annotations": [{}]}',
        '{"images": [], "annotations": [], "categories": [{"id": "x"}]}', "\xff",
    ):  # fmt: skip
        (tmp_path / "a.json").write_text(content)
        _, missing = page(run)
        assert [s for s in missing if "does not belong to" in s and len(s) < 1000], missing


@pytest.mark.parametrize(
    ("file", "content", "sentence", "images"),
    [
        ("training.json", None, "training.json cannot be read", 23),
        ("training.json", "{", "training.json is not a complete JSON", 23),
        ("training.json", "[]", "training.json is not a complete JSON", 23),
        ("metrics.json", None, "metrics.json cannot be read", 22),
        (
            "metrics.json",
            '{"iteration": 3, "lr": 1}\n{"iter',
            "metrics.json: 1 damaged line",
            23,
        ),
        ("gradient_statistics.jsonl", None, "gradient_statistics.jsonl cannot be read", 20),
        (
            "gradient_statistics.jsonl",
            '{"iteration": 1, "loss": "ghm_c", "calls": [{}]}',
            "gradient_statistics.jsonl: 1 damaged line",
            20,
        ),
        ("inference/results.json", None, "results.json cannot be read", 26),
        ("inference/coco_instances_results.json", None, "no coco_instances_results.json for", 10),
        ("inference/coco_instances_results.json", "[1]", "does not belong to", 10),
        ("inference/coco_instances_results.json", "[]", "of val detected nothing", 10),
        ("../a.json", None, "AP by class, images: the annotations of val, which was at", 10),
        ("../a.json", '{"images": []}', "does not belong to", 10),
        ("../images/3.png", "no image", "1 images of val; the first:", 24),
    ],
)
def test_what_is_missing_is_said(file, content, sentence, images, tmp_path, quick):
    run = record_run(tmp_path)
    if file == "training.json":  # the config, and with it the names of the test sets, is elsewhere
        settings = json.loads((run / file).read_text())["config"]
        (run / "config.yaml").write_text(settings)
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    options = {"datasets": {"val": (tmp_path / "a.json", tmp_path / "images")}}
    found, missing = page(run, **(options if file == "training.json" else {}))
    assert [s for s in missing if sentence in s], missing
    assert "Not on this page" in found.text and " ".join(missing[0].split()) in found.text
    if file == "training.json":
        images = 26
    elif file == "metrics.json" and content:
        images = 23  # the learning rate alone
    assert len(found.images) == images


def test_a_running_training_has_a_page_too(tmp_path, quick):
    (tmp_path / "metrics.json").write_text('{"iteration": 19, "total_loss": 1.5}\n')
    found, missing = page(tmp_path)
    assert len(found.images) == 1 and len(missing) >= 4


def test_an_earlier_run_in_the_folder_does_not_count(tmp_path):
    rows = [{"iteration": i, "lr": v} for i, v in ((19, 1), (39, 1), (59, 1), (19, 2), (39, 2))]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    metrics = read_run(tmp_path, {}).metrics
    assert {i: row["lr"] for i, row in metrics.items()} == {19: 2, 39: 2}


def test_several_test_sets(tmp_path, quick):
    run = record_run(tmp_path)
    record = json.loads((run / "training.json").read_text())
    record["config"] = record["config"].replace("TEST:\n  - val", "TEST:\n  - val\n  - other")
    record["datasets"]["other"] = record["datasets"]["val"]
    (run / "training.json").write_text(json.dumps(record))
    text = (run / "inference" / "coco_instances_results.json").read_text()
    for name in ("val", "other"):
        (run / "inference" / name).mkdir()
        (run / "inference" / name / "coco_instances_results.json").write_text(text)
    results = {"val/bbox/AP": 1.5, "other/bbox/AP": 2.5}
    (run / "inference" / "results.json").write_text(json.dumps(results))
    found, missing = page(run, images=0)
    assert missing == [] and "1.5" in found.text and "2.5" in found.text
    assert len(found.images) == 10 + 2 * (1 + 3)


def test_what_the_evaluator_converted_is_preferred(tmp_path):
    run = record_run(tmp_path)
    converted = run / "inference" / "val_coco_format.json"
    converted.write_text((tmp_path / "a.json").read_text())
    assert read_run(run, {}).test_sets == [
        TestSet(
            "val",
            run / "inference" / "coco_instances_results.json",
            converted,
            tmp_path / "images",
        )
    ]


def test_command_line(tmp_path, capsys, quick):
    run = record_run(tmp_path / "a")
    main([str(run), "--output", str(tmp_path / "new" / "page.html"), "--images", "1"])
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'page.html'}\n"
    found = Page((tmp_path / "new" / "page.html").read_text())
    assert len(found.images) == 4 + 6 + 1 + 3 + 4
    (tmp_path / "a" / "a.json").rename(tmp_path / "b.json")
    main([str(run)])
    assert "not on the page: AP by class, images: the annotations of val" in capsys.readouterr().out
    main([str(run), "--dataset", f"val={tmp_path}/b.json,{tmp_path}/a/images"])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


def test_mistakes(tmp_path, capsys, quick):
    run = record_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for argv, message in (
        ([tmp_path / "none"], "none does not exist"),
        ([tmp_path / "empty"], "give the OUTPUT_DIR of a training"),
        ([run, "--dataset", "val=a"], "is not of the form"),
        ([run, "--images", "-1"], "must not be negative"),
        ([run, "--output", tmp_path / "empty"], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert "ghm-d2 report: error: " in captured.err and message in captured.err
        assert "Traceback" not in captured.err
