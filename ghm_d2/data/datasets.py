"""One `--dataset`: which file or folder it is, and what is left of it after the checks.

The checks read the labels and the headers of the images once, before any process is launched, so
that a mistake in the data costs a second and one sentence instead of a traceback after an hour.
What they leave is what training and evaluation see.
"""

import codecs
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ghm_d2.errors import UserError, command

from .annotations import Uses
from .checks import KINDS, Findings
from .coco import CocoData, check_content
from .image_checks import ImageFile
from .keypoints import Keypoints
from .label_folders import COCO, coco_files, find_folder, folder_split, json_kind
from .label_sets import SPLITS, log_notes, read_labels, sorted_names
from .labels import LabelledImage, to_coco
from .tables import is_plain, read_annotations

__all__ = [
    "CocoDataset",
    "check_coco_dataset",
    "check_same_classes",
    "log_repairs",
    "parse_dataset",
    "refuse",
    "resolve",
]

logger = logging.getLogger(__name__)

_OTHERS = (b'"_via', b'"regions"', b'"shapes"')  # in JSON of VIA and labelme
_LEVELS = {"repaired": logging.WARNING, "doubtful": logging.WARNING, "note": logging.INFO}


@dataclass(frozen=True)
class CocoDataset:
    """One `--dataset`.

    Attributes:
        name: the name for `DATASETS.TRAIN` and `DATASETS.TEST`.
        json_file: path of the annotation file, or of a file or folder of any tool's labels.
        image_root: folder that the file names in it are relative to, or below which images lie.
        split: the part of a folder that is meant; empty: all of it.
        uses: what the config takes of the annotations.
        labelled: False: a file without annotations will do.
        labels: the labels of a file or folder that is not in COCO format; None where it is.
        classes: category names by ascending category id; empty until the file has been checked.
        files: the image of each entry of the file; empty until then.
        fingerprint: what :func:`~ghm_d2.data.registration.data_fingerprint` returns; likewise.
        data: what the file holds; stays in the process that has checked it, because another one
            reads the file faster than it receives all of that. None until then.
    """

    name: str
    json_file: str
    image_root: str
    split: str = ""
    uses: Uses = Uses()
    labelled: bool = True
    labels: tuple[LabelledImage, ...] | None = field(default=None, repr=False)
    classes: tuple[str, ...] = ()
    files: tuple[ImageFile | None, ...] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    data: CocoData | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": None}

    def __str__(self) -> str:
        """What a command line says."""
        last = self.split or ("" if self.json_file == self.image_root else self.image_root)
        return f"{self.name}={self.json_file}{',' * bool(last)}{last}"

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

    A folder of labels is NAME=FOLDER, one split of it NAME=FOLDER,SPLIT, and a folder or file of
    labels whose images lie elsewhere NAME=LABELS,image_dir.

    Raises:
        UserError: a part is missing.
    """
    name, _, paths = text.partition("=")
    whole = os.path.expanduser(paths)
    if name and os.path.isdir(whole):
        return CocoDataset(name, whole, whole)
    if name and os.path.isfile(whole):
        return CocoDataset(name, whole, os.path.dirname(whole) or ".")
    json_file, _, image_root = paths.rpartition(",")
    if not (name and json_file and image_root):
        nowhere = f"; {paths} does not exist" if name and paths else ""
        raise UserError(
            f"--dataset {text!r} is not of the form NAME=annotations.json,image_dir or NAME=FOLDER"
            f"{nowhere}: write for example --dataset my_train=data/train.json,data/images."
        )
    json_file, image_root = os.path.expanduser(json_file), os.path.expanduser(image_root)
    if os.path.isdir(json_file) and not os.path.isdir(image_root):
        return CocoDataset(name, json_file, json_file, image_root)
    return CocoDataset(name, json_file, image_root)


def resolve(datasets: Sequence[CocoDataset]) -> list[CocoDataset]:
    """Finds out what the folders and files hold.

    A folder with splits becomes NAME_train and NAME_val, unless the name ends in that of one of its
    splits, or one was given.

    Raises:
        UserError: a folder holds no labels, or not the split that was given.
    """
    found = [part for dataset in datasets for part in _resolve(dataset)]
    # Folders that declare no classes have those that occur in any of them, in one order.
    free = [d for d in found if d.labels is not None and not d.classes]
    names = {o.name for d in free for image in d.labels for o in image.objects}
    classes = sorted_names(names)
    return [replace(d, classes=classes) if d in free else d for d in found]


def _resolve(dataset: CocoDataset) -> list[CocoDataset]:
    path, images = Path(dataset.json_file), Path(dataset.image_root)
    if dataset.labels is not None or not _is_foreign(path) or not images.is_dir():
        return [dataset]
    elsewhere = None if images == (path if path.is_dir() else path.parent) else images
    folder = find_folder(path, elsewhere)
    if folder.kind == COCO:
        files = coco_files(folder)
        chosen = _chosen(dataset, sorted(files, key=_place))
        logger.info("%s: COCO annotations, %s", path, ", ".join(str(f) for f, _ in files.values()))
        return [
            replace(dataset, name=name, json_file=str(file), image_root=str(root), split="")
            for name, split in chosen.items()
            for file, root in [files[split]]
        ]
    labels = read_labels([folder])
    splits = labels.declared_splits() or {"": list(labels.images.values())}
    declared = tuple(labels.classes) if folder.classes else ()
    return [
        replace(
            dataset,
            name=name,
            split=split,
            labels=tuple(splits[split]),
            classes=declared,
            image_root=dataset.image_root if folder.path == path.resolve() else str(folder.images),
        )
        for name, split in _chosen(dataset, list(splits)).items()
    ]


def _is_foreign(path: Path) -> bool:
    """Whether this is anything but one annotation file in COCO format."""
    if path.is_dir() or path.suffix.lower() in (".xml", ".csv", ".yaml", ".yml"):
        return path.exists()
    if not path.is_file():
        return False
    with path.open("rb") as stream:  # all of a COCO file need not be read twice
        head = stream.read(1 << 16).replace(b"\0", b"").lstrip(codecs.BOM_UTF8 + b"\xff\xfe \r\n\t")
    others = head.startswith(b"[") or any(word in head for word in _OTHERS)
    return others and json_kind(path) not in (COCO, "")


def _place(split: str) -> int:
    return SPLITS.index(split) if split in SPLITS else len(SPLITS)


def _chosen(dataset: CocoDataset, splits: Sequence[str]) -> dict[str, str]:
    """The splits of a folder to use, by the names of their data sets."""
    last = re.split(r"[^A-Za-z0-9]", dataset.name)[-1]
    wanted = dataset.split or (folder_split(last) if len(splits) > 1 else "")
    names = ", ".join(filter(None, splits))
    if wanted:
        split = wanted if wanted in splits else folder_split(wanted)
        if split not in splits:
            has = f"has the splits {names}" if names else "has no splits"
            raise UserError(f"--dataset {dataset.name}: {dataset.json_file} {has}, not {wanted}.")
        return {dataset.name: split}
    if len(splits) == 1:
        return {dataset.name: splits[0]}
    if "train" not in splits:
        raise UserError(
            f"--dataset {dataset.name}: {dataset.json_file} has the splits {names}: say which, as "
            f"in {dataset.name}={dataset.json_file},{next(filter(None, splits))}."
        )
    test = next((split for split in ("val", "test") if split in splits), splits[-1])
    chosen = {f"{dataset.name}_{split}": split for split in ("train", test)}
    logger.info(
        "%s has the splits %s: %s",
        dataset.json_file,
        names,
        " and ".join(f"{split} is {name}" for name, split in chosen.items()),
    )
    return chosen


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
            + (" (what follows the last comma)." if "," in file else ".")
        )
    found = resolve([dataset])
    if len(found) > 1:
        names = ", ".join(part.split for part in found)
        raise UserError(f"--dataset {dataset.name}: {file} has the splits {names}: say which.")
    dataset = replace(found[0], labelled=labelled, uses=uses or dataset.uses)
    file = dataset.json_file
    logger.info("Checking data set %s (%s)", dataset.name, file)
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


def _read(dataset: CocoDataset, files: tuple[ImageFile | None, ...] | None = None) -> CocoData:
    root = dataset.image_root
    if dataset.labels is None:
        content, plain = read_annotations(dataset.json_file), is_plain(dataset.json_file)
    else:
        classes, plain = dataset.classes, False
        content, notes = to_coco(dataset.labels, classes, Path(root).expanduser().resolve())
        if files is None:
            log_notes(notes, "crowd")
        if not content["annotations"]:
            where = f" in its split {dataset.split}" if dataset.split else ""
            raise UserError(f"{dataset.json_file} holds no labelled object{where}.")
    data = check_content(
        content,
        labelled=dataset.labelled,
        uses=dataset.uses,
        name=dataset.name,
        root=root,
        files=files,
    )
    data.as_written &= plain
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
