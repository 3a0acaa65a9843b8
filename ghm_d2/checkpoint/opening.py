"""The one way in which this project opens a checkpoint: nothing that the file names is run.

A file of `torch.save` is opened by `torch.load(weights_only=True)`. That bounds neither work
nor memory, so :mod:`.unpickler` goes through it first, under the same rules as for a .pkl.
"""

import io
import os
import pickle
import tarfile
import types
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from typing import IO, Any

import numpy as np
import torch

from ghm_d2.errors import UserError, cannot, reason, shown
from ghm_d2.files import open_regular

from .pickle_base import INERT, Budget, Record, RefusedError
from .unpickler import Checker, Unpickler

_DEPTH = 64  # of containers within containers
_LEAVES = {bool, complex, float, int, type(None), torch.device, torch.dtype, torch.Size}
_LEAVES |= set(INERT.values())
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = (*_MAPPINGS, list, tuple, deque, set, frozenset)


class _Stream:
    """A file that caps each read at the bytes left: Python allocates the requested size first."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.readline, self.seek, self.tell = file.readline, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._file.tell()
        return self._file.read(left if size < 0 else min(size, left))


def _check_zip(file: IO[bytes], size: int, budget: Budget) -> Any:
    """Checks a zip archive of torch.save; returns its content, with the tensors empty."""
    file.seek(max(0, size - 98))
    tail = file.read(98)
    ends, ends64 = tail[-22:], tail[-98:-42]
    directory = int.from_bytes(ends[12:16], "little")
    if ends64.startswith(b"PK\x06\x06"):
        directory = max(directory, int.from_bytes(ends64[40:48], "little"))
    if not ends.startswith(b"PK\x05\x06") or ends[20:] != b"\0\0":
        raise ValueError("it does not end as an archive of torch.save does")
    if directory > 2**22 + size // 32:
        raise RefusedError("more entries than a file of its size can have")
    stream: Any = _Stream(file, size)
    with zipfile.ZipFile(stream) as archive:
        infos = archive.infolist()
    if any(info.filename.endswith("/constants.pkl") for info in infos):
        raise RefusedError("a TorchScript program")
    # torch.save does not compress, and its entries do not overlap: other archives could expand.
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise RefusedError("compressed data")
    if sum(info.file_size for info in infos) > size:
        raise RefusedError("more data than a file of its size can have")
    file.seek(0)
    # The reader that torch.load will use, so that both see the same content.
    reader = torch._C.PyTorchFileReader(file)
    folder = infos[0].filename.partition("/")[0]
    sizes = {info.filename.removeprefix(f"{folder}/"): info.file_size for info in infos}
    names = {name.lower() for name in sizes}  # the reader ignores case
    if not len(names) == len(infos) == len(reader.get_all_records()):
        raise RefusedError("two entries of one name")
    content = reader.get_record("data.pkl")
    checker = Checker.within(budget)(io.BytesIO(content), encoding="utf-8")
    prefix = "data/"
    checker.sizes = {k.removeprefix(prefix): x for k, x in sizes.items() if k.startswith(prefix)}
    return checker.load()


def _check_legacy(file: IO[bytes], size: int, budget: Budget) -> Any:
    """As `_check_zip`, for the format before PyTorch 1.6: five pickles, then the tensors' data."""
    try:
        tarfile.TarInfo.frombuf(file.read(512), "utf-8", "surrogateescape")
        raise RefusedError("a tar archive")  # PyTorch's format before 0.2
    except tarfile.HeaderError:
        file.seek(0)
    stream: Any = _Stream(file, size)
    checkers = [Checker.within(budget)(stream, encoding="utf-8") for _ in range(5)]
    values = [checker.load() for checker in checkers]
    records = checkers[3].records
    if not isinstance(values[4], list) or sorted(records) != sorted(map(str, values[4])):
        raise RefusedError("data of unknown tensors")
    if sum(8 + record.nbytes() for record in records.values()) > size - stream.tell():
        raise RefusedError("less data than its tensors have")
    return values[3]


# Since 2.6, PyTorch's restricted loader has no known way to run code, and accepts additional names.
# It would call these with any arguments, so the check that runs before it looks at the arguments.
_SOUND = torch.__version__ >= (2, 6)
_SAFE: list[Any] = [
    *((cls, name) for name, cls in INERT.items()),
    *((object, name) for name in ("builtins.object",)),
    *((lambda cls, *_: cls(), name) for name in ("builtins.getattr", "copyreg._reconstructor")),
    (bytes, "builtins.bytes"),
    (frozenset, "builtins.frozenset"),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDGSU"},
    *(
        (np.empty(0).__reduce__()[0] if name == "_reconstruct" else np.float32(0).__reduce__()[0],
         f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
]  # fmt: skip


def _load_torch(
    file: IO[bytes], size: int, budget: Budget | None = None, storage: bool = False
) -> Any:
    """Opens a file of torch.save.

    Args:
        file: positioned at its start.
        size: of the file in bytes.
        budget: of the enclosing file; None: a new one.
        storage: whether the file must hold a tensor's data and nothing else.
    """
    budget = budget or Budget(size)
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    check = _check_zip if is_zip else _check_legacy
    if storage != isinstance(check(file, size, budget), Record):
        raise RefusedError("the data of a tensor without its shape")
    file.seek(0)
    if _SOUND:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(_SAFE):
                warnings.simplefilter("ignore")  # about pickle protocols other than torch.save's
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            file.seek(0)  # it holds a container that PyTorch's loader refuses, such as a deque
    own = Unpickler.within(Budget(size))
    module = types.SimpleNamespace(
        __name__="restricted", Unpickler=own, load=lambda file, **kwargs: own(file, **kwargs).load()
    )
    return torch.load(file, map_location="cpu", pickle_module=module, weights_only=False)


def _load_pickle(file: IO[bytes], size: int) -> Any:
    stream: Any = _Stream(file, size)
    machine = Unpickler.within(Budget(size))(stream, encoding="latin1")
    machine.load_storage = lambda data, budget: _load_torch(
        io.BytesIO(data), len(data), budget, storage=True
    )
    return machine.load()


def measure(content: Any, size: int) -> None:
    """Detaches the tensors of a file from autograd, and refuses content that is too large to walk.

    Args:
        content: what a file holds.
        size: of the file in bytes, which limits the content; a shared value counts as often as it
            is reached.

    Raises:
        RefusedError: there is more content, or something that no file of weights holds.
    """
    _weigh(content, _DEPTH, {}, 4 * size + 2**26)


def _weigh(value: Any, depth: int, known: dict[int, tuple[int, int]], most: int) -> tuple[int, int]:
    """The size of `value` in bytes as if nothing were shared, and how deep it is nested."""
    kind = type(value)
    weight, height = 64, 0
    if depth < 0:
        raise RefusedError(f"containers nested more than {_DEPTH} deep")
    if kind in (str, bytes, bytearray):
        weight += len(value)
    elif kind in (torch.Tensor, torch.nn.Parameter, np.ndarray):
        weight += _weigh_array(value)
    elif kind in _CONTAINERS:
        if id(value) not in known:
            known[id(value)] = 0, _DEPTH + 1  # until it is known: refuses a container in itself
            parts = [*value, *value.values()] if kind in _MAPPINGS else list(value)
            if beside := getattr(value, "__dict__", None):
                parts += _versions(beside)
            for part in parts:
                more, below = _weigh(part, depth - 1, known, most)
                weight, height = weight + more, max(height, below + 1)
            known[id(value)] = weight, height
        weight, height = known[id(value)]
    elif not (kind in _LEAVES or isinstance(value, np.generic | np.dtype)):
        raise RefusedError(f"a {kind.__name__}")
    elif kind is int and value.bit_length() > 256:
        raise RefusedError("a number of more than 256 bits")
    if height > depth:
        raise RefusedError(f"containers nested more than {_DEPTH} deep")
    if weight > most:
        raise RefusedError("more content than a file of its size can have")
    return weight, height


def _versions(beside: dict[str, Any]) -> list[Any]:
    """The `_metadata` of nn.Module.state_dict(), a version of each module; refuses all else."""
    versions = beside.get("_metadata")
    if len(beside) == 1 and type(versions) in (dict, OrderedDict):
        entries = list(versions.values())
        if all(type(x) is dict and {*map(type, x.values())} <= {int, type(None)} for x in entries):
            return [versions]
    raise RefusedError("a changed dictionary")


def _weigh_array(array: torch.Tensor | np.ndarray) -> int:
    if isinstance(array, np.ndarray):
        return array.nbytes
    array.requires_grad_(False)
    if array.dtype is torch.bool and array.numel() and array.view(torch.uint8).max() > 1:
        raise RefusedError("truth values that are neither true nor false")
    return array.numel() * array.element_size()


def load_file(path: str | os.PathLike, *, trusted: bool = False) -> Any:
    """Opens a checkpoint: a pickle where the name ends in .pkl, else a file of `torch.save`.

    Args:
        path: a local file.
        trusted: whether the file may run code: only for files whose author the user trusts.

    Returns:
        What the file holds; tensors are on the CPU and require no gradient. Text that Python 2
        pickled is read as Latin-1, as Detectron2 does.

    Raises:
        UserError: the file cannot be read, is damaged, or holds anything but tensors, NumPy arrays,
            plain containers and known classes of logs and settings; or it would take more memory
            than about four times its size.
    """
    path = os.fspath(path)
    try:
        with open_regular(path) as file:
            if trusted:
                if path.endswith(".pkl"):
                    return pickle.load(file, encoding="latin1")
                return torch.load(file, map_location="cpu", weights_only=False)
            size = os.fstat(file.fileno()).st_size
            load = _load_pickle if path.endswith(".pkl") else _load_torch
            content = load(file, size)
            measure(content, size)
            return content
    except RefusedError as error:
        raise UserError(
            f"{path} holds {shown(error, 100)}, which is not weights and could run code or take "
            "this machine down, so the file was not opened: save its weights alone with the "
            "software that wrote it, or, where you trust who wrote it with this machine, give "
            "--trust-checkpoint to train_net.py."
        ) from error
    except OSError as error:
        raise cannot("read", path, error) from error
    except UserError:
        raise
    # A damaged pickle is a random program: it can fail with any exception.
    except Exception as error:
        raise UserError(
            f"{path} is not a file of weights, or a damaged one ({_first_words(error)}): fetch or "
            "save it again."
        ) from error


def _first_words(error: Exception) -> str:
    return shown(" ".join(reason(error).split()[:20]), 200).rstrip(".")
