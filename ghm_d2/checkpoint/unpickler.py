"""The one way in which this project opens a checkpoint: nothing that the file names is run.

A pickle may call any function that it can name. Here it can name tensors, NumPy arrays and plain
containers; known classes of logs and settings become objects that keep nothing; the rest is
refused. What can be named cannot be changed either: functions stand behind objects without
attributes, and the classes are built-in ones.
"""

import io
import os
import pickle
import re
import tarfile
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch

from ghm_d2.errors import UserError, cannot, reason

__all__ = ["load_file"]

# Python 2's and NumPy 1's names of the modules.
_RENAMED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
}

# Logs and settings that checkpoints carry beside their weights; nothing here reads them.
_INERT = {
    "addict.addict.Dict",
    "argparse.Namespace",
    "mmcv.utils.config.Config",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.Config",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.logging.message_hub.MessageHub",
}


class _Refused(pickle.UnpicklingError):
    """The file holds something that is neither weights nor plain data."""


class _Inert:
    """Takes whatever a pickle gives to an object and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _take(self, *args: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = _take


class _Function:
    """A function that a pickle may call; pickle's BUILD cannot set an attribute of it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("a changed function")


def _ndarray(*arguments: Any) -> np.ndarray:
    if arguments != ((0,), "b"):
        raise _Refused("a NumPy array of an unknown kind")
    return np.empty(0, np.int8)  # __setstate__ gives it its type, shape and data


def _reconstruct(subtype: Any, *_: Any) -> np.ndarray:
    if subtype is not _NDARRAY:
        raise _Refused("a NumPy array of an unknown kind")
    return np.empty(0, np.int8)  # __setstate__ gives it its type, shape and data


def _dtype(code: str, *_: Any) -> np.dtype:
    if not re.fullmatch(r"[biufcSU]\d+", code):
        raise _Refused(f"a NumPy array of type {code!r}")
    return np.dtype(code, False, True)  # a copy: __setstate__ writes the byte order into it


def _dtype_state(dtype: np.dtype, state: Any) -> tuple:
    """What `dtype` may be given: a flag of objects among its items would crash the process."""
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
    order = order.decode("latin1") if isinstance(order, bytes) else order
    if order not in ("<", ">", "|", "="):
        raise _Refused("a NumPy type without a byte order")
    text = dtype.kind in "SU"  # the others know their size
    size, alignment = (dtype.itemsize, dtype.alignment) if text else (-1, -1)
    return (3, order, None, None, None, size, alignment, 0)


def _scalar(dtype: np.dtype, data: bytes | str) -> np.generic:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype)[0]


def _frombuffer(data: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise _Refused(f"text in the encoding {encoding}")
    return text.encode("latin1")


def _reconstructor(cls: Any, *_: Any) -> _Inert:
    if not (isinstance(cls, type) and issubclass(cls, _Inert)):
        raise _Refused("an object built by copyreg._reconstructor")
    return cls()


def _storage(data: bytes) -> Any:
    """How pickle, unlike torch.save, keeps a tensor's data: a file of torch.save inside."""
    return _load_torch(io.BytesIO(data))


_NDARRAY = _Function(_ndarray)
_FUNCTIONS: dict[str, Callable] = {
    "_codecs.encode": _encode,
    "collections.Counter": Counter,
    "copyreg._reconstructor": _reconstructor,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _frombuffer,
    "numpy.dtype": _dtype,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch.storage._load_from_bytes": _storage,
}
_BUILTINS = (
    bool,
    bytearray,
    bytes,
    complex,
    dict,
    float,
    frozenset,
    int,
    list,
    object,
    set,
    str,
    tuple,
)
_ALLOWED: dict[str, Any] = {
    **{f"builtins.{cls.__name__}": cls for cls in _BUILTINS},
    **{f"collections.{cls.__name__}": cls for cls in (OrderedDict, defaultdict, deque)},
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    **{f"torch.{name}": x for name, x in vars(torch).items() if isinstance(x, torch.dtype)},
    **{name: _Function(function) for name, function in _FUNCTIONS.items()},
    "numpy.ndarray": _NDARRAY,
}


class _Unpickler(pickle._Unpickler):
    """Python's own: in C, what BUILD does to an object cannot be looked at."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        """BUILD. A NumPy dtype takes its byte order alone: its flags would be believed."""
        if isinstance(self.stack[-2], np.dtype):
            self.stack[-1] = _dtype_state(self.stack[-2], self.stack[-1])
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def __init__(self, file: IO[bytes], **kwargs: Any) -> None:
        super().__init__(file, **kwargs)
        self._inert: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full in _ALLOWED:
            return _ALLOWED[full]
        if full in _INERT:
            # A class for each file: what a pickle does to it ends with the file.
            return self._inert.setdefault(full, type(name, (_Inert,), {}))
        raise _Refused(full)


def _load(file: IO[bytes], **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


# What torch.load wants of a pickle module.
_PICKLE_MODULE = types.SimpleNamespace(__name__="restricted", Unpickler=_Unpickler, load=_load)


def _load_torch(file: IO[bytes]) -> Any:
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if is_zip:
        # The reader that torch.load will use, so that both see the same content.
        if torch._C.PyTorchFileReader(file).has_record("constants.pkl"):
            raise _Refused("a TorchScript program")
    elif tarfile.is_tarfile(file):  # PyTorch's format before 0.2
        raise _Refused("a tar archive")
    file.seek(0)
    return torch.load(file, map_location="cpu", pickle_module=_PICKLE_MODULE, weights_only=False)


def load_file(path: str | os.PathLike, *, trusted: bool = False) -> Any:
    """Opens a checkpoint: a pickle where the name ends in .pkl, else a file of ``torch.save``.

    Args:
        path: a local file.
        trusted: whether the file may run code, as one that its user wrote may.

    Returns:
        What the file holds; tensors are on the CPU. Text that Python 2 pickled is read as Latin-1,
        as Detectron2 does.

    Raises:
        UserError: the file cannot be read, is damaged, or holds anything but tensors, NumPy arrays,
            plain containers and known classes of logs and settings.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            if trusted:
                if path.endswith(".pkl"):
                    return pickle.load(file, encoding="latin1")
                return torch.load(file, map_location="cpu", weights_only=False)
            if path.endswith(".pkl"):
                return _load(file, encoding="latin1")
            return _load_torch(file)
    except _Refused as error:
        raise UserError(
            f"{path} holds {error}, which is not weights and could run code, so the file was not "
            "opened: save its weights alone with the software that wrote it, or, where you trust "
            "who wrote it with this machine, give --trust-checkpoint to train_net.py."
        ) from error
    except OSError as error:
        raise cannot("read", path, error) from error
    # A damaged pickle is a random program: it can fail with any exception.
    except Exception as error:
        raise UserError(
            f"{path} is not a file of weights, or a damaged one ({reason(error)}): fetch or "
            "save it again."
        ) from error
