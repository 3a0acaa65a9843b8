"""The same detector and training as ../ghm_faster_rcnn_R_50.yaml."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from ghm_d2.losses import GHMRLoss
from ghm_d2.modeling import GHMRPN, GHMFastRCNNOutputLayers, GHMROIHeads

from .common.recipe import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for _name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(_name)
model.backbone.bottom_up.freeze_at = 2
# The RPN keeps Detectron2's losses, as in the YAML file.
model.proposal_generator.update(_target_=GHMRPN, ghm_c=None, ghm_r=None)
model.roi_heads._target_ = GHMROIHeads
model.roi_heads.box_predictor.update(
    _target_=GHMFastRCNNOutputLayers,
    ghm_c=None,
    ghm_r=L(GHMRLoss)(mu=0.02, bins=10, momentum=0.7, loss_weight=0.25),
)
