"""What a pickle may name: each behind a function that checks its arguments.

A file builds values that are inert and own their memory, and pays for each copy from
a :class:`~.pickle_base.Budget` that follows its size. Known classes of logs and settings become
objects that keep nothing; the rest is refused.
"""

import math
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .pickle_base import INERT, Function, Inert, Record, are, need

if TYPE_CHECKING:
    from .unpickler import Unpickler

_NAMES = {name: x for name, x in vars(torch).items() if isinstance(x, torch.dtype)}
_FACTORIES = (bool, dict, float, int, list, set, str, tuple)  # of a defaultdict


# --- NumPy ----------------------------------------------------------------------------------------


def _array(machine: "Unpickler", *arguments: Any) -> np.ndarray:
    subtype = arguments[0] if len(arguments) == 3 else NUMPY["numpy.ndarray"]
    plain = subtype is NUMPY["numpy.ndarray"] and arguments[-2] == (0,)
    need(plain and arguments[-1] in ("b", b"b"), "a NumPy array of an unknown kind")
    return machine.unbuilt(np.empty(0, np.int8))  # BUILD gives it its type, shape and data


def _dtype(machine: "Unpickler", code: Any, *_: Any) -> np.dtype:
    known = are(str, code) and re.fullmatch(r"[biufc]\d{1,2}|[SU][1-9]\d{0,8}", code)
    need(bool(known), f"a NumPy array of type {code!r}" if are(str, code) else "a NumPy type")
    return machine.unbuilt(np.dtype(code, False, True))  # a copy: BUILD writes the byte order


def build_dtype(dtype: np.dtype, state: Any) -> None:
    """Accepts only what NumPy writes: it would believe a forged flag that items are objects."""
    states = [dtype.newbyteorder(order).__reduce__()[2] for order in "<>"]
    need(are(tuple, state) and state in states, "a NumPy type of another kind")
    dtype.__setstate__(state)


def build_array(machine: "Unpickler", array: np.ndarray, state: Any) -> None:
    need(are(tuple, state) and len(state) in (4, 5), "a NumPy array of an unknown kind")
    shape, dtype, fortran, data = state[-4:]
    own = _own_data(machine, data, dtype, shape)
    # NumPy uses these bytes as the array's memory, so nothing else may hold them.
    array.__setstate__((1, shape, dtype, bool(fortran), own))


def _own_data(machine: "Unpickler", data: Any, dtype: Any, shape: Any) -> bytes:
    """A copy of the data of an array or scalar; refused unless it fits the type and shape."""
    need(isinstance(dtype, np.dtype) and machine.is_built(dtype), "a NumPy type of another kind")
    need(are((str, bytes, bytearray), data), "a NumPy array without its data")
    need(are(tuple, shape) and are(int, *shape), "a NumPy array without its shape")
    need(min(shape, default=0) >= 0, "a NumPy array of negative size")
    need(len(data) == math.prod(shape) * dtype.itemsize, "a NumPy array of another size")
    machine.budget.spend(len(data))
    own = data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))
    # A truth value above 1 makes NumPy write past the end of arrays, and a character above
    # 0x10FFFF is not Unicode.
    if dtype.kind == "b":
        need(not own.strip(b"\0\1"), "truth values that are neither true nor false")
    if dtype.kind == "U" and own:
        order = "<" if dtype.newbyteorder("<") == dtype else ">"
        need(np.frombuffer(own, f"{order}u4").max() <= 0x10FFFF, "text that is none")
    return own


def _scalar(machine: "Unpickler", dtype: Any, data: Any) -> np.generic:
    return np.frombuffer(_own_data(machine, data, dtype, ()), dtype)[0]


def _from_buffer(machine: "Unpickler", data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    need(order in ("C", "F"), "a NumPy array of an unknown kind")
    own = bytearray(_own_data(machine, data, dtype, shape))
    return np.frombuffer(own, dtype).reshape(shape, order=order)


# --- tensors --------------------------------------------------------------------------------------


def _tensor(machine: "Unpickler", storage: Any, offset: Any, size: Any, stride: Any, *rest: Any):
    """Stands for `_rebuild_tensor`, `_v2` (requires_grad, hooks) and `_v3` (also the dtype)."""
    need(are((Record, torch.storage.TypedStorage), storage), "a tensor without its data")
    need(not any(rest[1:2]) and not any(rest[3:]), "a tensor with hooks or more about it")
    dtype = rest[2] if len(rest) > 2 and rest[2] else storage.dtype
    need(isinstance(dtype, torch.dtype), "a tensor of an unknown type")
    need(are((tuple, torch.Size), size) and are(tuple, stride), "a tensor without its shape")
    need(len(size) == len(stride) <= 64 and are(int, offset, *size, *stride), "a tensor's shape")
    data = storage if isinstance(storage, Record) else storage._untyped_storage
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    end = last + 1 if all(size) else offset
    inside = min(offset, *size, *stride, 0) >= 0 and end * dtype.itemsize <= data.nbytes()
    need(inside, "a tensor that reaches out of its data")
    if isinstance(storage, Record):
        return torch.empty(0, dtype=dtype)
    tensor = torch.empty(0, dtype=dtype)
    return tensor.set_(data, offset, tuple(size), stride)


def _parameter(machine: "Unpickler", data: Any, requires_grad: Any, hooks: Any) -> Any:
    need(are(torch.Tensor, data) and not hooks, "a parameter with more than a tensor")
    return torch.nn.Parameter(data, requires_grad=False)


# --- containers and values ------------------------------------------------------------------------


def _encode(machine: "Unpickler", text: Any, encoding: Any) -> bytes:
    need(are(str, text) and encoding in ("latin1", "latin-1"), "text in an unknown encoding")
    machine.budget.spend(len(text))
    return text.encode("latin1")


def byte_array(machine: "Unpickler", data: Any = b"", *encoding: Any) -> bytearray:
    data = _encode(machine, data, *encoding) if encoding else data
    need(are(bytes, data), "an array of bytes without them")
    machine.budget.spend(len(data))
    return bytearray(data)


def set_of(kind: Callable) -> Callable:
    def make(machine: "Unpickler", items: Any = ()) -> Any:
        need(are((list, tuple), items), "a set without its items")
        machine.budget.spend(128 * len(items) + 256)
        machine.check_keys(items)
        return kind(items)

    return make


def _counter(machine: "Unpickler", counts: Any = None) -> Counter:
    need(counts is None or are(dict, counts), "counts without their names")
    machine.budget.spend(128 * len(counts or ()) + 256)
    return Counter(counts)


def _ordered(machine: "Unpickler", pairs: Any = ()) -> OrderedDict:
    need(are((list, tuple), pairs) and are((list, tuple), *pairs), "a dictionary without pairs")
    machine.budget.spend(256 * len(pairs) + 256)
    need(all(len(pair) == 2 for pair in pairs), "a dictionary without pairs")
    machine.check_keys([key for key, _ in pairs])
    return OrderedDict(pairs)


def _default(machine: "Unpickler", factory: Any = None) -> defaultdict:
    need(factory is None or factory in _FACTORIES, "a dictionary that calls a function")
    return defaultdict(factory)


def _deque(machine: "Unpickler", items: Any = (), longest: Any = None) -> deque:
    need(items == () and are((int, type(None)), longest), "a queue of an unknown kind")
    machine.budget.spend(640)
    return deque((), longest)


def _complex(machine: "Unpickler", real: Any, imaginary: Any) -> complex:
    need(are(float, real, imaginary), "a complex number of something else")
    return complex(real, imaginary)


def _size(machine: "Unpickler", size: Any) -> torch.Size:
    need(are((list, tuple), size) and are(int, *size), "a tensor's shape")
    machine.budget.spend(64 * len(size))
    return torch.Size(size)


def _device(machine: "Unpickler", kind: Any, *index: Any) -> torch.device:
    need(are(str, kind) and are(int, *index), "a device that is none")
    return torch.device(kind, *index)


def _log(name: str) -> Function:
    """The function `name`, which may only create the inert objects of logs and settings."""

    def make(machine: "Unpickler", cls: Any, *_: Any) -> Inert:
        need(isinstance(cls, type) and issubclass(cls, Inert), name)
        return cls()

    return Function(make)


def _nested(machine: "Unpickler", data: Any) -> Any:
    """Loads a tensor's data out of a plain pickle, which embeds it as a torch.save file."""
    need(are(bytes, data) and machine.load_storage is not None, "a file within a file")
    machine.budget.spend(len(data))
    return machine.load_storage(data, machine.budget)


# By the names that NumPy 2 writes; NumPy's own functions are only called with checked arguments.
NUMPY = {
    "numpy.ndarray": Function(_array),
    "numpy._core.multiarray._reconstruct": Function(_array),
    "numpy._core.multiarray.scalar": Function(_scalar),
    "numpy._core.numeric._frombuffer": Function(_from_buffer),
    "numpy.dtype": Function(_dtype),
}
KNOWN: dict[str, Any] = {
    **INERT,
    **NUMPY,
    **{f"torch.{name}": dtype for name, dtype in _NAMES.items()},
    **{f"builtins.{cls.__name__}": cls for cls in _FACTORIES},
    "builtins.bytearray": Function(byte_array),
    "builtins.bytes": Function(lambda machine: b""),
    "builtins.complex": Function(_complex),
    "builtins.frozenset": Function(set_of(frozenset)),
    "builtins.getattr": _log("builtins.getattr"),
    "builtins.object": object,
    "builtins.set": Function(set_of(set)),
    "_codecs.encode": Function(_encode),
    "collections.Counter": Function(_counter),
    "collections.OrderedDict": Function(_ordered),
    "collections.defaultdict": Function(_default),
    "collections.deque": Function(_deque),
    "copyreg._reconstructor": _log("copyreg._reconstructor"),
    "torch.Size": Function(_size),
    "torch.device": Function(_device),
    "torch._utils._rebuild_parameter": Function(_parameter),
    "torch._utils._rebuild_tensor": Function(_tensor),
    "torch._utils._rebuild_tensor_v2": Function(_tensor),
    "torch._utils._rebuild_tensor_v3": Function(_tensor),
    "torch.storage._load_from_bytes": Function(_nested),
}
