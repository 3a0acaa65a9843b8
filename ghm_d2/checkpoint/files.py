"""Files: fetched, unwrapped, and written whole or not at all."""

import contextlib
import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from typing import IO, Any

import numpy as np
import torch
import yaml
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ghm_d2.errors import UserError

from .unpickler import load_file

__all__ = [
    "PART",
    "fetch",
    "read_checkpoint",
    "unwrap",
    "whole_file",
    "write_checkpoint",
    "write_config",
]

logger = logging.getLogger(__name__)

PART = ".part"  # end of the name of a file that is being written


def fetch(path: str) -> str:
    """The local copy of a file or URL; a download shows its progress and is kept in the cache.

    Raises:
        UserError: it cannot be had; the message starts with `path`.
    """
    try:
        local = PathManager.get_local_path(path)
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise UserError(f"{path} cannot be fetched ({' '.join(str(error).split())})") from error
    if not os.path.isfile(local):
        raise UserError(f"{path} does not exist")
    return local


def read_checkpoint(path: str, output: str) -> dict[str, Any]:
    """Opens a checkpoint that may be a URL and is to become `output`.

    Raises:
        UserError: as :func:`~ghm_d2.checkpoint.load_file`, or the two are the same file.
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
    """The tensors by their names, which may lie under one of `keys`.

    NumPy arrays become tensors, and the prefix that DataParallel adds goes. What lies beside them
    and is not `used` is a warning.

    Raises:
        UserError: there is something else among them.
    """
    key = next((key for key in keys if key in checkpoint), None)
    state = checkpoint if key is None else checkpoint[key]
    others = [] if key is None else sorted(str(x) for x in checkpoint if x not in (key, *used))
    if others:
        logger.warning(
            "%d entries besides the weights left out: %s", len(others), ", ".join(others)
        )
    if not isinstance(state, dict):
        raise UserError(f"its weights are a {type(state).__name__} instead of tensors by names.")
    tensors = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UserError(f"{name} is a {kind} among the weights, where tensors belong.")
        tensors[str(name).removeprefix("module.")] = value
    return tensors


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[IO[bytes]]:
    """A file that appears under its name once it is complete and on the disk.

    It is written beside its place as `path` + `PART`, which only a killed process leaves behind.

    Raises:
        UserError: it cannot be written; a file that was there before is still there.
    """
    part = path + PART
    try:
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        # torch.save hides the error of the file behind a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path} cannot be written ({cause.strerror or cause}).") from error
    finally:
        if os.path.isfile(part):
            os.unlink(part)


def _sync_folder(folder: str) -> None:
    """Makes a change of names outlive a power failure, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(path: str, checkpoint: Mapping[str, Any]) -> None:
    """Writes `checkpoint` with ``torch.save``, or where the name ends in .pkl as a pickle.

    The pickle has NumPy arrays in place of tensors, as Detectron2's have.

    Raises:
        UserError: the file cannot be written.
    """
    with whole_file(path) as file:
        if path.endswith(".pkl"):
            arrays = {
                key: {name: x.numpy() for name, x in value.items()}
                for key, value in checkpoint.items()
                if isinstance(value, dict)
            }
            pickle.dump({**checkpoint, **arrays}, file)
        else:
            torch.save(dict(checkpoint), file)


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
    with whole_file(path) as file:
        file.write(text.encode())
