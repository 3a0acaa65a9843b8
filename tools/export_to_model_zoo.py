"""Put a finished training into a model zoo.

    python tools/export_to_model_zoo.py --run output --zoo zoo

Writes ZOO/<config name>/<id>/: the weights, metrics.json, the full config and one for stock
Detectron2; and adds an entry to ZOO/index.json. With GHM_D2_ZOO=ZOO, `ghm_d2.model_zoo.get` finds
it. Nothing is ever overwritten.
"""

import argparse
import logging

from ghm_d2.errors import exits_with_one_sentence
from ghm_d2.model_zoo.export import export_run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="OUTPUT_DIR of the training")
    parser.add_argument("--zoo", required=True, metavar="DIR", help="the zoo, created if need be")
    parser.add_argument("--id", type=int, metavar="N", help="of the model (largest of the zoo + 1)")
    parser.add_argument("--name", help="of the model (its config file, relative to configs/)")
    args = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with exits_with_one_sentence(parser.prog):
        folder = export_run(args.run, args.zoo, args.id, args.name)
    for file in sorted(folder.iterdir()):
        print(file)


if __name__ == "__main__":
    main()
