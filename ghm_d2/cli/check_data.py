"""Lists everything that is wrong with a data set in COCO format; opens every image."""

import os
import sys
from collections.abc import Sequence

from ghm_d2.data.checks import KINDS, Findings, annotation_problems, row_problems
from ghm_d2.data.image_checks import image_problems
from ghm_d2.data.registration import read_annotations
from ghm_d2.engine.arguments import Parser
from ghm_d2.errors import UserError, exits_with_one_sentence

__all__ = ["main"]

_HEADINGS = {
    "stops": "Training refuses:",
    "repaired": "Training repairs, counting them in its log:",
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
        labelled = not args.unlabelled or "annotations" in content
        found = Findings(args.examples).add(row_problems(content, labelled=labelled))
        complete = not found.counts  # what lacks an id or a field cannot be looked at further
        if complete:
            found.add(annotation_problems(content))
            found.add(
                image_problems(
                    content["images"],
                    args.images,
                    decode=not args.headers_only,
                    name=os.path.basename(args.annotations),
                )
            )
    _print(args.annotations, content, found)
    if not complete:
        print("Boxes and images were not looked at: mend the entries above first.")
    sys.exit(1 if found.kinds("stops") or found.kinds("repaired") else 0)


def _print(file: str, content: dict, found: Findings) -> None:
    sizes = [
        f"{len(content[table]) if isinstance(content.get(table), list) else 0} {table}"
        for table in ("images", "annotations", "categories")
    ]
    print(f"{file}: {', '.join(sizes)}")
    for severity, heading in _HEADINGS.items():
        kinds = found.kinds(severity)
        if kinds:
            print(heading)
        for kind in kinds:
            print(f"  {found.counts[kind]} {KINDS[kind][1]}")
            for example in found.examples[kind]:
                print(f"      {example}")
            if (more := found.counts[kind] - len(found.examples[kind])) > 0:
                print(f"      and {more} more")
    if not (found.kinds("stops") or found.kinds("repaired")):
        print("No problem found.")
