"""Measures the gradient that each loss sends to the features of one detector, while it trains.

    ghm-d2 fetch-backbone mobilenet_v2
    python benchmarks/feature_gradients.py --dataset bccd=data/train.json,data/images \
        --output benchmarks/results/feature_gradients_bccd.json

One RetinaNet is trained with Detectron2's focal loss and smooth L1. Every other loss sees the same
predictions: at each training step it is called without a backward pass, so that its running counts
are those of a training. At the given steps the training pauses, and on the same batches the
gradient that each loss would give the next step is measured, before any clipping; its running
counts are restored after each batch. Label noise: one box in ten has a wrong class, always the
same; only the losses called "noise" see it, and the detector is trained without it.
"""

import argparse
import math
import statistics
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from feature_gradients_report import write_table
from gradient_measures import measure_gradient, summarize
from gradient_variants import Predictions, Variant, box_variants, cls_variants
from torch import Tensor, nn
from tqdm import tqdm

from ghm_d2.engine.setup import build_config
from ghm_d2.engine.trainer import GHMTrainer
from ghm_d2.errors import UserError, exits_with_one_sentence
from ghm_d2.files import write_json
from ghm_d2.provenance import describe

CONFIG = "configs/ghm_retinanet_MobileNetV2.yaml"
OPTIONS = [
    "MODEL.DEVICE", "cpu",
    "MODEL.GHM.RETINANET.CLS.ENABLED", False,
    "MODEL.GHM.RETINANET.REG.ENABLED", False,
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 1 / 9,
    "INPUT.MIN_SIZE_TRAIN", (240,),
    "SOLVER.IMS_PER_BATCH", 4,
    "SOLVER.BASE_LR", 0.02,
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 5.0,
    "DATALOADER.NUM_WORKERS", 0,
    "SEED", 1,
]  # fmt: skip
WARMUP = 50
NOISE = 0.1
OTHER_PRIOR = 0.1

Inputs = list[dict[str, Any]]


def build_detector(
    dataset: str, options: Sequence[Any] = (), config: str = CONFIG
) -> tuple[CfgNode, nn.Module]:
    """The detector with its backbone's weights, in training mode, and its config."""
    pairs = [str(word) for word in (*OPTIONS, *options)]
    cfg, _ = build_config(config, pairs, [dataset], log_to_file=False)
    if cfg.MODEL.RETINANET.NUM_CLASSES < 2:
        raise UserError("--dataset has one class: label noise needs at least two.")
    if cfg.MODEL.WEIGHTS and not Path(cfg.MODEL.WEIGHTS).is_file():
        raise UserError(
            f"{cfg.MODEL.WEIGHTS} does not exist: run ghm-d2 fetch-backbone mobilenet_v2."
        )
    seed_all_rng(cfg.SEED)
    model = build_model(cfg).train()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return cfg, model


def noisy_instances(inputs: dict[str, Any], num_classes: int, share: float = NOISE) -> Instances:
    """An image's ground truth with a wrong class in a share of the boxes, the same at each call."""
    clean = inputs["instances"]
    generator = torch.Generator().manual_seed(zlib.crc32(str(inputs["image_id"]).encode()))
    size = len(clean)
    flip = torch.rand(size, generator=generator) < share
    shift = torch.randint(1, num_classes, (size,), generator=generator)
    noisy = Instances(clean.image_size, gt_boxes=clean.gt_boxes)
    noisy.gt_classes = torch.where(flip, (clean.gt_classes + shift) % num_classes, clean.gt_classes)
    return noisy


def predict(
    model: nn.Module, inputs: Inputs, features: list[Tensor], noise: float = NOISE
) -> Predictions:
    """What the head makes of `features`, with labels, a share of them wrong in the noisy ones."""
    logits, deltas = model._transpose_dense_predictions(
        model.head(features), [model.num_classes, 4]
    )
    anchors = model.anchor_generator(features)
    labels, boxes = model.label_anchors(anchors, [x["instances"] for x in inputs])
    noisy = [noisy_instances(x, model.num_classes, noise) for x in inputs]
    noisy_labels, _ = model.label_anchors(anchors, noisy)
    return Predictions(
        anchors, logits, deltas, torch.stack(labels), torch.stack(noisy_labels),
        torch.stack(boxes), model.box2box_transform,
    )  # fmt: skip


def extract_features(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    features = model.backbone(model.preprocess_image(inputs).tensor)
    return [features[name] for name in model.head_in_features]


def train_step(model: nn.Module, inputs: Inputs, variants: Sequence[Variant]) -> Tensor:
    """The training loss; every variant counts the same predictions."""
    p = predict(model, inputs, extract_features(model, inputs))
    losses = model.losses(p.anchors, p.logits, list(p.labels), p.deltas, list(p.boxes))
    # Running counts change only where gradients are enabled; detached predictions keep the
    # graphs small.
    seen = replace(p, logits=[x.detach() for x in p.logits], deltas=[x.detach() for x in p.deltas])
    for variant in variants:
        variant(seen)
    return sum(losses.values())


def snapshot(
    model: nn.Module, batches: list[Inputs], cls: dict[str, Variant], box: dict[str, Variant]
) -> dict[str, Any]:
    """Measures every loss on every batch, without a training step in between."""
    cls_head = nn.ModuleList([model.head.cls_subnet, model.head.cls_score])
    box_head = nn.ModuleList([model.head.bbox_subnet, model.head.bbox_pred])
    rows: dict[str, dict[str, list]] = {"cls": {n: [] for n in cls}, "box": {n: [] for n in box}}
    positives, anchors = [], []
    for inputs in batches:
        with torch.no_grad():
            features = extract_features(model, inputs)
        features = [x.requires_grad_() for x in features]
        p = predict(model, inputs, features)
        positives.append([int(x.sum()) for x in p.positives()])
        anchors.append([len(inputs) * len(a) for a in p.anchors])
        for kind, variants, outputs, head in (
            ("cls", cls, p.logits, cls_head),
            ("box", box, p.deltas, box_head),
        ):
            for name, variant in variants.items():
                rows[kind][name].append(measure_gradient(variant, p, outputs, features, head))
    result: dict[str, Any] = {
        "positives_by_level": [statistics.fmean(x) for x in zip(*positives, strict=True)],
        "anchors_by_level": [statistics.fmean(x) for x in zip(*anchors, strict=True)],
    }
    for kind, of_kind in rows.items():
        if not of_kind:
            continue
        summaries = {name: summarize(records) for name, records in of_kind.items()}
        reference = next(iter(summaries.values()))
        directions = {n: s.pop("mean_direction") for n, s in summaries.items()}
        first = next(iter(directions.values()))
        for name, summary in summaries.items():
            summary["norm_over_reference"] = summary["feature_norm"] / reference["feature_norm"]
            summary["cosine_to_reference"] = F.cosine_similarity(directions[name], first, 0).item()
        result[kind] = summaries
    return result


def run(
    dataset: str, steps: Sequence[int], num_batches: int, options: Sequence[Any] = ()
) -> Iterator[dict[str, Any]]:
    """Trains to the last of `steps`; yields a snapshot before each of them."""
    cfg, model = build_detector(dataset, options)
    loader = iter(build_detection_train_loader(cfg))
    batches = [next(loader) for _ in range(num_batches)]
    cls, box = cls_variants(), box_variants()
    variants = [*cls.values(), *box.values()]
    optimizer = GHMTrainer.build_optimizer(cfg, model)
    with EventStorage():
        for step in tqdm(range(max(steps) + 1), desc="steps"):
            if step in steps:
                yield {"step": step, "prior": None, **snapshot(model, batches, cls, box)}
            if step == 0:
                bias = model.head.cls_score.bias.data
                bias += math.log(OTHER_PRIOR / (1 - OTHER_PRIOR)) - bias.mean()
                yield {"step": 0, "prior": OTHER_PRIOR, **snapshot(model, batches, cls, {})}
                prior = cfg.MODEL.RETINANET.PRIOR_PROB
                bias += math.log(prior / (1 - prior)) - bias.mean()
            for group in optimizer.param_groups:
                group["lr"] = cfg.SOLVER.BASE_LR * min(1, (step + 1) / WARMUP)
            optimizer.zero_grad()
            train_step(model, next(loader), variants).backward()
            optimizer.step()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="NAME=annotations.json,image_dir")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 10, 30, 100, 250])
    parser.add_argument("--batches", type=int, default=8, help="batches to measure on, at least 2")
    parser.add_argument(
        "--output", type=Path, required=True, help="a .json file; the tables go to a .md beside it"
    )
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE pairs of the config")
    args = parser.parse_args(arguments)
    if args.batches < 2 or min(args.steps) < 0:
        raise UserError("--batches must be at least 2 and --steps at least 0.")
    name = args.dataset.split("=")[0]
    words = ["--dataset", f"{name}=annotations.json,images", "--steps", *map(str, args.steps)]
    words += ["--batches", str(args.batches), *(["--opts", *args.opts] if args.opts else [])]
    result: dict[str, Any] = {
        "dataset": name,
        "batches": args.batches,
        "command": " ".join(["python benchmarks/feature_gradients.py", *words]),
        "config": CONFIG,
        "options": [str(x) for x in OPTIONS],
        **describe(),
    }
    result["snapshots"] = list(run(args.dataset, args.steps, args.batches, args.opts))
    write_json(args.output, rounded(result))
    write_table(result, args.output.with_suffix(".md"))
    print(f"written: {args.output} and its .md")


def rounded(value: Any) -> Any:
    """More than five digits would suggest a precision that a few batches do not have."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    with exits_with_one_sentence("feature_gradients.py"):
        main()
