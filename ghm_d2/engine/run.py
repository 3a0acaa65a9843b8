"""What train_net.py does: check once, launch, then train or evaluate in each process."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from ghm_d2.checkpoint import RestrictedCheckpointer
from ghm_d2.config import add_ghm_config
from ghm_d2.data import CocoDataset, register_coco_dataset
from ghm_d2.engine.arguments import parse_arguments
from ghm_d2.engine.checks import check_all
from ghm_d2.engine.record import record_training
from ghm_d2.engine.setup import build_config, setup_ghm_logger
from ghm_d2.engine.submission import report_submissions
from ghm_d2.engine.summary import summarize_training
from ghm_d2.engine.trainer import GHMTrainer
from ghm_d2.errors import UserError, exits_with_one_sentence

__all__ = ["load_trained_weights", "main"]

_PROGRAM = "train_net.py"


def main(argv: Sequence[str] | None = None) -> None:
    """Run train_net.py.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr; code 1
            where the results are not those of `TEST.EXPECTED_RESULTS`.
    """
    with exits_with_one_sentence(_PROGRAM):
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        cfg, datasets = build_config(args)
        check_all(cfg, args)
        cfg.freeze()
        try:
            launch(
                _work,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args, cfg, datasets),
            )
        except ProcessExitedException as error:
            if error.exit_code < 0:  # a signal
                raise
            sys.exit(error.exit_code)  # the process has said why


def _work(args: argparse.Namespace, cfg: CfgNode, datasets: list[CocoDataset]) -> None:
    """One process of the job."""
    if comm.get_world_size() > 1:
        add_ghm_config(get_cfg())  # a spawned process has registered nothing yet
        for dataset in datasets:
            register_coco_dataset(dataset)
    default_setup(cfg, args)
    setup_ghm_logger(cfg, comm.get_rank())
    with exits_with_one_sentence(_PROGRAM):
        try:
            _evaluate(args, cfg) if args.eval_only else _train(args, cfg)
        except UserError:
            if not comm.is_main_process():
                # The first process to leave ends the others: where all of them found the same
                # mistake, this lets the main one report it alone.
                time.sleep(10)
            raise
    _leave_process_group()


def _leave_process_group() -> None:
    """Ends the communication threads while the interpreter still runs.

    Detectron2 leaves them to the exit of the process, where gloo's were seen to abort it (once
    in some dozens of runs). Nobody leaves before all have arrived: process 0 holds the store that
    the others use.
    """
    if comm.get_world_size() > 1:
        comm.synchronize()
        dist.destroy_process_group()


def _train(args: argparse.Namespace, cfg: CfgNode) -> None:
    start = time.perf_counter()
    trainer = GHMTrainer(cfg)
    trainer.checkpointer.trusted = args.trust_checkpoint
    trainer.resume_or_load(resume=args.resume)
    if trainer.start_iter >= trainer.max_iter:
        raise UserError(
            f"--resume: {trainer.start_iter} iterations are done already and SOLVER.MAX_ITER is "
            f"{trainer.max_iter}: give a larger one, or evaluate with --eval-only --resume."
        )
    if comm.is_main_process():
        record_training(trainer.cfg, args)
    trainer.train()
    if comm.is_main_process():
        summarize_training(trainer, args, seconds=time.perf_counter() - start)


def _evaluate(args: argparse.Namespace, cfg: CfgNode) -> None:
    model = GHMTrainer.build_model(cfg)
    load_trained_weights(cfg, model, args.resume, args.trust_checkpoint)
    results = GHMTrainer.test(cfg, model)
    # Without ground truth there is nothing that TEST.EXPECTED_RESULTS could be compared with.
    if comm.is_main_process() and not report_submissions(cfg, results):
        verify_results(cfg, results)


def load_trained_weights(
    cfg: CfgNode, model: torch.nn.Module, resume: bool = False, trusted: bool = False
) -> None:
    """Load `MODEL.WEIGHTS`, or with `resume` the last checkpoint in `OUTPUT_DIR`, into a model.

    Raises:
        UserError: the file cannot be loaded, or holds weights of other shapes.
    """
    checkpointer = _EvaluationCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.trusted = trusted
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)


class _EvaluationCheckpointer(RestrictedCheckpointer):
    """Refuses weights that do not fit, where training would start these layers afresh."""

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        super()._log_incompatible_keys(incompatible)
        if wrong := incompatible.incorrect_shapes:
            name, found, expected = wrong[0]
            raise UserError(
                f"the weights do not fit the model: {name} has the shape {found} instead of "
                f"{expected} ({len(wrong)} such parameters); evaluate with the config, and the "
                "number of classes, of the training."
            )
