"""What a training writes down about itself for whoever publishes the result: `training.json`."""

import argparse
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import detectron2
import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

import ghm_d2
from ghm_d2.data import parse_dataset
from ghm_d2.hardware import processor_name

__all__ = ["RECORD_FILE", "commit", "record_training"]

RECORD_FILE = "training.json"


def record_training(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Write config, data, hardware, versions and commit to OUTPUT_DIR; on the main process.

    The config stands here too because an evaluation into the same folder replaces config.yaml.

    Args:
        cfg: the config that is trained with.
        args: the command line.
    """
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    given = [parse_dataset(text) for text in args.dataset]
    record = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "config_file": os.path.abspath(args.config_file),
        "config": cfg.dump(),
        "classes": list(metadata.get("thing_classes") or ()),
        "datasets": {
            d.name: [os.path.abspath(d.json_file), os.path.abspath(d.image_root)] for d in given
        },
        "hardware": _hardware(cfg),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "detectron2": detectron2.__version__,
            "numpy": np.__version__,
            "ghm_d2": ghm_d2.__version__,
        },
        "commit": commit(),
    }
    with open(os.path.join(cfg.OUTPUT_DIR, RECORD_FILE), "w", encoding="utf-8") as stream:
        json.dump(record, stream, indent=2)


def _hardware(cfg: CfgNode) -> str:
    processes = comm.get_world_size()
    if torch.device(cfg.MODEL.DEVICE).type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name()}"
    times = f"{processes} processes with " if processes > 1 else ""
    threads = torch.get_num_threads()
    return f"{processor_name()}, {times}{threads} thread{'s' if threads > 1 else ''}"


def commit() -> str | None:
    """The commit of the checkout that this code runs from, "-dirty" with changes; None outside."""
    root = Path(ghm_d2.__file__).resolve().parents[1]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("rev-parse", "--show-toplevel") != str(root):  # installed, perhaps inside another one
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
