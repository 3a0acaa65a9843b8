"""What the processes that load images do when the job is to end, and when they hang."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from ghm_d2.errors import UserError

# With which clusters, closed terminals and users end a job.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
TIMEOUT = 600  # seconds that a batch may take
_GRACE = 60  # seconds


def outlive_signals(worker_id: int) -> None:
    """Lets a worker of a DataLoader live on after these signals, until its training has stopped.

    A cluster that ends a job signals all of its processes, as a terminal does. The training still
    has to finish its step and to write a checkpoint, and would fail if its workers died first. They
    end with it; the alarm is for a training that does not end.

    Args:
        worker_id: not used; a DataLoader gives it.
    """

    def wait(*_: Any) -> None:
        signal.alarm(_GRACE)

    for number in ENDING_SIGNALS:
        signal.signal(number, wait)


def watch(loader: DataLoader) -> DataLoader:
    """Gives a loader that somebody else has built the same signals and time-out."""
    if loader.num_workers:
        loader.timeout = TIMEOUT
        init = loader.worker_init_fn
        loader.worker_init_fn = outlive_signals if init is None else _Both(init)
    return loader


class _Both:
    """A `worker_init_fn` after which a worker also outlives signals; it can be pickled."""

    def __init__(self, first: Any) -> None:
        self._first = first

    def __call__(self, worker_id: int) -> None:
        self._first(worker_id)
        outlive_signals(worker_id)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Stands around reading from a loader with a time-out.

    Raises:
        UserError: a batch did not come within :data:`TIMEOUT`.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader timed out"):
            raise
        raise UserError(
            f"no image came from the processes that load them within {TIMEOUT} seconds: look at "
            "the disk or network that holds the images, or load them in this process with "
            "DATALOADER.NUM_WORKERS 0 (num_workers=0 in a Python config) to see where it hangs."
        ) from error
