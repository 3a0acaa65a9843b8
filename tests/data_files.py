"""Small annotation files, each with one fault or habit of one tool, and what becomes of each.

All of them begin as tiny.coco_content: six images of 64 x 64 pixels with two boxes each.
"""

import gzip
import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from tests.tiny import coco_content, write_coco

Change = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        change: changes the content in place.
        objects: that are trained on; None: one sentence refuses the data.
        words: in that sentence, or in the warning; "": there is no warning.
        place: changes the files, given their folder and the content.
        encode: the bytes of the annotation file.
        split: whether `split-data`, which sees no images, takes the file; None: as training does.
    """

    change: Change = lambda content: None
    objects: int | None = 12
    words: str = ""
    place: Callable[[Path, dict[str, Any]], None] = lambda folder, content: None
    encode: Callable[[str], bytes] = str.encode
    split: bool | None = None
    pairs: tuple[str, ...] = field(default=())

    def write(self, folder: Path, name: str = "case") -> tuple[Path, Path]:
        """Writes images and annotations; returns the file and the folder of the images."""
        content = coco_content()
        write_coco(folder, name, content)
        self.change(content)
        self.place(folder / "images", content)
        file = folder / f"{name}.json"
        file.write_bytes(self.encode(json.dumps(content)))
        return file, folder / "images"


def every(table: str = "annotations", **values: Any) -> Change:
    """Sets fields of all entries; a function is called with the entry."""

    def change(content: dict[str, Any]) -> None:
        for row in content[table]:
            row.update({k: v(row) if callable(v) else v for k, v in values.items()})

    return change


def one(place: int = 0, table: str = "annotations", **values: Any) -> Change:
    """Sets fields of one entry."""
    return lambda content: content[table][place].update(values)


def without(name: str, table: str = "annotations") -> Change:
    """Takes a field from all entries."""
    return lambda content: [row.pop(name) for row in content[table]]


def together(*changes: Change) -> Change:
    """All of them, one after the other."""
    return lambda content: [change(content) for change in changes]


def corners(row: dict[str, Any]) -> list[float]:
    """x0, y0, x1, y1."""
    x, y, w, h = row["bbox"]
    return [x, y, x + w, y + h]


def polygon(row: dict[str, Any]) -> list[float]:
    """The four corners of the box."""
    x0, y0, x1, y1 = corners(row)
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def rle(row: dict[str, Any], size: int = 64, text: bool = True) -> dict[str, Any]:
    """The box as a mask."""
    mask = np.zeros((size, size), dtype=np.uint8, order="F")
    x0, y0, x1, y1 = map(int, corners(row))
    mask[y0:y1, x0:x1] = 1
    if text:
        encoded = mask_util.encode(mask)
        return {"size": [size, size], "counts": encoded["counts"].decode()}
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [size, size], "counts": np.diff([0, *ends.tolist(), flat.size]).tolist()}


def renumber(table: str, field_name: str, new: Callable[[int], Any]) -> Change:
    """Gives new ids to a table, and to what refers to it."""

    def change(content: dict[str, Any]) -> None:
        for row in content[table]:
            row["id"] = new(row["id"])
        for row in content["annotations"]:
            row[field_name] = new(row[field_name])

    return change


def image_ids(new: Callable[[int], Any]) -> Change:
    """New ids of images."""
    return renumber("images", "image_id", new)


def category_ids(new: Callable[[int], Any]) -> Change:
    """New ids of categories."""
    return renumber("categories", "category_id", new)


def listed_twice(content: dict[str, Any]) -> None:
    """The first image has a second entry, to which its second box belongs."""
    content["images"].append({**content["images"][0], "id": 70})
    content["annotations"][1]["image_id"] = 70


def same_name(content: dict[str, Any]) -> None:
    """Two classes called "disc"."""
    content["categories"][1]["name"] = "disc"


def repeated(content: dict[str, Any]) -> None:
    """Every box stands twice."""
    content["annotations"] += [{**row, "id": row["id"] + 50} for row in content["annotations"]]


def renamed(new: Callable[[str], str]) -> Change:
    """Other file names in the file than on the disk."""
    return every("images", file_name=lambda row: new(row["file_name"]))


def moved(new: Callable[[str], str]) -> Callable[[Path, dict[str, Any]], None]:
    """Other names on the disk than `tiny` gives."""

    def place(folder: Path, content: dict[str, Any]) -> None:
        for i in range(6):
            target = folder / new(f"{i}.png")
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").rename(target)

    return place


def twins(folder: Path, content: dict[str, Any]) -> None:
    """Two folders with a file of one name, of which the annotation file has neither."""
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "5.png").write_bytes((folder / "5.png").read_bytes())
    (folder / "5.png").unlink()


ACCENT = unicodedata.normalize("NFC", "ü")
SIZE = "image 1 (0.png)"

CASES = {
    "clean": Case(),
    # area: what pycocotools compares with 32^2 and 96^2
    "area null": Case(every(area=None), words='12 annotations have an impossible "area"'),
    "area text": Case(every(area="big"), words="12 annotations have an"),
    "area number as text": Case(every(area="720"), words="12 values are text"),
    "area minus one": Case(every(area=-1), words="12 annotations have an"),
    "area zero": Case(every(area=0), words="12 annotations have an"),
    "area nan": Case(one(area=float("nan")), words="1 annotations have an"),
    "area fraction": Case(every(area=0.17), words="12 annotations have an"),
    "area missing": Case(without("area")),
    # iscrowd
    "crowd null": Case(every(iscrowd=None), words='12 annotations have "iscrowd" as null'),
    "crowd zero as text": Case(every(iscrowd="0"), words='12 annotations have "iscrowd"'),
    "crowd one as text": Case(one(iscrowd="1"), 11, words='1 annotations have "iscrowd"'),
    "crowd false": Case(every(iscrowd=False), words='12 annotations have "iscrowd"'),
    "crowd true": Case(one(iscrowd=True), 11, words='1 annotations have "iscrowd"'),
    "crowd float": Case(every(iscrowd=0.0), words='12 annotations have "iscrowd"'),
    "crowd missing": Case(without("iscrowd")),
    "crowd two": Case(one(iscrowd=2), None, '"iscrowd" 2 instead of 0'),
    "crowd a word": Case(one(iscrowd="maybe"), None, "'maybe' instead of 0"),
    "all crowd": Case(every(iscrowd=1), None, "of its 12 annotations 12 are crowd regions"),
    # ids
    "image ids text": Case(image_ids(str)),
    "image ids names": Case(image_ids(lambda i: f"{i}.png")),
    "image ids from 0, named as text": Case(
        together(image_ids(lambda i: i - 1), every(image_id=lambda row: str(row["image_id"])))
    ),
    "image ids mixed": Case(image_ids(lambda i: i if i % 2 else f"im{i}")),
    "image ids float": Case(image_ids(float)),
    "image ids huge": Case(image_ids(lambda i: 10**30 + i)),
    "image ids zero and text zero": Case(
        image_ids(lambda i: {1: 0, 2: "0"}.get(i, i))
    ),
    "category ids text": Case(category_ids(str)),
    "category ids mixed": Case(category_ids(lambda i: "two" if i == 2 else i)),
    "category ids from 0": Case(category_ids(lambda i: i - 1)),
    "category name a number": Case(one(0, "categories", name=7)),
    "annotation ids missing": Case(without("id")),
    "annotation ids null": Case(every(id=None)),
    "annotation ids text": Case(every(id=lambda row: f"a{row['id']}")),
    "annotation id zero": Case(one(id=0)),
    "annotation ids all zero": Case(every(id=0), None, "number the entries anew"),
    "id a list": Case(one(id=[1]), None, r'"id" \[1\] instead of a number or text'),
    "id true": Case(one(image_id=True), None, '"image_id" True instead of'),
    "unknown category": Case(one(category_id=9), None, "category_id 9.*add the category"),
    "some strays": Case(one(3, image_id=99), 11, "1 annotations belong to no listed image"),
    "all strays": Case(every(image_id="x"), None, "12 belong to no listed image.*refers to image"),
    # boxes
    "box as text": Case(every(bbox=lambda row: list(map(str, row["bbox"]))), words="12 values are"),
    "box missing": Case(without("bbox"), None, 'has no "bbox"'),
    "box missing, polygon there": Case(
        together(every(segmentation=lambda row: [polygon(row)]), without("bbox")),
        words="12 annotations have no box: it is computed from their masks",
    ),
    "box empty list, mask there": Case(
        together(every(segmentation=rle), every(bbox=[])), words="12 annotations have no box"
    ),
    "box null": Case(one(bbox=None), None, 'has no "bbox"'),
    "box of three": Case(one(bbox=[1, 2, 3]), None, r"\[1, 2, 3\] instead of four finite numbers"),
    "box nan": Case(one(bbox=[1, 2, float("nan"), 4]), None, "four finite numbers"),
    "box of 400 digits": Case(one(bbox=[1, 2, 10**400, 4]), None, "four finite numbers"),
    "box flat": Case(one(bbox=[5, 5, 9, 0]), 11, "1 boxes have no positive width and height"),
    "all boxes flat": Case(
        every(bbox=[5, 5, 0, 0]), None, "of its 12 annotations 12 have no positive width"
    ),
    "box outside": Case(one(bbox=[70, 5, 9, 9]), 11, "1 boxes lie outside their image"),
    "all boxes outside": Case(
        every(bbox=lambda row: [100, 100 + row["id"], 9, 9]), None, "12 lie outside their image"
    ),
    "box clipped": Case(one(bbox=[-9, 5, 30, 30]), words="1 boxes reach more than a pixel beyond"),
    "boxes as fractions": Case(
        every(bbox=lambda row: [v / 64 for v in row["bbox"]]), None, "multiply x and width"
    ),
    "boxes as centres in fractions": Case(
        every(bbox=lambda row: [(row["bbox"][0] + 12) / 64, 0.5, 0.3, 0.4]), None, "counts pixels"
    ),
    "boxes as corners": Case(every(bbox=corners), None, "write width = x1 - x0"),
    "boxes repeated": Case(repeated, words="12 annotations repeat the class and box"),
    "ignore as text": Case(every(ignore="0")),
    "ignore": Case(one(ignore=1), None, 'set "iscrowd": 1'),
    # fields that a detector of boxes does not use
    "polygon flat": Case(every(segmentation=polygon)),
    "polygon of points": Case(
        every(segmentation=lambda row: np.reshape(polygon(row), (4, 2)).tolist())
    ),
    "polygon text": Case(every(segmentation="1,2,3,4,5,6")),
    "polygon of numbers as text": Case(
        every(segmentation=lambda row: [list(map(str, polygon(row)))])
    ),
    "polygon of two points": Case(every(segmentation=[[1, 2, 3, 4]])),
    "polygons empty": Case(every(segmentation=[])),
    "polygon null": Case(every(segmentation=[None])),
    "masks as text": Case(every(segmentation=rle)),
    "masks as numbers": Case(every(segmentation=lambda row: rle(row, text=False))),
    "masks of another size": Case(every(segmentation=lambda row: rle(row, 80))),
    "keypoints odd": Case(every(keypoints=[1, 2])),
    "keypoints text": Case(one(keypoints="none", num_keypoints="0")),
    # images
    "sizes missing": Case(
        together(without("width", "images"), without("height", "images")),
        words="6 images have no whole numbers",
    ),
    "sizes null": Case(every("images", width=None), words="6 images have no whole numbers"),
    "sizes zero": Case(every("images", width=0, height=0), words="6 images have no whole numbers"),
    "sizes a word": Case(one(0, "images", height="high"), words="1 images have no whole numbers"),
    "sizes text": Case(every("images", width="64", height="64"), words="6 values are text"),
    "sizes float": Case(every("images", width=64.0, height=64.0)),
    "sizes wrong": Case(one(0, "images", width=60), None, "64 x 64 pixels, but", split=True),
    "image twice": Case(listed_twice, words="1 entries repeat an image that is listed already"),
    "image twice with its id": Case(
        lambda c: c["images"].append(c["images"][0]), words="1 entries repeat an image"
    ),
    "image id twice": Case(one(1, "images", id=1), None, "id 1 occurs more than once in images"),
    "image name a number": Case(one(1, "images", file_name=7), None, '"file_name" 7 instead of'),
    "names with backslashes": Case(
        renamed(lambda n: f"..\\images\\{n}"), words="6 images are found by.*backslashes"
    ),
    "names of another machine": Case(
        renamed(lambda n: f"C:\\Users\\me\\data\\{n}"), words="6 images are found by.*other folders"
    ),
    "names with the folder again": Case(
        renamed(lambda n: f"images/{n}"), words="6 images are found by.*other folders"
    ),
    "names of a folder below": Case(
        place=moved(lambda n: f"train/a/{n}"), words="6 images are found by.*other folders"
    ),
    "names with %20": Case(
        renamed(lambda n: f"an%20image%20{n}"),
        place=moved(lambda n: f"an image {n}"),
        words="6 images are found by their base names.*% escapes",
    ),
    "names in another Unicode form": Case(
        renamed(lambda n: unicodedata.normalize("NFD", ACCENT) + n),
        place=moved(lambda n: ACCENT + n),
        words="6 images are found by.*another Unicode form",
    ),
    "names in upper case": Case(
        renamed(str.upper), words="6 images are found by.*upper or lower case"
    ),
    "names of nothing": Case(
        renamed(lambda n: f"x{n}"), None, "give the folder that holds them.*", split=True
    ),
    "a name of two files": Case(
        one(5, "images", file_name="5.png"), None, "2 files have its base name", twins, split=True
    ),
    "two names for one file": Case(
        together(one(4, "images", file_name="a/5.png"), one(5, "images", file_name="b/5.png")),
        None,
        "belongs to another entry",
        split=True,
    ),
    "a name that cannot be encoded": Case(
        one(5, "images", file_name="\ud800.png"), None, r"\\ud800.png. is missing", split=True
    ),
    # classes
    "two classes of one name": Case(same_name, words="1 categories have the name of another one"),
    "classes in two cases": Case(
        one(1, "categories", name="Disc "), words="1 class names differ only in case or spaces"
    ),
    "a class null": Case(one(0, "categories", name=None), None, 'has no "name"'),
    # the file
    "byte order mark": Case(encode=lambda text: text.encode("utf-8-sig")),
    "utf-16": Case(encode=lambda text: text.encode("utf-16")),
    "gzip": Case(encode=lambda text: gzip.compress(text.encode())),
    "half a gzip": Case(
        objects=None,
        words="not a complete gzip file",
        encode=lambda text: gzip.compress(text.encode())[:90],
    ),
    "half a file": Case(
        objects=None, words="not a complete JSON", encode=lambda text: text[:99].encode()
    ),
    "another encoding": Case(
        objects=None,
        words="save it as UTF-8",
        encode=lambda text: text.replace("disc", "\xe9").encode("cp1252"),
    ),
    "a list": Case(objects=None, words="not in COCO format", encode=lambda text: b"[1]"),
    "no annotations": Case(lambda c: c["annotations"].clear(), None, "holds no annotations"),
    "annotations null": Case(lambda c: c.update(annotations=None), None, "holds no annotations"),
    "a row null": Case(lambda c: c["annotations"].append(None), None, "entry 12 of annot"),
}  # fmt: skip

MASKS = ("MODEL.MASK_ON", "True")
# With a mask head: (change, INPUT.MASK_FORMAT, objects or None, words)
MASK_CASES = {
    "polygons": (every(segmentation=lambda r: [polygon(r)]), "polygon", 12, ""),
    "flat polygons": (every(segmentation=polygon), "polygon", 12, ""),
    "flat polygons as bits": (every(segmentation=polygon), "bitmask", 12, ""),
    "one of two points": (
        together(every(segmentation=polygon), one(segmentation=[[1, 2, 3, 4]])),
        "polygon",
        11,
        "1 segmentations are neither",
    ),
    "a part of two points": (
        every(segmentation=lambda r: [polygon(r), [1, 2, 3, 4]]),
        "polygon",
        12,
        "12 masks have parts that are no polygons",
    ),
    "all of two points": (
        every(segmentation=[[1, 2, 3, 4]]), "polygon", None, "12 have no mask that can be used",
    ),
    "all text": (every(segmentation="1,2"), "polygon", None, "12 have no mask that can be used"),
    "all empty": (every(segmentation=[]), "polygon", None, "MODEL.MASK_ON False"),
    "runs for polygons": (every(segmentation=rle), "polygon", None, "INPUT.MASK_FORMAT bitmask"),
    "runs": (every(segmentation=rle), "bitmask", 12, ""),
    "runs as numbers": (every(segmentation=lambda r: rle(r, text=False)), "bitmask", 12, ""),
    "runs of another size": (
        every(segmentation=lambda r: rle(r, 80)), "bitmask", None, "12 have no mask",
    ),
    "runs that end too early": (
        one(segmentation={"size": [64, 64], "counts": "zz"}), "bitmask", None, "11 objects of",
    ),
    "sizes float": (
        together(every(segmentation=rle), every("images", height=64.0)), "bitmask", 12, "",
    ),
    "crowd without a mask": (
        together(every(segmentation=polygon), one(iscrowd=1, segmentation=[])), "polygon", 11, "",
    ),
}  # fmt: skip
