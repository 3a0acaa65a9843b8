"""The index of a zoo, and its files, none of which is handed out before its hash has been checked.

`index.json` is `{"models": [...]}`: how each model was trained, and the hashes of its files,
which lie in `<name>/<id>/`. The index of this package also lists, under `"published"`, what
others have published.
"""

import hashlib
import os
import re
import tempfile
from http.client import HTTPException
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import HTTPURLHandler

from ghm_d2.errors import UserError, reason, shown
from ghm_d2.files import bounded_downloads, read_json

ZOO_VARIABLE = "GHM_D2_ZOO"
PACKAGED_INDEX = Path(__file__).with_name("index.json")

# A name becomes a path below the zoo and below the cache, and must not lead out of either.
NAME = re.compile(r"(?!\.)[\w.+-]+(/(?!\.)[\w.+-]+)*")
_FORMS = {
    "name": NAME,
    "weights": r"model_final_[0-9a-f]{6}\.pkl",
    "md5": r"[0-9a-f]{32}",
    "sha256": r"[0-9a-f]{64}",
    "config_sha256": r"[0-9a-f]{64}",
}
_SCHEMES = ("http://", "https://")


class ZooError(RuntimeError, UserError):
    """A file is not in the zoo, or not the recorded one; a RuntimeError, as Detectron2 raises."""


def read_index(file: str | Path) -> dict[str, Any]:
    """Reads an index and checks the fields that become paths and hashes.

    Raises:
        UserError: the file cannot be read or is no index.
    """
    index = read_json(file)
    models = index.get("models") if isinstance(index, dict) else None
    if not isinstance(models, list) or not all(isinstance(entry, dict) for entry in models):
        raise UserError(f'{file} is not a model zoo index: it has no list "models".')
    for entry in models:
        for field, form in _FORMS.items():
            if not re.fullmatch(form, str(entry.get(field))):
                raise UserError(
                    f"{file} is not a valid model zoo index: the {field} of a model is "
                    f"{shown(repr(entry.get(field)))}."
                )
        if type(entry.get("id")) is not int or entry["id"] < 1:
            raise UserError(f"{file}: the id of {entry['name']} is {entry.get('id')!r}.")
    return index


def newest(models: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The model of this name with the largest id, or None."""
    found = [entry for entry in models if entry["name"] == name]
    return max(found, key=lambda entry: entry["id"], default=None)


def weights_file(entry: dict[str, Any]) -> str:
    """Path of a model's weights in its zoo."""
    return f"{entry['name']}/{entry['id']}/{entry['weights']}"


def config_file(entry: dict[str, Any]) -> str:
    """Path of a model's full config in its zoo."""
    return f"{entry['name']}/{entry['id']}/config.yaml"


def zoo_location() -> str | None:
    """The folder or URL prefix that `GHM_D2_ZOO` names, without a closing slash, or None.

    Raises:
        ZooError: it is neither.
    """
    zoo = os.environ.get(ZOO_VARIABLE, "").rstrip("/")
    if "://" in zoo and not zoo.startswith(_SCHEMES):
        raise ZooError(
            f"{ZOO_VARIABLE} is {zoo}: it must be a folder or start with {' or '.join(_SCHEMES)}."
        )
    return zoo or None


def read_zoo(zoo: str) -> dict[str, Any]:
    """The index of a zoo; from a URL it is downloaded each time, because it changes.

    Raises:
        UserError: there is no valid index.
    """
    if not zoo.startswith(_SCHEMES):
        return read_index(os.path.join(zoo, "index.json"))
    with tempfile.TemporaryDirectory() as folder:
        try:
            with bounded_downloads():
                file = HTTPURLHandler()._get_local_path(f"{zoo}/index.json", cache_dir=folder)
        except (OSError, HTTPException) as error:
            raise ZooError(f"{zoo}/index.json cannot be fetched ({reason(error)}).") from error
        return read_index(file)


def fetch(zoo: str, file: str, sha256: str) -> str:
    """Path or URL of a file of the zoo; opening it through PathManager gives checked content.

    Args:
        zoo: a folder or URL prefix.
        file: path in the zoo.
        sha256: recorded hash.

    Raises:
        ZooError: in a folder, the file is missing or has another hash. A URL is checked when it
            is opened.
    """
    if zoo.startswith(_SCHEMES):
        register_zoo()
        return f"{zoo}/{file}"
    path = os.path.join(zoo, file)
    try:
        found = digest(path)
    except OSError as error:
        raise ZooError(
            f"{path}, which the index lists, cannot be read ({reason(error)})."
        ) from error
    if found != sha256:
        raise _mismatch(path, found, sha256)
    return path


def register_zoo() -> None:
    """Has PathManager check what it downloads from `GHM_D2_ZOO`, where that is a URL."""
    zoo = os.environ.get(ZOO_VARIABLE, "").rstrip("/")
    if zoo.startswith(_SCHEMES):
        PathManager.register_handler(_ZooHandler(zoo))


class _ZooHandler(HTTPURLHandler):
    """iopath's downloads and cache for one zoo, checked against its index."""

    def __init__(self, zoo: str) -> None:
        super().__init__()
        self._zoo = zoo
        self._checksums: dict[str, str] = {}

    def _get_supported_prefixes(self) -> list[str]:
        return [f"{self._zoo}/"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        if not self._checksums:
            # The packaged index comes last: a mirror must not overrule what this release records.
            for entry in [*read_zoo(self._zoo)["models"], *read_index(PACKAGED_INDEX)["models"]]:
                self._checksums[weights_file(entry)] = entry["sha256"]
                self._checksums[config_file(entry)] = entry["config_sha256"]
        expected = self._checksums.get(path.removeprefix(f"{self._zoo}/"))
        if expected is None:
            raise ZooError(f"{path} is not listed in {self._zoo}/index.json.")
        for _ in range(2):
            with bounded_downloads():
                local = super()._get_local_path(path, force, **kwargs)
            found = digest(local)
            if found == expected:
                return local
            # It was damaged in the cache or on the way, or it is another zoo's, because the cache
            # does not tell hosts apart. Once deleted, it is downloaded again.
            os.unlink(local)
        raise _mismatch(path, found, expected)


def digest(path: str | Path, kind: str = "sha256") -> str:
    """The hash of a file in hexadecimal digits; md5 only names files, as in Detectron2's zoo."""
    return hashlib.new(kind, Path(path).read_bytes(), usedforsecurity=kind != "md5").hexdigest()


def _mismatch(path: str, found: str, expected: str) -> ZooError:
    return ZooError(
        f"{path} is not the file that the index records (SHA-256 {found} instead of {expected}) "
        "and was not opened: restore it, or export the model again."
    )
