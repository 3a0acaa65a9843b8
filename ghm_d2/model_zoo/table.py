"""MODEL_ZOO.md, made from the index."""

from pathlib import Path
from typing import Any

from ghm_d2.errors import UserError
from ghm_d2.files import write_json, write_text
from ghm_d2.markdown import markdown_table

from . import zoo as packaged
from .zoo import read_index, weights_file

_PAGE = """\
# Model zoo

<!-- Made by `ghm-d2 export-zoo --page MODEL_ZOO.md` from its index: do not edit. -->

## Trained with this code

{ours}

```
python train_net.py --config-file quickstart/ghm_retinanet_quickstart.yaml OUTPUT_DIR output
ghm-d2 export-zoo --run output --zoo zoo
```

writes a training as `<config>/<id>/model_final_<first 6 of md5>.pkl`, with the config it was
trained with, one for stock Detectron2 (no GHM in it), and its metrics. With `GHM_D2_ZOO` set to
such a folder, or to the http(s) address it is served from:

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


_NONE = """\
No weights are published with this package. Those of a config are made by its training and put into
a zoo of your own; the one of `make quickstart`, some minutes on a CPU:"""
_SOME = """\
{table}

Train time, memory and AP are the training's own records: the first is the median over the training;
inference is the network with its post-processing, one image at a time; memory is what PyTorch held
on the first GPU (not recorded on a CPU). AP is box AP in percent on the named data. How such a
model is made:"""


def model_zoo_page(index: dict[str, Any]) -> str:
    """The text of MODEL_ZOO.md.

    Args:
        index: with "models" and "published".
    """
    models, published = index["models"], index["published"]
    return _PAGE.format(
        ours=_SOME.format(table=_table(map(_our_row, models))) if models else _NONE,
        example=f"{models[0]['name'] if models else 'quickstart/ghm_retinanet_quickstart'}.yaml",
        publishers=", ".join(sorted({model["publisher"] for model in published})),
        published=_table(map(_published_row, published)),
    )


def write_page(file: Path, zoo: Path | None = None) -> tuple[int, int]:
    """Writes MODEL_ZOO.md, and the package's index where models are added to it.

    Args:
        file: the page.
        zoo: a folder whose models are added to the index first.

    Returns:
        How many models the index has, and how many of them were added.

    Raises:
        UserError: an index is damaged, or a file cannot be written.
    """
    index = read_index(packaged.PACKAGED_INDEX)
    added = 0
    if zoo is not None:
        added = add_models(index, read_index(zoo / "index.json")["models"])
        write_json(packaged.PACKAGED_INDEX, index, indent=2)
    write_text(file, model_zoo_page(index))
    return len(index["models"]), added


def add_models(index: dict[str, Any], models: list[dict[str, Any]]) -> int:
    """Adds the models of another index that are not there yet, in place.

    Returns:
        How many were added.

    Raises:
        UserError: the index has another model of the same name and id.
    """
    known = {(entry["name"], entry["id"]): entry for entry in index["models"]}
    for entry in models:
        name, number = entry["name"], entry["id"]
        if known.get((name, number), entry) != entry:
            raise UserError(
                f"the index has another model {name}/{number}: export this one with another id."
            )
    added = [entry for entry in models if (entry["name"], entry["id"]) not in known]
    index["models"] += added
    return len(added)


def _our_row(entry: dict[str, Any]) -> dict[str, str]:
    versions = entry["versions"] or {}
    # The columns of Detectron2's model zoo, then facts that it gives only in its text.
    folder = weights_file(entry).rpartition("/")[0]
    memory = entry["memory_mib"]
    return {
        "Name": f"`{entry['name']}`",
        "lr sched (iterations x images)": f"{entry['iterations']} x {entry['images_per_batch']}",
        "train time (s/iter)": _number(entry["seconds_per_iteration"], ".3f"),
        "inference time (s/im)": _number(entry["seconds_per_image"], ".3f"),
        "train mem (GB)": _number(memory and memory / 1024, ".1f"),
        "box AP": _ap(entry["box_ap"]),
        "model id": str(entry["id"]),
        "download": f"`{weights_file(entry)}`, `{folder}/metrics.json` (md5 `{entry['md5']}`)",
        "trained on": ", ".join(entry["train_data"]),
        "hardware": entry["hardware"] or "-",
        "PyTorch": versions.get("torch", "-"),
        "commit": (entry["commit"] or "-")[:8],
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


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _table(rows: Any) -> str:
    rows = list(rows)
    return markdown_table(list(rows[0]), (list(row.values()) for row in rows))
