"""Random programs, archives and damaged files: opened or refused, whatever they say.

GHM_FUZZ_MINUTES=30 runs for that long instead of a few seconds, and prints how many were tried.
"""

import copy
import io
import multiprocessing
import os
import pickle
import pickletools
import resource
import signal
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghm_d2.checkpoint.pickle_values import KNOWN
from tests import hostile as h
from tests.checkpoint.test_hostile_checkpoints import FOUR, PICKLES, TENSORS

MINUTES = float(os.environ.get("GHM_FUZZ_MINUTES", 0))
SECONDS = 20

# --- what is tried --------------------------------------------------------------------------------

SMALL = st.integers(0, 5)
NUMBERS = st.one_of(SMALL, st.integers(-(2**70), 2**70), st.sampled_from([2**31, 2**40, 2**62]))
CODES = st.sampled_from(
    ["f4", "f8", "i8", "u1", "b1", "c8", "U1", "S3", "O8", "V4", "M8", "f2", "i4", "U9", "b0"]
)
OPERATIONS = st.sampled_from([x.code.encode("latin1") for x in pickletools.opcodes])
NAMES = st.sampled_from(
    [*KNOWN, "numpy.core.multiarray.scalar", "builtins.eval", "torch.Tensor", "torch.FloatStorage"]
)


@st.composite
def leaves(draw):
    """One value, or something that takes the place of one."""
    kind = draw(st.integers(0, 13))
    size, steps = draw(st.lists(SMALL, max_size=3)), draw(st.lists(SMALL, max_size=3))
    data = draw(st.binary(max_size=40))
    made = [
        lambda: h.number(draw(NUMBERS)),
        lambda: h.text(draw(st.text(max_size=4))),
        lambda: h.raw(data),
        lambda: draw(st.sampled_from([b"N", b"]", b"}", b")", b"\x8f", b"\x88", b"\x89"])),
        lambda: h.get(draw(SMALL)),
        lambda: h.name(draw(NAMES)),
        lambda: h.dtype(draw(CODES), draw(st.sampled_from("<>|=x")), draw(SMALL) // 5),
        lambda: h.array(size, h.dtype(draw(CODES)), h.raw(data)),
        lambda: h.array([4], h.dtype("f4"), h.raw(FOUR)),
        lambda: h.tensor(h.storage(draw(NUMBERS)), draw(NUMBERS), size, steps),
        lambda: h.tensor(h.storage(4), draw(SMALL), size, steps[: len(size)]),
        lambda: h.tensor(h.legacy_storage(4)),
        lambda: h.storage(4, draw(st.sampled_from(["torch.FloatStorage", "torch.BoolStorage"]))),
        lambda: PICKLES[draw(st.sampled_from([x for x in PICKLES if len(PICKLES[x]) < 500]))],
    ]
    return made[kind]()


@st.composite
def nodes(draw, inner):
    """What is made of other values."""
    parts = draw(st.lists(inner, max_size=4))
    kind = draw(st.integers(0, 7))
    made = [
        lambda: h.many(*parts),
        lambda: b"](" + b"".join(parts) + b"e",
        lambda: b"}(" + b"".join(parts) + b"u",
        lambda: h.mapping(**{f"k{i}": part for i, part in enumerate(parts)}),
        lambda: h.call(draw(NAMES), *parts),
        lambda: b"".join(parts[:1]) + h.many(*parts[1:]) + b"b",
        lambda: b"".join(parts[:1]) + h.put(draw(SMALL)),
        lambda: b"".join(parts) + draw(OPERATIONS),
    ]
    return made[kind]()


VALUES = st.recursive(leaves(), nodes, max_leaves=12)


@st.composite
def files(draw):
    """The end of a file's name, and its bytes."""
    kind = draw(st.sampled_from(["pkl", "zip", "old", "tensor", "damaged"]))
    if kind == "damaged":
        name, data = draw(st.sampled_from(SEEDS))
        data = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            place, length = (draw(st.integers(0, len(data))) for _ in range(2))
            change = draw(st.integers(0, 3))
            if change == 0 and place < len(data):
                data[place] ^= draw(st.integers(1, 255))
            elif change == 1:
                data[place : place + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
            elif change == 2:
                data[place:place] = data[length : length + draw(st.integers(0, 300))]
            else:
                del data[place : place + draw(st.integers(0, 9))]
        return name, bytes(data)
    if kind == "tensor":
        make = TENSORS[draw(st.sampled_from([x for x in TENSORS if "100,000" not in x]))]
        return "pth", h.archive(h.program(make(h.storage), draw(VALUES), protocol=2), {"0": FOUR})
    content = h.program(draw(VALUES), protocol=draw(st.sampled_from([2, 4])))
    if kind == "pkl":
        return "pkl", content
    if kind == "zip":
        return "pth", h.archive(content, {"0": FOUR})
    return "pth", h.legacy(content, ["0"], struct.pack("<q", 4) + FOUR)


def _seeds():
    content = {
        "w": torch.arange(6.0).view(2, 3).t(),
        "p": torch.nn.Parameter(torch.ones(2)),
        "a": [np.arange(3), np.array(["a"]), np.float32(1)],
        "s": torch.nn.BatchNorm1d(2).state_dict(),
        "x": ({1}, "text", b"bytes", 1.5, None, True, 10**20),
    }
    found = []
    for old in (False, True):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=not old)
        found.append(("pth", stream.getvalue()))
    return found + [("pkl", pickle.dumps(content, protocol=x)) for x in (0, 2, 4, 5)]


SEEDS = _seeds()

# --- who tries it ---------------------------------------------------------------------------------


def _use(value, depth=0):
    """Whatever a program does with weights."""
    if isinstance(value, torch.Tensor):
        assert not value.requires_grad and not value._backward_hooks and value.grad_fn is None
        x = value.clone()
        if x.is_floating_point():
            (x.requires_grad_() * 2).sum().backward()
        value.numel() and value.view(-1) if value.is_contiguous() else value.contiguous()
        value.fill_(1) if all(value.stride()) else None
    elif isinstance(value, np.ndarray):
        value.copy().sum() if value.dtype.kind in "biufc" else value.tolist()
        if value.flags.writeable:
            value[...] = value.flat[0] if value.size else 0
    elif isinstance(value, dict):
        for x in value.values():
            _use(x, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for x in value:
            _use(x, depth + 1)


def _work(pipe):
    from ghm_d2.checkpoint import load_file
    from ghm_d2.errors import UserError

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (h._memory() + 4 * h.ALLOWED,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    while True:
        path = pipe.recv()
        signal.alarm(SECONDS)
        try:
            content = load_file(path)
            str(content), copy.deepcopy(content)
            _use(content)
            outcome = "opened"
        except UserError as error:
            fine = str(error).isprintable() and len(str(error)) < 1000
            outcome = "refused" if fine else f"not a sentence: {error!r}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        if h._growth(before) > 4 * os.stat(path).st_size + h.ALLOWED:
            outcome = f"took {h._growth(before) >> 20} MiB"
        pipe.send(outcome)


class Opener:
    """A process that opens one file after another, and is started anew where it dies."""

    def __init__(self, folder):
        self.folder, self.process, self.counts = folder, None, {}

    def __call__(self, name, data):
        if self.process is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch", "ghm_d2.checkpoint"])
            self.pipe, there = context.Pipe()
            self.process = context.Process(target=_work, args=(there,), daemon=True)
            self.process.start()
            there.close()
        path = self.folder / f"x.{name}"
        path.write_bytes(data)
        self.pipe.send(str(path))
        try:
            outcome = self.pipe.recv()
        except EOFError:
            self.process.join()
            outcome, self.process = f"died of {self.process.exitcode}", None
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
        return outcome


@pytest.fixture(scope="module")
def opener(tmp_path_factory):
    made = Opener(tmp_path_factory.mktemp("fuzz"))
    yield made
    if made.process is not None:
        made.process.kill()
    if MINUTES:
        print(f"\n{sum(made.counts.values())} files: {made.counts}")


@settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(file=files())
def _try_some(opener, file):
    assert opener(*file) in ("opened", "refused")


def test_any_file_is_opened_or_refused(opener):
    end = time.monotonic() + 60 * MINUTES
    _try_some(opener)
    while time.monotonic() < end:
        _try_some(opener)
