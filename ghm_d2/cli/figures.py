"""Draw the GHM paper's figures of a trained detector."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from ghm_d2.analysis.collect import collect, detector_parts
from ghm_d2.analysis.figures import write_figures
from ghm_d2.checkpoint import load_trained_weights
from ghm_d2.checkpoint.origin import check_datasets
from ghm_d2.engine.arguments import (
    Parser,
    add_dataset_option,
    make_output_folder,
    parse_arguments,
)
from ghm_d2.engine.checks import check_all
from ghm_d2.engine.settings import key_of, pair, read_settings
from ghm_d2.engine.setup import build_config, given_keys, output_words
from ghm_d2.engine.trainer import GHMTrainer
from ghm_d2.errors import UserError, exits_with_one_sentence

logger = logging.getLogger(__name__)

_PROGRAM = "ghm-d2 figures"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figures; print the files.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr.
    """
    with exits_with_one_sentence(_PROGRAM):
        written = plot_gradients(argv)
    print("Written:", *written, sep="\n  ")


def plot_gradients(argv: Sequence[str] | None) -> list[Path]:
    """Draws the paper's figures for a trained detector.

    Args:
        argv: the arguments without the program's name; None: `sys.argv[1:]`.

    Returns:
        The files that were written.

    Raises:
        UserError: a mistake in the command line, the config or the data.
    """
    args = parse_arguments(argv, _parser())
    if args.images < 1:
        raise UserError(f"--images must be at least 1, got {args.images}.")
    output = Path(args.output)
    make_output_folder(output)
    # The overrides may name the OUTPUT_DIR of a training, where its log must not be written to.
    overrides = [*args.opts, *output_words(args.config_file, output)]
    cfg, _ = build_config(args.config_file, overrides, args.dataset, eval_only=True)
    settings, given = read_settings(cfg), given_keys(args.config_file, overrides)
    if not settings.test:
        names = key_of(cfg, "test")
        raise UserError(f"there are no images: give --dataset, or the names in {names}.")
    if key_of(cfg, "weights") not in given or not settings.weights:
        weights = pair(cfg, "weights", "FILE")
        raise UserError(f"the figures show a trained detector: give {weights}.")
    check_all(cfg, given, eval_only=True)
    setup_logger(str(output), name="fvcore")
    setup_logger(str(output))
    records, caption = _records(settings.test, args.images)
    model = GHMTrainer.build_model(cfg)
    check_datasets(load_trained_weights(model, settings.weights), settings.test)
    detector_parts(model)
    seed_all_rng(max(settings.seed, 0))  # the RPN and the box head sample their examples
    parts = collect(cfg, model, tqdm(records, desc="images", unit="image"))
    files = []
    for name, part in parts.items():
        for what, data in (("cls", part.classification), ("box", part.regression)):
            if not data.counts.sum():
                raise UserError(
                    f"the {name} has no {what} examples in these images: use more images, or some "
                    "with objects."
                )
    for name, part in parts.items():
        folder = output / name if len(parts) > 1 else output
        title = f"{name.replace('_', ' ')}, {caption}" if len(parts) > 1 else caption
        files += write_figures(part, folder, title)
    return files


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        usage="%(prog)s --config-file FILE --output DIR [options] MODEL.WEIGHTS FILE "
        "[KEY VALUE ...]",
        description="Draw the gradient distributions of a trained detector on images with ground "
        "truth, as the GHM paper's figures do: PNG, SVG and CSV. KEY VALUE pairs override the "
        "config and may stand before or after the options.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config-file", metavar="FILE", required=True, help="the config of the training")
    add("--output", metavar="DIR", required=True, help="folder for the figures")
    add_dataset_option(
        parser,
        "COCO-format data to use in place of DATASETS.TEST (repeatable)",
    )
    add(
        "--images",
        "--max-images",
        type=int,
        default=200,
        metavar="N",
        help="number of images, spread over the data (200)",
    )
    parser.set_defaults(
        eval_only=True, resume=False, num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto"
    )
    return parser


def _records(names: Sequence[str], limit: int) -> tuple[list[dict[str, Any]], str]:
    """Images with objects, spread over the data, and a line that says which."""
    records = [r for name in names for r in DatasetCatalog.get(name) if r.get("annotations")]
    if not records:
        raise UserError(
            f"{', '.join(names)} has no annotated image: the figures need the ground truth."
        )
    number = min(limit, len(records))
    picked = [records[i * len(records) // number] for i in range(number)]
    caption = f"{', '.join(names)}, {number} of {len(records)} images with objects"
    logger.info("%s (--images %d)", caption, limit)
    return picked, caption
