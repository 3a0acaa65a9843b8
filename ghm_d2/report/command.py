"""What tools/report.py does."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ghm_d2.data import parse_dataset
from ghm_d2.errors import UserError, exits_with_one_sentence
from ghm_d2.report.page import write_report

__all__ = ["main"]

_PROGRAM = "report.py"


def main(argv: Sequence[str] | None = None) -> None:
    """Run tools/report.py.

    Args:
        argv: the arguments without the program's name.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr.
    """
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Write one HTML page about a training: settings, loss and AP curves, gradient "
        "histograms, AP by class and IoU threshold, best and worst images. The page needs no "
        "network and no other file.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="DIR", help="OUTPUT_DIR of the training, finished or not")
    add("--output", type=Path, metavar="FILE.html", help="the page (DIR/report.html)")
    add(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME=annotations.json,image_dir",
        help="where test data lies, if not where the training found it (repeatable)",
    )
    add("--images", type=int, default=6, metavar="N", help="best and worst images, each (6)")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stdout)
    with exits_with_one_sentence(_PROGRAM):
        if args.images < 0:
            raise UserError(f"--images must not be negative, got {args.images}.")
        given = [parse_dataset(text) for text in args.dataset]
        datasets = {d.name: (Path(d.json_file), Path(d.image_root)) for d in given}
        output = args.output or args.run / "report.html"
        missing = write_report(args.run, output, datasets, args.images)
    for sentence in missing:
        print(f"not on the page: {sentence}")
    print(output)
