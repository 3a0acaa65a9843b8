"""The parts of labelled data: which of its images are for training and which for validation."""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ghm_d2.errors import UserError, counted

from .label_folders import LabelFolder, folder_split, is_image
from .label_images import Images, read_images
from .labels import LabelledImage
from .split import choose

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")

_LEVELS = {"outline": logging.INFO}


@dataclass(frozen=True)
class LabelSet:
    """Labelled images of one folder, or of several that belong together.

    Attributes:
        folders: the folders that hold them.
        images: by folder and name; see :func:`~ghm_d2.data.label_images.read_images`.
        root: a folder that holds all images.
    """

    folders: tuple[LabelFolder, ...]
    images: Images
    root: Path

    @property
    def classes(self) -> list[str]:
        """The class names that the folders declare, in order, then others that occur, sorted.

        Raises:
            UserError: there is none.
        """
        declared = list(dict.fromkeys(name for folder in self.folders for name in folder.classes))
        occurring = {item.name for image in self.images.values() for item in image.objects}
        classes = [*declared, *sorted_names(occurring.difference(declared))]
        if not classes:
            raise UserError(f"{self.folders[0].path} holds no labelled object.")
        return classes

    def __str__(self) -> str:
        """What was found, in one line."""
        counts = Counter(item.name for image in self.images.values() for item in image.objects)
        classes = self.classes
        shown = ", ".join(f"{name} {counts[name]:,}" for name in classes[:10])
        more = f" and {len(classes) - 10} more" if len(classes) > 10 else ""
        kinds = "; ".join(f"{folder.path}: {folder.tool} labels" for folder in self.folders)
        return (
            f"{kinds}, {counted(len(self.images), 'image')}, {counted(counts.total(), 'object')}, "
            f"{counted(len(classes), 'class')} ({shown}{more})"
        )

    def declared_splits(self) -> dict[str, list[LabelledImage]]:
        """The images of each split that lists, folders or labels declare; empty if none do."""
        listed = {name for folder in self.folders for name in folder.lists}
        if listed:
            names = [name for name in SPLITS if name in listed]
            return self.named_splits(names) if names else {}
        found = {_split_of(name, image) for (_, name), image in self.images.items()}
        if len(found) < 2 or "" in found:
            return {}
        names = [name for name in SPLITS if name in found]
        return self.named_splits([*names, *sorted(found.difference(names))])

    def named_splits(self, names: Sequence[str]) -> dict[str, list[LabelledImage]]:
        """The images of these splits; warns of images that are in several or in none.

        Raises:
            UserError: there is no such split, or none of its images can be used.
        """
        splits = {name: self._members(name) for name in names}
        times = Counter(image.file for listed in splits.values() for image in listed)
        if twice := sum(number > 1 for number in times.values()):
            logger.warning(
                "%d images are in more than one of the splits %s", twice, ", ".join(names)
            )
        if unused := len(self.images) - len(times):
            logger.warning("%d images are in none of the splits %s", unused, ", ".join(names))
        return splits

    def random_splits(self, fraction: float, seed: int) -> dict[str, list[LabelledImage]]:
        """Randomly chosen `train` and `val` images, the fraction being the share of `val`.

        Raises:
            UserError: see :func:`~ghm_d2.data.split.choose`.
        """
        # Absolute paths would give another split once the data is moved.
        by_name = {os.path.relpath(i.file, self.root): i for i in self.images.values()}
        chosen = choose(list(by_name), fraction, seed)
        return {
            "train": [image for name, image in by_name.items() if name not in chosen],
            "val": [image for name, image in by_name.items() if name in chosen],
        }

    def _members(self, split: str) -> list[LabelledImage]:
        # Not every folder must list the split: VOC2012, for example, has no test list.
        having = [folder for folder in self.folders if split in folder.lists]
        if not having:
            found = [i for (_, name), i in self.images.items() if _split_of(name, i) == split]
            if not found:
                raise UserError(
                    f"there is no split {split}: neither ImageSets/Main/{split}.txt exists, nor a "
                    "folder or label of this name."
                )
            return found
        found, absent, number = {}, [], 0
        for folder in having:
            known = _Names(folder, self.images)
            for line in _lines(split, folder):
                number += 1
                image = known.find(line)
                if image is None and line.split()[-1] in ("1", "-1", "0") and len(line.split()) > 1:
                    raise UserError(
                        f"--split {split}: {folder.lists[split]} says which images show one class: "
                        f"name a list of images (there are {', '.join(sorted(folder.lists))})."
                    )
                if image is None:
                    absent.append(line)
                else:
                    found.setdefault(image.file, image)
        if absent:
            logger.warning(
                "%s: %d of %d listed images have no labels that can be used; the first: %s",
                split,
                len(absent),
                number,
                absent[0],
            )
        if not found:
            raise UserError(f"--split {split}: none of its {number} images can be used.")
        return list(found.values())


def _split_of(name: str, image: LabelledImage) -> str:
    """The split that the label or a folder of an image names; empty if none does."""
    if image.split:
        return folder_split(image.split) or image.split
    return next(filter(None, map(folder_split, PurePosixPath(name).parts[:-1])), "")


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in a fixed order: first numbers by value, then the others as text."""
    return tuple(sorted(names, key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else n)))


def read_labels(folders: Sequence[LabelFolder]) -> LabelSet:
    """All that folders of labels hold; what was left out is logged.

    Raises:
        UserError: there is nothing that can be used.
    """
    root = Path(os.path.commonpath([folder.images for folder in folders]))
    labels = LabelSet(tuple(folders), read_images(folders), root)
    logger.info("%s", labels)
    return labels


def log_notes(notes: Counter, difficult: str) -> None:
    """Logs what :func:`~ghm_d2.data.labels.to_coco` has counted.

    Args:
        notes: the counts.
        difficult: what became of difficult objects, one of `ghm_d2.data.labels.DIFFICULT`.
    """
    treated = {"crowd": "marked iscrowd", "keep": "kept", "drop": "left out"}[difficult]
    texts = {
        "difficult": f"objects are marked difficult: {treated} (--difficult)",
        "swapped": "boxes had their corners exchanged (xmin above xmax or ymin above ymax)",
        "outline": "objects are polygons or rotated boxes: the upright box around each is used",
        "empty": "objects are left out: their boxes have no area inside the image",
        "clipped": "boxes reached beyond their image and were clipped",
        "labelImg": "boxes were written by labelImg, which counts from 0, but are read as VOC's, "
        "with left and upper sides a pixel too far out: import-data --zero-based reads them "
        "exactly",
        "from 0": "boxes begin at 0, where VOC begins at 1: if the tool that wrote them counts "
        "from 0, give --zero-based",
    }
    for key, text in texts.items():
        if notes[key]:
            logger.log(_LEVELS.get(key, logging.WARNING), "%d %s", notes[key], text)
    others = {key[1]: number for key, number in notes.items() if isinstance(key, tuple)}
    if others:
        names = ", ".join(f"{name} {number}" for name, number in sorted(others.items()))
        logger.warning(
            "%d objects of classes that --classes does not name are left out: %s",
            sum(others.values()),
            names,
        )


def _lines(split: str, folder: LabelFolder) -> list[str]:
    file = folder.lists[split]
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--split {split}: {file} cannot be read ({error}).") from error
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


class _Names:
    """Finds the images of a folder by a line of a list, with or without folders and suffix."""

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
    return suffix.lower() == ".xml" or is_image(Path(f"x{suffix}"))
