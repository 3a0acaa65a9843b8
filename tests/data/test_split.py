"""ghm-d2 split-data."""

import json
import logging
import random

import pytest

from ghm_d2.cli.split_data import main
from ghm_d2.data.split import choose, fold_coco, split_coco
from ghm_d2.errors import UserError
from tests.tiny import coco_content


def split(*argv):
    main(list(map(str, argv)))


def test_two_files_hold_each_image_once(tmp_path, capsys):
    content = coco_content(8) | {"info": {"year": 2020}}
    (tmp_path / "all.json").write_text(json.dumps(content))
    split(tmp_path / "all.json", "--output", tmp_path / "out")
    parts = [json.loads((tmp_path / "out" / f"{n}.json").read_text()) for n in ("train", "val")]
    assert [len(part["images"]) for part in parts] == [6, 2]
    for table in ("images", "annotations"):
        rows = [row for part in parts for row in part[table]]
        assert sorted(rows, key=lambda row: row["id"]) == content[table]
    for part in parts:
        own = {row["id"] for row in part["images"]}
        assert {row["image_id"] for row in part["annotations"]} == own
        assert part["categories"] == content["categories"] and part["info"] == {"year": 2020}
    assert "train.json: 6 images, 12 objects (" in capsys.readouterr().out


def test_seed_decides_and_order_does_not():
    names = [f"{i}.png" for i in range(40)]
    shuffled = random.Random(3).sample(names, 40)
    assert choose(names, 0.25, 1) == choose(shuffled, 0.25, 1)
    assert choose(names, 0.25, 1) != choose(names, 0.25, 2)
    # Any machine, any version: a written-down choice.
    assert choose([str(i) for i in range(8)], 0.25, 1) == {"4", "7"}
    assert len(choose(names, 0.001, 1)) == 1 and len(choose(names, 0.999, 1)) == 39


def test_a_file_that_is_listed_twice_stays_together():
    content = coco_content(4)
    content["images"][3]["file_name"] = content["images"][0]["file_name"]
    for seed in range(6):
        for part in split_coco(content, 0.34, seed):
            assert len({row["id"] for row in part["images"]} & {1, 4}) in (0, 2)


def test_each_image_is_held_out_once():
    content = coco_content(8)
    content["images"][3]["file_name"] = content["images"][0]["file_name"]
    folds = fold_coco(content, 3, 1)
    assert sorted(len(held["images"]) for _, held in folds) in ([2, 3, 3], [2, 2, 4])
    for table in ("images", "annotations"):
        held_out = [row["id"] for _, held in folds for row in held[table]]
        assert sorted(held_out) == [row["id"] for row in content[table]]
    for rest, held in folds:
        names = [{row["file_name"] for row in part["images"]} for part in (rest, held)]
        assert not names[0] & names[1] and len(names[0] | names[1]) == 7
        assert {row["image_id"] for row in held["annotations"]} == {r["id"] for r in held["images"]}
    turned = {**content, "images": content["images"][::-1]}
    assert [ids(held) for _, held in fold_coco(turned, 3, 1)] == [ids(held) for _, held in folds]
    assert [ids(held) for _, held in fold_coco(content, 3, 2)] != [ids(held) for _, held in folds]
    for wrong in (1, 8, -1):
        with pytest.raises(UserError, match=f"number of images, 7, got {wrong}"):
            fold_coco(content, wrong, 1)


def ids(part):
    return {row["id"] for row in part["images"]}


def test_stray_annotations_are_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    content = coco_content(4)
    content["annotations"][0]["image_id"] = 99
    (tmp_path / "all.json").write_text(json.dumps(content))
    split(tmp_path / "all.json", "--output-dir", tmp_path / "out")
    assert "1 annotations belong to no listed image" in caplog.text


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, [], "cannot be read"),
        ("{", [], "not a complete JSON file"),
        ("[]", [], "is not in COCO format"),
        ('{"images": [{"id": 1}]}', [], "holds no categories"),
        (json.dumps({**coco_content(4), "images": [{"id": 1}]}), [], 'images has no "file_name"'),
        (json.dumps(coco_content(4)), ["--val-fraction", "1.5"], "between 0 and 1, got 1.5"),
        (json.dumps(coco_content(1)), [], "a split needs at least two images"),
    ],
)
def test_mistakes(text, options, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        split(tmp_path / "a.json", "--output-dir", tmp_path / "out", *options)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ghm-d2 split-data: error: ") and message in captured.err


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "val.json").write_text("mine")
    (tmp_path / "all.json").write_text(json.dumps(coco_content(4)))
    with pytest.raises(SystemExit):
        split(tmp_path / "all.json", "--output-dir", tmp_path)
    assert "val.json exists already" in capsys.readouterr().err
    assert not (tmp_path / "train.json").exists()
