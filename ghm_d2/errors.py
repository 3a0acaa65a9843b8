"""The one exception type that scripts turn into a single sentence instead of a traceback."""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["USER_ERROR", "UserError", "command", "exits_with_one_sentence", "program_name"]

USER_ERROR = 2  # exit code, as argparse has it


class UserError(ValueError):
    """A mistake in a command, config or data set; its message is one sentence with the way out."""

    exit_code = USER_ERROR


def program_name(script: str, command: str) -> str:
    """What the user runs: the ``command`` that an installation offers, or else the ``script``."""
    return command if Path(sys.argv[0]).stem == command else script


def command(name: str) -> str:
    """How the reader of a message runs a command of the ``ghm-d2`` program.

    Without an installation, as in a plain checkout, there is ``python -m ghm_d2`` alone.
    """
    installed = Path(sys.argv[0]).stem == "ghm-d2" or shutil.which("ghm-d2") is not None
    return f"{'ghm-d2' if installed else 'python -m ghm_d2'} {name}"


@contextlib.contextmanager
def exits_with_one_sentence(program: str) -> Iterator[None]:
    """Turns a mistake of the user into one sentence on stderr and its exit code (2).

    Args:
        program: name of the script, with which the sentence begins.

    Raises:
        SystemExit: where the block raised a :class:`UserError`.
    """
    try:
        yield
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
