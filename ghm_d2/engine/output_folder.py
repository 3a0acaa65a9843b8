"""Protects OUTPUT_DIR: one training at a time, no result replaced unasked, no folder lost."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from detectron2.engine import HookBase

from ghm_d2.errors import UserError, cannot, reason
from ghm_d2.run_folder import FINAL_CHECKPOINT

_LOCK = ".training.lock"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps every other training out of a folder, which is made if missing.

    The lock ends with the process, however that ends, so that nobody has to remove a stale one. On
    a file system without locks the folder is not protected.

    Raises:
        UserError: another process trains into it, or it cannot be written.
    """
    path = os.path.join(folder, _LOCK)
    try:
        os.makedirs(folder, exist_ok=True)
        # Child processes do not inherit what open() opens: those that load images can outlive a
        # killed training, and would hold the lock.
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise cannot("written", f"the output folder {folder}", error) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f"another training writes into {folder} ({_holder(file.read())}): end it first, or "
                "give another output folder."
            ) from None
        except OSError:
            pass
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['process']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "which is starting"


def refuse_finished(folder: str | Path, way_on: str) -> None:
    """Raises an error if a new training would replace a finished one.

    Args:
        folder: its output folder.
        way_on: the options that train it further, for the message.

    Raises:
        UserError: the folder holds the result of another training.
    """
    if os.path.exists(os.path.join(folder, FINAL_CHECKPOINT)):
        raise UserError(
            f"{folder} holds a finished training ({FINAL_CHECKPOINT}), which this one would "
            "replace: give another output folder, --overwrite to replace it, or "
            f"{way_on} to train it further."
        )


class FolderIsThere(HookBase):
    """Notices in the main process, before a checkpoint, that the folder was deleted or moved.

    Otherwise what is appended to open files would be lost silently, and the next checkpoint would
    be alone in a new folder.
    """

    def __init__(self, folder: str) -> None:
        """
        Args:
            folder: the output folder.
        """
        self._folder = folder
        self._inode = -1

    def before_train(self) -> None:
        """Notes which folder it is."""
        self._inode = os.stat(self._folder).st_ino

    def after_step(self) -> None:
        """
        Raises:
            UserError: the folder is gone, or another one has its name.
        """
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.stat(self._folder).st_ino == self._inode:
                return
        raise UserError(
            f"the output folder {self._folder} was deleted or moved away after it was opened, and "
            "with it what this training had written; it stopped after "
            f"{self.trainer.iter + 1} iterations."
        )


@contextlib.contextmanager
def disk_errors(folder: str | Path) -> Iterator[None]:
    """Turns errors such as a full disk into a `UserError`, whichever code was writing.

    Raises:
        UserError: in place of the error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        name = error.filename if isinstance(error.filename, str) else folder
        raise UserError(
            f"{name} cannot be written ({reason(error)}). Earlier checkpoints are intact: continue "
            "with --resume once there is room."
        ) from error
    finally:
        _close_logs()


def _close_logs() -> None:
    """Closes logs that cannot be flushed; at exit, a full disk would make them print errors."""
    for name in ("detectron2", "fvcore", "ghm_d2"):
        for handler in logging.getLogger(name).handlers:
            if getattr(handler, "stream", None) not in (None, sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    handler.stream.flush()
                    continue
                with contextlib.suppress(OSError, ValueError):
                    handler.stream.close()


def is_disk_error(error: BaseException | None) -> bool:
    """Whether `error` is one of those that :func:`disk_errors` turns into a `UserError`."""
    return isinstance(error, OSError) and error.errno in _DISK


def exists_and_is_newer(path: str | Path, other: str | Path) -> bool:
    """Whether a file is there and was written no earlier than another one."""
    try:
        return os.stat(path).st_mtime_ns >= os.stat(other).st_mtime_ns
    except OSError:
        return False
