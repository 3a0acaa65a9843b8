"""The annotations of a COCO-format file, each of them kept, repaired, left out, or refused."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pycocotools import mask as mask_util

from ghm_d2.errors import shown

from .box_habits import BoxHabits
from .checks import Problem
from .fields import flag, number, numbers, polygon_area, polygon_box, polygons, rle_area
from .image_checks import image_name
from .tables import Ids

# A thin polygon is far smaller than its box, and a rounded box may be smaller than its object; an
# area outside these bounds is not that of the object.
_LEAST_AREA, _MOST_AREA = 0.001, 1.5  # of the box
_NOTHING = (None, [], {}, "")


@dataclass(frozen=True)
class Uses:
    """What a config takes from annotations besides boxes; the rest is ignored.

    Attributes:
        masks: "polygon" or "bitmask", which is what `INPUT.MASK_FORMAT` of a mask head says: an
            object whose mask cannot be used is left out. "any": masks that can be used stay, and
            objects without one too. "": none.
        keypoints: whether keypoints are used.
    """

    masks: str = "any"
    keypoints: bool = True

    @classmethod
    def of(cls, cfg: Any) -> "Uses":
        """What a config of Detectron2 takes."""
        masks = cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else ""
        return cls(masks, cfg.MODEL.KEYPOINT_ON)

    @property
    def mask_head(self) -> bool:
        """Whether objects need a mask."""
        return self.masks in ("polygon", "bitmask")


class AnnotationPass:
    """Checks annotations one by one; the result is in the attributes afterwards.

    Attributes:
        kept: the annotations that are left, with the fields that pycocotools and Detectron2 read.
        as_written: whether none of these fields had to be changed.
        without_mask: objects that have no mask, crowd regions left out.
        boxes: by image id, the boxes that are left.
        crowds: how many annotations are crowd regions.
    """

    def __init__(
        self,
        images: dict[int, dict[str, Any]],
        image_ids: Ids,
        category_ids: Ids,
        uses: Uses,
        report: Callable[[Problem], None],
    ) -> None:
        """
        Args:
            images: the entries by their new ids; `width` and `height` may be missing.
            image_ids, category_ids: of the tables.
            uses: what the config takes.
            report: called with every problem.
        """
        self._images, self._image_ids, self._category_ids = images, image_ids, category_ids
        self._uses, self._report = uses, report
        self._seen: dict[int, dict[str, Any]] = {}
        self._row: dict[str, Any] = {}
        self._place, self._image = 0, None
        self.kept: list[dict[str, Any]] = []
        self.as_written = True
        self.without_mask = self.crowds = 0
        self.boxes: Counter = Counter()
        self.habits = BoxHabits()

    def take(self, row: dict[str, Any], place: int) -> None:
        """
        Args:
            row: an entry in which `table_problems` met nothing; is changed.
            place: its number in the table, for messages about those without an id.
        """
        self._row, self._place, self._image = row, place, None
        category = self._category_ids.find(row["category_id"])
        if category is None:
            ident = row["category_id"]
            self._say(
                "unknown category",
                f"has the category_id {ident!r}, which is not among the categories",
            )
        crowd = self._crowd(row)
        if flag(row.get("ignore")) != 0:
            self._say("ignore flag", 'sets "ignore"')
        image_id = self._image_ids.find(row["image_id"])
        image = None if image_id is None else self._images[image_id]
        box = self._box(row, image)
        if image is None:
            self._say("stray annotation", f"refers to image {row['image_id']!r}")
        if category is None or crowd is None or box is None or image is None:
            return
        self._image = image
        box = self._inside(box, image)
        if box is None or (self._uses.masks and not self._mask(row, image, box, crowd)):
            return
        fields = {
            "image_id": image_id,
            "category_id": category,
            "bbox": box,
            "area": self._area(row, image, box),
            "iscrowd": crowd,
        }
        if not self._is_repeated(row, fields):
            self._keep(row, fields)

    def _where(self) -> str:
        """The annotation, for a message; built only where there is one."""
        ident = self._row.get("id")
        name = f"number {self._place}" if ident is None else repr(ident)
        return f"annotation {name}" + (f" of {image_name(self._image)}" if self._image else "")

    def _say(self, kind: str, text: str = "") -> None:
        self._report(Problem(kind, f"{self._where()} {text}".rstrip()))

    def _crowd(self, row: dict[str, Any]) -> int | None:
        value = row.get("iscrowd", 0)
        crowd = flag(value)
        if crowd is None:
            self._say("value", f'has the "iscrowd" {shown(repr(value), 80)} instead of 0')
        elif type(value) is not int:
            self._say("crowd flag", f'has the "iscrowd" {value!r}, read as {crowd}')
        return crowd

    def _box(self, row: dict[str, Any], image: dict[str, Any] | None) -> list[float] | None:
        value = row.get("bbox")
        box = numbers(value, 4)
        if box is not None:
            if box is not value:
                self._say("text value", f"has the bbox {value!r}")
            return box
        if value in _NOTHING:
            if found := polygons(row.get("segmentation")):
                box = polygon_box(found)
            elif image is not None and _mask_area(row, image) is not None:
                box = mask_util.toBbox(compressed_mask(row["segmentation"])).tolist()
        if box is not None:
            self._say("no box")
        else:
            text = shown(repr(value), 80)
            self._say("bad box", f"has the bbox {text} instead of four finite numbers")
        return box

    def _inside(self, box: list[float], image: dict[str, Any]) -> list[float] | None:
        """The part of the box inside the image; None where there is none."""
        x, y, w, h = box
        width, height = _sides(image) or (math.inf, math.inf)
        self.habits.see(box, width, height, self._where)
        if min(w, h) <= 0:
            self._say("empty box", f"has the bbox {box!r}")
            return None
        if min(x + w, y + h) <= 0 or x >= width or y >= height:
            self._say("box outside", f"has the bbox {box!r} in {width} x {height} pixels")
            return None
        if max(w, h) < 1:
            self._say("tiny box", f"has the bbox {box!r}")
        # Overshoot of up to a pixel is rounding; without a known size there is nothing to clip to.
        if width == math.inf or max(x + w - width, y + h - height, -x, -y) <= 1:
            return box
        self._say("box clipped", f"has the bbox {box!r} in {width} x {height} pixels")
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        return [x0, y0, x1 - x0, y1 - y0]

    def _mask(
        self, row: dict[str, Any], image: dict[str, Any], box: list[float], crowd: int
    ) -> bool:
        """Repairs or removes the mask; returns whether the object stays."""
        value = row.get("segmentation")
        if value in _NOTHING:
            self.without_mask += not crowd
        elif isinstance(value, dict):
            if _mask_area(row, image) is not None:
                if self._uses.masks == "polygon" and not crowd:
                    self._say("mask format")
                return True
            self._say("bad mask")
        else:
            found = polygons(value)
            if found:
                listed = isinstance(value[0], list) and len(value[0]) != 2  # else one, or points
                if listed and len(found) < len(value):
                    self._say("bad polygon")
                if found != value:
                    row["segmentation"] = found
                    self.as_written = False
                return True
            self._say("bad mask")
        if value not in _NOTHING:
            self.as_written = False
            if self._uses.mask_head and not crowd:
                return False
            self.without_mask += not crowd
        row.pop("segmentation", None)
        if crowd and self._uses.mask_head:  # pycocotools needs a mask for every annotation
            x, y, w, h = box
            row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            self.as_written = False
        return True

    def _area(self, row: dict[str, Any], image: dict[str, Any], box: list[float]) -> float:
        given = row.get("area")
        area, whole = number(given), box[2] * box[3]
        if area is not None and _LEAST_AREA * whole <= area <= _MOST_AREA * whole + 1 and area > 0:
            if area is not given:
                self._say("text value", f'has the "area" {given!r}')
            return area
        if "area" in row:
            text = shown(repr(given), 80)
            self._say("area", f'has the "area" {text} and a box of {whole:g}')
        found = polygons(row.get("segmentation"))
        inside = polygon_area(found) if found else _mask_area(row, image)
        return inside or whole

    def _is_repeated(self, row: dict[str, Any], fields: dict[str, Any]) -> bool:
        key = hash((*fields["bbox"], *(fields[k] for k in ("image_id", "category_id", "iscrowd"))))
        first = self._seen.setdefault(key, row)
        same = first is not row and all(
            first.get(name) == fields.get(name, row.get(name))
            for name in ("image_id", "category_id", "bbox", "iscrowd", "segmentation", "keypoints")
        )
        if same:
            self._say("duplicate box", f"has the bbox {fields['bbox']!r}")
        return same

    def _keep(self, row: dict[str, Any], fields: dict[str, Any]) -> None:
        if any(type(row.get(k)) is not type(v) or row[k] != v for k, v in fields.items()):
            self.as_written = False
        row.update(fields)
        self.kept.append(row)
        self.boxes[fields["image_id"]] += 1
        self.crowds += fields["iscrowd"]


def _sides(image: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height, where they are known."""
    sides = image.get("width"), image.get("height")
    return sides if all(type(side) is int and side > 0 for side in sides) else None


def _mask_area(row: dict[str, Any], image: dict[str, Any]) -> int | None:
    value = row.get("segmentation")
    if sides := _sides(image):
        return rle_area(value, sides[1], sides[0])
    size = numbers(value.get("size"), 2) if isinstance(value, dict) else None
    return rle_area(value, *size) if size else None


def compressed_mask(value: dict[str, Any]) -> dict[str, Any]:
    """A mask in COCO's run-length encoding, with its runs as text or bytes."""
    height, width = map(int, numbers(value["size"], 2))
    if isinstance(value["counts"], str):
        return {"size": [height, width], "counts": value["counts"]}
    runs = [int(run) for run in numbers(value["counts"])]
    return mask_util.frPyObjects({"size": [height, width], "counts": runs}, height, width)
