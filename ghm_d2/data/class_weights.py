"""Weights of classes, from names or from how often each occurs to a number for each class."""

from collections import Counter
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ghm_d2.errors import UserError, shown, similar_names

from .fields import number

BALANCED = "balanced"


def set_class_weights(cfg: CfgNode) -> None:
    """Replaces names in `CLASS_WEIGHT` by numbers, from the training data.

    The config that a run stores thus holds only numbers, which need no data to be understood.

    Raises:
        UserError: see :func:`class_weights`.
    """
    for part in ("RETINANET", "ROI_BOX_HEAD"):
        node = cfg.MODEL.GHM[part].CLS
        text = node.CLASS_WEIGHT.strip()
        if text != BALANCED and "=" not in text:
            continue
        known = [name for name in cfg.DATASETS.TRAIN if name in DatasetCatalog]
        counts: Counter = Counter()
        for name in known if text == BALANCED else ():
            for record in DatasetCatalog.get(name):
                rows = (a for a in record["annotations"] if not a.get("iscrowd"))
                counts.update(a["category_id"] for a in rows)
        names = MetadataCatalog.get(known[0]).get("thing_classes", ()) if known else ()
        key = f"MODEL.GHM.{part}.CLS.CLASS_WEIGHT"
        weights = class_weights(text, names, counts, key) if known else []
        # Without training data the weights stay empty: only training uses them.
        node.CLASS_WEIGHT = " ".join(f"{weight:g}" for weight in weights)


def class_weights(text: str, names: Sequence[str], counts: Counter, key: str) -> list[float]:
    """A factor for each class.

    Args:
        text: NAME=NUMBER with commas between them, where the other classes have 1; or "balanced":
            the mean number of objects of a class, divided by that of this class (1 where it has
            none).
        names: of the classes.
        counts: objects of each class, by its number.
        key: where the text stands, for messages.

    Raises:
        UserError: a part is no such pair, or names no class.
    """
    if text == BALANCED:
        mean = counts.total() / max(len(names), 1)
        return [round(mean / counts[k], 4) if counts[k] else 1.0 for k in range(len(names))]
    weights = dict.fromkeys(names, 1.0)
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        name, weight = name.strip(), number(value.strip())
        if not name or weight is None or weight < 0:
            raise UserError(
                f"{key} must be NAME=NUMBER with commas between them, a number for each class, or "
                f"{BALANCED!r}, got {shown(repr(part.strip()))}."
            )
        if name not in weights:
            raise UserError(
                f"{key}: {shown(name)} is not a class{similar_names(name, names)}; there are "
                f"{shown(', '.join(names))}."
            )
        weights[name] = float(weight)
    return list(weights.values())
