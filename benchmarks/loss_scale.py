"""Measures the gradients of the two-stage GHM losses against Detectron2's own, on real data.

    python benchmarks/loss_scale.py --dataset bccd=data/train.json,data/images \
        --output benchmarks/results/loss_scale_bccd.json

A Faster R-CNN is trained with Detectron2's losses from random weights. At every step all losses
are computed on the same predictions, and the L2 norm of each one's gradient with respect to its
predictions is recorded: what lies behind the predictions is the same network for both, so these
norms say how strongly each loss pulls. The default LOSS_WEIGHTs come from the median ratios.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from tqdm import tqdm

from ghm_d2.engine.setup import build_config
from ghm_d2.engine.trainer import GHMTrainer
from ghm_d2.errors import exits_with_one_sentence
from ghm_d2.files import write_json
from ghm_d2.provenance import describe

CONFIG = "configs/ghm_faster_rcnn_R_50_ghm_c.yaml"
OPTIONS = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.RESNETS.NORM", "BN",
    "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    "MODEL.FPN.OUT_CHANNELS", 64,
    "MODEL.FPN.NORM", "BN",
    "MODEL.ROI_BOX_HEAD.FC_DIM", 256,
    "MODEL.GHM.RPN.CLS.ENABLED", True,
    "MODEL.GHM.RPN.REG.ENABLED", True,
    "MODEL.GHM.RPN.CLS.LOSS_WEIGHT", 1.0,
    "MODEL.GHM.RPN.REG.LOSS_WEIGHT", 1.0,
    "MODEL.GHM.ROI_BOX_HEAD.CLS.LOSS_WEIGHT", 1.0,
    "MODEL.GHM.ROI_BOX_HEAD.REG.LOSS_WEIGHT", 1.0,
    "INPUT.MIN_SIZE_TRAIN", (320,),
    "INPUT.MAX_SIZE_TRAIN", 640,
    "SOLVER.IMS_PER_BATCH", 2,
    "SOLVER.BASE_LR", 0.01,
    "DATALOADER.NUM_WORKERS", 0,
    "SEED", 1,
]  # fmt: skip

Norms = dict[str, list[float]]


@contextmanager
def _without_ghm(module: nn.Module):
    ghm_c, ghm_r = module.ghm_c, module.ghm_r
    module.ghm_c = module.ghm_r = None
    try:
        yield
    finally:
        module.ghm_c, module.ghm_r = ghm_c, ghm_r


def _norm(loss: Tensor, predictions: Sequence[Tensor]) -> float:
    grads = torch.autograd.grad(loss, predictions, retain_graph=True, allow_unused=True)
    return torch.sqrt(sum((g**2).sum() for g in grads if g is not None)).item()


def record(module: nn.Module, stock: type, norms: Norms, split) -> None:
    """Replaces `module.losses` by one that records both kinds and returns the stock losses.

    Args:
        module: a GHM module.
        stock: the Detectron2 class whose `losses` it overrides.
        norms: `{loss name: [GHM norm / stock norm of each step]}`, appended to.
        split: arguments of `losses` -> {loss name: the predictions it depends on}.
    """
    ghm_losses = module.losses

    def losses(*args):
        with _without_ghm(module):
            ours = stock.losses(module, *args)
        theirs = ghm_losses(*args)
        for name, predictions in split(*args).items():
            reference = _norm(ours[name], predictions)
            if reference > 0:
                norms.setdefault(name, []).append(_norm(theirs[name], predictions) / reference)
        return ours

    module.losses = losses


def measure(dataset: str, iterations: int, sigmoid: bool) -> Norms:
    """Trains with the stock losses; returns the ratio of gradient norms of each step and loss."""
    pairs = [str(word) for word in (*OPTIONS, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", sigmoid)]
    cfg, _ = build_config(CONFIG, pairs, [dataset], log_to_file=False)
    seed_all_rng(cfg.SEED)
    model = build_model(cfg).train()
    norms: Norms = {}
    record(
        model.roi_heads.box_predictor,
        FastRCNNOutputLayers,
        norms,
        lambda predictions, _: {"loss_cls": predictions[:1], "loss_box_reg": predictions[1:]},
    )
    record(
        model.proposal_generator,
        RPN,
        norms,
        lambda _anchors, logits, _labels, deltas, _boxes: {
            "loss_rpn_cls": logits,
            "loss_rpn_loc": deltas,
        },
    )
    optimizer = GHMTrainer.build_optimizer(cfg, model)
    loader = iter(build_detection_train_loader(cfg))
    with EventStorage():
        for step in tqdm(range(iterations), desc="sigmoid" if sigmoid else "softmax"):
            for group in optimizer.param_groups:
                group["lr"] = cfg.SOLVER.BASE_LR * min(1, (step + 1) / 50)
            optimizer.zero_grad()
            sum(model(next(loader)).values()).backward()
            optimizer.step()
    return norms


def summarize(norms: Norms) -> dict[str, dict[str, object]]:
    """Median and quartiles of each ratio over each quarter of the run."""
    out = {}
    for name, values in norms.items():
        parts = [values[i * len(values) // 4 : (i + 1) * len(values) // 4] for i in range(4)]
        out[name] = {
            "median_by_quarter": [round(statistics.median(p), 4) for p in parts],
            "median_after_first_quarter": round(statistics.median(sum(parts[1:], [])), 4),
            "quartiles_after_first_quarter": [
                round(q, 4) for q in statistics.quantiles(sum(parts[1:], []), n=4)
            ],
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="NAME=annotations.json,image_dir")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    result = {
        "ratio": "L2 norm of the GHM loss's gradient / of Detectron2's, at the predictions",
        "dataset": args.dataset.split("=")[0],
        "iterations": args.iterations,
        "options": [str(x) for x in OPTIONS],
        **describe(),
    }
    for sigmoid in (False, True):
        norms = measure(args.dataset, args.iterations, sigmoid)
        result["sigmoid" if sigmoid else "softmax"] = summarize(norms)
    write_json(args.output, result)
    print(json.dumps({k: result[k] for k in ("softmax", "sigmoid")}, indent=1))


if __name__ == "__main__":
    with exits_with_one_sentence("loss_scale.py"):
        main()
