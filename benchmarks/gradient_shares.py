"""Measures where the gradient of focal loss and of GHM-C goes while each trains a detector.

    ghm-d2 fetch-backbone mobilenet_v2
    python benchmarks/gradient_shares.py --dataset bccd=data/train.json,data/images \
        --output benchmarks/results/gradient_shares_bccd

Frozen features, the preset's recipe, and boxes by its GHM-R in all trainings: focal loss and GHM-C
each train one detector on the labels as they are and one on labels of which a share is wrong,
always the same. At the given steps the detector stands still, and on the same batches the sum of
|gradient| at the logits, as the next step would have it, is told apart: positives' own logits,
wrong labels (of such a box, the logits of the class given and of the true one) and negatives, which
are all others; by level, and by the norm g = |p - t| with the given label.
"""

import argparse
import copy
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import build_detection_train_loader
from detectron2.utils.events import EventStorage
from feature_gradients import build_detector, extract_features, predict, rounded
from gradient_variants import GHMC, Focal, Predictions, Variant, own_logits
from torch import Tensor
from tqdm import tqdm

from ghm_d2.engine.trainer import GHMTrainer
from ghm_d2.errors import UserError, exits_with_one_sentence
from ghm_d2.files import write_json
from ghm_d2.markdown import markdown_table
from ghm_d2.provenance import describe

CONFIG = "benchmarks/recipes/frozen_240.yaml"
OPTIONS = ("MODEL.GHM.RETINANET.REG.ENABLED", True, "SOLVER.BASE_LR", 0.03)
TRAINED_BY = {
    "focal": ("MODEL.GHM.RETINANET.CLS.ENABLED", False),
    "GHM-C": ("MODEL.GHM.RETINANET.CLS.ENABLED", True),
}
REGIONS = 10
KINDS = ("positives", "wrong labels", "negatives")
WARMUP = 50
CONFIDENT = 0.05  # Detectron2's threshold for a detection


def variants(noisy: bool) -> dict[str, Variant]:
    """The two losses, as the recipe has them."""
    preset = {"momentum": 0.9, "bias_correction": True, "loss_weight": 0.5}
    return {"focal": Focal(noisy), "GHM-C": GHMC(noisy=noisy, **preset)}


def measure(variant: Variant, p: Predictions) -> dict[str, Any]:
    """One loss on one batch."""
    value = copy.deepcopy(variant)(p)  # its counts end with this batch
    gradients = torch.autograd.grad(value, p.logits, retain_graph=True)
    sizes = [g.abs().flatten(0, 1).double() for g in gradients]
    total = sum(g.sum() for g in sizes)
    by_region = torch.zeros(len(KINDS), REGIONS, dtype=torch.float64)
    by_level = torch.zeros(len(KINDS), len(sizes), dtype=torch.float64)
    for level, (size, x, masks) in enumerate(zip(sizes, p.logits, kinds(variant, p), strict=True)):
        target = own_logits(p.level_labels(variant.noisy)[level], p.num_classes)
        g = (x.detach().flatten(0, 1).sigmoid() - target.to(x.dtype)).abs()
        region = (g * REGIONS).long().clamp(max=REGIONS - 1)
        for kind, mask in enumerate(masks):
            by_region[kind].scatter_add_(0, region[mask], size[mask])
            by_level[kind, level] = size[mask].sum()
    squares = sum((g**2).sum() for g in sizes)
    return {
        "total": float(total),
        "effective_examples": float(total**2 / squares),
        "by_region": (by_region / total).tolist(),
        "by_level": (by_level / total).tolist(),
    }


def kinds(variant: Variant, p: Predictions) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each level, bool (N * R_l, K) for each of KINDS; ignored anchors are negatives of 0."""
    found = []
    for given, true in zip(p.level_labels(variant.noisy), p.level_labels(), strict=True):
        own = own_logits(given, p.num_classes)
        wrong = (own | own_logits(true, p.num_classes)) & (given != true).unsqueeze(1)
        found.append((own & ~wrong, wrong, ~(own | wrong)))
    return found


def look(p: Predictions, noisy: Variant) -> dict[str, float]:
    """Negatives that would be detections, and mean probabilities of positives."""
    negatives, right, given, true = 0, [], [], []
    levels = zip(p.logits, kinds(noisy, p), p.level_labels(noisy.noisy), strict=True)
    for x, (positive, wrong, negative), labels in levels:
        scores = x.detach().flatten(0, 1).sigmoid()
        counted = (labels >= 0).unsqueeze(1)
        negatives += int((scores[negative & counted] > CONFIDENT).sum())
        right.append(scores[positive])
        own = own_logits(labels, p.num_classes)
        given.append(scores[wrong & own])
        true.append(scores[wrong & ~own])
    means = {name: torch.cat(x) for name, x in (("right", right), ("given", given), ("true", true))}
    figures = {f"p_{name}": x.mean().item() if len(x) else 0.0 for name, x in means.items()}
    return {"confident_negatives": negatives, **figures}


def mean(records: Sequence[Any]) -> Any:
    """The mean of records of one shape, number by number."""
    if isinstance(records[0], dict):
        return {key: mean([r[key] for r in records]) for key in records[0]}
    if isinstance(records[0], list):
        return [mean(column) for column in zip(*records, strict=True)]
    return statistics.fmean(records)


def train(
    dataset: str,
    loss: str,
    noise: float,
    steps: Sequence[int],
    num_batches: int,
    opts: Sequence[str],
) -> dict[str, Any]:
    """One training, and a snapshot before each of `steps`."""
    options = (*OPTIONS, *TRAINED_BY[loss], *opts)
    cfg, model = build_detector(dataset, options, CONFIG)
    loader = iter(build_detection_train_loader(cfg))
    batches = [next(loader) for _ in range(num_batches)]
    losses = variants(noise > 0)
    optimizer = GHMTrainer.build_optimizer(cfg, model)
    snapshots = []
    with EventStorage():
        bar = tqdm(range(max(steps) + 1), desc=f"{loss}, {noise:.0%} wrong labels")
        for step in bar:
            if step in steps:
                seen: dict[str, list] = {name: [] for name in (*losses, "detector")}
                for inputs in batches:
                    with torch.no_grad():
                        features = extract_features(model, inputs)
                    p = predict(model, inputs, features, noise)
                    for name, variant in losses.items():
                        seen[name].append(measure(variant, p))
                    seen["detector"].append(look(p, losses["focal"]))
                snapshots.append({"step": step, **{name: mean(x) for name, x in seen.items()}})
            for group in optimizer.param_groups:
                group["lr"] = cfg.SOLVER.BASE_LR * min(1, (step + 1) / WARMUP)
            inputs = next(loader)
            p = predict(model, inputs, extract_features(model, inputs), noise)
            labels = list(p.noisy_labels if noise else p.labels)
            total = sum(model.losses(p.anchors, p.logits, labels, p.deltas, list(p.boxes)).values())
            p.logits = [x.detach() for x in p.logits]
            for variant in losses.values():
                variant(p)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    return {"trained_by": loss, "wrong_labels": noise, "snapshots": snapshots}


_INTRODUCTION = """\
# Where the gradient goes: {dataset}

`{command}`

{cpu}, {threads} thread(s), PyTorch {torch}, commit {commit}. Means over {batches} batches of 4
images. Shares are percentages of the sum of |gradient| at the logits; *total* is that sum,
*effective* how many logits of equal gradient it is worth. g is |p - t| with the given label.
*confident negatives*: logits of a batch above {confident} whose label says background or another
class. *p*: mean probability of positives' own class; of wrongly labelled ones, of the class given
and of the true class.
"""


def write_table(result: dict[str, Any], file: Path) -> None:
    """Writes the tables, as Markdown."""
    lines = [
        _INTRODUCTION.format(
            dataset=result["dataset"],
            command=result["command"],
            cpu=result["machine"]["cpu"],
            threads=result["machine"]["threads"],
            torch=result["versions"]["torch"],
            commit=(result["commit"] or "unknown")[:12],
            batches=result["batches"],
            confident=CONFIDENT,
        )
    ]
    header = ["step", "gradient of", "total", "effective", *KINDS, "wrong: P3 to P7"]
    header += ["positives: P3 to P7", "negatives: P3 to P7"]
    header += ["positives: g < 0.5", "0.5 to 0.9", "over 0.9", "negatives: g < 0.5", "over 0.5"]
    believes = ["step", "confident negatives", "p", "p of the class given", "p of the true class"]
    for run in result["trainings"]:
        lines.append(f"## Trained by {run['trained_by']}, {run['wrong_labels']:.0%} wrong labels\n")
        rows, states = [], []
        for snapshot in run["snapshots"]:
            state = snapshot["detector"]
            states.append([str(snapshot["step"]), f"{state['confident_negatives']:.0f}"])
            states[-1] += [f"{state[k]:.2f}" for k in ("p_right", "p_given", "p_true")]
            for name in TRAINED_BY:
                rows.append([str(snapshot["step"]), name, *_cells(snapshot[name])])
        lines += [markdown_table(header, rows), "", markdown_table(believes, states), ""]
    lines += [_summary(result["trainings"]), ""]
    file.write_text("\n".join(lines), encoding="utf-8")


def _summary(trainings: Sequence[dict[str, Any]]) -> str:
    """The last snapshots in words, without a judgement."""
    lines = [f"## At step {trainings[0]['snapshots'][-1]['step']}\n"]
    for run in trainings:
        last = run["snapshots"][-1]
        state = last["detector"]
        lines.append(
            f"- Trained by {run['trained_by']}, {run['wrong_labels']:.0%} wrong labels: "
            f"{state['confident_negatives']:,.0f} confident negatives, p {state['p_right']:.2f}."
        )
        for name in TRAINED_BY:
            found = last[name]
            parts = zip(KINDS, found["by_level"], found["by_region"], strict=True)
            told = [
                f"{kind} {100 * sum(levels):.1f} % ({100 * regions[-1]:.1f} % with g over 0.9)"
                for kind, levels, regions in parts
            ]
            lines.append(
                f"  - {name}, of {found['total']:.3g} worth {found['effective_examples']:.0f} "
                f"logits: {', '.join(told)}."
            )
    return "\n".join(lines)


def _cells(found: dict[str, Any]) -> list[str]:
    positives, wrong, negatives = found["by_level"]
    p, _, n = found["by_region"]
    half, most = REGIONS // 2, REGIONS - 1
    shares = [sum(x) for x in found["by_level"]]
    shares += [sum(p[:half]), sum(p[half:most]), p[most], sum(n[:half]), sum(n[half:])]
    told = [f"{100 * x:.1f} %" for x in shares]
    levels = [" ".join(f"{100 * x:.0f}" for x in part) for part in (wrong, positives, negatives)]
    numbers = [f"{found['total']:.3g}", f"{found['effective_examples']:.0f}"]
    return [*numbers, *told[:3], *levels, *told[3:]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="NAME=annotations.json,image_dir")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 30, 100, 300])
    parser.add_argument("--batches", type=int, default=8, help="batches to measure on")
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[0.0, 0.2], help="shares of wrong labels"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of record and tables")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE pairs of the config")
    args = parser.parse_args(arguments)
    if args.batches < 1 or min(args.steps) < 0 or not all(0 <= x < 1 for x in args.noise):
        raise UserError("--batches must be at least 1, --steps at least 0, --noise in [0, 1).")
    name = args.dataset.split("=")[0]
    words = ["--dataset", f"{name}=annotations.json,images", "--steps", *map(str, args.steps)]
    words += ["--batches", str(args.batches), "--noise", *map(str, args.noise)]
    words += ["--opts", *args.opts] if args.opts else []
    result: dict[str, Any] = {
        "dataset": name,
        "batches": args.batches,
        "command": " ".join(["python benchmarks/gradient_shares.py", *words]),
        "config": CONFIG,
        **describe(),
    }
    result["trainings"] = [
        train(args.dataset, loss, noise, args.steps, args.batches, args.opts)
        for noise in args.noise
        for loss in TRAINED_BY
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "gradient_shares.json"
    write_json(file, rounded(result))
    write_table(result, file.with_suffix(".md"))
    print(f"written: {file} and its .md")


if __name__ == "__main__":
    with exits_with_one_sentence("gradient_shares.py"):
        main()
