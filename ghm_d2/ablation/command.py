"""What tools/ablate.py does: plan, run what is not done, report."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ghm_d2.ablation.execute import Outcome, execute, free_cores
from ghm_d2.ablation.files import write_json
from ghm_d2.ablation.grid import TABLES, Grid, load_grid
from ghm_d2.ablation.plan import Run, plan_runs
from ghm_d2.ablation.plot import draw_summary
from ghm_d2.ablation.report import render_markdown, summarize
from ghm_d2.ablation.results import Store
from ghm_d2.engine.arguments import Parser, parse_arguments
from ghm_d2.engine.setup import locate_config_file
from ghm_d2.errors import UserError, exits_with_one_sentence

__all__ = ["main"]

logger = logging.getLogger(__name__)

_FAILED_RUNS, _INTERRUPTED = 1, 130  # exit codes


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="ablate.py",
        usage="%(prog)s (--table NAME | --grid FILE) --output DIR [options] [KEY VALUE ...]",
        description="Run an ablation table over several seeds and report it beside the paper's "
        "values. Finished runs are kept in DIR/runs and never run again; after a kill, the same "
        "command goes on. KEY VALUE pairs hold for all runs.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", choices=TABLES, help="a table of the paper")
    which.add_argument("--grid", metavar="FILE", help="a grid of your own (YAML)")
    add("--output", metavar="DIR", required=True, help="where runs and report go")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="SEED (1 2 3)")
    add(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME=annotations.json,image_dir",
        help="as train_net.py has it: the first trains, the others test (repeatable)",
    )
    add("--config-file", metavar="FILE", help="base config, instead of the grid's")
    add("--jobs", type=int, default=1, metavar="N", help="runs side by side (1)")
    add("--threads", type=int, metavar="N", help="CPU threads of each run (cores / jobs)")
    add("--num-gpus", type=int, default=1, metavar="N", help="GPUs of each run (1)")
    add("--report-only", action="store_true", help="report what is done; run nothing")
    flags = ("-h", "--help", "--report-only")
    args = parse_arguments(argv, parser, flags=flags, lists=("--seeds",))
    for name in ("jobs", "threads", "num_gpus"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise UserError(f"--seeds must be different numbers of at least 0, got {args.seeds}.")
    if args.config_file:
        args.config_file = locate_config_file(args.config_file)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run tools/ablate.py.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, 1 where a run has failed.
    """
    try:
        with exits_with_one_sentence("ablate.py"):
            failed = _ablate(_parse(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("ablate.py: interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    if failed:
        sys.exit(_FAILED_RUNS)


def _ablate(args: argparse.Namespace) -> bool:
    """Returns whether a run has failed."""
    grid = load_grid(TABLES[args.table] if args.table else args.grid)
    try:
        store = Store(Path(args.output))
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written ({error}).") from error
    runs = plan_runs(grid, args, store.work)
    _warn_of_equal_rows(runs)
    outcome = Outcome()
    if not args.report_only:
        threads = args.threads or max(free_cores() // args.jobs, 1)
        outcome = execute(runs, store, args.jobs, threads, args.num_gpus)
    _report(grid, runs, store, outcome)
    if outcome.failed:
        logger.warning(
            "%d of %d runs failed; the same command tries them again",
            len(outcome.failed),
            len({run.id for run in runs}),
        )
    return bool(outcome.failed)


def _warn_of_equal_rows(runs: Sequence[Run]) -> None:
    rows: dict[str, list[str]] = {}
    for run in runs:
        rows.setdefault(run.id, []).append(run.name)
    for names in rows.values():
        if len(names) > 1:
            logger.warning("%s have the same config and are one run", " and ".join(names))


def _report(grid: Grid, runs: Sequence[Run], store: Store, outcome: Outcome) -> None:
    results = {run.id: found for run in runs if (found := store.load(run))}
    summary = summarize(grid, runs, results, outcome.failed)
    text = render_markdown(summary)
    stem = store.folder / grid.name
    write_json(Path(f"{stem}.json"), summary)
    Path(f"{stem}.md").write_text(text, encoding="utf-8")
    pictures = draw_summary(summary, stem)
    print(f"\n{text}")
    for file in (f"{stem}.md", f"{stem}.json", *pictures):
        print(f"  {file}")
