"""COCO-format data named on the command line: parse, check, register.

The checks read the annotation file and the headers of the images once, before any process is
launched, so that a mistake in the data costs a second and one sentence instead of a traceback after
an hour. What they leave is what training and evaluation see.
"""

import functools
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ghm_d2.errors import UserError, command

from .annotations import Uses
from .checks import KINDS, Findings
from .coco import CocoData, check_content
from .image_checks import ImageFile
from .keypoints import Keypoints, mirrored_pairs
from .overlap import log_shared_images
from .tables import is_plain, read_annotations

__all__ = [
    "CocoDataset",
    "check_coco_dataset",
    "check_same_classes",
    "data_fingerprint",
    "log_more_objects_than",
    "log_repairs",
    "parse_dataset",
    "refuse",
    "register_coco_dataset",
    "register_datasets",
]

logger = logging.getLogger(__name__)

_registered_here: set[str] = set()

_LEVELS = {"repaired": logging.WARNING, "doubtful": logging.WARNING, "note": logging.INFO}


@dataclass(frozen=True)
class CocoDataset:
    """One `--dataset`.

    Attributes:
        name: the name for `DATASETS.TRAIN` and `DATASETS.TEST`.
        json_file: path of the annotation file.
        image_root: folder that the file names in `json_file` are relative to.
        uses: what the config takes of the annotations.
        labelled: False: a file without annotations will do.
        classes: category names by ascending category id; empty until the file has been checked.
        files: the image of each entry of the file; empty until then.
        fingerprint: what :func:`data_fingerprint` returns; empty until then.
        data: what the file holds; stays in the process that has checked it, because another one
            reads the file faster than it receives all of that. None until then.
    """

    name: str
    json_file: str
    image_root: str
    uses: Uses = Uses()
    labelled: bool = True
    classes: tuple[str, ...] = ()
    files: tuple[ImageFile | None, ...] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    data: CocoData | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": None}

    @property
    def evaluable(self) -> bool:
        """Whether pycocotools reads in the file itself what is trained on."""
        return self.data is not None and self.data.as_written

    @property
    def keypoints(self) -> Keypoints | None:
        """Those of the file in the process that has checked it; None: it has no annotations."""
        return None if self.data is None else self.data.keypoints

    def load(self) -> CocoData:
        """What the file holds, read again in a process that has not checked it."""
        if self.data is not None:
            return self.data
        return _read(self, files=self.files)


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


def check_coco_dataset(
    dataset: CocoDataset, *, labelled: bool = True, uses: Uses | None = None
) -> CocoDataset:
    """Check the annotation file and every image's header; log what is repaired or left out.

    Args:
        dataset: one `--dataset`.
        labelled: False: a file without annotations will do, as a test set's has none.
        uses: what the config takes of the annotations; by default everything.

    Returns:
        The data set with all its attributes.

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
    dataset = replace(dataset, labelled=labelled, uses=uses or dataset.uses)
    data = _read(dataset)
    refuse(file, data.found)
    log_repairs(file, data.found)
    if "annotations" not in data.content:
        logger.warning("%s has no annotations: predictions are written, no AP is computed.", file)
    if data.keypoints and data.keypoints.without:
        logger.info(
            "%s: %d annotations have no keypoints; they count as not labelled.",
            file,
            data.keypoints.without,
        )
    return replace(
        dataset,
        classes=data.classes,
        files=data.files,
        fingerprint=data.fingerprint,
        data=data,
    )


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


def _read(dataset: CocoDataset, files: tuple[ImageFile | None, ...] | None = None) -> CocoData:
    file = dataset.json_file
    data = check_content(
        read_annotations(file),
        labelled=dataset.labelled,
        uses=dataset.uses,
        name=dataset.name,
        root=dataset.image_root,
        files=files,
    )
    data.as_written &= is_plain(file)
    return data


def refuse(file: str, found: Findings) -> None:
    """Raises UserError for the first kind that stops a training."""
    if text := found.refusal():
        colon = "" if text.startswith("holds ") else ":"  # of the file as a whole
        raise UserError(f"{file}{colon} {text}; {command('check-data')} lists everything.")


def log_repairs(file: str, found: Findings) -> None:
    """Logs how often each kind was met that does not stop a training."""
    for severity, level in _LEVELS.items():
        for kind in found.kinds(severity):
            count, first = found.counts[kind], found.examples[kind][0]
            logger.log(level, "%s: %d %s; the first: %s.", file, count, KINDS[kind][1], first)


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
    load = functools.cache(dataset.load)
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
    """Warns of a test set in which images hold more objects than a detector may find.

    Args:
        limit: detections of an image.
        name: of a registered data set.
        key: what to type before another limit.
    """
    most = MetadataCatalog.get(name).get("most_objects", 0)
    if most > limit:
        logger.warning(
            "an image of %s has %d objects, and a detector may find %d in one: the others count "
            "as missed; give %s%d, which the evaluation follows",
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
        texts: NAME=annotations.json,image_dir, each.
        labelled, uses: see :func:`check_coco_dataset`.

    Returns:
        The checked data sets, which every other process registers too.

    Raises:
        UserError: one of them is wrong, or two of them do not go together.
    """
    datasets = [parse_dataset(text) for text in texts]
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise UserError(f"--dataset gives the same name twice: {', '.join(names)}.")
    datasets = [check_coco_dataset(d, labelled=labelled, uses=uses) for d in datasets]
    check_same_classes(datasets)
    log_shared_images({dataset.name: dataset.files for dataset in datasets})
    for dataset in datasets:
        register_coco_dataset(dataset)
    return datasets
