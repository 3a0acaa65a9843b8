"""Trains the quick start's variants, GHM and focal loss, over seeds; writes AP and seconds.

    python benchmarks/quickstart.py --variants ghm focal --seeds 1 2 3 --output benchmarks/results

Each run writes ``quickstart_<variant>_<seed>.json`` and is skipped where that exists. The variants
change one thing each, except ``authors``: the published setting of both losses, and clipping.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

GHM = "configs/quickstart/ghm_retinanet_quickstart.yaml"
FOCAL = "configs/quickstart/focal_retinanet_quickstart.yaml"
CLS, REG = "MODEL.GHM.RETINANET.CLS", "MODEL.GHM.RETINANET.REG"
CLIP = "SOLVER.CLIP_GRADIENTS.CLIP_VALUE"
NO_CORRECTION = {f"{CLS}.BIAS_CORRECTION": False, f"{REG}.BIAS_CORRECTION": False}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "ghm": (GHM, {}),
    "focal": (FOCAL, {}),
    "authors": (
        GHM,
        {f"{CLS}.LOSS_WEIGHT": 1.0, f"{REG}.LOSS_WEIGHT": 10.0, f"{REG}.MU": 0.02, CLIP: 35.0}
        | NO_CORRECTION,
    ),
    "ghm_clip_35": (GHM, {CLIP: 35.0}),
    "ghm_mu_0.02": (GHM, {f"{REG}.MU": 0.02}),
    "ghm_no_bias_correction": (GHM, NO_CORRECTION),
    "ghm_batch": (GHM, {"MODEL.GHM.RETINANET.SCOPE": "batch"}),
    "ten_steps": (GHM, {"SOLVER.MAX_ITER": 10}),
    "focal_ten_steps": (FOCAL, {"SOLVER.MAX_ITER": 10}),
}


def run(variant: str, seed: int) -> dict[str, object]:
    """Trains and evaluates one variant; returns its metrics."""
    config, changes = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        pairs = changes | {"OUTPUT_DIR": folder, "SEED": seed}
        words = [sys.executable, "train_net.py", "--config-file", config]
        words += [str(word) for pair in pairs.items() for word in pair]
        start = time.perf_counter()
        with open(Path(folder) / "log", "w") as log:
            subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT)
        seconds = time.perf_counter() - start
        rows = map(json.loads, (Path(folder) / "metrics.json").read_text().splitlines())
        boxes = [{k: v for k, v in row.items() if k.startswith("bbox/")} for row in rows]
    # Detectron2 reports NaN where nothing was found, which JSON does not know.
    boxes = [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in boxes]
    return {
        "variant": variant,
        "seed": seed,
        "changes": changes,
        "seconds": round(seconds, 1),
        **next((row for row in reversed(boxes) if row), {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["ghm", "focal"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    about = {
        "torch": torch.__version__,
        "threads": os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()),
        "machine": platform.machine(),
        "commit": commit.stdout.strip(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for variant, seed in tqdm([(v, s) for s in args.seeds for v in args.variants]):
        file = args.output / f"quickstart_{variant}_{seed}.json"
        if file.exists():
            continue
        result = run(variant, seed) | about
        file.write_text(json.dumps(result, indent=1) + "\n")
        tqdm.write(f"{variant} seed {seed}: AP50 {result.get('bbox/AP50')} {result['seconds']} s")


if __name__ == "__main__":
    main()
