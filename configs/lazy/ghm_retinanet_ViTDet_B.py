"""RetinaNet with GHM-C and GHM-R on a plain ViT-B with a simple pyramid. Not published; needs timm.

Images are padded to squares of 1024, so no side may be longer than that.
"""

from functools import partial

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from torch import nn

from .common.transformer import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

_top_block = model.backbone.top_block
model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(
        img_size="${..square_pad}",
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.1,
        window_size=14,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],  # 2, 5, 8, 11 see the whole image
        use_rel_pos=True,
        out_feature="last_feat",
    ),
    in_feature="${.net.out_feature}",
    out_channels=256,
    scale_factors=(2.0, 1.0, 0.5),
    top_block=_top_block,
    norm="LN",
    square_pad=1024,
)
for _loader in (dataloader.train, dataloader.test):
    _loader.mapper.augmentations[0].update(
        short_edge_length=[1024], max_size=1024, sample_style="choice"
    )

optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.7)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
train.init_checkpoint = (
    "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
)
