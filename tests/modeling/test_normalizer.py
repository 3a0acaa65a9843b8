"""Detectron2's running number of positives follows training steps alone, in our dense detectors."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from torch.utils.checkpoint import checkpoint

from ghm_d2.losses import GHMCLoss
from tests.detectors import TWO_IMAGES, batch, gradients, small_model, step
from tests.modeling.test_fcos import small_fcos

CLS_OFF = ("MODEL.GHM.RETINANET.CLS.ENABLED", False)
REG_OFF = ("MODEL.GHM.RETINANET.REG.ENABLED", False)
ASL1 = ("MODEL.GHM.RETINANET.REG.LOSS_TYPE", "asl1")
PLAIN = {  # a harmonised loss is not there, or refuses a reentrant checkpoint
    "RetinaNet-off": lambda: small_model("ghm_retinanet_R_50", *CLS_OFF, *REG_OFF),
    "RetinaNet-asl1": lambda: small_model("ghm_retinanet_R_50", *CLS_OFF, *ASL1),
    "FCOS-off": lambda: small_fcos(ghm_c=None),
}
MODELS = PLAIN | {
    "RetinaNet": lambda: small_model("ghm_retinanet_R_50"),
    "RetinaNet-GHM-R": lambda: small_model("ghm_retinanet_R_50", *CLS_OFF),
    "RetinaNet-GHM-C": lambda: small_model("ghm_retinanet_R_50", *REG_OFF),
    "FCOS": lambda: small_fcos(ghm_c=GHMCLoss()),
}
INPUTS = batch(*TWO_IMAGES)


def precise_bn(model):
    update_bn_stats(model, [INPUTS], num_iters=1)


def without_gradients(context):
    def validate(model):
        with context():
            model(INPUTS)

    return validate


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "validate",
    [without_gradients(torch.no_grad), without_gradients(torch.inference_mode), precise_bn],
    ids=["no_grad", "inference_mode", "PreciseBN"],
)
def test_a_pass_without_gradients_leaves_it_as_it_was(name, validate):
    model = MODELS[name]()
    with EventStorage():
        validate(model)
        assert not hasattr(model, "loss_normalizer")
        step(model, INPUTS)
        before = model.loss_normalizer
        validate(model)
        assert model.loss_normalizer == before
        step(model, INPUTS)
        assert model.loss_normalizer != before


def checkpointed_step(model, reentrant):
    """The loss behind one checkpoint around the whole model, and its backward pass."""

    def run(_):
        return sum(model(INPUTS).values())

    # A reentrant checkpoint wants an argument with a gradient.
    loss = checkpoint(run, torch.ones(1, requires_grad=True), use_reentrant=reentrant)
    loss.backward()
    return loss.item()


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [(name, False) for name in MODELS] + [(name, True) for name in PLAIN],
)
def test_a_recomputation_does_not_advance_it_again(name, reentrant):
    plain = MODELS[name]()
    model = copy.deepcopy(plain)
    for _ in range(2):
        losses, _ = step(plain, INPUTS)
        model.zero_grad()
        with EventStorage():
            loss = checkpointed_step(model, reentrant)
        assert loss == pytest.approx(sum(losses.values()).item(), rel=1e-6)
        assert model.loss_normalizer == plain.loss_normalizer
        torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-5)
