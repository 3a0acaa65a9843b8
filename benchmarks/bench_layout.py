"""What could be gained by consuming the head's (N, A*K, H, W) logits where they lie?

    python benchmarks/bench_layout.py --output benchmarks/results/bench_layout_cpu.json

Detectron2 transposes them to (N, H*W*A, K) before the loss, and back in the backward pass. This
measures that transposition, forward and backward, against a whole training step of the same model
and image: the most that a loss without it could save.
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from ghm_d2 import add_ghm_config


def seconds(call, repeats: int) -> list[float]:
    """Wall time of each of ``repeats`` calls after one to warm up."""
    out = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        out.append(time.perf_counter() - start)
    return out[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(320, 512), help="height, width")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file("configs/ghm_retinanet_R_50.yaml")
    cfg.MODEL.DEVICE = device
    cfg.SOLVER.IMS_PER_BATCH = 1
    torch.manual_seed(0)
    model = build_model(cfg).train()
    height, width = args.size
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[20.0, 20, 150, 200], [60, 80, 100, 140]]))
    instances.gt_classes = torch.tensor([3, 7])
    inputs = [{"image": torch.rand(3, height, width) * 255, "instances": instances}]

    def step() -> None:
        model.zero_grad()
        with EventStorage():
            sum(model(inputs).values()).backward()

    with torch.no_grad():
        features = model.backbone(model.preprocess_image(inputs).tensor)
        maps = model.head([features[f] for f in model.head_in_features])[0]
    maps = [x.detach().requires_grad_() for x in maps]
    gradients = [torch.rand_like(permute_to_N_HWA_K(x, model.num_classes)) for x in maps]

    def transpose() -> None:
        for x, gradient in zip(maps, gradients, strict=True):
            x.grad = None
            permute_to_N_HWA_K(x, model.num_classes).backward(gradient)

    steps, transposes = seconds(step, args.repeats), seconds(transpose, 3 * args.repeats)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    share = statistics.median(transposes) / statistics.median(steps)
    result = {
        "image": [height, width],
        "logits": sum(x.numel() for x in maps),
        "step_s": steps,
        "transpose_s": transposes,
        "share_of_step": share,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.strip(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"the transposition takes {100 * share:.2f} % of a training step")


if __name__ == "__main__":
    main()
