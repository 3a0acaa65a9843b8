"""Lists everything that is wrong with a data set in COCO format; opens every image."""

import os
import sys
from collections.abc import Sequence

from ghm_d2.data.annotations import Uses
from ghm_d2.data.checks import KINDS, Findings, Problem
from ghm_d2.data.coco import CocoData, check_content
from ghm_d2.data.overlap import copies
from ghm_d2.data.tables import read_annotations
from ghm_d2.engine.arguments import Parser
from ghm_d2.errors import UserError, exits_with_one_sentence, shown

__all__ = ["main"]

_HEADINGS = {
    "stops": "Training refuses:",
    "repaired": "Training repairs, counting them in its log:",
    "doubtful": "Training takes as they are, with a warning:",
    "note": "Worth knowing:",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print every kind of problem; exit code 0 without any, 1 with some, 2 for misuse."""
    parser = Parser(prog="ghm-d2 check-data", description=__doc__, allow_abbrev=False)
    parser.add_argument("annotations", help="the annotation file")
    parser.add_argument("images", help="the folder that its file names are relative to")
    parser.add_argument("--unlabelled", action="store_true", help="a test set without annotations")
    parser.add_argument("--examples", type=int, default=5, metavar="N", help="of each kind (5)")
    parser.add_argument("--headers-only", action="store_true", help="do not decode the images")
    with exits_with_one_sentence(parser.prog):
        args = parser.parse_args(argv)
        if args.examples < 1:
            raise UserError(f"--examples must be at least 1, got {args.examples}.")
        if not os.path.isdir(args.images):
            raise UserError(f"the image folder {args.images} does not exist.")
        content = read_annotations(args.annotations)
        sizes = [
            f"{len(rows) if isinstance(rows := content.get(table), list) else 0} {table}"
            for table in ("images", "annotations", "categories")
        ]
        data = check_content(
            content,
            labelled=not args.unlabelled,
            root=args.images,
            decode=not args.headers_only,
            uses=Uses(keypoints=False),
            name=os.path.basename(args.annotations),
            examples=args.examples,
        )
        if not args.headers_only:
            _find_copies(data)
    print(f"{args.annotations}: {', '.join(sizes)}")
    _print(data.found)
    if not data.complete:
        print("Boxes and images were not looked at: mend the entries above first.")
    sys.exit(1 if any(map(data.found.kinds, ("stops", "repaired", "doubtful"))) else 0)


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
