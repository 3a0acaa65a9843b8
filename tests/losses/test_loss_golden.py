"""The default switches reproduce the published losses, gradients and running counts.

The files hold inputs and outputs of mmdetection 3.3.0 over several iterations; the levels of one
iteration share one module. Box rows count where the label is a class.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from ghm_d2.losses import GHMCLoss, GHMRLoss

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module", params=["momentum", "no_momentum"])
def golden(request):
    with np.load(DATA / f"ghm_official_{request.param}.npz") as file:
        return dict(file)


def calls(golden):
    """Key prefix of each call, in the order in which they were made."""
    levels = range(len(golden["meta_levels"]))
    return [f"it{i}_l{level}_" for i in range(int(golden["meta_iters"])) for level in levels]


def assert_published(golden, key, kind, loss, grad, acc_sum):
    inputs = {"cls": "logits", "box": "deltas"}[kind]
    np.testing.assert_allclose(loss.item(), golden[f"{key}loss_{kind}"], rtol=1e-5)
    np.testing.assert_allclose(grad.numpy(), golden[f"{key}grad_{inputs}"], rtol=1e-5, atol=1e-9)
    published = golden[f"{key}acc_{kind}"]
    if published.size:  # the published code keeps no buffer without momentum
        assert np.array_equal(acc_sum.numpy(), published)


@pytest.mark.parametrize("label_form", ["integer", "dense"])
def test_published_ghm_c(golden, label_form):
    loss_fn = GHMCLoss(int(golden["meta_bins_cls"]), float(golden["meta_momentum_cls"]))
    for key in calls(golden):
        logits = torch.tensor(golden[key + "logits"]).requires_grad_()
        labels, weight = torch.tensor(golden[key + "labels"]), None
        if label_form == "dense":
            weight = labels >= 0
            labels = (labels[:, None] == torch.arange(logits.shape[1])).float()
        loss = loss_fn(logits, labels, weight)
        loss.backward()
        assert_published(golden, key, "cls", loss, logits.grad, loss_fn.acc_sum)


@pytest.mark.parametrize("positives", ["selected", "weighted"])
def test_published_ghm_r(golden, positives):
    loss_fn = GHMRLoss(
        float(golden["meta_mu"]),
        int(golden["meta_bins_box"]),
        float(golden["meta_momentum_box"]),
        float(golden["meta_loss_weight_box"]),
    )
    for key in calls(golden):
        deltas = torch.tensor(golden[key + "deltas"]).requires_grad_()
        targets = torch.tensor(golden[key + "targets"])
        labels = torch.tensor(golden[key + "labels"])
        positive = (labels >= 0) & (labels < int(golden["meta_K"]))
        if positives == "selected":
            loss = loss_fn(deltas[positive], targets[positive])
        else:
            loss = loss_fn(deltas, targets, positive.float())
        loss.backward()
        assert_published(golden, key, "box", loss, deltas.grad, loss_fn.acc_sum)
