"""Measures whole training steps and inference with GHM against stock Detectron2.

    python benchmarks/bench_train_step.py
    python benchmarks/bench_train_step.py --device cuda --size 800 1333 --batch 2

The two models have the same weights, images and optimiser (plain SGD: gradient clipping belongs to
a recipe, not to a loss) and take turns, so that drift of the machine affects both. The images are
random; the class logits are scaled to the spread of a model that has begun to learn.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from tqdm import tqdm

from ghm_d2 import add_ghm_config
from ghm_d2.errors import exits_with_one_sentence
from ghm_d2.files import write_json
from ghm_d2.losses.base import HarmonizedLoss
from ghm_d2.provenance import describe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
CLASSES = 80
# Config, and what turns it into the stock detector.
MODELS = {
    "retinanet": ("ghm_retinanet_R_50", ["MODEL.META_ARCHITECTURE", "RetinaNet"]),
    "faster_rcnn": (
        "ghm_faster_rcnn_R_50_ghm_c",
        ["MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
    ),
}
STOCK, GHM = "stock", "ghm"
Record = dict[str, Any]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    add("--depth", type=int, choices=(50, 101), default=50)
    add("--width", type=int, default=64, help="channels of the stem; FPN has 4 times as many")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: 320 512 (CPU)")
    add("--batch", type=int, help="images a step; default: 1 on the CPU, 2 on a GPU")
    add("--boxes", type=int, default=8, help="of each image")
    add("--rounds", type=int, help="steps of each model; default: 10 on the CPU, 50 on a GPU")
    add("--output", type=Path, help="default: benchmarks/results/bench_train_step_<device>.json")
    args = parser.parse_args(arguments)
    args.device = measure.choose_device(args.device).type
    on_gpu = args.device == "cuda"
    args.size = tuple(args.size or ((800, 1333) if on_gpu else (320, 512)))
    args.batch = args.batch or (2 if on_gpu else 1)
    args.rounds = args.rounds or (50 if on_gpu else 10)
    return args


def _config(name: str, args: argparse.Namespace, extra: Sequence[object]) -> CfgNode:
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    options = {
        "MODEL.DEVICE": args.device,
        "MODEL.WEIGHTS": "",
        "MODEL.RESNETS.DEPTH": args.depth,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": args.width,
        "MODEL.RESNETS.WIDTH_PER_GROUP": args.width,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": args.width * 4,
        "MODEL.FPN.OUT_CHANNELS": args.width * 4,
        "MODEL.RETINANET.NUM_CLASSES": CLASSES,
        "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
        "SOLVER.IMS_PER_BATCH": args.batch,
    }
    cfg.merge_from_list([word for pair in options.items() for word in pair] + list(extra))
    return cfg


def batch_of(args: argparse.Namespace) -> list[Record]:
    """Random images with random boxes, on the host as a data loader gives them."""
    g = torch.Generator().manual_seed(1)
    height, width = args.size
    limit = torch.tensor([width, height])
    batch = []
    for _ in range(args.batch):
        corners = torch.rand(args.boxes, 2, generator=g) * limit * 0.6
        sides = (torch.rand(args.boxes, 2, generator=g) * 0.35 + 0.05) * limit
        instances = Instances(args.size)
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
        instances.gt_classes = torch.randint(0, CLASSES, (args.boxes,), generator=g)
        image = torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def build_pair(name: str, args: argparse.Namespace) -> dict[str, nn.Module]:
    """The stock and the GHM detector, in training mode, with the same weights."""
    config, stock_options = MODELS[name]
    torch.manual_seed(0)
    models = {
        STOCK: build_model(_config(config, args, stock_options)),
        GHM: build_model(_config(config, args, [])),
    }
    stock = models[STOCK]
    # Frozen statistics do not normalise random weights: keep the residual branches small instead.
    for module in stock.backbone.modules():
        if isinstance(module, BottleneckBlock):
            module.conv3.norm.weight.fill_(0.2)
    if name == "retinanet":
        _spread_logits(stock, batch_of(args))
    _share_weights(models)
    return models


@torch.no_grad()
def _spread_logits(model: nn.Module, batch: list[Record]) -> None:
    """Scales the last convolution so that the class logits have a standard deviation of 1.5."""
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    logits, _ = model.head([features[f] for f in model.head_in_features])
    spread = torch.cat([x.flatten() for x in logits]).std().clamp(min=1e-12)
    model.head.cls_score.weight.mul_(1.5 / spread)


def _share_weights(models: dict[str, nn.Module]) -> None:
    models[GHM].load_state_dict(models[STOCK].state_dict(), strict=False)


def train_step(model: nn.Module, batch: list[Record]) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    # A rate so small that the two models stay alike; a step costs the same at any rate.
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        sum(model(batch).values()).backward()
        optimizer.step()
        # Gradients kept until the next step would not count in its peak memory.
        optimizer.zero_grad(set_to_none=True)

    return step


def _inference(model: nn.Module, batch: list[Record]) -> Callable[[], list[Record]]:
    @torch.no_grad()
    def infer() -> list[Record]:
        return model(batch)

    return infer


def compare(
    calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int, description: str
) -> Record:
    """Time of both calls in turns, ratio GHM / stock with its interval, and peak memory."""
    with tqdm(total=2 * (rounds + 2), desc=description, unit="call", file=sys.stderr) as bar:

        def counted(call: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                call()
                bar.update()

            return run

        seconds = measure.time_interleaved(
            {name: counted(call) for name, call in calls.items()},
            device,
            budget_s=0,
            min_repeats=rounds,
            max_repeats=rounds,
            warmups=1,
        )
        peaks = {}
        for name, call in calls.items():
            peaks[name] = measure.peak_extra_bytes(call, device)
            bar.update()
    result: Record = {
        name: measure.summarize(taken) | {"peak_extra_bytes": peaks[name], "seconds": taken}
        for name, taken in seconds.items()
    }
    result["time_ghm_over_stock"] = measure.bootstrap_ratio(seconds[GHM], seconds[STOCK])
    result["memory_ghm_over_stock"] = peaks[GHM] / max(peaks[STOCK], 1)
    return result


def _host_syncs(model: nn.Module, step: Callable[[], None]) -> list[str]:
    """What made the host wait inside the harmonised losses of one step (CUDA alone)."""
    found: list[str] = []
    for module in model.modules():
        if isinstance(module, HarmonizedLoss):
            forward = module._forward

            def watched(*args: Any, forward: Callable = forward, **options: Any) -> Any:
                out = []
                message = measure.host_sync(lambda: out.append(forward(*args, **options)))
                if message:
                    found.append(message)
                return out[0] if out else forward(*args, **options)

            module._forward = watched
    step()
    for module in model.modules():
        if isinstance(module, HarmonizedLoss):
            del module._forward
    return found


def _same_detections(outputs: Sequence[list[Record]]) -> bool:
    return all(
        torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        and torch.equal(a["instances"].scores, b["instances"].scores)
        and torch.equal(a["instances"].pred_classes, b["instances"].pred_classes)
        for a, b in zip(*outputs, strict=True)
    )


def measure_model(name: str, args: argparse.Namespace) -> Record:
    """Training and inference of one detector, stock and GHM."""
    device = torch.device(args.device)
    models = build_pair(name, args)
    batch = batch_of(args)
    with EventStorage():
        steps = {key: train_step(model.train(), batch) for key, model in models.items()}
        result = {"train": compare(steps, device, args.rounds, f"{name}, training")}
        if device.type == "cuda":
            result["host_syncs_in_losses"] = _host_syncs(models[GHM], steps[GHM])
    _share_weights(models)
    for model in models.values():
        model.zero_grad(set_to_none=True)
    calls = {key: _inference(model.eval(), batch) for key, model in models.items()}
    outputs = [call() for call in calls.values()]
    result["inference"] = compare(calls, device, args.rounds, f"{name}, inference")
    result["inference"]["same_detections"] = _same_detections(outputs)
    result["inference"]["detections"] = sum(len(x["instances"]) for x in outputs[0])
    return result


def table(results: dict[str, Record]) -> str:
    """One line for each model and phase."""
    lines = [
        f"{'model':13}{'phase':11}{'stock, s':>10}{'GHM, s':>10}"
        f"{'GHM / stock (95 % interval)':>30}{'memory: stock, GHM, ratio':>32}"
    ]
    for name, result in results.items():
        for phase in ("train", "inference"):
            r = result[phase]
            t = r["time_ghm_over_stock"]
            ratio = f"{t['ratio']:.3f} ({t['low']:.3f} - {t['high']:.3f})"
            mib = [r[k]["peak_extra_bytes"] / 2**20 for k in (STOCK, GHM)]
            memory = f"{mib[0]:.0f}, {mib[1]:.0f} MiB, {r['memory_ghm_over_stock']:.3f}"
            times = f"{r[STOCK]['median_s']:10.4g}{r[GHM]['median_s']:10.4g}"
            lines.append(f"{name:13}{phase:11}{times}{ratio:>30}{memory:>32}")
        lines.append(f"{name:13}same detections: {result['inference']['same_detections']}")
        if (syncs := result.get("host_syncs_in_losses")) is not None:
            lines.append(f"{name:13}host synchronisations in the losses: {len(syncs)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes JSON, prints a table."""
    args = parse(arguments)
    result = describe(args.device)
    result["measured"] = "forward, backward, SGD step, zero_grad; inference; memory apart"
    result["settings"] = {k: v for k, v in vars(args).items() if k != "output"}
    result["models"] = {name: measure_model(name, args) for name in args.models}
    path = args.output or RESULTS / f"bench_train_step_{args.device}.json"
    write_json(path, result)
    print(f"{table(result['models'])}\nwritten: {path}")


if __name__ == "__main__":
    with exits_with_one_sentence("bench_train_step.py"):
        main()
