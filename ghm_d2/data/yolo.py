"""YOLO labels: one text file per image, objects in fractions of its width and height."""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ghm_d2.errors import UserError, reason, shown

from .fields import identity, number, polygon_box
from .labels import LabelledImage, LabelledObject, checked_size

logger = logging.getLogger(__name__)

_SPLITS = ("train", "val", "test")  # keys of data.yaml
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "predefined_classes.txt")
_LARGEST = 1.5  # fraction; polygons may reach a little beyond the image


@dataclass(frozen=True)
class YoloSet:
    """What a folder declares besides its labels.

    Attributes:
        names: names of the classes; empty if no file has them.
        splits: for each split by name, folders of images and text files that list images.
        points: how many numbers follow each box to give keypoints.
        declared: name of the file that names the classes.
        root: the folder that `path` in data.yaml leads to, if data.yaml lies outside it.
    """

    names: tuple[str, ...] = ()
    splits: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    points: int = 0
    declared: str = ""
    root: Path | None = None


def find_yolo(folder: Path, labels: Sequence[Path], images: Mapping[str, Any]) -> YoloSet | None:
    """What the folder declares; None if its text files are no YOLO labels.

    Args:
        folder: the folder that holds labels and images.
        labels: its text files.
        images: its images by their names without suffix.

    Raises:
        UserError: its data.yaml is damaged.
    """
    found = _declared(folder)
    if found and (found.splits or any(images) and (labels or _labels_of(folder) != folder)):
        return found
    candidates = [f for f in labels if f.stem in images and f.name not in _NAME_FILES]
    return (found or YoloSet()) if any(map(_is_label_file, candidates)) else None


def _is_label_file(file: Path) -> bool:
    try:
        rows = [row.split() for row in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeError):
        return False
    rows = [row for row in rows if row]
    return all(len(row) >= 5 and None not in map(number, row) for row in rows)


def _declared(folder: Path) -> YoloSet | None:
    for place in (folder, folder.parent, folder.parent.parent):
        # A folder above may name the classes, but its splits would add images from elsewhere.
        for file in _yaml_files(place):
            content = _read_yaml(file)
            if _names(content) or (place == folder and content.get("train")):
                shape = content.get("kpt_shape")
                points = shape[0] * shape[1] if isinstance(shape, list) and len(shape) == 2 else 0
                splits = _splits(content, file) if place == folder else {}
                root = _root(content, file) if splits else None
                return YoloSet(_names(content), splits, points, file.name, root)
        for name in _NAME_FILES:
            for file in (place / name, place / "labels" / name, place / "train" / name):
                if file.is_file() and (place == folder or _near(place, folder)):
                    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
                    names = tuple(line.strip() for line in lines if line.strip())
                    return YoloSet(names, {}, 0, file.name)
    return None


def _near(place: Path, folder: Path) -> bool:
    """Whether a path from `place` to `folder` is one of a YOLO tree, such as images/train."""
    return {"images", "labels", "train", "val", "valid", "test"} >= set(
        folder.relative_to(place).parts
    )


def _yaml_files(folder: Path) -> list[Path]:
    files = [*folder.glob("*.yaml"), *folder.glob("*.yml")]
    return sorted(files, key=lambda f: (f.stem not in ("data", "dataset"), f.name))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        if file.stem in ("data", "dataset"):
            raise UserError(f"{file} is not valid YAML: {reason(error)}.") from error
        return {}
    return content if isinstance(content, dict) else {}


def _names(content: dict[str, Any]) -> tuple[str, ...]:
    names = content.get("names")
    if isinstance(names, str):  # some exports write the list as text, "['a', 'b']"
        names = re.findall(r"[^\[\],'\"]+", names)
        names = [name.strip() for name in names if name.strip()]
    if isinstance(names, dict):
        by_id = {identity(key): name for key, name in names.items()}
        if not all(isinstance(k, int) and 0 <= k < 100_000 for k in by_id):
            return ()
        return tuple(str(by_id.get(k, k)) for k in range(max(by_id, default=-1) + 1))
    if isinstance(names, list) and names:
        return tuple(map(str, names))
    count = content.get("nc")
    return tuple(map(str, range(count))) if isinstance(count, int) and 0 < count < 100_000 else ()


def _splits(content: dict[str, Any], file: Path) -> dict[str, list[Path]]:
    found = {}
    for split in _SPLITS:
        values = content.get(split) or (content.get("valid") if split == "val" else None)
        values = [values] if isinstance(values, str) else values or []
        texts = [value for value in values if isinstance(value, str)]
        by_text = {text: _place(text, content.get("path"), file) for text in texts}
        places = [place for place in by_text.values() if place]
        for text in (text for text, place in by_text.items() if place is None):
            log = logger.info if split == "test" else logger.warning
            log("%s gives %s: %s, which does not exist", file.name, split, shown(text))
        if places:
            found[split] = places
    # Drops a split with the images of an earlier one: small examples validate on training images.
    return {s: p for k, (s, p) in enumerate(found.items()) if p not in [*found.values()][:k]}


def _root(content: dict[str, Any], file: Path) -> Path | None:
    path = content.get("path")
    root = Path(os.path.normpath(file.parent / path)) if isinstance(path, str) and path else None
    return root if root and root.is_dir() and not file.is_relative_to(root) else None


def _place(text: str, root: Any, file: Path) -> Path | None:
    """Where a path of data.yaml leads here; it may have been written on another machine."""
    text = text.replace("\\", "/")
    bases = [file.parent]
    if isinstance(root, str) and root:
        bases.insert(0, file.parent / root.replace("\\", "/"))
    for base in bases:
        place = Path(os.path.normpath(base / text))  # resolve() would follow links
        if place.exists():
            return place
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]
    ends = (file.parent.joinpath(*parts[k:]) for k in range(len(parts)))
    return next((end for end in ends if end.exists()), None)


def read_yolo(
    folder: Path, found: YoloSet, images: Sequence[Path], report: Callable[[str], None]
) -> Iterator[LabelledImage]:
    """The images of a folder and their objects; an image without a label file has none.

    Args:
        folder: the folder that holds labels and images.
        found: what :func:`find_yolo` returned for it.
        images: its image files.
        report: called with what is wrong with each label file or image that cannot be used.

    Raises:
        UserError: an object is of a class that has no name.
    """
    texts: dict[str, list[Path]] = defaultdict(list)
    files = {*folder.rglob("*.txt"), *_labels_of(folder).rglob("*.txt")}
    for file in sorted(f for f in files if not f.name.startswith(".")):
        texts[file.stem].append(file)
    used: set[Path] = set()
    without = 0
    for split, image in _members(found, images):
        label = _label_of(image, texts)
        without += label is None
        if label:
            used.add(label)
        try:
            width, height = checked_size(image)
            objects, lost = _objects(label, width, height, found) if label else ([], [])
        except (ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            report(f"{label or image} {reason(error)}")
            continue
        yield LabelledImage(image, width, height, tuple(objects), split, tuple(lost))
    if without:
        logger.warning("%s: %d images have no label file and count as background", folder, without)
    stems = {image.stem for image in images}
    for file in (f for files in texts.values() for f in files):
        beside = file.parent.name == "labels" or "labels" in file.parts[-4:-1]
        if beside and file not in used and file.stem not in stems and file.name not in _NAME_FILES:
            report(f"{file} has no image")


def _labels_of(folder: Path) -> Path:
    """The folder with labels/ in place of its last images/, if that exists, else `folder`."""
    parts = list(folder.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts) if Path(*parts).is_dir() else folder


def _members(found: YoloSet, images: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    if not found.splits:
        yield from (("", image) for image in images)
        return
    names: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        names[image.name].append(image)
    for split, places in found.splits.items():
        for place in places:
            if place.is_dir():
                yield from ((split, image) for image in images if place in image.parents)
                continue
            absent = []
            for line in place.read_text(encoding="utf-8-sig", errors="replace").splitlines():
                path = Path(line.strip().replace("\\", "/"))
                same = names.get(path.name, [])
                near = [i for i in same if i.parent.name == path.parent.name]
                if len(near or same) == 1:
                    yield split, (near or same)[0]
                elif line.strip():
                    absent.append(line.strip())
            if absent:
                logger.warning(
                    "%s: %d of the images that it lists do not exist; the first: %s",
                    place,
                    len(absent),
                    shown(absent[0]),
                )


def _label_of(image: Path, texts: Mapping[str, Sequence[Path]]) -> Path | None:
    """The label file: labels/ for the last images/, as in Ultralytics; or beside it; or by name."""
    parts = list(image.with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        place = len(parts) - 2 - parts[-2::-1].index("images")
        parts[place] = "labels"
    candidates = texts.get(image.stem, [])
    for path in (Path(*parts), image.with_suffix(".txt")):
        if path in candidates:
            return path
    near = [text for text in candidates if text.parent.name == image.parent.name]
    return near[0] if len(near) == 1 else candidates[0] if len(candidates) == 1 else None


def _objects(
    file: Path, width: int, height: int, found: YoloSet
) -> tuple[list[LabelledObject], list[str]]:
    objects, lost = [], []
    for line, row in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        words = row.split()
        if not words:
            continue
        values = [number(word) for word in words]
        if len(values) < 5 or None in values or values[0] != int(values[0]):
            lost.append(f"line {line} of {file.name}, {shown(row, 60)!r}, is not a box or polygon")
            continue
        k = int(values[0])
        if found.names and not 0 <= k < len(found.names):
            raise UserError(
                f"{file}, line {line}: class {k} has no name, as {found.declared} has only "
                f"{len(found.names)} ({shown(', '.join(found.names), 100)}): add it there, or "
                "remove the line."
            )
        # Leave out the score that a detection may end with, and the keypoints of a pose.
        numbers = values[1:5] if len(values) in (6, 5 + found.points) else values[1:]
        made = _object(found.names[k] if found.names else str(k), numbers, width, height)
        if made is None:
            text = shown(row, 60)
            lost.append(f"line {line} of {file.name}, {text!r}, is not in fractions of the image")
        else:
            objects.append(made)
    return objects, lost


def _object(name: str, values: Sequence[float], width: int, height: int) -> LabelledObject | None:
    if max(map(abs, values)) > _LARGEST:
        return None
    if len(values) == 4:
        x, y, w, h = values
        x, y, w, h = x * width, y * height, w * width, h * height
        return LabelledObject(name, (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    if len(values) % 2:
        return None
    points = tuple(v * (height if k % 2 else width) for k, v in enumerate(values))
    x, y, w, h = polygon_box([points])
    return LabelledObject(name, (x, y, x + w, y + h), polygons=(points,))
