"""Files that exist whole or not at all, and JSON that strangers or killed processes left."""

import contextlib
import json
import os
import resource
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ghm_d2.errors import UserError, cannot, reason, shown

_SILENCE = 60  # seconds
_LARGEST = 20 * 10**9  # bytes

PART = ".part"  # end of the name of a file that is being written


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name once it is complete and on the disk.

    Until then it is called `path` + `PART`, which only a killed process leaves behind.

    Raises:
        UserError: it cannot be written; a file of that name from before is still there.
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
    """Makes a renaming survive a power failure, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Writes text in UTF-8, whole or not at all; a character that has no encoding is escaped.

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


def open_regular(path: str | Path) -> IO[bytes]:
    """Opens a regular file for reading: a pipe would block, and a device has no end.

    Raises:
        UserError: it is something else.
        OSError: it cannot be opened.
    """
    # Otherwise a pipe would wait for its writer.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} cannot be read (it is not a regular file).")
    return file


def read_text(path: str | Path) -> str:
    """Reads text in UTF-8.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8")
    except (OSError, UnicodeError) as error:
        raise cannot("read", path, error) from error


def read_json(path: str | Path) -> Any:
    """Reads JSON.

    Raises:
        UserError: the file cannot be read, or is not JSON.
    """
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a complete JSON file ({shown(error)}).") from error


@contextlib.contextmanager
def file_to_blame(path: str | Path, what: str) -> Iterator[None]:
    """Turns any error of the block into "PATH WHAT (reason).", blaming the file's content.

    What a stranger may have written can make anything fail, in whatever way.

    Raises:
        UserError: anything was raised within.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise UserError(f"{path} {what} ({kind}: {reason(error)}).") from error


@contextlib.contextmanager
def bounded_downloads() -> Iterator[None]:
    """Makes a server's silence of a minute, and a file of more than 20 GB, an error.

    For downloads of iopath, which knows neither: it waits, and fills the disk, without end.
    """
    silence, (most, hard) = socket.getdefaulttimeout(), resource.getrlimit(resource.RLIMIT_FSIZE)
    socket.setdefaulttimeout(_SILENCE)
    least = [x for x in (_LARGEST, most) if x != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(least), hard))
    try:
        yield
    finally:
        socket.setdefaulttimeout(silence)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))


def parse_json(text: str) -> Any:
    """Parses JSON.

    Raises:
        ValueError: it is not JSON, or nested so deeply that Python's parser gives up.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
