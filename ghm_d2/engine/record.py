"""What a training writes down about itself for whoever publishes the result: `training.json`."""

import argparse
import json
import os
from datetime import datetime, timezone

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from ghm_d2.data import parse_dataset
from ghm_d2.provenance import commit, hardware, versions

__all__ = ["RECORD_FILE", "record_training"]

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
        "hardware": hardware(cfg.MODEL.DEVICE, comm.get_world_size()),
        "versions": versions(),
        "commit": commit(),
    }
    with open(os.path.join(cfg.OUTPUT_DIR, RECORD_FILE), "w", encoding="utf-8") as stream:
        json.dump(record, stream, indent=2)
