"""What can be wrong with a data set: the kinds, what becomes of each, and how often it was met."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

STOPS, REPAIRED, DOUBTFUL, NOTE = "stops", "repaired", "doubtful", "note"

# Detectron2 compares each box of an image with each anchor, at 24 bytes a pair (measured), and an
# image of 800 x 1333 has 200,000 anchors: 48 GB for the first number, 5 GB for the second.
MAX_BOXES, MANY_BOXES = 10_000, 1_000

# For each kind: its severity, the words that follow the number of entries in a message, and for
# kinds that stop a training the way out. The order matters: `Findings.refusal` names the first
# kind that stops.
KINDS: dict[str, tuple[str, ...]] = {
    "table": (
        STOPS,
        "tables are missing or empty",
        'COCO format has the lists "images", "annotations" and "categories"',
    ),
    "entry": (STOPS, "entries are not objects or lack a field", "complete or remove them"),
    "value": (STOPS, "fields hold a value of another type or range", "correct or remove them"),
    "duplicate id": (STOPS, "ids occur more than once", "number the entries anew"),
    "missing image": (
        STOPS,
        "image files do not exist",
        "give the folder that holds them, or remove their entries",
    ),
    "unreadable image": (
        STOPS,
        "image files cannot be opened or decoded",
        "replace the files, or remove their entries",
    ),
    "image size": (
        STOPS,
        "images do not have the size that the annotation file says",
        "give the images that were labelled, or their boxes would not fit",
    ),
    "image depth": (
        STOPS,
        "images have more than 8 bits per channel and would be clipped at 255",
        "convert them to 8 bits",
    ),
    "unknown category": (
        STOPS,
        "annotations have a category_id that is not among the categories",
        "add the category, or correct the annotation",
    ),
    "ignore flag": (
        STOPS,
        'annotations set "ignore", which Detectron2 does not know',
        'set "iscrowd": 1 on objects that should count neither as found nor as missed',
    ),
    "bad box": (STOPS, "boxes are not four finite numbers", "correct or remove them"),
    "fraction box": (
        STOPS,
        "boxes are fractions of the image size",
        "COCO format counts pixels: multiply x and width by the width of the image, y and height "
        "by its height",
    ),
    "corner box": (
        STOPS,
        "boxes are two corners instead of x, y, width, height",
        "write width = x1 - x0 and height = y1 - y0 in place of the second corner",
    ),
    "mask format": (
        STOPS,
        'masks are run-length encoded, which INPUT.MASK_FORMAT "polygon" cannot read',
        "give INPUT.MASK_FORMAT bitmask",
    ),
    "crowded image": (
        STOPS,
        f"images have more than {MAX_BOXES} boxes",
        "cut the images into tiles",
    ),
    "no usable annotation": (
        STOPS,
        "files hold nothing to train on",
        "give the file that holds the objects",
    ),
    "image name": (
        REPAIRED,
        "images are found by their base names: the annotation file spells them differently or "
        "names other folders",
    ),
    "unknown size": (
        REPAIRED,
        "images have no whole numbers as width and height, which are read from the image files",
    ),
    "image twice": (
        REPAIRED,
        "entries repeat an image that is listed already: their annotations go to its first entry",
    ),
    "class twice": (REPAIRED, "categories have the name of another one and are merged with it"),
    "text value": (REPAIRED, "values are text instead of numbers and are read as numbers"),
    "crowd flag": (
        REPAIRED,
        'annotations have "iscrowd" as null, text or true/false: read as 0 or 1',
    ),
    "area": (
        REPAIRED,
        'annotations have an impossible "area": computed from their polygons or box',
    ),
    "no box": (REPAIRED, "annotations have no box: it is computed from their masks"),
    "stray annotation": (REPAIRED, "annotations belong to no listed image and are left out"),
    "empty box": (
        REPAIRED,
        "boxes have no positive width and height: left out, in training and evaluation",
    ),
    "box outside": (
        REPAIRED,
        "boxes lie outside their image: left out, in training and evaluation",
    ),
    "box clipped": (
        REPAIRED,
        "boxes reach more than a pixel beyond their image: clipped, in training and evaluation",
    ),
    "duplicate box": (
        REPAIRED,
        "annotations repeat the class and box of another one and are left out",
    ),
    "bad mask": (
        REPAIRED,
        "segmentations are neither polygons of three points nor a mask of the image's size: "
        "detectors of boxes keep the box, those with MODEL.MASK_ON leave the object out",
    ),
    "bad polygon": (
        REPAIRED,
        "masks have parts that are no polygons of three points: these parts are left out",
    ),
    "similar classes": (
        DOUBTFUL,
        "class names differ only in case or spaces; they stay different classes",
    ),
    "boxes like corners": (
        DOUBTFUL,
        "boxes could as well be pairs of corners: look at them with ghm-d2 look",
    ),
    "boxes like percent": (
        DOUBTFUL,
        "boxes could be percentages, as none reaches beyond 100: look at them with ghm-d2 look",
    ),
    "tiny box": (DOUBTFUL, "boxes are smaller than a pixel"),
    "image without annotation": (
        NOTE,
        "images have no annotation; training leaves them out unless "
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS is False",
    ),
    "many boxes": (
        NOTE,
        f"images have more than {MANY_BOXES} boxes: matching takes 5 GB for each thousand at "
        "800 x 1333 pixels",
    ),
    "keypoints": (NOTE, "lists of keypoints cannot be used: MODEL.KEYPOINT_ON refuses them"),
    "class without object": (NOTE, "classes have no annotation"),
    "converted image": (NOTE, "images are neither RGB nor gray and are converted when read"),
    "rotated image": (NOTE, "images are rotated when read, as their EXIF orientation says"),
    "image copy": (NOTE, "images have the same content as another one"),
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one entry.

    Attributes:
        kind: a key of `KINDS`.
        text: the entry and what is wrong with it.
    """

    kind: str
    text: str


@dataclass
class Findings:
    """How often each kind was met, and the first examples of it."""

    examples_kept: int = 5
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, problem: Problem) -> None:
        """Counts one problem and keeps its text if it is among the first of its kind."""
        self.counts[problem.kind] += 1
        kept = self.examples.setdefault(problem.kind, [])
        if len(kept) < self.examples_kept:
            kept.append(problem.text)

    def add_all(self, problems: Iterable[Problem]) -> None:
        """Adds each of them; see :meth:`add`."""
        for problem in problems:
            self.add(problem)

    def kinds(self, severity: str) -> list[str]:
        """The kinds met of "stops", "repaired", "doubtful" or "note", in the order of `KINDS`."""
        return [kind for kind in KINDS if kind in self.counts and KINDS[kind][0] == severity]

    def refusal(self) -> str:
        """The first kind that stops a training, in words with the way out; empty without one."""
        kinds = self.kinds(STOPS)
        if not kinds:
            return ""
        count, text = self.counts[kinds[0]], self.examples[kinds[0]][0]
        more = f" (the first of {count} such entries)" if count > 1 else ""
        return f"{text}{more}: {KINDS[kinds[0]][2]}"
