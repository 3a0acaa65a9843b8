"""Pascal VOC or CVAT labels to COCO-format JSON, split into training and validation data."""

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ghm_d2.data.label_folders import (
    Images,
    LabelFolder,
    find_folder,
    members,
    read_images,
    split_of_folder,
)
from ghm_d2.data.split import choose, describe, write_coco
from ghm_d2.data.voc import DIFFICULT, LabelledImage, to_coco
from ghm_d2.engine.arguments import Parser
from ghm_d2.errors import UserError, command, exits_with_one_sentence

__all__ = ["main"]

logger = logging.getLogger(__name__)

_PROGRAM = "ghm-d2 import-data"
_USUAL_SPLITS = ("train", "val", "test")


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description="Turn Pascal VOC annotations (one XML file an image), or CVAT's own XML, into "
        "COCO-format JSON for --dataset. VOC_DIR holds Annotations, JPEGImages and perhaps "
        "ImageSets/Main, or XML files beside their images, as labelImg writes them, also in "
        "folders such as train and valid; or CVAT's annotations.xml and images.",
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
        folders = [find_folder(path) for path in args.folders]
        images = read_images(folders)
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


def _splits(
    folders: Sequence[LabelFolder], images: Images, root: Path, args: argparse.Namespace
) -> dict[str, list[LabelledImage]]:
    names = args.split
    if not names and args.val_fraction is None:
        listed = {name for folder in folders for name in folder.lists}
        names = [name for name in _USUAL_SPLITS if name in listed]
        if listed and not names:
            raise UserError(
                "ImageSets/Main has no list train, val or test: name some with --split, or split "
                f"at random with --val-fraction 0.2 (here are {', '.join(sorted(listed))})."
            )
        if not listed:
            names = _splits_of_folders(images)
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
    splits = {name: members(name, folders, images) for name in names}
    times = Counter(image.file for listed in splits.values() for image in listed)
    if twice := sum(number > 1 for number in times.values()):
        logger.warning("%d images are in more than one of the splits %s", twice, ", ".join(names))
    if unused := len(images) - len(times):
        logger.warning("%d images are in none of the splits %s", unused, ", ".join(names))
    return splits


def _splits_of_folders(images: Images) -> list[str]:
    """The splits that folders such as train/ and valid/ say, where all images are in one."""
    found = {split_of_folder(folder, name, image) for (folder, name), image in images.items()}
    if "" in found or len(found) < 2:
        return []
    names = [name for name in _USUAL_SPLITS if name in found]
    names += sorted(found.difference(names))
    print(f"Split as the folders are: {', '.join(names)}.")
    return names


def _report_notes(notes: Counter, difficult: str) -> None:
    treated = {"crowd": "marked iscrowd", "keep": "kept", "drop": "left out"}[difficult]
    texts = {
        "difficult": f"objects are marked difficult: {treated} (--difficult)",
        "swapped": "boxes had their corners exchanged (xmin above xmax or ymin above ymax)",
        "outline": "objects are polygons or rotated: the box around each is taken",
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
