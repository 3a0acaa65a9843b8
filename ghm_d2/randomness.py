"""The random state of a process: kept, restored, and seeded for a while."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def get_random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's generators, and that of the current GPU.

    Returns:
        Tensors and plain numbers alone, which `torch.load(weights_only=True)` accepts.
    """
    version, words, gauss = random.getstate()
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": numpy_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what :func:`get_random_state` has returned."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    set_numpy_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def numpy_state() -> dict[str, Any]:
    """The state of NumPy's global generator as a tensor and plain numbers."""
    name, words, position, has_gauss, gauss = np.random.get_state()
    words = torch.from_numpy(words.astype(np.int64))
    return {
        "name": name,
        "words": words,
        "position": int(position),
        "has_gauss": int(has_gauss),
        "gauss": float(gauss),
    }


def set_numpy_state(state: dict[str, Any]) -> None:
    """Restores what :func:`numpy_state` has returned."""
    words = state["words"].numpy().astype(np.uint32)
    rest = (state["position"], state["has_gauss"], state["gauss"])
    np.random.set_state((state["name"], words, *rest))


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Restores the states of the generators after the block."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextlib.contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Seeds the generators of the CPU for the block alone.

    Args:
        seed: non-negative numbers; each combination gives a stream of its own.
    """
    words = np.random.SeedSequence(seed).generate_state(8)
    with preserved():
        random.seed(int(words[0]) << 32 | int(words[1]))
        np.random.seed(words[2:6])
        # torch.manual_seed would seed the GPUs as well.
        torch.default_generator.manual_seed(int(words[6]) << 32 | int(words[7]))
        yield
