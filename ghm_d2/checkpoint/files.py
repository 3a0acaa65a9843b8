"""Checkpoint files: fetched, unwrapped, and written whole or not at all."""

import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ghm_d2.errors import UserError, reason, shown
from ghm_d2.files import bounded_downloads, whole_file, write_text

from .opening import load_file

_LONGEST_NAME = 500

logger = logging.getLogger(__name__)


def fetch(path: str) -> str:
    """The local copy of a file or URL; a download shows its progress and is kept in the cache.

    Raises:
        UserError: it cannot be fetched or does not exist; the message starts with `path`.
    """
    try:
        with bounded_downloads():
            local = PathManager.get_local_path(path)
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise UserError(f"{path} cannot be fetched ({reason(error)})") from error
    if not os.path.isfile(local):
        raise UserError(f"{path} does not exist")
    return local


def read_checkpoint(path: str, output: str) -> dict[str, Any]:
    """Opens a checkpoint, a file or URL, that is to be converted to `output`.

    Raises:
        UserError: it cannot be fetched or opened, does not hold a dictionary, or is the same file
            as `output`.
    """
    local = fetch(path)
    if os.path.exists(output) and os.path.samefile(local, output):
        raise UserError(f"{output} is the file to convert: give another name to write to.")
    checkpoint = load_file(local)
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path} holds a {type(checkpoint).__name__} instead of tensors by their names."
        )
    return checkpoint


def unwrap(
    checkpoint: Mapping[str, Any], *keys: str, used: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The tensors by their names, found under one of `keys` or at the top level.

    NumPy arrays become tensors, and DataParallel's prefix `module.` is removed. A warning names the
    entries beside the weights that are not in `used`.

    Raises:
        UserError: something among the weights is not a tensor, or has an invalid name.
    """
    key = next((key for key in keys if key in checkpoint), None)
    state = checkpoint if key is None else checkpoint[key]
    others = [] if key is None else sorted(str(x) for x in checkpoint if x not in (key, *used))
    if others:
        logger.warning(
            "%d entries besides the weights left out: %s", len(others), shown(", ".join(others))
        )
    if not isinstance(state, dict):
        raise UserError(f"its weights are a {type(state).__name__} instead of tensors by names.")
    tensors = {}
    for name, value in state.items():
        check_name(name)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UserError(f"{name} is a {kind} among the weights, where tensors belong.")
        tensors[name.removeprefix("module.")] = value
    return tensors


def check_name(name: Any) -> None:
    """Refuses a name that no tensor of a module has; logs and messages list these names.

    Raises:
        UserError: it is not text, is too long, or holds control characters.
    """
    if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise UserError(f"there is a tensor with the name {shown(repr(name), 80)}.")


def write_checkpoint(path: str, checkpoint: Mapping[str, Any]) -> None:
    """Writes `checkpoint` with `torch.save`, or where the name ends in .pkl as a pickle.

    The pickle has NumPy arrays in place of tensors, as Detectron2's have.

    Raises:
        UserError: the file cannot be written.
    """
    with whole_file(path) as file:
        if path.endswith(".pkl"):
            arrays = {
                key: {n: x.numpy() if isinstance(x, Tensor) else x for n, x in value.items()}
                for key, value in checkpoint.items()
                if isinstance(value, dict)
            }
            _Pickler(file, protocol=3).dump({**checkpoint, **arrays})
        else:
            torch.save(dict(checkpoint), file)


class _Pickler(pickle.Pickler):
    """Avoids the private modules of NumPy, whose names differ between NumPy 1 and 2."""

    def reducer_override(self, obj: Any) -> Any:
        """Reduces an array to an empty one that takes the state which NumPy would pickle."""
        if type(obj) is not np.ndarray:
            return NotImplemented
        return np.ndarray, ((0,), "b"), obj.__reduce__()[2]


def write_config(path: str, settings: Mapping[str, Any], comment: str) -> None:
    """Writes `settings`, keys such as "MODEL.RESNETS.DEPTH", as a config file for train_net.py.

    Raises:
        UserError: the file cannot be written.
    """
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    text = f"# {comment}\n" + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)
    write_text(path, text)
