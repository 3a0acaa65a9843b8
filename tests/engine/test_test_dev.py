"""Test sets without ground truth: the submission file, and where it goes."""

import json
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin_meta, register_coco_instances

from ghm_d2.engine import main
from tests.kinds import KINDS, Kind
from tests.tiny import coco_content, forget_program, write_coco

COCO_THINGS = [
    {"id": c["id"], "name": c["name"]} for c in builtin_meta.COCO_CATEGORIES if c["isthing"]
]


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    return Kind(request.param, tmp_path)


@pytest.fixture
def base(kind, tmp_path):
    """Of an evaluation that keeps boxes of any score."""
    # A published config expects an AP, which no test set without ground truth can have.
    expected = "[['bbox','AP',37.0,0.2]]"
    values = {"output": tmp_path / "out", "weights": "", "score": 0.0, "expected": expected}
    return kind.argv("--eval-only", **values)


def unlabelled(categories=None):
    content = coco_content()
    del content["annotations"]
    return content | ({"categories": categories} if categories else {})


def submission(folder, categories):
    """The predictions, checked to be what COCO's server takes."""
    results = json.loads((folder / "coco_instances_results.json").read_text())
    assert {row["image_id"] for row in results} == set(range(1, 7))
    assert all(row.keys() == {"image_id", "category_id", "bbox", "score"} for row in results)
    assert {row["category_id"] for row in results} <= {c["id"] for c in categories}
    assert all(len(row["bbox"]) == 4 for row in results)
    return results


def test_coco_test_dev(kind, base, tmp_path, monkeypatch, capsys):
    """As users run it: datasets/coco holds images and their information alone."""
    coco = tmp_path / "datasets" / "coco"
    write_coco(coco, "info", unlabelled(COCO_THINGS))
    shutil.move(coco / "images", coco / "test2017")
    (coco / "annotations").mkdir()
    shutil.move(coco / "info.json", coco / "annotations" / "image_info_test-dev2017.json")
    monkeypatch.chdir(tmp_path)
    main([*base, *kind.words(test_names=kind.names("coco_2017_test-dev"))])
    text = capsys.readouterr().out
    results = submission(tmp_path / "out" / "inference", COCO_THINGS)
    assert max(row["category_id"] for row in results) > 80  # COCO's own ids, not 0 .. 79
    file = tmp_path / "out" / "inference" / "coco_instances_results.json"
    said = f"coco_2017_test-dev has no ground truth here; its predictions are in {file}"
    assert text.count(said) == 1
    assert "detections_test-dev2017_NAME_results.json" in text
    assert "https://cocodataset.org/#upload" in text


def test_registered_under_any_name(kind, base, tmp_path, capsys):
    content = unlabelled()
    write_coco(tmp_path, "info", content)
    register_coco_instances("any", {}, str(tmp_path / "info.json"), str(tmp_path / "images"))
    try:
        main([*base, *kind.words(classes=3, test_names=kind.names("any"))])
    finally:
        DatasetCatalog.remove("any")
        MetadataCatalog.remove("any")
    assert submission(tmp_path / "out" / "inference", content["categories"])
    out = capsys.readouterr().out
    assert "any has no ground truth here" in out and "cocodataset" not in out


def test_on_the_command_line_beside_a_labelled_one(base, tmp_path, capsys):
    content = unlabelled()
    both = [f"bare={write_coco(tmp_path, 'bare', content)}", f"full={write_coco(tmp_path, 'full')}"]
    main([*base, "--dataset", *both])
    out = capsys.readouterr().out
    folder = tmp_path / "out" / "inference"
    assert submission(folder / "bare", content["categories"])
    assert "bare.json has no annotations: there will be predictions" in out
    assert "bare has no ground truth here" in out and "full has no ground truth" not in out
    assert "Evaluation results for bbox" in out


def test_training_needs_annotations(base, tmp_path, capsys):
    bare = f"bare={write_coco(tmp_path, 'bare', unlabelled())}"
    with pytest.raises(SystemExit) as stop:
        main([*(word for word in base if word != "--eval-only"), "--dataset", bare])
    assert stop.value.code == 2
    assert "bare.json holds no annotations" in capsys.readouterr().err
