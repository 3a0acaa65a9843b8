"""Logs of one JSON object per line, which a training extends and a resumed one cuts first."""

import json
import logging
import os
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from ghm_d2.errors import cannot, counted

logger = logging.getLogger(__name__)


def cut_rows(file: Path, is_undone: Callable[[dict[str, Any]], bool]) -> None:
    """Removes rows at the end of a log, in place, because a writer may hold the file open.

    Args:
        file: need not exist.
        is_undone: whether the iteration of a row is done again; damaged lines at the end go too.

    Raises:
        UserError: it cannot be read or written.
    """

    def goes(line: bytes) -> bool:
        try:
            return is_undone(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            return True  # the process was killed in the middle of this line

    if not file.exists():
        return
    try:
        lines = file.read_bytes().splitlines(keepends=True)
        removed = len(list(takewhile(goes, reversed(lines))))
        if removed:
            os.truncate(file, sum(map(len, lines[:-removed])))
    except OSError as error:
        raise cannot("cut", file, error) from error
    if removed:
        message = "%s: removed %s of iterations after the checkpoint, which are done again"
        logger.info(message, file, counted(removed, "row"))
