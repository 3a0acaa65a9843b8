"""FCOS with GHM-C; boxes and centerness keep Detectron2's losses. Not published."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from ghm_d2.losses import GHMCLoss
from ghm_d2.modeling import GHMFCOS, groups_of_images

from .common.recipe import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model = model_zoo.get_config("common/models/fcos.py").model
model.backbone.bottom_up.freeze_at = 2
model.update(
    _target_=GHMFCOS,
    # RetinaNet's settings.
    ghm_c=L(GHMCLoss)(bins=30, momentum=0.75, loss_weight=1.0),
    ghm_scope="level",
    images_per_histogram=2,
    num_histogram_groups=L(groups_of_images)(
        total_batch_size="${dataloader.train.total_batch_size}",
        images_per_histogram="${..images_per_histogram}",
    ),
)
