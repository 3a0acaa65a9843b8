"""Find annotations that a trained detector contradicts."""

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from detectron2.utils.logger import setup_logger

from ghm_d2.audit.copies import dropped, marked, mended
from ghm_d2.audit.detector import cross_fit, detect
from ghm_d2.audit.pictures import draw_suspects
from ghm_d2.audit.predictions import read_predictions
from ghm_d2.audit.suspects import choose, judge
from ghm_d2.data import check_coco_dataset, parse_dataset
from ghm_d2.data.coco import CocoData
from ghm_d2.data.corrupt import KINDS
from ghm_d2.data.datasets import load_checked
from ghm_d2.data.split import write_coco
from ghm_d2.engine.arguments import (
    CONFIG_FILE_HELP,
    Parser,
    add_dataset_option,
    make_output_folder,
    parse_arguments,
)
from ghm_d2.engine.setup import load_config
from ghm_d2.errors import UserError, exits_with_one_sentence

logger = logging.getLogger(__name__)

_PROGRAM = "ghm-d2 audit"
_FLAGS = ("-h", "--help", "--overwrite")
_PICTURE = "suspects.png"


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        usage="%(prog)s --dataset NAME=annotations.json,image_dir --output DIR "
        "(--config-file FILE [--folds K] | --predictions FILE ...) [options] [KEY VALUE ...]",
        description="Find annotations with a wrong class or place, annotations without an object, "
        "and objects without an annotation. They are compared with what a trained detector finds "
        "(--config-file with MODEL.WEIGHTS) or, better, with what detectors find that were trained "
        "on the other images (--folds), or with existing detections (--predictions). Writes a "
        "sheet of pictures, the list of the suspects, and copies of the annotation file with the "
        "suspects marked, dropped and mended.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_dataset_option(parser, "the COCO-format data to judge; one data set")
    add(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="for all results; created if missing",
    )
    add("--config-file", metavar="FILE", help=CONFIG_FILE_HELP)
    add(
        "--folds",
        type=int,
        metavar="K",
        help="train K detectors, each on the images of the other folds; after an interruption, the "
        "same command continues",
    )
    add("--seed", type=int, default=1, metavar="N", help="seed of the folds (1)")
    add("--predictions", nargs="+", metavar="FILE", help="detections in COCO's results format")
    add(
        "--number",
        type=int,
        metavar="N",
        help="take the N most suspicious of each kind; by default, those about which the detector "
        "is as confident as it usually is",
    )
    add("--pictures", type=int, default=8, metavar="N", help="number of pictures of each kind (8)")
    add("--overwrite", action="store_true", help="replace the results of an earlier audit")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Judge, draw, write, print the counts.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr; that of
            a training that was stopped or failed.
    """
    with exits_with_one_sentence(_PROGRAM):
        args = parse_arguments(argv, _parser(), flags=_FLAGS, lists=("--predictions",))
        _check(args)
        setup_logger(name="ghm_d2")
        names = ("suspects", "marked", "dropped", "mended")
        files = {name: args.output / f"{name}.json" for name in names}
        if args.overwrite:
            for file in (*files.values(), args.output / _PICTURE):
                file.unlink(missing_ok=True)
        for file in files.values():
            if file.exists():
                raise UserError(
                    f"{file} exists already: name another --output, or replace it with --overwrite."
                )
        dataset = check_coco_dataset(parse_dataset(args.dataset[0]))
        data = load_checked(dataset)
        if not data.keep_written_ids():
            logger.warning(
                "annotation ids are missing, repeated or not numbers: all are numbered anew"
            )
        found = _detections(args, data, dataset.image_root)
        detections = read_predictions(found, data.content, complete=not args.predictions)
        suspects = choose(judge(data.content, detections), args.number)
        make_output_folder(args.output)
        unreadable = draw_suspects(
            suspects, data.content, data.paths, args.output / _PICTURE, args.pictures
        )
        for sentence in unreadable:
            logger.warning("%s It is not drawn.", sentence)
        copies = [way(data.content, suspects) for way in (marked, dropped, mended)]
        write_coco(dict(zip(files.values(), [_listed(suspects, data), *copies], strict=True)))
    counts = Counter(suspect.kind for suspect in suspects)
    rows = (r for r in data.content["annotations"] if r["image_id"] in detections)
    objects = sum(not row["iscrowd"] for row in rows)
    print(f"{len(detections)} images with {objects} objects; suspects:")
    for kind in KINDS:
        print(f"  {kind}: {counts[kind]}")
    for file in (args.output / _PICTURE, *files.values()):
        if file.exists():
            print(f"  {file}")


def _check(args: argparse.Namespace) -> None:
    if len(args.dataset) != 1:
        raise UserError(f"give exactly one --dataset to judge, got {len(args.dataset)}.")
    if bool(args.config_file) == bool(args.predictions):
        raise UserError("give either --config-file or --predictions.")
    if args.predictions and (args.folds is not None or args.opts):
        raise UserError("--folds and KEY VALUE pairs need --config-file in place of --predictions.")
    for name in ("number", "pictures"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise UserError(f"--{name} must not be negative, got {value}.")


def _detections(args: argparse.Namespace, data: CocoData, image_dir: str) -> list:
    if args.predictions:
        return args.predictions
    load_config(args.config_file, args.opts)  # a mistake in it ends the command before any file
    where = (data.content, image_dir)
    if args.folds is None:
        return [detect(*where, args.output / "detector", args.config_file, args.opts)]
    return cross_fit(
        *where,
        args.output,
        args.config_file,
        args.opts,
        folds=args.folds,
        seed=args.seed,
        fingerprint=data.fingerprint,
    )


def _listed(suspects: Sequence, data: CocoData) -> list:
    names = {row["id"]: row["file_name"] for row in data.content["images"]}
    return [{"file_name": names[s.image_id], **s.as_row()} for s in suspects]
