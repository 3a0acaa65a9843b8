"""Cut large images into tiles, with their objects, to train on objects that are too small."""

from collections.abc import Sequence

from detectron2.utils.logger import setup_logger

from ghm_d2.data.dataset_folders import resolve
from ghm_d2.data.dataset_option import parse_dataset
from ghm_d2.data.datasets import check_coco_dataset
from ghm_d2.data.split import describe, write_coco
from ghm_d2.data.tiles import check_tiling, import_sahi, tile_coco
from ghm_d2.engine.arguments import (
    Parser,
    add_dataset_option,
    add_output_option,
    parse_arguments,
)
from ghm_d2.errors import UserError, command, counted, exits_with_one_sentence

_PROGRAM = "ghm-d2 tile-data"


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description=f"{__doc__} Writes DIR/NAME.json and the tiles to DIR/NAME.",
        allow_abbrev=False,
    )
    add_dataset_option(parser, "COCO-format data, or a folder with labels of any tool (repeatable)")
    add = parser.add_argument
    add_output_option(parser, "for the tiles; created if missing")
    add("--tile", "--side", type=int, default=640, metavar="PIXELS", help="side of a tile (640)")
    add(
        "--overlap",
        type=float,
        default=0.2,
        metavar="F",
        help="overlap of neighbouring tiles, as a share of the side (0.2)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Cut, write, and say what became of the objects.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr.
    """
    with exits_with_one_sentence(_PROGRAM):
        args = parse_arguments(argv, _parser(), flags=("--help",))
        if args.opts:
            raise UserError(f"{args.opts[0]} is not an option of this command.")
        if not args.dataset:
            raise UserError("nothing to cut: give --dataset.")
        check_tiling(args.tile, args.overlap)
        import_sahi()
        setup_logger(name="ghm_d2")
        for dataset in resolve([parse_dataset(text) for text in args.dataset]):
            file, folder = (args.output / f"{dataset.name}{end}" for end in (".json", ""))
            if file.exists() or folder.exists():
                raise UserError(f"{folder} exists already: delete it, or name another --output.")
            data = check_coco_dataset(dataset).data
            content, counts = tile_coco(
                data.content, data.paths, folder, side=args.tile, overlap=args.overlap
            )
            write_coco({file: content})
            print(describe(str(file), content))
            print(
                f"  {counted(counts['images'], 'image')} became {counted(counts['tiles'], 'tile')} "
                f"({counts['empty']:,} without an object); {counted(counts['objects'], 'object')} "
                f"became {counted(counts['pieces'], 'piece')} ({counts['cut']:,} cut by an edge); "
                f"{counts['lost']:,} are in no tile"
                + (f"; {counts['masks']:,} lost their mask" if counts["masks"] else "")
            )
            print(f"  for {command('train')}: --dataset {dataset.name}={file},{folder}")
