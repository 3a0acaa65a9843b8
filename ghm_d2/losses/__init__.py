"""Gradient Harmonizing Mechanism losses (Li, Liu, Wang, AAAI 2019, arXiv 1811.05181).

This package imports torch alone.
"""

from .base import raise_deferred_errors
from .baselines import (
    ASL1Loss,
    CrossEntropyLoss,
    FocalLoss,
    OHEMLoss,
    SmoothL1Loss,
    cross_entropy_loss,
    focal_loss,
    ohem_loss,
)
from .density import exact_gradient_density
from .functional import (
    authentic_smooth_l1_loss,
    count_unit_regions,
    harmonized_sum,
    regression_examples,
    sigmoid_examples,
    softmax_examples,
)
from .ghm_c import GHMCLoss
from .ghm_r import GHMRLoss

__all__ = [
    "ASL1Loss",
    "CrossEntropyLoss",
    "FocalLoss",
    "GHMCLoss",
    "GHMRLoss",
    "OHEMLoss",
    "SmoothL1Loss",
    "authentic_smooth_l1_loss",
    "count_unit_regions",
    "cross_entropy_loss",
    "exact_gradient_density",
    "focal_loss",
    "harmonized_sum",
    "ohem_loss",
    "raise_deferred_errors",
    "regression_examples",
    "sigmoid_examples",
    "softmax_examples",
]
