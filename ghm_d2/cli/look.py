"""Draw pictures and figures of data sets, before any training."""

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.utils.logger import setup_logger

from ghm_d2.data import register_datasets
from ghm_d2.data.anchor_check import anchor_report
from ghm_d2.data.annotations import Uses
from ghm_d2.data.look_pictures import (
    MOST_COMPARED,
    draw_augmented,
    draw_grid,
    draw_histograms,
    spread,
)
from ghm_d2.data.look_statistics import DataStatistics, count_data, summary
from ghm_d2.engine.arguments import (
    Parser,
    add_dataset_option,
    make_output_folder,
    parse_arguments,
)
from ghm_d2.engine.python_config import read_anchors
from ghm_d2.engine.settings import Config, read_settings
from ghm_d2.engine.setup import build_config
from ghm_d2.engine.trainer import GHMTrainer
from ghm_d2.errors import UserError, exits_with_one_sentence

logger = logging.getLogger(__name__)

_PROGRAM = "ghm-d2 look"


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        usage="%(prog)s --output DIR (--dataset NAME=annotations.json,image_dir|NAME=FOLDER ... | "
        "--config-file FILE) [options] [KEY VALUE ...]",
        description="Take a first look at data: images with their boxes, histograms of classes and "
        "box sizes, and a summary. With --config-file, also see how well its anchors fit.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="for the pictures; created if missing",
    )
    add_dataset_option(
        parser,
        "COCO-format data, or a folder with labels of any tool (repeatable)",
    )
    add(
        "--config-file",
        metavar="FILE",
        help="look at its anchors, and at its DATASETS where no --dataset is given",
    )
    add("--images", type=int, default=12, metavar="N", help="number of images to draw (12)")
    add(
        "--augmented",
        action="store_true",
        help="draw images also as the detector of --config-file will see them in training, twice "
        "each",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, count, print.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr.
    """
    with exits_with_one_sentence(_PROGRAM):
        args = parse_arguments(argv, _parser(), flags=("-h", "--help", "--augmented"))
        if args.images < 1:
            raise UserError(f"--images must be at least 1, got {args.images}.")
        setup_logger(name="ghm_d2")
        cfg, names = _data_sets(args)
        make_output_folder(args.output)
        compared = [_look(name, cfg, args) for name in names]
        compared = [data for data in compared if len(data.sides)][:MOST_COMPARED]
        if len({data.classes for data in compared}) == 1 < len(compared):
            draw_histograms(compared, args.output / "compared.png")
            print(f"\nAll of them in one picture:\n  {args.output / 'compared.png'}")


def _data_sets(args: argparse.Namespace) -> tuple[Config | None, list[str]]:
    if args.config_file:
        cfg, datasets = build_config(args.config_file, args.opts, args.dataset, log_to_file=False)
        names = [dataset.name for dataset in datasets]
        if not names:
            settings = read_settings(cfg)
            names = [*settings.train, *settings.test]
        return cfg, list(dict.fromkeys(names))
    if args.augmented:
        raise UserError("--augmented shows what a config does: give --config-file FILE too.")
    if args.opts:
        raise UserError(f"{args.opts[0]} overrides a config: give --config-file FILE too.")
    if not args.dataset:
        raise UserError("nothing to look at: give --dataset or --config-file.")
    boxes = Uses(masks="", keypoints=False)
    return None, [dataset.name for dataset in register_datasets(args.dataset, uses=boxes)]


def _mapper(cfg: Config) -> DatasetMapper:
    mapper = GHMTrainer.build_train_mapper(cfg)
    if not isinstance(mapper, DatasetMapper):
        raise UserError(
            f"--augmented needs Detectron2's DatasetMapper as dataloader.train.mapper, got a "
            f"{type(mapper).__name__}: leave it out."
        )
    return mapper


def _look(name: str, cfg: Config | None, args: argparse.Namespace) -> DataStatistics:
    if name not in DatasetCatalog:
        raise UserError(f"there is no data set {name}: give --dataset {name}=ann.json,image_dir.")
    try:
        records = DatasetCatalog.get(name)
    except OSError as error:
        raise UserError(f"the data set {name} cannot be read ({error}).") from error
    if not records:
        raise UserError(f"the data set {name} holds no image.")
    metadata = MetadataCatalog.get(name)
    data = count_data(name, records, metadata.get("thing_classes") or ())
    text = summary(data)
    if cfg is not None and (fit := anchor_report(read_anchors(cfg), records)[0]):
        text += f"\nanchors of {args.config_file}: {fit}"
    stem = re.sub(r"[^\w.-]", "_", name)  # a data set may be called anything
    parts = ("images.png", "boxes.png", "summary.txt", "augmented.png")
    files = [args.output / f"{stem}_{what}" for what in parts]
    picked = spread(records, args.images)
    unreadable = draw_grid(picked, metadata, files[0])
    for sentence in unreadable:
        logger.warning("%s", sentence)
    if unreadable:
        logger.warning(
            "%d of %d images could not be read and are not drawn", len(unreadable), len(picked)
        )
    if len(data.sides):
        draw_histograms([data], files[1])
    if args.augmented:
        draw_augmented(picked[: -(-args.images // 2)], _mapper(cfg), metadata, files[3])
    files[2].write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n")
    for file in files:
        if file.exists():
            print(f"  {file}")
    return data
