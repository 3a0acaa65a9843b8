"""TorchScript: detectors with GHM can be scripted where Detectron2's can, and find the same.

Detectron2's FCOS and Cascade R-CNN cannot be scripted, with its own losses either.
"""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.export import scripting_with_instances
from detectron2.export.torchscript_patch import freeze_training_mode, patch_instances
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, Keypoints
from torch import Tensor

from ghm_d2 import add_ghm_config
from ghm_d2.losses import ASL1Loss, CrossEntropyLoss, GHMCLoss, GHMRLoss, OHEMLoss
from ghm_d2.modeling import GHMRPN, DenseLoss, GHMROIHeads
from tests.detectors import TWO_IMAGES, batch, calibrated, small_model

DENSE = {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor}
PROPOSALS = {"proposal_boxes": Boxes, "objectness_logits": Tensor}
RCNN = DENSE | PROPOSALS | {"pred_masks": Tensor, "pred_keypoints": Tensor}
RCNN |= {"pred_keypoint_heatmaps": Tensor}
ALL = ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
RPN_ON = ("MODEL.GHM.RPN.CLS.ENABLED", True, "MODEL.GHM.RPN.REG.ENABLED", True)


def labelled():
    """Two images with boxes, masks and keypoints."""
    inputs = batch(*TWO_IMAGES)
    for each in inputs:
        instances = each["instances"]
        number = len(instances)
        instances.gt_masks = BitMasks(torch.ones(number, 128, 128, dtype=torch.bool))
        points = torch.rand(number, 17, 3) * 60
        points[..., 2] = 2
        instances.gt_keypoints = Keypoints(points)
    return inputs


def assert_same_instances(eager, scripted):
    """Every field, bit for bit, and at least one detection."""
    assert len(eager) > 0
    for name, value in eager.get_fields().items():
        other = getattr(scripted, name)
        if isinstance(value, Boxes):
            value, other = value.tensor, other.tensor
        assert torch.equal(value, other), name


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: small_model("ghm_retinanet_R_50", *ALL), id="RetinaNet"),
        pytest.param(
            lambda: small_model("ghm_retinanet_R_50", *ALL, "MODEL.GHM.CLIP_BEFORE_NMS", True),
            id="RetinaNet-clipped",
        ),
        pytest.param(
            lambda: small_model(
                "ghm_retinanet_R_50",
                *ALL,
                "MODEL.GHM.RETINANET.CLS.LOSS_TYPE",
                "ohem",
                "MODEL.GHM.RETINANET.REG.LOSS_TYPE",
                "asl1",
            ),
            id="RetinaNet-baselines",
        ),
        pytest.param(lambda: small_model("ghm_retinanet_MobileNetV2", *ALL), id="MobileNetV2"),
        pytest.param(lambda: small_model("mmdet/ghm_retinanet_R_50", *ALL), id="mmdet"),
    ],
)
def test_dense_detectors(build):
    model = calibrated(build(), batch(*TWO_IMAGES)).eval()
    scripted = scripting_with_instances(model, DENSE)
    image = {"image": batch(*TWO_IMAGES)[0]["image"]}
    with torch.no_grad():
        images = model.preprocess_image([image])
        features = model.backbone(images.tensor)
        maps = [features[f] for f in model.head_in_features]
        eager = model.forward_inference(images, maps, model.head(maps))[0]
        assert_same_instances(eager, scripted([image])[0])
    buffers = {k for k in model.state_dict() if k.startswith("ghm_")}
    assert buffers <= set(scripted.state_dict())


@pytest.mark.parametrize(
    ("base", "opts"),
    [
        ("ghm_faster_rcnn_R_50_ghm_c", ()),
        ("ghm_mask_rcnn_R_50", ()),
        ("ghm_faster_rcnn_R_50_ghm_c", ("MODEL.KEYPOINT_ON", True)),
        ("ghm_mask_rcnn_R_50", ("MODEL.KEYPOINT_ON", True)),
        ("ghm_faster_rcnn_R_50_ghm_c", ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)),
    ],
    ids=["Faster", "Mask", "Keypoint", "Mask-Keypoint", "Faster-sigmoid"],
)
def test_two_stage_detectors(base, opts):
    model = calibrated(small_model(base, *ALL, *RPN_ON, *opts), labelled()).eval()
    scripted = scripting_with_instances(model, RCNN)
    inputs = [{"image": batch(*TWO_IMAGES)[0]["image"]}] * 2
    with torch.no_grad():
        eager = model.inference(inputs, do_postprocess=False)
        found = scripted.inference(inputs, do_postprocess=False)
    for one, other in zip(eager, found, strict=True):
        assert_same_instances(one, other)


def test_a_proposal_generator_alone():
    cfg = get_cfg()
    add_ghm_config(cfg)
    rpn = GHMRPN(cfg, {"res4": ShapeSpec(channels=1024, stride=16)}).eval()
    images = ImageList(torch.rand(2, 30, 40), [(32, 32), (30, 40)])
    features = {"res4": torch.rand(2, 1024, 1, 2)}
    scripted = scripting_with_instances(rpn, PROPOSALS)
    for one, other in zip(rpn(images, features)[0], scripted(images, features)[0], strict=True):
        assert one.image_size == other.image_size
        assert_same_instances(one, other)


@pytest.mark.parametrize("mask_on", [True, False])
def test_heads_alone(mask_on):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2"
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (10, 10, 5, 5)
    cfg.MODEL.MASK_ON = mask_on
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.01
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.01
    heads = GHMROIHeads(cfg, {"res4": ShapeSpec(channels=64, stride=16)}).eval()
    sizes = [(10, 10), (20, 30)]
    images = ImageList(torch.rand(2, 20, 30), sizes)
    features = {"res4": torch.rand(2, 64, 1, 2)}
    proposals = []
    for size, boxes in zip(
        sizes, [[[1, 1, 3, 3], [2, 2, 6, 6]], [[1, 5, 2, 8], [7, 3, 10, 5]]], strict=True
    ):
        proposals.append(
            Instances(
                size,
                proposal_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)),
                objectness_logits=torch.tensor([0.5, 0.7]),
            )
        )
    with torch.no_grad():
        eager, _ = heads(images, features, proposals)
        with freeze_training_mode(heads), patch_instances(RCNN) as new_instances:
            scripted = torch.jit.script(heads)
            found, _ = scripted(
                images, features, list(map(new_instances.from_instances, proposals))
            )
    for one, other in zip(eager, found, strict=True):
        assert_same_instances(one, other)


@pytest.mark.parametrize(
    "loss",
    [
        GHMCLoss(bias_correction=True),
        GHMRLoss(),
        ASL1Loss(),
        CrossEntropyLoss(),
        OHEMLoss(),
        DenseLoss(GHMCLoss(), num_histogram_groups=2),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_a_loss_is_carried_along_and_not_run(loss, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = loss

        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    scripted = torch.jit.script(Model())
    torch.jit.save(scripted, tmp_path / "model.ts")
    loaded = torch.jit.load(tmp_path / "model.ts")
    assert loaded(torch.ones(2)).tolist() == [2, 2]
    assert loaded.state_dict().keys() == Model().state_dict().keys()
