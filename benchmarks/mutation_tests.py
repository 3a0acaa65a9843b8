"""Tests of mutation.py: which of them run a line, how long they take, and one run of some."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import coverage
import pytest
from mutants import Mutant
from mutation_process import run_forked

__all__ = ["Baseline", "Collected", "collect_and_call", "measure_baseline", "run_items"]


class Collected:
    """A pytest plugin that calls a function with the collected tests instead of running them."""

    def __init__(self, call: Callable[[list[pytest.Item]], Any]) -> None:
        self.call = call
        self.items: list[pytest.Item] = []
        self.collected = False
        self.result: Any = None

    @classmethod
    def of(cls, items: list[pytest.Item]) -> "Collected":
        """Tests that have been collected already."""
        plugin = cls(lambda _: None)
        plugin.items, plugin.collected = items, True
        return plugin

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Pytest's hook."""
        if session.testsfailed:
            return True  # a file that can't be imported
        self.items, self.collected = session.items, True
        self.result = self.call(session.items)
        return True


def collect_and_call(arguments: list[str], call: Callable[[list[pytest.Item]], Any]) -> None:
    """Collects tests and calls ``call`` with them; ends the process where that fails."""
    status = pytest.main(arguments, plugins=[Collected(call)])
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"the tests could not be collected: {status}")


class _Watcher:
    """A pytest plugin that remembers which test failed."""

    def __init__(self) -> None:
        self.failed: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Pytest's hook."""
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def run_items(items: Sequence[pytest.Item], tests: Sequence[str]) -> str | None:
    """Runs the named tests in this order until one fails; returns its name.

    A test whose parameters come from the changed code may have another name: it is not run.
    """
    by_name = {item.nodeid: item for item in items}
    chosen = [by_name[name] for name in tests if name in by_name]
    manager = items[0].config.pluginmanager
    watcher = _Watcher()
    manager.register(watcher)
    try:
        for item, following in zip(chosen, [*chosen[1:], None], strict=True):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if watcher.failed:
                return watcher.failed
    finally:
        manager.unregister(watcher)
    return None


class Baseline:
    """What the tests do on the unchanged code.

    Attributes:
        seconds: of CPU, for each test.
    """

    def __init__(self, seconds: dict[str, float], lines: dict[str, dict[str, list[str]]]) -> None:
        """
        Args:
            seconds: see above.
            lines: file name to line number (as text) to the tests that run it.
        """
        self.seconds = seconds
        self._lines = lines
        self._kills: dict[str, int] = {}

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that run its statement, those first that kill many in little time.

        Of code that runs at import, those that run anything of its file.
        """
        lines = self._lines.get(mutant.file, {})
        first, last = mutant.lines
        wanted = lines if mutant.at_import else map(str, range(first, last + 1))
        tests = {test for line in wanted for test in lines.get(line, ())}
        return sorted(tests, key=lambda t: (self.seconds[t] + 1e-3) / (1 + self._kills.get(t, 0)))

    def note_kill(self, test: str | None) -> None:
        """Moves ``test`` forward."""
        if test is not None:
            self._kills[test] = self._kills.get(test, 0) + 1


def measure_baseline(arguments: list[str], package: Path, folder: Path, outcomes: Any) -> Baseline:
    """Runs all tests once, with the lines that each of them runs; kept in ``folder``."""
    file = folder / "baseline.json"
    state = [outcomes.tests, outcomes.sources, arguments]
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("state") != state:
        print("running every test once ...", file=sys.stderr, flush=True)

        def measure(items: list[pytest.Item]) -> None:
            seconds, lines = _measure(items, package)
            file.write_text(json.dumps({"state": state, "seconds": seconds, "lines": lines}))

        run_forked(lambda: collect_and_call(arguments, measure), None)
        kept = json.loads(file.read_text())
    baseline = Baseline(kept["seconds"], kept["lines"])
    for record in outcomes.by_key.values():
        if record["by"] in kept["seconds"]:
            baseline.note_kill(record["by"])
    return baseline


def _measure(items: Sequence[pytest.Item], package: Path) -> tuple[dict, dict]:
    cover = coverage.Coverage(data_file=None, include=[f"{package}/*"])
    seconds: dict[str, float] = {}
    cover.start()
    for item in items:
        _clear_caches()  # or only the first test would run what is kept
        cover.switch_context(item.nodeid)
        start = time.process_time()
        failed = run_items(items, [item.nodeid])
        seconds[item.nodeid] = round(time.process_time() - start, 4)
        if failed:
            raise SystemExit(f"{failed} fails on the unchanged code: no mutant can be judged")
    cover.stop()
    data = cover.get_data()
    lines: dict[str, dict[str, list[str]]] = {}
    for name in data.measured_files():
        contexts = data.contexts_by_lineno(name)
        lines[Path(name).name] = {
            str(line): sorted(test for test in tests if test) for line, tests in contexts.items()
        }
    return seconds, lines


def _clear_caches() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("ghm_d2.losses"):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
