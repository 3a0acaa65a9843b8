"""ghm-d2 predict --tile: a detector of what is large in a tile finds what is small in an image."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from ghm_d2.deploy.tiles import tiled
from ghm_d2.errors import UserError

pytest.importorskip("sahi")


def bright_squares(rgb):
    """Finds white squares, but in images of 100 pixels or less alone; as a network scales them."""
    height, width = rgb.shape[:2]
    found = Instances((height * 2, width * 2))
    y, x = np.nonzero(rgb[:, :, 0] > 128)
    small = max(height, width) <= 100 and len(x)
    box = [[x.min() * 2, y.min() * 2, x.max() * 2 + 2, y.max() * 2 + 2]] if small else []
    found.pred_boxes = Boxes(torch.tensor(box, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.full((len(box),), 0.9)
    found.pred_classes = torch.full((len(box),), 2)
    return found


def test_boxes_come_back_in_pixels_of_the_image_and_once():
    image = np.zeros((180, 300, 3), dtype=np.uint8)
    image[20:30, 90:98] = 255  # in two tiles
    image[150:160, 200:212] = 255
    assert len(bright_squares(image)) == 0
    found = tiled(bright_squares, 100, 0.5)(image)
    boxes = sorted(found.pred_boxes.tensor.round().int().tolist())
    assert boxes == [[90, 20, 98, 30], [200, 150, 212, 160]]
    assert found.pred_classes.tolist() == [2, 2] and found.image_size == (180, 300)
    assert len(tiled(bright_squares, 100, 0.95)(image)) == 0


def test_an_empty_image_and_a_wrong_side():
    assert len(tiled(bright_squares, 100, 0.5)(np.zeros((180, 300, 3), dtype=np.uint8))) == 0
    with pytest.raises(UserError, match="at least 32"):
        tiled(bright_squares, 10, 0.5)
