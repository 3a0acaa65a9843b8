"""Checks of the data behind `--dataset`, and what is left of it after them.

The checks read the labels and the headers of the images once, before any process is launched, so
that a mistake in the data costs a second and one sentence instead of a traceback after an hour.
What they leave is what training and evaluation see.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ghm_d2.errors import UserError, command

from .annotations import Uses
from .checks import KINDS, Findings
from .coco import CocoData, check_content
from .dataset_folders import resolve
from .dataset_option import CocoDataset
from .image_checks import ImageFile
from .label_sets import log_notes
from .labels import to_coco
from .tables import is_plain, read_annotations

logger = logging.getLogger(__name__)

_LEVELS = {"repaired": logging.WARNING, "doubtful": logging.WARNING, "note": logging.INFO}


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
        logger.warning("%s has no annotations: there will be predictions, but no AP.", file)
    if data.keypoints and data.keypoints.without:
        logger.info(
            "%s: %d annotations have no keypoints: these count as not labelled.",
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


def load_checked(dataset: CocoDataset) -> CocoData:
    """What a checked data set holds, read again in a process that has not checked it."""
    return dataset.data or _read(dataset, files=dataset.files)


def _read(dataset: CocoDataset, files: tuple[ImageFile | None, ...] | None = None) -> CocoData:
    content = read_content(dataset, quiet=files is not None)
    data = check_content(
        content,
        labelled=dataset.labelled,
        uses=dataset.uses,
        name=dataset.name,
        root=dataset.image_root,
        files=files,
    )
    data.as_written &= dataset.labels is None and is_plain(dataset.json_file)
    return data


def read_content(dataset: CocoDataset, *, quiet: bool = False) -> dict[str, Any]:
    """The COCO-format content of a resolved data set, not yet checked.

    Args:
        dataset: one of those that :func:`resolve` returns.
        quiet: say nothing about what has been said before.

    Raises:
        UserError: its file cannot be read, or its folder holds no object.
    """
    if dataset.labels is None:
        return read_annotations(dataset.json_file)
    root = Path(dataset.image_root).expanduser().resolve()
    content, notes = to_coco(dataset.labels, dataset.classes, root)
    if not quiet:
        log_notes(notes, "crowd")
    if not content["annotations"]:
        where = f" in its split {dataset.split}" if dataset.split else ""
        raise UserError(f"{dataset.json_file} holds no labelled object{where}.")
    return content


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
                "--dataset files must have the same category names in the same order of ids."
            )


def _shorten(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
