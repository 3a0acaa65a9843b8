"""The tables of feature_gradients.py."""

from pathlib import Path
from typing import Any

from ghm_d2.markdown import markdown_table

Summary = dict[str, Any]

_COLUMNS = {
    "loss": lambda s: f"{s['loss']:.3g}",
    "norm": lambda s: f"{s['feature_norm']:.3g}",
    "x reference": lambda s: f"{s['norm_over_reference']:.3g}",
    "spread": lambda s: f"{100 * s['feature_norm_cv']:.0f} %",
    "head norm": lambda s: f"{s['head_norm']:.3g}",
    "cosine": lambda s: f"{s['cosine_between_batches']:.2f}",
    "cosine to reference": lambda s: f"{s['cosine_to_reference']:.2f}",
    "effective": lambda s: f"{s['effective_examples']:.0f}",
    "bare levels": lambda s: f"{100 * s['share_of_levels_without_positives']:.0f} %",
    "regions": lambda s: " ".join(f"{x:.0f}" for x in s["regions"]),
    "largest weight": lambda s: f"{max(s['largest_weight'], default=0):.2g}",
}
_CLS = {
    "positives": lambda s: f"{100 * s['positives_share']:.1f} %",
    "positives by level": lambda s: " ".join(
        f"{100 * x:.0f}" for x in s["positives_share_by_level"]
    ),
    "wrong labels": lambda s: f"{100 * s['wrong_label_share']:.1f} %",
}
_BOX = {
    "last region": lambda s: " ".join(f"{100 * x:.0f}" for x in s["last_region_share"]),
}

_INTRODUCTION = """\
# The gradient that each loss sends to the features: {dataset}

{command}

{cpu}, {threads} thread(s), PyTorch {torch}, commit {commit}. One detector trained with focal loss
and smooth L1; the other losses follow its training without a say. Means over {batches} batches.

- *norm*: L2 norm of the gradient at the features P3 to P7, before clipping; *x reference*: over
  that of the first row; *spread*: standard deviation over mean of the norms of the batches;
  *head norm*: of the gradient of all weights of the head of that part.
- *cosine*: mean over pairs of batches, of the gradients of the head's last convolution; *cosine to
  reference*: of the mean gradient with that of the first row.
- *effective*: (sum |g|)^2 / sum g^2 over the logits or coordinates: how many equally large ones the
  gradient is worth. *bare levels*: share of sum |g| from levels that hold no positive.
- *regions*: non-empty ones of each call (levels P3 to P7 where the scope is "level"); *largest
  weight*: of any region, with the loss weight.
- *positives*: share of sum |g| over the logits that falls on positives' own logits, in all and of
  each level (in percent); *wrong labels*: share that falls on logits whose label is wrong (rows
  "noise" alone). *last region*: percentage of coordinates in it.
- "level", "batch": the scope, with bias correction unless it says otherwise; momentum 0.75 (boxes
  0.7); "authors": level without correction. "at least 10": no region counts as fewer examples.
  "separate": one density for positives' own logits and one for the rest, the two losses added.
"""


def write_table(result: Summary, file: Path) -> None:
    """Writes one table a snapshot and part, as Markdown."""
    commit, machine = result["commit"] or "unknown", result["machine"]
    lines = [
        _INTRODUCTION.format(
            dataset=result["dataset"],
            command=f"`{result['command']}`",
            cpu=machine["cpu"],
            threads=machine["threads"],
            torch=result["versions"]["torch"],
            commit=commit[:12],
            batches=result["batches"],
        )
    ]
    for snapshot in result["snapshots"]:
        prior = f", classifier's prior {snapshot['prior']}" if snapshot["prior"] else ""
        lines.append(f"## Step {snapshot['step']}{prior}\n")
        numbers = " / ".join(f"{x:.1f}" for x in snapshot["positives_by_level"])
        anchors = " / ".join(f"{x:.0f}" for x in snapshot["anchors_by_level"])
        lines.append(f"Positives of P3 to P7: {numbers} of {anchors} anchors.\n")
        for part, more in (("cls", _CLS), ("box", _BOX)):
            if part in snapshot:
                lines += _table(snapshot[part], _COLUMNS | more)
    file.write_text("\n".join(lines))


def _table(rows: dict[str, Summary], columns: dict[str, Any]) -> list[str]:
    cells = ([name, *(show(s) for show in columns.values())] for name, s in rows.items())
    return [markdown_table(["loss of", *columns], cells), ""]
