"""Python's unpickler, restricted: what a file builds is inert, owns its memory and is built once.

The size of the file bounds work and memory: every operation is paid from its budget, and only text
and numbers are hashed, since hashing nested tuples can take time out of all proportion to the file.
What a pickle may name is listed in :mod:`.pickle_values`.
"""

import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch

from ghm_d2.errors import shown

from .pickle_base import Budget, Function, Inert, Record, are, need
from .pickle_values import KNOWN, build_array, build_dtype, byte_array, set_of

# Module names of Python 2 and NumPy 1, and their names today.
_RENAMED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
}
_MOST_NUMBERS = 20_000  # as keys: unlike those of texts, their hashes can be made to collide
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
_OPERATIONS = (
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT",
    "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_LIST", "LIST", "EMPTY_TUPLE", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "EMPTY_SET", "GET", "BINGET", "LONG_BINGET", "PUT",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "BINPERSID",
)  # fmt: skip
_COSTS = {"EMPTY_SET": 256, "MEMOIZE": 128, "BINPUT": 128, "PUT": 128, "LONG_BINPUT": 128}


def _paid(name: str) -> Callable:
    """An operation of Python's unpickler that first pays for what it leaves behind."""
    load, cost = pickle._Unpickler.dispatch[getattr(pickle, name)[0]], _COSTS.get(name, 64)

    def run(machine: "Unpickler") -> None:
        machine.budget.spend(cost)
        load(machine)

    return run


class Unpickler(pickle._Unpickler):
    """Python's own, in its pure Python version: the C one does not let BUILD be checked."""

    budget: Budget
    load_storage: Callable[[bytes, Budget], Any] | None = None  # None: a nested file is refused
    dispatch = {getattr(pickle, name)[0]: _paid(name) for name in _OPERATIONS}

    @classmethod
    def within(cls, budget: Budget) -> "type[Unpickler]":
        """This class bound to a budget, because torch.load creates the unpickler itself."""
        return type(cls.__name__, (cls,), {"budget": budget})

    def __init__(self, file: IO[bytes], **kwargs: Any) -> None:
        super().__init__(file, **kwargs)
        self._unbuilt: dict[int, Any] = {}
        self._numbers = 0

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_RENAMED.get(module, module)}.{name}"
        need(full in KNOWN, shown(full, 100))
        return KNOWN[full]

    def unbuilt(self, value: Any) -> Any:
        """Notes that BUILD may change `value`, once; returns `value`."""
        self._unbuilt[id(value)] = value
        return value

    def is_built(self, value: Any) -> bool:
        """Whether BUILD may no longer change `value`."""
        return id(value) not in self._unbuilt

    def check_keys(self, keys: Any) -> None:
        """Refuses keys that are neither text nor numbers, and too many numbers."""
        numbers = sum(type(x) not in (str, bytes) for x in keys)
        self._numbers += numbers
        need(self._numbers <= _MOST_NUMBERS, f"more than {_MOST_NUMBERS} numbers as keys")
        plain = not numbers or are((str, bytes, int, float, bool, type(None)), *keys)
        need(plain, "keys that are neither text nor numbers")

    def _call(self) -> None:
        self.budget.spend(64)
        arguments, function = self.stack.pop(), self.stack[-1]
        need(type(arguments) is tuple, "a call without arguments")
        if isinstance(function, type) and issubclass(function, Inert):
            self.stack[-1] = function()
        else:
            need(isinstance(function, Function), f"a call of a {type(function).__name__}")
            self.stack[-1] = function.call(self, *arguments)

    def _build(self) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        self.budget.spend(64)
        if isinstance(value, OrderedDict):
            # nn.Module.state_dict() keeps the versions of its modules in this attribute.
            need(are(dict, state) and list(state) == ["_metadata"], "a changed dictionary")
            value._metadata = state["_metadata"]
        elif not isinstance(value, Inert):
            need(not self.is_built(value), f"a changed {type(value).__name__}")
            if isinstance(value, np.dtype):
                build_dtype(value, state)
            else:
                build_array(self, value, state)
            del self._unbuilt[id(value)]

    def _set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            return
        need(are((dict, OrderedDict, defaultdict, Counter), target), "items of no dictionary")
        self.budget.spend(64 * len(pairs))
        keys = pairs[::2]
        self.check_keys(keys)
        for key, value in zip(keys, pairs[1::2], strict=True):
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        need(are((list, deque), target) or isinstance(target, Inert), "items of no list")
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
        need(are(set, target), "items of no set")
        self.budget.spend(128 * len(items))
        self.check_keys(items)
        target.update(items)

    def _frozenset(self) -> None:
        items = self.pop_mark()  # first, because it makes self.append that of the outer stack
        self.append(set_of(frozenset)(self, items))

    def _bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self.append(byte_array(self, self.read(size)))

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

    sizes: dict[str, int] | None = None  # bytes of each storage by its key; None: not known

    def __init__(self, file: IO[bytes], **kwargs: Any) -> None:
        super().__init__(file, **kwargs)
        self.records: dict[str, Record] = {}

    def find_class(self, module: str, name: str) -> Any:
        dtype = _STORAGES.get(f"{module}.{name}".removeprefix("torch."))
        return dtype if dtype and module.startswith("torch") else super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Record:
        """`pid`: ("storage", type, key, device, number of elements, None in the older format)."""
        need(are(tuple, pid) and len(pid) in (5, 6), "a tensor's data of an unknown kind")
        kind, dtype, key, device, elements = pid[:5]
        plain = are(str, kind, key, device) and kind == "storage" and pid[5:] in ((), (None,))
        plain = plain and are(torch.dtype, dtype) and are(int, elements) and elements >= 0
        need(plain, "a tensor's data of an unknown kind")
        new = Record(dtype, elements)
        if key not in self.records:
            self.budget.spend(new.nbytes() + 512)
        record = self.records.setdefault(key, new)
        size = record.nbytes() if self.sizes is None else self.sizes.get(key)
        same = record.dtype == dtype and record.nbytes() == new.nbytes() == size
        need(same, "a tensor's data of another size")
        return record
