"""COCO-format data named on the command line: parse, check, register.

The checks read the annotation file and the headers of the images once, before any process is
launched, so that a mistake in the data costs a second and one sentence instead of a traceback after
an hour.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from ghm_d2.data.checks import KINDS, Findings, annotation_problems, row_problems
from ghm_d2.data.image_checks import image_problems
from ghm_d2.data.keypoints import Keypoints, fill_in, find_keypoints, mirrored_pairs
from ghm_d2.errors import UserError, cannot

__all__ = [
    "CocoDataset",
    "check_coco_dataset",
    "check_same_classes",
    "data_fingerprint",
    "parse_dataset",
    "read_annotations",
    "register_coco_dataset",
    "register_datasets",
]

logger = logging.getLogger(__name__)

_registered_here: set[str] = set()

_IDENTITY = (
    ("id", "name"),
    ("id", "file_name"),
    ("image_id", "category_id", "bbox", "iscrowd"),
)  # of a category, an image and an annotation


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
        without_mask: number of objects, crowd regions left out, that have no segmentation.
        keypoints: what the file holds of them; None: it has no annotations.
        fingerprint: what :func:`data_fingerprint` returns; empty until the file has been checked.
    """

    name: str
    json_file: str
    image_root: str
    classes: tuple[str, ...] = ()
    evaluable: bool = True
    without_mask: int = 0
    keypoints: Keypoints | None = Keypoints()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)


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
    """Check the annotation file and every image's header; log what training will leave out.

    Args:
        dataset: one `--dataset`.
        labelled: False: a file without the key "annotations" will do, as a test set's has none.

    Returns:
        The data set with `classes`, `evaluable`, `without_mask` and `fingerprint` filled in.

    Raises:
        UserError: the data cannot be trained on; the message names the file and the reason.
    """
    file = dataset.json_file
    if not os.path.isdir(dataset.image_root):
        raise UserError(
            f"--dataset {dataset.name}: the image folder {dataset.image_root} does not exist"
            + (" (what follows the last comma)." if "," in dataset.json_file else ".")
        )
    logger.info("Checking data set %s (%s)", dataset.name, file)
    content = read_annotations(file)
    labelled = labelled or "annotations" in content
    _refuse(file, Findings(1).add(row_problems(content, labelled=labelled)))
    images, annotations = content["images"], content.get("annotations", [])
    found = Findings(1).add(annotation_problems(content))
    _refuse(file, found)
    found.add(image_problems(images, dataset.image_root, decode=False, name=dataset.name))
    _refuse(file, found)
    if labelled:
        _log_repairs(file, found)
    else:
        logger.warning("%s has no annotations: predictions are written, no AP is computed.", file)
    ordered = sorted(content["categories"], key=lambda category: category["id"])
    return replace(
        dataset,
        classes=tuple(category["name"] for category in ordered),
        evaluable=all(map(_evaluable, annotations)),
        without_mask=sum(not (a.get("segmentation") or a.get("iscrowd", 0)) for a in annotations),
        keypoints=find_keypoints(content, file) if labelled else None,
        fingerprint=_fingerprint(ordered, images, annotations),
    )


def _fingerprint(*tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of categories, images and annotations, whatever their order and the spaces between them."""
    digest = hashlib.sha256()
    for table, keys in zip(tables, _IDENTITY, strict=True):
        rows = sorted(json.dumps([row.get(key) for key in keys]) for row in table)
        digest.update("\n".join(rows).encode())
    _, images, annotations = tables
    return {
        "images": len(images),
        "annotations": len(annotations),
        "sha256": digest.hexdigest()[:16],
    }


def data_fingerprint(name: str) -> dict[str, Any]:
    """What tells a registered data set from another one: its "sha256", and counts where known.

    Of a `--dataset` it is that of categories, images and boxes; of any other, that of the
    annotation file as it is. It is empty where there is no such file.
    """
    metadata = MetadataCatalog.get(name)
    if known := metadata.get("fingerprint"):
        return dict(known)
    file = metadata.get("json_file")
    if not file or not PathManager.isfile(file):
        return {}
    digest = hashlib.sha256()
    with PathManager.open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest()[:16]}


def read_annotations(file: str) -> dict[str, Any]:
    """Reads an annotation file.

    Raises:
        UserError: it cannot be read, or holds something else than one JSON object.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except OSError as error:
        raise cannot("read", f"the annotation file {file}", error) from error
    except (ValueError, RecursionError) as error:  # broken JSON or not UTF-8
        raise UserError(f"{file} is not a complete JSON file ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{file} is not in COCO format: it holds a {type(content).__name__} where an object "
            'with "images", "annotations" and "categories" is expected.'
        )
    return content


def _refuse(file: str, found: Findings) -> None:
    """Raises UserError for the first kind that stops a training, and counts the others."""
    kinds = found.kinds("stops")
    if not kinds:
        return
    number = found.counts[kinds[0]]
    more = f" (the first of {number} such entries)" if number > 1 else ""
    text = found.examples[kinds[0]][0]
    colon = "" if text.startswith("holds ") else ":"  # of the file as a whole
    raise UserError(f"{file}{colon} {text}{more}. ghm-d2 check-data lists everything.")


def _log_repairs(file: str, found: Findings) -> None:
    for kind in (*found.kinds("repaired"), *found.kinds("note")):
        severity, meaning = KINDS[kind]
        level = logging.WARNING if severity == "repaired" else logging.INFO
        count, first = found.counts[kind], found.examples[kind][0]
        logger.log(level, "%s: %d %s; the first: %s.", file, count, meaning, first)


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
        image_root=dataset.image_root,
        evaluator_type="coco",
        thing_classes=list(dataset.classes),
        without_mask=dataset.without_mask,
        fingerprint=dict(dataset.fingerprint),
    )
    keypoints = dataset.keypoints
    metadata.num_keypoints = None if keypoints is None else keypoints.number
    if keypoints is not None:
        metadata.keypoint_fault = keypoints.fault
    if keypoints is not None and keypoints.number:
        # Detectron2's mapper asks for names whether or not it mirrors images.
        numbers = map(str, range(1, keypoints.number + 1))
        metadata.keypoint_names = list(keypoints.names or numbers)
        metadata.keypoint_flip_map = mirrored_pairs(keypoints.names)
        metadata.keypoints_named = bool(keypoints.names)
        metadata.keypoints_incomplete = keypoints.incomplete
    if dataset.evaluable:  # without json_file, COCOEvaluator converts what `_load` returns
        metadata.json_file = dataset.json_file
    _registered_here.add(name)


def register_datasets(texts: Sequence[str], *, labelled: bool = True) -> list[CocoDataset]:
    """Parse, check and register all that a command line gives by `--dataset`.

    Args:
        texts: NAME=annotations.json,image_dir, each.
        labelled: see :func:`check_coco_dataset`.

    Returns:
        The checked data sets, which every other process registers too.

    Raises:
        UserError: one of them is wrong, or two of them do not go together.
    """
    datasets = [parse_dataset(text) for text in texts]
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise UserError(f"--dataset gives the same name twice: {', '.join(names)}.")
    datasets = [check_coco_dataset(dataset, labelled=labelled) for dataset in datasets]
    check_same_classes(datasets)
    for dataset in datasets:
        register_coco_dataset(dataset)
    return datasets


def _load(dataset: CocoDataset) -> list[dict[str, Any]]:
    records = load_coco_json(dataset.json_file, dataset.image_root, dataset.name)
    for record in records:
        # Detectron2's mapper drops boxes without area, but turns negative sizes into positive ones.
        record["annotations"] = [a for a in record["annotations"] if min(a["bbox"][2:]) > 0]
    if dataset.keypoints and dataset.keypoints.number:
        fill_in(records, dataset.keypoints.number)
    return records
