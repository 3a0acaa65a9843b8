"""Mean, standard deviation, and the paired comparison of two rows."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t for 1 ... 30 degrees of freedom.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; above 30 degrees that of 30, which is a little larger."""
    return _T[min(degrees, len(_T)) - 1]


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1); None where there are too few values for it."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Row minus reference, over the seeds that both have.

    Attributes:
        seeds: the seeds, in ascending order.
        mean: mean of the differences; None without a pair.
        low, high: the ends of the 95 % interval; None with fewer than two pairs.
    """

    seeds: tuple[int, ...]
    mean: float | None
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the interval leaves out 0, else "undecided".

        "not measured" without a pair.
        """
        if not self.seeds:
            return "not measured"
        if self.low is None or self.high is None:
            return "undecided"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "undecided"


def paired_difference(row: Mapping[int, float], reference: Mapping[int, float]) -> Difference:
    """Compare two rows seed by seed: Student's t-interval of the mean difference.

    A seed gives both rows the same order of the images, and where their networks agree, the same
    start, so the differences spread less than the rows do.

    Args:
        row: seed to figure; higher is better.
        reference: the same of the reference row.
    """
    seeds = tuple(sorted(row.keys() & reference.keys()))
    differences = [row[seed] - reference[seed] for seed in seeds]
    mean, deviation = mean_and_deviation(differences)
    if mean is None or deviation is None:
        return Difference(seeds, mean, None, None)
    half = t_quantile(len(seeds) - 1) * deviation / math.sqrt(len(seeds))
    return Difference(seeds, mean, mean - half, mean + half)
