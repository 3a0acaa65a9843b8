"""What the deployment tools share: command line, trained detector, reading images."""

import argparse
import glob
import itertools
import logging
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn

from ghm_d2.checkpoint import load_trained_weights
from ghm_d2.checkpoint.origin import check_classes
from ghm_d2.engine.arguments import CONFIG_FILE_HELP, Parser, add_dataset_option
from ghm_d2.engine.checks import check_inference
from ghm_d2.engine.settings import Config, Settings, change, key_of, read_settings
from ghm_d2.engine.setup import build_config, given_keys
from ghm_d2.engine.trainer import GHMTrainer
from ghm_d2.errors import UserError
from ghm_d2.run_folder import CONFIG, RunFolder
from ghm_d2.run_parts import Record

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


def tool_parser(program: str, usage: str, description: str) -> Parser:
    """A parser with the options of all tools that run a trained detector."""
    parser = Parser(
        prog=program,
        usage=f"%(prog)s --config-file FILE {usage} [KEY VALUE ...]",
        description=f"{description} KEY VALUE pairs, such as MODEL.WEIGHTS FILE, override the "
        "config and may stand before or after the options.",
        allow_abbrev=False,
    )
    parser.add_argument("--config-file", metavar="FILE", required=True, help=CONFIG_FILE_HELP)
    add_dataset_option(
        parser,
        "COCO-format data from which the results take the ids of images and classes, and the names "
        "of classes where the weights have none (the first, if given repeatedly)",
    )
    return parser


@dataclass(frozen=True)
class Detector:
    """A trained detector.

    Attributes:
        cfg: its config.
        model: in eval mode.
        metadata: its classes.
        score_threshold: the one with the best F1 in an evaluation; None if there was none.
    """

    cfg: Config
    model: nn.Module
    metadata: Metadata
    score_threshold: float | None


def build_detector(args: argparse.Namespace) -> Detector:
    """The trained detector that a command line describes.

    If it gives the config.yaml of a training and no weights, the weights are those of this
    training: the best model, or else the final one. `MODEL.WEIGHTS` may also be its folder.

    Raises:
        UserError: config, weights or data set are wrong.
    """
    for name in ("fvcore", "detectron2", "ghm_d2"):  # they report weights that were left out
        setup_logger(name=name)
    cfg, datasets = build_config(
        args.config_file, args.opts, args.dataset, eval_only=True, log_to_file=False
    )
    given = given_keys(args.config_file, args.opts)
    check_inference(cfg, given | _choose_weights(cfg, args.config_file, given))
    model = GHMTrainer.build_model(cfg).eval()
    settings = read_settings(cfg)
    origin = load_trained_weights(model, settings.weights)
    for data in datasets:
        check_classes(origin, data.classes, data.name)
    metadata = _class_metadata(settings, model, origin)
    if not metadata.get("thing_classes"):
        logger.warning(
            "neither the weights nor a data set of the config name the model's classes: they are "
            "numbered (--dataset NAME=annotations.json,image_dir names them)"
        )
    return Detector(cfg, model, metadata, origin.score_thresholds.get(""))


def _choose_weights(cfg: Config, config_file: str, given: Set[str]) -> set[str]:
    """Replaces the folder of a training by its weights; returns the keys that were set."""
    key, weights = key_of(cfg, "weights"), read_settings(cfg).weights
    folder = Path(weights) if key in given else Path(config_file).parent
    named = folder.is_dir() if key in given else Path(config_file).name == CONFIG
    run = RunFolder(folder)
    if not named or not run.is_training() or not run.weights().is_file():
        return set()
    change(cfg, "weights", str(run.weights()))
    logger.info("the weights are those of %s", run.weights())
    return {key}


def _class_metadata(settings: Settings, model: nn.Module, origin: Record) -> Metadata:
    """The metadata of the first data set of the config that has the model's classes.

    Classes are compared by the names in the checkpoint, or by their number if it has none. Without
    such a data set, the metadata has only those names, or nothing.
    """
    part = model if hasattr(model, "num_classes") else getattr(model, "roi_heads", None)
    count = getattr(part, "num_classes", len(origin.classes))
    known = list(origin.classes) if len(origin.classes) == count else None
    for name in (*settings.test, *settings.train):
        found = MetadataCatalog.get(name).get("thing_classes", ())
        if len(found) == count and known in (None, list(found)):
            return MetadataCatalog.get(name)
    return Metadata(thing_classes=known) if known else Metadata()


def list_files(
    inputs: Sequence[str], suffixes: Sequence[str], without: Path | None = None
) -> dict[Path, str]:
    """The files that the command line names, by paths, folders and patterns.

    From folders, with their subfolders, and patterns, only files with `suffixes` are taken, sorted.

    Args:
        inputs: paths, folders and patterns.
        suffixes: in lower case, with their dot.
        without: a folder whose files are left out, because the program writes there.

    Returns:
        Each file and its name: its path inside the folder that was given.

    Raises:
        UserError: an input does not exist, is an address or device, or holds no such file.
    """
    files: dict[Path, str] = {}
    for text in inputs:
        path = Path(text)
        if path.is_file():
            files.setdefault(path, path.name)
            continue
        root, pattern = (path, "**/*") if path.is_dir() else _pattern(text)
        there = (Path(f) for f in glob.glob(pattern, root_dir=root, recursive=True))
        there = sorted(f for f in there if (root / f).is_file() and not _inside(root / f, without))
        found = [f for f in there if f.suffix.lower() in suffixes]
        if not found:
            raise UserError(
                f"the {'folder' if path.is_dir() else 'pattern'} {text} holds no "
                f"{_either(suffixes)} file."
            )
        if others := [f for f in there if f.suffix.lower() not in suffixes]:
            logger.warning(
                "%s: %d files are left out because their names do not end in %s; the first: %s",
                text, len(others), _either(suffixes), others[0],
            )  # fmt: skip
        for file in found:
            files.setdefault(root / file, file.as_posix())
    return files


def _pattern(text: str) -> tuple[Path, str]:
    """The folder that a pattern begins in, and the rest of it.

    Raises:
        UserError: `text` is not a pattern.
    """
    path = Path(text)
    if text == "-":
        raise UserError("standard input is not read: write it to a file, and give its name.")
    if "://" in text:
        raise UserError(
            f"the input {text} is an address, and streams and downloads are not read: record or "
            "download it to a file first, as ffmpeg and curl do."
        )
    if path.exists() or text.isdecimal():
        raise UserError(
            f"the input {text} is a device, and cameras are not read: record a video first, as "
            "ffmpeg does."
        )
    if not glob.has_magic(text):
        raise UserError(f"the input {text} does not exist.")
    plain = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    return Path(*plain), str(Path(*path.parts[len(plain) :]))


def _inside(file: Path, folder: Path | None) -> bool:
    return folder is not None and file.resolve().is_relative_to(folder.resolve())


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def images_of_test(cfg: Config) -> tuple[str, int, int]:
    """Channel order of test images, shorter side and limit of the longer side, in pixels.

    Raises:
        UserError: a Python config does anything but resize them.
    """
    if isinstance(cfg, CfgNode):
        return cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    mapper = GHMTrainer.build_test_mapper(cfg)
    augmentations = list(getattr(getattr(mapper, "augmentations", None), "augs", ()))
    if len(augmentations) != 1 or not isinstance(augmentations[0], ResizeShortestEdge):
        raise UserError(
            "dataloader.test.mapper must be Detectron2's DatasetMapper with one augmentation, "
            "ResizeShortestEdge."
        )
    resize = augmentations[0]
    return mapper.image_format, int(resize.short_edge_length[0]), int(resize.max_size)


def image_preparer(cfg: Config) -> Callable[[np.ndarray], Tensor]:
    """A function from an RGB image, (H, W, 3) uint8, to what the model takes.

    That is (3, H', W') float32, 0 .. 255, resized as for the test, channels as in `INPUT.FORMAT`.

    Raises:
        UserError: `INPUT.FORMAT` is neither BGR nor RGB.
    """
    channels, shortest, longest = images_of_test(cfg)
    order = {"BGR": -1, "RGB": 1}.get(channels)
    if order is None:
        raise UserError(f"INPUT.FORMAT {channels} is not supported: BGR and RGB are.")
    resize = ResizeShortestEdge([shortest, shortest], longest)

    def prepare(rgb: np.ndarray) -> Tensor:
        pixels = resize.get_transform(rgb).apply_image(rgb)[:, :, ::order]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32))

    return prepare
