"""What the restricted unpickler shares with the values that it builds.

Their budget, their refusals, and the objects that take the place of what is not built.
"""

import pickle
from collections.abc import Callable
from typing import Any

import torch

_FREE = 64 * 2**20  # bytes for a file of any size: in it, an empty list is a single byte


class RefusedError(pickle.UnpicklingError):
    """The file holds something that is neither weights nor plain data."""


class Budget:
    """The memory that a file may take, in bytes."""

    def __init__(self, size: int) -> None:
        """
        Args:
            size: of the file in bytes; what is read from it is not counted.
        """
        self._left = 2 * size + _FREE

    def spend(self, amount: int) -> None:
        """Takes `amount` bytes.

        Raises:
            RefusedError: there are no more.
        """
        self._left -= amount
        if self._left < 0:
            raise RefusedError("more objects than a file of its size can have")


class Record:
    """A tensor's storage while a file is checked: its size and type, and no data."""

    def __init__(self, dtype: torch.dtype, elements: int) -> None:
        self.dtype = dtype
        self._bytes = elements * dtype.itemsize

    def nbytes(self) -> int:
        """The size that the file claims."""
        return self._bytes


class Inert:
    """Takes whatever a pickle gives to an object and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _take(self, *args: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = _take


def _inert(name: str) -> type:
    return type(name.rpartition(".")[2], (Inert,), {"__slots__": ()})


# Logs and settings that checkpoints carry beside their weights; nothing here reads them.
INERT = {
    name: _inert(name)
    for name in (
        "addict.addict.Dict",
        "argparse.Namespace",
        "mmcv.utils.config.Config",
        "mmcv.utils.config.ConfigDict",
        "mmengine.config.config.Config",
        "mmengine.config.config.ConfigDict",
        "mmengine.logging.history_buffer.HistoryBuffer",
        "mmengine.logging.message_hub.MessageHub",
    )
}


class Function:
    """A function that a pickle may call; it gets the unpickler and the pickle's arguments."""

    __slots__ = ("call",)

    def __init__(self, call: Callable) -> None:
        self.call = call


def need(condition: bool, what: str) -> None:
    if not condition:
        raise RefusedError(what)


def are(kind: type | tuple, *values: Any) -> bool:
    """Whether all are of these very types, not of derived ones."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return all(type(x) in kinds for x in values)
