"""What the processes that load images do when the job is to end."""

import signal
from typing import Any

__all__ = ["outlive_sigterm"]

_GRACE = 60  # seconds


def outlive_sigterm(worker_id: int) -> None:
    """Lets a worker of a DataLoader live on after SIGTERM, until its training has stopped.

    A cluster that ends a job signals all of its processes. The training still has to finish its
    step and to write a checkpoint, and would fail if its workers died first. They end with it;
    the alarm is for a training that does not end.

    Args:
        worker_id: not used; a DataLoader gives it.
    """

    def wait(*_: Any) -> None:
        signal.alarm(_GRACE)

    signal.signal(signal.SIGTERM, wait)
