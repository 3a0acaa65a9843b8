"""The images and categories of a COCO-format file: each once, with a whole number as id."""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ghm_d2.errors import shown

from .checks import Problem
from .fields import number
from .image_checks import ImageFile, image_name
from .image_files import same_file
from .tables import Ids

Report = Callable[[Problem], None]


@dataclass
class Entries:
    """What is left of a table.

    Attributes:
        rows: its entries.
        ids: maps an id as written, also that of a merged entry, to the new one.
        as_written: whether nothing had to be changed.
        paths: of images, the file of each by its id.
    """

    rows: list[dict[str, Any]]
    ids: Ids
    as_written: bool
    paths: dict[int, str] = field(default_factory=dict)


def image_entries(
    rows: Sequence[dict[str, Any]],
    files: Sequence[ImageFile | None],
    root: str | None,
    report: Report,
) -> Entries:
    """The images, with sizes that are those of the files.

    Args:
        rows: the table; its entries are changed.
        files: the image of each entry.
        root: the folder of the images; None: the images were not checked.
        report: called with every problem.
    """
    keys, as_written = [], True
    for row, file in zip(rows, files, strict=True):
        keys.append(os.path.realpath(file.path) if file else same_file(row["file_name"]))
        # pycocotools, reading the file itself, would not find an image spelled differently there.
        as_written &= not file or file.path == os.path.join(str(root), row["file_name"])
        as_written &= _set_size(row, file, report, has_files=root is not None)
    entries = _once(
        rows,
        keys,
        lambda row, first: report(
            Problem("image twice", f"{image_name(row)}, and {image_name(first)}")
        ),
        report,
    )
    entries.as_written &= as_written
    by_row = {id(row): file for row, file in zip(rows, files, strict=True)}
    entries.paths = {row["id"]: file.path for row in entries.rows if (file := by_row[id(row)])}
    return entries


def category_entries(rows: Sequence[dict[str, Any]], report: Report) -> Entries:
    """The categories; those that share a name are merged.

    Args:
        rows: the table; its entries are changed.
        report: called with every problem.
    """
    as_written = all(isinstance(row["name"], str) for row in rows)
    for row in rows:
        row["name"] = str(row["name"])

    def twice(row: dict[str, Any], first: dict[str, Any]) -> None:
        both = f"{row['id']!r} and {first['id']!r}"
        report(Problem("class twice", f"{both} are both named {shown(repr(row['name']))}"))

    entries = _once(rows, [row["name"] for row in rows], twice, report)
    entries.as_written &= as_written
    alike: dict[str, str] = {}
    for row in entries.rows:
        other = alike.setdefault(" ".join(row["name"].casefold().split()), row["name"])
        if other != row["name"]:
            names = f"{shown(repr(other))} and {shown(repr(row['name']))}"
            report(Problem("similar classes", names))
    return entries


def _once(
    rows: Sequence[dict[str, Any]],
    keys: Sequence[Hashable],
    twice: Callable[[dict[str, Any], dict[str, Any]], None],
    report: Report,
) -> Entries:
    """The first entry of each key, with a new id; ids of the others stand for the first one."""
    kept: dict[Hashable, dict[str, Any]] = {}
    again = []
    for row, key in zip(rows, keys, strict=True):
        first = kept.setdefault(key, row)
        if first is not row:
            twice(row, first)
            again.append((row["id"], first))
    left = list({row["id"]: row for row in kept.values()}.values())
    if len(left) < len(kept):  # one id for two different files
        report(Problem("duplicate id", "an id occurs more than once in images"))
    ids = Ids(left)
    as_written = not again
    for row, new in zip(left, ids.new, strict=True):
        as_written &= type(row["id"]) is int and row["id"] == new
        row["id"] = new
    for written, first in again:
        ids.add(written, first["id"])
    return Entries(left, ids, as_written)


def _set_size(
    row: dict[str, Any], file: ImageFile | None, report: Report, *, has_files: bool
) -> bool:
    """Sets width and height to whole numbers; returns whether they were."""
    written = [row.get("width"), row.get("height")]
    size = [number(value) for value in written]
    if any(value is None or value < 1 or value != int(value) for value in size):
        if not has_files:
            return True
        if file is None:  # any size will do: the missing image stops the training
            size = [1, 1]
        else:
            texts = " x ".join(shown(repr(value), 40) for value in written)
            pixels = f"{file.width} x {file.height} pixels"
            report(Problem("unknown size", f"{image_name(row)} is listed as {texts}, has {pixels}"))
            size = [file.width, file.height]
    elif any(isinstance(value, str) for value in written):
        text = " x ".join(map(repr, written))
        report(Problem("text value", f"{image_name(row)} is listed as {text}"))
    width, height = map(int, size)
    if file and (file.width, file.height) != (width, height):
        exif = " after its EXIF orientation is applied" if file.turned else ""
        report(
            Problem(
                "image size",
                f"{image_name(row)} has {file.width} x {file.height} pixels{exif}, but the "
                f"annotation file says {width} x {height}",
            )
        )
    row.update(width=width, height=height)
    return all(type(value) is int for value in written)
