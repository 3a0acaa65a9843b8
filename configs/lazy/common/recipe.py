"""The published recipe (1x, 16 images, COCO), as in configs/Base-GHM-*.yaml."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from ghm_d2.engine.evaluation import AllThresholdsCOCOEvaluator

optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = 0.01

# Relative to train.max_iter: a shorter training keeps the shape.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[60000, 80000, 90000]),
    warmup_length=500 / 90000,
    warmup_factor=0.001,
    warmup_method="linear",
)

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.augmentations[0].short_edge_length = [800]
dataloader.train.mapper.use_instance_mask = False
dataloader.evaluator = L(AllThresholdsCOCOEvaluator)(
    dataset_name="${..test.dataset.names}",
    output_dir="${train.output_dir}/inference",
    allow_cached_coco=False,
)

train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
# One norm over all gradients together, as SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model" in YAML;
# null: no clipping.
train.clip_gradients = {"max_norm": 35.0, "norm_type": 2.0}
# Iterations between two looks at the gradients of the GHM losses; 0: never.
train.statistics_period = 100
# Below 0: another seed each time.
train.seed = -1
# [task, figure, value, tolerance] each, as in [["bbox", "AP", 37.0, 0.3]]: exit code 1 otherwise.
train.expected_results = []
# What MODEL.GHM.TRAINING is in YAML; docs/configuration.md describes it.
train.val_metric = "bbox/AP"
train.save_best = False
train.patience = 0
train.validation_loss = False
train.ema_decay = 0.0
train.accumulation_steps = 1
train.writers = []
