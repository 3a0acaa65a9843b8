"""Data sets: the synthetic default, and COCO-format files named on the command line."""

from ghm_d2.data.registration import (
    CocoDataset,
    check_coco_dataset,
    check_same_classes,
    parse_dataset,
    register_coco_dataset,
    register_datasets,
)
from ghm_d2.data.synthetic import register_synthetic

__all__ = [
    "CocoDataset",
    "check_coco_dataset",
    "check_same_classes",
    "parse_dataset",
    "register_coco_dataset",
    "register_datasets",
    "register_synthetic",
]

register_synthetic()
