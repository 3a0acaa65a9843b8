"""Small detectors that find something with random weights, and images to find it in."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.detectors import TWO_IMAGES, batch, calibrated, small_config, small_model

RETINANET = "ghm_retinanet_R_50"
FASTER_RCNN = "ghm_faster_rcnn_R_50_ghm_c"
BASES = (RETINANET, FASTER_RCNN)

# ResNet-18 comes in one width alone.
OPTS = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
        "INPUT.MIN_SIZE_TEST", 150, "INPUT.MAX_SIZE_TEST", 300)  # fmt: skip
_SPREAD = {"cls_score": 1.0, "objectness_logits": 1.0, "bbox_pred": 0.1, "anchor_deltas": 0.1}


def skip_where_refused(format: str) -> None:
    """Skips a test of a format that this PyTorch cannot write (test_old_torch_is_named)."""
    if format != "torchscript" and torch.__version__ < (2, 5):
        pytest.skip(f"{format} needs PyTorch 2.5")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: random rectangles, so that no two places look the same."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 90, np.uint8)
    for _ in range(25):
        y, x = rng.integers(0, height), rng.integers(0, width)
        h, w = rng.integers(8, 80, 2)
        pixels[y : y + h, x : x + w] = rng.integers(0, 255, 3)
    return np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))


@functools.cache
def detector(base: str, *opts: object) -> nn.Module:
    """A narrow model in eval mode whose outputs are spread as widely as those of a trained one."""
    model = small_model(base, *OPTS, *opts)
    inputs = batch(*TWO_IMAGES)
    for number, item in enumerate(inputs):
        item["image"] = tensor(picture(128, 128, number))
    heads = getattr(model, "roi_heads", None)
    on = {name: getattr(heads, name, False) for name in ("mask_on", "keypoint_on")}
    for name in filter(on.get, on):
        setattr(heads, name, False)  # the images have neither
    calibrated(model, inputs)
    for name in filter(on.get, on):
        setattr(heads, name, True)
    model.eval()
    for name, layer in model.named_modules():
        if (end := name.rpartition(".")[2]) in _SPREAD:
            seen: list[torch.Tensor] = []
            hook = layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
            with torch.no_grad():
                model([{"image": tensor(picture(160, 220))}])
                hook.remove()
                layer.weight.mul_(_SPREAD[end] / torch.cat([x.flatten() for x in seen]).std())
    return model


def save_detector(base: str, folder: Path, *opts: object, **entries: object) -> list[str]:
    """Writes the model's weights and config; returns the command line's words that name them.

    Args:
        base: name of a config.
        folder: to write to.
        opts: KEY VALUE pairs.
        entries: of the checkpoint, beside the model.
    """
    cfg = small_config(base, *OPTS, *opts)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": detector(base, *opts).state_dict(), **entries}, folder / "model.pth")
    return ["--config-file", str(folder / "config.yaml"),
            "MODEL.WEIGHTS", str(folder / "model.pth")]  # fmt: skip


def write_pictures(folder: Path, *sizes: tuple[int, int]) -> list[Path]:
    """PNG files 0.png, 1.png, ... of these (height, width)."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, size in enumerate(sizes):
        files.append(folder / f"{number}.png")
        Image.fromarray(picture(*size, seed=number)).save(files[-1])
    return files
