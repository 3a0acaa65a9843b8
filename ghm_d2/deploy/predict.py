"""Runs a detector on images and videos: draws what it finds and collects it as COCO results."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, detector_postprocess
from detectron2.structures import Instances
from torch import nn
from tqdm import tqdm

from ghm_d2.data.pictures import UnreadableError, draw, read_image
from ghm_d2.engine.settings import Config
from ghm_d2.errors import UserError

from .coco_ids import category_ids
from .setup import VIDEO_SUFFIXES, image_preparer
from .tiles import tiled

logger = logging.getLogger(__name__)

# Pixels of the longer side. Small images are drawn larger: letters keep their size, and would cover
# them. Large ones are drawn smaller: drawing and writing them would take longer than detection.
_SMALLEST_DRAWING = 400
_LARGEST_DRAWING = 1600


class Predictor:
    """Runs a detector on files, draws what it finds and collects it as COCO results.

    Attributes:
        done: images and frames that were run.
        unreadable: files that could not be read.
        best: the highest score, even if below the threshold; None without a detection.
        seconds: time spent on detection, including preprocessing and collecting the results.
    """

    def __init__(
        self, cfg: Config, model: nn.Module, metadata: Metadata, threshold: float, tile: int = 0
    ) -> None:
        """
        Args:
            cfg: of the model.
            model: in eval mode; any that returns "instances" with boxes, scores and classes.
            metadata: `thing_classes`, where they are known; `thing_dataset_id_to_contiguous_id`
                translates the classes into category ids of the data set.
            threshold: detections with lower scores are left out.
            tile: side in pixels of the tiles that are searched besides the image; 0: no tiles.

        Raises:
            UserError: SAHI, which tiles need, is not installed, or `tile` is out of range.
        """
        self.model, self.metadata, self.threshold = model, metadata, threshold
        self.prepare = image_preparer(cfg)
        self._look = tiled(self._infer, tile, threshold) if tile else self._infer
        self._results: list[dict[str, Any]] = []
        self.done = 0
        self.unreadable = 0
        self.best: float | None = None
        self.seconds = 0.0

    def run(
        self, file: Path, name: str, image_id: Any, output: Path | None
    ) -> list[dict[str, Any]]:
        """Run one file; one that cannot be read is counted, with a warning.

        Args:
            file: image or video.
            name: its `file_name`.
            image_id: of the image, or of all of a video's frames.
            output: file for the drawing, whose folder is created; None: nothing is drawn.

        Returns:
            One entry for each detection, in COCO's results format with `file_name`, for videos
            `frame` (from 0), and `category`, its name, where it is known; masks as RLE.

        Raises:
            UserError: the model finds no instances, or a file cannot be written.
        """
        record = {"image_id": image_id, "file_name": name}
        run = self._run_video if file.suffix.lower() in VIDEO_SUFFIXES else self._run_image
        self._results = []
        try:
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
            run(file, record, output)
        except UnreadableError as error:
            self.unreadable += 1
            logger.warning("%s It is skipped.", error)
        return self._results

    def _run_image(self, file: Path, record: dict[str, Any], output: Path | None) -> None:
        rgb = read_image(file)
        found = self._find(rgb, record)
        if output is not None and not cv2.imwrite(
            str(output), self._draw(rgb, found, _SMALLEST_DRAWING)
        ):
            raise UserError(f"{output} cannot be written.")

    def _run_video(self, file: Path, record: dict[str, Any], output: Path | None) -> None:
        video = cv2.VideoCapture(str(file))
        writer = None
        try:
            for number, bgr in enumerate(_frames(video, file)):
                rgb = np.ascontiguousarray(bgr[:, :, ::-1])
                found = self._find(rgb, {**record, "frame": number})
                if output is not None:
                    drawn = self._draw(rgb, found, 1)
                    writer = writer or _video_writer(output, video, drawn)
                    writer.write(drawn)
        finally:
            video.release()
            if writer is not None:
                writer.release()

    def _find(self, rgb: np.ndarray, record: dict[str, Any]) -> Instances:
        """Detects and records; returns what reaches the threshold, on the CPU."""
        start = time.perf_counter()
        with torch.no_grad():
            found = self._look(rgb)
        if len(found):
            self.best = max(self.best or 0.0, float(found.scores.max()))
        found = found[found.scores >= self.threshold]
        self._record(found, rgb.shape[:2], record)
        self.seconds += time.perf_counter() - start
        self.done += 1
        return found

    def _infer(self, rgb: np.ndarray) -> Instances:
        height, width = rgb.shape[:2]
        inputs = {"image": self.prepare(rgb), "height": height, "width": width}
        model = self.model
        if isinstance(model, GeneralizedRCNN) and not isinstance(model, PanopticFPN):
            # Without post-processing: masks of the size of a large image would fill the memory.
            return model.inference([inputs], do_postprocess=False)[0].to("cpu")
        output = model([inputs])[0]
        if "instances" not in output:
            raise UserError(
                f"{type(model).__name__} outputs {', '.join(output)} instead of instances: predict "
                "is for detectors that find boxes, scores and classes."
            )
        return output["instances"].to("cpu")

    def _record(self, found: Instances, size: tuple[int, int], record: dict[str, Any]) -> None:
        names = self.metadata.get("thing_classes")
        # One by one, since a mask is as large as the image until it is encoded.
        single = found.has("pred_masks")
        parts = ([i] for i in range(len(found))) if single else [slice(None)]
        for part in parts:
            for result in instances_to_coco_json(_scaled(found, part, size), record["image_id"]):
                k = result["category_id"]
                category = {"category": names[k]} if names else {}
                category["category_id"] = category_ids(self.metadata, k + 1)[k]
                self._results.append({**result, **record, **category})

    def _draw(self, rgb: np.ndarray, found: Instances, smallest: int) -> np.ndarray:
        """BGR, as OpenCV writes it."""
        height, width = rgb.shape[:2]
        scale = min(1.0, _LARGEST_DRAWING / max(height, width))
        # `draw` takes masks in the size of the drawing, and all else in pixels of the image.
        small = _scaled(found, slice(None), (round(height * scale), round(width * scale)))
        across, down = small.image_size[1] / width, small.image_size[0] / height
        boxes = small.pred_boxes.tensor.numpy() / (across, down, across, down)
        items = [
            (box, k, f" {score:.0%}")
            for box, k, score in zip(
                boxes.tolist(), small.pred_classes.tolist(), small.scores.tolist(), strict=True
            )
        ]
        fields = {}
        if small.has("pred_masks"):
            fields["masks"] = small.pred_masks.numpy()
        if small.has("pred_keypoints"):
            fields["keypoints"] = small.pred_keypoints.numpy() / (across, down, 1.0)
        sides = (smallest, _LARGEST_DRAWING)
        return np.ascontiguousarray(draw(rgb, items, self.metadata, sides, **fields)[:, :, ::-1])


def _scaled(found: Instances, part: Any, size: tuple[int, int]) -> Instances:
    """A part of the detections, scaled to an image of this size by Detectron2's function."""
    copies = Instances(found.image_size)  # detector_postprocess changes its input
    for name, value in found[part].get_fields().items():
        copies.set(name, value.clone())
    if found.has("pred_masks") and found.pred_masks.dim() == 3:  # masks already of the image's size
        return copies
    return detector_postprocess(copies, *size)


def _frames(video: cv2.VideoCapture, file: Path) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8, BGR."""
    total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    number = 0
    with tqdm(total=total if total > 0 else None, desc=file.name, unit="frame") as progress:
        while video.isOpened():
            there, frame = video.read()
            if not there:
                break
            number += 1
            progress.update()
            yield frame
    if number == 0:
        raise UnreadableError(f"{file} cannot be read as a video.")
    if number < total:
        logger.warning("%s: only %d of its %d frames could be read.", file, number, total)


def _video_writer(output: Path, video: cv2.VideoCapture, frame: np.ndarray) -> cv2.VideoWriter:
    size = frame.shape[1::-1]
    rate = video.get(cv2.CAP_PROP_FPS) or 25.0
    writer = cv2.VideoWriter(str(output), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
    if not writer.isOpened():
        raise UserError(f"{output} cannot be written as a video.")
    return writer
