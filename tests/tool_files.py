"""Small folders as labelling tools write them, each with a habit or fault, and what they hold.

Wherever nothing else is said, a.png holds a disc at 4, 6, 20, 10 and b.png a bar at 10, 12, 24, 30
(x, y, width, height; both images have 64 x 48 pixels).
"""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.voc import voc_xml, write_image

DISC, BAR = ("disc", [4, 6, 20, 10]), ("bar", [10, 12, 24, 30])
BOTH = {"a.png": [DISC], "b.png": [BAR]}


@dataclass(frozen=True)
class ToolCase:
    """One folder.

    Attributes:
        tool: the kind of its labels.
        write: makes it.
        objects: class and box of the objects of each image; None: one sentence refuses the folder.
        words: in that sentence, or in the log; "": there is no warning.
        splits: images of each part; empty where it is one.
        source: what is given instead of the folder, relative to it.
    """

    tool: str
    write: Callable[[Path], Any]
    objects: dict[str, list] | None = None
    words: str = ""
    splits: tuple[int, ...] = ()
    source: str = ""


def put(folder: Path, **files: Any) -> None:
    """Writes files; "__" in a name stands for "/", and a dict or list is written as JSON."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))


def images(folder: Path, *names: str) -> None:
    """Images of 64 x 48 pixels."""
    for name in names or ("a.png", "b.png"):
        write_image(folder / name, seed=sum(name.encode()))


# YOLO: class, centre and size as fractions
def fractions(box: list[float], k: int = 0) -> str:
    """The line of a box."""
    x, y, w, h = box
    return f"{k} {(x + w / 2) / 64} {(y + h / 2) / 48} {w / 64} {h / 48}\n"


def outlined(box: list[float], k: int = 0) -> str:
    """The line of a polygon, a rectangle of four points."""
    x, y, w, h = box
    points = ((x, y), (x + w, y), (x + w, y + h), (x, y + h))
    return f"{k} " + " ".join(f"{px / 64} {py / 48}" for px, py in points) + "\n"


A, B = fractions(DISC[1], 0), fractions(BAR[1], 1)
NAMES = "names: [disc, bar]\n"


def yolo(
    yaml: str | None = NAMES + "train: images/train\nval: images/val\n",
    a: str | None = A,
    b: str | None = B,
    tree: str = "images/{split}/{name}",
    val: str = "val",
    **more: Any,
) -> Callable[[Path], None]:
    """A folder with a.png in train and b.png in val."""

    def write(folder: Path) -> None:
        for split, name, text in (("train", "a", a), (val, "b", b)):
            image = tree.format(split=split, name=f"{name}.png")
            images(folder, image)
            if text is not None:
                label = image.replace("images", "labels", 1).replace(".png", ".txt")
                put(folder, **{label: text})
        put(folder, **({"data.yaml": yaml} if yaml is not None else {}), **more)

    return write


SPLIT = (1, 1)
ALL = "train: images\n" + NAMES
ROBOFLOW = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\n" + NAMES

YOLO = {
    "yolo": ToolCase("YOLO", yolo(), BOTH, splits=SPLIT),
    "yolo, names as a dict": ToolCase(
        "YOLO",
        yolo("path: .\ntrain: images/train\nval: images/val\nnames:\n  0: disc\n  1: bar\n"),
        BOTH,
        splits=SPLIT,
    ),
    "yolo, names of other ids": ToolCase(
        "YOLO",
        yolo("train: images\nnames: {3: disc, 5: bar}\n", "3" + A[1:], "5" + B[1:]),
        BOTH,
    ),
    "yolo, path of another machine": ToolCase(
        "YOLO",
        yolo("path: /home/me/sets/my\ntrain: images/train\nval: images/val\n" + NAMES),
        BOTH,
        splits=SPLIT,
    ),
    "yolo, all paths of another machine": ToolCase(
        "YOLO",
        yolo("train: C:\\me\\my\\images\\train\nval: C:\\me\\my\\images\\val\n" + NAMES),
        BOTH,
        splits=SPLIT,
    ),
    "yolo of Roboflow": ToolCase(
        "YOLO",
        yolo(
            ROBOFLOW,
            tree="{split}/images/{name}",
            val="valid",
            **{"README.roboflow.txt": "my set", "valid/.keep": ""},
        ),
        BOTH,
        splits=SPLIT,
    ),
    "yolo, lists of images": ToolCase(
        "YOLO",
        yolo(
            "train: train.txt\nval: [val.txt]\n" + NAMES,
            **{"train.txt": "./images/train/a.png\n", "val.txt": "/x/images/val/b.png\n"},
        ),
        BOTH,
        splits=SPLIT,
    ),
    "yolo, a list with an image that is gone": ToolCase(
        "YOLO",
        yolo(
            "train: train.txt\nval: val.txt\n" + NAMES,
            **{"train.txt": "./images/train/a.png\n./images/train/x.png\n", "val.txt": "b.png\n"},
        ),
        BOTH,
        "train.txt: 1 of the images that it lists do not exist; the first: ./images/train/x.png",
        SPLIT,
    ),
    "yolo, no val": ToolCase("YOLO", yolo("train: images\nval: images\n" + NAMES), BOTH),
    "yolo without a yaml": ToolCase(
        "YOLO", yolo(None, **{"classes.txt": "disc\nbar\n"}), BOTH, splits=SPLIT
    ),
    "yolo without names": ToolCase(
        "YOLO", yolo(None), {"a.png": [("0", DISC[1])], "b.png": [("1", BAR[1])]}, splits=SPLIT
    ),
    "yolo beside its images": ToolCase(
        "YOLO", yolo(None, tree="{name}", **{"classes.txt": "disc\nbar\n"}), BOTH
    ),
    "darknet": ToolCase(
        "YOLO",
        yolo(None, tree="obj_train_data/{name}", **{"obj.names": "disc\nbar\n", "obj.data": "x=1"}),
        BOTH,
    ),
    "yolo of Label Studio": ToolCase(
        "YOLO",
        yolo(
            None,
            tree="images/{name}",
            **{"classes.txt": "disc\nbar", "notes.json": {"categories": [], "info": {}}},
        ),
        BOTH,
    ),
    "yolo, an empty file": ToolCase("YOLO", yolo(ALL, b=""), {"a.png": [DISC], "b.png": []}),
    "yolo, a missing file": ToolCase(
        "YOLO",
        yolo(ALL, b=None),
        {"a.png": [DISC], "b.png": []},
        "1 images have no label file and count as background",
    ),
    "yolo, a split without objects": ToolCase("YOLO", yolo(b=""), None, "no labelled object"),
    "yolo, a byte order mark": ToolCase("YOLO", yolo(a="\ufeff" + A + "\n"), BOTH, splits=SPLIT),
    "yolo, polygons": ToolCase(
        "YOLO", yolo(a=outlined(DISC[1]), b=outlined(BAR[1], 1)), BOTH, splits=SPLIT
    ),
    "yolo, boxes and polygons": ToolCase("YOLO", yolo(b=outlined(BAR[1], 1)), BOTH, splits=SPLIT),
    "yolo, poses": ToolCase(
        "YOLO",
        yolo(
            NAMES + "train: images/train\nval: images/val\nkpt_shape: [2, 3]\n",
            A.strip() + " 0.1 0.2 2 0.3 0.4 2\n",
            B.strip() + " 0.1 0.2 2 0.3 0.4 2\n",
        ),
        BOTH,
        splits=SPLIT,
    ),
    "yolo with scores": ToolCase("YOLO", yolo(a=A.strip() + " 0.9\n"), BOTH, splits=SPLIT),
    "yolo, a class as 0.0": ToolCase("YOLO", yolo(a="0.0" + A[1:]), BOTH, splits=SPLIT),
    "yolo, a class without a name": ToolCase(
        "YOLO", yolo(b="7" + B[1:]), None, "class 7 has no name, as data.yaml has only 2"
    ),
    "yolo, a negative class": ToolCase("YOLO", yolo(b="-1" + B[1:]), None, "class -1 has no name"),
    "yolo, a line of words": ToolCase(
        "YOLO", yolo(a=A + "0 a b c d\n"), BOTH, "1 objects are left out.*line 2 of a.txt", SPLIT
    ),
    "yolo, a line cut off": ToolCase(
        "YOLO", yolo(a=A + "0 0.5 0.5\n"), BOTH, "line 2 of a.txt, '0 0.5 0.5', is not a box", SPLIT
    ),
    "yolo in pixels": ToolCase(
        "YOLO", yolo(a="0 14 11 20 10\n", b="1 22 27 24 30\n"), None, "is not in fractions"
    ),
    "yolo, a label of no image": ToolCase(
        "YOLO", yolo(**{"labels/train/c.txt": A}), BOTH, "c.txt has no image", SPLIT
    ),
    "yolo, an image that is none": ToolCase(
        "YOLO",
        yolo(**{"images/train/c.png": "x", "labels/train/c.txt": A}),
        BOTH,
        "c.png, which is not a readable image",
        SPLIT,
    ),
    "yolo, a yaml that is none": ToolCase("YOLO", yolo("names: [a\n  - b"), None, "not valid YAML"),
    "yolo, a split that is gone": ToolCase(
        "YOLO",
        yolo("train: images/train\nval: images/other\n" + NAMES),
        {"a.png": [DISC]},
        "data.yaml gives val: images/other, which does not exist",
    ),
    "yolo, names alone": ToolCase("YOLO", yolo(NAMES), BOTH, splits=SPLIT),
    "yolo, a split alone": ToolCase(
        "YOLO", yolo(ROBOFLOW, tree="{split}/images/{name}"), {"a.png": [DISC]}, source="train"
    ),
}


def linked(folder: Path) -> None:
    """The images are links to files elsewhere."""
    yolo()(folder)
    for image in list(folder.rglob("*.png")):
        target = folder.parent / f"store_{folder.name}" / image.name
        target.parent.mkdir(exist_ok=True)
        image.symlink_to(image.rename(target))


def elsewhere(folder: Path) -> None:
    """data.yaml lies in a folder of its own."""
    yolo("path: ../sets/my\ntrain: images/train\nval: images/val\n" + NAMES)(folder / "sets" / "my")
    (folder / "yaml").mkdir()
    (folder / "sets" / "my" / "data.yaml").rename(folder / "yaml" / "data.yaml")


def hidden(folder: Path) -> None:
    """What macOS and notebooks leave behind."""
    yolo()(folder)
    put(folder, **{"__MACOSX/images/train/._a.png": "x", "images/train/._a.png": "x"})
    put(folder, **{".ipynb_checkpoints/a-checkpoint.json": labelme_file("a.png")})


YOLO |= {
    "yolo, hidden files": ToolCase("YOLO", hidden, BOTH, splits=SPLIT),
    "yolo, images alone": ToolCase("YOLO", yolo(), {"a.png": [DISC]}, source="images/train"),
    "yolo, images without labels": ToolCase(
        "YOLO", yolo(NAMES, None, None, "{name}"), None, "give the folder that holds both"
    ),
    "yolo, links": ToolCase("YOLO", linked, BOTH, splits=SPLIT),
    "yolo, the yaml": ToolCase("YOLO", yolo(), BOTH, splits=SPLIT, source="data.yaml"),
    "yolo, the yaml elsewhere": ToolCase("YOLO", elsewhere, BOTH, splits=SPLIT, source="yaml"),
}


# labelme: one JSON file an image
def shape(box: list[float], label: str, kind: str = "rectangle", **more: Any) -> dict[str, Any]:
    """A shape with the corners of a box, all of them or two."""
    x, y, w, h = box
    points = [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]
    points = points[::2] if kind == "rectangle" else points
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, **more}


def labelme_file(name: str, *shapes: Any, **more: Any) -> dict[str, Any]:
    """The content of a file."""
    return {
        "version": "5.4.1", "flags": {}, "shapes": list(shapes), "imagePath": name,
        "imageData": None, "imageHeight": 48, "imageWidth": 64, **more,
    }  # fmt: skip


def labelme(*shapes: Any, folder: str = "", path: str = "{}", **more: Any) -> Any:
    """A folder with a disc in a.png, of which `shapes` say how, and a bar in b.png."""

    def write(root: Path) -> None:
        images(root / folder)
        disc = shapes or (shape(DISC[1], "disc"),)
        put(root, **{"a.json": labelme_file(path.format("a.png"), *disc, **more)})
        put(root, **{"b.json": labelme_file(path.format("b.png"), shape(BAR[1], "bar"), **more)})

    return write


def labelme_nested(root: Path) -> None:
    """The same names in two folders."""
    for name, box, label in (("one", DISC[1], "disc"), ("two", BAR[1], "bar")):
        images(root / name, "a.png")
        put(root / name, **{"a.json": labelme_file("a.png", shape(box, label))})


LABELME = {
    "labelme": ToolCase("labelme", labelme(), BOTH),
    "labelme, polygons": ToolCase("labelme", labelme(shape(DISC[1], "disc", "polygon")), BOTH),
    "labelme, no shape type": ToolCase(
        "labelme", labelme({"label": "disc", "points": shape(DISC[1], "x", "polygon")["points"]}),
        BOTH,
    ),
    "labelme, corners exchanged": ToolCase(
        "labelme", labelme({**shape(DISC[1], "disc"), "points": [[24, 16], [4, 6]]}), BOTH,
        "1 boxes had their corners exchanged",
    ),
    "labelme, circle": ToolCase(
        "labelme",
        labelme({**shape(DISC[1], "disc", "circle"), "points": [[20, 20], [23, 24]]}),
        {"a.png": [("disc", [15, 15, 10, 10])], "b.png": [BAR]},
    ),
    "labelme, points and lines": ToolCase(
        "labelme",
        labelme(
            shape(DISC[1], "disc"),
            {**shape(DISC[1], "disc", "point"), "points": [[5, 5]]},
            {**shape(DISC[1], "disc", "line"), "points": [[5, 5], [9, 9]]},
        ),
        BOTH,
        "2 objects are left out because they have no box or polygon",
    ),
    "labelme, a point alone": ToolCase(
        "labelme",
        labelme({**shape(DISC[1], "disc", "point"), "points": [[5, 5]]}),
        {"b.png": [BAR]},
        "a.png holds a point without a label or an area",
    ),
    "labelme, one object of two parts": ToolCase(
        "labelme",
        labelme(
            shape([4, 6, 5, 10], "disc", "polygon", group_id=1),
            shape([14, 6, 10, 10], "disc", "polygon", group_id=1),
        ),
        BOTH,
    ),
    "labelme, rectangle of four points": ToolCase(
        "labelme", labelme({**shape(DISC[1], "disc", "polygon"), "shape_type": "rotation"}), BOTH
    ),
    "labelme, a mask": ToolCase(
        "labelme",
        labelme({**shape(DISC[1], "disc"), "shape_type": "mask", "mask": "iVBORw0KGgo="}),
        BOTH,
    ),
    "labelme, imageData": ToolCase(
        "labelme", labelme(imageData=base64.b64encode(bytes(300)).decode()), BOTH
    ),
    "labelme, images elsewhere": ToolCase(
        "labelme", labelme(folder="images", path="..\\images\\{}"), BOTH
    ),
    "labelme, of another machine": ToolCase(
        "labelme", labelme(path="D:\\work\\set one\\{}"), BOTH
    ),
    "labelme, another name": ToolCase("labelme", labelme(path="IMG_0.png"), BOTH),
    "labelme, no path": ToolCase("labelme", labelme(imagePath=None), BOTH),
    "labelme, no size": ToolCase("labelme", labelme(imageWidth=None, imageHeight=None), BOTH),
    "labelme, another size": ToolCase(
        "labelme", labelme(imageWidth=640), None, "a.png has 64 x 48: the boxes would be wrong"
    ),
    "labelme, folders": ToolCase(
        "labelme", labelme_nested, {"one/a.png": [DISC], "two/a.png": [BAR]}
    ),
    "labelme, no label": ToolCase(
        "labelme", labelme(shape(DISC[1], "disc"), shape(DISC[1], "")), BOTH, "1 objects are left"
    ),
    "labelme, nothing in it": ToolCase(
        "labelme",
        lambda f: (labelme()(f), images(f, "c.png"), put(f, **{"c.json": labelme_file("c.png")})),
        {**BOTH, "c.png": []},
    ),
    "labelme, half a file": ToolCase(
        "labelme", lambda f: (labelme()(f), put(f, **{"c.json": '{"shapes": ['})), BOTH
    ),
    "labelme, an image in the file alone": ToolCase(
        "labelme",
        lambda f: (
            labelme()(f),
            put(f, **{"c.json": labelme_file("c.png", shape(DISC[1], "disc"), imageData="aaaa")}),
        ),
        BOTH,
        "labelme_export_json extracts it",
    ),
}  # fmt: skip


# VIA
def rect(box: list[float]) -> dict[str, Any]:
    """The shape of a box."""
    return {"name": "rect", **dict(zip(("x", "y", "width", "height"), box, strict=True))}


def around(box: list[float]) -> dict[str, Any]:
    """A polygon with the corners of a box."""
    x, y, w, h = box
    points = {"all_points_x": [x, x + w, x + w, x], "all_points_y": [y, y, y + h, y + h]}
    return {"name": "polygon", **points}


def region(shape: dict[str, Any], **attributes: Any) -> dict[str, Any]:
    """A region."""
    return {"shape_attributes": shape, "region_attributes": attributes}


def via_rows(a: Any, b: Any) -> dict[str, Any]:
    """The entries of two images."""
    return {
        f"{name}123": {"filename": name, "size": 123, "regions": regions, "file_attributes": {}}
        for name, regions in (("a.png", a), ("b.png", b))
    }


def via(a: Any = None, b: Any = None, project: bool = True, folder: str = "") -> Any:
    """A folder with a disc in a.png and a bar in b.png, unless the regions say otherwise."""

    def write(root: Path) -> None:
        images(root / folder)
        rows = via_rows(
            [region(rect(DISC[1]), type="disc")] if a is None else a,
            [region(rect(BAR[1]), type="bar")] if b is None else b,
        )
        content = {"_via_settings": {}, "_via_img_metadata": rows, "_via_attributes": {}}
        put(root, **{"via.json": content if project else rows})

    return write


CSV = (
    "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,"
    "region_attributes\n"
    'a.png,9,"{}",1,0,"{""name"":""rect"",""x"":4,""y"":6,""width"":20,""height"":10}",'
    '"{""type"":""disc""}"\n'
    'b.png,9,"{}",1,0,"{""name"":""rect"",""x"":10,""y"":12,""width"":24,""height"":30}",'
    '"{""type"":""bar""}"\n'
)
TWO = {"type": "disc", "colour": "red"}

VIA = {
    "via": ToolCase("VIA", via(), BOTH),
    "via, annotations alone": ToolCase("VIA", via(project=False), BOTH),
    "via, regions as a dict": ToolCase(
        "VIA", via({"0": region(rect(DISC[1]), type="disc")}, project=False), BOTH
    ),
    "via, polygons": ToolCase("VIA", via([region(around(DISC[1]), type="disc")]), BOTH),
    "via, circle": ToolCase(
        "VIA",
        via([region({"name": "circle", "cx": 20, "cy": 20, "r": 5}, type="disc")]),
        {"a.png": [("disc", [15, 15, 10, 10])], "b.png": [BAR]},
    ),
    "via, ellipse": ToolCase(
        "VIA",
        via([region({"name": "ellipse", "cx": 20, "cy": 20, "rx": 8, "ry": 4}, type="disc")]),
        {"a.png": [("disc", [12, 16, 16, 8])], "b.png": [BAR]},
    ),
    "via, ellipse on its side": ToolCase(
        "VIA",
        via([
            region(
                {"name": "ellipse", "cx": 20, "cy": 20, "rx": 8, "ry": 4, "theta": 1.5707963},
                type="disc",
            )
        ]),
        {"a.png": [("disc", [16, 12, 8, 16])], "b.png": [BAR]},
    ),
    "via, points": ToolCase(
        "VIA",
        via([region(rect(DISC[1]), type="disc"), region({"name": "point", "cx": 2, "cy": 3})]),
        BOTH,
        "1 objects are left out",
    ),
    "via, attributes of several names": ToolCase(
        "VIA", via([region(rect(DISC[1]), **TWO)], [region(rect(BAR[1]), **TWO | {"type": "bar"})]),
        BOTH,
    ),
    "via, attributes that nobody can tell": ToolCase(
        "VIA",
        via([region(rect(DISC[1]), x="disc", y="1")], [region(rect(BAR[1]), x="bar", y="1")]),
        None,
        "several attributes of the regions could be their class",
    ),
    "via, boxes to tick": ToolCase(
        "VIA", via([region(rect(DISC[1]), type={"bar": False, "disc": True})]), BOTH
    ),
    "via, no attributes": ToolCase(
        "VIA",
        via([region(rect(DISC[1]))], [region(rect(BAR[1]))]),
        {"a.png": [("object", DISC[1])], "b.png": [("object", BAR[1])]},
    ),
    "via, one without an attribute": ToolCase(
        "VIA", via([region(rect(DISC[1]), type="disc"), region(rect(BAR[1]))]), BOTH,
        "holds a rect without the attribute 'type'",
    ),
    "via, no regions": ToolCase("VIA", via(b=[]), {"a.png": [DISC], "b.png": []}),
    "via, images below": ToolCase("VIA", via(folder="img/x"), BOTH),
    "via, csv": ToolCase("VIA", lambda f: (images(f), put(f, **{"via.csv": CSV})), BOTH),
    "via, csv with a mark": ToolCase(
        "VIA", lambda f: (images(f), put(f, **{"via.csv": "\ufeff#" + CSV})), BOTH
    ),
    "via, csv with an empty image": ToolCase(
        "VIA",
        lambda f: (
            images(f, "a.png", "b.png", "c.png"),
            put(f, **{"via.csv": CSV + 'c.png,9,"{}",0,0,"{}","{}"\n'}),
        ),
        {**BOTH, "c.png": []},
    ),
    "via, the file": ToolCase("VIA", via(), BOTH, source="via.json"),
    "via, an image that is gone": ToolCase(
        "VIA", lambda f: (via()(f), (f / "b.png").unlink()), {"a.png": [DISC]},
        "'b.png', which does not exist",
    ),
}  # fmt: skip


# Label Studio: per cent
def result(box: list[float], label: str, kind: str = "rectanglelabels", **more: Any) -> Any:
    """One result."""
    x, y, w, h = box
    value = {"x": x / 0.64, "y": y / 0.48, "width": w / 0.64, "height": h / 0.48, "rotation": 0}
    if kind == "polygonlabels":
        points = ((x, y), (x + w, y), (x + w, y + h), (x, y + h))
        value = {"points": [[px / 0.64, py / 0.48] for px, py in points], "closed": True}
    return {
        "id": f"{label}{kind}", "type": kind, "from_name": "label", "to_name": "image",
        "original_width": 64, "original_height": 48, "image_rotation": 0,
        "value": {**value, kind: [label], **more},
    }  # fmt: skip


def task(image: str, *results: Any, key: str = "annotations", **more: Any) -> dict[str, Any]:
    """One image."""
    made = {"id": 1, "result": list(results), "was_cancelled": False, "created_at": "2024-01-01"}
    return {"id": 5, "data": {"image": image}, key: [{**made, **more}], "predictions": []}


def studio(*a: Any, address: str = "/data/upload/1/0a1b2c3d-{}", folder: str = "", **more: Any):
    """A folder with a disc in a.png, of which the results say how, and a bar in b.png."""

    def write(root: Path) -> None:
        images(root / folder)
        first = task(address.format("a.png"), *(a or (result(DISC[1], "disc"),)), **more)
        second = task(address.format("b.png"), result(BAR[1], "bar"), **more)
        put(root, **{"project-1.json": [first, second]})

    return write


def minimal(root: Path) -> None:
    """JSON-MIN."""
    images(root)
    rows = []
    for image, (name, box) in (("a.png", DISC), ("b.png", BAR)):
        made = result(box, name)
        size = {k: made[k] for k in ("original_width", "original_height")}
        row = {"image": f"/data/upload/1/0a1b2c3d-{image}", "id": 1, "annotator": 1}
        rows.append({**row, "label": [{**made["value"], **size}], "annotation_id": 3})
    put(root, **{"min.json": rows})


def twice(root: Path) -> None:
    """Two people have labelled a.png, and one has given up on b.png."""
    studio()(root)
    tasks = json.loads((root / "project-1.json").read_text())
    old = {"result": [result([1, 1, 9, 9], "disc")], "created_at": "2023-01-01"}
    tasks[0]["annotations"].append(old)
    tasks[1]["annotations"].append({"was_cancelled": True, "result": [], "created_at": "2025"})
    put(root, **{"project-1.json": tasks})


APART = [
    {**result(DISC[1], "disc"), "type": "rectangle"},
    {**result(DISC[1], "disc"), "type": "labels"},
]
del APART[0]["value"]["rectanglelabels"]
APART[1]["value"] = {**APART[0]["value"], "labels": ["disc"]}

LABEL_STUDIO = {
    "studio": ToolCase("Label Studio", studio(), BOTH),
    "studio, polygons": ToolCase(
        "Label Studio", studio(result(DISC[1], "disc", "polygonlabels")), BOTH
    ),
    "studio, ellipse": ToolCase(
        "Label Studio",
        studio({
            **result(DISC[1], "disc"),
            "value": {
                "x": 50, "y": 50, "radiusX": 12.5, "radiusY": 25, "rotation": 0,
                "ellipselabels": ["disc"],
            },
        }),
        {"a.png": [("disc", [24, 12, 16, 24])], "b.png": [BAR]},
    ),
    "studio, turned": ToolCase(
        "Label Studio",
        studio(result([30, 6, 20, 10], "disc", rotation=90)),
        {"a.png": [("disc", [20, 6, 10, 20])], "b.png": [BAR]},  # about its first corner
    ),
    "studio, several results": ToolCase(
        "Label Studio",
        studio(
            result(DISC[1], "disc"),
            {"id": "q", "type": "choices", "value": {"choices": ["sharp"]}},
            {**result(BAR[1], "bar"), "id": "second"},
        ),
        {"a.png": [DISC, BAR], "b.png": [BAR]},
    ),
    "studio, shape and label apart": ToolCase("Label Studio", studio(*APART), BOTH),
    "studio, a brush": ToolCase(
        "Label Studio",
        studio(
            result(DISC[1], "disc"),
            {
                "id": "b",
                "type": "brushlabels",
                "value": {"format": "rle", "rle": [1, 2], "brushlabels": ["disc"]},
            },
        ),
        BOTH,
        "1 objects are left out",
    ),
    "studio, local files": ToolCase(
        "Label Studio", studio(address="/data/local-files/?d=set/{}", folder="set"), BOTH
    ),
    "studio, a bucket": ToolCase("Label Studio", studio(address="s3://bucket/set/{}"), BOTH),
    "studio, a web address": ToolCase(
        "Label Studio", studio(address="https://x.org/a%20b/{}?sig=1"), BOTH
    ),
    "studio, two annotations": ToolCase("Label Studio", twice, BOTH),
    "studio, completions": ToolCase("Label Studio", studio(key="completions"), BOTH),
    "studio, nobody has finished": ToolCase(
        "Label Studio", studio(was_cancelled=True), None, "no finished annotation"
    ),
    "studio, min": ToolCase("Label Studio", minimal, BOTH),
    "studio, another size": ToolCase(
        "Label Studio",
        studio({**result(DISC[1], "disc"), "original_width": 640}),
        {"b.png": [BAR]},
        "640 x 48 pixels",
    ),
    "studio, an image that is gone": ToolCase(
        "Label Studio", lambda f: (studio()(f), (f / "b.png").unlink()), {"a.png": [DISC]},
        "b.png', which does not exist",
    ),
}  # fmt: skip


# VOC, CVAT and COCO as folders; their files have tests of their own
def voc(tree: str = "{kind}/{name}") -> Callable[[Path], None]:
    """Two XML files."""

    def write(root: Path) -> None:
        for name, split, (label, (x, y, w, h)) in (("a", "train", DISC), ("b", "valid", BAR)):
            image = tree.format(kind="JPEGImages", name=f"{name}.png", split=split)
            images(root, image)
            xml = tree.format(kind="Annotations", name=f"{name}.xml", split=split)
            objects = [(label, (x + 1, y + 1, x + w, y + h))]
            put(root, **{xml: voc_xml(f"{name}.png", objects=objects)})

    return write


def changed(old: str, new: str, encoding: str = "utf-8", suffix: str = ".xml") -> Any:
    """The file of a.png with another text."""

    def write(root: Path) -> None:
        voc()(root)
        file = root / "Annotations" / "a.xml"
        text = file.read_text()
        assert old in text
        file.unlink()
        file.with_suffix(suffix).write_bytes(text.replace(old, new).encode(encoding))

    return write


BOX = "<bndbox><xmin>5</xmin><ymin>7</ymin><xmax>24</xmax><ymax>16</ymax></bndbox>"
OUTLINE = (
    "<polygon><x1>4</x1><y1>6</y1><x2>24</x2><y2>6</y2><x3>24</x3><y3>16</y3><x4>4</x4><y4>16</y4>"
    "</polygon>"
)
RED = "\u7ea2"
VOC = {
    "voc, a polygon": ToolCase("VOC", changed(BOX, OUTLINE), BOTH),
    "voc, an object without a box": ToolCase(
        "VOC",
        changed("</annotation>", "<object><name>disc</name></object></annotation>"),
        BOTH,
        "1 objects are left out",
    ),
    "voc, a box that is no number": ToolCase(
        "VOC",
        changed(
            "</annotation>",
            f"<object><name>disc</name>{BOX.replace('>5<', '>nan<')}</object></annotation>",
        ),
        BOTH,
        "'nan', which is not a number",
    ),
    "voc, corners exchanged": ToolCase(
        "VOC",
        changed(BOX, BOX.replace(">5<", ">0<").replace(">24<", ">5<").replace(">0<", ">24<")),
        BOTH,
        "1 boxes had their corners exchanged",
    ),
    "voc, GBK": ToolCase(
        "VOC",
        changed("disc", RED, "gbk"),
        {"a.png": [(RED, DISC[1])], "b.png": [BAR]},
    ),
    "voc, .XML": ToolCase("VOC", changed("a.png", "a.png", suffix=".XML"), BOTH),
    "voc, a path for a name": ToolCase("VOC", changed("a.png", "C:\\data\\old name.png"), BOTH),
    "voc, another size": ToolCase(
        "VOC", changed("<width>64<", "<width>640<"), {"b.png": [BAR]}, "640 x 48 pixels"
    ),
    "voc, half a file": ToolCase(
        "VOC", changed("</object>", ""), {"b.png": [BAR]}, "not well-formed XML"
    ),
}


def cvat(subset: bool = False) -> Callable[[Path], None]:
    """CVAT for images."""

    def write(root: Path) -> None:
        images(root / "images")
        rows = ""
        for k, (name, (label, (x, y, w, h))) in enumerate((("a", DISC), ("b", BAR))):
            part = f' subset="{("Train", "Validation")[k]}"' if subset else ""
            rows += (
                f'<image id="{k}" name="{name}.png" width="64" height="48"{part}><box '
                f'label="{label}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/></image>'
            )
        put(root, **{"annotations.xml": f"<annotations><version>1.1</version>{rows}</annotations>"})

    return write


def coco_rows(*names: str) -> dict[str, Any]:
    """COCO format with a disc in a.png and a bar in b.png, of which some are there."""
    rows = [(k, n, box) for k, (n, (_, box)) in enumerate((("a", DISC), ("b", BAR)), 1)]
    rows = [row for row in rows if row[1] in names]
    return {
        "images": [
            {"id": k, "file_name": f"{n}.png", "width": 64, "height": 48} for k, n, _ in rows
        ],
        "categories": [{"id": 1, "name": "disc"}, {"id": 2, "name": "bar"}],
        "annotations": [
            {"id": k, "image_id": k, "category_id": k, "bbox": b, "area": 300, "iscrowd": 0}
            for k, _, b in rows
        ],
    }


def coco(a: str, b: str = "", place_a: str = "{}", place_b: str = "{}") -> Callable[[Path], None]:
    """One file, or two."""

    def write(root: Path) -> None:
        images(root, place_a.format("a.png"), place_b.format("b.png"))
        put(root, **{a: coco_rows("a", *("" if b else "b"))})
        if b:
            put(root, **{b: coco_rows("b")})

    return write


OTHERS = {
    "voc": ToolCase("VOC", voc(), BOTH),
    "voc of Roboflow": ToolCase("VOC", voc("{split}/{name}"), BOTH, splits=SPLIT),
    "voc, splits with folders": ToolCase("VOC", voc("{split}/{kind}/{name}"), BOTH, splits=SPLIT),
    "voc in VOCdevkit": ToolCase("VOC", voc("VOC2007/{kind}/{name}"), BOTH),
    "cvat": ToolCase("CVAT", cvat(), BOTH),
    "cvat, subsets": ToolCase("CVAT", cvat(subset=True), BOTH, splits=SPLIT),
    "coco": ToolCase("COCO", coco("annotations.json"), BOTH),
    "coco, images": ToolCase("COCO", coco("annotations.json", "", "images/{}", "images/{}"), BOTH),
    "coco of coco": ToolCase(
        "COCO",
        coco(
            "annotations/instances_train2017.json",
            "annotations/instances_val2017.json",
            "train2017/{}",
            "val2017/{}",
        ),
        BOTH,
        splits=SPLIT,
    ),
    "coco of Roboflow": ToolCase(
        "COCO",
        coco(
            "train/_annotations.coco.json", "valid/_annotations.coco.json", "train/{}", "valid/{}"
        ),
        BOTH,
        splits=SPLIT,
    ),
    "coco of CVAT": ToolCase(
        "COCO", coco("annotations/instances_default.json", "", "images/{}", "images/{}"), BOTH
    ),
    "nothing": ToolCase("", lambda f: images(f), None, "holds no labels of COCO, YOLO"),
    "several tools": ToolCase(
        "", lambda f: (voc()(f), via()(f)), None, "labels of several kinds, VIA .*, VOC or CVAT"
    ),
}

TOOL_CASES = {**YOLO, **LABELME, **VIA, **LABEL_STUDIO, **VOC, **OTHERS}
