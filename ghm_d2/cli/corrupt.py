"""Write a COCO-format file with errors in it, to measure what they do and how well they are found.

    ghm-d2 corrupt data/train.json --output data/noisy.json --wrong-class 0.1 --missing 0.05

Shares are of the number of objects. Each object gets one error at most; spurious boxes come on top.
The same file, shares and seed give the same errors everywhere. noisy.changes.json beside noisy.json
lists what was changed; nothing is overwritten.
"""

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ghm_d2.data.coco import check_content
from ghm_d2.data.corrupt import KINDS, corrupt_coco
from ghm_d2.data.dataset_folders import is_foreign
from ghm_d2.data.datasets import log_repairs, refuse
from ghm_d2.data.split import describe, write_coco
from ghm_d2.data.tables import read_annotations
from ghm_d2.engine.arguments import Parser
from ghm_d2.errors import UserError, command, exits_with_one_sentence

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Corrupt; print how much of what."""
    parser = Parser(
        prog="ghm-d2 corrupt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("annotations", type=Path, metavar="ANNOTATIONS.json", help="the file to copy")
    add("--output", type=Path, required=True, metavar="FILE", help="the copy with errors")
    about = {
        "wrong class": "objects that get another class",
        "missing": "objects that are left out",
        "moved": "boxes that are shifted and stretched",
        "spurious": "boxes around nothing, as a share of the number of objects",
    }
    for kind in KINDS:
        name = f"--{kind.replace(' ', '-')}"
        add(name, type=float, metavar="SHARE", help=f"{about[kind]}, in [0, 1]")
    add(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="a different seed gives different errors (1)",
    )
    add("--image-dir", metavar="DIR", help="folder of the images, where the file lacks their sizes")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with exits_with_one_sentence(parser.prog):
        args = parser.parse_args(argv)
        file, given = str(args.annotations), vars(args)
        shares = {kind: given[kind.replace(" ", "_")] for kind in KINDS}
        shares = {kind: share for kind, share in shares.items() if share is not None}
        if not shares:
            options = ", ".join(f"--{kind.replace(' ', '-')}" for kind in KINDS)
            raise UserError(f"nothing to do: give one or more of {options}.")
        if is_foreign(args.annotations):
            raise UserError(
                f"{file} is not an annotation file in COCO format: convert it with "
                f"{command('import-data')} {file}."
            )
        content = read_annotations(file)
        rows = content.get("annotations")  # even those left out: their ids are taken
        data = check_content(content, root=args.image_dir)
        refuse(file, data.found)
        log_repairs(file, data.found)
        if not data.keep_written_ids():
            logger.warning(
                "%s: annotation ids are missing, repeated or not whole numbers: all are numbered "
                "from 1 in the copy and in the list",
                file,
            )
        taken = max((row["id"] for row in rows if type(row.get("id")) is int), default=0)
        noisy, changes = corrupt_coco(data.content, shares, args.seed, first_id=taken + 1)
        listed = args.output.with_name(f"{args.output.stem}.changes.json")
        write_coco({args.output: noisy, listed: changes})
    print(describe(str(args.output), noisy))
    counts = Counter(change["kind"] for change in changes)
    objects = sum(not row["iscrowd"] for row in data.content["annotations"])
    for kind in shares:
        print(f"  {kind}: {counts[kind]} of {objects} objects ({counts[kind] / objects:.2%})")
    if moved := [change["iou"] for change in changes if change["kind"] == "moved"]:
        print(f"  IoU of moved boxes with the true ones: {min(moved):.2f} to {max(moved):.2f}")
    print(f"{listed}: what was changed")
