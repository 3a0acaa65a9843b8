"""The origin of weights, stored in the checkpoint itself: class names and training data.

Two data sets with the same classes in another order give weights of the same shapes: only the class
names can tell that a checkpoint was trained on the other one.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from detectron2.data import MetadataCatalog

from ghm_d2 import provenance
from ghm_d2.errors import UserError, shown
from ghm_d2.run_parts import Record, parse_record

ORIGIN = "ghm_d2"  # key in a checkpoint, beside "model"


def origin_entry(
    classes: Sequence[str], data: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """What a checkpoint holds under :data:`ORIGIN`: plain values, no paths.

    Args:
        classes: names in the order of the model's outputs; empty if they are not known.
        data: fingerprint of each data set that is trained on.
    """
    return {
        "classes": list(classes),
        "data": {name: dict(fingerprint) for name, fingerprint in (data or {}).items()},
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }


def with_thresholds(
    entry: Mapping[str, Any] | None, thresholds: Mapping[str, float]
) -> dict[str, Any]:
    """The entry of a checkpoint with its score thresholds, by class and "" for all of them."""
    return {**(entry or {}), "score_thresholds": dict(thresholds)}


def read_origin(checkpoint: Mapping[str, Any]) -> Record:
    """The entry of a checkpoint, empty where it has none or a damaged one.

    Args:
        checkpoint: as it was read, with or without its tensors.
    """
    content = checkpoint.get(ORIGIN)
    return parse_record(content)[0] if isinstance(content, dict) else Record()


def check_classes(origin: Record, classes: Sequence[str] | None, name: str) -> None:
    """Refuses a data set whose classes are not those of the weights, in the same order.

    Args:
        origin: of the weights.
        classes: of the data set; nothing is checked if these or the weights' are not known.
        name: of the data set.

    Raises:
        UserError: they differ.
    """
    trained, found = origin.classes, tuple(classes or ())
    if not trained or not found or trained == found:
        return
    if sorted(trained) == sorted(found):
        raise UserError(
            f"the classes of {name} are those of the weights in another order "
            f"({_listed(found)} instead of {_listed(trained)}), so every detection would get "
            "another's name: number the categories of the annotations as in the training."
        )
    raise UserError(
        f"{name} has other classes than the weights were trained on ({_listed(found)} instead of "
        f"{_listed(trained)}): give the data of the training, or train on this data."
    )


def check_datasets(origin: Record, names: Iterable[str]) -> None:
    """As :func:`check_classes`, for registered data sets.

    Args:
        origin: of the weights.
        names: of data sets that the model is to be compared with.

    Raises:
        UserError: the classes of one of them differ.
    """
    for name in names:
        check_classes(origin, MetadataCatalog.get(name).get("thing_classes"), name)


def changed_data(origin: Record, data: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A phrase for each data set that is not what the weights were trained on.

    Args:
        origin: of the weights; without fingerprints in it, nothing is compared.
        data: fingerprints of the data sets that are to be trained on.
    """
    before, now = ({_content(x) for x in sets.values()} for sets in (origin.data, data))
    if not before or before == now:  # a data set may have been moved or renamed
        return []
    changes = []
    for name in sorted(origin.data.keys() | data.keys()):
        if name not in data or name not in origin.data:
            changes.append(f"{name} is {'missing' if name in origin.data else 'new'}")
        elif _content(origin.data[name]) != _content(data[name]):
            held, holds = _counted(origin.data[name]), _counted(data[name])
            changes.append(f"{name} held {held} and holds {holds}")
    return [shown(change) for change in changes]


def _content(fingerprint: Mapping[str, Any]) -> str:
    return str(fingerprint.get("sha256"))


def _counted(fingerprint: Mapping[str, Any]) -> str:
    counts = [f"{fingerprint[k]} {k}" for k in ("images", "annotations") if k in fingerprint]
    return f"{' and '.join(counts)} (SHA-256 {_content(fingerprint)})".lstrip()


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return shown(", ".join(names[:most])) + more
