"""Processes that load images: they outlive the signals that end a job, and may not hang."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from ghm_d2.errors import UserError

# Sent by clusters, closed terminals and users (Ctrl-C) to end a job.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
TIMEOUT = 600  # seconds that a batch may take
_GRACE = 60  # seconds that a worker lives on after a signal


def outlive_signals(worker_id: int) -> None:
    """Lets a worker of a DataLoader outlive `ENDING_SIGNALS` until its training has stopped.

    A cluster that ends a job signals all of its processes, as a terminal does. The training still
    has to finish its step and to write a checkpoint, and would fail if its workers died first. They
    end with the training, or by an alarm after `_GRACE` seconds if the training does not end.

    Args:
        worker_id: not used; DataLoader passes it.
    """

    def wait(*_: Any) -> None:
        signal.alarm(_GRACE)

    for number in ENDING_SIGNALS:
        signal.signal(number, wait)


def watch(loader: DataLoader) -> DataLoader:
    """Gives a loader that was built elsewhere the same signal handlers and time-out."""
    if loader.num_workers:
        loader.timeout = TIMEOUT
        init = loader.worker_init_fn
        loader.worker_init_fn = outlive_signals if init is None else _Both(init)
    return loader


class _Both:
    """Runs another `worker_init_fn` first; unlike a closure, it can be pickled."""

    def __init__(self, first: Any) -> None:
        self._first = first

    def __call__(self, worker_id: int) -> None:
        self._first(worker_id)
        outlive_signals(worker_id)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Wraps reading from a loader, to explain its time-out.

    Raises:
        UserError: a batch did not come within :data:`TIMEOUT`.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader timed out"):
            raise
        raise UserError(
            f"the processes that load images delivered none within {TIMEOUT} seconds: check the "
            "disk or network that holds the images, or load them in this process with "
            "DATALOADER.NUM_WORKERS 0 (num_workers=0 in a Python config) to see where it hangs."
        ) from error
