"""The same detector and training as ../ghm_retinanet_R_50.yaml."""

from .common.recipe import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from .common.retinanet import model

model.backbone.bottom_up.freeze_at = 2
