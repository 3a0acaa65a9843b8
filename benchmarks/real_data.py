"""Trains, resumes and evaluates a one-stage and a two-stage GHM detector on real images.

    python benchmarks/real_data.py --train bccd_train=data/train.json,data/images \
        --val bccd_val=data/val.json,data/images --output benchmarks/results/bccd.json

From random weights, on narrow backbones and small images, for a CPU: what it shows is that the
commands work together on real data, not how good a detector gets. Each model trains for half of
its steps, is stopped, resumes to the end, and is evaluated again by `--eval-only`.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ghm_d2.files import write_json
from ghm_d2.provenance import describe
from ghm_d2.run_folder import RunFolder

COMMON = """
MODEL.WEIGHTS "" MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN MODEL.RESNETS.STRIDE_IN_1X1 False
MODEL.RESNETS.STEM_OUT_CHANNELS 16 MODEL.RESNETS.RES2_OUT_CHANNELS 64
MODEL.RESNETS.WIDTH_PER_GROUP 16 MODEL.FPN.OUT_CHANNELS 64 MODEL.FPN.NORM BN
MODEL.PIXEL_STD "[58.0, 58.0, 58.0]"
INPUT.MIN_SIZE_TRAIN "(240,)" INPUT.MIN_SIZE_TEST 240 DATALOADER.NUM_WORKERS 0
SOLVER.IMS_PER_BATCH 4 SOLVER.LR_SCHEDULER_NAME WarmupCosineLR SOLVER.WARMUP_ITERS 50 SEED 1
"""
MODELS = {
    "ghm_retinanet": (
        "configs/ghm_retinanet_R_50.yaml",
        """
        MODEL.RETINANET.NUM_CONVS 1 MODEL.RETINANET.NORM BN SOLVER.BASE_LR 0.03
        MODEL.GHM.RETINANET.CLS.LOSS_WEIGHT 2.0 MODEL.GHM.RETINANET.REG.LOSS_WEIGHT 4.0
        MODEL.GHM.RETINANET.CLS.BIAS_CORRECTION True MODEL.GHM.RETINANET.REG.BIAS_CORRECTION True
        MODEL.GHM.RETINANET.REG.MU 0.1 MODEL.GHM.RETINANET.IMAGES_PER_HISTOGRAM 0
        """,
    ),
    # In results/bccd.json under its former name, ghm_faster_rcnn_R_50.yaml.
    "ghm_faster_rcnn": (
        "configs/ghm_faster_rcnn_R_50_ghm_c.yaml",
        """
        MODEL.ROI_BOX_HEAD.FC_DIM 256 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 128 SOLVER.BASE_LR 0.03
        MODEL.GHM.ROI_BOX_HEAD.CLS.BIAS_CORRECTION True
        MODEL.GHM.ROI_BOX_HEAD.REG.BIAS_CORRECTION True
        """,
    ),
}


def run(words: list[str], log: Path) -> float:
    """Runs a command; returns its minutes. Its output goes to `log`."""
    start = time.perf_counter()
    with open(log, "a") as stream:
        subprocess.run(words, check=True, stdout=stream, stderr=subprocess.STDOUT)
    return (time.perf_counter() - start) / 60


def last_ap(output: Path) -> dict[str, float | None]:
    """The box AP, of all classes and each, of the last evaluation; None where nothing was found."""
    found = {name.removeprefix("bbox/"): ap for name, ap in RunFolder(output).results.items()}
    return {k: v and round(v, 2) for k, v in found.items() if k.startswith("AP")}


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Trains for half of the steps, resumes for the other half, and evaluates the result."""
    config, pairs = MODELS[name]
    output, log = folder / name, folder / f"{name}.log"
    base = [sys.executable, "train_net.py", "--config-file", config]
    settings = shlex.split(COMMON + pairs) + ["SOLVER.MAX_ITER", str(args.iterations)]
    train = [*base, "--dataset", args.train, "--dataset", args.val, *settings]
    train += ["OUTPUT_DIR", str(output)]
    half = ["SOLVER.CHECKPOINT_PERIOD", str(args.iterations // 2)]
    minutes = run([*train, *half, "SOLVER.MAX_ITER", str(args.iterations // 2)], log)
    middle = last_ap(output)
    minutes += run([*train, "--resume"], log)
    trained = last_ap(output)
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    again = [
        *base,
        "--dataset",
        args.val,
        *settings,
        "OUTPUT_DIR",
        str(folder / "again"),
        *weights,
        "--eval-only",
    ]
    run(again, folder / "eval.log")
    return {
        "config": config,
        "settings": settings,
        "minutes": round(minutes, 2),
        "ap_half_way": middle,
        "ap": trained,
        "ap_of_eval_only": last_ap(folder / "again")["AP"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="NAME=annotations.json,image_dir")
    parser.add_argument("--val", required=True, help="NAME=annotations.json,image_dir")
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, object] = {"iterations": args.iterations, **describe()}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            print(f"{name} ...", flush=True)
            result[name] = measure(name, args, Path(folder))
            print(json.dumps(result[name], indent=1), flush=True)
    write_json(args.output, result)


if __name__ == "__main__":
    main()
