"""Folders of every labelling tool: found out, read, registered, and converted likewise."""

import importlib
import json
import logging
import pickle
import re
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ghm_d2.cli import check_data, import_data, split_data
from ghm_d2.data import register_datasets
from ghm_d2.data.datasets import load_checked
from ghm_d2.errors import UserError
from tests.tiny import ROOT, forget_program, one_sentence
from tests.tool_files import BAR, TOOL_CASES
from tests.voc import write_lists


@pytest.fixture(autouse=True)
def clean_up(monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    yield
    forget_program()


def read(names, root):
    """Class and box of each object of the registered data sets, by image."""
    found = {}
    for name in names:
        classes = MetadataCatalog.get(name).thing_classes
        for record in DatasetCatalog.get(name):
            rows = [
                (classes[a["category_id"]], a["bbox"])
                for a in record["annotations"]
                if a["bbox_mode"] == BoxMode.XYWH_ABS
            ]
            found[Path(record["file_name"]).relative_to(root).as_posix()] = rows
    return found


def close(found, expected):
    """Compares them; `expected` has the ends of the paths."""
    ends = {name: next((k for k in found if k.endswith(name)), "") for name in expected}
    assert len(found) == len(expected) and all(ends.values()), found
    for name, rows in expected.items():
        assert [c for c, _ in found[ends[name]]] == [c for c, _ in rows]
        for (_, box), (_, wanted) in zip(found[ends[name]], rows, strict=True):
            assert box == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("name", TOOL_CASES)
def test_dataset_takes_the_folder(tmp_path, caplog, name):
    case = TOOL_CASES[name]
    case.write(tmp_path)
    caplog.set_level(logging.INFO, "ghm_d2")
    argument = [f"my={tmp_path / case.source if case.source else tmp_path}"]
    if case.objects is None:
        with pytest.raises(UserError) as error:
            register_datasets(argument)
        text = str(error.value)
        assert re.search(case.words, text) and "\n" not in text
        return
    datasets = register_datasets(argument)
    expected = ["my_train", "my_val"] if case.splits else ["my"]
    assert [dataset.name for dataset in datasets] == expected
    found = read(expected, tmp_path)
    close(found, case.objects)
    if case.splits:
        assert tuple(len(DatasetCatalog.get(name)) for name in expected) == case.splits
    said = "\n".join(r.getMessage() for r in caplog.records)
    assert f"{case.tool} " in said
    if case.words:
        assert re.search(case.words, said), said
    else:
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING], said


@pytest.mark.parametrize("name", [n for n, case in TOOL_CASES.items() if case.tool != "COCO"])
def test_import_data_writes_the_same(tmp_path, capsys, name):
    case = TOOL_CASES[name]
    folder = tmp_path / "in"
    case.write(folder)
    argv = [folder / case.source, "--output-dir", tmp_path / "out"]
    if case.objects is None and name != "yolo, a split without objects":  # for training alone
        sentence = one_sentence(import_data.main, argv, capsys, "ghm-d2 import-data")
        assert re.search(case.words, sentence)
        return
    if case.objects is None or len(case.objects) < 2:
        pytest.skip("one image cannot be split")
    import_data.main(list(map(str, argv)))
    found = {}
    for file in (tmp_path / "out").glob("*.json"):
        content = json.loads(file.read_text())
        classes = {row["id"]: row["name"] for row in content["categories"]}
        for row in content["images"]:
            own = [a for a in content["annotations"] if a["image_id"] == row["id"]]
            found[row["file_name"]] = [(classes[a["category_id"]], a["bbox"]) for a in own]
    close(found, case.objects)
    # What is printed is what --dataset takes.
    words = capsys.readouterr().out.splitlines()[-1].split()[1::2]
    if all(case.objects.values()):
        assert len(register_datasets(words)) == 2


def test_check_data_takes_a_folder_and_split_data_says_what_does(tmp_path, capsys):
    TOOL_CASES["yolo"].write(tmp_path)
    with pytest.raises(SystemExit) as stop:
        check_data.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.count("1 images, 1 annotations, 2 categories") == 2
    assert f"{tmp_path} (val): " in text
    argv = [tmp_path, "--output-dir", tmp_path / "o"]
    assert "import-data" in one_sentence(split_data.main, argv, capsys, "ghm-d2 split-data")


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("my={}", ["my_train", "my_val"]),
        ("my={},valid", ["my"]),
        ("my_val={}", ["my_val"]),
        ("x-train={}", ["x-train"]),
    ],
)
def test_splits_by_name(tmp_path, argument, names):
    TOOL_CASES["yolo"].write(tmp_path)
    found = register_datasets([argument.format(tmp_path)])
    assert [dataset.name for dataset in found] == names
    assert all(dataset.classes == ("disc", "bar") for dataset in found)
    again = register_datasets([str(dataset) for dataset in found])  # what a summary prints
    assert [(d.name, d.fingerprint) for d in again] == [(d.name, d.fingerprint) for d in found]
    with pytest.raises(UserError, match="has the splits train, val, not test"):
        register_datasets([f"y={tmp_path},test"])


def test_lists_of_voc_by_name(tmp_path):
    TOOL_CASES["voc"].write(tmp_path)
    write_lists(tmp_path, trainval=["a"], test=["b"])
    for argument, number in ((f"m={tmp_path}", 2), (f"m={tmp_path},trainval", 1)):
        (dataset,) = register_datasets([argument])
        assert len(dataset.labels) == number and dataset.name == "m"


def test_folders_that_declare_no_classes_share_them(tmp_path):
    TOOL_CASES["voc of Roboflow"].write(tmp_path)
    found = register_datasets([f"a={tmp_path}/train", f"b={tmp_path}/valid"])
    assert [dataset.classes for dataset in found] == [("bar", "disc")] * 2


def test_another_process_reads_the_same(tmp_path):
    TOOL_CASES["voc, a polygon"].write(tmp_path)
    (dataset,) = register_datasets([f"a={tmp_path}"])
    sent = pickle.loads(pickle.dumps(dataset))
    assert sent.data is None and load_checked(sent).content == dataset.data.content


def test_masks_of_polygons_train_a_mask_head(tmp_path):
    TOOL_CASES["labelme, polygons"].write(tmp_path)
    register_datasets([f"m={tmp_path}"])
    rows = [a for r in DatasetCatalog.get("m") for a in r["annotations"]]
    assert [len(row.get("segmentation", ())) for row in rows] == [1, 0]


LABELIMG = (
    "<annotation><folder>x</folder><filename>a.png</filename><path>/x/a.png</path><source>"
    "<database>Unknown</database></source><size><width>64</width><height>48</height><depth>3"
    "</depth></size><segmented>0</segmented><object><name>disc</name><pose>Unspecified</pose>"
    "<truncated>0</truncated><difficult>0</difficult><bndbox><xmin>4</xmin><ymin>6</ymin>"
    "<xmax>24</xmax><ymax>16</ymax></bndbox></object></annotation>"
)


def test_labelimg_s_offset_is_said(tmp_path, caplog, capsys):
    TOOL_CASES["voc"].write(tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_text(LABELIMG)
    caplog.set_level(logging.INFO, "ghm_d2")
    register_datasets([f"a={tmp_path}"])
    words = "1 boxes were written by labelImg, which counts from 0"
    assert words in caplog.text
    close(read(["a"], tmp_path), {"a.png": [("disc", [3, 5, 21, 11])], "b.png": [BAR]})
    caplog.clear()
    argv = ["--output-dir", str(tmp_path / "o"), "--val-fraction", "0.5", "--zero-based"]
    import_data.main([str(tmp_path), *argv])
    assert words not in caplog.text + capsys.readouterr().out


def test_the_table_of_the_other_libraries_is_that_of_these_folders(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    importers = importlib.import_module("importers")
    for column in json.loads(importers.FILE.read_text()).values():
        assert set(column["cases"]) == set(TOOL_CASES)  # else run benchmarks/importers.py again
    page = (ROOT / "docs" / "labels.md").read_text()
    assert importers.table() in page and f"{len(TOOL_CASES)} small ones are tests" in page
