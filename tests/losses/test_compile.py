"""torch.compile: the losses without a graph break, and a whole training forward."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from ghm_d2.losses import GHMCLoss, GHMRLoss
from tests.detectors import TWO_IMAGES, batch, gradients, small_model, step


class Losses(torch.nn.Module):
    """Both losses behind a layer with parameters."""

    def __init__(self, loss_weight):
        super().__init__()
        torch.manual_seed(1)
        self.head = torch.nn.Linear(8, 8)
        self.ghm_c = GHMCLoss(loss_weight=loss_weight)
        self.ghm_r = GHMRLoss(loss_weight=loss_weight)

    def forward(self, x, labels, pred, target):
        loss_cls = self.ghm_c(self.head(x), labels)
        return loss_cls + self.ghm_r(pred + self.head.bias[:4], target)


@pytest.mark.parametrize("loss_weight", [1.0, "auto"])
def test_compiled_losses_agree_without_a_graph_break(loss_weight):
    args = (
        torch.randn(500, 8) * 3,
        torch.randint(-1, 9, (500,)),
        torch.randn(50, 4) * 0.1,
        torch.randn(50, 4) * 0.1,
    )
    plain, other = Losses(loss_weight), Losses(loss_weight)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(3):  # the running counts must move alike
        a, b = plain(*args), compiled(*args)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
        plain.zero_grad()
        other.zero_grad()
        a.backward()
        b.backward()
        torch.testing.assert_close(gradients(plain), gradients(other), rtol=1e-4, atol=1e-6)
        assert torch.equal(plain.ghm_c.acc_sum, other.ghm_c.acc_sum)
        assert torch.equal(plain.ghm_r.acc_sum, other.ghm_r.acc_sum)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "boxes"])
def test_the_exact_density_compiles_without_a_graph_break(kind):
    settings = {"momentum": 0.0, "density": "exact"}
    if kind == "boxes":
        loss_fn, x, target = GHMRLoss(**settings), torch.randn(50, 4) * 0.05, torch.zeros(50, 4)
    else:
        loss_fn = GHMCLoss(activation=kind, **settings)
        x, target = torch.randn(50, 8) * 3, torch.randint(-1, 8, (50,))
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
    grads = []
    for call in (loss_fn, compiled):
        leaf = x.clone().requires_grad_()
        loss = call(leaf, target)
        loss.backward()
        grads.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_compiled_training_forward_agrees():
    plain, other = small_model("ghm_retinanet_R_50"), small_model("ghm_retinanet_R_50")
    inputs = batch(*TWO_IMAGES)
    compiled = torch.compile(other, backend="aot_eager")
    for _ in range(2):
        expected, _ = step(plain, inputs)
        with EventStorage():
            losses = compiled(inputs)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
