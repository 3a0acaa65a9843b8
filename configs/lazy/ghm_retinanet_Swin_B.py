"""RetinaNet with GHM-C and GHM-R on Swin-B. Not published; needs timm for drop_path_rate."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import SwinTransformer

from .common.transformer import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up = L(SwinTransformer)(
    embed_dim=128,
    depths=[2, 2, 18, 2],
    num_heads=[4, 8, 16, 32],
    drop_path_rate=0.4,
    out_indices=[1, 2, 3],
)
model.backbone.in_features = ["p1", "p2", "p3"]

optimizer.lr = 4e-5
optimizer.weight_decay = 0.05
optimizer.params.overrides = {"relative_position_bias_table": {"weight_decay": 0.0}}
train.init_checkpoint = "detectron2://ImageNetPretrained/swin/swin_base_patch4_window7_224_22k.pth"
