"""Put a finished training into a model zoo, or write this project's page of models."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ghm_d2.engine.arguments import Parser
from ghm_d2.errors import UserError, exits_with_one_sentence, shown
from ghm_d2.model_zoo.export import export_run
from ghm_d2.model_zoo.table import write_page

_PROGRAM = "ghm-d2 export-zoo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="DIR", help="OUTPUT_DIR of the training")
    what.add_argument(
        "--page",
        type=Path,
        metavar="MODEL_ZOO.md",
        help="for maintainers: take the models of ZOO over into the package's index, and write "
        "the page of all",
    )
    add = parser.add_argument
    add("--zoo", type=Path, metavar="ZOO", help="the folder of the zoo; a training creates it")
    add("--id", type=int, metavar="N", help="of the model (largest of the zoo + 1)")
    add("--name", help="of the model (its config file, relative to configs/)")


def run(args: argparse.Namespace) -> None:
    """Export the training, or write the page.

    Raises:
        UserError: one sentence with the way out.
    """
    if args.page:
        models, added = write_page(args.page, args.zoo)
        print(f"{shown(args.page)}: {models} models of our own, {added} of them new")
        return
    if args.zoo is None:
        raise UserError("--run needs --zoo, the folder that the model goes to.")
    for file in sorted(export_run(args.run, args.zoo, args.id, args.name).iterdir()):
        print(shown(file))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr.
    """
    parser = Parser(
        prog=_PROGRAM,
        description=f"{__doc__} Of a training, ZOO/<config name>/<id>/ gets the weights, "
        "metrics.json, the full config, and one for stock Detectron2 where it can run the model; "
        "with GHM_D2_ZOO=ZOO, ghm_d2.model_zoo.get finds it. Nothing is ever overwritten.",
    )
    add_arguments(parser)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with exits_with_one_sentence(_PROGRAM):
        run(parser.parse_args(argv))
