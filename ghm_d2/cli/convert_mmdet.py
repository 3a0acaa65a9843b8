"""Convert mmdetection's RetinaNets (GHM or focal loss) to Detectron2 and back."""

from collections.abc import Sequence

from detectron2.config import CfgNode, get_cfg

from ghm_d2 import add_ghm_config
from ghm_d2.checkpoint.mmdet import convert_from_mmdet, convert_to_mmdet
from ghm_d2.engine.arguments import Parser
from ghm_d2.engine.setup import locate_config_file, merge_config_file
from ghm_d2.errors import command, exits_with_one_sentence


def main(argv: Sequence[str] | None = None) -> None:
    """Convert; print what the other side needs."""
    parser = Parser(prog="ghm-d2 convert-mmdet", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="file or URL to convert")
    parser.add_argument(
        "output", help="file to write: .pth, or also .pkl when converting to Detectron2"
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="the Detectron2 config that the weights must fit; without it, the matching one is "
        "written beside OUTPUT, and --reverse assumes mmdetection's settings",
    )
    parser.add_argument("--reverse", action="store_true", help="from Detectron2 to mmdetection")
    with exits_with_one_sentence(parser.prog):
        args = parser.parse_args(argv)
        cfg = _config(args.config_file) if args.config_file else None
        if args.reverse:
            config_file = convert_to_mmdet(args.checkpoint, args.output, cfg)
            print(f"Wrote {args.output} and {config_file}, mmdetection's config for it.")
            return
        config_file = convert_from_mmdet(args.checkpoint, args.output, cfg) or args.config_file
    print(f"Wrote {args.output}. Evaluate it:")
    print(
        f"  {command('train')} --eval-only --config-file {config_file} MODEL.WEIGHTS {args.output}"
    )


def _config(file: str) -> CfgNode:
    cfg = get_cfg()
    add_ghm_config(cfg)
    merge_config_file(cfg, locate_config_file(file))
    return cfg
