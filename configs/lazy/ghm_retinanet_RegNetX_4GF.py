"""RetinaNet with GHM-C and GHM-R on RegNetX-4GF. Not published."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem

from .common.recipe import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from .common.retinanet import model

model.backbone.bottom_up = L(RegNet)(
    stem_class=SimpleStem,
    stem_width=32,
    block_class=ResBottleneckBlock,
    depth=23,
    w_a=38.65,
    w_0=96,
    w_m=2.43,
    group_width=40,
    freeze_at=2,
    norm="FrozenBN",
    out_features=["s2", "s3", "s4"],
)
model.backbone.in_features = "${.bottom_up.out_features}"
# P6 from P5: in_channels then does not depend on the backbone.
model.backbone.top_block.update(in_channels="${..out_channels}", in_feature="p5")
model.pixel_std = [57.375, 57.120, 58.395]

optimizer.weight_decay = 5e-5
# pycls' weights of the DDS paper.
train.init_checkpoint = (
    "https://dl.fbaipublicfiles.com/pycls/dds_baselines/160906383/RegNetX-4.0GF_dds_8gpu.pyth"
)
