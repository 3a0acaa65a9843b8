"""Rows trained on annotations with errors: copies of the first data set, made before the runs."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ghm_d2.data import CocoDataset
from ghm_d2.data.corrupt import KINDS, corrupt_coco
from ghm_d2.files import write_json

from .grid import Grid
from .plan import Run, first_dataset

Plan = Callable[[Grid, Sequence[int], Sequence[str]], list[Run]]


def plan_with_noise(
    plan: Plan, grid: Grid, seeds: Sequence[int], datasets: Sequence[str], folder: Path
) -> list[Run]:
    """The runs of a grid, some rows of which train on corrupted copies of the first data set.

    A copy's errors come from the seed of the training, so that the spread over the seeds includes
    that of the errors; with one seed, all rows of the same shares train on the same copy.

    Args:
        plan: makes the runs of a grid, seeds and data sets.
        grid: the table.
        seeds: of the trainings.
        datasets: NAME=annotations.json,image_dir; the others than the first stay as they are.
        folder: for the copies and the lists of what was changed; the same command writes the same
            files again.

    Returns:
        The runs, all rows of the first seed first.

    Raises:
        UserError: as `plan`, or there is no data set, or its annotations allow no such errors.
    """
    runs = []
    first = None
    if any(row.corrupt for row in grid.rows):
        without = "corrupt makes copies of the first --dataset, and there is none."
        first = first_dataset(datasets, without)
    for shares, rows in itertools.groupby(grid.rows, key=lambda row: row.corrupt):
        part = replace(grid, rows=tuple(rows))
        if first is None or not shares:
            runs += plan(part, seeds, datasets)
            continue
        for seed in seeds:
            copy = _corrupted(first, shares, seed, folder)
            runs += plan(part, [seed], [copy, *datasets[1:]])
    runs.sort(key=lambda run: seeds.index(run.seed))  # stable: the rows stay in order
    return runs


def _corrupted(first: CocoDataset, shares: Mapping[str, float], seed: int, folder: Path) -> str:
    """Writes a copy and the list of its errors; returns it as --dataset has it."""
    noisy, changes = corrupt_coco(first.data.content, shares, seed)
    told = [f"{kind.replace(' ', '_')}_{100 * shares[kind]:g}" for kind in KINDS if kind in shares]
    name = "_".join([first.name, *told, "seed", str(seed)])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    write_json(file, noisy)
    write_json(folder / f"{name}.changes.json", changes)
    return f"{name}={file},{first.image_root}"
