"""Folders of Pascal VOC or CVAT labels: their XML files, images, and lists of splits."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from ghm_d2.errors import UserError

from .cvat import read_cvat
from .voc import LabelledImage, read_annotation
from .xml_files import read_xml

__all__ = ["LabelFolder", "Images", "find_folder", "members", "read_images", "split_of_folder"]

logger = logging.getLogger(__name__)

Images = Mapping[tuple["LabelFolder", str], LabelledImage]

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
# Folders that say what their images are for, and what this project calls it.
_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_SHOWN = 10  # broken files that are named one by one


@dataclass(frozen=True)
class LabelFolder:
    """One folder of labelled images: where its XML files, images and lists of splits lie."""

    path: Path
    annotations: Path
    images: Path

    @cached_property
    def lists(self) -> dict[str, Path]:
        """The lists of images in ImageSets/Main, by the names of the splits."""
        return {file.stem: file for file in (self.path / "ImageSets" / "Main").glob("*.txt")}

    def xml_files(self) -> list[Path]:
        """All of them, also in folders below; whichever case their suffix has."""
        return sorted(f for f in self.annotations.rglob("*") if f.suffix.lower() == ".xml")

    def image_files(self) -> dict[str, list[Path]]:
        """All images, by their names without suffix."""
        found: dict[str, list[Path]] = defaultdict(list)
        for file in sorted(self.images.rglob("*")):
            if file.suffix.lower() in _IMAGE_SUFFIXES:
                found[file.stem].append(file)
        return found


def find_folder(path: Path) -> LabelFolder:
    """Where the parts of a folder are.

    Raises:
        UserError: it does not exist or holds no XML file.
    """
    path = path.expanduser().resolve()
    if not path.is_dir():
        raise UserError(f"the folder {path} does not exist.")
    annotations = _first(path / "Annotations", path / "annotations", path)
    folder = LabelFolder(path, annotations, _first(path / "JPEGImages", path / "images", path))
    inner = sorted(p.parent.name for p in path.glob("*/[Aa]nnotations"))
    if annotations == path and inner:
        raise UserError(f"{path} holds no XML file: give its folders {', '.join(inner)}.")
    if not folder.xml_files():
        raise UserError(f"{annotations} holds no XML file.")
    return folder


def _first(*paths: Path) -> Path:
    return next(path for path in paths if path.is_dir())


def read_images(folders: Iterable[LabelFolder]) -> dict[tuple[LabelFolder, str], LabelledImage]:
    """Every image of the folders with labels that can be used; what cannot be is named.

    Returns:
        The images by folder and name, that of the XML file without its suffix.

    Raises:
        UserError: there is none.
    """
    images: dict[tuple[LabelFolder, str], LabelledImage] = {}
    broken: list[str] = []
    for folder in folders:
        files = folder.image_files()
        seen: dict[Path, Path] = {}
        xmls = folder.xml_files()
        for xml in tqdm(xmls, desc=f"reading {folder.annotations}", unit="file", delay=2):
            for name, image in _read(xml, folder, files, broken):
                if image.file in seen:
                    broken.append(f"{xml} is for {image.file.name}, as is {seen[image.file].name}")
                    continue
                seen[image.file] = xml
                images[folder, name] = image
        if bare := sum(len(found) for found in files.values()) - len(seen):
            logger.warning(
                "%s: %d images have no XML file that can be used and are left out (an XML file "
                "without objects makes an image of background)",
                folder.images,
                bare,
            )
    _report(images, broken)
    return images


def _read(
    xml: Path, folder: LabelFolder, files: dict[str, list[Path]], broken: list[str]
) -> Iterator[tuple[str, LabelledImage]]:
    name = xml.relative_to(folder.annotations).with_suffix("").as_posix()
    try:
        root = read_xml(xml)
        if root.tag == "annotations":
            for image in read_cvat(
                root, folder.images, lambda text: broken.append(f"{xml}: {text}")
            ):
                yield image.file.relative_to(folder.images).with_suffix("").as_posix(), image
        else:
            yield name, read_annotation(root, xml, files)
    except (ValueError, OSError) as error:
        broken.append(f"{xml} {error}")


def _report(images: Images, broken: list[str]) -> None:
    for line in broken[:_SHOWN]:
        logger.warning("%s", line)
    if broken:
        more = f" ({len(broken) - _SHOWN} more than are named)" if len(broken) > _SHOWN else ""
        logger.warning("%d XML files are left out, with their images%s", len(broken), more)
    lost = [f"{image.file.name} {text}" for image in images.values() for text in image.lost]
    if lost:
        logger.warning(
            "%d objects are left out, because neither box nor polygon can be read; the first: %s",
            len(lost),
            lost[0],
        )
    if not images:
        raise UserError(f"none of the {len(broken)} XML files can be used; the first: {broken[0]}.")


def split_of_folder(folder: LabelFolder, name: str, image: LabelledImage) -> str:
    """What an image is for, as its label or its outermost folder says; empty where none does."""
    if image.split:
        return _SPLIT_FOLDERS.get(image.split.lower(), image.split)
    first, *below = PurePosixPath(name).parts
    return _SPLIT_FOLDERS.get(first.lower(), "") if below else ""


def members(split: str, folders: Iterable[LabelFolder], images: Images) -> list[LabelledImage]:
    """The images that the lists, or else the folders, of a split name.

    Raises:
        UserError: there is no such list, or none of its images can be used.
    """
    # A split may exist in one of several folders alone, as VOC2012 has no test.
    having = [folder for folder in folders if split in folder.lists]
    if not having:
        found = [i for (f, name), i in images.items() if split_of_folder(f, name, i) == split]
        if not found:
            raise UserError(f"--split {split}: there is no ImageSets/Main/{split}.txt.")
        return found
    found, absent, number = {}, [], 0
    for folder in having:
        known = _Names(folder, images)
        for line in _lines(split, folder):
            number += 1
            image = known.find(line)
            if image is None and line.split()[-1] in ("1", "-1", "0") and len(line.split()) > 1:
                raise UserError(
                    f"--split {split}: {folder.lists[split]} says which images show one class; "
                    f"name a list of images (here are {', '.join(sorted(folder.lists))})."
                )
            if image is None:
                absent.append(line)
            else:
                found.setdefault(image.file, image)
    if absent:
        logger.warning(
            "%s: %d of %d listed images have no XML file that can be used, the first is %s",
            split,
            len(absent),
            number,
            absent[0],
        )
    if not found:
        raise UserError(f"--split {split}: none of its {number} images can be used.")
    return list(found.values())


def _lines(split: str, folder: LabelFolder) -> list[str]:
    file = folder.lists[split]
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--split {split}: {file} cannot be read ({error}).") from error
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


class _Names:
    """The images of a folder by what a list may call them: with or without folders and suffix."""

    def __init__(self, folder: LabelFolder, images: Images) -> None:
        self._whole: dict[str, LabelledImage] = {}
        self._last: dict[str, list[LabelledImage]] = defaultdict(list)
        for (owner, name), image in images.items():
            if owner == folder:
                self._whole[name] = image
                self._last[name.rpartition("/")[2]].append(image)
                if image.file.stem != name.rpartition("/")[2]:
                    self._last[image.file.stem].append(image)

    def find(self, line: str) -> LabelledImage | None:
        path = PurePosixPath(line.replace("\\", "/"))
        for name in (path, path.with_suffix("") if _is_suffix(path.suffix) else path):
            if image := self._whole.get(name.as_posix()):
                return image
            found = self._last.get(name.name, [])
            near = [image for image in found if image.file.parent.name == name.parent.name]
            if len(near or found) == 1:
                return (near or found)[0]
        return None


def _is_suffix(suffix: str) -> bool:
    return suffix.lower() in (*_IMAGE_SUFFIXES, ".xml")
