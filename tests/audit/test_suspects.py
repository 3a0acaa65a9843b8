"""Detections that are given, so that it is known what is suspicious and how much."""

import numpy as np
import pytest

from ghm_d2.audit.copies import dropped, marked, mended
from ghm_d2.audit.suspects import choose, judge

CATEGORIES = [{"id": k, "name": name} for k, name in ((3, "disc"), (5, "bar"), (8, "cup"))]
BOX = {"a": [10, 10, 20, 20], "b": [50, 10, 20, 20], "c": [10, 50, 20, 20], "d": [50, 50, 20, 20]}


def place(box):
    return BOX[box] if isinstance(box, str) else box


def content(*rows, images=1):
    """Annotations (image, class, box), numbered from 11."""
    return {
        "images": [{"id": i + 1, "file_name": f"{i}.png"} for i in range(images)],
        "categories": CATEGORIES,
        "annotations": [
            {"id": n, "image_id": image, "category_id": k, "bbox": place(box), "iscrowd": 0}
            for n, (image, k, box) in enumerate(rows, start=11)
        ],
    }


def detections(*rows):
    """(box, class, score) of one image."""
    boxes, classes, scores = zip(*rows, strict=True) if rows else ((), (), ())
    boxes = np.array([place(box) for box in boxes], float).reshape(-1, 4)
    return boxes, np.array(classes, int), np.array(scores, float)


def scores(suspects, kind):
    return {s.annotation_id: s.score for s in suspects if s.kind == kind}


@pytest.fixture(scope="module")
def judged():
    """Box a is right, b has the wrong class, c lies wrong, d is spurious, and an object is missing.

    The mean confidence where annotations are believed is 0.8, of disc.
    """
    given = content((1, 3, "a"), (1, 3, "b"), (1, 3, "c"), (1, 5, "d"))
    moved = [10, 60, 20, 20]  # IoU 1/3 with c
    found = detections(
        ("a", 3, 0.8), ("b", 3, 0.1), ("b", 5, 0.7), (moved, 3, 0.9), ([90, 90, 20, 20], 3, 0.85)
    )  # fmt: skip
    return given, judge(given, {1: found})


def test_the_gradient_norms_of_the_class(judged):
    """(|p - 1| of the annotated class + p of the other one) / 2."""
    _, suspects = judged
    assert scores(suspects, "wrong class") == {12: (0.9 + 0.7) / 2}
    (wrong,) = [s for s in suspects if s.kind == "wrong class"]
    assert (wrong.category_id, wrong.believed_category_id) == (3, 5)
    assert wrong.bbox == wrong.believed_bbox == BOX["b"] and wrong.confidence == 0.7


def test_scores_of_places(judged):
    _, suspects = judged
    expected = {11: 0.0, 12: 0.0, 13: round(0.9 * (1 - 1 / 3), 6)}
    assert scores(suspects, "moved") == expected
    expected = {11: 0.2, 12: 0.3, 13: round(1 - 0.9 / 3, 6), 14: 1.0}
    assert scores(suspects, "spurious") == pytest.approx(expected)
    (missing,) = [s for s in suspects if s.kind == "missing"]
    assert missing.score == missing.confidence == 0.85 and missing.annotation_id is None
    assert (missing.believed_category_id, missing.believed_bbox) == (3, [90, 90, 20, 20])
    assert [s.score for s in suspects] == sorted((s.score for s in suspects), reverse=True)


def test_what_is_chosen_by_default_and_by_number(judged):
    _, suspects = judged
    chosen = choose(suspects)
    assert [(s.kind, s.annotation_id) for s in chosen] == [
        ("wrong class", 12), ("missing", None), ("moved", 13), ("spurious", 14)
    ]  # fmt: skip
    assert choose(suspects, 0) == []
    # 13 is the second of the spurious ones, and moved already.
    numbers = [(s.kind, s.annotation_id) for s in choose(suspects, 2)]
    assert numbers.count(("moved", 13)) == 1 and ("spurious", 13) not in numbers


def test_copies(judged):
    given, suspects = judged
    chosen = choose(suspects)
    before = [dict(row) for row in given["annotations"]]
    rows = marked(given, chosen)["annotations"]
    assert [row.get("suspect", {}).get("kind") for row in rows] == [
        None, "wrong class", "moved", "spurious"
    ]  # fmt: skip
    assert rows[1]["suspect"]["believed_category_id"] == 5 and rows[1]["category_id"] == 3
    assert [row["believed_bbox"] for row in marked(given, chosen)["missing"]] == [[90, 90, 20, 20]]
    assert [row["id"] for row in dropped(given, chosen)["annotations"]] == [11]
    rows = mended(given, chosen)["annotations"]
    assert [(row["id"], row["category_id"], row["bbox"]) for row in rows] == [
        (11, 3, BOX["a"]), (12, 5, BOX["b"]), (13, 3, [10, 60, 20, 20]), (15, 3, [90, 90, 20, 20])
    ]  # fmt: skip
    assert rows[2]["area"] == rows[3]["area"] == 400
    assert given["annotations"] == before


def test_a_mask_keeps_its_area():
    given = content((1, 3, "a"), (1, 3, "c"))
    given["annotations"][1].update(segmentation=[[10, 50, 30, 50, 30, 70]], area=200)
    found = detections(("a", 3, 0.8), ([10, 60, 20, 20], 3, 0.9))
    (row,) = mended(given, choose(judge(given, {1: found})))["annotations"][1:]
    assert row["bbox"] == [10, 60, 20, 20] and row["area"] == 200


def test_a_class_is_judged_by_what_covers_the_box():
    """IoU 0.5 or more, in whatever order; an object that is not found at all has no other class."""
    given = content((1, 3, "a"))
    half = [10, 10, 20, 40]  # IoU 0.5
    assert scores(judge(given, {1: detections((half, 5, 0.6))}), "wrong class") == {11: 0.8}
    less = [10, 10, 20, 41]
    assert scores(judge(given, {1: detections((less, 5, 0.6))}), "wrong class") == {}
    assert scores(judge(given, {1: detections()}), "spurious") == {11: 1.0}
    both = judge(given, {1: detections(("a", 5, 0.4), ("a", 8, 0.5), ("a", 3, 0.5))})
    assert scores(both, "wrong class") == {11: 0.5} and choose(both) == []


def test_one_detection_fits_one_annotation():
    """Of two annotations on one object, the worse one has nothing."""
    given = content((1, 3, [14, 10, 20, 20]), (1, 3, "a"))
    suspects = judge(given, {1: detections(("a", 3, 0.8))})
    assert scores(suspects, "spurious") == pytest.approx({11: 1.0, 12: 0.2})
    assert scores(suspects, "moved") == {12: 0.0}


def test_a_worse_detection_of_another_class_is_no_missing_object():
    given = content((1, 3, "a"))
    found = detections(("a", 3, 0.8), ([11, 10, 20, 20], 5, 0.7))
    assert not [s for s in judge(given, {1: found}) if s.kind == "missing"]


def test_crowd_regions_are_neither_judged_nor_missing():
    given = content((1, 3, "a"), (1, 3, [40, 0, 100, 100]))
    given["annotations"][1]["iscrowd"] = 1
    suspects = judge(given, {1: detections(("a", 3, 0.8), ("b", 3, 0.9), ([10, 80, 9, 9], 3, 0.9))})
    assert {s.annotation_id for s in suspects} == {11, None}
    assert [(s.believed_bbox[0], s.score) for s in suspects if s.kind == "missing"] == [
        (10, 0.9), (50, 0.0)
    ]  # fmt: skip
    assert [s.believed_bbox[0] for s in choose(suspects)] == [10]


def test_how_sure_is_sure_follows_the_detector():
    """As sure as it is, in the mean, of the objects of the class whose annotation it believes."""
    given = content((1, 3, "a"), (1, 3, "b"), (1, 3, "c"))
    for score, number in ((0.39, 0), (0.41, 1)):
        # c is not believed. Of the class 5 there is no annotation to compare with.
        found = detections(
            ("a", 3, 0.3), ("b", 3, 0.5), ("c", 3, 0.1), ("c", 5, 0.9), ("d", 3, score),
            ([90, 90, 20, 20], 5, 0.9),
        )  # fmt: skip
        kinds = [s.kind for s in choose(judge(given, {1: found}))]
        assert kinds == ["wrong class"] + ["missing"] * number, score


def test_images_without_detections_given_are_not_judged():
    given = content((1, 3, "a"), (2, 3, "a"), images=2)
    assert {s.image_id for s in judge(given, {1: detections(("a", 3, 0.8))})} == {1}
    assert judge({**given, "annotations": []}, {1: detections()}) == []
