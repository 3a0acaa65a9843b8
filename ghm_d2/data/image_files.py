"""The image files that an annotation file means, also where it spells their names differently."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from urllib.parse import unquote

from ghm_d2.errors import shown

_SPELLINGS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("% escapes", unquote),
    ("another Unicode form", partial(unicodedata.normalize, "NFC")),
    ("upper or lower case", str.casefold),
)


class Found:
    """Where an image is.

    Attributes:
        path: of the file; None where there is none, or more than one that may be meant.
        words: how its name differs from the one that was asked for, or why there is no path; empty
            where the file lies where the name says.
    """

    def __init__(self, path: str | None, words: str = "") -> None:
        self.path, self.words = path, words


def find_images(names: Sequence[str], root: str) -> list[Found]:
    """The file of each name.

    If there is no file at a name, its base name is looked for in the folder and those below; of
    several such files, the one whose folders agree best with the name is taken.

    Args:
        names: relative to `root`, or absolute.
        root: the folder of the images.
    """
    places = [os.path.join(root, name) for name in names]
    found = [Found(place) if os.path.isfile(place) else None for place in places]
    if None not in found:
        return found  # type: ignore[return-value]
    index = _Index(root)
    complete = [place or index.find(name) for place, name in zip(found, names, strict=True)]
    return _without_mistaken(complete, names)


def same_file(name: str) -> str:
    """A key that is the same for all spellings of one name."""
    return "/".join(_parts(name))


def _parts(name: str) -> list[str]:
    text = unquote(name).replace("\\", "/")
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return [part for part in text.split("/") if part not in ("", ".")]


class _Index:
    """All files below a folder, by their base names in one spelling."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._files: dict[str, list[tuple[list[str], str]]] = defaultdict(list)
        for folder, _, files in os.walk(root):
            for file in files:
                path = os.path.join(folder, file)
                parts = _parts(os.path.relpath(path, root))
                self._files[parts[-1]].append((parts, path))

    def find(self, name: str) -> Found:
        parts = _parts(name)
        candidates = self._files.get(parts[-1], []) if parts else []
        scores = [_common_end(parts, other) for other, _ in candidates]
        best = [path for (_, path), s in zip(candidates, scores, strict=True) if s == max(scores)]
        if len(best) == 1:
            return Found(best[0], _difference(name, os.path.relpath(best[0], self._root)))
        if best:
            return Found(None, f"{len(best)} files have its base name, such as {shown(best[0])}")
        return Found(None)


def _common_end(first: Sequence[str], second: Sequence[str]) -> int:
    number = 0
    for a, b in zip(reversed(first), reversed(second), strict=False):
        if a != b:
            break
        number += 1
    return number


def _difference(name: str, file: str) -> str:
    words = []
    folder, _, base = name.replace("\\", "/").rpartition("/")
    other_folder, _, other = file.replace(os.sep, "/").rpartition("/")
    if "\\" in name:
        words.append("backslashes")
    for word, change in _SPELLINGS:
        if base != other and (change(base), change(other)) != (base, other):
            base, other = change(base), change(other)
            words.append(word)
    if _parts(folder) != _parts(other_folder):
        words.append("other folders")
    return ", ".join(words) or "another spelling of its folders"


def _without_mistaken(found: Iterable[Found], names: Sequence[str]) -> list[Found]:
    """Takes a file away from names that only share its base name with another one's.

    "a/0.png" and "b/0.png" are two images; where only one of them is there, the other is missing.
    """
    owners: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    complete = list(found)
    for place, name in zip(complete, names, strict=True):
        if place.path:
            owners[os.path.realpath(place.path)].add(tuple(_parts(name)))
    for i, place in enumerate(complete):
        if not place.path or not place.words:
            continue
        claims = owners[os.path.realpath(place.path)]
        longest = max(claims, key=len)
        if any(longest[len(longest) - len(claim) :] != claim for claim in claims):
            complete[i] = Found(None, f"{shown(place.path)} belongs to another entry")
    return complete
