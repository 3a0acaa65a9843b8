"""Run an ablation table over several seeds and report it beside the paper's values."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ghm_d2.ablation import TABLES, Grid, Run, load_grid, plan_runs, tune, write_report
from ghm_d2.ablation.execute import CLUSTERS, Outcome, execute
from ghm_d2.ablation.noise import plan_with_noise
from ghm_d2.ablation.results import Store
from ghm_d2.engine.arguments import Parser, add_dataset_option, parse_arguments
from ghm_d2.engine.preemption import PREEMPTED
from ghm_d2.engine.setup import given_keys, is_python, locate_config_file
from ghm_d2.errors import UserError, exits_with_one_sentence
from ghm_d2.provenance import machine

logger = logging.getLogger(__name__)

_FLAGS = ("-h", "--help", "--report-only")
_FAILED_RUNS = 1  # exit code


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; KEY VALUE pairs hold for all runs."""
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", choices=TABLES, help="a table of the paper")
    which.add_argument("--grid", metavar="FILE", help="a grid of your own (YAML)")
    add("--output", metavar="DIR", required=True, help="where runs and report go")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        metavar="N",
        help="values of SEED (1 2 3)",
    )
    add_dataset_option(
        parser,
        "COCO-format data; the first is trained on, the others are tested on (repeatable)",
    )
    add("--config-file", metavar="FILE", help="base config, instead of the grid's")
    add("--jobs", type=int, default=1, metavar="N", help="runs at the same time (1)")
    add("--threads", type=int, metavar="N", help="CPU threads of each run (cores / jobs)")
    add("--num-gpus", type=int, default=1, metavar="N", help="GPUs of each run (1)")
    add("--cluster", choices=CLUSTERS, default="local", help="where submitit runs them (local)")
    add(
        "--cluster-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of submitit, such as slurm_partition=gpu (repeatable)",
    )
    add("--report-only", action="store_true", help="report the finished runs; run nothing")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, 1 where a run has failed, 75 after Ctrl-C.
    """
    parser = Parser(
        prog="ghm-d2 ablate",
        usage="%(prog)s (--table NAME | --grid FILE) --output DIR [options] [KEY VALUE ...]",
        description=f"{__doc__} Finished runs are kept in DIR and not repeated; after an "
        "interruption, the same command continues. KEY VALUE pairs (KEY=VALUE in a Python config) "
        "hold for all runs.",
        allow_abbrev=False,
    )
    _add_arguments(parser)
    words = sys.argv[1:] if argv is None else argv
    with exits_with_one_sentence(parser.prog):
        grid, python = _first_look(words)
        args = parse_arguments(words, parser, flags=_FLAGS, lists=("--seeds",), python=python)
        try:
            _run(grid, args)
        except KeyboardInterrupt:
            print(f"{parser.prog}: interrupted; the same command continues.", file=sys.stderr)
            sys.exit(PREEMPTED)


def _run(grid: Grid, args: argparse.Namespace) -> None:
    """Plans the runs, does those that are missing, and reports all."""
    _check(args)
    parameters = _parameters(args.cluster_option)
    if grid.tuning and (both := set(grid.tuning.seeds) & set(args.seeds)):
        raise UserError(f"--seeds {min(both)} is a seed that the grid is tuned with: give others.")
    if grid.tuning and (both := set(grid.tuning.keys) & given_keys(_base(grid, args), args.opts)):
        raise UserError(f"{min(both)} cannot be set for all runs: the grid tunes it.")
    try:
        store = Store(Path(args.output))
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written ({error}).") from error

    def plan_part(part: Grid, seeds: Sequence[int], datasets: Sequence[str]) -> list[Run]:
        return plan_runs(
            part,
            seeds,
            datasets=datasets,
            pairs=args.opts,
            config_file=args.config_file and locate_config_file(args.config_file),
            num_gpus=args.num_gpus,
            scratch=store.work,
            complete=not args.report_only,
        )

    def plan(rows: Grid, seeds: Sequence[int], datasets: Sequence[str]) -> list[Run]:
        return plan_with_noise(plan_part, rows, seeds, datasets, store.work / "noise")

    outcome = Outcome()

    def bring(runs: Sequence[Run]) -> dict[str, str]:
        if args.report_only:
            return {}
        threads = args.threads or max(machine()["cores"] // args.jobs, 1)
        done = execute(runs, store, args.jobs, threads, args.num_gpus, args.cluster, parameters)
        outcome.failed |= done.failed
        return done.failed

    tuned = None
    if grid.tuning:
        tuned = tune(grid, grid.tuning, args.dataset, store, plan, bring)
    runs = plan(tuned.grid if tuned else grid, args.seeds, args.dataset)
    _warn_of_equal_rows(runs)
    if tuned:
        logger.info("the rows as tuned: %d runs", len(runs))
    bring(runs)
    text, files = write_report(grid, runs, store, outcome.failed, tuned)
    print(f"\n{text}")
    for file in files:
        print(f"  {file}")
    if outcome.failed:
        number = len({run.id for run in [*runs, *(tuned.runs if tuned else [])]})
        logger.warning(
            "%d of %d runs failed; the same command tries them again", len(outcome.failed), number
        )
        sys.exit(_FAILED_RUNS)


def _first_look(words: Sequence[str]) -> tuple[Grid | None, bool]:
    """The grid, and whether overrides are KEY=VALUE: what splits the words depends on it."""
    parser = Parser(add_help=False, allow_abbrev=False)
    for option in ("--table", "--grid", "--config-file"):
        parser.add_argument(option)
    args, _ = parser.parse_known_args(words)
    file = TABLES.get(args.table, args.grid)
    grid = load_grid(file) if file else None
    return grid, grid is not None and is_python(_base(grid, args))


def _base(grid: Grid, args: argparse.Namespace) -> str:
    """The config file that all rows start from."""
    return str(args.config_file or grid.config_file)


def _check(args: argparse.Namespace) -> None:
    for name in ("jobs", "threads", "num_gpus"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise UserError(f"--seeds must be different numbers of at least 0, got {args.seeds}.")


def _parameters(options: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words with the values as YAML reads them: 600 is a number."""
    pairs = [option.partition("=") for option in options]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise UserError(f"--cluster-option must be KEY=VALUE, got {wrong[0]}.")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def _warn_of_equal_rows(runs: Sequence[Run]) -> None:
    rows: dict[str, list[str]] = {}
    for one in runs:
        rows.setdefault(one.id, []).append(one.name)
    for names in rows.values():
        if len(names) > 1:
            logger.warning("%s have the same config, so they are run once", " and ".join(names))
