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
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from torch import nn
from tqdm import tqdm

from ghm_d2.data.pictures import UnreadableError, read_image
from ghm_d2.deploy.setup import VIDEO_SUFFIXES, image_preparer
from ghm_d2.engine.settings import Config
from ghm_d2.errors import UserError

__all__ = ["Predictor"]

logger = logging.getLogger(__name__)

_SMALLEST_DRAWING = 400  # pixels of the longer side


class Predictor:
    """Finds, draws and records.

    Attributes:
        results: one entry for each detection, in COCO's results format with `file_name`, for videos
            `frame` (from 0), and `category`, its name, where it is known.
        done: images and frames that were run.
        unreadable: files that could not be read.
        seconds: time that the model took for them, preparing and results included.
    """

    def __init__(self, cfg: Config, model: nn.Module, metadata: Metadata, threshold: float) -> None:
        """
        Args:
            cfg: of the model.
            model: in eval mode.
            metadata: `thing_classes`, where they are known; `thing_dataset_id_to_contiguous_id`
                translates the classes into category ids of the data set.
            threshold: detections with lower scores are left out.
        """
        self.model, self.metadata, self.threshold = model, metadata, threshold
        self.prepare = image_preparer(cfg)
        self.results: list[dict[str, Any]] = []
        self.done = 0
        self.unreadable = 0
        self.seconds = 0.0
        to_class = metadata.get("thing_dataset_id_to_contiguous_id", {})
        self._category_ids = {k: category for category, k in to_class.items()}

    def run(self, file: Path, number: int, output: Path) -> None:
        """Run one file; one that cannot be read is counted, with a warning.

        Args:
            file: image or video.
            number: its `image_id` (of a video's frames too).
            output: file to write what was drawn to.
        """
        run = self._run_video if file.suffix.lower() in VIDEO_SUFFIXES else self._run_image
        try:
            run(file, number, output)
        except UnreadableError as error:
            self.unreadable += 1
            logger.warning("%s It is skipped.", error)

    def _run_image(self, file: Path, number: int, output: Path) -> None:
        rgb = read_image(file)
        found = self._find(rgb, {"image_id": number, "file_name": file.name})
        # Small images are drawn larger: letters keep their size, and would cover them.
        scale = max(1.0, _SMALLEST_DRAWING / max(rgb.shape[:2]))
        drawing = Visualizer(rgb, self.metadata, scale=scale)
        _write_image(output, drawing.draw_instance_predictions(found).get_image())

    def _run_video(self, file: Path, number: int, output: Path) -> None:
        video = cv2.VideoCapture(str(file))
        writer = None
        drawing = VideoVisualizer(self.metadata)
        try:
            for frame, bgr in enumerate(_frames(video, file)):
                rgb = np.ascontiguousarray(bgr[:, :, ::-1])
                record = {"image_id": number, "file_name": file.name, "frame": frame}
                found = self._find(rgb, record)
                drawn = drawing.draw_instance_predictions(rgb, found).get_image()
                writer = writer or _video_writer(output, video, drawn)
                writer.write(np.ascontiguousarray(drawn[:, :, ::-1]))
        finally:
            video.release()
            if writer is not None:
                writer.release()

    def _find(self, rgb: np.ndarray, record: dict[str, Any]) -> Instances:
        """Detections above the threshold, in pixels of the image as it was read, on the CPU."""
        start = time.perf_counter()
        height, width = rgb.shape[:2]
        inputs = {"image": self.prepare(rgb), "height": height, "width": width}
        with torch.no_grad():
            found = self.model([inputs])[0]["instances"].to("cpu")
        self.seconds += time.perf_counter() - start
        self.done += 1
        found = found[found.scores >= self.threshold]
        names = self.metadata.get("thing_classes")
        for result in instances_to_coco_json(found, record["image_id"]):
            k = result["category_id"]
            category = {"category": names[k]} if names else {}
            category["category_id"] = self._category_ids.get(k, k)
            self.results.append({**result, **record, **category})
        return found


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


def _write_image(output: Path, rgb: np.ndarray) -> None:
    if not cv2.imwrite(str(output), np.ascontiguousarray(rgb[:, :, ::-1])):
        raise UserError(f"{output} cannot be written.")
