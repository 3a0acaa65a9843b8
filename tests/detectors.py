"""Small detectors, batches and seeds that several test files share."""

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ghm_d2 import add_ghm_config

NUM_CLASSES = 3

_SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 8,
    "MODEL.RESNETS.NORM", "BN",
    "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.RETINANET.NUM_CONVS", 1,
    "MODEL.RETINANET.NUM_CLASSES", NUM_CLASSES,
    "MODEL.ROI_HEADS.NUM_CLASSES", NUM_CLASSES,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 1,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 4,
    "SOLVER.IMS_PER_BATCH", 2,
]  # fmt: skip


def small_config(base: str, *opts: object) -> CfgNode:
    """The config file ``configs/<base>.yaml`` on a narrow backbone, with ``opts`` on top."""
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(f"configs/{base}.yaml")
    cfg.merge_from_list([*_SMALL, *opts])
    return cfg


def small_model(base: str, *opts: object, seed: int = 0) -> nn.Module:
    """A training-mode model of :func:`small_config` with seeded weights."""
    torch.manual_seed(seed)
    return build_model(small_config(base, *opts)).train()


def batch(*boxes: list[list[float]], size: int = 128) -> list[dict]:
    """One random image for each list of boxes; the classes count up."""
    generator = torch.Generator().manual_seed(7)
    inputs = []
    for image_boxes in boxes:
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.tensor(image_boxes).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(image_boxes)) % NUM_CLASSES
        image = torch.rand(3, size, size, generator=generator) * 255
        inputs.append({"image": image, "instances": instances, "height": size, "width": size})
    return inputs


TWO_IMAGES = ([[8.0, 8, 60, 70], [30, 50, 120, 110]], [[5.0, 5, 40, 40]])


def same_weights(source: nn.Module, target: nn.Module) -> nn.Module:
    """Loads what ``source`` and ``target`` share; only loss statistics may be left over."""
    missing, unexpected = target.load_state_dict(source.state_dict(), strict=False)
    assert all("ghm_" in name for name in missing + unexpected), (missing, unexpected)
    return target


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name to gradient, of the parameters that got one."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, inputs: list[dict]) -> tuple[dict[str, Tensor], dict]:
    """Forward and backward; returns the losses and what was logged."""
    model.zero_grad()
    with EventStorage() as storage:
        losses = model(inputs)
        sum(losses.values()).backward()
    return {k: v.detach() for k, v in losses.items()}, storage.latest()


def calibrated(model: nn.Module, inputs: list[dict]) -> nn.Module:
    """Sets the BatchNorm statistics from ``inputs``, so that eval mode sees sane activations."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad(), EventStorage():
        model.train()(inputs)
    return model


def assert_same_detections(a: nn.Module, b: nn.Module, inputs: list[dict]) -> None:
    """Both models find the same boxes, scores and classes, bit for bit, and at least one each."""
    with torch.no_grad():
        for x, y in zip(a.eval()(inputs), b.eval()(inputs), strict=True):
            x, y = x["instances"], y["instances"]
            assert len(x) > 0 and len(x) == len(y)
            assert torch.equal(x.pred_boxes.tensor, y.pred_boxes.tensor)
            assert torch.equal(x.scores, y.scores)
            assert torch.equal(x.pred_classes, y.pred_classes)
