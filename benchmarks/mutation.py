"""Mutation testing of the losses: which small changes of ``ghm_d2.losses`` do its tests notice?

    make mutation                  # or: python benchmarks/mutation.py --sample 250 --seed 1

A mutant is the source with one change (see mutants.py), without the Triton kernels, which are no
Python at run time. It is killed when one of the loss tests that run its line fails. Every test file
is collected once; each mutant is a forked process whose function gets the mutated code, so that it
costs little beyond its tests. What runs at import (defaults, constants, decorators) is imported
again in its process. Outcomes are appended to ``DIR/outcomes.jsonl`` as they come, and after a kill
the same command goes on; a survivor is tried again once a test file has changed, everything of a
source file once that has changed. Survivors that no test can kill have their reason in
``mutation_reasons.json`` beside the results. Needs Linux and Python 3.11.

Hypothesis draws few examples and does not shrink; left out are tests of torch.compile, of several
processes, of the CUDA kernels, and of whole models.
"""

import argparse
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked process has no threads but its own

import hypothesis
import pytest
import torch
from measure import environment
from mutants import Mutant, all_mutants, difference, mutated_source, sample
from mutation_process import patch_function, replace_module, run_forked
from mutation_report import write_report
from mutation_tests import Baseline, Collected, collect_and_call, measure_baseline, run_items
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ROOT / "ghm_d2" / "losses"
NOT_PYTHON = {"triton_kernels.py"}
TESTS = [
    "test_ghm_c", "test_ghm_r", "test_loss_golden", "test_loss_misuse", "test_loss_state",
    "test_baselines", "test_exact_density", "test_checks", "test_fused",
]  # fmt: skip
LEFT_OUT = "not (triton or compile or processes or retinanet or rpn or box_head or baselines_keep)"
OPTIONS = [
    "-o", "addopts=", "-m", "not slow",
    "-p", "no:terminal", "-p", "no:cacheprovider", "-s", "--hypothesis-profile=mutation",
]  # fmt: skip


class Outcomes:
    """What is known of each mutant, on disk."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.by_key = {record["key"]: record for record in map(json.loads, lines)}
        tests = b"".join(path.read_bytes() for path in test_files())
        self.tests = hashlib.sha256(tests).hexdigest()[:12]
        self.sources = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            for path in LOSSES.glob("*.py")
        }

    def of(self, mutant: Mutant) -> dict[str, Any] | None:
        """The outcome of ``mutant``, unless what it stands on has changed."""
        record = self.by_key.get(mutant.key)
        if record is None or record["source"] != self.sources[mutant.file]:
            return None
        stale = record["outcome"] == "survived" and record["tests"] != self.tests
        return None if stale else record

    def add(self, mutant: Mutant, outcome: dict[str, Any]) -> None:
        before = (LOSSES / mutant.file).read_text()
        old, new = difference(before, mutated_source(before, mutant))
        record = {
            "key": mutant.key,
            "line": mutant.lines[0],
            "family": mutant.family,
            "before": old,
            "after": new,
            **outcome,
            "source": self.sources[mutant.file],
            "tests": self.tests,
        }
        self.by_key[mutant.key] = record
        with self.file.open("a") as out:
            out.write(json.dumps(record) + "\n")


def test_files() -> list[Path]:
    """The test files that are run, and what they share."""
    names = [*TESTS, "conftest", "reference"]
    return [ROOT / "tests" / f"{name}.py" for name in names]


def pytest_arguments() -> list[str]:
    """Collects the tests that take part."""
    return [*OPTIONS, "-k", LEFT_OUT, *(f"tests/{name}.py" for name in TESTS)]


def run_source(
    source: str, path: Path, scope: str, tests: list[str], collected: Collected | None, limit: float
) -> dict[str, Any]:
    """Runs the tests in a forked process where ``source`` stands for what is in ``path``."""

    def work() -> str | None:
        if collected is not None:
            patch_function(source, path, scope)
            return run_items(collected.items, tests)
        replace_module(source, path)
        plugin = Collected(lambda items: run_items(items, tests))
        status = pytest.main(pytest_arguments(), plugins=[plugin])
        broken = not plugin.collected or status == pytest.ExitCode.INTERNAL_ERROR
        return f"at import ({status.name})" if broken else plugin.result

    outcome = run_forked(work, limit + (0 if collected else 60))
    return {**outcome, "number_of_tests": len(tests)}


def run_mutant(mutant: Mutant, collected: Collected | None, baseline: Baseline) -> dict[str, Any]:
    """Runs the tests of one mutant."""
    path = LOSSES / mutant.file
    tests = baseline.tests_of(mutant)
    if not tests:
        return {"outcome": "survived", "by": None, "seconds": 0.0, "number_of_tests": 0}
    source = mutated_source(path.read_text(), mutant)
    try:
        compile(source, str(path), "exec")
    except SyntaxError:  # such as ** for the * before keyword-only parameters
        return {"outcome": "invalid", "by": None, "seconds": 0.0, "number_of_tests": 0}
    limit = 20 + 5 * sum(baseline.seconds[test] for test in tests)
    return run_source(source, path, mutant.scope, tests, collected, limit)


def check_that_unchanged_code_survives(collected: Collected | None, baseline: Baseline) -> None:
    """Otherwise a kill would say nothing.

    Raises:
        SystemExit: a test fails in this order on a module that was exchanged for itself.
    """
    path = LOSSES / "functional.py"
    tests = sorted(baseline.seconds, key=baseline.seconds.get)
    result = run_source(path.read_text(), path, "sigmoid_examples", tests, collected, 600)
    if result["outcome"] != "survived":
        raise SystemExit(f"unchanged code does not survive: {result}")


def run_all(
    mutants: list[Mutant], collected: Collected | None, baseline: Baseline, outcomes: Outcomes
) -> None:
    """Runs those that have no outcome yet, with progress."""
    chosen = [m for m in mutants if m.at_import == (collected is None)]
    if any(outcomes.of(mutant) is None for mutant in chosen):
        check_that_unchanged_code_survives(collected, baseline)
    name = "code at import" if collected is None else "functions"
    bar = tqdm(chosen, desc=name, unit="mutant", mininterval=1, disable=not chosen)
    for mutant in bar:
        if outcomes.of(mutant) is None:
            result = run_mutant(mutant, collected, baseline)
            outcomes.add(mutant, result)
            baseline.note_kill(result["by"])
        known = [r["outcome"] for r in map(outcomes.of, chosen) if r is not None]
        bar.set_postfix(survived=known.count("survived"), done=len(known))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=250, help="how many mutants (250)")
    parser.add_argument("--seed", type=int, default=1, help="chooses them (1)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "output" / "mutation", help="outcomes so far lie there"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="for the report"
    )
    parser.add_argument("--fresh", action="store_true", help="forgets the outcomes so far")
    parser.add_argument("--report", action="store_true", help="writes the report of what is known")
    return parser.parse_args()


def all_of_losses(seed: int) -> Iterator[Mutant]:
    """The mutants of every file."""
    for path in sorted(LOSSES.glob("*.py")):
        if path.name not in NOT_PYTHON:
            yield from all_mutants(path, seed)


def main() -> None:
    """See the module's docstring."""
    args = parse_arguments()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    args.work.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        (args.work / "outcomes.jsonl").unlink(missing_ok=True)
    torch.set_num_threads(1)
    machine = environment(torch.device("cpu"))
    machine["versions"]["cosmic_ray"] = metadata.version("cosmic-ray")
    population = list(all_of_losses(args.seed))
    mutants = sample(population, args.sample, args.seed)
    outcomes = Outcomes(args.work / "outcomes.jsonl")
    if not args.report and any(outcomes.of(mutant) is None for mutant in mutants):
        hypothesis.settings.register_profile(
            "mutation",
            deadline=None,
            derandomize=True,
            database=None,
            max_examples=5,
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),  # of the time on a busy machine
        )
        # Once for all processes: everything but what is mutated.
        for name in ("detectron2.modeling", "detectron2.engine", "torchvision"):
            importlib.import_module(name)
        baseline = measure_baseline(pytest_arguments(), LOSSES, args.work, outcomes)

        def functions(items: list[pytest.Item]) -> None:
            run_all(mutants, Collected.of(items), baseline, outcomes)

        run_forked(lambda: collect_and_call(pytest_arguments(), functions), None)
        outcomes = Outcomes(args.work / "outcomes.jsonl")  # with what that process wrote
        run_all(mutants, None, baseline, outcomes)
    records = [outcomes.of(mutant) for mutant in mutants]
    write_report(args, machine, len(population), [r for r in records if r], args.results)


if __name__ == "__main__":
    main()
