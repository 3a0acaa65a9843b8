"""Large images cut into tiles by SAHI, with the objects that are in each."""

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ghm_d2.errors import UserError

LEAST_VISIBLE = 0.1  # share of an object's area in a tile, below which the tile leaves it out


def import_sahi() -> Any:
    """Imports SAHI, with the submodules that are used.

    Raises:
        UserError: it is not installed.
    """
    try:
        import sahi.models.detectron2
        import sahi.predict
        import sahi.slicing
        import sahi.utils.coco  # noqa: F401
    except ImportError as error:
        raise UserError(
            "tiles need SAHI, which is not installed: run pip install 'ghm_d2[tiles]'."
        ) from error
    return sahi


def check_tiling(side: int, overlap: float) -> None:
    """Checks the side (pixels) and the overlap (share of the side) of tiles.

    Raises:
        UserError: a value is out of range.
    """
    if side < 32:
        raise UserError(f"the side of a tile must be at least 32 pixels, got {side}.")
    if not 0 <= overlap < 0.9:
        raise UserError(f"the overlap of tiles must lie in [0, 0.9), got {overlap:g}.")


def tile_coco(
    content: Mapping[str, Any],
    paths: Mapping[int, str],
    folder: Path,
    *,
    side: int,
    overlap: float,
) -> tuple[dict[str, Any], Counter]:
    """Cut images into tiles and write the tiles to a folder.

    A tile holds the part of each object that lies in it, if that is at least a tenth of its box.
    Crowd regions stay crowd regions.

    Args:
        content: checked COCO-format content.
        paths: the file of each image by its id.
        folder: for the tiles; created if it does not exist.
        side: width and height of a tile in pixels; smaller images stay whole.
        overlap: of neighbouring tiles, as a share of the side.

    Returns:
        COCO-format content of the tiles, and how many there are of: "images", "tiles", "empty"
        (tiles without an object), "objects", "pieces" (objects in tiles), "cut" (pieces that are
        not all of their object), "lost" (objects that are in no tile) and "masks" (pieces without
        the mask that their object has).

    Raises:
        UserError: SAHI is not installed, or `side` or `overlap` is out of range.
    """
    sahi = import_sahi()
    check_tiling(side, overlap)
    by_image: dict[int, list[dict[str, Any]]] = {row["id"]: [] for row in content["images"]}
    for row in content["annotations"]:
        by_image[row["image_id"]].append(row)
    rows, annotations, counts = [], [], Counter(images=len(by_image))
    folder.mkdir(parents=True, exist_ok=True)
    for image in tqdm(content["images"], desc="cutting images", unit="image", delay=2):
        own = by_image[image["id"]]
        counts["objects"] += len(own)
        # Images in different folders may share a name; with the id, their tiles do not.
        name = f"{Path(image['file_name']).stem}_{image['id']}"
        result = sahi.slicing.slice_image(
            image=paths[image["id"]],
            output_file_name=name,
            output_dir=str(folder),
            slice_height=side,
            slice_width=side,
            overlap_height_ratio=overlap,
            overlap_width_ratio=overlap,
        )
        in_tiles: Counter = Counter()
        for tile in result.sliced_image_list:
            number = len(rows) + 1
            x, y = tile.starting_pixel
            width, height = tile.coco_image.width, tile.coco_image.height
            found = 0
            for row in own:
                piece = _piece(sahi, row, (x, y, x + width, y + height))
                if piece is None:
                    continue
                found += 1
                in_tiles[row["id"]] += 1
                counts["cut"] += piece["area"] < 0.999 * row["area"]
                counts["masks"] += bool(row.get("segmentation")) and "segmentation" not in piece
                annotations.append({**piece, "id": len(annotations) + 1, "image_id": number})
            counts["empty"] += not found
            rows.append(
                {
                    "id": number,
                    "file_name": tile.coco_image.file_name,
                    "width": width,
                    "height": height,
                }
            )
        counts["lost"] += sum(not in_tiles[row["id"]] for row in own)
    counts["tiles"], counts["pieces"] = len(rows), len(annotations)
    tables = {"images": rows, "annotations": annotations, "categories": content["categories"]}
    return tables, counts


def _piece(
    sahi: Any, row: Mapping[str, Any], tile: tuple[int, int, int, int]
) -> dict[str, Any] | None:
    """The part of an object in a tile, in pixels of the tile; None if too little is there."""
    x, y, w, h = row["bbox"]
    inside = np.clip((x, y, x + w, y + h), tile[:2] * 2, tile[2:] * 2)
    x0, y0, x1, y1 = (inside - tile[:2] * 2).tolist()
    if x1 <= x0 or y1 <= y0 or (x1 - x0) * (y1 - y0) < LEAST_VISIBLE * w * h:
        return None
    piece = {"category_id": row["category_id"], "iscrowd": row.get("iscrowd", 0)}
    found = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": row["area"]}
    if (x1 - x0, y1 - y0) != (w, h):
        found["area"] = (x1 - x0) * (y1 - y0)
    if isinstance(polygons := row.get("segmentation"), list):
        from shapely.errors import ShapelyError  # a dependency of SAHI

        with contextlib.suppress(ShapelyError):  # on a polygon that crosses itself
            whole = sahi.utils.coco.CocoAnnotation(category_id=0, segmentation=polygons)
            cut = whole.get_sliced_coco_annotation(list(tile))
            if cut.segmentation:  # in whole pixels
                found = {"bbox": cut.bbox, "area": cut.area, "segmentation": cut.segmentation}
    return {**piece, **found}
