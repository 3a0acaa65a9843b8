"""Gives the folders of tests/tool_files.py to other libraries, and compares what they read.

    pip install globox      # in an environment of its own: they want other versions of each other
    python benchmarks/importers.py --library globox
    python benchmarks/importers.py      # the table of docs/labels.md

Each run is for one library and replaces its column of benchmarks/results/importers.json. A library
is called as its documentation says for this kind of labels, with the folders of labels and images
where it takes both; where it reads classes as numbers alone, they are translated to names.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.tool_files import BAR, DISC, TOOL_CASES, ToolCase  # noqa: E402

FILE = Path(__file__).parent / "results" / "importers.json"
Objects = Iterator[tuple[str, str, list[float]]]  # image, class, x, y, width, height
_NUMBERS = {"0": "disc", "1": "bar"}


def folders_of(root: Path, suffix: str) -> list[tuple[Path, Path]]:
    """Each folder with labels, and the folder of its images."""
    found = sorted({f.parent for f in root.rglob(f"*{suffix}") if f.name != "via.json"})
    pairs = []
    for labels in found:
        text = labels.relative_to(root).as_posix()
        images = root / text.replace("labels", "images").replace("Annotations", "JPEGImages")
        if any(images.glob("*.png")):
            pairs.append((labels, images))
    return pairs


def globox(case: ToolCase, root: Path) -> Objects:
    """https://github.com/laclouis5/globox"""
    from globox import AnnotationSet

    if case.tool == "YOLO":
        sets = [
            AnnotationSet.from_yolo_darknet(labels, image_folder=images, image_extension=".png")
            for labels, images in folders_of(root, ".txt")
        ]
    elif case.tool == "labelme":
        sets = [AnnotationSet.from_labelme(root, recursive=True, include_poly=True)]
    elif case.tool == "VIA" and not list(root.glob("*.csv")):
        (file,) = root.glob("*.json")
        sets = [AnnotationSet.from_via_json(file, image_folder=root, label_key="type")]
    elif case.tool == "COCO":
        sets = [AnnotationSet.from_coco(file) for file in root.rglob("*.json")]
    elif case.tool == "CVAT":
        sets = [AnnotationSet.from_cvat(root / "annotations.xml")]
    elif case.tool == "VOC":
        sets = [AnnotationSet.from_pascal_voc(root, recursive=True)]
    else:
        raise NotImplementedError
    for annotation in (a for found in sets for a in found):
        for box in annotation.boxes:
            corner = [box.xmin, box.ymin, box.xmax - box.xmin, box.ymax - box.ymin]
            yield str(annotation.image_id), _NUMBERS.get(str(box.label), str(box.label)), corner


def supervision(case: ToolCase, root: Path) -> Objects:
    """https://github.com/roboflow/supervision"""
    from supervision import DetectionDataset

    if case.tool == "YOLO":
        yaml = next(root.glob("*.y*ml"), root / "data.yaml")
        sets = [
            DetectionDataset.from_yolo(str(images), str(labels), str(yaml))
            for labels, images in folders_of(root, ".txt")
        ]
    elif case.tool == "labelme":
        sets = [
            DetectionDataset.from_labelme(str(images), str(labels))
            for labels, images in folders_of(root, ".json") or [(root, root / "images")]
        ]
    elif case.tool == "COCO":
        sets = [
            DetectionDataset.from_coco(str(image.parent), str(file))
            for file in root.rglob("*.json")
            for image in [next(root.rglob(json.loads(file.read_text())["images"][0]["file_name"]))]
        ]
    elif case.tool == "VOC":
        sets = [
            DetectionDataset.from_pascal_voc(str(images), str(labels))
            for labels, images in folders_of(root, ".xml")
        ]
    else:
        raise NotImplementedError
    for found in sets:
        for path, _, boxes in found:
            for (x0, y0, x1, y1), k in zip(boxes.xyxy, boxes.class_id, strict=True):
                yield path, found.classes[k], [x0, y0, x1 - x0, y1 - y0]


def datumaro(case: ToolCase, root: Path) -> Objects:
    """https://github.com/open-edge-platform/datumaro; it recognises the format itself"""
    from datumaro import Dataset

    found = Dataset.import_from(str(root))
    names = found.categories()
    labels = next((c for c in names.values() if hasattr(c, "items") and hasattr(c, "find")), None)
    for item in found:
        for shape in item.annotations:
            if hasattr(shape, "get_bbox") and labels is not None:
                yield item.id, labels.items[shape.label].name, list(shape.get_bbox())


LIBRARIES: dict[str, Callable[[ToolCase, Path], Objects]] = {
    "globox": globox,
    "supervision": supervision,
    "datumaro": datumaro,
}


def outcome(case: ToolCase, read: Callable[[ToolCase, Path], Objects]) -> str:
    """ "right", "not supported", "stops: why", or what it gives instead."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        case.write(root)
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows = list(read(case, root / case.source if case.source else root))
        except NotImplementedError:
            return "not supported"
        except Exception as error:  # a library may raise anything on such a file
            if case.objects is None:
                return "right"
            text = " ".join(f"{type(error).__name__}: {error}".replace(folder, "").split())
            return f"stops: {text[:100]}"
    if case.objects is None:
        return f"reads {len(rows)} objects of what cannot be read"
    wanted = Counter(
        (Path(image).stem, name, tuple(round(v) for v in box))
        for image, listed in case.objects.items()
        for name, box in listed
    )
    found = Counter(
        (Path(image).stem, str(name), tuple(round(float(v)) for v in box))
        for image, name, box in rows
    )
    if found == wanted:
        return "right"
    if found.total() != wanted.total():
        return f"{found.total()} of {wanted.total()} objects, silently"
    return "another class or box, silently"


def table() -> str:
    """The table of docs/labels.md: what each library does with the folders of each tool."""
    content = json.loads(FILE.read_text())
    tools = dict.fromkeys(case.tool or "none or several" for case in TOOL_CASES.values())
    head = [f"{name} {column['version']}" for name, column in content.items()]
    lines = [f"| labels | folders | {' | '.join(head)} |", "|---" * (2 + len(head)) + "|"]
    total = {name: Counter() for name in content}
    for tool in tools:
        cases = [n for n, case in TOOL_CASES.items() if (case.tool or "none or several") == tool]
        cells = []
        for name, column in content.items():
            counts = Counter(_word(column["cases"][case]) for case in cases)
            total[name] += counts
            cells.append(_cell(counts))
        lines.append(f"| {tool} | {len(cases)} | {' | '.join(cells)} |")
    cells = [_cell(total[name]) for name in content]
    return "\n".join([*lines, f"| all | {len(TOOL_CASES)} | {' | '.join(cells)} |"])


def _word(text: str) -> str:
    known = ("right", "stops", "not supported")
    return next((word for word in known if text.startswith(word)), "silently other")


def _cell(counts: Counter) -> str:
    words = ("right", "silently other", "stops", "not supported")
    return ", ".join(f"{counts[word]} {word}" for word in words if counts[word])


def main() -> None:
    """Run one library on all folders, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES)
    library = parser.parse_args().library
    if library is None:
        print(table())
        return
    logging.disable(logging.CRITICAL)
    assert DISC[0] == _NUMBERS["0"] and BAR[0] == _NUMBERS["1"]
    cases = {name: outcome(case, LIBRARIES[library]) for name, case in TOOL_CASES.items()}
    content = json.loads(FILE.read_text()) if FILE.exists() else {}
    content[library] = {
        "version": importlib.metadata.version(library),
        "command": f"python benchmarks/importers.py --library {library}",
        "cases": cases,
    }
    FILE.write_text(json.dumps(dict(sorted(content.items())), indent=1) + "\n")
    print(Counter(text.partition(":")[0].partition(" o")[0] for text in cases.values()))


if __name__ == "__main__":
    main()
