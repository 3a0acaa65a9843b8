"""Convert ImageNet weights (ResNet, ResNeXt) from torchvision's layout to Detectron2's format."""

from collections.abc import Sequence

from ghm_d2.checkpoint.torchvision import convert_torchvision
from ghm_d2.engine.arguments import Parser
from ghm_d2.errors import exits_with_one_sentence


def main(argv: Sequence[str] | None = None) -> None:
    """Convert; print the keys that the config needs."""
    parser = Parser(prog="ghm-d2 convert-torchvision", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "weights", help="file or URL of a state dict, or of a checkpoint that holds one"
    )
    parser.add_argument("output", help="file to write, .pkl or .pth")
    with exits_with_one_sentence(parser.prog):
        args = parser.parse_args(argv)
        needed = convert_torchvision(args.weights, args.output)
    print(f"Wrote {args.output}. Put this into your config or at the end of the command line:")
    print("  " + " ".join(f'{key} "{value}"' for key, value in needed.items()))
