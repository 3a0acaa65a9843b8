"""Write MODEL_ZOO.md from ghm_d2/model_zoo/index.json.

    python tools/make_model_zoo.py [--add ZOO ...]

`--add` first takes over the models of a zoo that tools/export_to_model_zoo.py has filled.
"""

import argparse
from pathlib import Path

from ghm_d2.errors import exits_with_one_sentence
from ghm_d2.model_zoo.index import PACKAGED_INDEX, read_index, write_index
from ghm_d2.model_zoo.table import add_models, model_zoo_page

PAGE = Path(__file__).resolve().parents[1] / "MODEL_ZOO.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", nargs="+", default=[], type=Path, metavar="ZOO", help="folders")
    args = parser.parse_args()
    with exits_with_one_sentence(parser.prog):
        index = read_index(PACKAGED_INDEX)
        added = sum(add_models(index, read_index(zoo / "index.json")["models"]) for zoo in args.add)
        write_index(PACKAGED_INDEX, index)
    PAGE.write_text(model_zoo_page(index))
    print(f"{PAGE}: {len(index['models'])} models of our own, {added} of them new")


if __name__ == "__main__":
    main()
