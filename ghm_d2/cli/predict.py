"""Run a trained detector on images and videos."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ghm_d2.data.tiles import check_tiling
from ghm_d2.deploy.coco_ids import image_ids
from ghm_d2.deploy.predict import Predictor
from ghm_d2.deploy.setup import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    build_detector,
    list_files,
    tool_parser,
)
from ghm_d2.engine.arguments import Parser, make_output_folder, parse_arguments
from ghm_d2.engine.settings import read_settings
from ghm_d2.errors import UserError, exits_with_one_sentence
from ghm_d2.files import write_json

logger = logging.getLogger(__name__)

_RESULTS = "predictions.json"
_OTHERS = "predictions_other_images.json"
_PROGRAM = "ghm-d2 predict"
_FLAGS = ("-h", "--help", "--no-pictures", "--overwrite")


def _parser() -> Parser:
    parser = tool_parser(
        _PROGRAM,
        "--input FILE|FOLDER|PATTERN ... --output FOLDER",
        "Run a detector on images and videos; draw what it finds (boxes, masks, keypoints) and "
        f"write it as COCO results ({_RESULTS}), for the data set that --dataset names.",
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="images, videos, folders with their subfolders, or quoted patterns ('a/**/*.jpg')",
    )
    add(
        "--output",
        required=True,
        metavar="FOLDER",
        help="folder for the results; created if missing",
    )
    add(
        "--confidence-threshold",
        type=float,
        metavar="SCORE",
        help="leave out detections with lower scores (the threshold with the best F1 in the "
        "evaluation of the training, if the weights have one, else 0.5)",
    )
    add(
        "--tile",
        type=int,
        default=0,
        metavar="PIXELS",
        help="look at each image also in tiles of this side, which overlap by a fifth, for objects "
        "that are small in large images (boxes alone; needs pip install 'ghm_d2[tiles]')",
    )
    add("--no-pictures", action="store_true", help="draw nothing")
    add("--overwrite", action="store_true", help=f"replace an existing {_RESULTS}")
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
        args = parse_arguments(argv, _parser(), flags=_FLAGS, lists=("--input",))
        threshold = args.confidence_threshold
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"--confidence-threshold must lie in [0, 1], got {threshold}.")
        output = Path(args.output)
        if args.tile:
            check_tiling(args.tile, 0)
        files = list_files(args.input, IMAGE_SUFFIXES + VIDEO_SUFFIXES, without=output)
        outputs = {} if args.no_pictures else _outputs(files, output)
        _make(output, args.overwrite)
        detector = build_detector(args)
        cfg, metadata = detector.cfg, detector.metadata
        if threshold is None:
            threshold = 0.5 if detector.score_threshold is None else detector.score_threshold
        known = image_ids(files, metadata, named=bool(args.dataset))
        if args.dataset and len(known) < len(files):
            logger.warning(
                "%d of %d inputs are not images of %s: they are numbered from 1%s",
                len(files) - len(known),
                len(files),
                metadata.get("name", "a data set with the classes of the weights"),
                f", and what is found in them goes to {_OTHERS}" if known else "",
            )
        predictor = Predictor(cfg, detector.model, metadata, threshold, args.tile)
        results: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for number, file in enumerate(tqdm(files, desc="predicting", unit="file"), start=1):
            image_id = known.get(file, number)
            found = predictor.run(file, files[file], image_id, outputs.get(file))
            results[file in known or not known] += found
        if predictor.unreadable == len(files):
            raise UserError(f"none of the {len(files)} inputs could be read.")
        write_json(output / _RESULTS, results[True], indent=None)
        (output / _OTHERS).unlink(missing_ok=True)  # of an earlier call
        if known and len(known) < len(files):
            write_json(output / _OTHERS, results[False], indent=None)
        if predictor.unreadable:
            logger.warning(
                "%d of %d inputs could not be read and were skipped",
                predictor.unreadable,
                len(files),
            )
        device, number = read_settings(cfg).device, sum(map(len, results.values()))
        best = (
            "" if number or predictor.best is None else f"; the best score is {predictor.best:.2f}"
        )
        print(
            f"{number} detections in {predictor.done} images or frames, "
            f"{predictor.seconds / predictor.done:.3f} s each on {device} (drawing not "
            f"counted), with a score of at least {threshold:.2f}{best}: "
            f"{'' if args.no_pictures else 'pictures and '}{_RESULTS} are in {output}."
        )


def _make(folder: Path, overwrite: bool) -> None:
    """Makes the folder.

    Raises:
        UserError: it cannot be made, or holds results and `overwrite` is False.
    """
    for name in (_RESULTS, _OTHERS):
        if not overwrite and (folder / name).exists():
            raise UserError(
                f"{folder / name} exists already: name another --output, or replace it with "
                "--overwrite."
            )
    make_output_folder(folder)


def _outputs(files: Mapping[Path, str], folder: Path) -> dict[Path, Path]:
    """Where the drawn copy of each file goes; videos become .mp4, whatever they were.

    Raises:
        UserError: two copies, or a copy and its original, would have the same name.
    """
    outputs = {}
    for file, name in files.items():
        copy = folder / name
        if file.suffix.lower() in VIDEO_SUFFIXES:
            copy = copy.with_suffix(".mp4")
        elif file.suffix.lower() not in _WRITABLE:
            copy = copy.with_name(f"{copy.name}.png")
        outputs[file] = copy
    name, times = Counter(outputs.values()).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"{times} inputs would be written to {name}: give them in separate calls, with "
            "--output folders of their own."
        )
    for file, copy in outputs.items():
        if copy.resolve() == file.resolve():
            raise UserError(f"--output {folder} would overwrite the input {file}: name another.")
    return outputs


_WRITABLE = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
