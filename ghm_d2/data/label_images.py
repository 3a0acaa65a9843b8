"""Reads the labelled images of folders, with the reader for the tool that wrote the labels."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from ghm_d2.errors import UserError, shown

from .cvat import read_cvat
from .label_folders import LABEL_STUDIO, LABELME, VIA, XML, YOLO, LabelFolder, read_table
from .label_studio import read_label_studio
from .labelme import read_labelme
from .labels import LabelledImage
from .via import read_via
from .voc import read_annotation
from .xml_files import read_xml
from .yolo import read_yolo

logger = logging.getLogger(__name__)

Images = Mapping[tuple[LabelFolder, str], LabelledImage]

_SHOWN = 10  # broken files that are named one by one


def read_images(folders: Iterable[LabelFolder]) -> dict[tuple[LabelFolder, str], LabelledImage]:
    """Every image of the folders with usable labels; files that cannot be used are logged.

    Returns:
        The images by folder and name. The name is the path of the image relative to the folder of
        images or, for VOC, that of the XML file without its suffix, as lists of images give it.

    Raises:
        UserError: no image can be used.
    """
    images: dict[tuple[LabelFolder, str], LabelledImage] = {}
    broken: list[str] = []
    for folder in folders:
        seen: dict[Path, str] = {}
        for name, source, image in _read(folder, broken):
            if image.file in seen:
                broken.append(f"{source} is for {image.file.name}, as is {seen[image.file]}")
            elif image.lost and not image.objects:  # kept, it would be trained on as background
                broken.append(f"{source} {image.lost[0]}")
            else:
                images[folder, name] = image
                seen[image.file] = Path(source).name
        if bare := sum(map(len, folder.image_files.values())) - len(seen):
            logger.warning(
                "%s: %d images have no %s that can be used and are left out (labels without any "
                "object would make an image background)",
                folder.images,
                bare,
                "XML file" if folder.kind == XML else "labels",
            )
    kinds = {folder.kind for folder in folders}
    _report(images, broken, "XML files" if kinds == {XML} else "images or label files")
    return images


def _read(folder: LabelFolder, broken: list[str]) -> Iterator[tuple[str, str, LabelledImage]]:
    """Name, source (for messages) and labels of each image."""
    if folder.kind == XML:
        bar = tqdm(folder.files, desc=f"reading {folder.annotations}", unit="file", delay=2)
        for xml in bar:
            yield from _read_xml(xml, folder, broken)
        return
    found = _read_others(folder, broken)
    for image in tqdm(found, desc=f"reading {folder.path}", unit="image", delay=2):
        yield image.file.relative_to(folder.images).as_posix(), str(image.file), image


def _read_others(folder: LabelFolder, broken: list[str]) -> Iterator[LabelledImage]:
    if folder.kind == YOLO:
        images = [file for files in folder.image_files.values() for file in files]
        yield from read_yolo(folder.path, folder.yolo, images, broken.append)
    elif folder.kind == LABELME:
        yield from read_labelme(folder.files, folder.images, broken.append)
    else:
        read = {VIA: read_via, LABEL_STUDIO: read_label_studio}[folder.kind]
        for file in folder.files:
            yield from read(read_table(file), file, folder.images, broken.append)


def _read_xml(
    xml: Path, folder: LabelFolder, broken: list[str]
) -> Iterator[tuple[str, str, LabelledImage]]:
    name = xml.stem
    if xml.is_relative_to(folder.annotations):
        name = xml.relative_to(folder.annotations).with_suffix("").as_posix()
    try:
        root = read_xml(xml)
        if root.tag == "annotations":
            files = [file for found in folder.image_files.values() for file in found]
            report = broken.append
            for image in read_cvat(
                root, folder.images, files, lambda text: report(f"{xml}: {text}")
            ):
                name = image.file.relative_to(folder.images).as_posix()
                yield name, f"{xml}: {image.file.name}", image
        else:
            yield name, str(xml), read_annotation(root, xml, folder.image_files)
    except (ValueError, OSError) as error:
        broken.append(f"{xml} {error}")


def _report(images: Images, broken: list[str], what: str) -> None:
    for line in broken[:_SHOWN]:
        logger.warning("%s", shown(line))
    if broken:
        more = f" ({len(broken) - _SHOWN} more than named above)" if len(broken) > _SHOWN else ""
        logger.warning("%d %s are left out, with their images%s", len(broken), what, more)
    lost = [f"{image.file.name} {text}" for image in images.values() for text in image.lost]
    if lost:
        logger.warning(
            "%d objects are left out because they have no box or polygon that can be read; the "
            "first: %s",
            len(lost),
            shown(lost[0]),
        )
    if not images:
        first = f"; the first: {shown(broken[0])}" if broken else ""
        raise UserError(f"none of the {len(broken)} {what} can be used{first}.")
