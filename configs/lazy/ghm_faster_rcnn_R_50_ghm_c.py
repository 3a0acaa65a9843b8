"""The same detector and training as ../ghm_faster_rcnn_R_50_ghm_c.yaml."""

from detectron2.config import LazyCall as L

from ghm_d2.losses import GHMCLoss

from .ghm_faster_rcnn_R_50 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

# "softmax": without use_sigmoid_ce.
model.roi_heads.box_predictor.ghm_c = L(GHMCLoss)(
    bins=30, momentum=0.75, loss_weight=0.25, activation="softmax"
)
