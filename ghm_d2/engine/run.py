"""What train_net.py does: check once, launch, then train or evaluate in each process."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ghm_d2.checkpoint import load_trained_weights
from ghm_d2.checkpoint.origin import changed_data, check_datasets, origin_entry
from ghm_d2.data import CocoDataset, register_coco_dataset
from ghm_d2.data.loader import build_test_mapper
from ghm_d2.data.registration import data_fingerprint
from ghm_d2.engine.arguments import parse_arguments, train_program
from ghm_d2.engine.checks import check_all
from ghm_d2.engine.pictures import draw_predictions
from ghm_d2.engine.processes import (
    end_process,
    exit_code_of,
    is_restarted,
    join_torchrun,
    launch_processes,
    leave_process_group,
    main_first,
    reported_once,
    started_by_torchrun,
)
from ghm_d2.engine.setup import build_config, merge_arguments, setup_ghm_logger
from ghm_d2.engine.submission import report_submissions
from ghm_d2.engine.summary import next_command, summarize_training
from ghm_d2.engine.trainer import GHMTrainer
from ghm_d2.errors import UserError, exits_with_one_sentence
from ghm_d2.run_folder import RunFolder
from ghm_d2.run_parts import Record

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run train_net.py, also as one of the processes that torchrun starts.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr; code 1
            where the results are not those of `TEST.EXPECTED_RESULTS`; code 3 where something was
            not finite; code 75 where SIGTERM stopped a training, which `--resume` takes up again.
            A process that torchrun has started ends with that code instead.
    """
    if not started_by_torchrun():
        with exits_with_one_sentence(train_program()):
            args = _parse(argv)
            launch_processes(_work, args, *_prepare(args))
    elif code := exit_code_of(lambda: _work_in_torchrun(argv)):
        end_process(code)
    else:
        leave_process_group()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    args.restarted = False
    return args


def _work_in_torchrun(argv: Sequence[str] | None) -> None:
    with exits_with_one_sentence(train_program()), reported_once():
        args = _parse(argv)
        _join(args)
        _work(args, *main_first(lambda: _prepare(args)))


def _prepare(args: argparse.Namespace) -> tuple[CfgNode, list[CocoDataset]]:
    cfg, datasets = build_config(args)
    check_all(cfg, args)
    cfg.freeze()
    return cfg, datasets


def _join(args: argparse.Namespace) -> None:
    """Joins the job that torchrun has started, which goes on where it was if it was restarted."""
    cfg = merge_arguments(args)
    join_torchrun(args, cfg.MODEL.DEVICE if torch.cuda.is_available() else "cpu")
    if args.eval_only:
        return
    args.restarted = is_restarted()
    if not (args.restarted or args.resume) and comm.is_main_process():
        # Else a restart would resume from the checkpoints of an earlier training.
        RunFolder(cfg.OUTPUT_DIR).set_last_checkpoint_aside()
    args.resume = args.resume or args.restarted


def _work(args: argparse.Namespace, cfg: CfgNode, datasets: list[CocoDataset]) -> None:
    """One process of the job."""
    if comm.get_world_size() > 1 and not started_by_torchrun():
        # A spawned process has registered what its imports register, and nothing else.
        for dataset in datasets:
            register_coco_dataset(dataset)
    default_setup(cfg, args)
    setup_ghm_logger(cfg, comm.get_rank())
    with exits_with_one_sentence(train_program()), reported_once():
        _evaluate(args, cfg) if args.eval_only else _train(args, cfg, datasets)
    comm.synchronize()  # process 0 holds the store that the others use


def _train(args: argparse.Namespace, cfg: CfgNode, datasets: list[CocoDataset]) -> None:
    start = time.perf_counter()
    run = RunFolder(cfg.OUTPUT_DIR)
    if comm.is_main_process():
        run.remove_partial_files()
    trainer = GHMTrainer(cfg)
    trainer.checkpointer.trusted = args.trust_checkpoint
    trainer.resume_or_load(resume=args.resume)
    if trainer.start_iter >= trainer.max_iter:
        if args.restarted:  # it failed in its evaluation
            return _evaluate(args, cfg)
        raise UserError(
            f"--resume: {trainer.start_iter} iterations are done already and SOLVER.MAX_ITER is "
            f"{trainer.max_iter}: give a larger one, or evaluate with --eval-only --resume."
        )
    classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes") or ()
    data = {name: data_fingerprint(name) for name in cfg.DATASETS.TRAIN}
    if trainer.start_iter:
        _check_same_data(trainer.checkpointer.origin, cfg, data)
    trainer.checkpointer.origin_entry = origin_entry(classes, data)
    if comm.is_main_process():
        if trainer.start_iter:
            run.cut_logs(trainer.start_iter)
        run.write_record(
            config=trainer.cfg.dump(),
            config_file=args.config_file,
            classes=classes,
            datasets={d.name: (d.json_file, d.image_root) for d in datasets},
            data=data,
            device=cfg.MODEL.DEVICE,
            processes=comm.get_world_size(),
        )
    trainer.train()
    if comm.is_main_process():
        # In one process alone, DistributedDataParallel would wait for the others.
        model = getattr(trainer.model, "module", trainer.model)
        pictured = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)[0]
        tested = [d for d in datasets if d.name in cfg.DATASETS.TEST]
        summarize_training(
            run,
            partial(draw_predictions, pictured, build_test_mapper(cfg), model),
            getattr(trainer, "_last_eval_results", None),
            next_command(train_program(), cfg.OUTPUT_DIR, tested) if cfg.DATASETS.TEST else None,
            iterations=trainer.max_iter,
            seconds=time.perf_counter() - start,
        )


def _check_same_data(origin: Record, cfg: CfgNode, data: Mapping[str, Mapping[str, Any]]) -> None:
    check_datasets(origin, cfg.DATASETS.TRAIN)
    if changes := changed_data(origin, data):
        raise UserError(
            f"--resume: the data is not that of the checkpoint ({'; '.join(changes)}): take the "
            "same data, or start anew from these weights in another OUTPUT_DIR."
        )


def _evaluate(args: argparse.Namespace, cfg: CfgNode) -> None:
    model = GHMTrainer.build_model(cfg)
    origin = load_trained_weights(cfg, model, args.resume, args.trust_checkpoint)
    check_datasets(origin, cfg.DATASETS.TEST)
    results = GHMTrainer.test(cfg, model)
    # Without ground truth there is nothing that TEST.EXPECTED_RESULTS could be compared with.
    if comm.is_main_process() and not report_submissions(cfg, results):
        verify_results(cfg, results)
