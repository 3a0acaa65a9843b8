"""From finished runs to the table: a summary as JSON has it, and Markdown from that alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ghm_d2.markdown import markdown_table

from .grid import SPEED, Grid, Row
from .plan import Run
from .plot import draw_summary
from .results import Store
from .stats import mean_and_deviation, paired_difference
from .tuning import Tuned, tuning_text


def write_report(
    grid: Grid,
    runs: Sequence[Run],
    store: Store,
    failed: Mapping[str, str],
    tuned: Tuned | None = None,
) -> tuple[str, list[Path]]:
    """Write the study, the table and the picture of what is done, into the store's folder.

    Args:
        grid: the table.
        runs: its plan.
        store: where the finished runs are.
        failed: identity to reason.
        tuned: how its rows came to their values.

    Returns:
        The table as Markdown, and the files.
    """
    results = {run.id: found for run in runs if (found := store.load(run))}
    summary = summarize(grid, runs, results, failed)
    if tuned:
        summary["tuning"] = tuned.record
        results |= {run.id: found for run in tuned.runs if (found := store.load(run))}
    text = render_markdown(summary)
    stem = store.folder / grid.name
    table = Path(f"{stem}.md")
    table.write_text(text, encoding="utf-8")
    study = store.write_study(summary, results)
    return text, [table, study, *draw_summary(summary, stem)]


def summarize(
    grid: Grid,
    runs: Sequence[Run],
    results: Mapping[str, dict[str, Any]],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that the report says, as JSON has it.

    Args:
        grid: the table.
        runs: its plan.
        results: identity to finished run.
        failed: identity to reason.
    """
    rows = [_row(row, grid, [r for r in runs if r.row == row.name], results) for row in grid.rows]
    return {
        "grid": grid.name,
        "title": grid.title,
        "note": grid.note,
        "columns": list(grid.columns),
        "published_on": grid.published_on,
        "seeds": sorted({run.seed for run in runs}),
        "reference": grid.reference,
        "rows": rows,
        "comparisons": _comparisons(grid, rows),
        "failed": {run.name: failed[run.id] for run in runs if run.id in failed},
        "missing": _missing([r for r in runs if r.id not in results and r.id not in failed]),
        "circumstances": _circumstances([results[r.id] for r in runs if r.id in results]),
    }


def _row(
    row: Row, grid: Grid, runs: Sequence[Run], results: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    done = {run.seed: results[run.id] for run in runs if run.id in results}
    by_seed = {seed: found["metrics"] for seed, found in done.items()}
    speeds = [found[SPEED] for found in done.values() if found[SPEED] is not None]
    kind = "peak_gpu_mb" if any(f["peak_gpu_mb"] for f in done.values()) else "peak_rss_mb"
    peaks = [found[kind] for found in done.values() if found[kind] is not None]
    figures = {}
    for column in grid.columns:
        values = {s: m[column] for s, m in by_seed.items() if m.get(column) is not None}
        mean, deviation = mean_and_deviation(list(values.values()))
        figures[column] = {"mean": mean, "deviation": deviation, "by_seed": values}
    mean, deviation = mean_and_deviation(speeds)
    return {
        "name": row.name,
        "note": row.note,
        "runs": {run.seed: run.id for run in runs},
        "seeds_done": sorted(done),
        "nothing_detected": sorted(s for s, found in done.items() if found["nothing_detected"]),
        "figures": figures,
        SPEED: {"mean": mean, "deviation": deviation},
        "peak_memory_mb": max(peaks, default=None),
        "peak_memory_of": "GPU" if kind == "peak_gpu_mb" else "process",
        "published": dict(row.published or {}),
    }


def _comparisons(grid: Grid, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    named = {row["name"]: row for row in rows}
    found = []
    for pair in grid.compare.items():
        for column in grid.columns:
            difference = paired_difference(*(named[n]["figures"][column]["by_seed"] for n in pair))
            found.append(
                {
                    **dict(zip(("row", "reference"), pair, strict=True)),
                    "column": column,
                    **asdict(difference),
                    "verdict": difference.verdict,
                }
            )
    return found


def _missing(runs: Sequence[Run]) -> dict[str, list[int]]:
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(run.row, []).append(run.seed)
    return seeds


def _circumstances(found: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """What the runs were made with: every value that occurs, so that a mixture shows."""

    def values(*path: str) -> list[Any]:
        seen = []
        for run in found:
            value: Any = run
            for part in path:
                value = (value or {}).get(part)
            if value is not None and value not in seen:
                seen.append(value)
        return seen

    return {
        "iterations": values("iterations"),
        "data": values("data"),
        "gpu": values("gpu"),
        "cpu": values("cpu"),
        "threads": values("threads"),
        "torch": values("versions", "torch"),
        "detectron2": values("versions", "detectron2"),
        "commit": values("commit"),
        "resumed": [sum((run["starts"] or 1) > 1 for run in found)],
    }


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The report: table, comparison, and the circumstances.

    Args:
        summary: what :func:`summarize` returns.
    """
    parts = [f"# {summary['title']}", summary["note"], _table(summary)]
    notes = [f"- {row['name']}: {row['note']}" for row in summary["rows"] if row["note"]]
    for row in summary["rows"]:
        if seeds := row["nothing_detected"]:
            notes.append(
                f"- {row['name']}: nothing was detected with seed {_list(seeds)}; AP is 0."
            )
    parts.append("\n".join(notes))
    parts.append(_comparison_table(summary))
    parts.append(tuning_text(summary["tuning"]) if "tuning" in summary else "")
    if failed := summary["failed"]:
        lines = [f"- {name}: {reason}" for name, reason in failed.items()]
        parts.append("\n".join([f"{len(failed)} failed:", "", *lines]))
    if missing := summary["missing"]:
        told = [f"{row} (seed {_list(seeds)})" for row, seeds in missing.items()]
        parts.append(f"{sum(map(len, missing.values()))} not done: {'; '.join(told)}.")
    parts.append(_told(summary["circumstances"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(summary: Mapping[str, Any]) -> str:
    columns, rows = summary["columns"], summary["rows"]
    published = [c for c in (*columns, SPEED) if any(c in row["published"] for row in rows)]
    names = {SPEED: "s/iteration"}
    header = ["", "seeds", *columns, "s/iteration", "peak memory (MB)"]
    header += [f"{names.get(c, c)}, published" for c in published]
    lines = []
    for row in rows:
        cells = [row["name"], str(len(row["seeds_done"]))]
        cells += [_spread(row["figures"][c], 1) for c in columns]
        peak = row["peak_memory_mb"]
        cells += [_spread(row[SPEED], 3), "" if peak is None else f"{peak:.0f}"]
        cells += [f"{row['published'][c]:g}" if c in row["published"] else "" for c in published]
        lines.append(cells)
    text = markdown_table(header, lines)
    text += "\n\nMean ± standard deviation over the seeds"
    text += f"; planned: {_list(summary['seeds'])}." if summary["seeds"] else "."
    of = {row["peak_memory_of"] for row in rows if row["peak_memory_mb"] is not None}
    if of:
        kinds = {"GPU": "memory that PyTorch allocated on the GPU", "process": "resident memory"}
        told = " or ".join(kinds[kind] for kind in sorted(of))
        text += f" Peak memory: {told}, evaluation included, the highest of the seeds."
    if published:
        text += f" Published: {summary['published_on'] or 'by others'}; not measured here."
    return text


def _spread(figure: Mapping[str, float | None], digits: int) -> str:
    if figure["mean"] is None:
        return ""
    mean = f"{figure['mean']:.{digits}f}"
    deviation = figure["deviation"]
    return mean if deviation is None else f"{mean} ± {deviation:.{digits}f}"


def _comparison_table(summary: Mapping[str, Any]) -> str:
    if not summary["comparisons"]:
        return ""
    first, *others = summary["columns"]
    found = {(c["row"], c["column"]): c for c in summary["comparisons"]}
    header = ["", "pairs", f"difference in {first} (95 % interval)", "verdict", *others]
    lines = []
    for row in dict.fromkeys(name for name, _ in found):
        item = found[row, first]
        cells = [row, str(len(item["seeds"])), _interval(item), item["verdict"]]
        lines.append(cells + [_interval(found[row, column]) for column in others])
    table = markdown_table(header, lines)
    told = (
        "Differences are paired by seed, with Student's t-interval for each alone (not corrected "
        "for their number)."
    )
    data = ", each on the same data" if len({c["reference"] for c in found.values()}) > 1 else ""
    return f"## Compared with {summary['reference']}{data}\n\n{table}\n\n{told}"


def _interval(item: Mapping[str, Any]) -> str:
    if item["mean"] is None:
        return ""
    interval = "" if item["low"] is None else f" ({item['low']:+.2f} ... {item['high']:+.2f})"
    return f"{item['mean']:+.2f}{interval}"


def _told(circumstances: Mapping[str, list[Any]]) -> str:
    if not circumstances["iterations"]:
        return ""
    sets = [
        f"{split} {', '.join(f'{name} ({sha})' for name, sha in names.items())}"
        for data in circumstances["data"]
        for split, names in data.items()
    ]
    # "+changes" in records from before the mark was git's own.
    commits = [c[:10] + ("+changes" if len(c) > 40 else "") for c in circumstances["commit"]]
    lines = [
        f"- iterations: {_list(circumstances['iterations'])}",
        f"- data: {'; '.join(dict.fromkeys(sets))}",
        f"- machine: {_list(circumstances['gpu'] + circumstances['cpu'])}; "
        f"threads: {_list(circumstances['threads'])}",
        f"- PyTorch {_list(circumstances['torch'])}, "
        f"Detectron2 {_list(circumstances['detectron2'])}, "
        f"commit {_list(commits)}",
    ]
    if resumed := circumstances["resumed"][0]:
        lines.append(f"- {resumed} runs were cut off and resumed")
    return "\n".join(lines)


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values) or "unknown"
