"""One `--dataset`, as the command line gives it."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ghm_d2.errors import UserError, shown

from .annotations import Uses
from .coco import CocoData
from .image_checks import ImageFile
from .keypoints import Keypoints
from .labels import LabelledImage


@dataclass(frozen=True)
class CocoDataset:
    """One `--dataset`.

    Attributes:
        name: the name for `DATASETS.TRAIN` and `DATASETS.TEST`.
        json_file: path of the annotation file, or of a file or folder with labels of any tool.
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


def parse_dataset(text: str) -> CocoDataset:
    """Split NAME=annotations.json,image_dir at the first "=" and the last comma.

    A folder of labels is NAME=FOLDER, one split of it NAME=FOLDER,SPLIT, and a folder or file of
    labels whose images lie elsewhere NAME=LABELS,image_dir.

    Raises:
        UserError: a part is missing, or the name cannot be that of a folder and a config value.
    """
    name, _, paths = text.partition("=")
    _check_name(name)
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
    has_splits = os.path.exists(json_file) and not json_file.lower().endswith(".json")
    if has_splits and not os.path.isdir(image_root):
        root = json_file if os.path.isdir(json_file) else os.path.dirname(json_file) or "."
        return CocoDataset(name, json_file, root, image_root)
    return CocoDataset(name, json_file, image_root)


def _check_name(name: str) -> None:
    """A name with a slash would send results out of the output folder, and "${" is OmegaConf's."""
    taken = name in (".", "..") or name.endswith((".json", ".pth"))  # files beside its folder
    if taken or not name.isprintable() or re.search(r"[/\\]|\$\{", name) or len(name) > 100:
        raise UserError(
            f"--dataset {shown(name)!r}: a name has up to 100 printable characters without slashes "
            'and "${", and does not end in .json or .pth: choose another one.'
        )
