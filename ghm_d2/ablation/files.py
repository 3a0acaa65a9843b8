"""JSON files that are there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["read_json", "write_json"]


def read_json(file: Path) -> Any:
    """What the file holds, or None where it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(file: Path, content: Any) -> None:
    """Write `content`; a reader, or a process killed meanwhile, never sees half of it.

    Raises:
        ValueError: `content` holds NaN or infinity, which JSON does not know.
    """
    text = json.dumps(content, indent=1, allow_nan=False)
    new = file.with_name(f".{file.name}.{os.getpid()}")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(file)
