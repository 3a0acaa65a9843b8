"""Finds images that two data sets share, or that one holds twice, by the content of the files."""

import hashlib
import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from ghm_d2.errors import command, shown

from .image_checks import ImageFile

logger = logging.getLogger(__name__)


def copies(files: Sequence[ImageFile | None], name: str = "") -> list[list[int]]:
    """Which images have the same content.

    Only files that agree in length, width and height are read.

    Args:
        files: the images. None is skipped, and a path that is listed twice is no copy of itself.
        name: for a progress bar.

    Returns:
        Groups of at least two indices into `files`, with different paths but the same content.
    """
    alike: dict[tuple[int, int, int], dict[str, int]] = defaultdict(dict)
    for place, file in enumerate(files):
        if file is not None and os.path.isfile(file.path):
            key = os.path.getsize(file.path), file.width, file.height
            alike[key].setdefault(file.path, place)
    several = [group for group in alike.values() if len(group) > 1]
    groups: dict[str, list[int]] = defaultdict(list)
    for path, place in tqdm(
        [item for group in several for item in group.items()],
        desc=f"comparing images{f' of {name}' if name else ''}",
        delay=2,
    ):
        groups[_digest(path)].append(place)
    return [group for group in groups.values() if len(group) > 1]


def log_shared_images(datasets: Mapping[str, Sequence[ImageFile | None]]) -> None:
    """Warns of images that two data sets share: their AP would say nothing about new images.

    Args:
        datasets: the images of each data set, by its name.
    """
    for (first, ours), (second, theirs) in itertools.combinations(datasets.items(), 2):
        shared = _shared(ours, theirs)
        if shared:
            logger.warning(
                "%d of the %d images of %s have the same content as images of %s; the first: %s. "
                "An AP on images that were trained on says nothing about new ones (%s splits a "
                "file by images)",
                len(shared),
                len(theirs),
                second,
                first,
                shown(os.path.basename(shared[0])),
                command("split-data"),
            )


def _shared(ours: Sequence[ImageFile | None], theirs: Sequence[ImageFile | None]) -> list[str]:
    known = {os.path.realpath(file.path) for file in ours if file}
    both = [f for f in theirs if f and os.path.realpath(f.path) in known]
    same = {f.path for f in both}
    different = [f for f in theirs if f and f.path not in same]
    # Groups within one data set are ignored below: their images are not shared.
    groups = copies([*ours, *different], "two data sets")
    for group in groups:
        if group[0] < len(ours):
            same |= {different[i - len(ours)].path for i in group if i >= len(ours)}
    return [f.path for f in theirs if f and f.path in same]


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
