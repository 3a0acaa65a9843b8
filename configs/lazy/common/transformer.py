"""What the configs with a transformer backbone share: AdamW, RGB images."""

from detectron2 import model_zoo

from .recipe import dataloader, lr_multiplier, train  # noqa: F401
from .retinanet import model

_constants = model_zoo.get_config("common/data/constants.py").constants
model.pixel_mean = _constants.imagenet_rgb256_mean
model.pixel_std = _constants.imagenet_rgb256_std
model.input_format = "RGB"
dataloader.train.mapper.image_format = "RGB"  # the test loader's follows
# P6 from P5: in_channels then does not depend on the backbone.
model.backbone.top_block.update(in_channels="${..out_channels}", in_feature="p5")

optimizer = model_zoo.get_config("common/optim.py").AdamW
