"""What all tests share: few threads, fixed seeds, the optional material beside the project."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton's interpreter runs the CUDA kernels; it must be asked before Triton is
# imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Detectron2 reads it when it is imported; the tests bring their own `datasets` folders.
os.environ.pop("DETECTRON2_DATASETS", None)

# Where several processes share the tests, as `make test` has it, more threads would only get in
# each other's way.
_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(min(torch.get_num_threads(), _THREADS))

# Derandomised: a suite that fails on one run in a hundred is read as noise.
settings.register_profile("ghm", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("ghm")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that need the reference material, which a clone does not have beside it."""
    for item in items:
        if "shared_dir" in getattr(item, "fixturenames", ()):
            item.add_marker("reference")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The reference material: golden files of the published code, and real images."""
    beside = Path(__file__).resolve().parents[1].parent / "shared"
    path = Path(os.environ.get("GHM_D2_SHARED") or beside)
    if not path.is_dir():
        pytest.fail(f"no reference material at {path}; set GHM_D2_SHARED to its folder")
    return path


@pytest.fixture(scope="session")
def evaluate():
    """Loss and gradient of a module's call, as the oracle returns them: (float, float64 array)."""

    def run(module, predictions, *others, dtype=torch.float32):
        x = torch.tensor(predictions, dtype=dtype).requires_grad_()
        rest = [None if a is None else torch.as_tensor(a) for a in others]
        loss = module(x, *rest)
        assert loss.shape == () and loss.requires_grad
        loss.backward()
        return loss.item(), x.grad.double().numpy()

    return run
