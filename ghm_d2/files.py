"""Files that are there whole or not at all, and JSON that strangers or killed processes left."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ghm_d2.errors import UserError, cannot, shown

__all__ = ["PART", "parse_json", "read_json", "read_text", "whole_file", "write_json", "write_text"]

PART = ".part"  # end of the name of a file that is being written


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name once it is complete and on the disk.

    It is written beside its place as `path` + `PART`, which only a killed process leaves behind.

    Raises:
        UserError: it cannot be written; a file that was there before is still there.
    """
    part = f"{path}{PART}"
    try:
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        # torch.save hides the error of the file behind a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise cannot("written", path, cause) from error
    finally:
        if os.path.isfile(part):
            os.unlink(part)


def _sync_folder(folder: str) -> None:
    """Makes a change of names outlive a power failure, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Writes text in UTF-8, whole or not at all; what has no encoding becomes an escape.

    Raises:
        UserError: the file cannot be written.
    """
    with whole_file(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """Writes JSON, whole or not at all.

    Raises:
        UserError: the file cannot be written.
        ValueError: `content` holds NaN or infinity, which JSON does not know.
    """
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def read_text(path: str | Path) -> str:
    """Reads text in UTF-8.

    Raises:
        UserError: the file cannot be read, or is no such text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise cannot("read", path, error) from error


def read_json(path: str | Path) -> Any:
    """Reads JSON.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a complete JSON file ({shown(error)}).") from error


def parse_json(text: str) -> Any:
    """Parses JSON.

    Raises:
        ValueError: the text is none, or nested so deeply that Python's parser gives up.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
