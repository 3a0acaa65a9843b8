"""The restricted unpickler: what it opens is what was saved, and what it refuses is not run."""

import copyreg
import io
import os
import pickle
import sys
import tarfile
import types
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghm_d2.checkpoint import load_file
from ghm_d2.errors import UserError
from tests.foreign import Call

WRITERS = {
    "zip.pth": torch.save,
    "legacy.pth": lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False),
    "plain.pkl": lambda x, path: path.write_bytes(pickle.dumps(x)),
    "old.pkl": lambda x, path: path.write_bytes(pickle.dumps(x, protocol=0)),
    "python2.pkl": lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2)),
}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    """Save an object in each format; returns the file's name."""

    def run(value):
        path = tmp_path / request.param
        WRITERS[request.param](value, path)
        return str(path)

    return run


def same(a, b):
    if isinstance(a, torch.Tensor | np.ndarray):
        library = torch if isinstance(a, torch.Tensor) else np
        equal = torch.equal if library is torch else np.array_equal
        return type(a) is type(b) and a.dtype == b.dtype and equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def content():
    counts = defaultdict(list)
    counts["a"].append(1)
    view = torch.arange(12.0).view(3, 4)
    return OrderedDict(
        weights={
            "half": torch.ones(2).half(),
            "view": view.t(),
            "same": view,
            "0d": torch.tensor(7),
        },
        parameter=torch.nn.Parameter(torch.ones(3)),
        arrays=[
            np.arange(6, dtype="f4").reshape(2, 3),
            np.asfortranarray(np.arange(6).reshape(2, 3)),
            np.array(["ab", "c"]),
            np.zeros((0, 4), np.uint8),
            np.array(True),
        ],
        scalars=(np.float32(1.5), np.int64(-3), 1, 2.5, True, None, "ü", b"\x00\xff", 3 + 4j),
        containers=[counts, {1, 2}, frozenset("a"), deque([1]), Counter("aab"), bytearray(b"x")],
        torch=[torch.Size([2, 3]), torch.device("cpu"), torch.bfloat16],
    )


@pytest.mark.parametrize("sound", [True, False], ids=["", "PyTorch before 2.6"])
def test_plain_content_comes_back(write, monkeypatch, sound):
    monkeypatch.setattr("ghm_d2.checkpoint.opening._SOUND", sound)
    value = content()
    assert same(load_file(write(value)), value)


def test_torch_s_restricted_loader_builds_what_it_can(tmp_path, monkeypatch):
    """Weights, arrays and logs; the unpickler here only looks at them before."""
    state = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Linear(2, 2)).state_dict()
    value = {"model": state, "a": [np.arange(3), np.array(["a"]), np.float32(1)], "s": {1}}
    calls, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(k) or load(*a, **k))
    for name in ("zip.pth", "legacy.pth"):
        WRITERS[name](value, tmp_path / name)
        assert same(load_file(tmp_path / name), value)
    assert [call["weights_only"] for call in calls] == [True, True]


def test_the_byte_order_of_one_array_stays_in_it(write):
    assert np.array_equal(load_file(write(np.arange(3, dtype=">f4"))), [0, 1, 2])
    assert np.dtype("f4").isnative and np.float32(1).tobytes() == np.array(1, "=f4").tobytes()


def test_python_2_arrays(tmp_path):
    """As Detectron's model zoo has them: str for bytes, NumPy 1's names."""
    data = np.array([1.5, -2.0], "<f4")
    path = tmp_path / "zoo.pkl"
    path.write_bytes(
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
        + data.tobytes()
        + b"tbs."
    )
    assert same(load_file(path), {"w": data})


def refused(path):
    with pytest.raises(UserError) as error:
        load_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {"w": torch.ones(2), "x": x}}])
def test_code_is_named_and_not_run(write, tmp_path, wrap):
    made = tmp_path / "made"
    error = refused(write(wrap(Call(os.mkdir, str(made)))))
    assert f"{os.name}.mkdir" in error and "could run code" in error
    assert not made.exists()


def test_other_ways_to_code(write):
    for function, args, name in (
        (eval, ("1",), "builtins.eval"),
        (getattr, ("a", "upper"), "builtins.getattr"),
        (torch.load, ("x",), "torch.serialization.load"),
        (np.load, ("x",), "numpy.load"),
        (torch.nn.Linear, (1, 1), "torch.nn.modules.linear.Linear"),
        (copyreg._reconstructor, (OrderedDict, object, None), "copyreg._reconstructor"),
    ):
        assert name in refused(write(Call(function, *args)))


def test_arrays_of_objects_are_refused(write):
    assert "a NumPy array of type 'O8'" in refused(write(np.array([{}, []], object)))
    assert "a NumPy array of type 'V4'" in refused(write(np.zeros(2, [("a", "f4")])))


def test_code_in_a_storage_inside_a_pickle(tmp_path):
    made = tmp_path / "made"
    inner = io.BytesIO()
    torch.save(Call(os.mkdir, str(made)), inner)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(Call(torch.storage._load_from_bytes, inner.getvalue())))
    assert "mkdir" in refused(path) and not made.exists()


@pytest.mark.parametrize(
    "name",
    ["ctorch._utils\n_rebuild_tensor_v2\n", "ccollections\nOrderedDict\n", "cnumpy\nndarray\n"],
)
def test_what_can_be_named_cannot_be_changed(tmp_path, name):
    """BUILD sets attributes of whatever lies on the stack, functions and classes too."""
    path = tmp_path / "x.pkl"
    for state in (b"}\x8c\x01xK\x01s", b"N}\x8c\x01xK\x01s\x86"):  # __dict__, and setattr
        path.write_bytes(b"\x80\x04" + name.encode() + state + b"b.")
        refused(path)
    for found in (torch._utils._rebuild_tensor_v2, OrderedDict, np.ndarray):
        assert not hasattr(found, "x")


def test_known_log_classes_keep_nothing(write, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class HistoryBuffer:
        def __init__(self):
            self.log = np.ones(3)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer
    path = write({"message_hub": {"loss": HistoryBuffer()}, "state_dict": {"w": torch.ones(1)}})
    monkeypatch.undo()
    found = load_file(path)
    assert torch.equal(found["state_dict"]["w"], torch.ones(1))
    log = found["message_hub"]["loss"]
    assert type(log).__name__ == "HistoryBuffer" and not hasattr(log, "__dict__")
    assert not isinstance(log, HistoryBuffer)


def test_programs_and_archives_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))
    assert "TorchScript" in refused(path)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert "a tar archive" in refused(path)


def test_files_that_cannot_be_read(tmp_path):
    assert "No such file" in refused(tmp_path / "gone.pth")
    assert "directory" in refused(tmp_path)
    for name in ("x.pth", "x.pkl"):
        path = tmp_path / name
        for data in (b"", b"<html>", b"PK\x03\x04", b"\x80"):
            path.write_bytes(data)
            assert "fetch or save it again" in refused(path)


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files_are_one_sentence(tmp_path_factory, name, data):
    path = tmp_path_factory.getbasetemp() / f"damaged_{name}"
    WRITERS[name]({"model": {"w": torch.arange(4.0), "a": np.arange(3)}}, path)
    raw = bytearray(path.read_bytes())
    # Some formats hold addresses, so that the length is not the same in each run.
    place = data.draw(st.integers(0, 1 << 16)) % len(raw)
    if data.draw(st.booleans()):
        path.write_bytes(raw[:place])
        refused(path)
    else:
        raw[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(raw)
        try:
            load_file(path)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("flags", [1, 8, 63, 255])
def test_a_dtype_cannot_claim_to_hold_objects(tmp_path, flags):
    """NumPy believes the flags, and would take the numbers for pointers."""
    state = (3, "<", None, None, None, -1, -1, flags)

    class Lie:
        def __reduce__(self):
            return np.dtype, ("i8", False, True), state

    path = tmp_path / "x.pkl"
    array = np.arange(3), Lie()
    path.write_bytes(pickle.dumps(array))
    assert "a NumPy type" in refused(path)


def test_a_trusted_file_may_run_code(tmp_path):
    for name, save in (("x.pkl", WRITERS["plain.pkl"]), ("x.pth", torch.save)):
        made = tmp_path / f"made_{name}"
        save(Call(os.mkdir, str(made)), tmp_path / name)
        assert "--trust-checkpoint" in refused(tmp_path / name) and not made.exists()
        load_file(tmp_path / name, trusted=True)
        assert made.exists()
    (tmp_path / "x.pth").write_bytes(b"PK")
    with pytest.raises(UserError, match="damaged"):
        load_file(tmp_path / "x.pth", trusted=True)
