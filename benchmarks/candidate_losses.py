"""Classification losses on trial: what lies between GHM-C and quality focal loss.

One formula has both as ends. Of the examples i, (anchor, class) pairs with logit x, probability p
and target t, those of a histogram share counts S_j, a moving average, of which D are not zero; N is
the running number of positives:

    loss = scale / N * sum_i (N / (D S_j(i)))^power |p - t|^gamma BCE(x, t)

`power` 1 and `gamma` 0 are GHM-C, 0 and 2 quality focal loss (Li et al., NeurIPS 2020) where t is
the IoU of the positive's box. Nothing of this is in the package: benchmarks/candidates.yaml says
what each was worth.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghm_d2.losses.functional import Averaging, count_unit_regions, unit_region_index, walk


class CandidateLoss(nn.Module):
    """A loss of :class:`ghm_d2.modeling.DenseLoss` (`ghm_scope` "level").

    Args:
        power: of the density, in [0, 1].
        gamma: of focal loss's modulation, at least 0.
        histograms: what shares counts: "level", each FPN level, with common running counts, as in
            the authors' code; "batch"; or "sign", positives' own logits and all others.
        levels_by: the weights of the levels: "alike", or "positives", in proportion to one more
            than their number.
        match_focal: whether `scale` follows the data: a running ratio that makes the sum of
            |gradient| at the logits that of quality focal loss.
        scale: a factor.
    """

    bins = 30
    momentum = 0.9

    def __init__(
        self,
        power: float = 1.0,
        gamma: float = 0.0,
        histograms: str = "batch",
        levels_by: str = "alike",
        match_focal: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.power, self.gamma, self.histograms = power, gamma, histograms
        self.levels_by, self.match_focal, self.scale = levels_by, match_focal, scale
        sets = 2 if histograms == "sign" else 1
        self.register_buffer("acc_sum", torch.zeros(sets, self.bins))
        self.register_buffer("num_updates", torch.zeros(sets, self.bins, dtype=torch.int64))
        self.register_buffer("positives", torch.tensor(100.0))  # where Detectron2 starts
        self.register_buffer("sizes", torch.zeros(2, dtype=torch.float64))

    def forward_levels(
        self,
        logits: Sequence[Tensor],
        targets: Sequence[Tensor],
        masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits: #levels tensors (N * Ri, K).
            targets: as many: dense (N * Ri, K) in [0, 1], or int64 (N * Ri,) with a class in
                [0, K), K = background, -1 = ignored.
            masks: with dense targets as many bool (N * Ri,), the rows that are not ignored.

        Returns:
            A scalar.
        """
        if masks is None:
            masks = [y >= 0 for y in targets]
            targets = [
                F.one_hot(y.clamp(min=0), x.shape[1] + 1)[:, :-1]
                for x, y in zip(logits, targets, strict=True)
            ]
        x = [level[keep] for level, keep in zip(logits, masks, strict=True)]
        t = [level[keep].to(x[0].dtype) for level, keep in zip(targets, masks, strict=True)]
        numbers = [int((level > 0).sum()) for level in t]
        writes = self.training and torch.is_grad_enabled()
        average = self.positives * 0.9 + 0.1 * max(sum(numbers), 1)
        if writes:
            self.positives.copy_(average)
        weights = self._density_weights(x, t, average, writes)
        if self.levels_by == "positives":
            total = sum(numbers) + len(numbers)
            weights = [
                w * (len(numbers) * (n + 1) / total) for w, n in zip(weights, numbers, strict=True)
            ]
        x, t, w = torch.cat(x), torch.cat(t), torch.cat(weights)
        loss = (w * modulated(x, t, self.gamma)).sum()
        if not self.match_focal:
            return self.scale * loss
        return self.scale * self._ratio(loss, x, t, average, writes) * loss

    def _density_weights(
        self, x: list[Tensor], t: list[Tensor], average: Tensor, writes: bool
    ) -> list[Tensor]:
        """`(N / (D S_j))^power / N` of every example, level by level."""
        sizes = [len(level) for level in x]
        weights = [torch.zeros_like(level) for level in x]
        with torch.no_grad():
            for number, parts in enumerate(self._parts(t)):
                norms = [(a.sigmoid() - b).abs() for a, b in zip(x, t, strict=True)]
                regions = [
                    unit_region_index(g, keep, self.bins)
                    for g, keep in zip(norms, parts, strict=True)
                ]
                if self.histograms != "level":
                    regions = [torch.cat(regions)]
                counts = torch.stack([count_unit_regions(r, self.bins) for r in regions])
                averaging = Averaging(self.momentum)
                found, state = walk(
                    counts, self.acc_sum[number], self.num_updates[number], averaging
                )
                if writes:
                    for name, value in state.items():
                        getattr(self, name)[number] = value
                scaled = (found * average) ** self.power * (found > 0) / average
                scaled = F.pad(scaled, (0, 1))  # an example of another histogram has no weight
                own = [row[r] for row, r in zip(scaled, regions, strict=True)]
                own = own if self.histograms == "level" else own[0].split(sizes)
                weights = [a + b for a, b in zip(weights, own, strict=True)]
        return weights

    def _parts(self, t: list[Tensor]) -> Iterator[list[Tensor | None]]:
        """For each set of counts, the examples that share it."""
        if self.histograms != "sign":
            yield [None] * len(t)
            return
        yield [level > 0 for level in t]
        yield [level == 0 for level in t]

    def _ratio(self, loss: Tensor, x: Tensor, t: Tensor, average: Tensor, writes: bool) -> Tensor:
        if not loss.requires_grad:
            return loss.new_ones(())
        focal = modulated(x, t, 2.0).sum() / average
        sizes = [
            torch.autograd.grad(value, x, retain_graph=True)[0].abs().sum(dtype=torch.float64)
            for value in (focal, loss)
        ]
        found = self.sizes * self.momentum + (1 - self.momentum) * torch.stack(sizes)
        if writes:
            self.sizes.copy_(found)
        return (found[0] / found[1].clamp(min=1e-30)).to(loss.dtype)


def modulated(x: Tensor, t: Tensor, gamma: float) -> Tensor:
    """`|p - t|^gamma BCE(x, t)` of each example, the modulation with its gradient."""
    loss = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    return loss * (x.sigmoid() - t).abs() ** gamma if gamma else loss
