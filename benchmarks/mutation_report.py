"""The report of mutation.py."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["write_report"]

Record = dict[str, Any]

_INTRODUCTION = """\
# Mutation testing of `ghm_d2.losses`

`{command}`

{cpu}, {threads} thread, Python {python}, PyTorch {torch}, cosmic-ray {cosmic_ray}, commit
{commit}{dirty}.

**{killed} of {tried} mutants killed ({percent:.1f} %)**, {timed_out} of them by their time limit
and {crashed} by a crash; {survived} survived, {explained} of these for a reason given below. The
{tried} are {of} {population} places that cosmic-ray's operators change, one replacement for each,
chosen by the seed; annotations and the Triton kernels are left out, and an operator is replaced by
one of its own kind; {invalid} more were no Python. A mutant is tried on the loss tests that run its
line, until one fails.
"""


def write_report(
    args: argparse.Namespace,
    machine: Record,
    population: int,
    records: list[Record],
    folder: Path,
) -> None:
    """Writes mutation.json and mutation.md; the reasons of survivors come from mutation_reasons."""
    reasons_file = folder / "mutation_reasons.json"
    reasons = json.loads(reasons_file.read_text()) if reasons_file.exists() else {}
    for record in records:
        if record["outcome"] == "survived":
            record["reason"] = reasons.get(record["key"])
    invalid = sum(record["outcome"] == "invalid" for record in records)
    records = [record for record in records if record["outcome"] != "invalid"]
    records.sort(key=lambda record: (record["key"].split(" | ")[0], record["line"]))
    outcomes = Counter(record["outcome"] for record in records)
    survivors = [record for record in records if record["outcome"] == "survived"]
    command = f"python benchmarks/mutation.py --sample {args.sample} --seed {args.seed}"
    wanted = min(args.sample, population) - invalid
    summary = {
        "command": command,
        **machine,
        "population": population,
        "wanted": wanted,
        "invalid": invalid,
        "tried": len(records),
        "outcomes": dict(outcomes),
        "killed_share": round(1 - len(survivors) / len(records), 4) if records else None,
        "cpu_seconds": round(sum(record["seconds"] for record in records), 1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"summary": summary, "mutants": records}, indent=1)
    (folder / "mutation.json").write_text(text + "\n")
    (folder / "mutation.md").write_text(_text(summary, records, survivors))
    missing = f", {wanted - len(records)} not tried yet" if wanted > len(records) else ""
    print(
        f"{len(records) - len(survivors)} of {len(records)} mutants killed{missing}: "
        f"{folder / 'mutation.md'}",
        file=sys.stderr,
    )


def _text(summary: Record, records: list[Record], survivors: list[Record]) -> str:
    versions, outcomes = summary["versions"], summary["outcomes"]
    tried, wanted = summary["tried"], summary["wanted"]
    text = _INTRODUCTION.format(
        command=summary["command"],
        cpu=summary["machine"]["cpu"],
        threads=summary["machine"]["threads"],
        python=versions["python"],
        torch=versions["torch"],
        cosmic_ray=versions["cosmic_ray"],
        commit=(summary["commit"] or "unknown")[:10],
        dirty=" with changes" if summary["dirty"] else "",
        killed=tried - len(survivors),
        tried=tried,
        percent=100 * (1 - len(survivors) / max(tried, 1)),
        timed_out=outcomes.get("timed out", 0),
        crashed=outcomes.get("crashed", 0),
        survived=len(survivors),
        explained=sum(bool(record["reason"]) for record in survivors),
        of="a sample of the" if wanted < summary["population"] else "all",
        population=summary["population"],
        invalid=summary["invalid"],
    )
    if tried < wanted:
        text += f"\n{wanted - tried} of the {wanted} wanted have not been tried yet.\n"
    for title, value in (("file", lambda r: r["key"].split(" | ")[0]), ("family", _family)):
        groups: dict[str, list[Record]] = {}
        for record in records:
            groups.setdefault(value(record), []).append(record)
        text += f"\n| {title} | mutants | killed | survived |\n|---|---|---|---|\n"
        for name, group in sorted(groups.items()):
            alive = sum(record["outcome"] == "survived" for record in group)
            text += f"| {name} | {len(group)} | {len(group) - alive} | {alive} |\n"
    text += "\n## Survivors\n"
    for record in survivors:
        file, scope, *_ = record["key"].split(" | ")
        where = f"{file}, {scope or 'module'} (line {record['line']})"
        text += f"\n**{where}**: {record['reason'] or 'no reason given yet'}\n"
        text += f"\n```diff\n- {record['before']}\n+ {record['after']}\n```\n"
    return text


def _family(record: Record) -> str:
    return record["family"]
