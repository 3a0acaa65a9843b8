"""Examine a batch that stopped a training: what became not finite first, level by level."""

import sys
from collections.abc import Sequence

import torch

from ghm_d2.engine.arguments import Parser
from ghm_d2.engine.diagnosis import diagnose
from ghm_d2.engine.replay import load_replay
from ghm_d2.engine.settings import read_settings
from ghm_d2.errors import UserError, exits_with_one_sentence, shown
from ghm_d2.files import file_to_blame


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; exit code 0 where all is finite, 1 where something is not, 2 for misuse."""
    parser = Parser(prog="ghm-d2 replay", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", help="the file in OUTPUT_DIR/not_finite that the training named")
    parser.add_argument("--device", help="cpu or cuda (that of the training, if there is one)")
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="build what a Python config names (only for files from people you trust)",
    )
    with exits_with_one_sentence(parser.prog):
        args = parser.parse_args(argv)
        replay = load_replay(args.file)
        device = args.device or read_settings(replay.load_config(args.trust_checkpoint)).device
        if device.startswith("cuda") and not torch.cuda.is_available():
            if args.device:
                raise UserError("--device cuda: no GPU found; leave it out.")
            device = "cpu"
            print("No GPU found: the replay runs on the CPU and may differ in the last digits.")
        # A traceback would exit with 1, which says that something is not finite.
        with file_to_blame(args.file, "cannot be replayed"):
            model = replay.build(device, args.trust_checkpoint)
            replay.state.restore(model)
            dtype = getattr(torch, replay.precision) if replay.precision else None
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
                found = diagnose(model, replay.batch, backward=True)
    summary = found.summary() or ("everything is finite" if found.finite else "see the last rows")
    for line in (replay.message, *found.table().split("\n"), summary):
        print(shown(line, 4000))
    sys.exit(0 if found.finite else 1)
