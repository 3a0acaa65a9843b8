"""Split a COCO-format file into two, by image: train.json and val.json.

    ghm-d2 split-data data/all.json --val-fraction 0.25 --seed 1 --output data/split

The same file, fraction and seed give the same split everywhere; nothing is overwritten.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ghm_d2.data.annotations import Uses
from ghm_d2.data.coco import check_content
from ghm_d2.data.dataset_folders import is_foreign
from ghm_d2.data.datasets import log_repairs, refuse
from ghm_d2.data.split import describe, split_coco, write_coco
from ghm_d2.data.tables import read_annotations
from ghm_d2.engine.arguments import Parser, add_output_option
from ghm_d2.errors import UserError, command, exits_with_one_sentence


def main(argv: Sequence[str] | None = None) -> None:
    """Split; print what each part holds."""
    parser = Parser(
        prog="ghm-d2 split-data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("annotations", type=Path, metavar="ANNOTATIONS.json", help="the file to split")
    add(
        "--val-fraction",
        "--fraction",
        type=float,
        default=0.25,
        metavar="F",
        help="share of the images in val.json (0.25)",
    )
    add(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="a different seed gives a different split (1)",
    )
    add_output_option(parser, "folder for both files; created if missing")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with exits_with_one_sentence(parser.prog):
        args = parser.parse_args(argv)
        file = str(args.annotations)
        if is_foreign(args.annotations):
            raise UserError(
                f"{file} is not an annotation file in COCO format: split labels of other tools by "
                f"{command('import-data')} {file} --val-fraction {args.val_fraction:g} --output "
                f"{args.output}."
            )
        # What training would refuse is worth knowing before there are two such files.
        data = check_content(read_annotations(file), uses=Uses(keypoints=False))
        refuse(file, data.found)
        log_repairs(file, data.found)
        rest, chosen = split_coco(data.content, args.val_fraction, args.seed)
        parts = {args.output / "train.json": rest, args.output / "val.json": chosen}
        write_coco(parts)
    for file, content in parts.items():
        print(describe(str(file), content))
