"""The image and category ids of a data set, which COCO's results need."""

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, Metadata


def image_ids(files: Collection[Path], metadata: Metadata, named: bool) -> dict[Path, Any]:
    """The id of each file that belongs to a data set; also sets the metadata's category ids.

    Args:
        files: images.
        metadata: of the data set; one that is not registered has no images.
        named: whether the user named the data set; files elsewhere then count as its images if
            their names match. Of a data set that only the config names, just its own files count,
            and it is not read if `files` holds none of them.

    Returns:
        Ids by file, of those that belong to it.
    """
    if not named and not _holds(metadata.get("image_root"), files):
        return {}
    if metadata.get("name") not in DatasetCatalog:
        return {}
    records = [r for r in DatasetCatalog.get(metadata.name) if "image_id" in r]
    paths = {Path(r["file_name"]).resolve(): r["image_id"] for r in records}
    found = {file: paths[there] for file in files if (there := file.resolve()) in paths}
    if named:
        by_name = _unique((Path(r["file_name"]).name, r["image_id"]) for r in records)
        others = ((by_name.get(file.name), file) for file in files if file not in found)
        elsewhere = _unique((number, file) for number, file in others if number is not None)
        taken = set(found.values())
        found |= {file: number for number, file in elsewhere.items() if number not in taken}
    return found


def _unique(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """The pairs as a dict, without the keys that occur twice: those are ambiguous."""
    pairs = list(pairs)
    times = Counter(key for key, _ in pairs)
    return {key: value for key, value in pairs if times[key] == 1}


def _holds(folder: str | None, files: Iterable[Path]) -> bool:
    root = Path(folder).resolve() if folder else None
    return root is not None and any(root in file.resolve().parents for file in files)


def category_ids(metadata: Metadata, classes: int) -> list[Any]:
    """The category id of each class, in the order of the model's outputs.

    If the data set has none, the classes are numbered from 0 (LVIS: from 1).
    """
    to_class = metadata.get("thing_dataset_id_to_contiguous_id")
    if to_class:
        ids = {k: category for category, k in to_class.items()}
        return [ids.get(k, k) for k in range(classes)]
    first = 1 if metadata.get("evaluator_type") == "lvis" else 0  # as Detectron2's LVISEvaluator
    return list(range(first, first + classes))
