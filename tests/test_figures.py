"""Figures in README.md and docs/: a section that states one names the file that holds it.

A figure is a decimal number, or a number of per cent or milliseconds. Settings, formulas and
outputs stand in code and are no figures, and neither are versions.
"""

import json
import re
from collections.abc import Iterator
from functools import cache

import pytest
import yaml

from ghm_d2.ablation import TABLES
from tests.tiny import ROOT

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {str(file.relative_to(ROOT)): file.read_text("utf-8") for file in FILES}
PAGES = {k: v for k, v in PAGES.items() if not k.startswith(("docs/_build/", "docs/generated/"))}

RECORD = re.compile(r"benchmarks/results/[\w./-]*\w\.(?:md|json|txt)\b")
FENCE = re.compile(r"^ *```.*?^ *```", re.S | re.M)
PROJECTS = (
    "Python|PyTorch|Detectron2|mmdetection|Ultralytics|Numba|Runtime|OpenVINO|datumaro|globox"
    "|supervision|arXiv|Apache|timm"
)
NO_FIGURE = (
    re.compile(r"`[^`\n]*`|\]\([^)]*\)|https?://\S+"),  # code, addresses
    re.compile(rf"\b(?:{PROJECTS})[ :](?:to |and |[\d.]+[ ,])*\d+\.\d[\d.]*(?: to [\d.]+)?"),
    re.compile(r"\b95 %"),  # the level of every interval
)
FIGURE = re.compile(
    r"(?<![\w.^])[+-]?\d[\d,]*(?:\.\d+(?:e-?\d+)?(?![\w.]*\d)|(?= (?:and \d+ )?%)|(?= ms\b))"
)
# What other people published: 39.9 and 41.6 are the paper's, on test-dev.
PUBLISHED = {"39.9", "41.6"} | {
    str(value)
    for file in TABLES.values()
    for row in yaml.safe_load(file.read_text("utf-8"))["rows"]
    for value in (row.get("published") or {}).values()
}
PUBLISHED |= set(
    re.findall(r"\d\d\.\d", (ROOT / "ghm_d2" / "model_zoo" / "index.json").read_text("utf-8"))
)


def sections(page: str) -> list[str]:
    """What stands below each heading of a page, up to the next one."""
    return re.split(r"^#{1,6} ", FENCE.sub("", PAGES[page]), flags=re.M)


def figures(section: str) -> list[str]:
    for pattern in NO_FIGURE:
        section = pattern.sub(" ", section)
    return FIGURE.findall(section)


@cache
def numbers(record: str) -> tuple[set[str], list[float]]:
    """The numbers of a record: as they are written in a text, as they are in JSON."""
    text = (ROOT / record).read_text("utf-8")
    if not record.endswith(".json"):
        written = re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)
        return {*written, *(number.lstrip("+-") for number in written)}, []

    def walk(value: object) -> Iterator[float]:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from walk(item)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield value

    return set(), list(walk(json.loads(text)))


def holds(record: str, figure: str) -> bool:
    """Whether a record has a number that is the figure once it is rounded, or scaled to % or ms."""
    written, values = numbers(record)
    digits = len(figure.partition(".")[2])
    rounded = {f"{value * scale:.{digits}f}" for value in values for scale in (1, 100, 1000)}
    return figure in written or figure.lstrip("+") in rounded


@pytest.mark.parametrize("page", PAGES)
def test_a_figure_is_in_a_record_that_its_section_names(page):
    missing = []
    for section in sections(page):
        records = set(RECORD.findall(section))
        known = PUBLISHED if re.search(r"published|authors|paper", section) else set()
        lost = [
            figure
            for figure in figures(section)
            if figure not in known and not any(holds(record, figure) for record in records)
        ]
        if lost:
            missing.append((section.partition("\n")[0], lost, sorted(records)))
    assert not missing, page


def rows(text: str) -> Iterator[list[str]]:
    for line in re.findall(r"^\|(.*)\|$", text, re.M):
        yield [cell.strip() for cell in line.split("|")]


def rows_of_reports() -> Iterator[tuple[str, str, list[str]]]:
    """Rows of tables in sections that name a report, where the report has a row of that name."""
    for page in PAGES:
        for section in sections(page):
            for record in set(RECORD.findall(section)):
                if not (ROOT / record).is_file():
                    continue  # the test above fails on it
                names = {name for name, *_ in rows((ROOT / record).read_text("utf-8"))}
                for name, *cells in rows(section):
                    if record.endswith(".md") and name in names - {"", "---"}:
                        yield page, record, [name, *cells]


ROWS = list(rows_of_reports())


@pytest.mark.parametrize(("page", "record", "row"), ROWS, ids=[f"{p} {r[0]}" for p, _, r in ROWS])
def test_a_row_of_a_report_is_that_row(page, record, row):
    """The same cells in the same order, so that no figure stands beside another name."""
    name, *cells = row
    reported = [
        cell for other, *rest in rows((ROOT / record).read_text("utf-8")) for cell in rest
        if other == name
    ]  # fmt: skip
    rest = iter(reported)
    assert all(cell in rest for cell in cells if cell), (page, record, row)


def test_reports_are_quoted():
    assert len({(page, record) for page, record, _ in ROWS}) >= 3 and len(ROWS) >= 12
