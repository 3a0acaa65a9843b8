"""DenseLoss: levels, groups of images and masks, against single calls of the losses."""

import pytest
import torch

from ghm_d2.losses import GHMCLoss, GHMRLoss
from ghm_d2.modeling import DenseLoss, groups_of_images

N, K, SIZES = 5, 3, (40, 12)


@pytest.fixture
def batch():
    """Logits, labels, deltas, targets and positives of each level; image 2 has no positive."""
    logits = [torch.randn(N, size, K) for size in SIZES]
    labels = [torch.randint(-1, K + 1, (N, size)) for size in SIZES]
    for y in labels:
        y[2] = K
    deltas = [torch.randn(N, size, 4) for size in SIZES]
    targets = [torch.randn(N, size, 4) for size in SIZES]
    return logits, labels, deltas, targets, [(y >= 0) & (y < K) for y in labels]


@pytest.mark.parametrize("scope", ["level", "batch"])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_values_and_counts_are_those_of_single_losses(batch, scope, images):
    logits, labels, deltas, targets, masks = batch
    groups = [slice(i, i + images) for i in range(0, N, images)] if images else [slice(0, N)]
    settings = {
        "ghm_scope": scope,
        "images_per_histogram": images,
        "num_histogram_groups": len(groups) + 1,
    }
    dense_c, dense_r = DenseLoss(GHMCLoss(), **settings), DenseLoss(GHMRLoss(), **settings)
    single_c = [GHMCLoss() for _ in groups]
    single_r = [GHMRLoss() for _ in groups]
    for _ in range(2):
        c = dense_c(logits, labels)
        chosen = [[x[m] for x, m in zip(xs, masks, strict=True)] for xs in (deltas, targets)]
        r = dense_r(*chosen, masks)
        expected_c, expected_r = [], []
        for one_c, one_r, g in zip(single_c, single_r, groups, strict=True):
            xs = [x[g].reshape(-1, K) for x in logits]
            ys = [y[g].reshape(-1) for y in labels]
            ds = [d[g][m[g]] for d, m in zip(deltas, masks, strict=True)]
            ts = [t[g][m[g]] for t, m in zip(targets, masks, strict=True)]
            if scope == "batch":
                xs, ys, ds, ts = ([torch.cat(part)] for part in (xs, ys, ds, ts))
            expected_c.append(sum(one_c(x, y) for x, y in zip(xs, ys, strict=True)))
            expected_r.append(sum(one_r(d, t) for d, t in zip(ds, ts, strict=True)))
        torch.testing.assert_close(c, sum(expected_c) / len(groups))
        torch.testing.assert_close(r, sum(expected_r) / len(groups))
    for dense, singles in ((dense_c, single_c), (dense_r, single_r)):
        for ours, single in zip(dense, singles, strict=False):
            torch.testing.assert_close(ours.acc_sum, single.acc_sum)
        assert dense[len(groups)].acc_sum.sum() == 0  # a group that this batch does not fill


@pytest.mark.parametrize("images", [0, 2])
def test_scores_are_the_targets_of_the_own_classes(batch, images):
    logits, labels, *_ = batch
    scores = [torch.rand(N, size) for size in SIZES]
    groups = [slice(i, i + images) for i in range(0, N, images)] if images else [slice(0, N)]
    dense = DenseLoss(GHMCLoss(), "level", images, len(groups))
    expected = []
    for group in groups:
        loss = GHMCLoss()
        for x, y, s in zip(logits, labels, scores, strict=True):
            target = torch.zeros(N, x.shape[1], K)
            for n, i in ((y >= 0) & (y < K)).nonzero().tolist():
                target[n, i, y[n, i]] = s[n, i]
            counted = (y[group] >= 0).float().flatten()
            expected.append(
                loss(x[group].flatten(0, 1), target[group].flatten(0, 1), weight=counted)
            )
    found = dense(logits, labels, scores=scores)
    torch.testing.assert_close(found, sum(expected) / len(groups))
    # A score of 1 everywhere is no soft target.
    ones = [torch.ones_like(s) for s in scores]
    torch.testing.assert_close(
        DenseLoss(GHMCLoss())(logits, labels, scores=ones), DenseLoss(GHMCLoss())(logits, labels)
    )


@pytest.mark.parametrize("wrong", [-2, K + 1, 99])
def test_a_wrong_label_beside_scores_is_refused(batch, wrong):
    logits, labels, *_ = batch
    labels[1][0, 3] = wrong
    with pytest.raises(ValueError, match="labels"):
        DenseLoss(GHMCLoss())(logits, labels, scores=[torch.rand(N, size) for size in SIZES])


def test_without_positives_the_loss_is_zero_on_the_graph():
    deltas = [torch.zeros(0, 4, requires_grad=True) for _ in SIZES]
    masks = [torch.zeros(N, size, dtype=torch.bool) for size in SIZES]
    dense = DenseLoss(GHMRLoss(), images_per_histogram=2, num_histogram_groups=3)
    loss = dense(deltas, [torch.zeros(0, 4) for _ in SIZES], masks)
    loss.backward()
    assert loss == 0 and all(d.grad is not None for d in deltas)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("ghm_scope", "image"), ("images_per_histogram", -1), ("num_histogram_groups", 0)],
)
def test_settings_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be .*{value}"):
        DenseLoss(GHMCLoss(), **{argument: value})


def test_what_does_not_fit_is_refused(batch):
    logits, labels, deltas, targets, masks = batch
    with pytest.raises(ValueError, match=r"an entry for each level, got \(2, 1, 1\)"):
        DenseLoss(GHMCLoss())(logits, labels[:1])
    with pytest.raises(ValueError, match="an entry for each level"):
        DenseLoss(GHMCLoss())([], [])
    with pytest.raises(ValueError, match="3 groups of a batch of 5 images, but .* for 2"):
        DenseLoss(GHMCLoss(), images_per_histogram=2, num_histogram_groups=2)(logits, labels)
    dense = DenseLoss(GHMRLoss(), images_per_histogram=2, num_histogram_groups=3)
    whole = [x.flatten(0, 1) for x in deltas]
    with pytest.raises(ValueError, match=r"the \d+ rows that the mask .* selects, got 200"):
        dense(whole, [x.flatten(0, 1) for x in targets], masks)


def test_a_checkpoint_of_fewer_groups_fills_the_further_ones():
    one, three = DenseLoss(GHMCLoss()), DenseLoss(GHMCLoss(), num_histogram_groups=3)
    one[0].acc_sum.fill_(5.0)
    assert list(one.state_dict()) == ["0.acc_sum"]
    three.load_state_dict(one.state_dict())
    assert [loss.acc_sum[0].item() for loss in three] == [5.0] * 3


def test_no_loss_for_none():
    assert DenseLoss.of(None, ghm_scope="level") is None


@pytest.mark.parametrize(
    ("total", "images", "groups"), [(16, 2, 8), (16, 0, 1), (15, 2, 8), (1, 2, 1)]
)
def test_groups_of_images(total, images, groups):
    assert groups_of_images(total, images) == groups
