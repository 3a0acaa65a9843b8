"""List everything that is wrong with a data set, after opening every image."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ghm_d2.data.annotations import Uses
from ghm_d2.data.checks import KINDS, Findings, Problem
from ghm_d2.data.coco import CocoData, check_content
from ghm_d2.data.dataset_folders import is_foreign, resolve
from ghm_d2.data.dataset_option import CocoDataset
from ghm_d2.data.datasets import read_content
from ghm_d2.data.overlap import copies
from ghm_d2.engine.arguments import Parser
from ghm_d2.errors import UserError, exits_with_one_sentence, shown

_HEADINGS = {
    "stops": "Training refuses:",
    "repaired": "Training repairs, counting them in its log:",
    "doubtful": "Training takes as they are, with a warning:",
    "note": "Worth knowing:",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print every kind of problem; exit code 0 without any, 1 with some, 2 for misuse."""
    parser = Parser(prog="ghm-d2 check-data", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("annotations", help="the annotation file, or a folder or file with labels of any tool")
    add("images", nargs="?", help="the folder of the images")
    add("--unlabelled", action="store_true", help="expect no annotations, as in a test set")
    add("--examples", type=int, default=5, metavar="N", help="examples of each kind (5)")
    add("--headers-only", action="store_true", help="do not decode the images")
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stdout)
    with exits_with_one_sentence(parser.prog):
        args = parser.parse_args(argv)
        if args.examples < 1:
            raise UserError(f"--examples must be at least 1, got {args.examples}.")
        if args.images and not os.path.isdir(args.images):
            raise UserError(f"the image folder {args.images} does not exist.")
        if not args.images and not is_foreign(Path(args.annotations)):
            raise UserError(f"give the folder of the images after {args.annotations}.")
        own = args.annotations if os.path.isdir(args.annotations) else None
        root = args.images or own or os.path.dirname(args.annotations) or "."
        name = os.path.basename(args.annotations)
        datasets = resolve([CocoDataset(name, args.annotations, root)])
        found = [_check(dataset, args) for dataset in datasets]
    sys.exit(1 if any(found) else 0)


def _check(dataset: CocoDataset, args: argparse.Namespace) -> bool:
    """Prints what is wrong with one data set; returns whether there is anything."""
    content = read_content(dataset)
    sizes = [
        f"{len(rows) if isinstance(rows := content.get(table), list) else 0} {table}"
        for table in ("images", "annotations", "categories")
    ]
    data = check_content(
        content,
        labelled=not args.unlabelled,
        root=dataset.image_root,
        decode=not args.headers_only,
        uses=Uses(keypoints=False),
        name=dataset.name,
        examples=args.examples,
    )
    if not args.headers_only:
        _find_copies(data)
    split = f" ({dataset.split})" if dataset.split else ""
    print(f"{dataset.json_file}{split}: {', '.join(sizes)}")
    _print(data.found)
    if not data.complete:
        print("Boxes and images were not checked: correct the entries above first.")
    return any(map(data.found.kinds, ("stops", "repaired", "doubtful")))


def _find_copies(data: CocoData) -> None:
    for group in copies(data.files):
        first, *others = (shown(data.files[place].path) for place in group)
        for other in others:
            data.found.add(Problem("image copy", f"{other} and {first}"))


def _print(found: Findings) -> None:
    for severity, heading in _HEADINGS.items():
        kinds = found.kinds(severity)
        if kinds:
            print(heading)
        for kind in kinds:
            way_out = f": {KINDS[kind][2]}" if severity == "stops" else ""
            print(f"  {found.counts[kind]} {KINDS[kind][1]}{way_out}")
            for example in found.examples[kind]:
                print(f"      {example}")
            if (more := found.counts[kind] - len(found.examples[kind])) > 0:
                print(f"      and {more} more")
    if not any(map(found.kinds, ("stops", "repaired", "doubtful"))):
        print("No problem found.")
