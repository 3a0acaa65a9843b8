"""How long a training will take, said as soon as a few of its steps are known."""

import logging
import time

from detectron2.engine import HookBase

from ghm_d2.errors import counted

logger = logging.getLogger(__name__)

_FIRST, _LAST = 2, 6  # steps that are timed; the first ones allocate and compile


class LengthEstimate(HookBase):
    """Logs once how long the steps that are left will take."""

    def after_step(self) -> None:
        """Measures, or says what was measured."""
        done = self.trainer.iter + 1 - self.trainer.start_iter
        if done == _FIRST:
            self._start = time.perf_counter()
        elif done == _LAST:
            seconds = (time.perf_counter() - self._start) / (_LAST - _FIRST)
            left = self.trainer.max_iter - self.trainer.iter - 1
            logger.info(
                "the %s left will take about %s (%.2g s each; evaluations not counted)",
                counted(left, "iteration"),
                in_words(left * seconds),
                seconds,
            )


def in_words(seconds: float) -> str:
    """Seconds, minutes or hours, rounded as an estimate is."""
    if seconds < 90:
        return f"{max(5, round(seconds / 5) * 5)} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36000 else f"{round(seconds / 3600)} h"
