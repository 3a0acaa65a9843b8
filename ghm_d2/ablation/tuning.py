"""The same number of tries for every row, on training images that no report is made of.

A try is a row with other values of the tuned keys, each its own value times a power of the key's
factor. The search is a compass search: it tries the neighbours of the best point so far, the
nearest first, and so goes on past the ends of any grid. It has no chance in it and reads results
from the store, so that the same command goes on after a kill.
"""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ghm_d2.data.split import split_coco
from ghm_d2.errors import UserError
from ghm_d2.files import write_json
from ghm_d2.markdown import markdown_table

from .grid import Grid, Row, Tuning
from .plan import Run, first_dataset
from .results import Store

logger = logging.getLogger(__name__)

Point = tuple[int, ...]  # the power of each key's factor


@dataclass
class _Search:
    row: Row
    start: dict[str, float]
    tries: dict[Point, dict[str, Any]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    complete: bool = True

    def score(self, point: Point) -> float:
        """Mean over the seeds; a try that failed is worse than any other."""
        score = self.tries[point]["score"]
        return -math.inf if score is None else score

    def best(self) -> Point:
        """The best point; among equals the first, which is nearer to the row as it is."""
        return max(self.tries, key=self.score)


@dataclass(frozen=True)
class Tuned:
    """What the tries came to.

    Attributes:
        grid: the grid whose rows have the values that were chosen; a row that has not had all its
            tries yet is left out.
        runs: the tries.
        record: what the report says, as JSON has it.
    """

    grid: Grid
    runs: list[Run]
    record: dict[str, Any]


def next_points(scores: Mapping[Point, float], keys: int, number: int) -> list[Point]:
    """The untried points nearest to the best one, by the number of steps.

    Args:
        scores: of the points that were tried, in their order.
        keys: number of axes.
        number: how many points.
    """
    if not scores:
        return [(0,) * keys][:number]
    best = max(scores, key=lambda point: scores[point])
    found: list[Point] = []
    for steps in itertools.count(1):
        offsets = itertools.product(range(-steps, steps + 1), repeat=keys)
        ring = (o for o in offsets if sum(map(abs, o)) == steps)
        # One axis after the other, up before down.
        for offset in sorted(ring, key=lambda o: [(-abs(v), -v) for v in o]):
            point = tuple(b + v for b, v in zip(best, offset, strict=True))
            if point not in scores and len(found) < number:
                found.append(point)
        if len(found) >= number:
            return found
    raise AssertionError("there is always a farther point")


def tune(
    grid: Grid,
    tuning: Tuning,
    datasets: Sequence[str],
    store: Store,
    plan: Callable[[Grid, Sequence[int], Sequence[str]], list[Run]],
    bring: Callable[[Sequence[Run]], Mapping[str, str]],
) -> Tuned:
    """Search for each row's values.

    Args:
        grid: the table.
        tuning: its budget.
        datasets: NAME=annotations.json,image_dir; of the first a part is held out.
        store: where the runs are.
        plan: makes the runs of a grid, seeds and data sets.
        bring: brings runs to their end; returns identity to reason of those that failed.

    Raises:
        UserError: a key holds no number in a row or has no influence on it; or there is no data set
            to hold images out of.
    """
    parts, images = _hold_out(datasets, tuning, store.work / "tuning")
    keys = tuple(tuning.keys)
    searches = {row.name: _Search(row, {}) for row in grid.rows}
    while wanted := {
        name: next_points(
            {p: search.score(p) for p in search.tries},
            len(keys),
            # A round is both neighbours on each axis, however many runs go side by side.
            min(tuning.tries - len(search.tries), 2 * len(keys) if search.tries else 1),
        )
        for name, search in searches.items()
        if search.complete and len(search.tries) < tuning.tries
    }:
        tries = {
            (name, point): _as_row(searches[name], point, tuning)
            for name, points in wanted.items()
            for point in points
        }
        runs = plan(replace(grid, rows=tuple(tries.values())), tuning.seeds, parts)
        for run in runs:  # in the first round, a try is a row as it is
            search = next(searches[name] for (name, _), row in tries.items() if row.name == run.row)
            search.start = search.start or _start(search.row.name, run, keys)
        first = 1 + min(len(searches[name].tries) for name in wanted)
        last = max(len(searches[name].tries) + len(points) for name, points in wanted.items())
        which = f"tries {first} to {last}" if last > first else f"try {first}"
        logger.info("tuning, %s of %d: %d runs", which, tuning.tries, len(runs))
        failed = bring(runs)
        for (name, point), row in tries.items():
            search, own = searches[name], [run for run in runs if run.row == row.name]
            found = {run.seed: store.load(run) for run in own}
            if any(
                f is None and r.id not in failed for r, f in zip(own, found.values(), strict=True)
            ):
                search.complete = False  # not run here, or at work elsewhere
                continue
            if same := {run.id for run in own} & {run.id for run in search.runs}:
                raise UserError(
                    f"row {name!r}: {row.name!r} has the config of an earlier try, so a tuned key "
                    f"has no effect ({same.pop()})."
                )
            search.runs += own
            scores = [
                None if f is None else f["metrics"].get(grid.columns[0]) for f in found.values()
            ]
            numbers = [score for score in scores if score is not None]
            whole = len(numbers) == len(scores)
            search.tries[point] = {
                "values": _values(search, point, tuning),
                "score": sum(numbers) / len(scores) if whole else None,
                "runs": {run.seed: run.id for run in own},
            }
    rows = []
    for search in searches.values():
        if search.complete:
            rows.append(_chosen(search, tuning))
            best = search.best()
            name, score = _as_row(search, best, tuning).name, search.score(best)
            logger.info("tuned: %s, %s %.2f", name, grid.columns[0], score)
        else:
            logger.warning("%s has not had all its tries yet", search.row.name)
    record = {
        "tries": tuning.tries,
        "keys": dict(tuning.keys),
        "seeds": list(tuning.seeds),
        "column": grid.columns[0],
        "images": images,
        "rows": {
            name: {
                "complete": search.complete,
                "chosen": search.tries[search.best()]["values"] if search.tries else {},
                "tries": list(search.tries.values()),
            }
            for name, search in searches.items()
        },
    }
    runs = [run for search in searches.values() for run in search.runs]
    return Tuned(replace(grid, rows=tuple(rows)), runs, record)


def _hold_out(
    datasets: Sequence[str], tuning: Tuning, folder: Path
) -> tuple[list[str], dict[str, int]]:
    """The training images in two parts, as --dataset has them, and the size of each."""
    without = "tuning holds out images of the first --dataset: give one."
    first = first_dataset(datasets, without)
    parts = split_coco(first.data.content, tuning.fraction, tuning.split_seed)
    texts, images = [], {}
    for suffix, content in zip(("rest", "held_out"), parts, strict=True):
        file = folder / f"{suffix}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
        texts.append(f"{first.name}_{suffix}={file},{first.image_root}")
        images[suffix] = len(content["images"])
    return texts, images


def _values(search: _Search, point: Point, tuning: Tuning) -> dict[str, float]:
    powers = zip(tuning.keys.items(), point, strict=True)
    return {key: float(f"{search.start[key] * factor**n:.6g}") for (key, factor), n in powers}


def _as_row(search: _Search, point: Point, tuning: Tuning) -> Row:
    row = search.row
    if not any(point):  # as it is: its values are known from its config
        return replace(row, name=f"{row.name}, as configured")
    values = _values(search, point, tuning)
    told = ", ".join(f"{_short(key)} {value:g}" for key, value in values.items())
    return replace(row, name=f"{row.name}, {told}", overrides={**row.overrides, **values})


def _chosen(search: _Search, tuning: Tuning) -> Row:
    point = search.best()
    if not any(point):
        return search.row
    values = _values(search, point, tuning)
    return replace(search.row, overrides={**search.row.overrides, **values})


def _start(name: str, run: Run, keys: Sequence[str]) -> dict[str, float]:
    for key in keys:
        value = run.config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(
                f"row {name!r}: {key} cannot be tuned, got {value!r} where a number above 0 that "
                "the row uses is needed (LOSS_TYPE focal and smooth_l1 have a LOSS_WEIGHT too)."
            )
    return {key: run.config[key] for key in keys}


def _short(key: str) -> str:
    return ".".join(key.split(".")[-2:])


def tuning_text(record: Mapping[str, Any]) -> str:
    """The tries and what they chose, as Markdown.

    Args:
        record: of a :class:`Tuned`.
    """
    keys, column = list(record["keys"]), record["column"]
    header = ["", "tries", f"{column} as configured", f"best {column}", *map(_short, keys)]
    lines = []
    for name, row in record["rows"].items():
        tries = row["tries"]
        count = f"{len(tries)}" if row["complete"] else f"{len(tries)} of {record['tries']}"
        ends = [tries[0], max(tries, key=lambda one: one["score"] or -1.0)] if tries else []
        cells = [name, count, *map(_figure, ends), *(_told(row, key) for key in keys)]
        lines.append(cells + [""] * (len(header) - len(cells)))
    factors = ", ".join(f"{_short(key)} by {f:g}" for key, f in record["keys"].items())
    seeds = ", ".join(map(str, record["seeds"]))
    told = (
        f"Every row gets {record['tries']} tries ({factors}), seed {seeds}, trained on "
        f"{record['images']['rest']} of the training images and compared on the other "
        f"{record['images']['held_out']}. The images and seeds of the tables above chose nothing. "
        "(highest), (lowest): of the values tried, so that a better one may lie beyond."
    )
    if not all(row["complete"] for row in record["rows"].values()):
        told += (
            " Rows with fewer tries are not tuned yet: they are not in the tables above, and what "
            "they have chosen may change."
        )
    every = [
        f"- {name}: {'; '.join(f'{_numbers(one)}: {_figure(one)}' for one in row['tries'])}"
        for name, row in record["rows"].items()
        if row["tries"]
    ]
    listed = "\n".join([f"Every try ({', '.join(map(_short, keys))}: {column}):", "", *every])
    parts = ["## Tuning", markdown_table(header, lines), told, *([listed] if every else [])]
    return "\n\n".join(parts)


def _numbers(one: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:g}" for value in one["values"].values())


def _figure(one: Mapping[str, Any]) -> str:
    return "failed" if one["score"] is None else f"{one['score']:.1f}"


def _told(row: Mapping[str, Any], key: str) -> str:
    """The value chosen, and whether none beyond it was tried."""
    if key not in row["chosen"]:
        return ""
    chosen, values = row["chosen"][key], {one["values"][key] for one in row["tries"]}
    if len(values) > 1 and chosen in (min(values), max(values)):
        return f"{chosen:g} ({'highest' if chosen == max(values) else 'lowest'})"
    return f"{chosen:g}"
