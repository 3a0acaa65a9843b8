"""What the files and folders behind `--dataset` are: one data set, or one for each split."""

import codecs
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ghm_d2.errors import UserError

from .dataset_option import CocoDataset
from .label_folders import COCO, coco_files, find_folder, folder_split, json_kind
from .label_sets import SPLITS, read_labels, sorted_names

logger = logging.getLogger(__name__)

_OTHERS = (b'"_via', b'"regions"', b'"shapes"')  # in JSON of VIA and labelme


def resolve(datasets: Sequence[CocoDataset]) -> list[CocoDataset]:
    """Finds out what the folders and files hold.

    A folder with splits becomes NAME_train and NAME_val (or NAME_test), unless a split was given or
    the data set's name ends in the name of a split.

    Raises:
        UserError: a folder holds no labels, or not the split that was given.
    """
    found = [part for dataset in datasets for part in _resolve(dataset)]
    # Folders that declare no classes share all classes that occur in any of them, or training and
    # test data would number them differently.
    free = [d for d in found if d.labels is not None and not d.classes]
    names = {o.name for d in free for image in d.labels for o in image.objects}
    classes = sorted_names(names)
    return [replace(d, classes=classes) if d in free else d for d in found]


def _resolve(dataset: CocoDataset) -> list[CocoDataset]:
    path, images = Path(dataset.json_file), Path(dataset.image_root)
    if dataset.labels is not None or not is_foreign(path) or not images.is_dir():
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
    splits = labels.declared_splits()
    if dataset.split and any(dataset.split in part.lists for part in labels.folders):
        splits = labels.named_splits([dataset.split])  # such as VOC's trainval
    elif "train" not in splits and not dataset.split:
        splits = {"": list(labels.images.values())}
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


def is_foreign(path: Path) -> bool:
    """Whether this is anything but one annotation file in COCO format."""
    if path.is_dir() or path.suffix.lower() in (".xml", ".csv", ".yaml", ".yml"):
        return path.exists()
    if not path.is_file():
        return False
    with path.open("rb") as stream:  # reading a whole COCO file twice is slow
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
