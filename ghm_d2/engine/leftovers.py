"""What a killed training has left behind in OUTPUT_DIR, put right before it goes on."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ghm_d2.analysis.hook import FILE as STATISTICS_FILE

__all__ = ["cut_undone_rows", "cut_logs"]

logger = logging.getLogger(__name__)


def cut_logs(output: str, start_iter: int) -> None:
    """Takes from the logs what the iterations from `start_iter` on, now done again, had written.

    Args:
        output: OUTPUT_DIR.
        start_iter: the first iteration of this run.
    """

    def is_undone(row: dict[str, Any]) -> bool:
        # The evaluation at the end of a training counts as the iteration after its last one.
        return row["iteration"] > start_iter - ("total_loss" in row)

    cut_undone_rows(Path(output, "metrics.json"), is_undone)
    cut_undone_rows(Path(output, STATISTICS_FILE), lambda row: row["iteration"] >= start_iter)


def cut_undone_rows(file: Path, is_undone: Callable[[dict[str, Any]], bool]) -> None:
    """Cuts the last lines of a file of JSON lines off, in place, since a writer may hold it open.

    Args:
        file: nothing is done where it does not exist.
        is_undone: whether a row goes; those before the first one that stays are not looked at. A
            last line that is no JSON was being written when the process was killed, and goes too.
    """
    if not file.exists():
        return
    lines = file.read_bytes().splitlines(keepends=True)
    kept = len(lines)
    while kept and _goes(lines[kept - 1], is_undone):
        kept -= 1
    if kept < len(lines):
        os.truncate(file, sum(map(len, lines[:kept])))
        logger.info(
            "%s: removed %d row(s) of iterations after the checkpoint; they are done again",
            file,
            len(lines) - kept,
        )


def _goes(line: bytes, is_undone: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return is_undone(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return True
