"""What train_net.py does: check once, launch, then train or evaluate in each process."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import default_setup
from detectron2.utils import comm

from ghm_d2.checkpoint import load_trained_weights
from ghm_d2.checkpoint.origin import changed_data, check_datasets, origin_entry
from ghm_d2.data import CocoDataset, register_coco_dataset
from ghm_d2.data.registration import data_fingerprint
from ghm_d2.errors import UserError, exits_with_one_sentence, shown
from ghm_d2.files import write_text
from ghm_d2.run_folder import CONFIG, FINAL_CHECKPOINT, RunFolder
from ghm_d2.run_parts import Record

from .arguments import Command, parse_arguments, train_program
from .checks import check_all
from .output_folder import (
    disk_errors,
    exists_and_is_newer,
    locked,
    refuse_finished,
)
from .pictures import draw_predictions
from .process_end import end_process, exit_code_of, leave_process_group
from .processes import (
    Processes,
    is_restarted,
    join_torchrun,
    launch_processes,
    main_first,
    main_only,
    reported_once,
    started_by_torchrun,
)
from .settings import Config, Settings, as_text, key_of, pair, read_settings
from .setup import (
    build_config,
    given_keys,
    load_config,
    locate_config_file,
    setup_ghm_logger,
)
from .submission import report_submissions
from .summary import next_commands, summarize_training
from .terminal import brief_terminal
from .trainer import GHMTrainer, verify_expected

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Run train_net.py, also as one of the processes that torchrun starts.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr; code 1
            where the results are not those of `TEST.EXPECTED_RESULTS`, and after Ctrl-C outside
            the steps of a training; code 3 where something was not finite; code 75 where SIGTERM,
            SIGHUP or SIGINT stopped a training, which `--resume` takes up again. A process that
            torchrun has started ends with that code instead.
    """
    if not started_by_torchrun():
        with _exits_with_one_sentence():
            command, processes = _parse(argv)
            launch_processes(_work, processes, command, *_prepare(command, processes))
    elif code := exit_code_of(lambda: _work_in_torchrun(argv)):
        end_process(code)
    else:
        leave_process_group()


def _exits_with_one_sentence() -> AbstractContextManager:
    return exits_with_one_sentence(train_program())


def _parse(argv: Sequence[str] | None) -> tuple[Command, Processes]:
    argv = sys.argv[1:] if argv is None else argv
    for word in map(str, argv):
        try:
            word.encode()
        except UnicodeEncodeError as error:  # neither the config nor a log could hold it
            raise UserError(f"{shown(word)} is not text in UTF-8: rename the file.") from error
    args = parse_arguments(argv)
    command = Command(
        locate_config_file(args.config_file),
        tuple(args.opts),
        tuple(args.dataset),
        eval_only=args.eval_only,
        resume=args.resume,
        overwrite=args.overwrite,
        trusted=args.trust_checkpoint,
        words=tuple(map(str, argv)),
    )
    return command, Processes(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)


def _prepare(command: Command, processes: Processes) -> tuple[Config, list[CocoDataset]]:
    cfg, datasets = build_config(
        command.config_file, command.overrides, command.datasets, eval_only=command.eval_only
    )
    check_all(
        cfg,
        given_keys(command.config_file, command.overrides),
        processes,
        eval_only=command.eval_only,
        resume=command.resume,
    )
    if isinstance(cfg, CfgNode):
        cfg.freeze()
    return cfg, datasets


def _work_in_torchrun(argv: Sequence[str] | None) -> None:
    """One process of a job that torchrun has started; a restarted one goes on where it was."""
    with _exits_with_one_sentence(), reported_once():
        command, given = _parse(argv)
        device = read_settings(load_config(command.config_file, command.overrides)).device
        processes = join_torchrun(given, device if torch.cuda.is_available() else "cpu")
        if not command.eval_only:
            restarted = is_restarted()
            command = replace(command, restarted=restarted, resume=command.resume or restarted)
        _work(command, *main_first(lambda: _prepare(command, processes)))


def _work(command: Command, cfg: Config, datasets: list[CocoDataset]) -> None:
    """One process of the job."""
    if comm.get_world_size() > 1 and not started_by_torchrun():
        # A spawned process knows only what its imports register, and would not find them.
        for dataset in datasets:
            register_coco_dataset(dataset)
    run = RunFolder(read_settings(cfg).output_dir)
    logging.raiseExceptions = False  # a full disk would print a traceback for each line of the log
    with _exits_with_one_sentence(), reported_once(), disk_errors(run.folder):
        if command.eval_only:
            _evaluate(command, cfg)
        else:
            with ExitStack() as stack:
                main_only(lambda: stack.enter_context(locked(run.folder)))
                main_only(lambda: _make_room(command, cfg, run))
                _train(command, cfg, datasets)
    comm.synchronize()  # if process 0 ended first, the store that the others still use would go


def _make_room(command: Command, cfg: Config, run: RunFolder) -> None:
    """Before anything is written: an earlier training in the folder is resumed, or set aside."""
    if not command.resume:
        if not command.overwrite:
            refuse_finished(run.folder, f"--resume and {pair(cfg, 'max_iter', 'N')}")
        run.set_last_checkpoint_aside()
    run.remove_partial_files()


def _set_up(command: Command, cfg: Config) -> None:
    # Detectron2 calls torch.meshgrid without `indexing`, of which PyTorch warns in every run.
    warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)
    folder = read_settings(cfg).output_dir
    # If the config cannot be written, Detectron2 only logs that and goes on.
    main_only(lambda: write_text(os.path.join(folder, CONFIG), as_text(cfg)))
    default_setup(cfg, command)
    setup_ghm_logger(folder, comm.get_rank())


def _train(command: Command, cfg: Config, datasets: list[CocoDataset]) -> None:
    start = time.perf_counter()
    run = RunFolder(read_settings(cfg).output_dir)
    with brief_terminal(read_settings(cfg).output_dir):
        _set_up(command, cfg)
        trainer = GHMTrainer(cfg)
        classes, data = _load(command, trainer)
    settings, stopped = trainer.settings, trainer.early_stopping
    if stopped and stopped.exhausted:
        if command.restarted:
            return  # a process has failed after everything was done
        raise UserError(
            f"--resume: the training has stopped early, {stopped.verdict()}: give a larger "
            f"{key_of(cfg, 'patience')} to train further."
        )
    if trainer.start_iter < trainer.max_iter:
        if comm.is_main_process():
            run.cut_logs(trainer.start_iter)
            run.write_record(
                config=as_text(trainer.cfg),
                config_file=command.config_file,
                classes=classes,
                datasets={d.name: (d.json_file, d.image_root) for d in datasets},
                data=data,
                device=settings.device,
                processes=comm.get_world_size(),
            )
        trainer.train()
    elif settings.test and not main_only(lambda: _is_evaluated(run)):
        logger.info("all iterations are done, but the last evaluation is not: it is done now")
        trainer.evaluate()
    elif command.restarted:
        return  # here too, a process has failed after everything was done
    else:
        raise UserError(
            f"--resume: {trainer.start_iter} iterations are done already and "
            f"{key_of(cfg, 'max_iter')} is {trainer.max_iter}: give a larger one, or evaluate with "
            "--eval-only --resume."
        )
    if comm.is_main_process():
        _summarize(command, trainer, run, datasets, time.perf_counter() - start)


def _load(
    command: Command, trainer: GHMTrainer
) -> tuple[Sequence[str], Mapping[str, Mapping[str, Any]]]:
    """Loads what the training starts from; names of its classes, fingerprints of its data."""
    trainer.checkpointer.trusted = command.trusted
    trainer.resume_or_load(resume=command.resume)
    names = trainer.settings.train
    classes = MetadataCatalog.get(names[0]).get("thing_classes") or ()
    data = {name: data_fingerprint(name) for name in names}
    if trainer.start_iter:
        _check_same_data(trainer.checkpointer.origin, trainer.settings, data)
    trainer.checkpointer.origin_entry = origin_entry(classes, data)
    return classes, data


def _summarize(
    command: Command,
    trainer: GHMTrainer,
    run: RunFolder,
    datasets: Sequence[CocoDataset],
    seconds: float,
) -> None:
    settings, stopped = trainer.settings, trainer.early_stopping
    # Called by one process alone, DistributedDataParallel would wait for the others.
    model = getattr(trainer.evaluated_model, "module", trainer.evaluated_model)
    pictured = (*settings.test, *settings.train)[0]
    mapper = trainer.build_test_mapper(trainer.cfg)
    threshold = trainer.score_thresholds.get("")
    summarize_training(
        run,
        partial(draw_predictions, pictured, mapper, model, threshold=threshold),
        trainer.results,
        next_commands(trainer.cfg, run, datasets, command, trainer.iter),
        iterations=trainer.iter,
        seconds=seconds,
        note=stopped.verdict() if stopped and stopped.exhausted else "",
        tested=bool(settings.test),
    )


def _is_evaluated(run: RunFolder) -> bool:
    """Whether the last evaluation was finished; killing a training can prevent that."""
    return exists_and_is_newer(run.results_file, run.folder / FINAL_CHECKPOINT)


def _check_same_data(
    origin: Record, settings: Settings, data: Mapping[str, Mapping[str, Any]]
) -> None:
    check_datasets(origin, settings.train)
    if changes := changed_data(origin, data):
        raise UserError(
            f"--resume: the data is not what the checkpoint was trained on ({'; '.join(changes)}): "
            "give the same data, or start anew from these weights in another output folder."
        )


def _evaluate(command: Command, cfg: Config) -> None:
    settings = read_settings(cfg)
    with brief_terminal(settings.output_dir):
        _set_up(command, cfg)
        model = GHMTrainer.build_model(cfg)
        origin = load_trained_weights(
            model,
            settings.weights,
            settings.output_dir,
            resume=command.resume,
            trusted=command.trusted,
        )
    check_datasets(origin, settings.test)
    results = GHMTrainer.test(cfg, model)
    # Without ground truth there is nothing that the expected results could be compared with.
    if comm.is_main_process() and not report_submissions(settings, results):
        verify_expected(settings, results)
