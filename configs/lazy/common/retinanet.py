"""RetinaNet R-50 with GHM-C and GHM-R, as ghm_retinanet_R_50.yaml describes it."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from ghm_d2.losses import GHMCLoss, GHMRLoss
from ghm_d2.modeling import GHMRetinaNet, groups_of_images

model = model_zoo.get_config("common/models/retinanet.py").model
model.update(
    _target_=GHMRetinaNet,
    ghm_c=L(GHMCLoss)(bins=30, momentum=0.75, loss_weight=1.0),
    ghm_r=L(GHMRLoss)(mu=0.02, bins=10, momentum=0.7, loss_weight=10.0),
    ghm_scope="level",
    # The authors trained on 8 GPUs with 2 images each and never pooled their statistics.
    images_per_histogram=2,
    num_histogram_groups=L(groups_of_images)(
        total_batch_size="${dataloader.train.total_batch_size}",
        images_per_histogram="${..images_per_histogram}",
    ),
    # For Detectron2's smooth L1, which ghm_r=null brings back.
    smooth_l1_beta=0.1,
)
