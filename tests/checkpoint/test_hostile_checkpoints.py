"""Checkpoints made to hurt: refused in a sentence; no code, crash, hang or memory beyond them."""

import io
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from ghm_d2.checkpoint import load_file
from tests.hostile import (
    EMPTY,
    FRESH,
    archive,
    array,
    array_state,
    call,
    dtype,
    get,
    legacy,
    legacy_storage,
    many,
    mapping,
    name,
    number,
    opened,
    program,
    put,
    raw,
    storage,
    tensor,
    text,
)

FOUR = np.arange(4, dtype="<f4").tobytes()
WIDE = 2**40


def doubled(times, kind=b"\x86"):
    """Tuples of the tuple before, twice: the hash or text of the last never ends."""
    return text("x") + b"".join(put(i) + get(i) + kind for i in range(times))


def nested(times, kind=b"\x85"):
    return b")" + kind * times


def lists(times):
    """[[..., ...], [..., ...]] by the same list twice in each."""
    parts = [b"]" + put(0)]
    parts += [b"](" + get(i) * 2 + b"e" + put(i + 1) for i in range(times)]
    return b"".join(parts)


def colliding(count):
    """Numbers that have the same hash."""
    return [number(i * (2**61 - 1)) for i in range(1, count + 1)]


# What a pickle says; each is tried as .pkl, and within both formats of torch.save.
PICKLES = {
    # memory that is not an array's own
    "an array built twice": FRESH
    + put(1)
    + array_state([4], dtype(), raw(FOUR))
    + b"b"
    + array_state([4], dtype(), raw(FOUR))
    + b"b",
    "a view of another array": array(
        [4], dtype(), FRESH + put(1) + array_state([4], dtype(), raw(FOUR)) + b"b"
    ),
    "an array rebuilt below its view": many(
        FRESH + put(1) + array_state([4], dtype(), raw(FOUR)) + b"b",
        call("numpy.core.numeric._frombuffer", get(1), dtype(), many(number(4)), text("C")),
        get(1) + array_state([0], dtype(), raw(b"")) + b"b",
    ),
    "a type built twice": dtype()
    + many(number(3), text(">"), b"NNN", number(-1) * 2, number(0))
    + b"b",
    "a type with flags": array([1], dtype("i8", flags=63), raw(bytes(8))),
    "a type changed below its array": many(
        call("numpy.dtype", text("U1"), b"\x89", b"\x88") + put(2),
        array([1], get(2), raw(b"a\0\0\0")),
        get(2) + many(number(3), text("<"), b"NNN", number(4000), number(4), number(0)) + b"b",
    ),
    "a type of another size": array(
        [1],
        call("numpy.dtype", text("U1"), b"\x89", b"\x88")
        + many(number(3), text("<"), b"NNN", number(2**30), number(4), number(8))
        + b"b",
        raw(b"a\0\0\0"),
    ),
    "an array of objects": array([1], dtype("O8", "|"), raw(bytes(8))),
    "an array of structures": array([1], dtype("V8", "|"), raw(bytes(8))),
    "an array of dates": array([1], dtype("M8"), raw(bytes(8))),
    "an array of nothing": array([WIDE], dtype("U0"), raw(b"")),
    "an array with too little data": array([WIDE], dtype(), raw(FOUR)),
    "an array with too much data": array([1], dtype(), raw(FOUR)),
    "an array of negative size": array([-1, -4], dtype(), raw(FOUR)),
    "an array with an array for its data": array([4], dtype(), array([4], dtype(), raw(FOUR))),
    "an array of a subtype": call(
        "numpy.core.multiarray._reconstruct", name("torch.Size"), many(number(0)), raw(b"b")
    ),
    "an array that starts large": call("numpy.ndarray", many(number(WIDE)), text("b")),
    "truth values above 1": array([4], dtype("b1", "|"), raw(b"\0\1\2\xff")),
    "text beyond Unicode": array(
        [1],
        call("numpy.dtype", text("U1"), b"\x89", b"\x88")
        + many(number(3), text("<"), b"NNN", number(4), number(4), number(8))
        + b"b",
        raw(b"\xff" * 4),
    ),
    "a buffer of an array": call(
        "numpy.core.numeric._frombuffer",
        array([4], dtype(), raw(FOUR)),
        dtype(),
        many(number(4)),
        text("C"),
    ),
    "a buffer with a type by name": call(
        "numpy.core.numeric._frombuffer", raw(FOUR), text("O"), many(number(2)), text("C")
    ),
    "a scalar of an object": call("numpy.core.multiarray.scalar", dtype("O8", "|"), raw(bytes(8))),
    "a scalar by name": call("numpy.core.multiarray.scalar", text("O"), raw(bytes(8))),
    "a scalar with too little data": call("numpy.core.multiarray.scalar", dtype(), raw(b"\0")),
    # tensors
    "an empty tensor of any size": call("torch.Tensor", number(WIDE)),
    "a storage of any size": call("torch.FloatStorage", number(WIDE)),
    "a meta tensor": call(
        "torch._utils._rebuild_meta_tensor_no_storage",
        name("torch.float32"),
        many(number(WIDE)),
        many(number(1)),
        b"\x89",
    ),
    "a tensor of a class": call(
        "torch._utils._rebuild_wrapper_subclass",
        name("torch.Tensor"),
        name("torch.float32"),
        many(number(WIDE)),
        many(number(1)),
        number(0),
        b"N",
        text("cpu"),
        b"\x89",
    ),
    "a tensor without data": tensor(b"N"),
    "a parameter of a number": call("torch._utils._rebuild_parameter", number(1), b"\x88", EMPTY),
    "a shape with text": call("torch.Size", many(text("x"))),
    "a device that is none": call("torch.device", text("x" * 9)),
    # objects
    "a changed class": name("collections.OrderedDict") + mapping(x=number(1)) + b"b",
    "a changed function": name("torch._utils._rebuild_tensor_v2") + mapping(x=number(1)) + b"b",
    "a dictionary with other methods": EMPTY + mapping(items=number(5)) + b"b",
    "a dictionary with versions that are none": EMPTY + mapping(_metadata=number(5)) + b"b",
    "versions that are texts": EMPTY
    + mapping(_metadata=mapping(a=mapping(version=text("x"))))
    + b"b",
    "a method of anything": call("builtins.getattr", name("builtins.dict"), text("fromkeys")),
    "a dictionary that calls": call(
        "collections.defaultdict", name("torch._utils._rebuild_tensor")
    ),
    "an instance": b"(imainstance\nx\n",
    "an object": b"(" + name("builtins.eval") + text("1") + b"o",
    "an object with keywords": name("argparse.Namespace") + b")}\x92",
    "an extension": b"\x82\x01",
    "a class by its stack": text("builtins") + text("eval") + b"\x93" + many(text("1")) + b"R",
    "a persistent number": b"K\x05Q",
    "a persistent text": b"Px\n",
    "a module": many(text("module"), name("torch.nn.Linear"), text("x.py"), text("")) + b"Q",
    # work without end
    "doubled tuples as a key": b"}" + doubled(100) + b"Ns",
    "doubled tuples in a set": b"\x8f(" + doubled(100) + b"\x90",
    "doubled tuples in a frozen set": b"(" + doubled(100) + b"\x91",
    "doubled tuples counted": call("collections.Counter", b"}" + doubled(100) + b"Ns"),
    "doubled tuples in an ordered dictionary": call(
        "collections.OrderedDict", many(many(doubled(100), b"N"))
    ),
    "doubled tuples as text": call("builtins.str", doubled(100)),
    "doubled tuples": doubled(100),
    "doubled tuples of three": text("x")
    + b"".join(put(i) + get(i) * 2 + b"\x87" for i in range(90)),
    "doubled lists": lists(100),
    "doubled texts": b"](" + text("x" * 100_000) + put(0) + get(0) * 100_000 + b"e",
    "a million nested tuples": nested(1_000_000),
    "a million nested tuples as a key": b"}" + nested(1_000_000) + b"Ns",
    "nested lists": b"]" * 100_000 + b"a" * 99_999,
    "nested dictionaries": b"}" + b"".join(text("a") + b"}" for _ in range(5000)) + b"s" * 5000,
    "a list in itself": b"]" + put(0) + get(0) + b"a",
    "a dictionary in itself": b"}" + put(0) + text("a") + get(0) + b"s",
    "8 GB of bytes": call("builtins.bytearray", number(8_000_000_000)),
    "8 GB of constant bytes": call("builtins.bytes", number(8_000_000_000)),
    "a long number": number(2**400),
    "digits without end": b"L" + b"9" * 1_000_000 + b"L\n",
    "keys that collide": b"}(" + b"N".join(colliding(60_000)) + b"Nu",
    "items that collide": b"\x8f(" + b"".join(colliding(60_000)) + b"\x90",
    "sets of one list": b"]("
    + b"".join(map(number, range(10_000)))
    + b"e"
    + put(0)
    + call("builtins.set", get(0)) * 10_000
    + b"t",
    "one text in many encodings": b"]("
    + text("x" * 1_000_000)
    + put(0)
    + call("_codecs.encode", get(0), text("latin1")) * 20_000
    + b"e",
    "arrays of one text": b"]("
    + raw(bytes(4_000_000))
    + put(0)
    + b"0"
    + array([1_000_000], dtype(), get(0)) * 2_000
    + b"e",
    "three million empty sets": b"(" + b"\x8f" * 3_000_000 + b"t",
    "three million empty dictionaries": b"(" + b"}" * 3_000_000 + b"t",
    "three million marks": b"(" * 3_000_000,
    "a million memories": b"N" + b"\x94" * 3_000_000,
    "bytes that are not there": b"\x8e" + struct.pack("<Q", 2**40),
    "text that is not there": b"\x8d" + struct.pack("<Q", 2**40),
    "an array of bytes that is not there": b"\x96" + struct.pack("<Q", 2**33),
    "a frame that is not there": b"\x95" + struct.pack("<Q", 2**40),
    "a number that is not there": b"\x8b" + struct.pack("<i", 2**30),
    "a number of negative length": b"\x8b" + struct.pack("<i", -5),
    # programs that are none
    "nothing on the stack": b"R",
    "no mark": b"t",
    "a memory that is not there": get(7),
    "twice the same": b"N" + b"2" * 10,
    "half a pair": b"}(" + text("a") + b"u",
    "items of a text": text("a") + b"(Ne",
    "pairs of a list": b"](" + text("a") + b"Nu",
    "items of a tuple set": b")(N\x90",
    # text for a terminal
    "a name that writes on the terminal": text("os\x1b[2J\r\n")
    + text("x\u202e" * 100_000)
    + b"\x93",
    "a name without encoding": text("\ud800") + text("\ud800") + b"\x93",
}

FORMATS = {
    "x.pkl": program,
    "x.pth": lambda *parts: archive(program(*parts, protocol=2)),
    "old.pth": lambda *parts: legacy(program(*parts, protocol=2)),
}


def refused(path):
    kind, message = opened(path)
    assert kind == "refused", (kind, message)
    assert len(message) < 1000 and message.isprintable() and str(path) in message, message
    return message


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("case", PICKLES)
def test_pickles(tmp_path, case, file):
    path = tmp_path / file
    path.write_bytes(FORMATS[file](PICKLES[case]))
    refused(path)


BYTE = "torch.ByteStorage"
# Tensors of torch.save: a pickle of their data's four numbers, and the data.
TENSORS = {
    "hooks": lambda data: tensor(
        data(4), hooks=call("collections.OrderedDict", many(many(number(1), text("x"))))
    ),
    "gradient and hooks": lambda data: tensor(data(4), grad=b"\x88", hooks=mapping(x=text("x"))),
    "hooks of a parameter": lambda data: call(
        "torch._utils._rebuild_parameter", tensor(data(4)), b"\x88", mapping(x=text("x"))
    ),
    "a parameter with a state": lambda data: call(
        "torch._utils._rebuild_parameter_with_state",
        tensor(data(4)),
        b"\x88",
        EMPTY,
        mapping(x=text("x")),
    ),
    "a built tensor": lambda data: (
        tensor(data(4)) + many(data(4), number(0), many(number(4)), many(number(1))) + b"b"
    ),
    "attributes": lambda data: call(
        "torch._tensor._rebuild_from_type_v2",
        name("torch._utils._rebuild_tensor_v2"),
        name("torch.Tensor"),
        many(data(4)),
        mapping(x=number(1)),
    ),
    "an offset outside": lambda data: tensor(data(4), offset=1),
    "a negative offset": lambda data: tensor(data(4), offset=-1),
    "a negative stride": lambda data: tensor(data(4), offset=3, stride=(-1,)),
    "a negative size": lambda data: tensor(data(4), size=(-4,)),
    "a size that overflows": lambda data: tensor(data(4), size=(2**62, 4), stride=(4, 1)),
    "a stride that overflows": lambda data: tensor(data(4), size=(4,), stride=(2**62,)),
    "a larger size": lambda data: tensor(data(4), size=(WIDE,)),
    "a larger size, as it was of old": lambda data: tensor(data(4), size=(WIDE,), version=""),
    "one number a billion times": lambda data: tensor(data(4), size=(2**30,), stride=(0,)),
    "one number 2**60 times": lambda data: tensor(data(4), size=(2**30, 2**30), stride=(0, 0)),
    "sizes without strides": lambda data: tensor(data(4), size=(2, 2), stride=(1,)),
    "a hundred dimensions": lambda data: tensor(data(4), size=(1,) * 100, stride=(1,) * 100),
    "a size of truth": lambda data: call(
        "torch._utils._rebuild_tensor_v2",
        data(4),
        number(0),
        many(b"\x88"),
        many(b"\x88"),
        b"\x89",
        EMPTY,
    ),
    "a claim to more data": lambda data: tensor(data(2**20), size=(2**20,)),
    "a claim to much more data": lambda data: tensor(data(WIDE), size=(WIDE,)),
    "a claim to less than no data": lambda data: tensor(data(-4)),
    "a wider type": lambda data: tensor(data(4, "torch.DoubleStorage")),
    "two sizes of one": lambda data: many(tensor(data(4)), tensor(data(2), size=(2,))),
    "two types of one": lambda data: many(tensor(data(4)), tensor(data(4, "torch.IntStorage"))),
    "truth values above 1": lambda data: tensor(data(16, "torch.BoolStorage"), size=(16,)),
    "a type that reads further": lambda data: call(
        "torch._utils._rebuild_tensor_v3",
        data(16, "torch.storage.UntypedStorage"),
        number(0),
        many(number(4)),
        many(number(1)),
        b"\x89",
        EMPTY,
        name("torch.complex128"),
    ),
    "a sparse tensor": lambda data: call(
        "torch._utils._rebuild_sparse_tensor",
        name("torch.sparse_coo"),
        many(tensor(data(4)), tensor(data(4)), many(number(WIDE))),
    ),
    "a quantized tensor": lambda data: call(
        "torch._utils._rebuild_qtensor",
        data(4),
        number(0),
        many(number(4)),
        many(number(1)),
        many(name("torch.per_tensor_affine"), number(1), number(0)),
        b"\x89",
        EMPTY,
    ),
    "conjugated": lambda data: call(
        "torch._utils._rebuild_tensor_v2",
        data(4),
        number(0),
        many(number(4)),
        many(number(1)),
        b"\x89",
        EMPTY,
        mapping(conj=b"\x88"),
    ),
    "data alone": lambda data: data(4),
    "data in a dictionary": lambda data: mapping(a=data(4)),
    "a tensor as a key": lambda data: b"}" + tensor(data(4)) + b"Ns",
    "one tensor 100,000 times": lambda data: (
        b"](" + tensor(data(2**16), size=(2**16,)) + put(0) + get(0) * 100_000 + b"e"
    ),
}


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_tensors(tmp_path, case, old):
    make, path = TENSORS[case], tmp_path / "x.pth"
    data = FOUR if case != "one tensor 100,000 times" else bytes(2**18)
    if old:
        content = program(make(legacy_storage), protocol=2)
        path.write_bytes(legacy(content, ["0"], struct.pack("<q", len(data) // 4) + data))
    else:
        path.write_bytes(archive(program(make(storage), protocol=2), {"0": data}))
    message = refused(path)
    if any(word in case for word in ("outside", "negative", "overflows", "larger", "further")):
        assert "a tensor that reaches out of its data" in message  # before PyTorch sees it


GOOD = program(mapping(w=tensor(storage(4))), protocol=2)


def inert(content):
    """What must hold of a tensor from a file."""
    x = content["w"]
    y = (x.clone().requires_grad_() * 2).sum()
    y.backward()
    return x.tolist(), x.requires_grad, bool(x._backward_hooks), x.grad_fn, type(x).__name__


@pytest.mark.parametrize(
    "tensors",
    [
        tensor(storage(4), grad=b"\x88"),
        call("torch._utils._rebuild_parameter", tensor(storage(4)), b"\x88", EMPTY),
    ],
)
def test_no_tensor_wants_a_gradient(tmp_path, tensors):
    path = tmp_path / "x.pth"
    path.write_bytes(archive(program(mapping(w=tensors), protocol=2), {"0": FOUR}))
    kind, found = opened(path, inert)
    assert kind == "opened" and found.startswith("([0.0, 1.0, 2.0, 3.0], False, False, None"), found


def bomb():
    return archive(
        program(mapping(w=tensor(storage(2**28), size=(2**28,))), protocol=2),
        {"0": bytes(2**30)},
        zipfile.ZIP_DEFLATED,
    )


def overlapping():
    """Two entries of the central directory at one place."""
    data = bytearray(archive(GOOD, {"0": FOUR, "1": bytes(100_000), "2": b"x"}))
    first = data.rindex(b"archive/data/1") - 46
    second = data.rindex(b"archive/data/2") - 46
    data[second + 16 : second + 46] = data[first + 16 : first + 46]
    return bytes(data)


ARCHIVES = {
    "a bomb": bomb,
    "a bomb of a pickle": lambda: archive(
        program(b"(" + b"]" * 2**26 + b"t", protocol=2), {}, zipfile.ZIP_DEFLATED
    ),
    "overlapping entries": overlapping,
    "a million entries": lambda: archive(
        GOOD, {"0": FOUR}, more=[(f"a/{i}", b"") for i in range(99_999)]
    ),
    "two pickles": lambda: archive(GOOD, {"0": FOUR}, more=[("archive/data.pkl", GOOD)]),
    "two pickles of other case": lambda: archive(
        GOOD, {"0": FOUR}, more=[("archive/DATA.PKL", GOOD)]
    ),
    "a comment": lambda: archive(GOOD, {"0": FOUR}, comment=b"PK\x05\x06" + bytes(18)),
    "no data": lambda: archive(GOOD, {}),
    "no pickle": lambda: archive(GOOD, {"0": FOUR}).replace(b"data.pkl", b"data.pkx"),
    "climbing entries": lambda: archive(GOOD, {"../../0": FOUR}),
    "cut": lambda: archive(GOOD, {"0": FOUR})[:-30],
    "its start alone": lambda: b"PK\x03\x04" + bytes(100),
    "its end alone": lambda: b"PK\x03\x04" + bytes(96) + b"PK\x05\x06" + bytes(18),
    "a directory that is not there": lambda: (
        b"PK\x03\x04" + bytes(96) + b"PK\x05\x06" + bytes(8) + b"\xff" * 8 + bytes(2)
    ),
    "an archive of tar that starts as a pickle": lambda: tar(b"\x80\x02" + text("x")),
    "no keys": lambda: legacy(program(mapping(w=tensor(legacy_storage(4))), protocol=2), [], FOUR),
    "other keys": lambda: legacy(
        program(mapping(w=tensor(legacy_storage(4))), protocol=2), ["1"], FOUR
    ),
    "no numbers": lambda: legacy(program(mapping(w=tensor(legacy_storage(4))), protocol=2), ["0"]),
    "another number of them": lambda: legacy(
        program(mapping(w=tensor(legacy_storage(4))), protocol=2),
        ["0"],
        struct.pack("<q", 2**40) + FOUR,
    ),
}


def tar(start):
    """An archive of tar whose first file has the start of a pickle for its name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as file:
        file.addfile(
            tarfile.TarInfo(start.replace(b"\0", b"\1").decode("utf-8", "surrogateescape"))
        )
    return stream.getvalue()


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives(tmp_path, case):
    path = tmp_path / "x.pth"
    path.write_bytes(ARCHIVES[case]())
    refused(path)


def within(data, times):
    """A pickled tensor whose data lie in a file in the file, so many times."""
    for _ in range(times):
        data = program(call("torch.storage._load_from_bytes", raw(data)))
    return data


def test_files_within_files(tmp_path):
    path = tmp_path / "x.pkl"
    inner = legacy(program(legacy_storage(4), protocol=2), ["0"], struct.pack("<q", 4) + FOUR)
    one = call("torch.storage._load_from_bytes", raw(inner))
    path.write_bytes(program(mapping(w=tensor(one))))
    assert opened(path, inert) == ("opened", "([0.0, 1.0, 2.0, 3.0], False, False, None, 'Tensor')")
    again = call("torch.storage._load_from_bytes", raw(inner + bytes(2**20)) + put(0))
    for hostile in (
        within(inner, 1),  # data alone
        within(within(inner, 300), 1),
        program(many(again, call("torch.storage._load_from_bytes", get(0)) * 20_000)),
        program(tensor(call("torch.storage._load_from_bytes", raw(archive(GOOD, {"0": FOUR}))))),
        program(tensor(call("torch.storage._load_from_bytes", raw(bomb())))),
    ):
        path.write_bytes(hostile)
        refused(path)


@pytest.mark.parametrize("suffix", ["pkl", "pth", "pyth"])
def test_what_is_no_regular_file(tmp_path, suffix):
    pipe, link = tmp_path / f"pipe.{suffix}", tmp_path / f"link.{suffix}"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    zero = tmp_path / f"zero.{suffix}"
    zero.symlink_to("/dev/zero")
    folder = tmp_path / f"folder.{suffix}"
    folder.mkdir()
    for path in (pipe, link, zero, folder):
        assert "cannot be read" in refused(path)


@pytest.mark.parametrize("start", [b"", b"\x80\x04", b"PK\x03\x04", b"\x80\x04\x8e" + b"\xff" * 5])
@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_a_terabyte_of_nothing(tmp_path, suffix, start):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(start)
    os.truncate(path, 2**40)
    refused(path)


def test_arrays_own_their_memory(tmp_path):
    """NumPy keeps the bytes of a pickle as memory: two arrays of the same bytes are one."""
    path = tmp_path / "x.pkl"
    path.write_bytes(
        program(
            many(
                raw(bytes(8000)) + put(0),
                array([2000], dtype(), get(0)),
                array([2000], dtype(), get(0)),
            )
        )
    )
    data, a, b = load_file(path)
    a[:] = 1
    assert not b.any() and data == bytes(8000) and not np.shares_memory(a, b)


def test_legitimate_neighbours(tmp_path):
    """What lies just inside of the rules comes back."""
    state = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Linear(2, 2)).state_dict()
    shared = torch.arange(6.0)
    content = {
        "model": state,
        "tied": [shared, shared, shared.view(2, 3).t(), shared[1:3], shared[:1].expand(4)],
        "empty": torch.empty(0, 5),
        "kinds": [torch.zeros(3, dtype=x) for x in (torch.uint8, torch.bool, torch.float8_e5m2)],
        "deep": [[[[[[[[[[]]]]]]]]]],
        "optimizer": {"state": {0: {"step": 3}}, "betas": [(0.9, 0.99)] * 50},
    }
    for old in (False, True):
        path = tmp_path / "x.pth"
        content["kinds"] = content["kinds"][: 2 if old else 3]  # torch.load itself refuses the last
        torch.save(content, path, _use_new_zipfile_serialization=not old)
        found = load_file(path)
        assert found["model"]._metadata == state._metadata
        assert all(torch.equal(x, y) for x, y in zip(found["tied"], content["tied"], strict=True))
        assert found["optimizer"] == content["optimizer"] and found["deep"] == content["deep"]
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({i: "x" for i in range(9000)}))
    assert len(load_file(path)) == 9000
