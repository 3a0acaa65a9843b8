"""Convert labels of other tools to COCO-format JSON, split into training and validation data."""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ghm_d2.data.label_folders import COCO, find_folder
from ghm_d2.data.label_sets import SPLITS, LabelSet, log_notes, read_labels
from ghm_d2.data.labels import DIFFICULT, LabelledImage, to_coco
from ghm_d2.data.split import describe, write_coco
from ghm_d2.engine.arguments import Parser, add_output_option
from ghm_d2.errors import UserError, command, exits_with_one_sentence

_PROGRAM = "ghm-d2 import-data"


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description="Turn labels of YOLO (Ultralytics, darknet, labelImg), Pascal VOC, labelme, "
        "VIA, CVAT or Label Studio into COCO-format JSON for --dataset. FOLDER holds them as the "
        "tool wrote them, with the images in it or in folders below; the tool is recognised from "
        "the files.",
        epilog="In VOC, pixels count from 1 and xmax, ymax are inside the box, as in Detectron2's "
        "loader. labelImg and some other tools write corners from 0: with --zero-based their boxes "
        "are exact, without it left and upper sides are a pixel off.",
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="one folder, several of one kind together, or a file that holds all labels",
    )
    add_output_option(parser, "for SPLIT.json; created if missing")
    add(
        "--image-dir",
        "--images",
        type=Path,
        metavar="DIR",
        help="where the images are, if not in FOLDER",
    )
    add(
        "--split",
        nargs="+",
        metavar="NAME",
        help="splits to convert, by their names in ImageSets/Main, folders, data.yaml or the "
        "labels (those of train, val and test that exist)",
    )
    add(
        "--val-fraction",
        type=float,
        metavar="F",
        help="split at random into train and val instead (0.2 where there are no splits)",
    )
    add("--seed", type=int, default=1, metavar="N", help="seed of the random split (1)")
    add(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="classes, in this order (those that are declared, or else all that occur, sorted)",
    )
    add(
        "--difficult",
        choices=DIFFICULT,
        default="crowd",
        help="treat objects marked difficult as crowd (iscrowd 1: training leaves them out and "
        "evaluation ignores them, as VOC's does), keep them like the others, or drop them (crowd)",
    )
    add(
        "--zero-based",
        action="store_true",
        help="VOC's corners count from 0; xmax, ymax lie outside",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Convert; print the --dataset options that training takes.

    Args:
        argv: the arguments without the program's name.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stdout)
    logging.getLogger("ghm_d2").setLevel(logging.INFO)
    with exits_with_one_sentence(_PROGRAM):
        args = _parser().parse_args(argv)
        if args.split and args.val_fraction is not None:
            raise UserError("--split and --val-fraction exclude each other.")
        folders = [find_folder(path, args.image_dir) for path in args.folders]
        for path, folder in zip(args.folders, folders, strict=True):
            if folder.kind == COCO:
                raise UserError(
                    f"{path} is in COCO format already: give --dataset NAME={path} to "
                    f"{command('train')}, or split a file of it with {command('split-data')}."
                )
        labels = read_labels(folders)
        classes = args.classes or labels.classes
        splits = _splits(labels, args)
        if len(set(classes)) < len(classes):
            raise UserError(f"--classes names a class twice: {' '.join(classes)}.")
        contents, notes = {}, Counter()
        for name, members in splits.items():
            contents[args.output / f"{name}.json"], noted = to_coco(
                members,
                classes,
                labels.root,
                difficult=args.difficult,
                zero_based=args.zero_based,
            )
            notes += noted
        if not any(content["annotations"] for content in contents.values()):
            raise UserError(f"no object of the classes {', '.join(classes)} was found.")
        write_coco(contents)
    log_notes(notes, args.difficult)
    for file, content in contents.items():
        print(describe(str(file), content))
    print(f"The images lie in {labels.root}; for {command('train')}:")
    print(" ".join(f"--dataset my_{file.stem}={file},{labels.root}" for file in contents))


def _splits(labels: LabelSet, args: argparse.Namespace) -> dict[str, list[LabelledImage]]:
    if args.split:
        return labels.named_splits(args.split)
    if args.val_fraction is None:
        if splits := labels.declared_splits():
            print(f"Split as the labels declare: {', '.join(splits)}.")
            return splits
        if listed := {name for folder in labels.folders for name in folder.lists}:
            raise UserError(
                f"ImageSets/Main has no list {', '.join(SPLITS[:-1])} or {SPLITS[-1]}: name some "
                "with --split, or split at random with --val-fraction 0.2 (it has "
                f"{', '.join(sorted(listed))})."
            )
    fraction = 0.2 if args.val_fraction is None else args.val_fraction
    splits = labels.random_splits(fraction, args.seed)
    print(f"Split at random: {fraction:.0%} for val, seed {args.seed}.")
    return splits
