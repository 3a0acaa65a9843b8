"""A COCO-format data set of a few small images and a detector small enough to train in a second."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger
from PIL import Image

from ghm_d2.data import registration

ROOT = Path(__file__).resolve().parents[1]
RETINANET = str(ROOT / "configs" / "ghm_retinanet_R_50.yaml")
CLASSES = ("disc", "bar", "cup")
SHAPES = [(64, 48), (48, 64), (64, 64), (72, 40), (40, 72), (64, 32), (56, 40)]  # width, height

TINY = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SEED": 1,
}

# The same as TINY, on a RegNet, which Python configs can make small.
_PYTHON_CONFIG = f'''
from detectron2 import model_zoo
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec

_regnet = LazyConfig.load("{ROOT}/configs/lazy/ghm_retinanet_RegNetX_4GF.py").model.backbone
_cfg = LazyConfig.load("{ROOT}/configs/lazy/NAME.py")
model, optimizer, lr_multiplier = _cfg.model, _cfg.optimizer, _cfg.lr_multiplier
dataloader, train = _cfg.dataloader, _cfg.train
model.backbone.bottom_up = _regnet.bottom_up
model.backbone.bottom_up.update(
    stem_width=8, depth=8, w_a=8.0, w_0=8, w_m=2.0, group_width=8, norm="BN", freeze_at=0
)
model.backbone.out_channels = 16
MODEL
dataloader.train.update(total_batch_size=2, num_workers=0)
dataloader.test.num_workers = 0
dataloader.train.mapper.augmentations[0].short_edge_length = [64]
dataloader.test.mapper.augmentations[0].short_edge_length = 64
train.update(init_checkpoint="", max_iter=2, seed=1, device="cpu", statistics_period=20)
'''
PYTHON_CONFIG = _PYTHON_CONFIG.replace("NAME", "ghm_retinanet_RegNetX_4GF").replace(
    "MODEL", "model.head.update(input_shape=[ShapeSpec(channels=16)] * 5, conv_dims=[16])"
)

# A two-stage detector, and what it finds besides boxes.
RCNN = str(ROOT / "configs" / "ghm_faster_rcnn_R_50_ghm_c.yaml")
_TINY_RCNN = {
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
}
_TINY_MASKS = {
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
}
_TINY_KEYPOINTS = {
    "MODEL.KEYPOINT_ON": True,
    "MODEL.RESNETS.NORM": "BN",  # frozen random norms can give heat maps that are not finite
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (8,),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 3,
    "TEST.KEYPOINT_OKS_SIGMAS": [0.05] * 3,
}
TINY_HEADS = {
    "boxes": _TINY_RCNN,
    "masks": _TINY_RCNN | _TINY_MASKS,
    "keypoints": _TINY_RCNN | _TINY_KEYPOINTS,
}
PYTHON_RCNN = _PYTHON_CONFIG.replace("NAME", "ghm_faster_rcnn_R_50_ghm_c").replace(
    "MODEL",
    """
model.backbone.bottom_up.out_features = ["s1", "s2", "s3", "s4"]
model.proposal_generator.head.in_channels = 16
model.proposal_generator.post_nms_topk = (1000, 20)
_heads = model.roi_heads
_heads.box_head.update(input_shape=ShapeSpec(channels=16, height=7, width=7), fc_dims=[16])
_heads.box_predictor.update(input_shape=ShapeSpec(channels=16), test_score_thresh=0.0)

def add_head(part):
    source = model_zoo.get_config(f"common/models/{part}_rcnn_fpn.py").model.roi_heads
    for name in (f"{part}_in_features", f"{part}_pooler", f"{part}_head"):
        _heads[name] = source[name]
    _heads[f"{part}_head"].input_shape = ShapeSpec(channels=16, height=14, width=14)
    _heads[f"{part}_head"].conv_dims = [8, 8]
""",
)
PYTHON_HEADS = {
    "boxes": "",
    "masks": """
add_head("mask")
dataloader.train.mapper.use_instance_mask = True
""",
    "keypoints": """
add_head("keypoint")
_heads.keypoint_head.num_keypoints = 3
dataloader.train.mapper.use_keypoint = True
dataloader.evaluator.kpt_oks_sigmas = [0.05] * 3
""",
}

# What the index of a model zoo must hold of a model.
ZOO_ENTRY = {
    "name": "a/b",
    "id": 1,
    "weights": "model_final_012abc.pkl",
    "md5": "0" * 32,
    "sha256": "0" * 64,
    "config_sha256": "0" * 64,
}


def coco_content(images: int = 6, classes: tuple[str, ...] = CLASSES) -> dict[str, Any]:
    """Annotations: image i holds one box of class i % 3 and one of class (i + 1) % 3."""
    return {
        "images": [
            {"id": i + 1, "file_name": f"{i}.png", "height": 64, "width": 64} for i in range(images)
        ],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(classes)],
        "annotations": [
            {
                "id": 2 * i + j + 1,
                "image_id": i + 1,
                "category_id": (i + j) % len(classes) + 1,
                "bbox": [8.0 + 20 * j, 10.0 + 2 * i, 24.0, 30.0],
                "area": 720.0,
                "iscrowd": 0,
            }
            for i in range(images)
            for j in range(2)
        ],
    }


def write_coco(folder: Path, name: str = "train", content: Any = None, images: int = 6) -> str:
    """Write images and annotations; returns what follows "NAME=" in --dataset."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(images):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    file = folder / f"{name}.json"
    file.write_text(json.dumps(coco_content(images) if content is None else content))
    return f"{file},{folder / 'images'}"


def write_shapes(folder: Path) -> str:
    """As write_coco, with images that are wide, high and square."""
    content = coco_content(len(SHAPES))
    for i, (width, height) in enumerate(SHAPES):
        content["images"][i].update(width=width, height=height)
        pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    for annotation in content["annotations"]:
        annotation["bbox"] = [4.0, 3.0, 28.0, 26.0]
    (folder / "data.json").write_text(json.dumps(content))
    return f"{folder / 'data.json'},{folder}"


def unregister_all() -> None:
    """Forget every data set that register_coco_dataset has registered."""
    for name in registration._registered_here & set(DatasetCatalog):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    registration._registered_here.clear()


def forget_program() -> None:
    """Each run of main is a program of its own: leave no handler and no data set to the next."""
    for name in ("ghm_d2", "detectron2", "fvcore"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.propagate = True
    setup_logger.cache_clear()
    unregister_all()


def tiny_pairs(**changes: Any) -> list[str]:
    """KEY VALUE pairs of the tiny detector; "__" in a changed name stands for "."."""
    pairs = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return [str(word) for pair in pairs.items() for word in pair]


def one_sentence(main: Callable[..., None], argv: Sequence[Any], capsys: Any, program: str) -> str:
    """The sentence on stderr with which ``main`` must end, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith(f"{program}: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
    return captured.err
