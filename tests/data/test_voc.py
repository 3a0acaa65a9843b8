"""ghm-d2 import-data: what users' folders look like, what each becomes, and every mistake."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from pycocotools.coco import COCO

from ghm_d2.cli.import_data import main
from ghm_d2.data import check_coco_dataset, parse_dataset
from ghm_d2.data.labels import LabelledImage, LabelledObject, to_coco
from ghm_d2.data.xml_files import read_xml
from tests.tiny import forget_program
from tests.voc import voc_xml, write_image, write_lists, write_voc


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


@pytest.fixture
def output(capsys, caplog):
    """What was printed and logged so far."""
    return lambda: caplog.text + capsys.readouterr().out


def convert(*argv):
    main([str(word) for word in argv])


def written(folder):
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


def names(content):
    return [Path(row["file_name"]).stem for row in content["images"]]


def boxes(content, key="bbox"):
    return [row[key] for row in content["annotations"]]


def test_lists_become_files_that_dataset_takes(tmp_path, output):
    voc = write_voc(tmp_path / "voc")
    write_lists(voc, train=["img1", "img3"], val=["img0", "img2"], disc_train=["img1 1"])
    convert(voc, "--output-dir", tmp_path / "coco")
    found = written(tmp_path / "coco")
    assert {k: names(v) for k, v in found.items()} == {
        "train": ["img1", "img3"],
        "val": ["img0", "img2"],
    }
    assert [c["name"] for c in found["val"]["categories"]] == ["bar", "disc"]
    assert boxes(found["train"]) == [[0, 0, 30, 40], [19, 10, 45, 20]] * 2
    assert boxes(found["train"], "area") == [1200, 900] * 2
    text = output()
    assert "6 images are in none of the splits train, val" in text
    assert "train.json: 2 images, 4 objects (bar 2, disc 2)" in text
    assert "1 of 2 classes have no object here" in text  # val has no bar
    for word in text.splitlines()[-1].split()[1::2]:  # after each --dataset
        data = check_coco_dataset(parse_dataset(word))
        assert data.classes == ("bar", "disc") and data.evaluable
    assert len(COCO(tmp_path / "coco" / "train.json").getImgIds()) == 2


def test_flat_folder_is_split_at_random_but_reproducibly(tmp_path):
    voc = write_voc(tmp_path / "a", flat=True)
    convert(voc, "--output-dir", tmp_path / "1")
    convert(write_voc(tmp_path / "b", flat=True), "--output-dir", tmp_path / "2")
    convert(voc, "--output-dir", tmp_path / "3", "--seed", "2", "--val-fraction", "0.4")
    first, second, third = (written(tmp_path / n) for n in "123")
    assert first == second
    assert sorted(names(first["train"]) + names(first["val"])) == [f"img{i}" for i in range(10)]
    assert len(names(first["val"])) == 2 and len(names(third["val"])) == 4
    assert set(names(first["val"])) != set(names(third["val"])[:2])


def test_several_folders_share_one_image_root(tmp_path):
    first, second = (write_voc(tmp_path / f"VOC{y}", 2) for y in (2007, 2012))
    write_lists(first, trainval=["img0"], test=["img1"])
    write_lists(second, trainval=["img1"])
    convert(first, second, "--output-dir", tmp_path / "out", "--split", "trainval", "test")
    found = written(tmp_path / "out")
    assert [row["file_name"] for row in found["trainval"]["images"]] == [
        "VOC2007/JPEGImages/img0.png",
        "VOC2012/JPEGImages/img1.png",
    ]
    assert [row["file_name"] for row in found["test"]["images"]] == ["VOC2007/JPEGImages/img1.png"]


@pytest.mark.parametrize(("choice", "crowd"), [("crowd", [1, 0]), ("keep", [0, 0]), ("drop", [0])])
def test_difficult_objects(tmp_path, output, choice, crowd):
    for i in range(2):
        write_image(tmp_path / "voc" / f"{i}.png")
        objects = [("disc", (1, 1, 9, 9), True)] * (1 - i) + [("disc", (5, 5, 9, 9))]
        (tmp_path / "voc" / f"{i}.xml").write_text(voc_xml(objects=objects))
    write_lists(tmp_path / "voc", all=["0"])
    convert(tmp_path / "voc", "--output-dir", tmp_path, "--split", "all", "--difficult", choice)
    assert boxes(written(tmp_path)["all"], "iscrowd") == crowd
    assert "1 objects are marked difficult" in output()


def one(corners, **more):
    image = LabelledImage(Path("/r/a.png"), 64, 48, (LabelledObject("x", corners, from_one=True),))
    return to_coco([image], ["x"], Path("/r"), **more)


@pytest.mark.parametrize(
    ("corners", "zero_based", "box", "notes"),
    [
        ((1, 1, 64, 48), False, [0, 0, 64, 48], {}),  # the whole image
        ((0, 0, 64, 48), True, [0, 0, 64, 48], {}),
        ((10, 10, 10, 10), False, [9, 9, 1, 1], {}),  # a single pixel
        ((10, 10, 10, 10), True, None, {"empty": 1}),
        ((0, 5, 20, 30), False, [0, 4, 20, 26], {"from 0": 1}),
        ((2.5, 3, 20.25, 30), False, [1.5, 2, 18.75, 28], {}),
        ((5, 5, 70, 50), False, [4, 4, 60, 44], {"clipped": 1}),
        ((-3, 5, 20, 30), True, [0, 5, 20, 25], {"clipped": 1}),
        ((20, 5, 10, 30), False, [9, 4, 11, 26], {"swapped": 1}),
        ((10, 30, 20, 5), True, [10, 5, 10, 25], {"swapped": 1}),
        ((70, 5, 80, 30), False, None, {"empty": 1}),
    ],
)
def test_corners(corners, zero_based, box, notes):
    content, counted = one(corners, zero_based=zero_based)
    assert boxes(content) == ([] if box is None else [box])
    assert counted == Counter(notes)


def test_classes_choose_and_order(tmp_path, output):
    convert(write_voc(tmp_path / "voc"), "--output-dir", tmp_path, "--classes", "disc", "cup")
    found = written(tmp_path)
    for content in found.values():
        assert [c["name"] for c in content["categories"]] == ["disc", "cup"]
    assert sum(len(content["annotations"]) for content in found.values()) == 10
    assert "5 objects of classes that --classes does not name are left out: bar 5" in (output())


def test_broken_files_are_named_and_counted(tmp_path, output):
    voc = write_voc(tmp_path / "voc", 6)
    xml = voc / "Annotations"
    good = (xml / "img0.xml").read_text()
    (xml / "img0.xml").write_text(good[:-30])
    (xml / "img1.xml").write_text(good.replace("<xmin>1<", "<xmin>left<"))
    (xml / "img2.xml").write_text(good.replace("<name>disc</name>", ""))
    (xml / "img3.xml").write_text(voc_xml(size=(640, 480)))
    (xml / "img9.xml").write_text(good.replace("img0.png", "../../secret/nothing.png"))
    (xml / "other.xml").write_text("<html/>")
    (voc / "JPEGImages" / "img4.png").write_text("no image")
    write_lists(voc, all=["img0", "img5"])
    convert(voc, "--output-dir", tmp_path, "--split", "all")
    assert names(written(tmp_path)["all"]) == ["img5"]
    text = output()
    for words in (
        "img0.xml is not well-formed XML",
        "img1.xml holds an <object> with the bndbox/xmin 'left'",
        "img2.xml holds an object without a <name>",
        "img3.xml is for an image of 640 x 480 pixels, but img3.png has 64 x 48",
        "img4.xml belongs to img4.png, which is not a readable image",
        "img9.xml has no image: neither img9.* nor its <filename> 'nothing.png' exists",
        "other.xml is not a VOC annotation",
        "7 XML files are left out",
        "5 images have no XML file",
        "all: 1 of 2 listed images have no labels that can be used; the first: img0",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    "declaration",
    [
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>',
        '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;&x;">]>',
        '<!DOCTYPE a SYSTEM "http://localhost/a.dtd">',
    ],
)
def test_no_entities(tmp_path, declaration):
    file = tmp_path / "a.xml"
    file.write_text(f'<?xml version="1.0"?>{declaration}<a>&x;</a>')
    with pytest.raises(ValueError, match="document type"):
        read_xml(file)


def test_images_turned_by_exif_have_the_size_that_is_read(tmp_path):
    write_voc(tmp_path / "voc", 2, flat=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, size in enumerate([(48, 64), (64, 48)]):
        file = tmp_path / "voc" / f"img{i}.png"
        Image.open(file).save(file, exif=exif)
        (tmp_path / "voc" / f"img{i}.xml").write_text(
            voc_xml(size=size, objects=[("a", (1, 1, 48, 64))])
        )
    write_lists(tmp_path / "voc", all=["img0"])
    convert(tmp_path / "voc", "--output-dir", tmp_path, "--split", "all")
    content = written(tmp_path)["all"]
    assert [(row["width"], row["height"]) for row in content["images"]] == [(48, 64)]
    assert boxes(content) == [[0, 0, 48, 64]]


def test_mistakes(tmp_path, capsys):
    voc = write_voc(tmp_path / "voc", 3)
    listed = write_voc(tmp_path / "listed", 3)
    write_lists(listed, disc_train=["img0 -1"], mine=["img8"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.json").write_text("mine")
    out = ["--output-dir", tmp_path / "new"]
    for argv, message in (
        ([tmp_path / "none", *out], "none does not exist"),
        ([tmp_path / "empty", *out], "empty holds no labels of COCO, YOLO, VOC"),
        ([tmp_path, *out], "several folders of labels, listed, voc: give them one by one"),
        ([voc, *out, "--split", "train"], "no split train: neither ImageSets/Main/train.txt"),
        ([voc, *out, "--split", "a", "--val-fraction", "0.5"], "exclude each other"),
        ([voc, *out, "--val-fraction", "1"], "between 0 and 1, got 1"),
        ([voc, *out, "--classes", "a", "a"], "names a class twice"),
        ([voc, *out, "--classes", "cat"], "no object of the classes cat was found"),
        ([listed, *out], "no list train, val or test"),
        ([listed, *out, "--split", "disc_train"], "which images show one class"),
        ([listed, *out, "--split", "mine"], "none of its 1 images can be used"),
        ([voc, "--output-dir", tmp_path / "out"], "train.json exists already"),
    ):
        with pytest.raises(SystemExit) as stop:
            convert(*argv)
        captured = capsys.readouterr()
        assert stop.value.code == 2 and "Traceback" not in captured.err
        assert captured.err.startswith("ghm-d2 import-data: error: ") and message in captured.err
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "out" / "train.json").read_text() == "mine"


GOOD = (
    "<object><name>disc</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>30</xmax><ymax>40</ymax>"
    "</bndbox></object>"
)
BOX = "<bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"


def one_xml(folder, objects, head="", encoding="utf-8", name="img0.xml"):
    """A folder with one image, and a second one that is always good; returns img0's boxes."""
    voc = write_voc(folder / "voc", 2, flat=True)
    (voc / "img0.xml").unlink()
    text = f"{head}<annotation><filename>img0.png</filename>{objects}</annotation>"
    (voc / name).write_bytes(text.encode(encoding))
    write_lists(voc, all=["img0", "img1"])
    convert(voc, "--output-dir", folder, "--split", "all")
    content = written(folder)["all"]
    ids = [row["id"] for row in content["images"] if row["file_name"] == "img0.png"]
    names = {row["id"]: row["name"] for row in content["categories"]}
    return [
        (names[a["category_id"]], a["bbox"], a["iscrowd"])
        for a in content["annotations"]
        if a["image_id"] in ids
    ]


def thing(inner, name="cup", more=""):
    return f"<object><name>{name}</name>{more}{inner}</object>"


POLYGON = "<polygon><x1>3</x1><y1>4</y1><x2>20</x2><y2>4</y2><x3>20</x3><y3>30</y3></polygon>"
POINTS = (
    "<polygon><pt><x>3</x><y>4</y></pt><pt><x>20</x><y>4</y></pt><pt><x>9</x><y>30</y></pt>"
    "</polygon>"
)
ROTATED = "<robndbox><cx>30</cx><cy>20</cy><w>20</w><h>10</h><angle>{}</angle></robndbox>"


@pytest.mark.parametrize(
    ("objects", "cup", "words"),
    [
        (thing(BOX.format("nan")), None, "1 objects are left out.*'nan', which is not a number"),
        (thing(""), None, "1 objects are left out"),
        (thing(BOX.format(2), name=""), None, "object without a <name>"),
        (thing(POLYGON), [3, 4, 17, 26], "1 objects are polygons or rotated"),
        (thing(POINTS), [3, 4, 17, 26], "1 objects are polygons or rotated"),
        (thing(ROTATED.format("1.5707963267948966")), [25, 10, 10, 20], "1 objects are polygons"),
        (thing(BOX.format("inf") + POLYGON), [3, 4, 17, 26], "1 objects are polygons"),
        (thing(BOX.format(2)), [1, 1, 8, 8], ""),
    ],
)
def test_one_object_that_cannot_be_read_is_lost_alone(tmp_path, output, objects, cup, words):
    found = one_xml(tmp_path, GOOD + objects)
    assert ("disc", [0, 0, 30, 40], 0) in found
    cups = [pytest.approx(box) for name, box, _ in found if name == "cup"]
    assert cups == ([] if cup is None else [cup])
    assert re.search(words, output())


@pytest.mark.parametrize(
    ("text", "crowd"),
    [("1", 1), ("true", 1), ("True", 1), ("1.0", 1), ("0", 0), ("false", 0), ("", 0), ("0.0", 0)],
)
def test_spellings_of_difficult(tmp_path, text, crowd):
    objects = thing(BOX.format(2), more=f"<difficult>{text}</difficult>")
    assert one_xml(tmp_path, objects) == [("cup", [1, 1, 8, 8], crowd)]


@pytest.mark.parametrize(
    ("encoding", "head"),
    [
        ("gb2312", '<?xml version="1.0" encoding="gb2312"?>'),
        ("gbk", '<?xml version="1.0" encoding="GBK"?>'),
        ("gbk", '<?xml version="1.0" encoding="utf-8"?>'),
        ("gbk", ""),
        ("utf-8-sig", ""),
        ("utf-16", '<?xml version="1.0" encoding="utf-16"?>'),
        ("iso-8859-1", '<?xml version="1.0" encoding="ISO-8859-1"?>'),
    ],
)
def test_encodings(tmp_path, encoding, head):
    name = "T\xfcr" if encoding.startswith("iso") else "\u7ea2\u7ec6\u80de"
    found = one_xml(tmp_path, thing(BOX.format(2), name=name), head, encoding)
    assert [row[0] for row in found] == [name]


def test_suffix_in_capitals(tmp_path):
    assert len(one_xml(tmp_path, GOOD, name="img0.XML")) == 1


def test_folders_below(tmp_path):
    for part in ("a", "b"):
        voc = write_voc(tmp_path / part, 2)
        for kind in ("Annotations", "JPEGImages"):
            (tmp_path / "voc" / kind).mkdir(parents=True, exist_ok=True)
            (voc / kind).rename(tmp_path / "voc" / kind / part)
    Image.new("RGB", (30, 20)).save(tmp_path / "voc" / "JPEGImages" / "b" / "img1.png")
    (tmp_path / "voc" / "Annotations" / "b" / "img1.xml").write_text(voc_xml(size=(30, 20)))
    write_lists(tmp_path / "voc", train=["a/img0", "a/img1.png"], val=["b\\img0", "b/img1"])
    convert(tmp_path / "voc", "--output-dir", tmp_path)
    found = written(tmp_path)
    assert [r["file_name"] for r in found["train"]["images"]] == ["a/img0.png", "a/img1.png"]
    assert [(r["file_name"], r["width"]) for r in found["val"]["images"]] == [
        ("b/img0.png", 64),
        ("b/img1.png", 30),
    ]


def test_spellings_in_lists(tmp_path, output):
    voc = write_voc(tmp_path / "voc", 4)
    for kind, suffix in (("Annotations", "xml"), ("JPEGImages", "png")):
        (voc / kind / f"img0.{suffix}").rename(voc / kind / f"my first image.{suffix}")
        (voc / kind / f"img3.{suffix}").rename(voc / kind / f"img.v1.{suffix}")
    lines = ["my first image", "img1.png", "JPEGImages/img2.png", "img.v1", "img9.png"]
    write_lists(voc, all=["\ufeff" + lines[0], *lines[1:]])
    convert(voc, "--output-dir", tmp_path, "--split", "all")
    assert names(written(tmp_path)["all"]) == ["my first image", "img1", "img2", "img.v1"]
    assert "1 of 5 listed images have no labels that can be used; the first: img9" in output()


def test_the_folders_of_roboflow_are_the_splits(tmp_path, output):
    for part, number in (("train", 3), ("valid", 2), ("test", 1)):
        write_voc(tmp_path / "voc" / part, number, flat=True)
    convert(tmp_path / "voc", "--output-dir", tmp_path / "out")
    found = written(tmp_path / "out")
    assert {k: len(v["images"]) for k, v in found.items()} == {"train": 3, "val": 2, "test": 1}
    assert found["val"]["images"][0]["file_name"] == "valid/img0.png"
    assert "Split as the labels declare: train, val, test" in output()
    convert(tmp_path / "voc", "--output-dir", tmp_path / "b", "--split", "val")
    assert list(written(tmp_path / "b")) == ["val"]
    convert(tmp_path / "voc", "--output-dir", tmp_path / "c", "--val-fraction", "0.5")
    assert {k: len(v["images"]) for k, v in written(tmp_path / "c").items()} == {
        "train": 3,
        "val": 3,
    }


CVAT = """<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version><meta/>
<image id="0" name="a/0.png" width="64" height="48"{subset[0]}>
<box label="disc" occluded="0" xtl="4.5" ytl="6.0" xbr="24.5" ybr="16.0" z_order="0"></box>
<polygon label="bar" points="1.0,2.0;11.0,2.0;5.0,22.0"></polygon>
<polyline label="bar" points="1.0,2.0;11.0,2.0"></polyline></image>
<image id="1" name="1.png" width="64" height="48"{subset[1]}>
<box label="disc" xtl="10" ytl="10" xbr="30" ybr="20" rotation="90.0"/></image>
<image id="2" name="gone.png" width="64" height="48"></image>
<image id="3" name="3.png" width="640" height="48"><tag label="x"/></image>
</annotations>"""


def write_cvat(folder, subset=("", "")):
    for name in ("images/a/0.png", "images/1.png", "images/3.png"):
        write_image(folder / name)
    (folder / "annotations.xml").write_text(CVAT.format(subset=subset))
    return folder


def test_cvat(tmp_path, output):
    convert(write_cvat(tmp_path / "cvat"), "--output-dir", tmp_path, "--val-fraction", "0.5")
    rows = [row for content in written(tmp_path).values() for row in content["annotations"]]
    found = sorted([round(v, 6) for v in row["bbox"]] for row in rows)
    assert found == [[1, 2, 10, 20], [4.5, 6, 20, 10], [15, 5, 10, 20]]
    text = output()
    for words in (
        "annotations.xml: 'gone.png' is not among the images",
        "'3.png' is for an image of 640 x 48 pixels",
        "2 objects are polygons or rotated",
        "1 objects are left out because they have no box or polygon that can be read",
    ):
        assert words in text, words
    (root,) = {word.rpartition(",")[2] for word in text.splitlines()[-1].split()[1::2]}
    assert root == str(tmp_path / "cvat" / "images")


def test_cvat_s_subsets_are_the_splits(tmp_path):
    subsets = (' subset="Train"', ' subset="Validation"')
    convert(write_cvat(tmp_path / "cvat", subsets), "--output-dir", tmp_path)
    assert {k: names(v) for k, v in written(tmp_path).items()} == {"train": ["0"], "val": ["1"]}


TRACKS = """<annotations><track id="0" label="disc">
<box frame="0" outside="0" keyframe="1" xtl="4" ytl="6" xbr="24" ybr="16"/>
<box frame="2" outside="0" keyframe="1" xtl="8" ytl="6" xbr="28" ybr="26"/>
<box frame="3" outside="1" keyframe="1" xtl="8" ytl="6" xbr="28" ybr="26"/></track>
<track id="1" label="bar"><polygon frame="3" outside="0" points="1,2;11,2;5,22"/>
<polygon frame="7" outside="1" points="1,2;11,2;5,22"/></track></annotations>"""


def test_cvat_for_video(tmp_path, output):
    for k in range(5):
        write_image(tmp_path / "images" / f"frame_{k:06}.png")
    (tmp_path / "annotations.xml").write_text(TRACKS)
    convert(tmp_path, "--output-dir", tmp_path / "o", "--val-fraction", "0.5")
    found = {}
    for content in written(tmp_path / "o").values():
        names = {row["id"]: row["file_name"] for row in content["images"]}
        for row in content["annotations"]:
            found[names[row["image_id"]]] = row["bbox"]
    assert found == {
        "frame_000000.png": [4, 6, 20, 10],
        "frame_000001.png": [6, 6, 20, 15],  # half way
        "frame_000002.png": [8, 6, 20, 20],
        "frame_000003.png": [1, 2, 10, 20],
        "frame_000004.png": [1, 2, 10, 20],  # a polygon stays where it is until it goes away
    }
    assert "'frame 6' is not among the images" in output()


def test_cvat_for_video_wants_frames(tmp_path, capsys):
    write_image(tmp_path / "images" / "first.png")
    (tmp_path / "a.xml").write_text(TRACKS)
    with pytest.raises(SystemExit):
        convert(tmp_path, "--output-dir", tmp_path)
    assert "ffmpeg -i VIDEO" in capsys.readouterr().err
