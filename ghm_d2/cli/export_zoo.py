"""Put a finished training into a model zoo, or write this project's page of models."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ghm_d2.engine.arguments import Parser
from ghm_d2.errors import UserError, exits_with_one_sentence, shown
from ghm_d2.model_zoo.export import export_run
from ghm_d2.model_zoo.table import write_page


def main(argv: Sequence[str] | None = None) -> None:
    """Export the training, or write the page.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr.
    """
    parser = Parser(
        prog="ghm-d2 export-zoo",
        description=f"{__doc__} The weights of a training, its metrics.json, its full config, "
        "and one for stock Detectron2 if that can run the model go to ZOO/<config name>/<id>/; "
        "with GHM_D2_ZOO=ZOO, ghm_d2.model_zoo.get finds them. Nothing is ever overwritten.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="DIR", help="OUTPUT_DIR of the training")
    what.add_argument(
        "--page",
        type=Path,
        metavar="MODEL_ZOO.md",
        help="for maintainers: add the models of ZOO to the package's index, and write the page of "
        "all models",
    )
    add = parser.add_argument
    add("--zoo", type=Path, metavar="ZOO", help="folder of the zoo; created with the first --run")
    add("--id", type=int, metavar="N", help="id of the model (largest of the zoo + 1)")
    add("--name", help="name of the model (its config file, relative to configs/)")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with exits_with_one_sentence(parser.prog):
        args = parser.parse_args(argv)
        if args.page:
            models, added = write_page(args.page, args.zoo)
            print(f"{shown(args.page)}: {models} models of our own, {added} of them new")
            return
        if args.zoo is None:
            raise UserError("--run needs --zoo, the folder that the model goes to.")
        for file in sorted(export_run(args.run, args.zoo, args.id, args.name).iterdir()):
            print(shown(file))
