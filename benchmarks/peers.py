"""The published GHM losses of mmdetection 3.3.0, loaded at run time to be measured beside ours.

Nothing of mmdetection is part of this project: its wheel is downloaded into a cache folder, its
checksum is verified, and one file of it runs with stand-ins for the two names that it imports.
"""

import hashlib
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

REQUIREMENT = "mmdet==3.3.0"
WHEEL = "mmdet-3.3.0-py3-none-any.whl"
SHA256 = "2e23e291281ac57e7dccf8678e957da45fbe560ce78a1f5ded6afeccd3730f17"
MEMBER = "mmdet/models/losses/ghm_loss.py"
TIMEOUT_S = 120


class PeerUnavailable(Exception):
    """A peer cannot be measured; the message says why, in one sentence."""


def default_cache() -> Path:
    """The user's cache folder for downloaded peers."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ghm_d2" / "peers"


def fetch_wheel(folder: Path) -> Path:
    """The checked wheel in `folder`, downloaded there unless it is there already.

    Raises:
        PeerUnavailable: it cannot be downloaded, or its checksum is wrong.
    """
    wheel = folder / WHEEL
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except OSError as error:
            raise PeerUnavailable(f"{folder} cannot be written ({error.strerror})") from error
        except subprocess.TimeoutExpired as error:
            raise PeerUnavailable(f"pip download took over {TIMEOUT_S} s") from error
        if done.returncode or not wheel.is_file():
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise PeerUnavailable(f"pip download {REQUIREMENT} failed: {said[-1]}")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise PeerUnavailable(f"{wheel.name} has sha256 {found}, not {SHA256}: delete it")
    return wheel


def mmdet_losses(folder: Path) -> types.ModuleType:
    """mmdetection's module with `GHMC` and `GHMR`; raises PeerUnavailable."""
    with zipfile.ZipFile(fetch_wheel(folder)) as archive:
        return load_ghm_losses(archive.read(MEMBER).decode())


def load_ghm_losses(source: str) -> types.ModuleType:
    """Runs the text of `ghm_loss.py` as a module of a stand-in package."""
    module = types.ModuleType("mmdet.models.losses.ghm_loss")
    module.__package__ = "mmdet.models.losses"
    with _stand_ins():
        exec(compile(source, MEMBER, "exec"), module.__dict__)
    return module


@contextmanager
def _stand_ins() -> Iterator[None]:
    registry = types.ModuleType("mmdet.registry")
    registry.MODELS = _Registry()
    utils = types.ModuleType("mmdet.models.losses.utils")
    utils.weight_reduce_loss = _weight_reduce_loss
    names = ("mmdet", "mmdet.models", "mmdet.models.losses")
    modules = {name: types.ModuleType(name) for name in names}
    modules |= {registry.__name__: registry, utils.__name__: utils}
    for name in names:
        modules[name].__path__ = []  # what makes a module a package
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class _Registry:
    def register_module(self):
        def keep(cls: type[nn.Module]) -> type[nn.Module]:
            return cls

        return keep


def _weight_reduce_loss(
    loss: Tensor, weight: Tensor | None = None, reduction: str = "mean", avg_factor: float = 1.0
) -> Tensor:
    """The weighted sum over `avg_factor`: the one reduction that the GHM losses ask for."""
    if reduction != "mean":
        raise NotImplementedError(reduction)
    return (loss if weight is None else loss * weight).sum() / avg_factor
