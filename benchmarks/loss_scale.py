"""Measures the gradients of the GHM losses against Detectron2's own, on real data.

    python benchmarks/loss_scale.py --dataset bccd=data/train.json,data/images \
        --output benchmarks/results/loss_scale_bccd.json

A Faster R-CNN is trained with Detectron2's losses from random weights. At every step all losses
are computed on the same predictions, and the L2 norm of each one's gradient with respect to its
predictions is recorded: what lies behind the predictions is the same network for both, so these
norms say how strongly each loss pulls. The default LOSS_WEIGHTs come from the median ratios.

With `--config-file` a GHM RetinaNet is measured instead, trained by focal loss and smooth L1 with
the recipe of that file; the ratios of L1 norms, which `LOSS_WEIGHT auto` holds constant, stand
there too. Without `--dataset` it trains on the data of the config.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from tqdm import tqdm

from ghm_d2.engine.setup import build_config
from ghm_d2.engine.trainer import GHMTrainer
from ghm_d2.errors import UserError, exits_with_one_sentence
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

RETINANET_OPTIONS = [
    "MODEL.DEVICE", "cpu",
    "MODEL.GHM.RETINANET.CLS.LOSS_WEIGHT", "1.0",
    "MODEL.GHM.RETINANET.REG.LOSS_WEIGHT", "1.0",
    "DATALOADER.NUM_WORKERS", "0",
    "SEED", "1",
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


def _norms(loss: Tensor, predictions: Sequence[Tensor]) -> tuple[float, float]:
    """The L2 and the L1 norm of the gradient."""
    grads = torch.autograd.grad(loss, predictions, retain_graph=True, allow_unused=True)
    flat = torch.cat([g.flatten() for g in grads if g is not None])
    return flat.norm().item(), flat.norm(1).item()


def record(module: nn.Module, stock: type, norms: Norms, split) -> None:
    """Replaces `module.losses` by one that records both kinds and returns the stock losses.

    Args:
        module: a GHM module.
        stock: the Detectron2 class whose `losses` it overrides.
        norms: `{loss name: [GHM norm / stock norm of each step]}`, appended to; L1 norms stand
            under the name with " (L1)".
        split: arguments of `losses` -> {loss name: the predictions it depends on}.
    """
    ghm_losses = module.losses

    def losses(*args):
        with _without_ghm(module):
            ours = stock.losses(module, *args)
        theirs = ghm_losses(*args)
        for name, predictions in split(*args).items():
            found = _norms(theirs[name], predictions), _norms(ours[name], predictions)
            for kind, own, reference in zip(("", " (L1)"), *found, strict=True):
                if reference > 0:
                    norms.setdefault(name + kind, []).append(own / reference)
        return ours

    module.losses = losses


def measure_retinanet(
    config_file: str, options: Sequence[str], datasets: list[str], iterations: int
) -> Norms:
    """Trains a RetinaNet with focal loss and smooth L1; returns the ratios of each step."""
    cfg, _ = build_config(config_file, [*RETINANET_OPTIONS, *options], datasets, log_to_file=False)
    seed_all_rng(cfg.SEED)
    model = build_model(cfg).train()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    norms: Norms = {}

    def split(_anchors, logits, _labels, deltas, _boxes):
        return {"loss_cls": logits, "loss_box_reg": deltas}

    record(model, RetinaNet, norms, split)
    _train(cfg, model, iterations, Path(config_file).stem)
    return norms


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
    _train(cfg, model, iterations, "sigmoid" if sigmoid else "softmax")
    return norms


def _train(cfg: CfgNode, model: nn.Module, iterations: int, name: str) -> None:
    optimizer = GHMTrainer.build_optimizer(cfg, model)
    loader = iter(build_detection_train_loader(cfg))
    with EventStorage():
        for step in tqdm(range(iterations), desc=name):
            for group in optimizer.param_groups:
                group["lr"] = cfg.SOLVER.BASE_LR * min(1, (step + 1) / 50)
            optimizer.zero_grad()
            sum(model(next(loader)).values()).backward()
            optimizer.step()


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
    parser.add_argument("--dataset", help="NAME=annotations.json,image_dir")
    parser.add_argument("--config-file", help="of a GHM RetinaNet, to be measured instead")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE pairs for that config")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if not args.dataset and not args.config_file:
        raise UserError("--dataset is needed without --config-file.")
    result = {
        "ratio": "L2 norm of the GHM loss's gradient / of Detectron2's, at the predictions",
        "dataset": args.dataset.split("=")[0] if args.dataset else "the config's",
        "iterations": args.iterations,
        "options": RETINANET_OPTIONS if args.config_file else [str(x) for x in OPTIONS],
        **describe(),
    }
    if args.config_file:
        result["config"] = args.config_file
        datasets = [args.dataset] if args.dataset else []
        norms = measure_retinanet(args.config_file, args.opts, datasets, args.iterations)
        measured = {"retinanet": summarize(norms)}
    else:
        measured = {
            "sigmoid" if sigmoid else "softmax": summarize(
                measure(args.dataset, args.iterations, sigmoid)
            )
            for sigmoid in (False, True)
        }
    write_json(args.output, result | measured)
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    with exits_with_one_sentence("loss_scale.py"):
        main()
