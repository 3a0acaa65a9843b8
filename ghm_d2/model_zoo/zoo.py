"""Where the zoo is, and its files, none of which is handed out before its hash was checked."""

import hashlib
import os
import tempfile
from http.client import HTTPException
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import HTTPURLHandler

from ghm_d2.errors import UserError, reason
from ghm_d2.model_zoo.index import PACKAGED_INDEX, checksums, read_index

__all__ = ["ZooError", "ZOO_VARIABLE", "fetch", "read_zoo", "register_zoo", "zoo_location"]

ZOO_VARIABLE = "GHM_D2_ZOO"
_SCHEMES = ("http://", "https://")


class ZooError(RuntimeError, UserError):
    """Something is not in the zoo or not what the index says; a RuntimeError, as Detectron2's."""


def zoo_location() -> str | None:
    """The folder or URL prefix that ``GHM_D2_ZOO`` names, without a closing slash, or None.

    Raises:
        ZooError: it is neither.
    """
    zoo = os.environ.get(ZOO_VARIABLE, "").rstrip("/")
    if not zoo:
        return None
    if "://" in zoo and not zoo.startswith(_SCHEMES):
        raise ZooError(
            f"{ZOO_VARIABLE} is {zoo}: it must be a folder or start with {' or '.join(_SCHEMES)}."
        )
    return zoo


def _is_url(zoo: str) -> bool:
    return zoo.startswith(_SCHEMES)


def read_zoo(zoo: str) -> dict[str, Any]:
    """The index of a zoo; of a URL it is downloaded each time, because it changes.

    Raises:
        UserError: there is no valid index.
    """
    if not _is_url(zoo):
        return read_index(os.path.join(zoo, "index.json"))
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = HTTPURLHandler()._get_local_path(f"{zoo}/index.json", cache_dir=folder)
        except (OSError, HTTPException) as error:
            raise ZooError(f"{zoo}/index.json cannot be fetched ({reason(error)}).") from error
        return read_index(file)


def fetch(zoo: str, file: str, sha256: str) -> str:
    """Path or URL of a file of the zoo; opening it through PathManager gives the checked content.

    Args:
        zoo: a folder or URL prefix.
        file: path in the zoo.
        sha256: recorded hash.

    Raises:
        ZooError: a folder holds another content, or none. A URL is checked when it is opened.
    """
    if _is_url(zoo):
        register_zoo()
        return f"{zoo}/{file}"
    path = os.path.join(zoo, file)
    try:
        found = sha256_of(path)
    except OSError as error:
        raise ZooError(
            f"{path}, which the index lists, cannot be read ({reason(error)})."
        ) from error
    if found != sha256:
        raise ZooError(_mismatch(path, found, sha256))
    return path


def register_zoo() -> None:
    """Have PathManager check what it downloads from ``GHM_D2_ZOO``, where that is a URL."""
    zoo = os.environ.get(ZOO_VARIABLE, "").rstrip("/")
    if _is_url(zoo):
        PathManager.register_handler(_ZooHandler(zoo))


class _ZooHandler(HTTPURLHandler):
    """iopath's downloads and cache for one zoo, checked against its index."""

    def __init__(self, zoo: str) -> None:
        super().__init__()
        self._zoo = zoo
        self._checksums: dict[str, str] | None = None

    def _get_supported_prefixes(self) -> list[str]:
        return [f"{self._zoo}/"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        if self._checksums is None:
            # What this release lists itself counts for more than what a mirror says of it.
            models = [*read_zoo(self._zoo)["models"], *read_index(PACKAGED_INDEX)["models"]]
            self._checksums = checksums(models)
        expected = self._checksums.get(path.removeprefix(f"{self._zoo}/"))
        if expected is None:
            raise ZooError(f"{path} is not listed in {self._zoo}/index.json.")
        for _ in range(2):
            local = super()._get_local_path(path, force, **kwargs)
            found = sha256_of(local)
            if found == expected:
                return local
            # Damaged in the cache or on the way, or of another zoo: iopath's cache names no host.
            os.unlink(local)
        raise ZooError(_mismatch(path, found, expected))


def sha256_of(path: str) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _mismatch(path: str, found: str, expected: str) -> str:
    return (
        f"{path} is not the file that the index records (SHA-256 {found} instead of {expected}) "
        "and was not opened: restore it, or export the model again."
    )
