"""The losses on trial have GHM-C and quality focal loss as their ends."""

import sys

import pytest
import torch

from ghm_d2.losses import FocalLoss, GHMCLoss
from tests.tiny import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from candidate_losses import CandidateLoss, modulated  # noqa: E402

LEVELS, K = (48, 12, 3), 3


@pytest.fixture
def steps():
    """Three batches of logits, soft targets and kept rows, level by level."""
    torch.manual_seed(1)
    found = []
    for _ in range(3):
        x = [(torch.randn(n, K) * 3).requires_grad_() for n in LEVELS]
        own = [torch.randint(0, 2 * K, (n,)) for n in LEVELS]
        t = [(y.unsqueeze(1) == torch.arange(K)) * torch.rand(len(y), K) for y in own]
        found.append((x, t, [torch.rand(n) < 0.9 for n in LEVELS]))
    return found


def gradients(loss, x, t, masks):
    value = loss.forward_levels(x, t, masks)
    return value, torch.autograd.grad(value, x)


@pytest.mark.parametrize("histograms", ["level", "batch"])
def test_power_1_is_ghm_c(steps, histograms):
    ours = CandidateLoss(histograms=histograms, match_focal=False)
    theirs = GHMCLoss(30, 0.9, bias_correction=True)
    call = theirs.forward_levels if histograms == "level" else theirs.forward_pooled
    for x, t, masks in steps:
        torch.testing.assert_close(ours.forward_levels(x, t, masks), call(x, t, masks))


def test_power_0_is_quality_focal_loss(steps):
    ours = CandidateLoss(power=0.0, gamma=2.0, match_focal=False)
    normalizer = 100.0
    for x, t, masks in steps:
        rows, target, keep = torch.cat(x), torch.cat(t), torch.cat(masks)
        own = target.max(dim=1)
        labels = torch.where(own.values > 0, own.indices, K).masked_fill(~keep, -1)
        expected = FocalLoss(gamma=2.0)(rows, labels, own.values)
        normalizer = 0.9 * normalizer + 0.1 * int(((labels >= 0) & (labels < K)).sum())
        torch.testing.assert_close(ours.forward_levels(x, t, masks), expected / normalizer)


def test_positives_and_negatives_apart(steps):
    """Each of the two has a total of 1, by GHM-C of its own."""
    ours = CandidateLoss(histograms="sign", match_focal=False)
    parts = [GHMCLoss(30, 0.9, bias_correction=True) for _ in range(2)]
    for x, t, masks in steps:
        positive = [(level > 0).float() for level in t]
        expected = sum(
            part.forward_pooled(
                x, t, [w * m.unsqueeze(1) for w, m in zip(weight, masks, strict=True)]
            )
            for part, weight in zip(parts, (positive, [1 - w for w in positive]), strict=True)
        )
        torch.testing.assert_close(ours.forward_levels(x, t, masks), expected)


def test_levels_count_by_their_positives(steps):
    x, t, masks = steps[0]
    by_positives = CandidateLoss(histograms="level", levels_by="positives", match_focal=False)
    alike = CandidateLoss(histograms="level", match_focal=False)
    numbers = torch.tensor(
        [int((level[keep] > 0).sum()) for level, keep in zip(t, masks, strict=True)]
    )
    found, expected = gradients(by_positives, x, t, masks)[1], gradients(alike, x, t, masks)[1]
    for a, b, share in zip(found, expected, (numbers + 1) / (numbers.sum() + 3), strict=True):
        torch.testing.assert_close(a, b * 3 * share)


def test_the_scale_follows_focal_loss(steps):
    """After the first step, and on the same batch, the two gradients have one sum."""
    loss = CandidateLoss(power=0.5, scale=2.0)
    x, t, masks = steps[0]
    found = gradients(loss, x, t, masks)[1]
    keep = torch.cat(masks)
    rows = torch.cat(x)[keep].detach().requires_grad_()
    focal = modulated(rows, torch.cat(t)[keep], 2.0).sum() / loss.positives
    (expected,) = torch.autograd.grad(focal, rows)
    assert sum(g.abs().sum() for g in found) == pytest.approx(2 * expected.abs().sum().item())


def test_integer_labels_are_hard_targets(steps):
    x = steps[0][0]
    labels = [torch.randint(-1, K + 1, (n,)) for n in LEVELS]
    found = CandidateLoss(match_focal=False).forward_levels(x, labels)
    expected = GHMCLoss(30, 0.9, bias_correction=True).forward_pooled(x, labels)
    torch.testing.assert_close(found, expected)


def test_evaluation_writes_nothing(steps):
    loss = CandidateLoss()
    loss.forward_levels(*steps[0])
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    with torch.no_grad():
        loss.forward_levels(*steps[1])
    loss.eval().forward_levels(*steps[1])
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
