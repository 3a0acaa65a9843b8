"""Folders of labels: which tool wrote them, and where their files and images lie."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ghm_d2.errors import UserError

from .label_studio import is_label_studio
from .labelme import is_labelme
from .tables import read_json
from .via import is_via, via_table
from .yolo import YoloSet, find_yolo

COCO, YOLO, XML, VIA = "COCO", "YOLO", "VOC or CVAT", "VIA"
LABELME, LABEL_STUDIO = "labelme", "Label Studio"
_JSON = {
    COCO: lambda x: isinstance(x, dict) and {"images", "categories"} <= set(x),
    LABELME: is_labelme,
    VIA: is_via,
    LABEL_STUDIO: is_label_studio,
}
_KINDS = "COCO, YOLO, VOC, CVAT, labelme, VIA or Label Studio"
_HIDDEN = (".", "__MACOSX")
_MOST_LOOKED_AT = 200  # JSON files that are opened; any more are taken for labelme's, one per image

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
# Folder names that stand for a split, and this project's name of that split.
_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, eq=False)
class LabelFolder:
    """One folder of labelled images: what wrote its labels, and where its parts lie.

    Attributes:
        path: the folder itself.
        kind: format of the labels, one of the constants of this module, such as `COCO`.
        files: the label files; empty for YOLO, where each is found by the path of its image.
        annotations: the folder or file of the labels.
        images: the folder of the images, which may lie further below.
        yolo: what a folder of YOLO labels declares; None for other kinds.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]
    annotations: Path
    images: Path
    yolo: YoloSet | None = None

    @cached_property
    def lists(self) -> dict[str, Path]:
        """The lists of images in ImageSets/Main, by the names of the splits."""
        return {file.stem: file for file in (self.path / "ImageSets" / "Main").glob("*.txt")}

    @cached_property
    def image_files(self) -> dict[str, list[Path]]:
        """All images, by their names without suffix."""
        found: dict[str, list[Path]] = defaultdict(list)
        for file in _below(self.images):
            if is_image(file):
                found[file.stem].append(file)
        return found

    @property
    def tool(self) -> str:
        """What wrote the labels, for a message."""
        if self.kind != XML:
            return self.kind
        with self.files[0].open("rb") as stream:
            return "CVAT" if b"<annotations" in stream.read(4096) else "Pascal VOC"

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names that the folder declares, in its order; empty if it declares none."""
        return self.yolo.names if self.yolo else ()


def find_folder(path: Path, images: Path | None = None) -> LabelFolder:
    """What wrote the labels of a folder, and where its parts are.

    Args:
        path: a folder, or one file that holds the labels of many images.
        images: the folder of the images; None: the folder itself.

    Raises:
        UserError: it does not exist, or holds no labels or those of several tools.
    """
    path = path.expanduser().resolve()
    if path.suffix.lower() in (".yaml", ".yml") and path.is_file():
        path = path.parent
    if path.is_file():
        folder, files = path.parent, [path]
        annotations = path
    elif path.is_dir():
        folder = annotations = path
        if inner := _inner(path):
            return find_folder(inner, images)
        annotations = _first(path / "Annotations", path / "annotations", path)
        files = _below(path)
    else:
        raise UserError(f"the folder {path} does not exist.")
    root = images.expanduser().resolve() if images else _image_root(folder)
    found: dict[str, list[Path]] = defaultdict(list)
    if xml := [f for f in files if f.suffix.lower() == ".xml"]:
        found[XML] = [f for f in xml if f.is_relative_to(annotations)] or xml
    _find_json(files, found)
    made = LabelFolder(folder, "", (), annotations, root)
    texts = [f for f in files if f.suffix.lower() == ".txt"]
    yolo = find_yolo(folder, texts, made.image_files) if path.is_dir() else None
    if yolo:
        found[YOLO] = []
        folder, root = (yolo.root, yolo.root) if yolo.root else (folder, root)
    if len(found) > 1:
        where = ", ".join(f"{k} ({f[0].name})" if f else k for k, f in sorted(found.items()))
        raise UserError(f"{path} holds labels of several kinds, {where}: give one kind alone.")
    if not found:
        raise UserError(
            f"{path} holds no labels of {_KINDS}: give the folder that holds both labels and "
            "images, or NAME=LABELS,image_dir."
        )
    ((kind, labels),) = found.items()
    return LabelFolder(folder, kind, tuple(labels), annotations, root, yolo)


def _inner(path: Path) -> Path | None:
    """The one subfolder that holds Annotations, as in VOCdevkit.

    None if the folder itself has Annotations, or if only folders of splits hold them.
    """
    if any((path / name).is_dir() for name in ("Annotations", "annotations")):
        return None
    inner = sorted(p.parent for p in path.glob("*/[Aa]nnotations") if p.is_dir())
    if not inner or all(folder_split(p.name) for p in inner):
        return None
    if len(inner) > 1:
        names = ", ".join(p.name for p in inner)
        raise UserError(f"{path} holds several folders of labels, {names}: give them one by one.")
    return inner[0]


def _image_root(folder: Path) -> Path:
    for name in ("JPEGImages", "images"):
        if any(map(is_image, _below(folder / name))):
            return folder / name
    return folder


def is_image(file: Path) -> bool:
    """Whether a file is an image by its name."""
    return file.suffix.lower() in _IMAGE_SUFFIXES


def _below(folder: Path) -> list[Path]:
    """All files below a folder, except those that operating systems and editors hide there."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(_HIDDEN))
        found += [Path(place, file) for file in sorted(files) if not file.startswith(_HIDDEN)]
    return found


def _find_json(files: Iterable[Path], found: dict[str, list[Path]]) -> None:
    tables = [f for f in files if f.suffix.lower() in (".json", ".csv")]
    labelme = 0
    for file in tables:
        if labelme + sum(map(len, found.values())) >= _MOST_LOOKED_AT:
            found[LABELME].append(file)
            continue
        if kind := json_kind(file):
            found[kind].append(file)
            labelme += kind == LABELME


def json_kind(file: Path) -> str:
    """Which tool wrote a JSON file or table; empty if no known tool did."""
    content = read_table(file)
    return next((k for k, test in _JSON.items() if content is not None and test(content)), "")


def read_table(file: Path) -> Any:
    """What a JSON file or a CSV table of VIA holds; None if it is neither."""
    try:
        if file.suffix.lower() == ".csv":
            return via_table(file.read_text(encoding="utf-8-sig"))
        return read_json(str(file))
    except ValueError:
        return None


def _first(*paths: Path) -> Path:
    return next(path for path in paths if path.is_dir())


def split_word(text: str) -> str:
    """The split that is part of a name, as in "instances_train2017"; empty if there is none."""
    return next(filter(None, map(folder_split, re.split(r"[^A-Za-z]+", text))), "")


def folder_split(name: str) -> str:
    """The split that a folder name stands for, as "Valid" or "train2017" do; empty if none."""
    return _SPLIT_FOLDERS.get(name.lower().rstrip("0123456789"), "")


def coco_files(folder: LabelFolder) -> dict[str, tuple[Path, Path]]:
    """The annotation file and image folder of each split of COCO data.

    The key is "" for a file whose name and folder name no split.

    Raises:
        UserError: a split has several annotation files.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for file in folder.files:
        above = file.parent.name if file.parent != folder.path else ""
        found[split_word(file.stem) or folder_split(above)].append(file)
    for split, files in found.items():
        if boxes := [f for f in files if f.stem.startswith("instances")]:
            files = found[split] = boxes  # not captions and keypoints of the same images
        if len(files) > 1:
            names = ", ".join(f.relative_to(folder.path).as_posix() for f in files[:4])
            raise UserError(
                f"{folder.path} holds several COCO files{f' for {split}' if split else ''}, "
                f"{names}: give one, as NAME=annotations.json,image_dir."
            )
    return {
        split: (files[0], _coco_images(files[0], folder, split)) for split, files in found.items()
    }


def _coco_images(file: Path, folder: LabelFolder, split: str) -> Path:
    """The folder that file names are relative to: where most of the first 50 images exist."""
    names = [row.get("file_name") for row in read_json(str(file))["images"][:50] if row]
    names = [name for name in names if isinstance(name, str)]
    stem = file.stem.partition("_")[2]  # train2017 of instances_train2017
    parts = (stem, split, "valid", f"images/{stem}", f"images/{split}", "images", "")
    places = [file.parent / "images", file.parent, *(folder.path / part for part in parts if part)]
    places = [place for place in [*places, folder.images, folder.path] if place.is_dir()]
    there = [sum((place / name).is_file() for name in names) for place in places]
    # If no place has them under these names, all of the folder is searched for their base names.
    return places[there.index(max(there))] if any(there) else folder.path
