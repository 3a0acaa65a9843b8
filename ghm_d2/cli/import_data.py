"""Find Pascal VOC files, read them, split, write COCO-format JSON."""

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ghm_d2.data.split import choose, describe, write_coco
from ghm_d2.data.voc import DIFFICULT, LabelledImage, read_annotation, to_coco
from ghm_d2.engine.arguments import Parser
from ghm_d2.errors import UserError, command, exits_with_one_sentence

__all__ = ["main"]

logger = logging.getLogger(__name__)

_PROGRAM = "ghm-d2 import-data"
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_USUAL_SPLITS = ("train", "val", "test")
_SHOWN = 10  # broken files that are named one by one


@dataclass(frozen=True)
class _Folder:
    """One VOC_DIR: where its XML files, images and lists of splits lie."""

    path: Path
    annotations: Path
    images: Path

    def split_names(self) -> set[str]:
        return {file.stem for file in (self.path / "ImageSets" / "Main").glob("*.txt")}

    def members(self, split: str) -> list[str]:
        """The names, without extension, that ImageSets/Main/SPLIT.txt lists."""
        file = self.path / "ImageSets" / "Main" / f"{split}.txt"
        try:
            lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--split {split}: {file} cannot be read ({error}).") from error
        if any(len(words) > 1 for words in lines):
            raise UserError(
                f"--split {split}: {file} says which images show one class; name a list of images "
                f"(here are {', '.join(sorted(self.split_names()))})."
            )
        return [words[0] for words in lines if words]


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description="Turn Pascal VOC annotations (one XML file an image) into COCO-format JSON "
        "for --dataset. VOC_DIR holds Annotations, JPEGImages and perhaps ImageSets/Main, or XML "
        "files beside their images, as labelImg writes them.",
        epilog="Pixels count from 1 and xmax, ymax are inside the box, as in VOC and in "
        "Detectron2's loader. labelImg and some other tools write corners from 0: with "
        "--zero-based their boxes are exact, without it left and upper sides are a pixel off.",
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="VOC_DIR", help="one folder, or several together")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="for SPLIT.json; is made")
    add(
        "--split",
        nargs="+",
        metavar="NAME",
        help="lists in ImageSets/Main to convert (those of train, val and test that exist)",
    )
    add(
        "--val-fraction",
        type=float,
        metavar="F",
        help="split at random into train and val, and use no list (0.2 where there are no lists)",
    )
    add("--seed", type=int, default=1, metavar="N", help="of the random split (1)")
    add("--classes", nargs="+", metavar="NAME", help="in this order (all that occur, sorted)")
    add(
        "--difficult",
        choices=DIFFICULT,
        default="crowd",
        help="objects marked difficult: iscrowd 1, so that training leaves them out and evaluation "
        "ignores them as VOC's does; keep: like the others; drop: left out (crowd)",
    )
    add("--zero-based", action="store_true", help="corners count from 0; xmax, ymax are outside")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Convert; print the --dataset options that training takes.

    Args:
        argv: the arguments without the program's name.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stdout)
    with exits_with_one_sentence(_PROGRAM):
        args = _parser().parse_args(argv)
        if args.split and args.val_fraction is not None:
            raise UserError("--split and --val-fraction exclude each other.")
        folders = [_find(path) for path in args.folders]
        images = _read(folders)
        root = Path(os.path.commonpath([folder.images for folder in folders]))
        splits = _splits(folders, images, root, args)
        classes = args.classes or sorted({o.name for i in images.values() for o in i.objects})
        if len(set(classes)) < len(classes) or not classes:
            raise UserError(
                f"--classes names one twice: {' '.join(classes)}."
                if classes
                else "the XML files hold no object."
            )
        contents, notes = {}, Counter()
        for name, members in splits.items():
            contents[args.output_dir / f"{name}.json"], noted = to_coco(
                members, classes, root, difficult=args.difficult, zero_based=args.zero_based
            )
            notes += noted
        if not any(content["annotations"] for content in contents.values()):
            raise UserError(f"no object of the classes {', '.join(classes)} was found.")
        write_coco(contents)
    _report_notes(notes, args.difficult)
    for file, content in contents.items():
        print(describe(str(file), content))
    print(f"The images lie in {root}; for {command('train')}:")
    print(" ".join(f"--dataset my_{file.stem}={file},{root}" for file in contents))


def _find(path: Path) -> _Folder:
    path = path.expanduser().resolve()
    if not path.is_dir():
        raise UserError(f"the folder {path} does not exist.")
    annotations = _first(path / "Annotations", path / "annotations", path)
    if next(annotations.glob("*.xml"), None) is None:
        inner = sorted(p.parent.name for p in path.glob("*/Annotations"))
        way_out = f": give its folders {', '.join(inner)}" if inner else ""
        raise UserError(f"{annotations} holds no XML file{way_out}.")
    return _Folder(path, annotations, _first(path / "JPEGImages", path / "images", path))


def _first(*paths: Path) -> Path:
    return next(path for path in paths if path.is_dir())


def _read(folders: Iterable[_Folder]) -> dict[tuple[_Folder, str], LabelledImage]:
    """Every XML file of the folders that can be used, by folder and name; the others are named."""
    images: dict[tuple[_Folder, str], LabelledImage] = {}
    broken = []
    for folder in folders:
        files: dict[str, list[Path]] = {}
        for file in sorted(folder.images.iterdir()):
            if file.suffix.lower() in _IMAGE_SUFFIXES:
                files.setdefault(file.stem, []).append(file)
        seen: dict[Path, Path] = {}
        xmls = sorted(folder.annotations.glob("*.xml"))
        for xml in tqdm(xmls, desc=f"reading {folder.annotations}", unit="file", delay=2):
            try:
                image = read_annotation(xml, files)
                if image.file in seen:
                    raise ValueError(f"is for {image.file.name}, as is {seen[image.file].name}")
            except (ValueError, OSError) as error:
                broken.append(f"{xml} {error}")
                continue
            seen[image.file] = xml
            images[folder, xml.stem] = image
        if bare := sum(len(found) for found in files.values()) - len(seen):
            logger.warning(
                "%s: %d images have no XML file that can be used and are left out (an XML file "
                "without objects makes an image of background)",
                folder.images,
                bare,
            )
    for line in broken[:_SHOWN]:
        logger.warning("%s", line)
    if broken:
        more = f" ({len(broken) - _SHOWN} more than are named)" if len(broken) > _SHOWN else ""
        logger.warning("%d XML files are left out, with their images%s", len(broken), more)
    if not images:
        raise UserError(f"none of the {len(broken)} XML files can be used; the first: {broken[0]}.")
    return images


def _splits(
    folders: Sequence[_Folder],
    images: dict[tuple[_Folder, str], LabelledImage],
    root: Path,
    args: argparse.Namespace,
) -> dict[str, list[LabelledImage]]:
    names = args.split
    if not names and args.val_fraction is None:
        listed = set().union(*(folder.split_names() for folder in folders))
        names = [name for name in _USUAL_SPLITS if name in listed]
        if listed and not names:
            raise UserError(
                "ImageSets/Main has no list train, val or test: name some with --split, or split "
                f"at random with --val-fraction 0.2 (here are {', '.join(sorted(listed))})."
            )
    if not names:
        fraction = 0.2 if args.val_fraction is None else args.val_fraction
        # Relative, so that another place on the disk gives the same split.
        by_name = {os.path.relpath(i.file, root): i for i in images.values()}
        chosen = choose(list(by_name), fraction, args.seed)
        print(f"Split at random: {fraction:.0%} for val, seed {args.seed}.")
        return {
            "train": [image for name, image in by_name.items() if name not in chosen],
            "val": [image for name, image in by_name.items() if name in chosen],
        }
    splits = {name: _members(name, folders, images) for name in names}
    times = Counter(image.file for members in splits.values() for image in members)
    if twice := sum(number > 1 for number in times.values()):
        logger.warning("%d images are in more than one of the splits %s", twice, ", ".join(names))
    if unused := len(images) - len(times):
        logger.warning("%d images are in none of the splits %s", unused, ", ".join(names))
    return splits


def _members(
    split: str,
    folders: Iterable[_Folder],
    images: dict[tuple[_Folder, str], LabelledImage],
) -> list[LabelledImage]:
    # A split may exist in one of several folders alone, as VOC2012 has no test.
    having = [folder for folder in folders if split in folder.split_names()]
    if not having:
        raise UserError(f"--split {split}: there is no ImageSets/Main/{split}.txt.")
    keys = [(folder, name) for folder in having for name in dict.fromkeys(folder.members(split))]
    if absent := [name for folder, name in keys if (folder, name) not in images]:
        logger.warning(
            "%s: %d of %d listed images have no XML file that can be used, the first is %s",
            split,
            len(absent),
            len(keys),
            absent[0],
        )
    found = [images[key] for key in keys if key in images]
    if not found:
        raise UserError(f"--split {split}: none of its {len(keys)} images can be used.")
    return found


def _report_notes(notes: Counter, difficult: str) -> None:
    treated = {"crowd": "marked iscrowd", "keep": "kept", "drop": "left out"}[difficult]
    texts = {
        "difficult": f"objects are marked difficult: {treated} (--difficult)",
        "empty": "objects are left out: their boxes have no area inside the image",
        "clipped": "boxes reached out of their image and were cut",
        "from 0": "boxes begin at 0, where VOC begins at 1: if the tool that wrote them counts "
        "from 0, give --zero-based",
    }
    for key, text in texts.items():
        if notes[key]:
            logger.warning("%d %s", notes[key], text)
    others = {key[1]: number for key, number in notes.items() if isinstance(key, tuple)}
    if others:
        names = ", ".join(f"{name} {number}" for name, number in sorted(others.items()))
        logger.warning(
            "%d objects of classes that --classes does not name are left out: %s",
            sum(others.values()),
            names,
        )
