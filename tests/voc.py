"""A Pascal VOC folder of a few small images, as people have them."""

from pathlib import Path

import numpy as np
from PIL import Image


def voc_xml(name="0.png", size=(64, 48), objects=()):
    """The text of an annotation; objects are (class, (xmin, ymin, xmax, ymax)[, difficult])."""
    items = "".join(
        f"<object><name>{label}</name><pose>Left</pose><difficult>{int(bool(more))}</difficult>"
        f"<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
        f"<ymax>{box[3]}</ymax></bndbox></object>"
        for label, box, *more in objects
    )
    return (
        f"<annotation><filename>{name}</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height><depth>3</depth></size>{items}</annotation>"
    )


def write_image(file: Path, size=(64, 48), seed=0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def write_voc(folder: Path, images=10, flat=False, size=(64, 48)) -> Path:
    """Image i holds a disc and, every second one, a bar."""
    for i in range(images):
        objects = [("disc", (1, 1, 30, 40))] + [("bar", (20, 11, 64, 30))] * (i % 2)
        xml = folder / ("" if flat else "Annotations") / f"img{i}.xml"
        image = folder / ("" if flat else "JPEGImages") / f"img{i}.png"
        write_image(image, size, seed=i)
        xml.parent.mkdir(parents=True, exist_ok=True)
        xml.write_text(voc_xml(image.name, size, objects))
    return folder


def write_lists(folder: Path, **lists) -> None:
    main = folder / "ImageSets" / "Main"
    main.mkdir(parents=True, exist_ok=True)
    for name, lines in lists.items():
        (main / f"{name}.txt").write_text("\n".join(lines) + "\n")
