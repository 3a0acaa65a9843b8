"""A resumed training is the training that was stopped, bit for bit; whatever it was stopped by."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import RETINANET, ROOT, coco_content, forget_program, tiny_pairs

from ghm_d2.engine import main

RCNN = str(ROOT / "configs" / "ghm_faster_rcnn_R_50.yaml")
SIZES = [(64, 48), (48, 64), (64, 64), (72, 40), (40, 72), (64, 32), (56, 40)]  # width, height
# A stock RetinaNet divides by a running number of positives.
STOCK = ["MODEL.META_ARCHITECTURE", "RetinaNet", "DATALOADER.ASPECT_RATIO_GROUPING", "False"]
STOCK += ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]


@pytest.fixture(autouse=True)
def clean_up():
    torch.set_num_threads(1)
    yield
    forget_program()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """NAME=annotations,folder of images that are wide, high and square."""
    folder = tmp_path_factory.mktemp("data")
    content = coco_content(len(SIZES))
    for i, (width, height) in enumerate(SIZES):
        content["images"][i].update(width=width, height=height)
        pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    for annotation in content["annotations"]:
        annotation["bbox"] = [4.0, 3.0, 28.0, 26.0]
    (folder / "data.json").write_text(json.dumps(content))
    return f"resumed={folder / 'data.json'},{folder}"


@pytest.fixture
def train(data):
    """Run main on `data` into a folder; no seed is given."""

    def run(output, *words, config=RETINANET):
        pairs = tiny_pairs(
            OUTPUT_DIR=output,
            SEED=-1,
            INPUT__MIN_SIZE_TRAIN="(48,64)",
            SOLVER__MAX_ITER=6,
            SOLVER__CHECKPOINT_PERIOD=3,
            TEST__EVAL_PERIOD=3,
        )
        main(["--config-file", config, *pairs, "--dataset", data, *map(str, words)])

    return run


def stop_at(source, target, name="model_0000002.pth"):
    """A folder as a kill after that checkpoint leaves it."""
    target.mkdir()
    shutil.copy(source / name, target / name)
    (target / "last_checkpoint").write_text(name)
    return target


def same(a, b, path=""):
    """Checks that two checkpoints are equal in every number."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{path}/{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def final(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RETINANET, ["DATALOADER.NUM_WORKERS", 1]),
        (RETINANET, STOCK),
        (RCNN, ["INPUT.CROP.ENABLED", "True"]),  # samples anchors and proposals at random
    ],
    ids=["worker", "stock", "rcnn"],
)
def test_resumed_is_undisturbed(train, tmp_path, config, words):
    both = ["DATASETS.TRAIN", "('resumed',)", "DATASETS.TEST", "('resumed',)"]
    train(tmp_path / "whole", *words, *both, config=config)
    parts = stop_at(tmp_path / "whole", tmp_path / "parts")
    words += ["DATALOADER.NUM_WORKERS", 0] if config == RETINANET else []
    train(parts, *words, "--resume", config=config)
    same(final(tmp_path / "whole"), final(parts))
