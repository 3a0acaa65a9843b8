"""What is printed before the first iteration: a screen at most, while log.txt has all of it."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

_LOGGERS = ("detectron2", "fvcore", "ghm_d2")


class _FirstLine(logging.Formatter):
    """Cuts another formatter's output to its first line and a count of the others."""

    def __init__(self, whole: logging.Formatter | None, file: str) -> None:
        super().__init__()
        self._whole, self._file = whole or logging.Formatter(), file

    def format(self, record: logging.LogRecord) -> str:
        first, *more = self._whole.format(record).split("\n")
        return f"{first.rstrip(' :')} ({len(more)} more lines in {self._file})" if more else first


def _is_shown(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.WARNING or record.name.startswith("ghm_d2"):
        return True
    return record.getMessage().startswith("Rank of current process")  # and how many there are


@contextlib.contextmanager
def brief_terminal(folder: str) -> Iterator[None]:
    """Limits the terminal to the first lines of warnings and of this package's messages.

    The whole config and the model, which Detectron2 logs, would push them off the screen.

    Args:
        folder: OUTPUT_DIR as the config spells it; the log there has everything.
    """
    # The arguments must equal those in Detectron2's default_setup and in setup_ghm_logger:
    # setup_logger caches by them, and with others would add a second set of handlers.
    rank = comm.get_rank()
    setup_logger(folder, distributed_rank=rank, name="fvcore")
    setup_logger(folder, distributed_rank=rank)
    setup_logger(folder, distributed_rank=rank, name="ghm_d2")
    handlers = [
        handler
        for name in _LOGGERS
        for handler in logging.getLogger(name).handlers
        if getattr(handler, "stream", None) is sys.stdout
    ]
    formatters = [handler.formatter for handler in handlers]
    for handler in handlers:
        handler.addFilter(_is_shown)
        handler.setFormatter(_FirstLine(handler.formatter, os.path.join(folder, "log.txt")))
    # When Detectron2 collects the environment without a GPU, PyTorch warns of each compiler.
    compiler = logging.getLogger("torch.utils.cpp_extension")
    level = compiler.level
    compiler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        compiler.setLevel(level)
        for handler, formatter in zip(handlers, formatters, strict=True):
            handler.removeFilter(_is_shown)
            handler.setFormatter(formatter)
