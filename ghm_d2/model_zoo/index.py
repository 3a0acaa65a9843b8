"""The index of a zoo: which models it holds, how they were trained, and the hash of each file.

``index.json`` is ``{"models": [...]}``; the one of this package also lists, under ``"published"``,
what others have published. A model lies in ``<name>/<id>/`` of its zoo, beside its configs.
"""

import re
from pathlib import Path
from typing import Any

from ghm_d2.errors import UserError, shown
from ghm_d2.files import read_json, write_json

__all__ = [
    "NAME",
    "PACKAGED_INDEX",
    "checksums",
    "config_file",
    "newest",
    "read_index",
    "weights_file",
    "write_index",
]

PACKAGED_INDEX = Path(__file__).with_name("index.json")

# It becomes a path below the zoo and below the cache, and must not lead out of them.
NAME = re.compile(r"(?!\.)[\w.+-]+(/(?!\.)[\w.+-]+)*")
_FORMS = {
    "name": NAME,
    "weights": r"model_final_[0-9a-f]{6}\.pkl",
    "md5": r"[0-9a-f]{32}",
    "sha256": r"[0-9a-f]{64}",
    "config_sha256": r"[0-9a-f]{64}",
}


def read_index(file: str | Path) -> dict[str, Any]:
    """Read an index and check what paths and hashes are made of.

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


def write_index(file: str | Path, index: dict[str, Any]) -> None:
    """Replace ``file`` by ``index``, at once.

    Raises:
        UserError: it cannot be written.
    """
    write_json(file, index, indent=2)


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


def checksums(models: list[dict[str, Any]]) -> dict[str, str]:
    """Path in the zoo to SHA-256, of every file that may be fetched."""
    return {weights_file(entry): entry["sha256"] for entry in models} | {
        config_file(entry): entry["config_sha256"] for entry in models
    }
