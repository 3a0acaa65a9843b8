"""--dataset: how it is split, what its files must hold, and what is registered."""

import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ghm_d2.data import (
    check_coco_dataset,
    check_same_classes,
    parse_dataset,
    register_coco_dataset,
)
from ghm_d2.errors import UserError
from tests.tiny import CLASSES, coco_content, unregister_all, write_coco


def checked(folder, content, name="reg"):
    return check_coco_dataset(parse_dataset(f"{name}={write_coco(folder, name, content)}"))


@pytest.fixture(autouse=True)
def clean_up():
    yield
    unregister_all()


def test_split_at_first_equals_sign_and_last_comma():
    dataset = parse_dataset("a=b=c,d.json,e=f")
    assert (dataset.name, dataset.json_file, dataset.image_root) == ("a", "b=c,d.json", "e=f")


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    dataset = parse_dataset("a=~/x.json,~/y")
    assert (dataset.json_file, dataset.image_root) == ("/home/me/x.json", "/home/me/y")


@pytest.mark.parametrize("text", ["", "a", "a=", "a=b.json", "=b.json,c", "a=,c", "a=b.json,"])
def test_incomplete_specification(text):
    with pytest.raises(UserError, match="NAME=annotations.json,image_dir"):
        parse_dataset(text)


def test_registered_data(tmp_path):
    content = coco_content()
    # Ids in another order than the list: the names go by ascending id.
    content["categories"] = [{"id": i, "name": n} for i, n in ((7, "z"), (2, "x"), (3, "y"))]
    for annotation in content["annotations"]:
        annotation["category_id"] = {1: 7, 2: 2, 3: 3}[annotation["category_id"]]
    dataset = checked(tmp_path, content)
    assert dataset.classes == ("x", "y", "z")
    register_coco_dataset(dataset)
    records = DatasetCatalog.get("reg")
    metadata = MetadataCatalog.get("reg")
    assert metadata.thing_classes == ["x", "y", "z"]
    assert metadata.evaluator_type == "coco"
    assert metadata.json_file == dataset.json_file
    assert [a["category_id"] for a in records[0]["annotations"]] == [2, 0]
    assert records[0]["annotations"][1]["bbox"] == [28.0, 10.0, 24.0, 30.0]
    assert records[5]["file_name"] == str(tmp_path / "images" / "5.png")


def test_our_name_is_replaced_and_a_foreign_one_refused(tmp_path):
    register_coco_dataset(checked(tmp_path, coco_content()))
    other = checked(tmp_path, coco_content(classes=("a", "b")))
    register_coco_dataset(other)
    assert MetadataCatalog.get("reg").thing_classes == ["a", "b"]
    with pytest.raises(UserError, match="coco_2017_val: .*another name"):
        register_coco_dataset(checked(tmp_path, coco_content(), "coco_2017_val"))


def broken(change):
    content = coco_content()
    change(content)
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "not in COCO format"),
        (broken(lambda c: c.pop("categories")), "no categories"),
        (broken(lambda c: c["images"].clear()), "no images"),
        (broken(lambda c: c["annotations"].clear()), "no annotations"),
        (broken(lambda c: c["images"].__setitem__(2, 5)), "entry 2 of images is not an object"),
        (broken(lambda c: c["images"][1].pop("file_name")), 'entry 1 of images has no "file_name"'),
        (broken(lambda c: c["annotations"][3].pop("bbox")), 'entry 3 of annotations has no "bbox"'),
        (broken(lambda c: c["annotations"][3].update(id=1)), "id 1 occurs more than once"),
        (broken(lambda c: c["annotations"][0].update(category_id=9)), "category_id 9"),
        (broken(lambda c: c["annotations"][0].update(bbox=[1, 2, 3])), "four finite numbers"),
        (broken(lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")])), "four finite"),
        (broken(lambda c: c["annotations"][0].update(ignore=1)), "iscrowd"),
        (broken(lambda c: [a.update(iscrowd=1) for a in c["annotations"]]), "crowd"),
        (
            broken(lambda c: c["images"][4].update(file_name="gone.png")),
            "image 5 .gone.png. is missing from .*images",
        ),
    ],
)
def test_bad_annotation_files(tmp_path, content, words):
    with pytest.raises(UserError, match=words) as error:
        checked(tmp_path, content)
    assert str(tmp_path / "reg.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    spec = f"reg={write_coco(tmp_path, 'reg')}"
    file = tmp_path / "reg.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(UserError, match="reg.json is not a complete JSON file"):
        check_coco_dataset(parse_dataset(spec))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="reg.json is not a complete JSON file"):
        check_coco_dataset(parse_dataset(spec))
    file.unlink()
    with pytest.raises(UserError, match="reg.json cannot be read .No such file"):
        check_coco_dataset(parse_dataset(spec))
    with pytest.raises(UserError, match="image folder .*nowhere does not exist"):
        check_coco_dataset(parse_dataset(f"reg={file},{tmp_path / 'nowhere'}"))


def test_what_is_left_out_is_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    content = coco_content()
    notes = content["annotations"]
    notes[0]["bbox"] = [5, 5, 0, 7]
    notes[1]["bbox"] = [5, 5, -4, 7]  # Detectron2's mapper would make it positive
    notes[4]["image_id"] = 99
    notes[5]["image_id"] = 99
    with caplog.at_level(logging.INFO, logger="ghm_d2"):
        dataset = checked(tmp_path, content)
    text = caplog.text
    assert "2 annotations belong to no listed image" in text
    assert "2 boxes have no positive width and height" in text
    assert "2 images have no annotation" in text
    register_coco_dataset(dataset)
    records = DatasetCatalog.get("reg")
    assert [len(r["annotations"]) for r in records] == [0, 2, 0, 2, 2, 2]


def test_complete_file_logs_nothing_left_out(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="ghm_d2"):
        checked(tmp_path, coco_content())
    assert not caplog.records


@pytest.mark.parametrize("change", [{"area": None}, {"iscrowd": None}, {"id": 0}, {"id": "a"}])
def test_what_pycocotools_cannot_evaluate_is_converted(tmp_path, change):
    """Without json_file in the metadata, Detectron2 writes a complete file by itself."""
    content = coco_content()
    content["annotations"][0].update(change)
    content = json.loads(json.dumps(content))
    for annotation in content["annotations"]:
        for key in [k for k, v in annotation.items() if v is None]:
            del annotation[key]
    dataset = checked(tmp_path, content)
    assert not dataset.evaluable
    register_coco_dataset(dataset)
    assert MetadataCatalog.get("reg").get("json_file") is None


def test_categories_must_agree(tmp_path):
    first = checked(tmp_path, coco_content(), "one")
    check_same_classes([first, checked(tmp_path, coco_content(), "two")])
    other = checked(tmp_path, coco_content(classes=CLASSES[::-1]), "three")
    with pytest.raises(UserError, match="one.json and .*three.json list different categories"):
        check_same_classes([first, first, other])
