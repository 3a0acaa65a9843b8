"""CVAT's own XML, for images and for videos: one file for all images of a task."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from .fields import number
from .image_files import find_images
from .labels import LabelledImage, LabelledObject, checked_size, ellipse, outline, rectangle

_SPLIT = "subset"  # an attribute of an image, where the task has subsets
_BOX = ("xtl", "ytl", "xbr", "ybr")


def read_cvat(
    root: Element, folder: Path, images: Sequence[Path], report: Callable[[str], None]
) -> Iterator[LabelledImage]:
    """The images of one file, and their objects.

    CVAT counts from 0 and its corners lie between pixels. Lines and points have no area, so that a
    detector cannot use them. The images of a video are its frames.

    Args:
        root: of the file, <annotations>.
        folder: the folder that holds the images, directly or in subfolders.
        images: all image files in it.
        report: called with what is wrong with each image that is left out.

    Raises:
        ValueError: it holds no image; the message follows the name of the file.
    """
    if root.find("image") is None and root.find("track") is not None:
        found = _frames(root, images)
    elif root.find("image") is None:
        raise ValueError("holds no <image>")
    else:
        nodes = root.findall("image")
        places = find_images([node.get("name", "") for node in nodes], str(folder))
        found = [
            (node.get("name"), place.path, node, list(node))
            for node, place in zip(nodes, places, strict=True)
        ]
    for name, path, node, shapes in found:
        try:
            yield _image(node, path, shapes)
        except ValueError as error:
            report(f"{name!r} {error}")


def _image(node: Element | None, path: str | Path | None, shapes: Sequence) -> LabelledImage:
    if path is None:
        raise ValueError("is not among the images")
    written = (None, None) if node is None else (node.get("width"), node.get("height"))
    width, height = checked_size(Path(path), *written)
    objects, lost = [], []
    for shape in shapes:
        if shape.tag == "tag":  # of the image as a whole
            continue
        name = (shape.get("label") or "").strip()
        found = _object(name, shape) if name else None
        if found is None:
            lost.append(f"holds a <{shape.tag}> without a box or label")
        else:
            objects.append(found)
    split = "" if node is None else (node.get(_SPLIT) or "").strip()
    return LabelledImage(Path(path), width, height, tuple(objects), split, tuple(lost))


def _object(name: str, shape: Element) -> LabelledObject | None:
    if shape.tag == "box":
        return rectangle(name, [shape.get(key) for key in _BOX], shape.get("rotation"))
    if shape.tag == "polygon":
        return outline(name, [(shape.get("points") or "").replace(";", ",").split(",")])
    if shape.tag == "ellipse":
        return ellipse(
            name, *([shape.get(k) for k in keys] for keys in (("cx", "cy"), ("rx", "ry")))
        )
    if shape.tag == "mask":
        left, top, w, h = (number(shape.get(key)) for key in ("left", "top", "width", "height"))
        known = None not in (left, top, w, h)
        return LabelledObject(name, (left, top, left + w, top + h)) if known else None
    return None


def _frames(root: Element, images: Sequence[Path]) -> list:
    """The frames of a video: every image whose name ends in a number, and the shapes in it."""
    numbered: dict[int, list[Path]] = defaultdict(list)
    for image in images:
        if digits := re.search(r"\d+$", image.stem):
            numbered[int(digits[0])].append(image)
    if not numbered:
        raise ValueError(
            "is for a video, and there are no images whose names end in the numbers of its frames: "
            "export it with its images, or write them with "
            "ffmpeg -i VIDEO -start_number 0 images/frame_%06d.png"
        )
    if any(len(files) > 1 for files in numbered.values()):
        raise ValueError("is for one video, but there are images of several videos")
    shapes: dict[int, list[Element]] = defaultdict(list)
    for track in root.findall("track"):
        for frame, shape in _visible(track):
            shapes[frame].append(shape)
    absent = [(f"frame {k}", None, None, shapes[k]) for k in sorted(shapes) if k not in numbered]
    return [(f.name, f, None, shapes[k]) for k, (f,) in sorted(numbered.items())] + absent


def _visible(track: Element) -> Iterator[tuple[int, Element]]:
    """The visible frames of a track; boxes between two written frames are interpolated."""
    known = {int(number(shape.get("frame")) or 0): shape for shape in track}
    frames = sorted(known)
    for frame, end in zip(frames, [*frames[1:], *frames[-1:]], strict=True):
        shape = known[frame]
        if shape.get("outside") == "1":
            continue
        shape.set("label", track.get("label") or "")
        yield frame, shape
        for between in range(frame + 1, end):
            yield between, _between(shape, known[end], (between - frame) / (end - frame))


def _between(first: Element, second: Element, share: float) -> Element:
    """The box interpolated as in CVAT; other shapes, and a box that vanishes next, do not move."""
    made = Element(first.tag, dict(first.attrib))
    if first.tag == second.tag == "box" and second.get("outside") != "1":
        for key in _BOX:
            a, b = number(first.get(key)), number(second.get(key))
            if a is not None and b is not None:
                made.set(key, str(a + (b - a) * share))
    return made
