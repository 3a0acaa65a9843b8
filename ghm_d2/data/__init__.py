"""Data sets: the synthetic default, and files and folders named on the command line."""

from .dataset_option import CocoDataset, parse_dataset
from .datasets import check_coco_dataset, check_same_classes
from .registration import register_coco_dataset, register_datasets
from .synthetic import register_synthetic

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
