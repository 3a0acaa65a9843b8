"""The tables of a COCO-format file: entries, the fields that they must have, and their ids."""

import codecs
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ghm_d2.errors import UserError, cannot, reason, shown

from .checks import Problem
from .fields import identity
from .image_files import same_file

_FIELDS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id", "bbox"),
}
_LARGEST = 2**53


def read_json(file: str) -> Any:
    """Reads a JSON file in UTF-8 (also with a byte order mark), UTF-16 or UTF-32, also gzipped.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    try:
        with open(file, "rb") as stream:
            data = stream.read()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return json.loads(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file} is not a complete gzip file ({reason(error)}).") from error
    except OSError as error:
        raise cannot("read", f"the annotation file {file}", error) from error
    except UnicodeError as error:
        raise UserError(
            f"{file} is not a complete JSON file (it is not text in UTF-8 or UTF-16): save it as "
            "UTF-8."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a complete JSON file ({reason(error)}).") from error


def read_annotations(file: str) -> dict[str, Any]:
    """Reads an annotation file; see :func:`read_json`.

    Raises:
        UserError: it cannot be read, or holds anything other than one JSON object.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(
            f"{file} is not in COCO format: it holds a {type(content).__name__} instead of an "
            'object with "images", "annotations" and "categories".'
        )
    return content


def is_plain(file: str) -> bool:
    """Whether pycocotools can read the file too: no gzip, no UTF-16, no byte order mark."""
    with open(file, "rb") as stream:
        start = stream.read(4)
    return b"\0" not in start and not start.startswith((b"\x1f\x8b", codecs.BOM_UTF8))


def table_problems(content: dict[str, Any], *, labelled: bool) -> Iterator[Problem]:
    """Faults of tables, entries, fields and ids; every other check relies on there being none.

    Args:
        content: the content of the annotation file.
        labelled: whether it must have annotations.
    """
    for table, fields in _FIELDS.items():
        rows = content.get(table)
        if table == "annotations" and not labelled and not rows:
            continue
        if not isinstance(rows, list) or not rows:
            yield Problem("table", f'holds no {table}: "{table}" must be a list that is not empty')
            continue
        seen: dict[Any, dict] = {}
        for number, row in enumerate(rows):
            yield from _row(table, fields, number, row, seen)


def _row(
    table: str, fields: Sequence[str], number: int, row: Any, seen: dict[Any, dict]
) -> Iterator[Problem]:
    where = f"entry {number} of {table}"
    if not isinstance(row, dict):
        yield Problem("entry", f"{where} is not an object")
        return
    for name in fields:
        value = row.get(name)
        if value is None or value == [] and name == "bbox":
            if name != "bbox" or not row.get("segmentation"):
                yield Problem("entry", f'{where} has no "{name}"')
                return
        elif wanted := _wanted(name, value):
            text = shown(repr(value), 80)
            yield Problem("value", f'{where} has the "{name}" {text} instead of {wanted}')
            return
    ident = row.get("id")
    if identity(ident) is None:
        if ident is not None:
            text = shown(repr(ident), 80)
            yield Problem("value", f'{where} has the "id" {text} instead of a number or text')
        return  # only annotations get here without an id; nothing refers to it
    if not _is_same(table, seen.setdefault(ident, row), row):
        yield Problem("duplicate id", f"the id {ident!r} occurs more than once in {table}")


def _wanted(name: str, value: Any) -> str:
    """What a field should hold if `value` does not fit; empty if it does."""
    if name == "bbox":
        return ""  # its numbers are checked with the annotation
    if name == "file_name":
        return "" if isinstance(value, str) and value.strip() else "a text"
    if name == "name":
        good = isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip()
        return "" if good else "a text"
    return "" if identity(value) is not None else "a number or text"


def _is_same(table: str, first: dict, other: dict) -> bool:
    """Whether two entries with the same id are the same thing, listed twice."""
    if table == "images":
        return same_file(first["file_name"]) == same_file(other["file_name"])
    return first["name"] == other["name"] if table == "categories" else first == other


class Ids:
    """The ids of a table's entries as whole numbers, and the entry that a reference means.

    Attributes:
        new: a whole number for each entry: its own id if all ids are different whole numbers or
            text that spells such, otherwise its position, counted from 1.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        """
        Args:
            rows: entries with "id", all of them different.
        """
        written = [row["id"] for row in rows]
        alike = [identity(ident) for ident in written]
        counts = Counter(alike)
        usable = all(isinstance(n, int) and abs(n) < _LARGEST for n in alike)
        if not usable or max(counts.values()) > 1:
            self.new: list[int] = list(range(1, len(rows) + 1))
        else:
            self.new = alike  # type: ignore[assignment]
        self._exact = dict(zip(written, self.new, strict=True))
        # Lets "0" refer to 0 and the like, unless the table holds both.
        self._alike = {a: n for a, n in zip(alike, self.new, strict=True) if counts[a] == 1}

    def find(self, value: Any) -> int | None:
        """The new id of the entry that a reference means; None if there is no such entry."""
        found = self._exact.get(value)
        return self._alike.get(identity(value)) if found is None else found

    def add(self, value: Any, ident: int) -> None:
        """Lets references to `value` mean the entry with the new id `ident` as well."""
        self._exact.setdefault(value, ident)
        self._alike.setdefault(identity(value), ident)
