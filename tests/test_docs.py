"""The documentation: its examples run, its commands parse, its generated parts are complete."""

import doctest
import importlib
import json
import re
import shlex
import sys
from collections import Counter

import pytest
import torch
from detectron2.config import get_cfg

from ghm_d2 import add_ghm_config, cli
from ghm_d2.engine.setup import (
    is_python,
    load_config,
    locate_config_file,
    merge_config_file,
)
from tests.tiny import ROOT

DOCS = ROOT / "docs"
PAGES = {str(p.relative_to(DOCS)): p.read_text("utf-8") for p in sorted(DOCS.rglob("*.md"))}
PAGES = {name: text for name, text in PAGES.items() if not name.startswith(("_build", "generated"))}
EXAMPLES = {
    name: "\n".join(re.findall(r"^```pycon\n(.*?)^```", text, re.S | re.M))
    for name, text in PAGES.items()
}
COMMANDS = [
    (name, command)
    for name, text in PAGES.items()
    for block in re.findall(r"^ *```(?:bash|sh|console)\n(.*?)^ *```", text, re.S | re.M)
    for command in block.replace("\\\n", " ").splitlines()
    if re.match(r"(python train_net|ghm-d2 )", command)
]


@pytest.mark.parametrize("page", [name for name, text in EXAMPLES.items() if text])
def test_examples(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GHM_D2_ZOO", raising=False)
    torch.manual_seed(0)
    test = doctest.DocTestParser().get_doctest(EXAMPLES[page], {}, page, page, 0)
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize(
    "module",
    ["ghm_d2", "ghm_d2.losses", "ghm_d2.modeling", "ghm_d2.model_zoo", "ghm_d2.data"]
    + ["ghm_d2.engine"],
)
def test_every_public_name_has_an_example_and_a_docstring(module):
    public = importlib.import_module(module)
    parse = doctest.DocTestParser().get_examples
    sources = [example.source for text in EXAMPLES.values() for example in parse(text)]
    # An import alone shows nothing.
    used = "\n".join(x for x in sources if not x.startswith(("from ", "import ")))
    pages = "\n".join(PAGES.values())
    for name in public.__all__:
        assert re.search(rf"\b{name}\b", used), f"{module}.{name} has no example in docs/"
        assert getattr(public, name).__doc__, f"{module}.{name} has no docstring"
        described = re.search(rf"^.. auto\w+:: ghm_d2[\w.]*\.{name}$", pages, re.M)
        assert described, f"{module}.{name} is not in the API reference"


def test_commands_are_found():
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[p for p, _ in COMMANDS])
def test_commands(page, command, tmp_path, monkeypatch, capsys):
    """Programs and options exist, and so do config files and keys; README.md's commands run."""
    words = [word for word in shlex.split(command, comments=True) if word != "python"]
    program = words.pop(0)
    name = "train" if program == "train_net.py" else words.pop(0)
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    unknown = [w for w in words if w.startswith("--") and w.partition("=")[0] not in text]
    assert not unknown, f"{page}: {program} {name} has no {unknown}"

    cfg = get_cfg()
    add_ghm_config(cfg)
    if "--config-file" in words:
        file = words[words.index("--config-file") + 1]
        if not file.startswith("output/"):  # of a training before
            monkeypatch.chdir(tmp_path)
            if is_python(file):
                load_config(file, [w for w in words if re.fullmatch(r"[a-z_]+(\.\w+)+=.*", w)])
            else:
                merge_config_file(cfg, locate_config_file(file))
    for key, value in zip(words, words[1:], strict=False):
        if re.fullmatch(r"(MODEL|SOLVER|INPUT|DATASETS|DATALOADER|TEST)(\.\w+)+", key):
            cfg.merge_from_list([key, value])


def test_make_targets_of_the_docs_exist():
    makefile = (ROOT / "Makefile").read_text()
    for text in PAGES.values():
        for target in re.findall(r"^make (\w[\w-]*)", text, re.M):
            assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page):
    folder = (DOCS / page).parent
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", PAGES[page]):
        assert target.startswith("http") or (folder / target).exists(), f"{page}: {target}"
    for path in re.findall(r"`((?:configs|tools|benchmarks|tests|docs)/[\w/.*-]+)`", PAGES[page]):
        assert list(ROOT.glob(path)), f"{page} names {path}"


def test_the_page_on_wrong_labels_counts_what_is_in_its_record():
    rows = json.loads((ROOT / "benchmarks/results/bccd_published_suspects.json").read_text())
    counts = Counter(row["kind"] for row in rows)
    sentence = "{missing} missing objects, {spurious} spurious boxes, {moved} that lie badly and "
    assert (sentence + "{wrong class} wrong classes").format(**counts) in PAGES["audit.md"]


# --- what docs/generate.py makes ----------------------------------------------------------------


@pytest.fixture(scope="module")
def generate():
    sys.path.insert(0, str(DOCS))
    yield importlib.import_module("generate")
    sys.path.remove(str(DOCS))


def test_configuration_has_every_key(generate):
    cfg, stock = get_cfg(), get_cfg()
    add_ghm_config(cfg)
    ours = set(dict(generate.leaves(cfg))) - set(dict(generate.leaves(stock)))
    node, found = "", set()
    for line in generate.configuration().splitlines():
        if heading := re.fullmatch(r"## `(.+)`", line):
            node = heading.group(1)
        elif row := re.fullmatch(r"\| `(\w+)` \| `.*` \| .+ \|", line):
            found.add(f"{node}.{row.group(1)}")
    assert found == ours


def test_a_key_without_comment_is_an_error(generate):
    comments = generate.comments_by_target("# One.\nnode.BINS = 1\n\ncfg.MODEL.GHM.NEW = 1\n")
    assert generate.comment_of("MODEL.GHM.RPN.CLS.BINS", comments) == "One."
    with pytest.raises(ValueError, match="MODEL.GHM.NEW has no comment"):
        generate.comment_of("MODEL.GHM.NEW", comments)


def test_measurements_are_those_of_the_files(generate, tmp_path):
    text = generate.performance(generate.RESULTS)
    for file in [*generate.RESULTS.glob("bench_*.json"), generate.RESULTS / "kernel_code.json"]:
        assert f"`benchmarks/results/{file.name}`" in text
    assert "| retinanet | train | 1.71 s | 1.67 s | 0.977 (0.964 to 0.982) | 0.85 |" in text
    assert generate.duration(0.0567) == "56.7 ms" and generate.duration(3.6e-5) == "36 µs"
    for file in generate.RESULTS.glob("audit_*.json"):
        for found in json.loads(file.read_text())["rows"].values():
            first = f"| ghm-d2 audit | {found[0]['precision']:.3f} |"
            assert first in generate.audit(generate.RESULTS)
    assert generate.performance(tmp_path) == ""
    assert generate.audit(tmp_path) == ""


def test_studies_show_their_whole_report(generate):
    """The page of a study has every line of its report, and the list of studies every verdict."""
    reports = generate.reports(generate.RESULTS)
    assert len(reports) >= 6
    verdicts = generate.list_of_studies(generate.RESULTS)
    for report in reports:
        text = report.read_text("utf-8")
        page = generate.study(report)
        lines = [line for line in text.splitlines()[1:] if line and not line.startswith("#")]
        assert not [line for line in lines if line not in page]
        for name, verdict in re.findall(r"^\| (.+?) \| \d+ \| .* \| (better|worse) \|", text, re.M):
            assert name in verdicts and verdict in page
    better = next(line for line in verdicts.splitlines() if "small_data_bccd.md" in line)
    cells = [cell.strip() for cell in better.split("|")]
    assert cells[2:5] == ["focal + SL1", "focal + GHM-R of the preset", "cross entropy + SL1"]
