"""Write one HTML page about a training: settings, curves, gradient histograms, AP, images."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ghm_d2.data import parse_dataset
from ghm_d2.engine.arguments import Parser, add_dataset_option
from ghm_d2.errors import UserError, exits_with_one_sentence, shown
from ghm_d2.report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page and say what it lacks.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr.
    """
    parser = Parser(
        prog="ghm-d2 report",
        description=f"{__doc__} The page needs no network and no other file.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="DIR", help="OUTPUT_DIR of the training, finished or not")
    add("--output", type=Path, metavar="FILE.html", help="the page (DIR/report.html)")
    add_dataset_option(
        parser,
        "test data that has moved since the training (repeatable)",
    )
    add("--images", type=int, default=6, metavar="N", help="number of best and of worst images (6)")
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stdout)
    with exits_with_one_sentence(parser.prog):
        args = parser.parse_args(argv)
        if args.images < 0:
            raise UserError(f"--images must not be negative, got {args.images}.")
        given = [parse_dataset(text) for text in args.dataset]
        datasets = {d.name: (Path(d.json_file), Path(d.image_root)) for d in given}
        output = args.output or args.run / "report.html"
        for sentence in write_report(args.run, output, datasets, args.images):
            print(f"not on the page: {shown(sentence)}")
        print(shown(output))
