"""ghm-d2 corrupt: what is changed is on record, and nothing else is changed."""

import gzip
import json

import numpy as np
import pytest
from detectron2.structures import Boxes, pairwise_iou

from ghm_d2.cli.corrupt import main
from ghm_d2.data.coco import check_content
from ghm_d2.data.corrupt import box_ious, corrupt_coco
from ghm_d2.errors import UserError
from tests.tiny import coco_content, one_sentence, write_coco

ALL = {"wrong class": 0.2, "missing": 0.2, "moved": 0.2, "spurious": 0.2}


def content(images=20):
    """2 objects an image, ids that do not begin at 1, and a crowd region."""
    made = coco_content(images)
    for row in made["annotations"]:
        row["id"] += 100
        row["bbox"][1] %= 32  # inside the image
    crowd = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [0, 0, 64, 64], "area": 4096}
    made["annotations"].append({**crowd, "iscrowd": 1})
    return made


def undone(noisy, changes):
    """What the list says that the annotations were, by id."""
    rows = {row["id"]: dict(row) for row in noisy["annotations"]}
    for change in changes:
        ident = change["annotation_id"]
        if change["before"] is None:
            assert rows.pop(ident) == change["after"]
        elif change["after"] is None:
            assert ident not in rows
            rows[ident] = change["before"]
        else:
            assert rows[ident].items() >= change["after"].items()
            rows[ident].update(change["before"])
    return rows


@pytest.mark.parametrize("shares", [ALL, *({kind: 0.3} for kind in ALL), {"missing": 1.0}])
def test_the_list_undoes_the_copy(shares):
    true = content()
    noisy, changes = corrupt_coco(true, shares, 3)
    assert true == content()  # not changed
    assert undone(noisy, changes) == {row["id"]: row for row in true["annotations"]}
    kinds = [change["kind"] for change in changes]
    assert {kind: kinds.count(kind) for kind in shares} == {
        kind: round(40 * share) for kind, share in shares.items()
    }
    touched = [change["annotation_id"] for change in changes]
    assert len(set(touched)) == len(touched) and 7 not in touched
    assert noisy["images"] == true["images"] and noisy["categories"] == true["categories"]


def test_each_kind_is_what_it_says():
    true = content()
    rows = {row["id"]: row for row in true["annotations"]}
    noisy, changes = corrupt_coco(true, ALL, 3)
    for change in changes:
        before, after, ident = change["before"], change["after"], change["annotation_id"]
        if change["kind"] == "wrong class":
            assert before["category_id"] != after["category_id"] in (1, 2, 3)
        if change["kind"] == "moved":
            box = np.array(after["bbox"])
            assert (box[:2] >= 0).all() and (box[:2] + box[2:] <= 64).all() and box[2:].min() > 0
            assert after["area"] == box[2] * box[3]
            both = [Boxes([[*b[:2], b[0] + b[2], b[1] + b[3]]]) for b in (box, before["bbox"])]
            assert change["iou"] == pytest.approx(float(pairwise_iou(*both)), abs=1e-4)
            assert 0.4 <= change["iou"] <= 0.7
        if change["kind"] == "spurious":
            assert ident > max(rows)
            sizes = {tuple(row["bbox"][2:]) for row in rows.values() if not row["iscrowd"]}
            assert tuple(after["bbox"][2:]) in sizes
            assert sum(after["bbox"][::2]) <= 64 and sum(after["bbox"][1::2]) <= 64
            there = [r["bbox"] for r in rows.values() if r["image_id"] == change["image_id"]]
            overlap = box_ious([after["bbox"]], there).max()
            assert change["iou"] == pytest.approx(overlap, abs=1e-4)
    # A reader takes the copy as it is.
    data = check_content(noisy)
    assert not data.found.kinds("stops") and not data.found.kinds("repaired")


def test_iou():
    others = [[0, 0, 4, 2], [2, 0, 4, 2], [2, 1, 4, 2], [9, 9, 1, 1]]
    np.testing.assert_allclose(box_ious([[0, 0, 4, 2]], others), [[1, 1 / 3, 1 / 7, 0]])
    inside = box_ious([[0, 0, 4, 2]], others, [1, 1, 0, 1])
    np.testing.assert_allclose(inside, [[1, 1 / 2, 1 / 7, 0]])
    assert box_ious([[0, 0, 1, 1]], []).shape == (1, 0) and box_ious([], others).shape == (0, 4)


def test_seed_and_share_decide_and_the_order_of_the_file_does_not():
    def chosen(share, seed, true=None):
        return {
            c["annotation_id"]: c["after"]
            for c in corrupt_coco(true or content(), {"wrong class": share}, seed)[1]
        }

    turned = content()
    turned["annotations"].reverse()
    assert chosen(0.25, 1) == chosen(0.25, 1, turned) != chosen(0.25, 2)
    assert chosen(0.25, 1).items() < chosen(0.5, 1).items()
    assert sorted(chosen(0.1, 1)) == [111, 124, 128, 139]  # any machine, any version


@pytest.mark.parametrize(("share", "number"), [(0, 0), (0.12, 0), (0.125, 1), (0.4, 2), (1, 4)])
def test_small_sets_are_rounded_to_the_nearest_number(share, number):
    for kind in ALL:
        assert len(corrupt_coco(coco_content(2), {kind: share}, 1)[1]) == number
    halves = {"wrong class": 0.5, "missing": 0.5}
    assert len(corrupt_coco(coco_content(2), halves, 1)[1]) == 4
    odd = coco_content(2)
    odd["annotations"].pop()
    assert len(corrupt_coco(odd, halves, 1)[1]) == 3  # no object twice


def test_a_box_as_large_as_its_image_is_moved_inside_it():
    true = coco_content(2)
    for row in true["annotations"]:
        row["bbox"] = [0, 0, 64, 64]
    noisy, changes = corrupt_coco(true, {"moved": 1, "spurious": 1}, 1)
    assert all(0.4 <= c["iou"] <= 0.7 for c in changes if c["kind"] == "moved")
    # No room beside the others: the list says so.
    assert [c["iou"] for c in changes if c["kind"] == "spurious"] == [1.0] * 4
    assert all(sum(row["bbox"][::2]) <= 64 for row in noisy["annotations"])


def test_spurious_boxes_lie_where_nothing_is():
    true = coco_content(2)
    true["images"][1].update(width=400, height=300)  # the other one has hardly room
    noisy, changes = corrupt_coco(true, {"spurious": 1.0}, 2)
    found = [(c["image_id"], c["iou"]) for c in changes]
    assert {image for image, _ in found} == {1, 2}
    assert all(iou <= 0.1 for image, iou in found if image == 2)
    assert not any("segmentation" in c["after"] for c in changes)


def test_spurious_boxes_fit_into_small_images():
    true = coco_content(2)
    true["images"][0].update(width=400, height=300)
    true["annotations"][0]["bbox"] = true["annotations"][1]["bbox"] = [5, 6, 300, 200]
    _, changes = corrupt_coco(true, {"spurious": 1.0}, 1)
    boxes = [c["after"]["bbox"] for c in changes if c["image_id"] == 2]
    assert any(box[2:] == [64, 64] for box in boxes)
    assert all(box[0] + box[2] <= 64 and box[1] + box[3] <= 64 for box in boxes)


def test_where_no_place_is_free_the_freest_is_taken():
    true = coco_content(2)
    for row in true["annotations"]:
        row["bbox"] = [0, 0, 40, 40]
    _, changes = corrupt_coco(true, {"spurious": 1.0}, 1)
    # 24 pixels of room: the least overlap is 16 x 16 of 40 x 40 each; at random it is 0.36.
    assert all(c["iou"] < 0.15 for c in changes)


def test_masks_stay_and_spurious_boxes_get_one_where_others_have():
    true = coco_content(4)
    for row in true["annotations"]:
        x, y, w, h = row["bbox"]
        row["segmentation"] = [[x, y, x + w, y, x, y + h]]
        row["area"] = w * h / 2
    noisy, changes = corrupt_coco(true, {"moved": 0.5, "spurious": 0.5}, 1)
    assert {tuple(c["after"]) for c in changes if c["kind"] == "moved"} == {("bbox",)}
    assert all(len(row["segmentation"][0]) in (6, 8) for row in noisy["annotations"])
    x, y, w, h = noisy["annotations"][-1]["bbox"]
    assert noisy["annotations"][-1]["segmentation"] == [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"moved": 1.5}, "'moved' must lie in [0, 1], got 1.5"),
        ({"missing": -0.1}, "got -0.1"),
        ({"spurious": float("nan")}, "got nan"),
        ({"wrong class": 0.5, "moved": 0.6}, "add up to 1.1"),
        ({"turned": 0.5}, "no kind of error 'turned'"),
    ],
)
def test_shares_out_of_range(shares, message):
    with pytest.raises(UserError) as error:
        corrupt_coco(content(), shares, 1)
    assert message in str(error.value)


def test_the_command(tmp_path, capsys):
    true = content()
    (tmp_path / "all.json.gz").write_bytes(gzip.compress(json.dumps(true).encode()))
    words = [str(tmp_path / "all.json.gz"), "--output", str(tmp_path / "out" / "noisy.json")]
    main([*words, "--wrong-class", "0.1", "--spurious", "0.05", "--seed", "4"])
    noisy = json.loads((tmp_path / "out" / "noisy.json").read_text())
    changes = json.loads((tmp_path / "out" / "noisy.changes.json").read_text())
    assert (noisy, changes) == corrupt_coco(true, {"wrong class": 0.1, "spurious": 0.05}, 4)
    text = capsys.readouterr().out
    assert "wrong class: 4 of 40 objects (10.00%)" in text and "spurious: 2 of 40" in text
    assert "noisy.json exists already" in one_sentence(
        main, [*words, "--missing", "1"], capsys, "ghm-d2 corrupt"
    )
    assert "give one or more of --wrong-class, --missing, --moved, --spurious" in one_sentence(
        main, words, capsys, "ghm-d2 corrupt"
    )
    (tmp_path / "out" / "noisy.json").unlink()  # its list is there still
    assert "noisy.changes.json exists already" in one_sentence(
        main, [*words, "--missing", "1"], capsys, "ghm-d2 corrupt"
    )


def test_ids_of_the_file_are_kept(tmp_path):
    """Also those that pycocotools does not take, and that of an annotation that is left out."""
    true = coco_content(2)
    for ident, row in enumerate(true["annotations"]):
        row["id"] = ident
    true["annotations"].append({**true["annotations"][0], "id": 50, "bbox": [1, 1, 0, 0]})
    write_coco(tmp_path, content=true)
    main([str(tmp_path / "train.json"), "--output", str(tmp_path / "n.json"), "--spurious", "0.5"])
    noisy = json.loads((tmp_path / "n.json").read_text())
    assert [row["id"] for row in noisy["annotations"]] == [0, 1, 2, 3, 51, 52]


def test_sizes_are_read_from_the_images(tmp_path, capsys):
    true = coco_content(2)
    for row in true["images"]:
        del row["width"]
    write_coco(tmp_path, content=true)
    words = [str(tmp_path / "train.json"), "--output", str(tmp_path / "n.json"), "--moved", "1"]
    assert "0.png has no width and height" in one_sentence(main, words, capsys, "ghm-d2 corrupt")
    main([*words, "--image-dir", str(tmp_path / "images")])
    assert json.loads((tmp_path / "n.json").read_text())["images"][0]["width"] == 64


def test_one_class_has_no_wrong_one(tmp_path, capsys):
    write_coco(tmp_path, content=coco_content(2, ("cell",)))
    words = [str(tmp_path / "train.json"), "--output", str(tmp_path / "n.json")]
    assert "there is only one class, so none is wrong" in one_sentence(
        main, [*words, "--wrong-class", "0.1"], capsys, "ghm-d2 corrupt"
    )
