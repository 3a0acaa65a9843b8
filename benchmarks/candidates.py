"""The detector of benchmarks/candidates.yaml: RetinaNet on a frozen MobileNetV2, Python config.

The recipe is that of configs/small_data/ghm_retinanet_MobileNetV2.yaml at short side 240.
"""

import sys
from pathlib import Path

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from fvcore.common.param_scheduler import CosineParamScheduler

sys.path.insert(0, str(Path(__file__).parent))
from candidate_losses import CandidateLoss  # noqa: E402

from ghm_d2.losses import GHMRLoss  # noqa: E402
from ghm_d2.modeling.backbone import TorchvisionBackbone  # noqa: E402

from ..configs.lazy.common.recipe import dataloader, lr_multiplier, optimizer, train  # noqa: E402
from ..configs.lazy.common.retinanet import model  # noqa: E402

model.backbone.bottom_up = L(TorchvisionBackbone)(
    name="mobilenet_v2",
    out_features=["res3", "res4", "res5"],
    norm="FrozenBN",
    freeze_at="res5",
    cache_mb=1000,
)
model.backbone.update(in_features="${.bottom_up.out_features}", out_channels=64, norm="GN")
model.backbone.top_block = L(LastLevelP6P7)(
    in_channels=1280, out_channels="${..out_channels}", in_feature="res5"
)
model.head.update(conv_dims=[64, 64], norm="GN")
for shape in range(5):
    model.head.input_shape[shape].channels = 64
model.anchor_generator.sizes = [
    [size * 2 ** (step / 3) for step in range(3)] for size in (16, 32, 64, 128, 256)
]
model.update(
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    input_format="RGB",
    num_classes=3,
    cls_targets="iou",
    ghm_c=L(CandidateLoss)(
        power=1.0, gamma=0.0, histograms="batch", levels_by="alike", match_focal=True, scale=1.0
    ),
    ghm_r=L(GHMRLoss)(mu="auto", bins=10, momentum=0.9, loss_weight=4.0, bias_correction=True),
    images_per_histogram=0,
)

dataloader.train.total_batch_size = 4
dataloader.train.num_workers = 0
dataloader.test.num_workers = 0
for split in ("train", "test"):
    dataloader[split].mapper.image_format = "RGB"
    resize = dataloader[split].mapper.augmentations[0]
    resize.update(short_edge_length=240, max_size=533)

optimizer.lr = 0.03
lr_multiplier.scheduler = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
lr_multiplier.warmup_length = 50 / 500
train.update(
    max_iter=500,
    eval_period=500,
    init_checkpoint="weights/ImageNetPretrained/mobilenet_v2.pth",
    statistics_period=0,
    device="cpu",
)
train.clip_gradients.max_norm = 5.0
