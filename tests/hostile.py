"""Hostile checkpoints, built by hand, and a process with little memory and time to open them in."""

import io
import multiprocessing
import os
import pickle
import resource
import signal
import struct
import warnings
import zipfile
from pathlib import Path

ALLOWED = 192 * 2**20  # bytes beside four times the file's size: torch's own, and what is free
SECONDS = 30
END = b"."


def put(index):
    return b"r" + struct.pack("<I", index)


def get(index):
    return b"j" + struct.pack("<I", index)


def text(value):
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def raw(value):
    return b"B" + struct.pack("<I", len(value)) + value


def number(value):
    data = pickle.encode_long(value)
    if len(data) > 255:
        return b"\x8b" + struct.pack("<i", len(data)) + data
    return b"\x8a" + bytes([len(data)]) + data


def name(full):
    module, _, attribute = full.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def many(*items):
    return b"(" + b"".join(items) + b"t"


def call(full, *arguments):
    return name(full) + many(*arguments) + b"R"


def mapping(**items):
    return b"}" + b"".join(text(key) + value + b"s" for key, value in items.items())


EMPTY = call("collections.OrderedDict")


def dtype(code="f4", order="<", flags=0):
    sizes = number(-1) * 2
    state = many(number(3), text(order), b"NNN", sizes, number(flags))
    return call("numpy.dtype", text(code), b"\x89", b"\x88") + state + b"b"


def array_state(shape, kind, data):
    return many(number(1), many(*map(number, shape)), kind, b"\x89", data)


FRESH = call("numpy.ndarray", b"K\x00\x85", text("b"))


def array(shape, kind, data):
    return FRESH + array_state(shape, kind, data) + b"b"


def storage(elements, kind="torch.FloatStorage", key="0", device="cpu"):
    pid = many(text("storage"), name(kind), text(key), text(device), number(elements))
    return pid + b"Q"


def legacy_storage(elements, kind="torch.FloatStorage", key="0"):
    pid = many(text("storage"), name(kind), text(key), text("cpu"), number(elements), b"N")
    return pid + b"Q"


def tensor(data, offset=0, size=(4,), stride=(1,), grad=b"\x89", hooks=EMPTY, version="_v2"):
    shape = many(*map(number, size)), many(*map(number, stride))
    more = (grad, hooks) if version else ()
    return call(f"torch._utils._rebuild_tensor{version}", data, number(offset), *shape, *more)


def program(*parts, protocol=4):
    return b"\x80" + bytes([protocol]) + b"".join(parts) + END


def archive(content, records=None, compression=zipfile.ZIP_STORED, comment=b"", more=()):
    """A file of torch.save around a pickle; `records`: data of the storages by key."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that stand twice
        file.writestr("archive/data.pkl", content)
        for key, data in (records or {}).items():
            file.writestr(f"archive/data/{key}", data)
        for entry, data in more:
            file.writestr(entry, data)
        file.writestr("archive/version", b"3\n")
        file.comment = comment
    return stream.getvalue()


def legacy(content, keys=(), data=b""):
    """A file as torch.save wrote it before PyTorch 1.6."""
    magic = 0x1950A86A20F9469CFC6C
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickle.dumps(x, protocol=2) for x in (magic, 1001, info))
    return head + content + pickle.dumps(list(keys), protocol=2) + data


def _growth(before):
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _memory():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmSize:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def _open(path, then, answer):
    import torch

    from ghm_d2.checkpoint import load_file
    from ghm_d2.errors import UserError

    torch.set_num_threads(1)
    size = os.stat(path).st_size if os.path.isfile(path) else 0
    limit = min(4 * size, 2**30) + 4 * ALLOWED
    resource.setrlimit(resource.RLIMIT_AS, (_memory() + limit,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(SECONDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try:
        content = load_file(path)
        outcome = "opened", "" if then is None else str(then(content))
    except UserError as error:
        outcome = "refused", str(error)
    except BaseException as error:
        outcome = "crashed", repr(error)
    answer.send((*outcome, _growth(before), size))


def opened(path, then=None):
    """Opens a file in a process of its own.

    Args:
        path: of the file.
        then: a function of this module's importers, called with the content.

    Returns:
        "opened", "refused" or what went wrong; and the error's text or what `then` returned.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ghm_d2.checkpoint"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_open, args=(str(path), then, there))
    process.start()
    there.close()
    try:
        kind, message, growth, size = here.recv()
    except EOFError:
        process.join()
        return f"died of {process.exitcode}", ""
    process.join()
    if growth > 4 * size + ALLOWED:
        return f"took {growth >> 20} MiB for {size >> 20} MiB", message
    return kind, message
