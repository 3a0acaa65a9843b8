"""Python's unpickler, restricted: what a file builds is inert, owns its memory and is built once.

A pickle may call any function that it can name. Here it names those of tensors, NumPy arrays and
plain containers, each behind a function that checks its arguments; known classes of logs and
settings become objects that keep nothing; the rest is refused. Work and memory follow the size of
the file: every operation and every copy is paid from a :class:`Budget`, and what is hashed is text
or a number, since the hash of nested tuples takes a time that no size bounds.
"""

import math
import pickle
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch

from ghm_d2.errors import shown

__all__ = ["INERT", "NUMPY", "Budget", "Checker", "Record", "RefusedError", "Unpickler"]

# Python 2's and NumPy 1's names of the modules.
_RENAMED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
}
_FREE = 64 * 2**20  # bytes that a file of any size may take: an empty list is one byte of it
_MOST_NUMBERS = 20_000  # as keys: unlike those of texts, their hashes can be made to collide
_NAMES = {name: x for name, x in vars(torch).items() if isinstance(x, torch.dtype)}
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "storage.UntypedStorage": torch.uint8,
}
_FACTORIES = (bool, dict, float, int, list, set, str, tuple)  # of a defaultdict
_OPERATIONS = (
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT",
    "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_LIST", "LIST", "EMPTY_TUPLE", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "EMPTY_SET", "GET", "BINGET", "LONG_BINGET", "PUT",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "BINPERSID",
)  # fmt: skip
_COSTS = {"EMPTY_SET": 256, "MEMOIZE": 128, "BINPUT": 128, "PUT": 128, "LONG_BINPUT": 128}


class RefusedError(pickle.UnpicklingError):
    """The file holds something that is neither weights nor plain data."""


class Budget:
    """The memory that a file may take, in bytes."""

    def __init__(self, size: int) -> None:
        """
        Args:
            size: of the file, which is read once besides.
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


class _Inert:
    """Takes whatever a pickle gives to an object and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _take(self, *args: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = _take


def _inert(name: str) -> type:
    return type(name.rpartition(".")[2], (_Inert,), {"__slots__": ()})


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


class _Function:
    """A function that a pickle may call: of the unpickler and the arguments of the pickle."""

    __slots__ = ("call",)

    def __init__(self, call: Callable) -> None:
        self.call = call


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise RefusedError(what)


def _are(kind: type | tuple, *values: Any) -> bool:
    """Whether all are of these very types, not of derived ones."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return all(type(x) in kinds for x in values)


# --- NumPy ----------------------------------------------------------------------------------------


def _array(machine: "Unpickler", *arguments: Any) -> np.ndarray:
    subtype = arguments[0] if len(arguments) == 3 else NUMPY["numpy.ndarray"]
    plain = subtype is NUMPY["numpy.ndarray"] and arguments[-2] == (0,)
    _need(plain and arguments[-1] in ("b", b"b"), "a NumPy array of an unknown kind")
    return machine.unbuilt(np.empty(0, np.int8))  # BUILD gives it its type, shape and data


def _dtype(machine: "Unpickler", code: Any, *_: Any) -> np.dtype:
    known = _are(str, code) and re.fullmatch(r"[biufc]\d{1,2}|[SU][1-9]\d{0,8}", code)
    _need(bool(known), f"a NumPy array of type {code!r}" if _are(str, code) else "a NumPy type")
    return machine.unbuilt(np.dtype(code, False, True))  # a copy: BUILD writes the byte order


def _build_dtype(dtype: np.dtype, state: Any) -> None:
    """Only what NumPy writes itself: it would believe a flag of objects among the items."""
    states = [dtype.newbyteorder(order).__reduce__()[2] for order in "<>"]
    _need(_are(tuple, state) and state in states, "a NumPy type of another kind")
    dtype.__setstate__(state)


def _build_array(machine: "Unpickler", array: np.ndarray, state: Any) -> None:
    _need(_are(tuple, state) and len(state) in (4, 5), "a NumPy array of an unknown kind")
    shape, dtype, fortran, data = state[-4:]
    own = _own_data(machine, data, dtype, shape)
    # NumPy keeps these bytes as the array's memory, so that they are nobody else's.
    array.__setstate__((1, shape, dtype, bool(fortran), own))


def _own_data(machine: "Unpickler", data: Any, dtype: Any, shape: Any) -> bytes:
    """A copy of the data of an array or scalar, if it is of this type and shape."""
    _need(isinstance(dtype, np.dtype) and machine.is_built(dtype), "a NumPy type of another kind")
    _need(_are((str, bytes, bytearray), data), "a NumPy array without its data")
    _need(_are(tuple, shape) and _are(int, *shape), "a NumPy array without its shape")
    _need(min(shape, default=0) >= 0, "a NumPy array of negative size")
    _need(len(data) == math.prod(shape) * dtype.itemsize, "a NumPy array of another size")
    machine.budget.spend(len(data))
    own = data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))
    # A truth value above 1 makes NumPy write past the end of arrays, and a character above the last
    # one is no text.
    if dtype.kind == "b":
        _need(not own.strip(b"\0\1"), "truth values that are neither true nor false")
    if dtype.kind == "U" and own:
        order = "<" if dtype.newbyteorder("<") == dtype else ">"
        _need(np.frombuffer(own, f"{order}u4").max() <= 0x10FFFF, "text that is none")
    return own


def _scalar(machine: "Unpickler", dtype: Any, data: Any) -> np.generic:
    return np.frombuffer(_own_data(machine, data, dtype, ()), dtype)[0]


def _from_buffer(machine: "Unpickler", data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    _need(order in ("C", "F"), "a NumPy array of an unknown kind")
    own = bytearray(_own_data(machine, data, dtype, shape))
    return np.frombuffer(own, dtype).reshape(shape, order=order)


# --- tensors --------------------------------------------------------------------------------------


def _tensor(machine: "Unpickler", storage: Any, offset: Any, size: Any, stride: Any, *rest: Any):
    """_rebuild_tensor, _v2 (requires_grad, hooks) and _v3 (also the dtype)."""
    _need(_are((Record, torch.storage.TypedStorage), storage), "a tensor without its data")
    _need(not any(rest[1:2]) and not any(rest[3:]), "a tensor with hooks or more about it")
    dtype = rest[2] if len(rest) > 2 and rest[2] else storage.dtype
    _need(isinstance(dtype, torch.dtype), "a tensor of an unknown type")
    _need(_are((tuple, torch.Size), size) and _are(tuple, stride), "a tensor without its shape")
    _need(len(size) == len(stride) <= 64 and _are(int, offset, *size, *stride), "a tensor's shape")
    data = storage if isinstance(storage, Record) else storage._untyped_storage
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    end = last + 1 if all(size) else offset
    inside = min(offset, *size, *stride, 0) >= 0 and end * dtype.itemsize <= data.nbytes()
    _need(inside, "a tensor that reaches out of its data")
    if isinstance(storage, Record):
        return torch.empty(0, dtype=dtype)
    tensor = torch.empty(0, dtype=dtype)
    return tensor.set_(data, offset, tuple(size), stride)


def _parameter(machine: "Unpickler", data: Any, requires_grad: Any, hooks: Any) -> Any:
    _need(_are(torch.Tensor, data) and not hooks, "a parameter with more than a tensor")
    return torch.nn.Parameter(data, requires_grad=False)


# --- containers and values ------------------------------------------------------------------------


def _encode(machine: "Unpickler", text: Any, encoding: Any) -> bytes:
    _need(_are(str, text) and encoding in ("latin1", "latin-1"), "text in an unknown encoding")
    machine.budget.spend(len(text))
    return text.encode("latin1")


def _bytearray(machine: "Unpickler", data: Any = b"", *encoding: Any) -> bytearray:
    data = _encode(machine, data, *encoding) if encoding else data
    _need(_are(bytes, data), "an array of bytes without them")
    machine.budget.spend(len(data))
    return bytearray(data)


def _items(kind: Callable) -> Callable:
    def make(machine: "Unpickler", items: Any = ()) -> Any:
        _need(_are((list, tuple), items), "a set without its items")
        machine.budget.spend(128 * len(items) + 256)
        machine.check_keys(items)
        return kind(items)

    return make


def _counter(machine: "Unpickler", counts: Any = None) -> Counter:
    _need(counts is None or _are(dict, counts), "counts without their names")
    machine.budget.spend(128 * len(counts or ()) + 256)
    return Counter(counts)


def _ordered(machine: "Unpickler", pairs: Any = ()) -> OrderedDict:
    _need(_are((list, tuple), pairs) and _are((list, tuple), *pairs), "a dictionary without pairs")
    machine.budget.spend(256 * len(pairs) + 256)
    _need(all(len(pair) == 2 for pair in pairs), "a dictionary without pairs")
    machine.check_keys([key for key, _ in pairs])
    return OrderedDict(pairs)


def _default(machine: "Unpickler", factory: Any = None) -> defaultdict:
    _need(factory is None or factory in _FACTORIES, "a dictionary that calls a function")
    return defaultdict(factory)


def _deque(machine: "Unpickler", items: Any = (), longest: Any = None) -> deque:
    _need(items == () and _are((int, type(None)), longest), "a queue of an unknown kind")
    machine.budget.spend(640)
    return deque((), longest)


def _complex(machine: "Unpickler", real: Any, imaginary: Any) -> complex:
    _need(_are(float, real, imaginary), "a complex number of something else")
    return complex(real, imaginary)


def _size(machine: "Unpickler", size: Any) -> torch.Size:
    _need(_are((list, tuple), size) and _are(int, *size), "a tensor's shape")
    machine.budget.spend(64 * len(size))
    return torch.Size(size)


def _device(machine: "Unpickler", kind: Any, *index: Any) -> torch.device:
    _need(_are(str, kind) and _are(int, *index), "a device that is none")
    return torch.device(kind, *index)


def _log(name: str) -> _Function:
    """A function by which Python makes an object of a log, or a method of it."""

    def make(machine: "Unpickler", cls: Any, *_: Any) -> _Inert:
        _need(isinstance(cls, type) and issubclass(cls, _Inert), name)
        return cls()

    return _Function(make)


def _nested(machine: "Unpickler", data: Any) -> Any:
    """How pickle, unlike torch.save, keeps a tensor's data: a file of torch.save inside."""
    _need(_are(bytes, data) and machine.load_storage is not None, "a file within a file")
    machine.budget.spend(len(data))
    return machine.load_storage(data, machine.budget)


# By the names that NumPy 2 writes; NumPy's own functions are only called with checked arguments.
NUMPY = {
    "numpy.ndarray": _Function(_array),
    "numpy._core.multiarray._reconstruct": _Function(_array),
    "numpy._core.multiarray.scalar": _Function(_scalar),
    "numpy._core.numeric._frombuffer": _Function(_from_buffer),
    "numpy.dtype": _Function(_dtype),
}
_KNOWN: dict[str, Any] = {
    **INERT,
    **NUMPY,
    **{f"torch.{name}": dtype for name, dtype in _NAMES.items()},
    **{f"builtins.{cls.__name__}": cls for cls in _FACTORIES},
    "builtins.bytearray": _Function(_bytearray),
    "builtins.bytes": _Function(lambda machine: b""),
    "builtins.complex": _Function(_complex),
    "builtins.frozenset": _Function(_items(frozenset)),
    "builtins.getattr": _log("builtins.getattr"),
    "builtins.object": object,
    "builtins.set": _Function(_items(set)),
    "_codecs.encode": _Function(_encode),
    "collections.Counter": _Function(_counter),
    "collections.OrderedDict": _Function(_ordered),
    "collections.defaultdict": _Function(_default),
    "collections.deque": _Function(_deque),
    "copyreg._reconstructor": _log("copyreg._reconstructor"),
    "torch.Size": _Function(_size),
    "torch.device": _Function(_device),
    "torch._utils._rebuild_parameter": _Function(_parameter),
    "torch._utils._rebuild_tensor": _Function(_tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch._utils._rebuild_tensor_v3": _Function(_tensor),
    "torch.storage._load_from_bytes": _Function(_nested),
}


def _paid(name: str) -> Callable:
    """An operation of Python's unpickler that first pays for what it leaves behind."""
    load, cost = pickle._Unpickler.dispatch[getattr(pickle, name)[0]], _COSTS.get(name, 64)

    def run(machine: "Unpickler") -> None:
        machine.budget.spend(cost)
        load(machine)

    return run


class Unpickler(pickle._Unpickler):
    """Python's own: in C, what BUILD does to an object cannot be looked at."""

    budget: Budget
    load_storage: Callable[[bytes, Budget], Any] | None = None  # None: a file within a file
    dispatch = {getattr(pickle, name)[0]: _paid(name) for name in _OPERATIONS}

    @classmethod
    def within(cls, budget: Budget) -> "type[Unpickler]":
        """This class with a budget; torch.load makes the objects itself."""
        return type(cls.__name__, (cls,), {"budget": budget})

    def __init__(self, file: IO[bytes], **kwargs: Any) -> None:
        super().__init__(file, **kwargs)
        self._unbuilt: dict[int, Any] = {}
        self._numbers = 0

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_RENAMED.get(module, module)}.{name}"
        _need(full in _KNOWN, shown(full, 100))
        return _KNOWN[full]

    def unbuilt(self, value: Any) -> Any:
        """Notes that `value` is one that BUILD may change, once."""
        self._unbuilt[id(value)] = value
        return value

    def is_built(self, value: Any) -> bool:
        """Whether `value` stays as it is."""
        return id(value) not in self._unbuilt

    def check_keys(self, keys: Any) -> None:
        """Refuses what is hashed and is neither text nor a number."""
        numbers = sum(type(x) not in (str, bytes) for x in keys)
        self._numbers += numbers
        _need(self._numbers <= _MOST_NUMBERS, f"more than {_MOST_NUMBERS} numbers as keys")
        plain = not numbers or _are((str, bytes, int, float, bool, type(None)), *keys)
        _need(plain, "keys that are neither text nor numbers")

    def _call(self) -> None:
        self.budget.spend(64)
        arguments, function = self.stack.pop(), self.stack[-1]
        _need(type(arguments) is tuple, "a call without arguments")
        if isinstance(function, type) and issubclass(function, _Inert):
            self.stack[-1] = function()
        else:
            _need(isinstance(function, _Function), f"a call of a {type(function).__name__}")
            self.stack[-1] = function.call(self, *arguments)

    def _build(self) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        self.budget.spend(64)
        if isinstance(value, OrderedDict):
            # nn.Module.state_dict() has the versions of its modules here.
            _need(_are(dict, state) and list(state) == ["_metadata"], "a changed dictionary")
            value._metadata = state["_metadata"]
        elif not isinstance(value, _Inert):
            _need(not self.is_built(value), f"a changed {type(value).__name__}")
            if isinstance(value, np.dtype):
                _build_dtype(value, state)
            else:
                _build_array(self, value, state)
            del self._unbuilt[id(value)]

    def _set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, _Inert):
            return
        _need(_are((dict, OrderedDict, defaultdict, Counter), target), "items of no dictionary")
        self.budget.spend(64 * len(pairs))
        keys = pairs[::2]
        self.check_keys(keys)
        for key, value in zip(keys, pairs[1::2], strict=True):
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        _need(_are((list, deque), target) or isinstance(target, _Inert), "items of no list")
        target.extend(items)

    def _setitem(self) -> None:
        pair = [self.stack.pop(), self.stack.pop()]
        self._set(pair[::-1])

    def _dict(self) -> None:
        pairs = self.pop_mark()
        self.append({})
        self._set(pairs)

    def _add(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        _need(_are(set, target), "items of no set")
        self.budget.spend(128 * len(items))
        self.check_keys(items)
        target.update(items)

    def _frozenset(self) -> None:
        items = self.pop_mark()  # afterwards append is that of the outer stack
        self.append(_items(frozenset)(self, items))

    def _bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self.append(_bytearray(self, self.read(size)))

    dispatch |= {
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: lambda self: self._set(self.pop_mark()),
        pickle.APPEND[0]: lambda self: self._append([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self._append(self.pop_mark()),
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _add,
        pickle.FROZENSET[0]: _frozenset,
        pickle.BYTEARRAY8[0]: _bytearray8,
    }


class Checker(Unpickler):
    """Goes through the pickle of a torch.save file before torch.load does, without its tensors."""

    sizes: dict[str, int] | None = None  # of the storages in bytes by their keys; None: not known

    def __init__(self, file: IO[bytes], **kwargs: Any) -> None:
        super().__init__(file, **kwargs)
        self.records: dict[str, Record] = {}

    def find_class(self, module: str, name: str) -> Any:
        dtype = _STORAGES.get(f"{module}.{name}".removeprefix("torch."))
        return dtype if dtype and module.startswith("torch") else super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Record:
        """("storage", type, key, device, number of elements, and None in the older format)."""
        _need(_are(tuple, pid) and len(pid) in (5, 6), "a tensor's data of an unknown kind")
        kind, dtype, key, device, elements = pid[:5]
        plain = _are(str, kind, key, device) and kind == "storage" and pid[5:] in ((), (None,))
        plain = plain and _are(torch.dtype, dtype) and _are(int, elements) and elements >= 0
        _need(plain, "a tensor's data of an unknown kind")
        new = Record(dtype, elements)
        if key not in self.records:
            self.budget.spend(new.nbytes() + 512)
        record = self.records.setdefault(key, new)
        size = record.nbytes() if self.sizes is None else self.sizes.get(key)
        same = record.dtype == dtype and record.nbytes() == new.nbytes() == size
        _need(same, "a tensor's data of another size")
        return record
