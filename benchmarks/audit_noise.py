"""Measures how well `ghm-d2 audit` and cleanlab find errors that `ghm-d2 corrupt` made.

    ghm-d2 corrupt data/train.json --output data/noisy.json --wrong-class 0.1
    ghm-d2 audit --dataset noisy=data/noisy.json,data/images --output output/audit --folds 3 ...
    python benchmarks/audit_noise.py --dataset noisy=data/noisy.json,data/images \
        --changes data/noisy.changes.json \
        --predictions output/audit/fold_*/inference/coco_instances_results.json \
        --output benchmarks/results/audit_bccd.json

Every scorer ranks the same annotations by the same detections. With n errors of a kind in the data,
the precision among the n first is also the recall. cleanlab's scores use only detections above a
threshold. The table has its default threshold and the best one, which no user can choose, because
it depends on the errors.
"""

import argparse
import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cleanlab import __version__ as cleanlab_version
from cleanlab.object_detection import rank
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor, tensor
from torchvision.ops import box_convert

from ghm_d2.audit.predictions import Detections, read_predictions
from ghm_d2.audit.suspects import Suspect, choose, judge
from ghm_d2.data import check_coco_dataset, parse_dataset
from ghm_d2.data.corrupt import KINDS, box_ious
from ghm_d2.data.datasets import load_checked
from ghm_d2.errors import exits_with_one_sentence
from ghm_d2.files import read_json, write_json
from ghm_d2.losses.functional import regression_examples
from ghm_d2.markdown import markdown_table
from ghm_d2.provenance import describe

THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
CLEANLAB = {
    "wrong class": ("compute_swap_box_scores", "high_probability_threshold", 0.95),
    "missing": ("compute_overlooked_box_scores", "high_probability_threshold", 0.95),
    "moved": ("compute_badloc_box_scores", "low_probability_threshold", 0.5),
}
MUS = (0.1, 0.5)

Row = dict[str, Any]


class Truth:
    """What was changed, and whether a suspect is one of the changes."""

    def __init__(self, changes: Sequence[Row]) -> None:
        self._ids = {k: {c["annotation_id"] for c in changes if c["kind"] == k} for k in KINDS}
        self._missing: dict[Any, list] = {}
        for change in changes:
            if change["kind"] == "missing":
                self._missing.setdefault(change["image_id"], []).append(change["before"]["bbox"])

    def number(self, kind: str) -> int:
        return len(self._ids[kind])

    def holds(self, kind: str, annotation_id: Any, image_id: Any, box: Sequence[float]) -> bool:
        if kind != "missing":
            return annotation_id in self._ids[kind]
        return bool(box_ious([box], self._missing.get(image_id, [])).max(initial=0) >= 0.5)


def precision(scores: Sequence[float], hits: Sequence[bool], number: int) -> float:
    """The share of hits among the `number` entries with the highest scores."""
    first = np.argsort(-np.asarray(scores, float), kind="stable")[:number]
    return round(float(np.asarray(hits, float)[first].sum() / number), 4)


def regression_norm(suspect: Suspect, mu: float) -> float:
    """Confidence x the mean gradient norm of GHM-R between the annotated and the detected box."""
    boxes = [tensor([box]) for box in (suspect.believed_bbox, suspect.bbox)]
    corners = [box_convert(box, "xywh", "xyxy").double() for box in boxes]
    deltas: Tensor = Box2BoxTransform((1.0, 1.0, 1.0, 1.0)).get_deltas(*corners)
    norms = regression_examples(deltas, deltas * 0, mu)[1]
    return suspect.confidence * float(norms.mean())


def ours(suspects: Sequence[Suspect], truth: Truth) -> dict[str, list[Row]]:
    """By kind, rows of this project's scores."""
    chosen, rows = choose(suspects), {}
    for kind in KINDS:
        number = truth.number(kind)
        if not number:
            continue

        def hits(found: Sequence[Suspect], kind: str = kind) -> list[bool]:
            places = [(s.annotation_id, s.image_id, s.believed_bbox or s.bbox) for s in found]
            return [truth.holds(kind, *place) for place in places]

        found = [s for s in suspects if s.kind == kind]
        default = hits([s for s in chosen if s.kind == kind])
        rows[kind] = [
            {
                "scorer": "ghm-d2 audit",
                "precision": precision([s.score for s in found], hits(found), number),
                "default_suspects": len(default),
                "default_precision": round(sum(default) / max(len(default), 1), 4),
                "default_recall": round(sum(default) / number, 4),
            }
        ]
        if kind == "moved":
            for mu in MUS:
                scores = [regression_norm(s, mu) for s in found]
                row = {"scorer": f"GHM-R's norm, mu {mu:g}"}
                rows[kind].append({**row, "precision": precision(scores, hits(found), number)})
    return rows


def cleanlab_inputs(
    content: Row, detections: dict[int, Detections]
) -> tuple[list[int], list[list[Row]], list[Row], list[np.ndarray]]:
    """Images, their annotations, and both as cleanlab takes them: classes from 0, corners."""
    classes = {row["id"]: k for k, row in enumerate(content["categories"])}
    by_image: dict[int, list[Row]] = {image: [] for image in detections}
    for row in content["annotations"]:
        by_image[row["image_id"]].append(row)
    labels, predictions = [], []
    for image, (boxes, categories, scores) in detections.items():
        rows = by_image[image]
        given = np.array([row["bbox"] for row in rows], float).reshape(-1, 4)
        own = np.array([classes[row["category_id"]] for row in rows], int)
        labels.append({"bboxes": corners(given), "labels": own})
        found = np.empty(len(classes), dtype=object)
        for category, k in classes.items():
            these = categories == category
            found[k] = np.c_[corners(boxes[these]), scores[these]]
        predictions.append(found)
    return list(detections), list(by_image.values()), labels, predictions


def corners(boxes: np.ndarray) -> np.ndarray:
    return np.c_[boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]


def theirs(content: Row, detections: dict[int, Detections], truth: Truth) -> dict[str, list[Row]]:
    """By kind, rows of cleanlab's scores, whose low ones are suspicious."""
    images, annotated, labels, predictions = cleanlab_inputs(content, detections)
    rows: dict[str, list[Row]] = {}
    for kind, (name, option, default) in CLEANLAB.items():
        number = truth.number(kind)
        if not number:
            continue
        compute: Callable = getattr(rank, name)
        if kind == "missing":  # one score for each detection, in the order of the classes
            places = [
                (None, image, [*box[:2], *(box[2:4] - box[:2])])
                for image, found in zip(images, predictions, strict=True)
                for box in np.concatenate(list(found))
            ]
        else:
            places = [(row["id"], row["image_id"], []) for part in annotated for row in part]
        hits = [truth.holds(kind, *place) for place in places]
        reached = {}
        for threshold in sorted({default, *THRESHOLDS}):
            found = compute(labels=labels, predictions=predictions, **{option: threshold})
            scores = np.nan_to_num(np.concatenate(found), nan=np.inf)
            reached[threshold] = precision(-scores, hits, number)
        best = max(reached, key=lambda t: reached[t])
        title = f"cleanlab, {name.removeprefix('compute_').removesuffix('_box_scores')}"
        rows[kind] = [
            {"scorer": f"{title}, {default:g} (default)", "precision": reached[default]},
            {"scorer": f"{title}, {best:g} (best for it)", "precision": reached[best]},
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", required=True, help="NAME=annotations.json,image_dir, with the errors")
    add("--changes", type=Path, required=True, help="the list of the errors")
    add("--predictions", nargs="+", required=True, help="of detectors not trained on the images")
    add("--note", default="", help="how the predictions were made, for the record")
    add("--output", type=Path, required=True)
    args = parser.parse_args()
    data = load_checked(check_coco_dataset(parse_dataset(args.dataset)))
    files = [file for pattern in args.predictions for file in sorted(glob.glob(pattern))]
    detections = read_predictions(files, data.content, complete=True)
    images = {row["id"] for row in data.content["images"]}
    truth = Truth([c for c in read_json(args.changes) if c["image_id"] in images])
    rows = ours(judge(data.content, detections), truth)
    for kind, more in theirs(data.content, detections, truth).items():
        rows[kind] += more
    errors = {kind: truth.number(kind) for kind in rows}
    result = {
        "measured": "precision among the n first, n the number of errors of the kind",
        "dataset": args.dataset.split("=")[0],
        "images": len(detections),
        "objects": len(data.content["annotations"]),
        "note": args.note,
        "errors": errors,
        "rows": rows,
        "cleanlab": cleanlab_version,
        **describe(),
    }
    write_json(args.output, result)
    head = ("kind", "errors", "scorer", "precision at that many")
    cells = [
        [k, str(errors[k]), r["scorer"], f"{r['precision']:.3f}"] for k in rows for r in rows[k]
    ]
    print(markdown_table(head, cells))


if __name__ == "__main__":
    with exits_with_one_sentence("audit_noise.py"):
        main()
