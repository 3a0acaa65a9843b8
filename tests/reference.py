"""Float64 oracle of GHM-C and GHM-R, written from the formulas alone (NumPy, no torch).

Shape shorthand: R rows, K classes, M unit regions (bins), N kept examples.

    ASL1(d) = sqrt(d^2 + mu^2) - mu,    g = |d| / sqrt(d^2 + mu^2)
    BCE:  g = |sigmoid(x) - t|,         softmax cross entropy:  g = 1 - p_target
    S_j  <- alpha S_j + (1 - alpha) R_j,    w_j = 1 / (S_j D),    loss = sum_i w(g_i) loss_i
    exact: GD(g) = #{k: g - eps/2 <= g_k < g + eps/2} / (min(g + eps/2, 1) - max(g - eps/2, 0))

Source: Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, arXiv 1811.05181.
Clear rather than fast; the gradient of every loss is written in closed form, with w constant.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Examples(NamedTuple):
    """What every GHM loss is made of; `keep` is False for an ignored or dropped example."""

    gradient_norm: Array  # shape of the examples, in [0, 1]
    loss: Array  # shape of the examples
    gradient: Array  # shape of the input: d loss / d input, unweighted
    keep: Array  # bool, shape of the examples


def sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def mask_of(weight: Array | None, shape: tuple[int, ...]) -> Array:
    """`weight` as a mask over the examples: (R,) holds for every example of its row."""
    if weight is None:
        return np.ones(shape, dtype=bool)
    mask = np.asarray(weight) > 0
    mask = mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim))
    return np.broadcast_to(mask, shape).copy()


def sigmoid_examples(
    logits: Array,
    labels: Array,
    weight: Array | None = None,
    *,
    class_weight: Array | None = None,
    ignored: float = -1,
) -> Examples:
    """Binary cross entropy of each (row, class); labels (R,), K = background, or dense (R, K) in
    [0, 1]. `class_weight` (K,) multiplies the loss of each column."""
    x = np.asarray(logits, dtype=np.float64)
    labels = np.asarray(labels)
    keep = mask_of(weight, x.shape)
    factor = np.ones(x.shape[1]) if class_weight is None else np.asarray(class_weight, np.float64)
    if labels.ndim == 2:
        keep &= labels != ignored
        t = np.where(labels == ignored, 0, labels).astype(np.float64)
    else:
        t = np.zeros_like(x)
        for row, label in enumerate(labels):
            if label == ignored:
                keep[row] = False
            elif 0 <= label < x.shape[1]:
                t[row, label] = 1.0
    # -t ln p - (1 - t) ln(1 - p), in the form that does not overflow
    loss = np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x)))
    # p - t is -(1 - p) = -sigmoid(-x) for a positive: no cancellation
    slope = np.where(t == 1, -sigmoid(-x), sigmoid(x) - np.where(t == 1, 0, t))
    return Examples(np.abs(slope), factor * loss, factor * slope, keep)


def softmax_examples(
    logits: Array,
    labels: Array,
    weight: Array | None = None,
    *,
    class_weight: Array | None = None,
    ignored: float = -1,
) -> Examples:
    """Cross entropy of each row; logits (R, K + 1), labels (R,) in [0, K]. `class_weight`
    (K + 1,) multiplies the loss of each row by its class."""
    x = np.asarray(logits, dtype=np.float64)
    rows = x.shape[0]
    keep = mask_of(weight, (rows,))
    g, loss, gradient = np.zeros(rows), np.zeros(rows), np.zeros_like(x)
    log_p = log_softmax(x) if rows else x
    for row, label in enumerate(np.asarray(labels)):
        if label == ignored:
            keep[row] = False
            continue
        p = np.exp(log_p[row])
        one_hot = np.eye(x.shape[1])[label]
        factor = 1.0 if class_weight is None else class_weight[label]
        g[row] = p[one_hot == 0].sum()
        loss[row] = -factor * log_p[row, label]
        gradient[row] = factor * (p - one_hot)
    return Examples(g, loss, gradient, keep)


def asl1_examples(pred: Array, target: Array, weight: Array | None = None, *, mu: float):
    """Authentic smooth L1 of each coordinate."""
    d = np.asarray(pred, dtype=np.float64) - np.asarray(target, dtype=np.float64)
    root = np.sqrt(d * d + mu * mu)
    return Examples(np.abs(d) / root, root - mu, d / root, mask_of(weight, d.shape))


def region_of(g: Array, bins: int) -> Array:
    """Region j = [j/M, (j+1)/M), the last one closed."""
    region = np.zeros(g.shape, dtype=np.int64)
    for j in range(1, bins):
        region[g >= j / bins] = j
    return region


def region_counts(g: Array, bins: int) -> Array:
    """R_j, the number of examples in each unit region."""
    region = region_of(g, bins)
    return np.array([np.count_nonzero(region == j) for j in range(bins)], dtype=np.int64)


def exact_density(g: Array, epsilon: float) -> Array:
    """GD at each of the gradient norms g, by its definition: O(N^2)."""
    g = np.asarray(g, dtype=np.float64)
    flat = g.ravel()
    density = np.empty_like(flat)
    for i, centre in enumerate(flat):
        low, high = centre - epsilon / 2, centre + epsilon / 2
        count = np.count_nonzero((low <= flat) & (flat < high))
        density[i] = count / (min(high, 1.0) - max(low, 0.0))
    return density.reshape(g.shape)


@dataclass
class RunningCounts:
    """The moving average of the region counts, with every switch."""

    bins: int
    momentum: float
    normalize_by: str = "valid_bins"
    decay_empty_bins: bool = False
    bias_correction: bool = False

    def __post_init__(self) -> None:
        self.sums = np.zeros(self.bins)
        self.updates = np.zeros(self.bins, dtype=np.int64)

    def region_weights(self, counts: Array, *, write: bool) -> Array:
        """w_j = 1 / (S_j D) after this call's update; 0 for an empty region."""
        sums, updates = self.sums.copy(), self.updates.copy()
        weights = np.zeros(self.bins)
        if counts.sum() == 0:
            return weights
        valid = np.count_nonzero(counts)
        divisor = valid if self.normalize_by == "valid_bins" else self.bins
        for j, count in enumerate(counts):
            if count > 0 or self.decay_empty_bins:
                sums[j] = self.momentum * sums[j] + (1 - self.momentum) * count
                updates[j] += 1
            if count > 0:
                start = 1 - self.momentum ** updates[j] if self.bias_correction else 1.0
                weights[j] = 1 / (sums[j] / start * divisor)
        if write:
            self.sums, self.updates = sums, updates
        return weights


class FollowingWeight:
    """reference / divisor / own, each of them averaged over calls with weights 0.9^age; 1 before
    the first call in which all three are above 0 and finite."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, float, float]] = []

    def __call__(self, figures: tuple[float, float, float], *, write: bool) -> float:
        usable = all(math.isfinite(x) and x > 0 for x in figures)
        calls = [*self.calls, figures] if usable else self.calls
        if write:
            self.calls = calls
        if not calls:
            return 1.0
        ages = np.arange(len(calls))[::-1]
        reference, divisor, own = np.average(calls, axis=0, weights=0.9**ages)
        return float(reference / divisor / own)


class GHMReference:
    """A GHM loss over any kind of example; one call is one histogram and one update.

    A call returns (loss, gradient); `pooled` takes a list of argument tuples, puts all of them
    into one histogram and returns (loss, list of gradients).
    """

    def __init__(
        self,
        examples: Callable[..., Examples],
        *,
        bins: int,
        momentum: float,
        loss_weight: float | str = 1.0,
        density: str = "unit_region",
        reference: Callable[..., tuple[float, float]] | None = None,
        **switches: Any,
    ) -> None:
        self.examples = examples
        self.bins = bins
        self.loss_weight = loss_weight
        self.density = density
        # (L1 norm of the reference's gradient, its divisor) of one call, for loss_weight "auto"
        self.reference = reference
        self.following = FollowingWeight()
        self.counts = RunningCounts(bins, momentum, **switches)
        self.training = True

    def example_weights(self, g: Array) -> Array:
        """w of each kept example."""
        if self.density == "exact":
            return 1 / exact_density(g, 1 / self.bins)
        counts = region_counts(g, self.bins)
        weights = self.counts.region_weights(counts, write=self.training)
        return weights[region_of(g, self.bins)]

    def pooled(self, calls: Sequence[tuple]) -> tuple[float, list[Array]]:
        parts = [self.examples(*call) for call in calls]
        kept = [part.gradient_norm[part.keep] for part in parts]
        ends = np.cumsum([len(g) for g in kept])
        g = np.concatenate(kept)
        weight_of = self.example_weights(g)
        pieces = np.split(weight_of, ends[:-1])
        loss, gradients = 0.0, []
        factor = self.loss_weight
        if factor == "auto":
            found = zip(calls, parts, strict=True)
            norm, divisor = np.sum([self.reference(c, p) for c, p in found], axis=0)
            own = float((weight_of * (region_of(g, self.bins) + 0.5) / self.bins).sum())
            factor = self.following((norm, max(divisor, 1), own), write=self.training)
        for part, piece in zip(parts, pieces, strict=True):
            weights = np.zeros(part.keep.shape)
            weights[part.keep] = factor * piece
            loss += (weights * part.loss).sum()
            missing = part.gradient.ndim - weights.ndim
            gradients.append(weights.reshape(weights.shape + (1,) * missing) * part.gradient)
        return float(loss), gradients

    def __call__(self, *call: Array | None) -> tuple[float, Array]:
        loss, (gradient,) = self.pooled([call])
        return loss, gradient


def ghm_c(
    *, bins=30, momentum=0.75, activation="sigmoid", class_weight=None, ignored=-1, **switches
) -> GHMReference:
    of_activation = {"sigmoid": sigmoid_examples, "softmax": softmax_examples}[activation]

    def examples(*call: Array | None) -> Examples:
        return of_activation(*call, class_weight=class_weight, ignored=ignored)

    def reference(call: tuple, part: Examples) -> tuple[float, float]:
        logits, labels = call[:2]
        if activation == "softmax":  # half the L1 norm, as the own gradient's
            return part.gradient_norm[part.keep].sum(), np.count_nonzero(part.keep)
        gradient = 4 * focal(logits, labels)[1]
        positives = [part.keep[r, k] for r, k in enumerate(labels) if 0 <= k < part.keep.shape[1]]
        return np.abs(gradient)[part.keep].sum(), np.sum(positives)

    settings = {"bins": bins, "momentum": momentum, "reference": reference}
    return GHMReference(examples, **settings, **switches)


def ghm_r(*, mu=0.02, bins=10, momentum=0.7, **switches) -> GHMReference:
    if mu == "auto":
        return FollowingGHMR(bins=bins, momentum=momentum, **switches)

    def examples(*call: Array | None) -> Examples:
        return asl1_examples(*call, mu=mu)

    def reference(call: tuple, part: Examples) -> tuple[float, float]:
        d = np.subtract(*call[:2], dtype=np.float64)[part.keep]
        return 2 * np.count_nonzero(d), d.size / part.keep[0].size if d.size else 0.0

    settings = {"bins": bins, "momentum": momentum, "reference": reference}
    return GHMReference(examples, **settings, **switches)


class FollowingGHMR(GHMReference):
    """mu = 1.5 A within [0.01, 0.5]; A is a moving average (0.95) of the lower median of |d|, which
    begins with the first median."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(asl1_examples, **settings)
        self.average: float | None = None

    def pooled(self, calls: Sequence[tuple]) -> tuple[float, list[Array]]:
        errors = np.concatenate(
            [
                np.abs(np.subtract(pred, target, dtype=np.float64))[
                    mask_of(weight[0] if weight else None, pred.shape)
                ]
                for pred, target, *weight in calls
            ]
        )
        average = self.average
        if errors.size:
            median = np.sort(errors)[(errors.size - 1) // 2]
            average = median if average is None else 0.95 * average + 0.05 * median
        self.mu = min(max(1.5 * (average or 0.0), 0.01), 0.5)
        if self.training:
            self.average = average
        self.examples = functools.partial(asl1_examples, mu=self.mu)
        return super().pooled(calls)


# The baselines: (loss, gradient), labels (R,) with K = background and -1 = ignored.


def cross_entropy(logits: Array, labels: Array, dense: Array | None = None) -> tuple[float, Array]:
    """Sum over the classes, mean over the rows that are not ignored; `dense` (R, K): targets."""
    examples = sigmoid_examples(logits, labels if dense is None else dense)
    rows = max(np.count_nonzero(np.asarray(labels) != -1), 1)
    weights = (np.asarray(labels) != -1)[:, None] / rows
    return float((weights * examples.loss).sum()), weights * examples.gradient


def focal(
    logits: Array,
    labels: Array,
    scores: Array | None = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> tuple[float, Array]:
    """Summed; with `scores`, the target of each row's own class, quality focal loss, without alpha.

    d/dx g^gamma BCE = g^gamma (p - t) + gamma g^(gamma - 1) sign(p - t) p (1 - p) BCE, g = |p - t|
    """
    x = np.asarray(logits, dtype=np.float64)
    dense = np.zeros_like(x)
    for row, label in enumerate(labels):
        if 0 <= label < x.shape[1]:
            dense[row, label] = 1.0 if scores is None else scores[row]
    examples = sigmoid_examples(x, dense)
    p, g, slope = sigmoid(x), examples.gradient_norm, examples.gradient
    loss = g**gamma * examples.loss
    gradient = (
        g**gamma * slope + gamma * g ** (gamma - 1) * np.sign(slope) * p * (1 - p) * examples.loss
    )
    weights = (np.asarray(labels) != -1)[:, None] * np.ones_like(x)
    if scores is None:
        weights = weights * np.where(dense == 1, alpha, 1 - alpha)
    return float((weights * loss).sum()), weights * gradient


def ohem(
    logits: Array, labels: Array, ratio: int, dense: Array | None = None
) -> tuple[float, Array]:
    """Sum over the classes, mean over the positives and the `ratio` times as many negatives of the
    largest loss; `dense` (R, K): the targets."""
    examples = sigmoid_examples(logits, labels if dense is None else dense)
    background = examples.loss.shape[1]
    row_loss = examples.loss.sum(axis=1)
    chosen = [r for r, label in enumerate(labels) if 0 <= label < background]
    negatives = [r for r, label in enumerate(labels) if label == background]
    hardest_first = sorted(negatives, key=lambda r: -row_loss[r])
    chosen += hardest_first[: ratio * max(len(chosen), 1)]
    weights = np.zeros((len(labels), 1))
    weights[chosen] = 1 / max(len(chosen), 1)
    return float((weights[:, 0] * row_loss).sum()), weights * examples.gradient


def asl1(pred: Array, target: Array, *, mu: float) -> tuple[float, Array]:
    """Authentic smooth L1, summed."""
    examples = asl1_examples(pred, target, mu=mu)
    return float(examples.loss.sum()), examples.gradient


# Inputs on which float32 code and float64 oracle must agree: no gradient norm so near an inner edge
# that rounding decides its region.


def edge_distance(g: Array, bins: int) -> Array:
    """Distance of each gradient norm to the nearest inner edge j/M."""
    distance = np.full(g.shape, np.inf)
    for j in range(1, bins):
        distance = np.minimum(distance, np.abs(g - j / bins))
    return distance


def rows_off_edges(examples: Examples, bins: int, margin: float) -> Array:
    distance = edge_distance(examples.gradient_norm, bins)
    return (distance > margin).reshape(distance.shape[0], -1).all(axis=1)


def draw_logits(
    rng: np.random.Generator,
    rows: int,
    classes: int,
    bins: int = 30,
    *,
    activation: str = "sigmoid",
    ignored: float = 0.1,
    dtype: type = np.float32,
    margin: float = 2e-6,
) -> tuple[Array, Array]:
    """Imbalanced logits (rows, K) or (rows, K + 1), int64 labels (rows,); values are exact in
    `dtype` and returned as float32 at least."""
    softmax = activation == "softmax"
    spare = 2 * rows + 20
    x = rng.normal(-1.5, 2.5, size=(spare, classes + softmax)).astype(dtype)
    x = x.astype(np.promote_types(dtype, np.float32))
    labels = rng.integers(0, classes + 1, size=spare)
    labels[rng.random(spare) < 0.5] = classes
    check = (softmax_examples if softmax else sigmoid_examples)(x, labels)
    good = np.flatnonzero(rows_off_edges(check, bins, margin))[:rows]
    assert len(good) == rows
    labels[rng.random(spare) < ignored] = -1
    return x[good], labels[good]


def draw_boxes(
    rng: np.random.Generator,
    rows: int,
    bins: int = 10,
    mu: float = 0.02,
    *,
    dtype: type = np.float32,
    margin: float = 1e-5,
) -> tuple[Array, Array]:
    """Predicted and target deltas (rows, 4) whose gradient norms fill all of [0, 1)."""
    spare = 2 * rows + 20
    g = rng.uniform(0, 0.9999, size=(spare, 4))
    d = rng.choice([-1.0, 1.0], size=g.shape) * mu * g / np.sqrt(1 - g * g)
    target = rng.normal(0, 0.4, size=g.shape).astype(dtype)
    pred = (target + d).astype(dtype)
    wide = np.promote_types(dtype, np.float32)
    pred, target = pred.astype(wide), target.astype(wide)
    good = np.flatnonzero(rows_off_edges(asl1_examples(pred, target, mu=mu), bins, margin))[:rows]
    assert len(good) == rows
    return pred[good], target[good]


def density_is_robust(g: Array, epsilon: float, margin: float = 1e-6) -> bool:
    """Whether no pair of gradient norms lies so near epsilon/2 apart that rounding decides."""
    flat = np.asarray(g, dtype=np.float64).ravel()
    gap = np.abs(np.abs(flat[:, None] - flat[None, :]) - epsilon / 2)
    return bool((gap > margin).all())
