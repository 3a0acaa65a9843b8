"""MODEL_ZOO.md, made from the index."""

from pathlib import Path
from typing import Any

from ghm_d2.errors import UserError
from ghm_d2.files import write_text
from ghm_d2.markdown import markdown_table
from ghm_d2.model_zoo import index as packaged
from ghm_d2.model_zoo.index import read_index, weights_file, write_index

__all__ = ["add_models", "model_zoo_page", "write_page"]

_PAGE = """\
# Model zoo

<!-- Made by `ghm-d2 export-zoo --page MODEL_ZOO.md` from its index: do not edit. -->

## Trained with this code

{ours}

Times, memory and AP are the training's own records: s/iter is the median over the training; s/image
is the network with its post-processing, one image at a time; memory is what PyTorch held on the
first GPU (not recorded on a CPU). AP is box AP in percent on the named data.

`ghm-d2 export-zoo --run OUTPUT_DIR --zoo FOLDER` writes each model as
`<config>/<id>/model_final_<first 6 of md5>.pkl`, with the config it was trained with, one for stock
Detectron2 (no GHM in it), and its metrics. With `GHM_D2_ZOO` set to such a folder, or to the
http(s) address it is served from:

```python
from ghm_d2 import model_zoo

model = model_zoo.get("{example}", trained=True)
```

Every file is checked against its recorded SHA-256 before it is opened.

## Published by others (COCO)

Trained and evaluated by the authors of {publishers}, not with this code; the figures are theirs.
Download a checkpoint and convert it:

```
ghm-d2 convert-mmdet CHECKPOINT OUTPUT
```

{published}
"""


def model_zoo_page(index: dict[str, Any]) -> str:
    """The text of MODEL_ZOO.md.

    Args:
        index: with "models" and "published".
    """
    models, published = index["models"], index["published"]
    return _PAGE.format(
        ours=_table(map(_our_row, models)) if models else "None yet.",
        example=f"{models[0]['name'] if models else 'NAME'}.yaml",
        publishers=", ".join(sorted({model["publisher"] for model in published})),
        published=_table(map(_published_row, published)),
    )


def write_page(file: Path, zoo: Path | None = None) -> tuple[int, int]:
    """Write MODEL_ZOO.md, and the package's index where models are added to it.

    Args:
        file: the page.
        zoo: a folder whose models are taken over first.

    Returns:
        How many models the index has, and how many of them are new.

    Raises:
        UserError: an index is damaged, or a file cannot be written.
    """
    index = read_index(packaged.PACKAGED_INDEX)
    added = 0
    if zoo is not None:
        added = add_models(index, read_index(zoo / "index.json")["models"])
        write_index(packaged.PACKAGED_INDEX, index)
    write_text(file, model_zoo_page(index))
    return len(index["models"]), added


def add_models(index: dict[str, Any], models: list[dict[str, Any]]) -> int:
    """Add models of another index, in place; those that are there already count for nothing.

    Returns:
        How many were added.

    Raises:
        UserError: one is there under the same name and id, but is another.
    """
    known = {weights_file(entry).rpartition("/")[0]: entry for entry in index["models"]}
    added = 0
    for entry in models:
        place = weights_file(entry).rpartition("/")[0]
        if place not in known:
            index["models"].append(entry)
            added += 1
        elif known[place] != entry:
            raise UserError(
                f"the index has another model {place}: export this one with another id."
            )
    return added


def _our_row(entry: dict[str, Any]) -> dict[str, str]:
    versions = entry["versions"] or {}
    return {
        "config": f"`{entry['name']}`",
        "id": str(entry["id"]),
        "trained on": ", ".join(entry["train_data"]),
        "iterations x images": f"{entry['iterations']} x {entry['images_per_batch']}",
        "s/iter": _number(entry["seconds_per_iteration"], ".3f"),
        "s/image": _number(entry["seconds_per_image"], ".3f"),
        "memory": _number(entry["memory_mib"], ".0f", " MiB"),
        "box AP": _ap(entry["box_ap"]),
        "hardware": entry["hardware"] or "-",
        "PyTorch": versions.get("torch", "-"),
        "commit": (entry["commit"] or "-")[:8],
        "md5": f"`{entry['md5']}`",
    }


def _published_row(entry: dict[str, Any]) -> dict[str, str]:
    return {
        "config for evaluation": f"`{entry['name']}`",
        "trained on": entry["data"],
        "epochs": str(entry["epochs"]),
        "box AP as published": _ap(entry["box_ap"]),
        "published by": entry["publisher"],
        "checkpoint": f"[download]({entry['url']})",
    }


def _ap(box_ap: dict[str, float | None]) -> str:
    return ", ".join(f"{_number(ap, '.1f')} ({name})" for name, ap in box_ap.items())


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _table(rows: Any) -> str:
    rows = list(rows)
    return markdown_table(list(rows[0]), (list(row.values()) for row in rows))
