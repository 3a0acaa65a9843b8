"""Data named on the command line, registered for Detectron2."""

import functools
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ghm_d2.errors import UserError

from .annotations import Uses
from .dataset_folders import resolve
from .dataset_option import CocoDataset, parse_dataset
from .datasets import check_coco_dataset, check_same_classes, load_checked
from .keypoints import mirrored_pairs
from .overlap import log_shared_images

logger = logging.getLogger(__name__)

_registered_here: set[str] = set()


def data_fingerprint(name: str) -> dict[str, Any]:
    """Identifies the content of a registered data set: a "sha256", and counts where known.

    For data given by `--dataset`, the hash is that of categories, images and boxes; for any other
    data set, that of the annotation file as it is. Without such a file the result is empty.
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


def register_coco_dataset(dataset: CocoDataset) -> None:
    """Register a checked data set; one that this function registered before is replaced.

    Raises:
        UserError: the name belongs to a data set that was registered elsewhere.
    """
    name = dataset.name
    if name in DatasetCatalog:
        if name not in _registered_here:
            raise UserError(
                f"--dataset {name}: a data set of this name exists already: choose another name."
            )
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    load = functools.cache(lambda: load_checked(dataset))
    data = load()

    def records() -> list[dict[str, Any]]:
        found = load().records(dataset.uses)
        logger.info("Loaded %d images in COCO format from %s", len(found), dataset.json_file)
        return found

    DatasetCatalog.register(name, records)
    metadata = MetadataCatalog.get(name)
    metadata.set(
        image_root=dataset.image_root,
        evaluator_type="coco",
        thing_classes=list(data.classes),
        thing_dataset_id_to_contiguous_id={i: k for k, i in enumerate(data.category_ids)},
        without_mask=data.without_mask,
        most_objects=data.most_objects,
        fingerprint=dict(dataset.fingerprint),
        # What an evaluator writes where there is no json_file; see AllThresholdsCOCOEvaluator.
        evaluated_content=lambda: load().evaluated(dataset.uses),
    )
    keypoints = data.keypoints
    metadata.num_keypoints = None if keypoints is None else keypoints.number
    if keypoints is not None and keypoints.fault:
        metadata.keypoint_fault = f"in {dataset.json_file} {keypoints.fault}"
    if keypoints is not None and keypoints.number:
        # Detectron2's mapper asks for names whether or not it mirrors images.
        numbers = map(str, range(1, keypoints.number + 1))
        metadata.keypoint_names = list(keypoints.names or numbers)
        metadata.keypoint_flip_map = mirrored_pairs(keypoints.names)
        metadata.keypoints_named = bool(keypoints.names)
        metadata.keypoints_incomplete = keypoints.incomplete
        metadata.labelled_keypoints = keypoints.labelled
    if data.as_written:
        metadata.json_file = dataset.json_file
    _registered_here.add(name)


def log_more_objects_than(limit: int, name: str, key: str = "TEST.DETECTIONS_PER_IMAGE ") -> None:
    """Warns if an image of a test set holds more objects than a detector may find.

    Args:
        limit: the largest number of detections in an image.
        name: the name of a registered data set.
        key: the setting of the limit, as a user types it before the number.
    """
    most = MetadataCatalog.get(name).get("most_objects", 0)
    if most > limit:
        logger.warning(
            "an image of %s has %d objects, but the detector finds %d at most: the others count as "
            "missed; give %s%d, and the evaluation uses it too",
            name,
            most,
            limit,
            key,
            most,
        )


def register_datasets(
    texts: Sequence[str], *, labelled: bool = True, uses: Uses | None = None
) -> list[CocoDataset]:
    """Parse, check and register all that a command line gives by `--dataset`.

    Args:
        texts: each is NAME=annotations.json,image_dir or NAME=FOLDER.
        labelled, uses: see :func:`check_coco_dataset`.

    Returns:
        The checked data sets, which all other processes still have to register.

    Raises:
        UserError: one of them is wrong, or two of them do not go together.
    """
    datasets = resolve([parse_dataset(text) for text in texts])
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise UserError(f"--dataset gives the same name twice: {', '.join(names)}.")
    datasets = [check_coco_dataset(d, labelled=labelled, uses=uses) for d in datasets]
    check_same_classes(datasets)
    log_shared_images({dataset.name: dataset.files for dataset in datasets})
    for dataset in datasets:
        register_coco_dataset(dataset)
    return datasets
