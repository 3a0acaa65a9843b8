"""RetinaNet with GHM-C and GHM-R on MViTv2-T. Not published; needs timm."""

from functools import partial

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import MViT
from torch import nn

from .common.transformer import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up = L(MViT)(
    embed_dim=96,
    depth=10,
    num_heads=1,
    last_block_indexes=(0, 2, 7, 9),
    residual_pooling=True,
    drop_path_rate=0.2,
    norm_layer=partial(nn.LayerNorm, eps=1e-6),
    out_features=["scale3", "scale4", "scale5"],
)
model.backbone.in_features = "${.bottom_up.out_features}"

optimizer.params.overrides = {
    "pos_embed": {"weight_decay": 0.0},
    "rel_pos_h": {"weight_decay": 0.0},
    "rel_pos_w": {"weight_decay": 0.0},
}
train.init_checkpoint = "detectron2://ImageNetPretrained/mvitv2/MViTv2_T_in1k.pyth"
