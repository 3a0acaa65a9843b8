"""What lazy_train_net.py does: read the command line, check once, launch."""

import argparse
import sys
from collections.abc import Sequence

from detectron2.config import get_cfg
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ghm_d2.config import add_ghm_config
from ghm_d2.data import register_coco_dataset
from ghm_d2.engine.arguments import Parser, add_process_options
from ghm_d2.engine.processes import launch_processes, reported_once
from ghm_d2.errors import exits_with_one_sentence

from .config import load_config
from .plan import Plan, apply_plan, make_plan
from .train import evaluate_only, train

__all__ = ["main"]

_PROGRAM = "lazy_train_net.py"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog=_PROGRAM,
        usage="%(prog)s --config-file FILE.py [options] [KEY=VALUE ...]",
        description="Train, resume or evaluate a detector that a Python config describes. The "
        "config is executed: run none whose author you do not trust.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--config-file", metavar="FILE", required=True, help="a .py file of configs/lazy/, or yours"
    )
    add("--eval-only", action="store_true", help="evaluate train.init_checkpoint")
    add("--resume", action="store_true", help="go on from the last checkpoint in train.output_dir")
    add(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME=annotations.json,image_dir",
        help="register COCO-format data; the first is trained on and the others are tested on, "
        "unless dataloader.{train,test}.dataset.names say otherwise (repeatable)",
    )
    add_process_options(parser)
    add("overrides", nargs="*", metavar="KEY=VALUE", help="change the config")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run lazy_train_net.py.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr.
    """
    with exits_with_one_sentence(_PROGRAM):
        args = _parse(sys.argv[1:] if argv is None else argv)
        plan = make_plan(load_config(args.config_file, args.overrides), args)
        launch_processes(_work, args, plan)


def _work(args: argparse.Namespace, plan: Plan) -> None:
    """One process of the job; it loads the config itself, which need not be picklable."""
    if comm.get_world_size() > 1:
        add_ghm_config(get_cfg())  # a spawned process has registered nothing yet
        for dataset in plan.datasets:
            register_coco_dataset(dataset)
    with exits_with_one_sentence(_PROGRAM), reported_once():
        cfg = load_config(args.config_file, args.overrides)
        apply_plan(cfg, plan)
        default_setup(cfg, args)
        setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="ghm_d2")
        (evaluate_only if args.eval_only else train)(cfg, resume=args.resume)
    comm.synchronize()  # process 0 holds the store that the others use
