"""The default data set on disk: COCO format, generated on first use, registered by name."""

import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from PIL import Image
from tqdm import tqdm

from ghm_d2.errors import UserError, reason

from .synthetic_images import CLASSES, IMAGE_SIZE, SEED, SPLITS, VERSION, make_image

logger = logging.getLogger(__name__)


def _stamp() -> dict[str, Any]:
    return {"generator": "ghm_d2 synthetic", "version": VERSION, "seed": SEED, "images": SPLITS}


def _write(folder: Path) -> None:
    """Write pictures, annotations and, last, the stamp into an empty folder."""
    (folder / "annotations").mkdir()
    bar = tqdm(total=sum(SPLITS.values()), desc="generating ghm_synthetic", unit="image")
    for split, size in SPLITS.items():
        (folder / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(size):
            pixels, objects = make_image(split, index)
            name = f"{index:06d}.png"
            Image.fromarray(pixels).save(folder / split / name)
            images.append(
                {"id": index + 1, "file_name": name, "height": IMAGE_SIZE, "width": IMAGE_SIZE}
            )
            for item in objects:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": item.category + 1,
                        "bbox": list(item.box),
                        "area": item.area,
                        "iscrowd": 0,
                        "difficulty": item.difficulty,
                    }
                )
            bar.update()
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        content = {
            "info": _stamp(),
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
        counts = Counter(CLASSES[a["category_id"] - 1] for a in annotations)
        logger.info("ghm_synthetic %s: %d images, objects %s", split, size, dict(counts))
    bar.close()
    (folder / "stamp.json").write_text(json.dumps(_stamp()))


def _default_root() -> Path:
    return Path(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))


def _read_stamp(folder: Path) -> Any:
    try:
        return json.loads((folder / "stamp.json").read_text())
    except (OSError, ValueError):
        return None


def ensure_synthetic(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the data set, generating it first where it is missing or outdated.

    The folder appears whole or not at all. If several processes ask at once, one generates it and
    the others wait.

    Args:
        root: folder of data sets; by default `$DETECTRON2_DATASETS`, or "datasets" without it.

    Raises:
        UserError: the folder cannot be written, or holds something that ghm_d2 did not write.
    """
    root = _default_root() if root is None else Path(root)
    folder = root / "ghm_synthetic"
    if _read_stamp(folder) == _stamp():
        return folder
    try:
        with file_lock(str(folder.absolute())):
            found = _read_stamp(folder)
            if found == _stamp():  # another process generated it while this one waited
                return folder
            if folder.exists() and found is None:
                raise UserError(
                    f"{folder} exists but was not written by ghm_d2: move it away, or set "
                    "DETECTRON2_DATASETS to another folder."
                )
            new = Path(tempfile.mkdtemp(prefix=".ghm_synthetic.", dir=root))
            try:
                new.chmod(0o755)  # mkdtemp lets nobody else read
                _write(new)
                if found is not None:
                    logger.warning(
                        "%s was written by another version (%s) and is generated anew",
                        folder,
                        found,
                    )
                    shutil.rmtree(folder)
                new.rename(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the synthetic data set cannot be written to {folder} ({reason(error)}): "
            "set DETECTRON2_DATASETS to a writable folder with 50 MB of room."
        ) from error
    return folder


def register_synthetic() -> None:
    """Register `ghm_synthetic_train` and `ghm_synthetic_val`; a second call changes nothing.

    Nothing is read or written until Detectron2 asks for the data. The folder is the one that
    `$DETECTRON2_DATASETS` names now, as with Detectron2's own data sets.
    """
    folder = _default_root() / "ghm_synthetic"
    for split in SPLITS:
        name = f"ghm_synthetic_{split}"
        if name in DatasetCatalog:
            continue
        json_file, image_root = str(folder / "annotations" / f"{split}.json"), str(folder / split)

        def load(
            name: str = name, json_file: str = json_file, image_root: str = image_root
        ) -> list:
            ensure_synthetic(folder.parent)
            return load_coco_json(json_file, image_root, name)

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        )
