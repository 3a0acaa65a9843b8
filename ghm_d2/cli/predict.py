"""A trained detector on images and videos."""

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog
from tqdm import tqdm

from ghm_d2.deploy.predict import Predictor
from ghm_d2.deploy.setup import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    build_detector,
    list_files,
    tool_parser,
)
from ghm_d2.engine.arguments import Parser, parse_arguments
from ghm_d2.engine.settings import read_settings
from ghm_d2.errors import UserError, cannot, exits_with_one_sentence
from ghm_d2.files import write_json

__all__ = ["main"]

logger = logging.getLogger(__name__)

_RESULTS = "predictions.json"
_PROGRAM = "ghm-d2 predict"


def _parser() -> Parser:
    parser = tool_parser(
        _PROGRAM,
        "--input FILE|FOLDER|VIDEO ... --output FOLDER",
        "Run a RetinaNet or Faster R-CNN on images and videos; draw the boxes and write them as "
        f"COCO results ({_RESULTS}).",
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="images, videos, or folders of them (without their subfolders)",
    )
    add("--output", required=True, metavar="FOLDER", help="folder to write to; it is made")
    add(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="boxes with lower scores are neither drawn nor written (0.5)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Predict, draw, write.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr, and
            where no input could be read.
    """
    with exits_with_one_sentence(_PROGRAM):
        words = sys.argv[1:] if argv is None else argv
        args = parse_arguments(words, _parser(), lists=("--input",))
        threshold = args.confidence_threshold
        if not 0 <= threshold <= 1:
            raise UserError(f"--confidence-threshold must lie in [0, 1], got {threshold}.")
        files = list_files(args.input, IMAGE_SUFFIXES + VIDEO_SUFFIXES)
        output = Path(args.output)
        outputs = _outputs(files, output)
        cfg, model, metadata = build_detector(args)
        if not metadata.get("thing_classes"):
            logger.warning(
                "neither the weights nor a data set of the config name the model's classes: they "
                "are numbered (--dataset NAME=annotations.json,image_dir names them)"
            )
        elif metadata.name in [text.partition("=")[0] for text in args.dataset]:
            DatasetCatalog.get(metadata.name)  # sets the category ids
        predictor = Predictor(cfg, model, metadata, threshold)
        for number, file in enumerate(tqdm(files, desc="predicting", unit="file"), start=1):
            predictor.run(file, number, outputs[file])
        if predictor.unreadable == len(files):
            raise UserError(f"none of the {len(files)} inputs could be read.")
        write_json(output / _RESULTS, predictor.results, indent=None)
        if predictor.unreadable:
            logger.warning(
                "%d of %d inputs could not be read and were skipped",
                predictor.unreadable,
                len(files),
            )
        device = read_settings(cfg).device
        print(
            f"{len(predictor.results)} detections in {predictor.done} images or frames, "
            f"{predictor.seconds / predictor.done:.3f} s each on {device} (drawing not "
            f"counted): pictures and {_RESULTS} are in {output}."
        )


def _outputs(files: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where the drawn copy of each file goes; videos become .mp4, whatever they were.

    Raises:
        UserError: the folder cannot be made, or two copies, or a copy and its original, would have
            the same name.
    """
    outputs = {}
    for file in files:
        suffix = file.suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            name = f"{file.stem}.mp4"
        else:
            name = file.name if suffix in _WRITABLE else f"{file.name}.png"
        outputs[file] = folder / name
    name, times = Counter(outputs.values()).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"{times} inputs would be written to {name}: give them in separate calls, with "
            "--output folders of their own."
        )
    for file, copy in outputs.items():
        if copy.resolve() == file.resolve():
            raise UserError(f"--output {folder} would overwrite the input {file}: name another.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot("made", f"--output {folder}", error) from error
    return outputs


_WRITABLE = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
