"""The numbers behind the paper's figures, summed by unit region.

Densities here are the paper's: one histogram of all examples, `GD = R_j M`, no moving average.
"""

import numpy as np
import torch
from torch import Tensor

from ghm_d2.losses import (
    count_unit_regions,
    regression_examples,
    sigmoid_examples,
    softmax_examples,
)
from ghm_d2.losses.functional import unit_region_index

from .statistics import positives


def harmonizing_parameters(counts: np.ndarray) -> np.ndarray:
    """`beta_j = N / GD_j` with `GD_j = R_j M` (paper, eq. 9), float64 (M,).

    Args:
        counts: (M,), R_j.

    Returns:
        NaN for a region without examples.
    """
    counts = np.asarray(counts, dtype=np.float64)
    with np.errstate(divide="ignore"):
        density = np.where(counts > 0, counts * len(counts), np.nan)
    return counts.sum() / density


class ClassificationDistribution:
    """Counts and summed gradient norms of cross entropy and focal loss in each unit region.

    The reformulated gradient norm of an example is `g` for cross entropy, `beta g` for GHM-C
    and `alpha_t g^gamma (g - gamma (1 - g) ln(1 - g))` for focal loss, the derivative of
    `-alpha_t (1 - p_t)^gamma ln p_t` by the logit, where `g = 1 - p_t`.
    """

    def __init__(
        self, bins: int, alpha: float = 0.25, gamma: float = 2.0, activation: str = "sigmoid"
    ) -> None:
        """
        Args:
            bins: number M of unit regions.
            alpha: weight of the positives in the focal loss; negatives have `1 - alpha`. Below
                0: no weights, as in Detectron2.
            gamma: its focusing parameter.
            activation: "sigmoid": an example is one logit; "softmax": it is a row of logits.
        """
        self.bins, self.alpha, self.gamma, self.activation = bins, alpha, gamma, activation
        self.counts = np.zeros(bins, dtype=np.int64)
        self.positives = np.zeros(bins, dtype=np.int64)
        self.cross_entropy = np.zeros(bins)
        self.focal = np.zeros(bins)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds examples.

        Args:
            logits: (R, K), or (R, K + 1) for softmax, the last column being background.
            labels: int64 (R,): class in [0, K), K = background, -1 = ignored.
        """
        logits, labels = logits[labels >= 0], labels[labels >= 0]
        if not len(labels):
            return
        examples = sigmoid_examples if self.activation == "sigmoid" else softmax_examples
        loss, norm = examples(logits, labels)
        positive = positives(labels, logits.shape[1], self.activation)
        region = unit_region_index(norm, None, self.bins)
        self.counts += count_unit_regions(region, self.bins).cpu().numpy()
        own = count_unit_regions(torch.where(positive, region, self.bins), self.bins)
        self.positives += own.cpu().numpy()
        norm, loss = norm.double(), loss.double()  # the loss is -ln(1 - g), exact also near 1
        focal = norm**self.gamma * (norm + self.gamma * (1 - norm) * loss)
        if self.alpha >= 0:
            focal *= torch.where(positive, self.alpha, 1 - self.alpha)
        self.cross_entropy += _sums(norm, region, self.bins)
        self.focal += _sums(focal, region, self.bins)

    def gradient_sums(self) -> dict[str, np.ndarray]:
        """Sum of the reformulated gradient norms in each region, float64 (M,); 0 where empty."""
        harmonized = np.nan_to_num(harmonizing_parameters(self.counts)) * self.cross_entropy
        return {"CE": self.cross_entropy, "focal": self.focal, "GHM-C": harmonized}

    def gradient_norms(self) -> dict[str, np.ndarray]:
        """Mean reformulated gradient norm of each region, float64 (M,); NaN where empty."""
        counts = np.where(self.counts > 0, self.counts, np.nan)
        return {name: total / counts for name, total in self.gradient_sums().items()}

    def contributions(self) -> dict[str, np.ndarray]:
        """Share of each region in the total gradient of each loss, float64 (M,), sum 1."""
        return {name: total / total.sum() for name, total in self.gradient_sums().items()}


class RegressionDistribution:
    """Counts of the gradient norms `g_r = |d| / sqrt(d^2 + mu^2)` of box coordinates."""

    def __init__(self, bins: int, mu: float) -> None:
        """
        Args:
            bins: number M of unit regions.
            mu: width of the quadratic part of authentic smooth L1, above 0.
        """
        self.bins, self.mu = bins, mu
        self.counts = np.zeros(bins, dtype=np.int64)

    @torch.no_grad()
    def add(self, pred: Tensor, target: Tensor) -> None:
        """Adds coordinates of positive boxes; `pred` and `target` have the same, any, shape."""
        _, norm = regression_examples(pred, target, self.mu)
        region = unit_region_index(norm, None, self.bins)
        self.counts += count_unit_regions(region, self.bins).cpu().numpy()

    def fractions(self) -> np.ndarray:
        """Fraction of all examples in each region, float64 (M,)."""
        return self.counts / self.counts.sum()


def regression_gradients(
    d: np.ndarray, counts: np.ndarray, mu: float, delta: float
) -> dict[str, np.ndarray]:
    """Reformulated gradient norm of three losses at box errors `d >= 0` (float64, any shape).

    Args:
        d: `|pred - target|`.
        counts: (M,), the distribution that GHM-R meets.
        mu: of authentic smooth L1.
        delta: the error above which smooth L1 is linear; below it, the norm is `d / delta`.

    Returns:
        "SL1", "ASL1" and "GHM-R" (`beta g_r`, NaN in a region without examples), of d's shape.
    """
    norm = d / np.sqrt(d * d + mu * mu)
    region = unit_region_index(torch.from_numpy(norm), None, len(counts)).numpy()
    beta = harmonizing_parameters(counts)[region]
    return {"SL1": np.minimum(d / delta, 1.0), "ASL1": norm, "GHM-R": beta * norm}


def _sums(values: Tensor, region: Tensor, bins: int) -> np.ndarray:
    total = torch.zeros(bins, dtype=torch.float64, device=values.device)
    return total.scatter_add_(0, region.flatten(), values.flatten()).cpu().numpy()
