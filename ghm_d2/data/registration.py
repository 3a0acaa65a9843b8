"""COCO-format data named on the command line: parse, check, register.

The checks read the annotation file once, before any process is launched, so that a mistake in the
data costs a second and one sentence instead of a traceback after an hour.
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from tqdm import tqdm

from ghm_d2.errors import UserError

__all__ = [
    "CocoDataset",
    "check_coco_dataset",
    "check_same_classes",
    "parse_dataset",
    "register_coco_dataset",
]

logger = logging.getLogger(__name__)

_REQUIRED_FIELDS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}
_registered_here: set[str] = set()


@dataclass(frozen=True)
class CocoDataset:
    """One `--dataset`.

    Attributes:
        name: the name for `DATASETS.TRAIN` and `DATASETS.TEST`.
        json_file: path of the annotation file.
        image_root: folder that the file names in `json_file` are relative to.
        classes: category names by ascending category id; empty until the file has been checked.
        evaluable: whether pycocotools can evaluate the file as it is. If not, Detectron2 converts
            the loaded data into a file that it can.
    """

    name: str
    json_file: str
    image_root: str
    classes: tuple[str, ...] = ()
    evaluable: bool = True


def parse_dataset(text: str) -> CocoDataset:
    """Split NAME=annotations.json,image_dir at the first "=" and the last comma.

    Raises:
        UserError: a part is missing.
    """
    name, _, paths = text.partition("=")
    json_file, _, image_root = paths.rpartition(",")
    if not (name and json_file and image_root):
        raise UserError(
            f"--dataset {text!r} is not of the form NAME=annotations.json,image_dir: "
            "write for example --dataset my_train=data/train.json,data/images."
        )
    return CocoDataset(name, os.path.expanduser(json_file), os.path.expanduser(image_root))


def check_coco_dataset(dataset: CocoDataset, *, labelled: bool = True) -> CocoDataset:
    """Check the annotation file and the presence of every image; log what training will leave out.

    Args:
        dataset: one `--dataset`.
        labelled: False: a file without the key "annotations" will do, as a test set's has none.

    Returns:
        The data set with `classes` and `evaluable` filled in.

    Raises:
        UserError: the data cannot be trained on; the message names the file and the reason.
    """
    file = dataset.json_file
    if not os.path.isdir(dataset.image_root):
        raise UserError(
            f"--dataset {dataset.name}: the image folder {dataset.image_root} does not exist."
        )
    content = _read(dataset)
    labelled = labelled or "annotations" in content
    for table, fields in _REQUIRED_FIELDS.items():
        if table != "annotations" or labelled:
            _check_rows(file, table, content.get(table), fields)
    images, annotations = content["images"], content.get("annotations", [])
    image_ids = {image["id"] for image in images}
    category_ids = {category["id"] for category in content["categories"]}

    for annotation in annotations:
        _check_annotation(file, annotation, category_ids)
    _check_image_files(dataset, images)

    usable = [a for a in annotations if not a.get("iscrowd", 0) and a["image_id"] in image_ids]
    if labelled and not usable:
        raise UserError(f"{file} holds no annotation that is not a crowd region of a listed image.")
    if labelled:
        _log_left_out(file, images, annotations)
    else:
        logger.warning("%s has no annotations: predictions are written, no AP is computed.", file)
    ordered = sorted(content["categories"], key=lambda category: category["id"])
    return replace(
        dataset,
        classes=tuple(category["name"] for category in ordered),
        evaluable=all(map(_evaluable, annotations)),
    )


def _read(dataset: CocoDataset) -> dict[str, Any]:
    file = dataset.json_file
    logger.info("Checking data set %s (%s)", dataset.name, file)
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except OSError as error:
        raise UserError(
            f"--dataset {dataset.name}: the annotation file {file} cannot be read "
            f"({error.strerror})."
        ) from error
    except ValueError as error:  # broken JSON or not UTF-8
        raise UserError(f"{file} is not a complete JSON file ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{file} is not in COCO format: it holds a {type(content).__name__} where an object "
            'with "images", "annotations" and "categories" is expected.'
        )
    return content


def _check_rows(file: str, table: str, rows: Any, fields: Sequence[str]) -> None:
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{file} holds no {table}: its "{table}" must be a list that is not empty.')
    seen = set()
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{file}: entry {number} of {table} is not an object.")
        for field in fields:
            if row.get(field) is None:
                raise UserError(f'{file}: entry {number} of {table} has no "{field}".')
        if row["id"] in seen:
            raise UserError(f"{file}: the id {row['id']!r} occurs more than once in {table}.")
        seen.add(row["id"])


def _check_annotation(file: str, annotation: dict[str, Any], category_ids: set[Any]) -> None:
    where, box = f"{file}: annotation {annotation['id']!r}", annotation["bbox"]
    if annotation["category_id"] not in category_ids:
        raise UserError(
            f"{where} has the category_id {annotation['category_id']!r}, "
            "which is not among the categories."
        )
    numbers = isinstance(box, list) and len(box) == 4
    if not numbers or not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
        raise UserError(f"{where} has the bbox {box!r} instead of four finite numbers x, y, w, h.")
    if annotation.get("ignore", 0):
        raise UserError(f'{where} sets "ignore", which Detectron2 does not know: use "iscrowd".')


def _check_image_files(dataset: CocoDataset, images: list[dict[str, Any]]) -> None:
    progress = tqdm(images, desc=f"looking for the images of {dataset.name}", delay=2)
    names = (image["file_name"] for image in progress)
    missing = [n for n in names if not os.path.isfile(os.path.join(dataset.image_root, n))]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(images)} images of {dataset.json_file} are missing from "
            f"{dataset.image_root}; the first is {missing[0]}."
        )


def _log_left_out(file: str, images: list[Any], annotations: list[Any]) -> None:
    image_ids = {image["id"] for image in images}
    if stray := sum(a["image_id"] not in image_ids for a in annotations):
        logger.warning("%s: %d annotations belong to no listed image and are ignored.", file, stray)
    if empty := sum(min(a["bbox"][2:]) <= 0 for a in annotations):
        logger.warning(
            "%s: %d boxes have no positive width and height: training drops them, evaluation "
            "counts them as objects.",
            file,
            empty,
        )
    if bare := len(image_ids - {a["image_id"] for a in annotations}):
        logger.info(
            "%s: %d of %d images have no annotation; training leaves them out unless "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS is False.",
            file,
            bare,
            len(images),
        )


def _evaluable(annotation: dict[str, Any]) -> bool:
    """pycocotools needs both fields, and takes the id 0 (or one that is no number) for none."""
    number = annotation["id"]
    return "area" in annotation and "iscrowd" in annotation and type(number) is int and number > 0


def check_same_classes(datasets: Sequence[CocoDataset]) -> None:
    """Raise UserError unless all files list the same category names in the same order."""
    for other in datasets[1:]:
        if other.classes != datasets[0].classes:
            raise UserError(
                f"{datasets[0].json_file} and {other.json_file} list different categories "
                f"({_shorten(datasets[0].classes)} against {_shorten(other.classes)}): all "
                "--dataset files must have the same names in the same order of their ids."
            )


def _shorten(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def register_coco_dataset(dataset: CocoDataset) -> None:
    """Register a checked data set; one that this function registered before is replaced.

    Raises:
        UserError: the name belongs to a data set that somebody else registered.
    """
    name = dataset.name
    if name in DatasetCatalog:
        if name not in _registered_here:
            raise UserError(
                f"--dataset {name}: a data set of this name exists already; choose another name."
            )
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: _load(dataset))
    metadata = MetadataCatalog.get(name)
    metadata.set(
        image_root=dataset.image_root, evaluator_type="coco", thing_classes=list(dataset.classes)
    )
    if dataset.evaluable:  # without json_file, COCOEvaluator converts what `_load` returns
        metadata.json_file = dataset.json_file
    _registered_here.add(name)


def _load(dataset: CocoDataset) -> list[dict[str, Any]]:
    records = load_coco_json(dataset.json_file, dataset.image_root, dataset.name)
    for record in records:
        # Detectron2's mapper drops boxes without area, but turns negative sizes into positive ones.
        record["annotations"] = [a for a in record["annotations"] if min(a["bbox"][2:]) > 0]
    return records
