"""The estimate of a training's length is right, and is said once."""

import logging
from types import SimpleNamespace

import pytest

from ghm_d2.engine import length


@pytest.mark.parametrize(("start", "left"), [(0, "94 iterations"), (93, "1 iteration")])
def test_the_estimate(monkeypatch, caplog, start, left):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    caplog.set_level(logging.INFO, "ghm_d2")
    hook, clock = length.LengthEstimate(), SimpleNamespace(now=0.0)
    monkeypatch.setattr(length.time, "perf_counter", lambda: clock.now)
    for iteration in range(start, 100):
        clock.now += 30 if iteration == start else 3  # the first step takes longer
        hook.trainer = SimpleNamespace(iter=iteration, start_iter=start, max_iter=100)
        hook.after_step()
    (said,) = [record.getMessage() for record in caplog.records]
    time = "5 min" if start == 0 else "5 s"
    assert said.startswith(f"the {left} left will take about {time} (3 s each")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "5 s"), (62, "60 s"), (100, "2 min"), (5000, "83 min"), (9000, "2.5 h"), (1e5, "28 h")],
)
def test_in_words(seconds, words):
    assert length.in_words(seconds) == words
