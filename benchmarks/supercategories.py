"""Give every box of a COCO-format file its class's supercategory as class.

    python benchmarks/supercategories.py instances_train2017.json grouped_train.json

A few hundred images hold some 30 boxes of a COCO class, too few for a short training to detect
anything; its 12 supercategories have some 200 each, and are as unequal.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ghm_d2.data.split import describe, read_coco, write_coco
from ghm_d2.errors import UserError, exits_with_one_sentence


def group_by_supercategory(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same images and boxes with supercategories as classes.

    Args:
        content: what a COCO-format file holds.

    Returns:
        A copy with the supercategories, in the order of their first class, as classes 1, 2, ...

    Raises:
        UserError: a class has no supercategory.
    """
    ids: dict[str, int] = {}
    classes = {}
    for category in content["categories"]:
        name = category.get("supercategory")
        if not name:
            raise UserError(
                f"class {category['name']!r} has no supercategory: give it one in the file's "
                f'"categories".'
            )
        classes[category["id"]] = ids.setdefault(name, len(ids) + 1)
    boxes = content["annotations"]
    return {
        **content,
        "categories": [{"id": i, "name": name} for name, i in ids.items()],
        "annotations": [{**box, "category_id": classes[box["category_id"]]} for box in boxes],
    }


def main() -> None:
    """Read, group, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", type=Path, help="COCO-format file to read")
    parser.add_argument("grouped", type=Path, help="file to write; must not exist")
    args = parser.parse_args()
    with exits_with_one_sentence(parser.prog):
        grouped = group_by_supercategory(read_coco(args.annotations))
        write_coco({args.grouped: grouped})
    print(describe(str(args.grouped), grouped))


if __name__ == "__main__":
    main()
