"""The command line of train_net.py, and the parts of it that other tools share."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import get_cfg

from ghm_d2.errors import UserError, cannot, command

from .python_config import NODES

CONFIG_FILE_HELP = "a YAML or Python file (a Python file is executed: use only files from people "
CONFIG_FILE_HELP += "you trust), or the name of a file in configs/"
_FLAGS = ("-h", "--help", "--eval-only", "--resume", "--overwrite", "--trust-checkpoint")


@dataclass(frozen=True)
class Command:
    """What the command line of train_net.py asks for.

    Attributes:
        config_file: path of a .yaml or .py file.
        overrides: changes to the config; see `engine.setup.load_config`.
        datasets: values of `--dataset`, NAME=annotations.json,image_dir or NAME=FOLDER.
        eval_only: evaluate, do not train.
        resume: go on from the last checkpoint.
        overwrite: train even if the output folder holds a finished training, and replace it.
        trusted: whether checkpoints may run code.
        restarted: whether torchrun has started this job again after a failure.
        words: the whole command line as it was given, without the program's name.
    """

    config_file: str
    overrides: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    eval_only: bool = False
    resume: bool = False
    overwrite: bool = False
    trusted: bool = False
    restarted: bool = False
    words: tuple[str, ...] = ()


class Parser(argparse.ArgumentParser):
    """Raises `UserError` where argparse prints its usage and exits."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the options).")


def train_program() -> str:
    """What the user runs to train: the installed command or the script."""
    return command("train")


def _parser() -> Parser:
    parser = Parser(
        prog=train_program(),
        usage="%(prog)s --config-file FILE [options] [KEY VALUE ...]",
        description="Train, resume or evaluate a detector. KEY VALUE pairs (KEY=VALUE in a Python "
        "config) override the config and may stand before or after the options.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config-file", metavar="FILE", required=True, help=CONFIG_FILE_HELP)
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    add("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    add("--overwrite", action="store_true", help="replace a finished training in OUTPUT_DIR")
    add(
        "--trust-checkpoint",
        action="store_true",
        help="open checkpoints that could run code (only files from people you trust)",
    )
    add_dataset_option(
        parser,
        "register COCO-format data, or a folder with labels of any tool; the first is trained on "
        "and the others are tested on, unless DATASETS.TRAIN and DATASETS.TEST say otherwise "
        "(repeatable)",
    )
    add_process_options(parser)
    return parser


def add_dataset_option(parser: argparse.ArgumentParser, about: str) -> None:
    """`--dataset`, with what it is for in this command."""
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME=annotations.json,image_dir|NAME=FOLDER",
        help=about,
    )


def add_output_option(parser: argparse.ArgumentParser, about: str) -> None:
    """`--output` for a folder, with what it is for; `--output-dir` is the former name."""
    parser.add_argument(
        "--output", "--output-dir", type=Path, required=True, metavar="DIR", help=about
    )


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """The options of Detectron2's launcher."""
    add = parser.add_argument
    add("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine (1)")
    add("--num-machines", type=int, default=1, metavar="N", help="number of machines (1)")
    add("--machine-rank", type=int, default=0, metavar="R", help="index of this machine (0)")
    add("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of machine 0 (auto)")


def _split(
    argv: Sequence[str], flags: Sequence[str], lists: Sequence[str], python: bool
) -> tuple[list[str], list[str]]:
    """Separate the options from the KEY VALUE pairs, wherever they stand.

    argparse alone either swallows every option after the first pair (REMAINDER, which
    Detectron2 uses) or takes values such as -1e-3 for options.
    """
    options: list[str] = []
    pairs: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") and token != "-h":
            pairs.append(token)
            continue
        options.append(token)
        if token not in flags and "=" not in token and rest:
            options.append(rest.pop(0))
        if token == "--dataset":  # more than one may follow
            while rest and _is_dataset(rest[0], python):
                options += ["--dataset", rest.pop(0)]
        if token in lists:
            while rest and not rest[0].startswith("-") and not _is_key(rest[0], python):
                options.append(rest.pop(0))
    return options, pairs


def _is_dataset(word: str, python: bool) -> bool:
    # No YAML key holds a "="; KEY=VALUE does, and every key of a Python config has a dot.
    name, separator, _ = word.partition("=")
    return bool(separator) and not word.startswith("-") and not (python and "." in name)


def _is_key(word: str, python: bool) -> bool:
    known = NODES if python and "=" in word else get_cfg()
    return word.partition(".")[0] in known


def make_output_folder(folder: Path) -> None:
    """Makes the folder that `--output` names, and those above it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot("made", f"--output {folder}", error) from error


def parse_arguments(
    argv: Sequence[str] | None,
    parser: Parser | None = None,
    *,
    flags: Sequence[str] = _FLAGS,
    lists: Sequence[str] = (),
    python: bool | None = None,
) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv: the arguments without the program's name; None: `sys.argv[1:]`.
        parser: the options of another program; those of train_net.py by default.
        flags: options without a value; all others take one word.
        lists: options that take more than one; the first word that is a key ends the values.
        python: whether the config file is a Python one; by default, whether a word ends in .py.

    Returns:
        A namespace with one attribute for each option; `dataset` is a list of strings and `opts`
        the flat list of KEY VALUE pairs, or of KEY=VALUE where the config file is a .py file.

    Raises:
        UserError: an unknown option, a missing or wrong value, or a key without a value.
    """
    argv = sys.argv[1:] if argv is None else argv
    if python is None:
        python = any(word.endswith(".py") for word in argv)
    options, pairs = _split(argv, flags, lists, python)
    args = (parser or _parser()).parse_args(options)
    if len(pairs) % 2 and not python:
        raise UserError(
            f"the KEY VALUE pairs have an odd number of words ({len(pairs)}), so one key has no "
            f"value: {' '.join(pairs)}"
        )
    args.opts = pairs
    return args
